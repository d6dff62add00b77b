"""The script that submits to an existing cluster: follows, tries again, stops, and ends as the merge does."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from ray.job_submission import JobStatus

from helm.charts import CHART

COMMAND = ["merge", "recipe.yml", "s3://b/o", "--executor", "ray"]


@pytest.fixture(scope="module")
def submit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("submit", CHART / "files" / "submit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "given.yml"
    path.write_text("merge_method: linear\n")
    return path


@dataclass
class Job:
    """A job as the cluster reports it."""

    submission_id: str
    metadata: dict[str, str] | None = None
    status: JobStatus = JobStatus.RUNNING
    driver_exit_code: int | None = None
    message: str = ""


@dataclass
class Cluster:
    """A Ray cluster in memory, with the interface of `JobSubmissionClient`.

    Attributes:
        texts: what each connection to the log sends; an exception breaks it off. The job has ended after the last.
        outcome: of a job that has ended.
        faults: raised one by one, before anything is answered.
        during: called while the log is read.
    """

    texts: list[list[str | Exception]] = field(default_factory=lambda: [["done\n"]])
    outcome: tuple[JobStatus, int | None] = (JobStatus.SUCCEEDED, 0)
    faults: list[Exception] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)
    during: Callable[[], None] = lambda: None
    submitted: list[dict[str, Any]] = field(default_factory=list)
    recipes: list[str] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)

    def _answer(self) -> None:
        if self.faults:
            raise self.faults.pop(0)

    def list_jobs(self) -> list[Job]:
        self._answer()
        return self.jobs

    def submit_job(self, **given: Any) -> str:
        self.recipes.append(Path(given["runtime_env"]["working_dir"], "recipe.yml").read_text())
        self.submitted.append(given)
        self.jobs.append(Job(given["submission_id"], given["metadata"]))
        return str(given["submission_id"])

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        texts = self.texts.pop(0)
        for text in texts:
            await asyncio.sleep(0)
            if isinstance(text, Exception):
                raise text
            yield text
            self.during()
        if not self.texts:
            self._job(job).status, self._job(job).driver_exit_code = self.outcome

    def get_job_info(self, job: str) -> Job:
        self._answer()
        return self._job(job)

    def stop_job(self, job: str) -> None:
        self.stopped.append(job)
        self._job(job).status = JobStatus.STOPPED

    def _job(self, name: str) -> Job:
        [found] = [job for job in self.jobs if job.submission_id == name]
        return found


def run(submit: ModuleType, cluster: Cluster, recipe: Path) -> int:
    return int(submit.Submitter(lambda: cluster, "run-1", retry_seconds=0)(recipe, COMMAND))


def test_a_new_run_is_submitted_with_its_recipe(
    submit: ModuleType, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = Cluster([["50 %\n", "100 %\n"]])
    assert run(submit, cluster, recipe) == 0
    [job] = cluster.submitted
    assert job["entrypoint"] == "merge recipe.yml s3://b/o --executor ray"
    assert job["metadata"] == {"mergekit-ray/run": "run-1"}
    assert cluster.recipes == ["merge_method: linear\n"]
    assert "50 %\n100 %\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (JobStatus.FAILED, 2, 2),
        (JobStatus.FAILED, 4, 4),
        (JobStatus.FAILED, None, 1),
        (JobStatus.FAILED, 0, 1),
        (JobStatus.STOPPED, None, 1),
        (JobStatus.SUCCEEDED, None, 0),
    ],
)
def test_it_ends_as_the_merge_does(
    submit: ModuleType, recipe: Path, status: JobStatus, code: int | None, expected: int
) -> None:
    assert run(submit, Cluster(outcome=(status, code)), recipe) == expected


def test_a_retry_is_a_new_submission(submit: ModuleType, recipe: Path) -> None:
    cluster = Cluster([["a"], ["b"]], outcome=(JobStatus.FAILED, 4))
    cluster.texts = [["a"]]
    assert run(submit, cluster, recipe) == 4
    cluster.texts, cluster.outcome = [["b"]], (JobStatus.SUCCEEDED, 0)
    assert run(submit, cluster, recipe) == 0
    assert len({job["submission_id"] for job in cluster.submitted}) == 2


def test_a_job_that_is_under_way_is_followed(submit: ModuleType, recipe: Path) -> None:
    own, foreign = {"mergekit-ray/run": "run-1"}, {"mergekit-ray/run": "run-2"}
    jobs = [Job("ended", own, JobStatus.FAILED, 4), Job("other", foreign), Job("bare"), Job("mine", own)]
    cluster = Cluster(jobs=jobs, outcome=(JobStatus.FAILED, 3))
    assert run(submit, cluster, recipe) == 3
    assert cluster.submitted == []


def test_a_broken_log_goes_on_where_it_broke_off(
    submit: ModuleType, recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(submit, "say", said.append)
    cluster = Cluster([["one ", "two ", ConnectionError("reset")], ["one t", "wo th"], ["one two three\n"]])
    assert run(submit, cluster, recipe) == 0
    assert capsys.readouterr().out == "one two three\n"
    assert [line for line in said if "lost the log" in line and "reset" in line]


def test_an_unreachable_cluster_is_asked_again(submit: ModuleType, recipe: Path) -> None:
    cluster = Cluster(faults=[ConnectionError("refused"), RuntimeError("503"), OSError("no route")])
    assert run(submit, cluster, recipe) == 0
    assert len(cluster.submitted) == 1


def test_a_cluster_that_stays_away_is_given_up(
    submit: ModuleType, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit, "UNREACHABLE_SECONDS", -1.0)
    assert run(submit, Cluster(faults=[ConnectionError("refused")]), recipe) == 4


def test_sigterm_stops_the_job(submit: ModuleType, recipe: Path) -> None:
    def terminate() -> None:
        raise submit.Terminated

    cluster = Cluster([["50 %\n"]], during=terminate)
    assert run(submit, cluster, recipe) == 143
    assert cluster.stopped == [cluster.submitted[0]["submission_id"]]
