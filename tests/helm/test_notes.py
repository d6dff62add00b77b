"""What helm says after installing. Only an installation renders it, so here it becomes part of a manifest."""

from __future__ import annotations

import re
import shutil
from functools import cache
from pathlib import Path

import pytest

from helm.charts import CASES, CHART, GIVEN, RECIPE, Manifest, one, render, values_of

AS_MANIFEST = """
apiVersion: v1
kind: ConfigMap
metadata: {{name: notes}}
data:
  {{{{- dict "notes" (include "notes" .) | toYaml | nindent 2 }}}}
{{{{- define "notes" }}}}
{notes}
{{{{- end }}}}
"""


@cache
def chart(folder: Path) -> Path:
    copy = folder / "chart"
    shutil.copytree(CHART, copy)
    notes = (CHART / "templates" / "NOTES.txt").read_text()
    (copy / "templates" / "shown.yaml").write_text(AS_MANIFEST.format(notes=notes))
    return copy


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chart(tmp_path_factory.mktemp("notes"))


def notes(copied: Path, values: Manifest) -> tuple[str, str]:
    """What is said, and the job's name."""
    manifests = render(values, chart=copied)
    [shown] = [each["data"]["notes"] for each in manifests if each["metadata"]["name"] == "notes"]
    [job] = [each["metadata"]["name"] for each in manifests if each["kind"] in {"Job", "RayJob"}]
    return str(shown), str(job)


@pytest.mark.parametrize("case", CASES)
def test_how_to_follow_resume_stop_and_fetch(copied: Path, case: str) -> None:
    said, job = notes(copied, values_of(case))
    assert f"kubectl logs -n ml -f job/{job}" in said
    assert re.search(r"helm upgrade demo .* --reuse-values --set-string run=", said)
    assert "helm uninstall demo -n ml" in said
    output = values_of(case)["output"]
    assert f"mergekit-ray verify {output}" in said
    assert ("aws s3 cp --recursive" in said) == output.startswith("s3://")
    assert "helm test demo -n ml" in said
    assert "\n\n\n" not in said
    assert "<no value>" not in said


def test_rayjob_is_told_of_its_dashboard_and_of_a_missing_kuberay(copied: Path) -> None:
    said, job = notes(copied, GIVEN)
    assert f"kubectl get rayjob {job} -n ml --watch" in said
    assert "svc/" in said
    assert "KubeRay does not seem to be installed" in said
    plain, _ = notes(copied, {**GIVEN, "mode": "job"})
    assert "KubeRay" not in plain
    assert "rayjob" not in plain


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"workerGroups": {"cpu": {"gpus": 1}}}, "Set workerGroups.cpu.imageTag to "),
        ({"mode": "job", "local": {"gpus": 1}}, "Set image.tag to "),
        ({"workerGroups": {"cpu": {"gpus": 1, "imageTag": "mine"}}}, ""),
        ({"workerGroups": {"cpu": {"gpus": 1}}, "image": {"tag": "mine"}}, ""),
        ({"mode": "job", "workerGroups": {"cpu": {"gpus": 1}}}, ""),
    ],
)
def test_gpus_with_the_image_for_cpus(copied: Path, values: Manifest, wanted: str) -> None:
    said, _ = notes(copied, {**GIVEN, **values})
    assert ("WARNING: pods ask for GPUs" in said) == bool(wanted)
    assert wanted in said


def test_a_suspended_job_is_said_to_wait(copied: Path) -> None:
    said, _ = notes(copied, values_of("kueue"))
    assert "It is suspended. Kueue starts it once queue merges has room." in said
    said, _ = notes(copied, {**GIVEN, "job": {"suspend": True}})
    assert "Set its spec.suspend to false to start it." in said
    said, _ = notes(copied, GIVEN)
    assert "suspended" not in said


def test_a_path_is_said_to_need_a_volume(copied: Path) -> None:
    said, _ = notes(copied, values_of("plain-job"))
    assert "It is lost with it unless extraVolumes mounts a volume there." in said
    recipe = {"content": f"{RECIPE}output: s3://bucket/out\n"}
    said, _ = notes(copied, {"recipe": recipe})
    assert "where the recipe's `output` says" in said
    assert one(render(values_of("plain-job"), chart=copied), "Job")
