"""Manifests are what Kubernetes and KubeRay take."""

from __future__ import annotations

import copy

import kubernetes_validate
import pytest

import mergekit_ray
from helm.charts import CASES, CHART, CI, GIVEN, Manifest, one, pods_of, render, rendered, run_helm, values_of
from helm.kuberay import rayjob_validator

VERSIONS = ("1.29", "1.31", "1.33", "1.35", "1.37")
FOREIGN = {"RayJob", "PodMonitor"}


def validate_all(manifests: tuple[Manifest, ...], version: str) -> int:
    checked = 0
    for each in manifests:
        if each["kind"] not in FOREIGN:
            kubernetes_validate.validate(each, version, strict=True)
            checked += 1
    return checked


@pytest.mark.parametrize("case", CASES)
def test_lint(case: str) -> None:
    done = run_helm("lint", "--strict", str(CHART), "--values", str(CI / f"{case}.yaml"))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("case", CASES)
def test_kubernetes_takes_every_manifest(case: str, version: str) -> None:
    manifests = rendered(case)
    num_foreign = sum(each["kind"] in FOREIGN for each in manifests)
    assert validate_all(manifests, version) == len(manifests) - num_foreign
    # Pods in a RayJob are checked again by Kubernetes when KubeRay makes them.
    for pod in pods_of(manifests):
        whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": pod.spec}
        kubernetes_validate.validate(whole, version, strict=True)


def test_the_check_of_kubernetes_schemas_sees_a_fault() -> None:
    wrong = copy.deepcopy(rendered("plain-job"))
    one(wrong, "Job")["spec"]["backofLimit"] = 1
    with pytest.raises(kubernetes_validate.ValidationError, match="backofLimit"):
        validate_all(wrong, VERSIONS[-1])


@pytest.mark.parametrize("case", CASES)
def test_kuberay_takes_the_rayjob(case: str) -> None:
    jobs = [each for each in rendered(case) if each["kind"] == "RayJob"]
    assert len(jobs) == (values_of(case).get("mode", "rayjob") == "rayjob")
    validator = rayjob_validator()
    assert [error.json_path + ": " + error.message for job in jobs for error in validator.iter_errors(job)] == []


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("rayClusterSpec", "rayVersoin"), "2.60.0", "rayVersoin"),
        (("backoffLimit",), "two", "two"),
        (("rayClusterSpec", "authOptions", "mode"), "sesame", "sesame"),
        (("submitterPodTemplate", "spec", "containers", 0, "resources", "limits", "memory"), 1.5, "1.5"),
    ],
)
def test_the_check_of_kuberay_schemas_sees_a_fault(path: tuple[str | int, ...], value: object, said: str) -> None:
    validator = rayjob_validator()
    job = copy.deepcopy(one(rendered("default"), "RayJob"))
    part = job["spec"]
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    assert any(said in error.message for error in validator.iter_errors(job))


def test_podmonitor_reads_the_port_that_pods_have() -> None:
    manifests = rendered("everything")
    monitor = one(manifests, "PodMonitor")
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    [endpoint] = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint == {"port": "metrics", "interval": "15s"}
    [expression] = monitor["spec"]["selector"]["matchExpressions"]
    for pod in pods_of(manifests):
        labels = pod.template["metadata"]["labels"]
        ports = [port["name"] for port in pod.container.get("ports", ())]
        assert (labels[expression["key"]] in expression["values"]) == (endpoint["port"] in ports), pod.where
        assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()


@pytest.mark.parametrize("case", CASES)
def test_labels_and_names(case: str) -> None:
    manifests = rendered(case)
    names = [(each["kind"], each["metadata"]["name"]) for each in manifests]
    assert len(set(names)) == len(names)
    wanted = {"name", "instance", "version", "managed-by", "part-of"}
    for each in manifests:
        assert each["metadata"]["namespace"] == "ml"
        assert {f"app.kubernetes.io/{label}" for label in wanted} <= each["metadata"]["labels"].keys(), each["kind"]
    for pod in pods_of(manifests):
        labels = pod.template["metadata"]["labels"]
        assert {f"app.kubernetes.io/{label}" for label in (*wanted, "component")} <= labels.keys(), pod.where


@pytest.mark.parametrize(
    ("release", "override", "name"),
    [
        ("demo", {}, "demo-mergekit-ray"),
        ("mergekit-ray", {}, "mergekit-ray"),
        ("70b", {}, "m-70b-mergekit-ray"),
        ("a.b", {}, "a-b-mergekit-ray"),
        ("demo", {"nameOverride": "soup"}, "demo-soup"),
        ("demo", {"fullnameOverride": "soup"}, "soup"),
        ("r" * 53, {}, "r" * 38),
    ],
)
def test_names_fit_kuberay(release: str, override: Manifest, name: str) -> None:
    job = one(render({**GIVEN, **override}, release=release), "RayJob")["metadata"]["name"]
    assert job.rpartition("-")[0] == name
    # KubeRay takes 47 characters and appends 16 to them for the head's service, whose name may have 63.
    assert len(job) <= 47


def test_versions_are_the_packages() -> None:
    shown = run_helm("show", "chart", str(CHART)).stdout
    assert f"appVersion: {mergekit_ray.__version__}\n" in shown
