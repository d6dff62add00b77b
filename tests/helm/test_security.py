"""Pods satisfy the restricted Pod Security Standard, hold no more rights than they need, and hide no credentials.

The standard: https://kubernetes.io/docs/concepts/security/pod-security-standards/
"""

from __future__ import annotations

from typing import Any

import pytest

from helm.charts import CASES, GIVEN, Manifest, Pod, job_of, one, pod, pods_of, render, rendered, values_of

ALLOWED_VOLUMES = {
    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret",
}  # fmt: skip


def violations(spec: Manifest) -> list[str]:
    """What the restricted standard forbids in a pod, as an admission controller would see it."""
    found = [f"{key} is set" for key in ("hostNetwork", "hostPID", "hostIPC", "hostUsers") if spec.get(key)]
    found += [f"volume {volume}" for volume in spec["volumes"] if set(volume) - {"name"} - ALLOWED_VOLUMES]
    of_pod = spec.get("securityContext", {})
    if "sysctls" in of_pod:
        found.append("sysctls are set")
    for container in [*spec["containers"], *spec.get("initContainers", ())]:
        found += container_violations(of_pod, container)
    return found


def container_violations(of_pod: Manifest, container: Manifest) -> list[str]:
    own = container.get("securityContext", {})
    both = {**of_pod, **own}
    wrong = {
        "may run as root": both.get("runAsNonRoot") is not True or both.get("runAsUser") == 0,
        "may escalate": own.get("allowPrivilegeEscalation") is not False,
        "keeps capabilities": own.get("capabilities") != {"drop": ["ALL"]},
        "is privileged": own.get("privileged", False),
        "has no seccomp profile": both.get("seccompProfile", {}).get("type") not in {"RuntimeDefault", "Localhost"},
        "unmasks /proc": own.get("procMount", "Default") != "Default",
        "has ports of the host": any("hostPort" in port for port in container.get("ports", ())),
    }
    return [f"{container['name']} {what}" for what, is_so in wrong.items() if is_so]


@pytest.mark.parametrize("case", CASES)
def test_restricted_standard(case: str) -> None:
    pods = list(pods_of(rendered(case)))
    assert len(pods) >= 3
    assert {each.where: found for each in pods if (found := violations(each.spec))} == {}


@pytest.mark.parametrize(
    ("part", "value", "said"),
    [
        ("runAsNonRoot", False, "ray-head may run as root"),
        ("allowPrivilegeEscalation", True, "ray-head may escalate"),
        ("capabilities", {"drop": ["ALL"], "add": ["SYS_PTRACE"]}, "ray-head keeps capabilities"),
        ("seccompProfile", {"type": "Unconfined"}, "ray-head has no seccomp profile"),
    ],
)
def test_the_check_sees_a_fault(part: str, value: Any, said: str) -> None:
    head = pod(rendered("default"), "head")
    [container] = head.spec["containers"]
    changed = {**container, "securityContext": {**container["securityContext"], part: value}}
    assert violations({**head.spec, "containers": [changed]}) == [said]


@pytest.mark.parametrize("case", CASES)
def test_root_filesystem_is_read_only_and_what_is_written_lies_on_volumes(case: str) -> None:
    for each in pods_of(rendered(case)):
        assert each.container["securityContext"]["readOnlyRootFilesystem"] is True, each.where
        volumes = {volume["name"]: volume for volume in each.spec["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in each.container["volumeMounts"]}
        assert "emptyDir" in mounts["/tmp"], each.where
        assert each.environment["HOME"] == "/tmp"
        is_node = each.where == "head" or each.where.startswith("worker")
        assert (mounts.get("/dev/shm", {}).get("emptyDir", {}).get("medium") == "Memory") == is_node, each.where
        assert len(mounts) == len(each.container["volumeMounts"])
        assert volumes.keys() == {mount["name"] for mount in each.container["volumeMounts"]}, each.where


def test_autoscaler_container_is_as_restricted() -> None:
    cluster = one(rendered("everything"), "RayJob")["spec"]["rayClusterSpec"]
    head = pod(rendered("everything"), "head")
    container = {**cluster["autoscalerOptions"], "name": "autoscaler"}
    assert container_violations(head.spec["securityContext"], container) == []
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["volumeMounts"] == [{"name": "tmp", "mountPath": "/tmp"}]


@pytest.mark.parametrize("case", CASES)
def test_only_an_autoscaling_head_gets_a_token_of_the_api(case: str) -> None:
    autoscaling = values_of(case).get("autoscaling", {}).get("enabled", False)
    for each in pods_of(rendered(case)):
        wanted = autoscaling and each.where == "head"
        assert each.spec["automountServiceAccountToken"] is wanted, each.where


def test_identity_of_the_cluster_can_be_left_to_it() -> None:
    for each in pods_of(rendered("plain-job")):
        context = each.spec["securityContext"]
        assert context == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}, each.where
        assert each.spec["serviceAccountName"] == "default"


def test_credentials_come_from_secrets_and_only_where_models_are_read_or_written() -> None:
    manifests = rendered("everything")
    secret = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN"}
    for each in pods_of(manifests):
        found = {name: value for name, value in each.environment.items() if name in secret}
        assert found.keys() == (set() if each.where == "submitter" else secret), each.where
        assert all(value.keys() == {"secretKeyRef"} for value in found.values())
    assert not [each for each in manifests if each["kind"] == "Secret"]


def test_workload_identity_is_annotations_and_nothing_else() -> None:
    role = {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/merger"}
    manifests = render({**GIVEN, "serviceAccount": {"annotations": role}, "s3": {"region": "eu-west-1"}})
    account = one(manifests, "ServiceAccount")
    assert account["metadata"]["annotations"] == role
    for each in pods_of(manifests):
        assert each.spec["serviceAccountName"] == account["metadata"]["name"]
        assert "AWS_ACCESS_KEY_ID" not in each.environment
        assert each.where == "submitter" or each.environment["AWS_REGION"] == "eu-west-1"


@pytest.mark.parametrize("mode", ["token", "disabled"])
def test_every_process_of_ray_knows_the_mode_of_authentication(mode: str) -> None:
    manifests = render({**GIVEN, "ray": {"auth": mode}, "autoscaling": {"enabled": True}})
    cluster = one(manifests, "RayJob")["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": mode}
    for each in pods_of(manifests):
        if each.in_ray:
            assert each.environment["RAY_AUTH_MODE"] == mode, each.where
    autoscaler = {each["name"]: each["value"] for each in cluster["autoscalerOptions"]["env"]}
    # KubeRay adds token and mode to this container, and would add the mode a second time.
    assert autoscaler.get("RAY_AUTH_MODE") == (None if mode == "token" else mode)


def test_existing_cluster_is_spoken_to_with_its_token() -> None:
    values = {"mode": "existing-cluster", "existingCluster": {"name": "shared"}}
    open_ = Pod("", job_of(values)["spec"]["template"]).environment
    assert open_["RAY_AUTH_MODE"] == "disabled"
    assert "RAY_AUTH_TOKEN" not in open_
    closed = pod(rendered("existing-cluster"), "Job").environment
    assert closed["RAY_AUTH_MODE"] == "token"
    assert closed["RAY_AUTH_TOKEN"] == {"secretKeyRef": {"name": "shared-token", "key": "token"}}
