"""A run does what the values say: command, retries, workers, names."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
import typer

from helm.charts import CASES, GIVEN, Manifest, Pod, job_of, one, pod, pods_of, render, rendered, values_of
from mergekit_ray.cli import merge


def options_of(words: list[str]) -> dict[str, Any]:
    """A command line of `merge` as `merge` itself reads it."""
    app = typer.Typer()
    app.command()(merge)
    assert words[0] == "merge"
    context = typer.main.get_command(app).make_context("merge", words[1:])
    return dict(context.params)


def command_of(case: str) -> list[str]:
    [job] = [each for each in rendered(case) if each["kind"] in {"RayJob", "Job"}]
    if job["kind"] == "RayJob":
        return shlex.split(job["spec"]["entrypoint"])
    command = Pod("", job["spec"]["template"]).container["args"]
    return list(command[command.index("merge") :])


def groups(job: Manifest) -> dict[str, Manifest]:
    return {each["groupName"]: each for each in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]}


@pytest.mark.parametrize("case", CASES)
def test_command_is_one_that_merge_takes(case: str) -> None:
    options = options_of(command_of(case))
    mode = values_of(case).get("mode", "rayjob")
    assert options["executor"].value == ("local" if mode == "job" else "ray")
    assert options["recipe"] == ("recipe.yml" if mode == "existing-cluster" else "/etc/mergekit-ray/recipe.yml")
    assert options["output"] == values_of(case)["output"]


def test_every_option() -> None:
    options = options_of(command_of("everything"))
    assert options | {"recipe": "", "executor": None} == {
        "recipe": "",
        "output": "s3://models/nightly",
        "executor": None,
        "address": None,
        "num_workers": 12,
        "memory_bytes": 6_000_000_000,
        "device": "cpu",
        "overwrite": True,
        "allow_non_finite": True,
        "allow_config_conflicts": True,
        "unsafe_ignore_tokenizers": True,
        "seed": 12345678901,
        "lenient": True,
        "quiet": False,
        "max_shard_size": None,  # recipes say it
        "log_format": options["log_format"],
        "debug": True,
        "version": None,
    }
    assert options["log_format"].value == "json"


def test_recipe_is_where_the_command_reads_it() -> None:
    for case in CASES:
        for each in pods_of(rendered(case)):
            names = {mount["mountPath"]: mount["name"] for mount in each.container["volumeMounts"]}
            reads = each.where in {"head", "Job"} or each.where.endswith("validate")
            assert not reads or "/etc/mergekit-ray/recipe.yml" in names, (case, each.where)


def test_existing_config_map_is_mounted_under_the_name_that_is_read() -> None:
    volumes = {each["name"]: each for each in pod(rendered("existing-cluster"), "Job").spec["volumes"]}
    assert volumes["recipe"]["configMap"] == {
        "name": "my-recipes",
        "items": [{"key": "ties.yml", "path": "recipe.yml"}],
    }
    config_maps = [each for each in rendered("existing-cluster") if each["kind"] == "ConfigMap"]
    assert [list(each["data"]) for each in config_maps] == [["submit.py", "tiny_merge.py"]]


def test_head_computes_nothing_and_workers_leave_room_for_ray() -> None:
    job = one(rendered("everything"), "RayJob")
    assert job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"] == {
        "num-cpus": "0",
        "dashboard-host": "0.0.0.0",
        "metrics-export-port": "8080",
        "object-store-memory": str(512 << 20),
        "log-color": "false",
    }
    assert groups(job)["cpu"]["rayStartParams"]["memory"] == str((64 - 3) << 30)
    assert groups(job)["gpu"]["rayStartParams"]["num-cpus"] == "8"


def test_workers_without_a_limit_share_what_ray_finds() -> None:
    job = job_of({"workerDefaults": {"resources": {"limits": {"memory": None}}}})
    assert "memory" not in groups(job)["cpu"]["rayStartParams"]


@pytest.mark.parametrize(("limit", "num_bytes"), [("8G", 8 * 10**9), ("4096Mi", 4 << 30), (17179869184, 16 << 30)])
def test_memory_is_read_as_kubernetes_reads_it(limit: str | int, num_bytes: int) -> None:
    job = job_of({"workerDefaults": {"resources": {"limits": {"memory": limit}}}, "ray": {"reservedMemory": "1Gi"}})
    assert groups(job)["cpu"]["rayStartParams"]["memory"] == str(num_bytes - (1 << 30))


def test_a_failed_rayjob_is_submitted_anew_on_a_new_cluster() -> None:
    spec = job_of({"job": {"retries": 3}})["spec"]
    assert spec["backoffLimit"] == 3
    assert "jobId" not in spec  # with one, KubeRay would find the failed submission again
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["submitterPodTemplate"]["spec"]["restartPolicy"] == "Never"


def test_an_existing_cluster_is_never_retried_by_kuberay() -> None:
    # KubeRay before 1.6 deletes a selected cluster in order to retry on it.
    assert job_of({"mode": "existing-cluster", "existingCluster": {"name": "shared"}})["kind"] == "Job"


@pytest.mark.parametrize("case", ["existing-cluster", "plain-job"])
def test_jobs_retry_what_may_succeed(case: str) -> None:
    job = one(rendered(case), "Job")["spec"]
    fail, ignore = job["podFailurePolicy"]["rules"]
    assert (fail["action"], fail["onExitCodes"]["values"]) == ("FailJob", [2, 3])
    assert fail["onExitCodes"]["containerName"] == Pod("", job["template"]).container["name"]
    assert (ignore["action"], ignore["onPodConditions"][0]["type"]) == ("Ignore", "DisruptionTarget")
    assert job["template"]["spec"]["restartPolicy"] == "Never"


def test_groups_take_the_defaults_and_what_they_say() -> None:
    both = {"cpu": {"maxReplicas": 3}, "big": {"minReplicas": 2, "maxReplicas": 2, "nodeSelector": {"size": "big"}}}
    job = job_of({"workerDefaults": {"nodeSelector": {"arch": "amd64"}}, "workerGroups": both})
    cpu, big = groups(job)["cpu"], groups(job)["big"]
    # The chart's own values give `cpu` two pods.
    assert [cpu[key] for key in ("minReplicas", "replicas", "maxReplicas")] == [2, 2, 3]
    assert [big[key] for key in ("minReplicas", "replicas", "maxReplicas")] == [2, 2, 2]
    assert cpu["template"]["spec"]["nodeSelector"] == {"arch": "amd64"}
    assert big["template"]["spec"]["nodeSelector"] == {"arch": "amd64", "size": "big"}


def test_gpu_workers_on_spot_nodes() -> None:
    manifests = rendered("gpu-spot")
    assert list(groups(one(manifests, "RayJob"))) == ["gpu"]
    worker, head = pod(manifests, "worker gpu"), pod(manifests, "head")
    assert worker.container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert worker.spec["nodeSelector"] == {"karpenter.sh/capacity-type": "spot"}
    assert [each["key"] for each in worker.spec["tolerations"]] == ["nvidia.com/gpu", "spot"]
    assert head.spec["nodeSelector"] == {"karpenter.sh/capacity-type": "on-demand"}
    [spread] = worker.spec["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"]["ray.io/group"] == "gpu"
    own = {key: value for key, value in spread["labelSelector"]["matchLabels"].items() if key != "ray.io/group"}
    assert own.items() <= worker.template["metadata"]["labels"].items()


def test_gpus_bring_a_toleration_unless_there_is_one() -> None:
    def tolerations(**group: Any) -> list[Manifest]:
        [worker] = [each for each in pods_of([job_of({"workerDefaults": group})]) if each.where == "worker cpu"]
        return list(worker.spec.get("tolerations", []))

    own = {"key": "amd.com/gpu", "operator": "Equal", "value": "mi300", "effect": "NoExecute"}
    added = {"key": "amd.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    assert tolerations() == []
    assert tolerations(gpus=2, gpuResource="amd.com/gpu") == [added]
    assert tolerations(gpus=2, gpuResource="amd.com/gpu", tolerations=[own]) == [own]
    other = {**own, "key": "dedicated"}
    assert tolerations(gpus=2, gpuResource="amd.com/gpu", tolerations=[other]) == [other, added]


def test_pods_carry_the_identity_that_a_cloud_gives_them() -> None:
    manifests = rendered("azure")
    account = one(manifests, "ServiceAccount")["metadata"]
    assert "azure.workload.identity/client-id" in account["annotations"]
    for each in pods_of(manifests):
        assert each.template["metadata"]["labels"]["azure.workload.identity/use"] == "true", each.where
        assert each.spec["serviceAccountName"] == account["name"]
    gke = rendered("gke")
    assert "iam.gke.io/gcp-service-account" in one(gke, "ServiceAccount")["metadata"]["annotations"]
    assert pod(gke, "worker cpu").template["metadata"]["annotations"]["gke-gcsfuse/volumes"] == "true"


def test_kueue_finds_a_suspended_job_with_its_queue() -> None:
    job = one(rendered("kueue"), "RayJob")
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "merges"
    assert job["spec"]["suspend"] is True
    # Kueue takes no RayJob that keeps its cluster.
    assert job["spec"]["shutdownAfterJobFinishes"] is True


def test_a_group_with_an_image_of_its_own() -> None:
    manifests = rendered("everything")
    assert pod(manifests, "worker gpu").container["image"].endswith("/mergekit-ray:0.1.0-cuda")
    assert "@sha256:" in pod(manifests, "worker cpu").container["image"]


def test_autoscaling_asks_for_workers_to_scale_to() -> None:
    def workers(values: Manifest) -> int | None:
        found = options_of(shlex.split(job_of(values)["spec"]["entrypoint"]))["num_workers"]
        return None if found is None else int(found)

    group = {"workerGroups": {"cpu": {"minReplicas": 0, "maxReplicas": 9}, "more": {"maxReplicas": 3}}}
    assert workers(group) is None
    assert workers({**group, "autoscaling": {"enabled": True}}) == 12
    assert workers({**group, "autoscaling": {"enabled": True}, "merge": {"workers": 5}}) == 5


def test_budgets_are_such_as_kubernetes_takes_for_these_pods() -> None:
    budgets = [each for each in rendered("everything") if each["kind"] == "PodDisruptionBudget"]
    by_component = {
        each["spec"]["selector"]["matchLabels"]["app.kubernetes.io/component"]: each["spec"] for each in budgets
    }
    assert {name: spec["minAvailable"] for name, spec in by_component.items()} == {"head": 1, "worker": 1}
    [plain] = [each for each in rendered("plain-job") if each["kind"] == "PodDisruptionBudget"]
    job = pod(rendered("plain-job"), "Job")
    assert plain["spec"]["selector"]["matchLabels"].items() <= job.template["metadata"]["labels"].items()


@pytest.mark.parametrize(
    "values", [{}, {"mode": "job"}, {"mode": "existing-cluster", "existingCluster": {"name": "c"}}]
)
def test_another_run_has_another_name(values: Manifest) -> None:
    def name(**more: Any) -> str:
        return str(job_of({**values, **more})["metadata"]["name"])

    before = name()
    assert name() == before
    others = [
        name(run="2"),
        name(recipe={"content": GIVEN["recipe"]["content"] + "dtype: bfloat16\n"}),
        name(output="s3://bucket/elsewhere"),
        name(image={"tag": "next"}),
    ]
    assert len({before, *others}) == 5
    unrelated = name(
        podMonitor={"enabled": True}, networkPolicy={"enabled": True}, podDisruptionBudget={"enabled": True}
    )
    assert unrelated == before


def test_ray_is_the_version_that_is_tested() -> None:
    import ray

    version = one(rendered("default"), "RayJob")["spec"]["rayClusterSpec"]["rayVersion"]
    assert version == ray.__version__


def test_stores_elsewhere() -> None:
    worker = pod(rendered("everything"), "worker cpu").environment
    assert worker["AWS_ENDPOINT_URL_S3"] == "https://s3.storage.svc:9000"
    assert worker["AWS_CA_BUNDLE"] == "/etc/mergekit-ray/ca/ca.crt"
    assert worker["HF_ENDPOINT"] == "https://hub.example.com"
    assert worker["NODE_NAME"] == {"fieldRef": {"fieldPath": "spec.nodeName"}}


def test_chart_needs_no_values_of_another_mode() -> None:
    kinds = sorted(each["kind"] for each in render({**GIVEN, "mode": "job", "workerGroups": {"cpu": None}}))
    assert kinds == ["ConfigMap", "ConfigMap", "Job", "Pod", "Pod", "ServiceAccount"]
