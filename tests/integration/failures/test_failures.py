"""What is left when a merge is stopped, killed or got in the way of, and that the next run makes the same model."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
import yaml

import mergekit_ray
from mergekit_ray.operations.options import MergeOptions
from mergekit_ray.storage import open_sink
from mergekit_ray.worker.worker import SHARDS_IN_WORK
from support.merging import COMMANDS, Events, command_environment, recipe_of, run_command
from support.models import ModelLibrary, contents, rewrite
from support.servers.ray_cluster import ENVIRONMENT
from support.servers.s3_server import S3Server
from support.waiting import DEADLINE_SECONDS, wait_until

SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture(scope="module")
def many(models: ModelLibrary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of over a hundred shards, in a file."""
    base, *tuned = (models.get("llama", variant, num_layers=16) for variant in range(3))
    path = tmp_path_factory.mktemp("recipes") / "many.yml"
    path.write_text(yaml.safe_dump(recipe_of("ties", base, tuned, output={"max_shard_size": 1})))
    return path


@pytest.fixture(scope="module")
def expected(many: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """All files of an undisturbed merge."""
    out = tmp_path_factory.mktemp("expected") / "out"
    mergekit_ray.merge(many, out, options=MergeOptions(executor="local", num_workers=2))
    return contents(out)


@contextmanager
def running(*args: str | Path, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """``merge`` in a process of its own, ended at the end with all that it started."""
    command = [str(COMMANDS / "merge"), *map(str, args)]
    with subprocess.Popen(
        command, stdout=-1, stderr=-1, text=True, env=command_environment(**environment), start_new_session=True
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGCONT)
                os.killpg(process.pid, signal.SIGKILL)


def shards(out: Path) -> list[Path]:
    return sorted(out.glob("*.safetensors"))


def temporary(out: Path) -> list[Path]:
    """Files that were being written."""
    return [path for path in out.rglob("*") if path.name.endswith(".tmp")]


def is_suspended(pid: int) -> bool:
    """Whether all threads of a process have stopped; one that is writing does so when that is done."""
    states = [task.read_text().rpartition(")")[2].split()[0] for task in Path(f"/proc/{pid}/task").glob("*/stat")]
    return set(states) == {"T"}


def interrupt(process: subprocess.Popen[str], number: int) -> str:
    """Send a signal while the process is in the middle of things; gives what it said at the end."""
    # Still until the signal waits for it: it cannot finish in between.
    psutil.Process(process.pid).suspend()
    process.send_signal(number)
    psutil.Process(process.pid).resume()
    return process.communicate(timeout=DEADLINE_SECONDS)[1]


class TestInterruption:
    @pytest.mark.parametrize("number", SIGNALS)
    @pytest.mark.parametrize(
        "executor",
        [
            pytest.param(["--executor", "local", "--workers", "2"], id="local"),
            pytest.param(["--executor", "ray", "--workers", "1"], id="ray", marks=[pytest.mark.ray, pytest.mark.slow]),
        ],
    )
    def test_the_first_signal_stops_cleanly_and_the_next_run_resumes(
        self, number: int, executor: list[str], many: Path, expected: dict[str, bytes], tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        with running(many, out, *executor, **ENVIRONMENT) as process:
            wait_until(lambda: shards(out), every=0.001)
            said = interrupt(process, number)
        assert process.returncode == 130, said
        assert signal.Signals(number).name in said
        assert "run the same command to resume" in said
        assert "Traceback" not in said
        assert temporary(out) == []
        assert not (out / "model.safetensors.index.json").exists()
        times = {file: file.stat().st_mtime_ns for file in shards(out)}
        assert 0 < len(times) < len(expected)
        assert run_command("merge", many, out, "--quiet").returncode == 0
        assert {file: file.stat().st_mtime_ns for file in times} == times
        assert contents(out) == expected

    @pytest.mark.parametrize("number", SIGNALS)
    def test_while_planning_it_ends_with_nothing_written(self, number: int, tmp_path: Path) -> None:
        recipe, out = tmp_path / "recipe.yml", tmp_path / "out"
        recipe.write_text(yaml.safe_dump({"merge_method": "passthrough", "models": [{"model": "s3://bucket/model"}]}))
        with socket.create_server(("127.0.0.1", 0)) as silent:
            keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
            address = f"http://127.0.0.1:{silent.getsockname()[1]}"
            with running(recipe, out, **keys, AWS_ENDPOINT_URL=address) as process:
                # It has asked for the model's files, and is not answered.
                asked, _ = silent.accept()
                process.send_signal(number)
                said = process.communicate(timeout=DEADLINE_SECONDS)[1]
                asked.close()
        assert process.returncode == 130, said
        assert "run the same command to resume" in said
        assert not out.exists()

    def test_the_second_signal_ends_at_once(self, many: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
        out = tmp_path / "out"
        with running(many, out) as process:
            wait_until(lambda: shards(out), every=0.001)
            psutil.Process(process.pid).suspend()
            for number in SIGNALS:
                process.send_signal(number)
            psutil.Process(process.pid).resume()
            said = process.communicate(timeout=DEADLINE_SECONDS)[1]
        assert process.returncode == 130, said
        assert "stopped at once; run the same command to resume" in said
        assert run_command("merge", many, out, "--quiet").returncode == 0
        assert contents(out) == expected
        assert temporary(out) == []


class TestKilled:
    def test_after_kill_9_the_next_run_resumes_at_once(
        self, many: Path, expected: dict[str, bytes], tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        with running(many, out) as process:
            wait_until(lambda: shards(out), every=0.001)
            process.kill()
            process.wait()
        assert (out / ".mergekit-ray" / "lease.json").exists()
        times = {file: file.stat().st_mtime_ns for file in shards(out)}
        done = run_command("merge", many, out)
        assert done.returncode == 0, done.stderr
        # Those in work may have been written, but not yet been recorded.
        again = [file for file, time in times.items() if file.stat().st_mtime_ns != time]
        assert len(again) <= SHARDS_IN_WORK
        assert contents(out) == expected
        assert temporary(out) == []

    @pytest.mark.s3
    def test_on_s3_no_upload_stays_behind(
        self, s3_server: S3Server, s3_prefix: str, models: ModelLibrary, tmp_path: Path
    ) -> None:
        # Ten parts: more than are under way at a time.
        large = shutil.copytree(models.get("llama", tied=True), tmp_path / "large")
        rewrite(large, {"model.embed_tokens.weight": torch.zeros(2_500_000, 32, dtype=torch.bfloat16)})
        config = json.loads((large / "config.json").read_text())
        (large / "config.json").write_text(json.dumps({**config, "vocab_size": 2_500_000}))
        recipe = tmp_path / "recipe.yml"
        recipe.write_text(yaml.safe_dump({"merge_method": "passthrough", "models": [{"model": str(large)}]}))
        client = s3_server.client()
        bucket, _, prefix = s3_prefix.removeprefix("s3://").partition("/")

        def unfinished() -> list[str]:
            found = client.list_multipart_uploads(Bucket=bucket).get("Uploads", [])
            return [each["Key"] for each in found if each["Key"].startswith(prefix)]

        server = psutil.Process(s3_server.process_group)
        with running(recipe, f"{s3_prefix}/out", **s3_server.environment) as process:
            wait_until(unfinished, every=0.002)
            server.suspend()  # so that it cannot be completed
            process.kill()
            process.wait()
            server.resume()
        assert unfinished()
        environment = command_environment(**s3_server.environment)
        done = run_command("merge", recipe, f"{s3_prefix}/out", env=environment)
        assert done.returncode == 0, done.stderr
        assert unfinished() == []
        assert run_command("mergekit-ray", "verify", f"{s3_prefix}/out", env=environment).returncode == 0


class TestTwoDrivers:
    def test_the_second_is_refused_and_the_first_goes_on(
        self, many: Path, expected: dict[str, bytes], tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        with running(many, out) as process:
            wait_until(lambda: shards(out), every=0.001)
            psutil.Process(process.pid).suspend()
            wait_until(lambda: is_suspended(process.pid))
            for more in ([], ["--overwrite", "--seed", "7"]):
                before = contents(out)
                refused = run_command("merge", many, out, *more)
                assert refused.returncode == 4, refused.stderr
                assert "another merge writes there" in refused.stderr
                assert f"process {process.pid}" in refused.stderr
                assert contents(out) == before
            psutil.Process(process.pid).resume()
            said = process.communicate(timeout=DEADLINE_SECONDS)[1]
        assert process.returncode == 0, said
        assert contents(out) == expected

    @pytest.mark.s3
    def test_on_s3_too(self, many: Path, s3_server: S3Server, s3_prefix: str) -> None:
        environment = command_environment(**s3_server.environment)
        out = f"{s3_prefix}/out"
        store = open_sink(out)
        with running(many, out, **s3_server.environment) as process:
            wait_until(lambda: [file for file in store.list() if file.name.endswith(".safetensors")], every=0.01)
            psutil.Process(process.pid).suspend()
            refused = run_command("merge", many, out, env=environment)
            assert refused.returncode == 4, refused.stderr
            assert f"process {process.pid}" in refused.stderr
            process.kill()
            process.wait()
        assert run_command("merge", many, out, "--quiet", env=environment).returncode == 0
        assert not any(file.name.startswith(".mergekit-ray/") for file in store.list())


class TestOverwrite:
    @pytest.mark.s3
    def test_on_s3_the_old_model_stays_until_the_new_one_is_whole(
        self, s3_prefix: str, models: ModelLibrary, tmp_path: Path
    ) -> None:
        old, new = (
            recipe_of("linear", models.get("llama"), [models.get("llama", n)], output={"max_shard_size": 60_000})
            for n in (1, 2)
        )
        out = f"{s3_prefix}/out"
        store = open_sink(out)

        def seen() -> dict[str, bytes]:
            names = [file.name for file in store.list() if not file.name.startswith(".mergekit-ray/")]
            return {name: store.read(name, max_bytes=1 << 24) for name in names}

        mergekit_ray.merge(old, out)
        before = seen()
        states: list[tuple[str, bool]] = []
        events = Events(lambda kind: states.append((kind, seen() == before)))
        mergekit_ray.merge(new, out, options=MergeOptions(overwrite=True), reporter=events)
        assert dict(states) == {
            "planned": True,
            "shard_done": True,
            "checking": True,
            "publishing": True,
            "replacing": True,
            "published": False,
        }
        mergekit_ray.merge(new, tmp_path / "fresh")
        assert seen() == contents(tmp_path / "fresh")
        assert [file.name for file in store.list()] == sorted(seen())
