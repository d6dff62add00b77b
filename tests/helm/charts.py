"""What the chart makes of values: rendered by helm itself, and taken apart."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from helm.package_chart import CHART, find_helm
from support.waiting import DEADLINE_SECONDS

Manifest = dict[str, Any]

ROOT = CHART.parents[1]
CI = CHART.parent / "ci"
CASES = tuple(sorted(file.stem for file in CI.glob("*.yaml")))
"""The sets of values that are tried, by name."""

RECIPE = "merge_method: linear\nmodels:\n  - model: a\n    parameters: {weight: 1}\n"
GIVEN = {"recipe": {"content": RECIPE}, "output": "s3://bucket/out"}
"""The least that must be given."""


def run_helm(*words: str, values: Mapping[str, Any] | None = None) -> subprocess.CompletedProcess[str]:
    """Run helm; ``values`` are given as a file of values."""
    more = [] if values is None else ["--values", "-"]
    return subprocess.run(
        [find_helm(), *words, *more],
        input=None if values is None else yaml.safe_dump(dict(values)),
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_SECONDS,
    )


def render(values: Mapping[str, Any], *, chart: Path = CHART, release: str = "demo") -> list[Manifest]:
    """The manifests, as they would be sent to Kubernetes."""
    done = run_helm("template", release, str(chart), "--namespace", "ml", values=values)
    assert done.returncode == 0, done.stderr
    return [each for each in yaml.load_all(done.stdout, yaml.CSafeLoader) if each]


def refusal(values: Mapping[str, Any]) -> str:
    """What helm says about values that are wrong."""
    done = run_helm("template", "demo", str(CHART), values=values)
    assert done.returncode != 0, done.stdout
    return done.stderr


@cache
def values_of(case: str) -> Manifest:
    """A set of values."""
    return dict(yaml.safe_load((CI / f"{case}.yaml").read_text()))


@cache
def rendered(case: str) -> tuple[Manifest, ...]:
    """The manifests of a set of values. Not to be changed."""
    return tuple(render(values_of(case)))


def one(manifests: list[Manifest] | tuple[Manifest, ...], kind: str) -> Manifest:
    """The only manifest of a kind."""
    [found] = [each for each in manifests if each["kind"] == kind]
    return found


def job_of(values: Mapping[str, Any]) -> Manifest:
    """The RayJob or Job of the least that must be given and ``values``."""
    [found] = [each for each in render({**GIVEN, **values}) if each["kind"] in {"RayJob", "Job"}]
    return found


@dataclass(frozen=True)
class Pod:
    """A pod that comes of a manifest.

    Attributes:
        where: for messages: kind and role.
        template: its metadata and spec.
        in_ray: whether KubeRay completes it.
    """

    where: str
    template: Manifest
    in_ray: bool = False

    @property
    def spec(self) -> Manifest:
        return dict(self.template["spec"])

    @property
    def container(self) -> Manifest:
        """Its only container."""
        [found] = self.spec["containers"]
        return dict(found)

    @property
    def environment(self) -> dict[str, Any]:
        """By name: the value, or where it comes from."""
        return {each["name"]: each.get("value", each.get("valueFrom")) for each in self.container["env"]}


def pods_of(manifests: list[Manifest] | tuple[Manifest, ...]) -> Iterator[Pod]:
    """All pods of all manifests."""
    for each in manifests:
        kind, spec = each["kind"], each.get("spec", {})
        if kind == "Pod":
            yield Pod(f"Pod {each['metadata']['name']}", each)
        elif kind == "Job":
            yield Pod("Job", spec["template"])
        elif kind == "RayJob":
            cluster = spec["rayClusterSpec"]
            yield Pod("submitter", spec["submitterPodTemplate"], in_ray=True)
            yield Pod("head", cluster["headGroupSpec"]["template"], in_ray=True)
            for group in cluster["workerGroupSpecs"]:
                yield Pod(f"worker {group['groupName']}", group["template"], in_ray=True)


def pod(manifests: list[Manifest] | tuple[Manifest, ...], where: str) -> Pod:
    """The pod of a role."""
    [found] = [each for each in pods_of(manifests) if each.where == where]
    return found
