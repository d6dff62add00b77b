"""Values: wrong ones are refused in words, all of them are documented, and all of them are tried."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import yaml

from helm import document_values, list_methods
from helm.charts import CASES, CHART, GIVEN, RECIPE, Manifest, job_of, refusal, render, values_of
from helm.document_values import comments, page, values

CLUSTER = {"mode": "existing-cluster"}


@cache
def schema() -> Manifest:
    return dict(json.loads((CHART / "values.schema.json").read_text()))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"outptu": "s3://b/o"}, "Additional property outptu is not allowed"),
        ({"mode": "batch"}, '"rayjob", "existing-cluster", "job"'),
        ({"workerGroups": {"cpu": {"replcas": 2}}}, "workerGroups.cpu: Additional property replcas is not allowed"),
        ({"workerGroups": {"cpu": {"minReplicas": "two"}}}, "workerGroups.cpu.minReplicas: Invalid type"),
        ({"workerGroups": {"cpu": {"gpus": -1}}}, "workerGroups.cpu.gpus: Must be greater than or equal to 0"),
        ({"workerGroups": {"Big Ones": {}}}, "Big Ones"),
        ({"head": {"resources": {"limits": {"memory": "16 GB"}}}}, "head.resources.limits.memory: Does not match"),
        ({"s3": {"endpoint": "minio:9000"}}, "s3.endpoint: Does not match pattern '^(https?://.+)?$'"),
        ({"s3": {"accessKey": "AKIA"}}, "s3: Additional property accessKey is not allowed"),
        ({"output": "s3://b/o; rm -rf /"}, "output: Does not match pattern"),
        ({"merge": {"extraArgs": ["$(id)"]}}, "merge.extraArgs.0: Does not match pattern"),
        ({"job": {"retries": 1.5}}, "job.retries: Invalid type. Expected: integer, given: number"),
        ({"image": {"digest": "sha256:123"}}, "image.digest: Does not match pattern"),
        ({"security": {"runAsUser": 0}}, "security.runAsUser: Must be greater than or equal to 1"),
        ({"security": {"privileged": True}}, "security: Additional property privileged is not allowed"),
        (
            {"extraVolumes": [{"name": "d", "hostPath": {"path": "/"}}]},
            "extraVolumes.0: Additional property hostPath is not allowed",
        ),
        ({"networkPolicy": {"dns": {"ports": [70000]}}}, "networkPolicy.dns.ports.0: Must be less than or equal"),
        ({"recipe": {"content": {"merge_method": "linear"}}}, "recipe.content: Invalid type. Expected: string"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_schema_refuses(wrong: Manifest, said: str) -> None:
    told = refusal({**GIVEN, **wrong})
    assert said in told
    assert "values don't meet the specifications of the schema" in told


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"recipe": {}}, "no recipe: give its YAML with --set-file recipe.content=recipe.yml"),
        ({"recipe": {"content": RECIPE, "existingConfigMap": "r"}}, "are both set; give one"),
        ({"recipe": {"content": "merge_method: ["}}, "recipe.content is not a recipe"),
        ({"output": ""}, "no output: set it as in --set output=s3://bucket/merged, or write `output: s3://"),
        ({"output": "", "recipe": {"content": "output: {max_shard_size: 1GB}"}}, "no output: set it as in"),
        (CLUSTER, "mode existing-cluster needs existingCluster.name"),
        (CLUSTER | {"existingCluster": {"name": "a", "address": "http://a"}}, "are both set; give one"),
        ({"workerGroups": {"cpu": None}}, "workerGroups is empty"),
        (
            {"workerGroups": {"cpu": {"maxReplicas": 1}}},
            "workerGroups.cpu: replicas 2 is not between minReplicas 2",
        ),
        ({"workerGroups": {"cpu": {"replicas": 1}}}, "workerGroups.cpu: replicas 1 is not between"),
        ({"workerDefaults": {"spot": True}}, "workerGroups.cpu.spot is true, but the chart does not know"),
        ({"mode": "job", "local": {"spot": True}}, "local.spot is true, but the chart does not know"),
        ({"ray": {"version": "2.51.0"}}, "ray.auth token needs Ray 2.52.0 or newer, not 2.51.0"),
        ({"sharedMemory": {"sizeLimit": "100Mi"}}, "ray.objectStoreMemory 256Mi does not fit"),
        ({"ray": {"reservedMemory": "16Gi"}}, "workerGroups.cpu: the memory limit 16Gi leaves nothing for work"),
    ],
)
def test_values_that_do_not_go_together_are_refused(wrong: Manifest, said: str) -> None:
    assert said in refusal({**GIVEN, **wrong})


@pytest.mark.parametrize(
    "text",
    [
        "merge_method: tias",
        "experts: []\nbackbone: {merge_method: tias}",
        "stages: [{merge_method: linear}, {merge_method: tias}]",
        "name: x\nmerge_method: tias\n---\nmerge_method: linear\n",
        "name: x\nmerge_method: linear\n---\nmerge_method: tias\n---\n",
    ],
)
def test_unknown_methods_are_refused(text: str) -> None:
    said = refusal({**GIVEN, "recipe": {"content": text}})
    assert 'recipe.content: unknown merge method "tias"; accepted: ' in said
    assert f": {', '.join(json.loads(list_methods.FILE.read_text()))};" in said
    render({**GIVEN, "recipe": {"content": text, "pluginMethods": ["tias"]}})


@pytest.mark.parametrize(
    "recipe",
    [
        {"content": f"{RECIPE}output: s3://b/o\n"},
        {"content": f"{RECIPE}output: {{path: s3://b/o, max_shard_size: 1GB}}\n"},
        {"content": f"name: x\n{RECIPE}---\nmerge_method: linear\noutput: s3://b/o\n"},
        {"content": "stages: [{merge_method: linear, output: s3://b/o}]"},
        {"content": "stages: [{merge_method: linear}]\noutput: s3://b/o"},
        {"existingConfigMap": "mine"},
    ],
)
def test_an_output_in_the_recipe_will_do(recipe: Manifest) -> None:
    command = job_of({"recipe": recipe, "output": ""})["spec"]["entrypoint"].split()
    assert command[:2] == ["merge", "/etc/mergekit-ray/recipe.yml"]
    assert command[2].startswith("--")


def test_known_methods_are_those_of_the_package() -> None:
    assert list_methods.FILE.read_text() == list_methods.text(), "run `make chart`"


def objects(part: Any, path: str) -> Iterator[tuple[str, Manifest]]:
    """All schemas of objects in a schema."""
    if isinstance(part, dict):
        if part.get("type") == "object":
            yield path, part
        for key, each in part.items():
            yield from objects(each, f"{path}/{key}")


def test_schema_is_closed() -> None:
    # Parts that are Kubernetes' own and are checked by it.
    open_ = [path for path, part in objects(schema(), "") if "additionalProperties" not in part]
    assert open_ == ["/properties/global", "/definitions/open"]


def test_every_value_has_a_meaning_and_a_default() -> None:
    rows = list(values())
    assert len(rows) > 100
    leaves = [row.path for row in rows if row.default is None and row.kind != "object"]
    assert leaves == []


def test_every_comment_is_of_a_value() -> None:
    assert list(comments()) == [row.path for row in values()]


def test_page_and_schema_say_what_the_comments_say() -> None:
    hint = "run `make chart`"
    assert (CHART / "README.md").read_text() == page(), hint
    assert (CHART / "values.schema.json").read_text() == document_values.schema(), hint


def test_schema_and_defaults_name_the_same_values() -> None:
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    assert list(defaults) == [name for name in schema()["properties"] if name != "global"]


def settings(case: str) -> Iterator[str]:
    """Paths that a set of values sets; a worker group's as those of the defaults."""

    def walk(part: Manifest, path: str) -> Iterator[str]:
        for key, each in part.items():
            here = f"{path}.{key}".removeprefix(".")
            yield here
            if isinstance(each, dict):
                yield from walk(each, "workerDefaults" if path == "workerGroups" else here)

    return walk(values_of(case), "")


def test_every_value_is_tried_in_some_set() -> None:
    tried = {path for case in CASES for path in settings(case)}
    assert [row.path for row in values() if row.path not in tried] == []
