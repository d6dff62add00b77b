"""The chart's RayJob without a Kubernetes: its pods as containers of the image, each on a host of its own."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import mergekit_ray
from container.engine import Image
from container.kuberay import Cluster, Pods
from helm.charts import Manifest, render
from mergekit_ray.operations.options import MergeOptions
from support.merging import command_environment, run_command
from support.models import ModelLibrary, contents
from support.servers import hosts as hosts_module
from support.servers.hosts import Hosts
from support.servers.s3_bucket import Bucket
from support.servers.s3_server import ACCESS_KEY, REGION, SECRET_KEY, S3Server
from support.waiting import wait_until

pytestmark = [pytest.mark.container, pytest.mark.timeout(1800)]

NUM_WORKERS = 2
SUBMITTER = NUM_WORKERS + 1
NUM_LAYERS = 48


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    """The head's, the workers', and the submitter's."""
    obstacle = hosts_module.missing()
    if obstacle:
        pytest.skip(obstacle)
    with Hosts("mkrpod", NUM_WORKERS + 2) as made:
        yield made


@pytest.fixture(scope="module")
def store(hosts: Hosts) -> Iterator[S3Server]:
    """Reached by all hosts."""
    with S3Server(host=hosts.hub) as server:
        server.create_bucket("models")
        yield server


@pytest.fixture
def bucket(store: S3Server, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A place in it; this process can reach it, too."""
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    return Bucket(store, f"s3://models/{uuid.uuid4().hex}")


@pytest.fixture
def recipe(bucket: Bucket, tmp_path: Path) -> dict[str, Any]:
    """Of models in the store, and of over three hundred shards: long enough for accidents."""
    library = ModelLibrary(tmp_path)
    models = [
        bucket.upload(library.get("llama", i, num_layers=NUM_LAYERS, with_tokenizer=True), f"m{i}") for i in (0, 1)
    ]
    listed = [{"model": uri, "parameters": {"weight": 0.5 + i}} for i, uri in enumerate(models)]
    return {"merge_method": "linear", "models": listed, "output": {"max_shard_size": 1}}


@pytest.fixture
def manifests(image: Image, store: S3Server, bucket: Bucket, recipe: dict[str, Any]) -> list[Manifest]:
    """As rendered by helm."""
    name, _, tag = image.name.rpartition(":")
    worker = {"cpu": "1", "memory": "3Gi"}
    group = {"replicas": NUM_WORKERS, "minReplicas": NUM_WORKERS, "maxReplicas": NUM_WORKERS}
    values = {
        "image": {"repository": name, "tag": tag},
        "recipe": {"content": yaml.safe_dump(recipe)},
        "output": f"{bucket.uri}/out",
        "s3": {"endpoint": store.endpoint_url, "region": REGION, "existingSecret": "s3"},
        "workerGroups": {"cpu": {**group, "resources": {"requests": worker, "limits": worker}}},
    }
    return render(values)


@pytest.fixture
def pods(manifests: list[Manifest], hosts: Hosts, tmp_path: Path) -> Pods:
    secret = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
    folder = tmp_path / "mounted"
    folder.mkdir()
    return Pods(manifests, {"s3": secret}, folder, hosts)


def shards(bucket: Bucket) -> list[str]:
    """That are written."""
    return [key for key in bucket.keys("out") if key.endswith(".safetensors")]


def said_by_the_end(cluster: Cluster, status: str) -> str:
    """What the job printed, once it has ended in this way."""
    wait_until(lambda: cluster.status not in ("", "PENDING", "RUNNING"), seconds=400, every=0.5)
    said = cluster.said
    assert cluster.status == status, said
    return said


def assert_published(bucket: Bucket, recipe: dict[str, Any], folder: Path) -> None:
    """The whole model is there, and it is the one that threads of this process make."""
    mergekit_ray.merge(recipe, folder / "expected", options=MergeOptions(executor="local"))
    (folder / "found").mkdir()
    found, expected = contents(bucket.download("out", folder / "found")), contents(folder / "expected")
    # The manifest names the image's Python, which may be another one.
    assert found.keys() == expected.keys()
    same = [name for name in expected if name.endswith((".safetensors", ".index.json", "config.json"))]
    assert {name: found[name] for name in same} == {name: expected[name] for name in same}
    assert run_command("mergekit-ray", "verify", f"{bucket.uri}/out", env=command_environment()).returncode == 0


def submit_and_wait(cluster: Cluster, bucket: Bucket, num_shards: int) -> None:
    """Until more than so many shards are written."""
    cluster.submit()
    wait_until(lambda: len(shards(bucket)) > num_shards, seconds=180, every=0.2)


def test_a_worker_is_lost_on_the_way(
    manifests: list[Manifest], pods: Pods, hosts: Hosts, bucket: Bucket, recipe: dict[str, Any], tmp_path: Path
) -> None:
    with Cluster(manifests, pods, hosts, 1) as cluster:
        submit_and_wait(cluster, bucket, 10)
        cluster.kill("worker", 1)
        cluster.start_worker(1, "-again")  # as KubeRay does
        said = said_by_the_end(cluster, "SUCCEEDED")
        assert "written" in said
        assert f"{bucket.uri}/out is complete" in said
        wait_until(lambda: "is complete" in cluster.log("submitter", SUBMITTER), seconds=60)
        confined = cluster.inspect("head", 0)["HostConfig"]
        assert confined["ReadonlyRootfs"]
    assert_published(bucket, recipe, tmp_path)


def test_the_head_is_lost_and_the_retry_resumes(
    manifests: list[Manifest], pods: Pods, hosts: Hosts, bucket: Bucket, recipe: dict[str, Any], tmp_path: Path
) -> None:
    with Cluster(manifests, pods, hosts, 1) as cluster:
        submit_and_wait(cluster, bucket, 40)
        cluster.kill("head", 0)
        assert "out/model.safetensors.index.json" not in bucket.keys("out")
    num_before = len(shards(bucket))
    assert num_before > 0
    with Cluster(manifests, pods, hosts, 2) as cluster:
        cluster.submit()
        said = said_by_the_end(cluster, "SUCCEEDED")
        assert "shards already there" in said
    assert_published(bucket, recipe, tmp_path)


def test_a_wrong_recipe_fails_the_job(
    manifests: list[Manifest], pods: Pods, hosts: Hosts, bucket: Bucket, recipe: dict[str, Any]
) -> None:
    for each in manifests:
        if each["kind"] == "ConfigMap" and "recipe.yml" in each["data"]:
            each["data"]["recipe.yml"] = each["data"]["recipe.yml"].replace("linear", "liner")
    with Cluster(manifests, pods, hosts, 1) as cluster:
        cluster.submit()
        said = said_by_the_end(cluster, "FAILED")
        assert "recipe.yml:" in said
        assert "linear" in said
    assert shards(bucket) == []
