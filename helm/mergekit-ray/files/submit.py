"""Runs a merge as a job of a Ray cluster that is already there, and ends as the merge does.

Run as ``python3 submit.py RECIPE -- COMMAND...``. The recipe goes with the job as ``recipe.yml`` of its working
directory. A pod that takes the place of a lost one finds that one's job by its metadata and follows it; if none is
under way, it submits a new one, which resumes the merge. On SIGTERM the job is stopped before this process ends.

Environment: RAY_DASHBOARD_ADDRESS, the cluster's dashboard; MERGE_RUN, what all pods of a run have in common.
Exit codes: the merge's own; 1 if it was lost; 4 if the cluster could not be reached; 143 after SIGTERM.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar

RUN_KEY: Final = "mergekit-ray/run"
UNREACHABLE_SECONDS: Final = 300.0
STOP_SECONDS: Final = 30
"""That a merge has to abandon its shards; by default Ray gives it 3 seconds."""
LOST, UNREACHABLE, TERMINATED = 1, 4, 143

T = TypeVar("T")


class Terminated(SystemExit):
    """SIGTERM came. A SystemExit, as asyncio lets no other exception out of a callback."""


class Submitter:
    """One run on one cluster.

    Args:
        client: a `ray.job_submission.JobSubmissionClient`, or what makes one: the cluster may not be up yet.
        run: what all pods of the run have in common.
        retry_seconds: between attempts to reach the cluster.
    """

    def __init__(self, client: Callable[[], Any], run: str, *, retry_seconds: float = 5.0) -> None:
        self._make_client = client
        self._client: Any = None
        self._run = run
        self._retry_seconds = retry_seconds
        self._job: str | None = None

    def __call__(self, recipe: Path, command: Sequence[str]) -> int:
        """Run ``command`` with ``recipe``. Gives the exit code."""
        try:
            self._client = self._insistently(self._make_client)
            self._job = self._insistently(self._under_way) or self._submit(recipe, command)
            return asyncio.run(self._follow(self._job))
        except Terminated:
            self._stop()
            return TERMINATED
        except (ConnectionError, RuntimeError, OSError) as error:
            say(f"cannot reach the Ray cluster: {error}")
            return UNREACHABLE

    def _under_way(self) -> str | None:
        """The job of an earlier pod of this run that has not ended."""
        for job in self._client.list_jobs():
            if (job.metadata or {}).get(RUN_KEY) == self._run and not job.status.is_terminal():
                say(f"following job {job.submission_id}, which is under way")
                return str(job.submission_id)
        return None

    def _submit(self, recipe: Path, command: Sequence[str]) -> str:
        job = f"{self._run}-{uuid.uuid4().hex[:8]}"
        with tempfile.TemporaryDirectory() as folder:
            shutil.copyfile(recipe, Path(folder, "recipe.yml"))
            self._client.submit_job(
                entrypoint=shlex.join(command),
                submission_id=job,
                metadata={RUN_KEY: self._run},
                runtime_env={"working_dir": folder, "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}},
            )
        say(f"submitted job {job}")
        return job

    async def _follow(self, job: str) -> int:
        """Print the job's log until it ends."""
        num_printed = 0
        while True:
            try:
                num_seen = 0  # the log is sent from its beginning each time
                async for text in self._client.tail_job_logs(job):
                    sys.stdout.write(text[max(0, num_printed - num_seen) :])
                    sys.stdout.flush()
                    num_seen += len(text)
                    num_printed = max(num_printed, num_seen)
            except Exception as error:  # noqa: BLE001 - whatever broke the connection, the job's state tells what to do
                say(f"lost the log of {job}: {error}")
            info = self._insistently(lambda: self._client.get_job_info(job))
            if info.status.is_terminal():
                return self._exit_code(info)
            await asyncio.sleep(self._retry_seconds)

    def _exit_code(self, info: Any) -> int:
        say(f"job {info.submission_id}: {info.status}" + (f": {info.message}" if info.message else ""))
        if str(info.status) == "SUCCEEDED":
            return 0
        return info.driver_exit_code or LOST

    def _insistently(self, ask: Callable[[], T]) -> T:
        """Ask until there is an answer, for minutes: heads restart, networks fail."""
        deadline = time.monotonic() + UNREACHABLE_SECONDS
        while True:
            try:
                return ask()
            except (ConnectionError, RuntimeError, OSError) as error:
                if time.monotonic() > deadline:
                    raise
                say(f"no answer from the Ray cluster, trying again: {error}")
                time.sleep(self._retry_seconds)

    def _stop(self) -> None:
        if self._job is None:
            return
        say(f"stopping job {self._job}")
        try:
            self._client.stop_job(self._job)
            deadline = time.monotonic() + STOP_SECONDS + 10
            while not self._client.get_job_info(self._job).status.is_terminal() and time.monotonic() < deadline:
                time.sleep(0.5)
        except (ConnectionError, RuntimeError, OSError) as error:
            say(f"it may go on: {error}")


def say(text: str) -> None:
    """A line of this program, not of the merge."""
    sys.stdout.write(f"submit: {text}\n")
    sys.stdout.flush()


def main() -> NoReturn:
    """See the module."""

    def terminate(number: int, frame: object) -> None:
        del number, frame
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    if len(sys.argv) < 4 or sys.argv[2] != "--":
        sys.exit("usage: submit.py RECIPE -- COMMAND...")

    def connect() -> Any:
        # Takes a second, in which a SIGTERM would not be heard.
        from ray.job_submission import JobSubmissionClient  # noqa: PLC0415

        return JobSubmissionClient(os.environ["RAY_DASHBOARD_ADDRESS"])

    sys.exit(Submitter(connect, os.environ["MERGE_RUN"])(Path(sys.argv[1]), sys.argv[3:]))


if __name__ == "__main__":
    main()
