"""Generates the plain manifests in ``deploy/``, for clusters without Helm: ``python -m helm.render_deploy``.

They are what ``helm template`` makes of the values below, without the labels that only Helm uses. The WorkflowTemplate
for Argo is the chart's pod of mode ``job``, with recipe and output as parameters.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any, Final

import yaml

from helm.package_chart import CHART, find_helm

FOLDER: Final = CHART.parents[1] / "deploy"

_HEAD: Final = "# Generated from the chart by `make chart`. README.md in this folder says how to use it.\n"
_NAME: Final = "merge"
_RECIPE: Final = """\
merge_method: linear
models:
  - model: s3://models/first
    parameters: {weight: 0.5}
  - model: s3://models/second
    parameters: {weight: 0.5}
dtype: bfloat16
"""
_COMMON: Final[dict[str, Any]] = {
    "fullnameOverride": _NAME,
    "recipe": {"content": _RECIPE},
    "output": "s3://models/merged",
    "s3": {"existingSecret": "s3-credentials", "region": "us-east-1"},
}
_VALUES: Final[dict[str, dict[str, Any]]] = {
    "rayjob": {},
    "rayjob-gpu": {"workerGroups": {"cpu": {"gpus": 1, "imageTag": "{version}-cuda"}}},
    "job": {"mode": "job"},
    "existing-cluster": {"mode": "existing-cluster", "existingCluster": {"name": "my-ray-cluster"}},
    "kueue": {"job": {"suspend": True, "labels": {"kueue.x-k8s.io/queue-name": "my-queue"}}},
}
_OF_HELM: Final = re.compile(
    r"^ +(?:namespace: default|helm\.sh/chart: .*|app\.kubernetes\.io/managed-by: .*)\n|^# Source: .*\n", re.MULTILINE
)


def files() -> dict[str, str]:
    """The manifests, by file name."""
    made = {f"{name}.yaml": _HEAD + _plain(values) for name, values in _VALUES.items()}
    made["argo-workflow.yaml"] = _HEAD + _argo(_plain(_VALUES["job"]))
    return made


def _plain(values: dict[str, Any]) -> str:
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
    text = yaml.safe_dump({**_COMMON, **values}).replace("{version}", version)
    command = [find_helm(), "template", _NAME, str(CHART), "--skip-tests", "--values", "-"]
    rendered = subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout  # noqa: S603
    parts = [part for part in _OF_HELM.sub("", rendered).split("---\n") if part.strip()]
    # The script that submits jobs, and the one of `helm test`, are mounted in some modes only.
    used = [part for part in parts if not _is_config_map(part) or rendered.count(f"name: {_name_of(part)}\n") > 1]
    return "".join(f"---\n{part}" for part in used)


def _is_config_map(part: str) -> bool:
    return str(yaml.safe_load(part)["kind"]) == "ConfigMap"


def _name_of(part: str) -> str:
    return str(yaml.safe_load(part)["metadata"]["name"])


def _argo(manifests: str) -> str:
    """A WorkflowTemplate that runs the pod of the job among ``manifests``, and the service account of that pod."""
    parts = {part["kind"]: part for part in yaml.safe_load_all(manifests)}
    job, account = parts["Job"], parts["ServiceAccount"]
    pod = job["spec"]["template"]["spec"]
    [container] = pod["containers"]
    recipe = next(mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "recipe")
    output = _COMMON["output"]
    command, *arguments = ["{{inputs.parameters.output}}" if word == output else word for word in container["args"]]
    template = {
        "name": "merge",
        "inputs": {
            "parameters": [{"name": "recipe"}, {"name": "output"}],
            "artifacts": [{"name": "recipe", "path": recipe, "raw": {"data": "{{inputs.parameters.recipe}}"}}],
        },
        "metadata": {"labels": job["spec"]["template"]["metadata"]["labels"]},
        # A wrong recipe (2) or wrong inputs (3) stay wrong.
        "retryStrategy": {
            "limit": str(job["spec"]["backoffLimit"]),
            "retryPolicy": "Always",
            "expression": "!(lastRetry.exitCode in ['2', '3'])",
        },
        "securityContext": pod["securityContext"],
        "container": {key: value for key, value in container.items() if key not in ("name", "args", "volumeMounts")}
        # Without a command, Argo asks the registry for the image's.
        | {"command": [command], "args": arguments, "volumeMounts": _without_recipe(container["volumeMounts"])},
        "volumes": _without_recipe(pod["volumes"]),
    }
    workflow = {
        "apiVersion": "argoproj.io/v1alpha1",
        "kind": "WorkflowTemplate",
        "metadata": {"name": _NAME, "labels": job["metadata"]["labels"]},
        "spec": {
            "entrypoint": "merge",
            "arguments": {
                "parameters": [{"name": "recipe", "value": _RECIPE}, {"name": "output", "value": output}],
            },
            "serviceAccountName": pod["serviceAccountName"],
            "automountServiceAccountToken": False,
            "executor": {"serviceAccountName": "argo-executor"},
            "templates": [template],
        },
    }
    return "".join(f"---\n{yaml.dump(part, Dumper=_Dumper, sort_keys=False)}" for part in (account, workflow))


def _without_recipe(named: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [each for each in named if each["name"] != "recipe"]


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as blocks, and repeats what occurs twice."""

    def ignore_aliases(self, data: Any) -> bool:
        del data
        return True


def _text(dumper: yaml.SafeDumper, data: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", data, style="|" if "\n" in data else None)


_Dumper.add_representer(str, _text)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.yaml"):
        old.unlink()
    for name, manifests in files().items():
        Path(FOLDER, name).write_text(manifests)
