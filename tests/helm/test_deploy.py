"""The plain manifests in deploy/ are what the chart makes, and what Kubernetes and KubeRay take."""

from __future__ import annotations

import re
from typing import Any

import kubernetes_validate
import pytest
import yaml

from helm.charts import ROOT, Manifest, one, pods_of
from helm.kuberay import rayjob_validator
from helm.render_deploy import FOLDER, files
from mergekit_ray.config.load import load_recipe

FILES = sorted(path.name for path in FOLDER.glob("*.yaml"))
FOREIGN = {"RayJob", "WorkflowTemplate"}


def manifests(name: str) -> list[Manifest]:
    return [each for each in yaml.load_all((FOLDER / name).read_text(), yaml.CSafeLoader) if each]


def test_files_are_current() -> None:
    assert {name: (FOLDER / name).read_text() for name in FILES} == files(), "run `make chart`"


@pytest.mark.parametrize("name", FILES)
def test_kubernetes_takes_them(name: str) -> None:
    found = manifests(name)
    for each in found:
        assert "namespace" not in each["metadata"], "kubectl apply --namespace would refuse it"
        if each["kind"] not in FOREIGN:
            kubernetes_validate.validate(each, "1.35", strict=True)
    for each in pods_of(found):
        whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": each.spec}
        kubernetes_validate.validate(whole, "1.35", strict=True)


@pytest.mark.parametrize("name", [name for name in FILES if "kind: RayJob" in (FOLDER / name).read_text()])
def test_kuberay_takes_them(name: str) -> None:
    assert list(rayjob_validator().iter_errors(one(manifests(name), "RayJob"))) == []


@pytest.mark.parametrize("name", FILES)
def test_config_maps_are_mounted_and_there(name: str) -> None:
    found = manifests(name)
    there = {each["metadata"]["name"] for each in found if each["kind"] == "ConfigMap"}
    volumes = [volume for pod in pods_of(found) for volume in pod.spec["volumes"]]
    assert there == {volume["configMap"]["name"] for volume in volumes if "configMap" in volume}


def test_argo_runs_the_pod_of_the_job() -> None:
    [job] = pods_of(manifests("job.yaml"))
    workflow = one(manifests("argo-workflow.yaml"), "WorkflowTemplate")["spec"]
    [template] = workflow["templates"]
    container = template["container"]
    command = [*container["command"], *container["args"]]
    values = {each["name"]: each["value"] for each in workflow["arguments"]["parameters"]}
    assert [word.replace("{{inputs.parameters.output}}", values["output"]) for word in command] == job.container["args"]
    [recipe] = template["inputs"]["artifacts"]
    assert recipe["path"] in command
    assert recipe["raw"]["data"] == "{{inputs.parameters.recipe}}"
    load_recipe(values["recipe"])
    for key in ("image", "env", "resources", "securityContext"):
        assert container[key] == job.container[key]
    assert template["securityContext"] == job.spec["securityContext"]
    mounts: list[dict[str, Any]] = container["volumeMounts"]
    assert {mount["name"] for mount in mounts} == {volume["name"] for volume in template["volumes"]}


def test_page_names_the_files() -> None:
    page = (FOLDER / "README.md").read_text()
    assert sorted(re.findall(r"^\| `(\S+\.yaml)` \|", page, re.MULTILINE)) == FILES
    for link in re.findall(r"\]\((\S+)\)", page):
        assert (FOLDER / link).resolve().is_relative_to(ROOT)
        assert (FOLDER / link).exists(), link
