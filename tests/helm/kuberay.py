"""KubeRay's custom resource definitions as JSON schemas, from a folder that an environment variable names."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

VARIABLE = "MERGEKIT_RAY_CRDS"
HOW = (
    f"{VARIABLE} is not set, so RayJobs are not checked against KubeRay's schemas. To check them, set it to a folder "
    "with ray.io_rayjobs.yaml, e.g. that of `helm pull kuberay-operator --untar --repo "
    "https://ray-project.github.io/kuberay-helm/`: kuberay-operator/crds"
)


@cache
def rayjob_validator() -> jsonschema.Draft202012Validator:
    """Checks RayJobs as the API server would, and refuses unknown fields, which the API server drops in silence.

    Skips the test that asks if the definitions are not there.
    """
    folder = os.environ.get(VARIABLE)
    if not folder:
        pytest.skip(HOW)
    with (Path(folder) / "ray.io_rayjobs.yaml").open() as file:
        definition = yaml.load(file, yaml.CSafeLoader)
    [version] = [each for each in definition["spec"]["versions"] if each["name"] == "v1"]
    return jsonschema.Draft202012Validator(strict(version["schema"]["openAPIV3Schema"]))


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """An OpenAPI schema of Kubernetes as a JSON schema that is closed wherever fields are named."""
    out = {key: value for key, value in schema.items() if key not in {"description", "default", "example"}}
    for key in ("items", "additionalProperties", "not"):
        if isinstance(out.get(key), dict):
            out[key] = strict(out[key])
    if "properties" in out:
        out["properties"] = {name: strict(each) for name, each in out["properties"].items()}
        # The top level's metadata is left open by CRDs; Kubernetes checks it itself.
        if "additionalProperties" not in out and not out.get("x-kubernetes-preserve-unknown-fields"):
            out["additionalProperties"] = False
    for key in ("anyOf", "allOf", "oneOf"):
        out.pop(key, None)  # besides int-or-string, KubeRay uses none that a JSON schema could say
    if out.get("x-kubernetes-int-or-string"):
        out["type"] = ["integer", "string"]
    elif out.get("nullable"):
        out["type"] = [out["type"], "null"]
    return out
