"""Merges from S3 to S3 through the command, against a real server: nothing on local disk, nothing left behind."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

import mergekit_ray
from mergekit_ray.checkpoint.header import HEAD_BYTES
from mergekit_ray.operations.options import MergeOptions
from support.merging import COMMANDS, Events, command_environment, recipe_of, run_command
from support.models import ModelLibrary, contents, load, logits, rewrite, tensors_of
from support.servers.hostile_proxy import HostileProxy, Schedule
from support.servers.s3_bucket import Bucket
from support.servers.s3_server import SECRET_KEY, S3Server
from support.waiting import DEADLINE_SECONDS, wait_until

pytestmark = pytest.mark.s3

WRONG_SECRET = "not-the-secret-42"
# More than two parts of 16 MiB: what is smaller goes up as one object.
LARGE: dict[str, Any] = {"vocab_size": 150_000, "hidden_size": 64, "num_layers": 1, "tied": True}


class Home:
    """The folders of a process of its own: home, temporary files, working directory; to be seen unchanged."""

    def __init__(self, folder: Path) -> None:
        self.folders = {name: folder / name for name in ("home", "tmp", "cwd")}
        for path in self.folders.values():
            path.mkdir()
        self.cwd = self.folders["cwd"]

    def environment(self, server: S3Server, **changes: str) -> dict[str, str]:
        """By which nothing but these folders and the server is found."""
        own = {"HOME": str(self.folders["home"]), "TMPDIR": str(self.folders["tmp"])}
        kept = {name: value for name, value in command_environment().items() if not name.startswith(("AWS_", "XDG_"))}
        return {**kept, **own, **server.environment, **changes}

    def files(self) -> list[str]:
        """Everything in them."""
        return sorted(str(path) for folder in self.folders.values() for path in folder.rglob("*"))


@pytest.fixture
def bucket(s3_server: S3Server, s3_prefix: str) -> Bucket:
    """A place of its own on the server."""
    return Bucket(s3_server, s3_prefix)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """Empty folders for a process."""
    return Home(tmp_path)


def write_recipe(home: Home, data: dict[str, Any]) -> Path:
    path = home.cwd / "recipe.yml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def recipe_on(bucket: Bucket, folders: list[Path], method: str = "ties", **more: Any) -> dict[str, Any]:
    """A recipe over copies of models in the bucket."""
    uris = [bucket.upload(folder, f"in{number}") for number, folder in enumerate(folders)]
    recipe = recipe_of(method, Path("BASE"), [Path(f"TUNED{number}") for number in range(1, len(uris))], **more)
    text = json.dumps(recipe).replace("BASE", uris[0])
    for number, uri in enumerate(uris):
        text = text.replace(f"TUNED{number}", uri)
    result: dict[str, Any] = json.loads(text)
    return result


def test_from_s3_to_s3_without_local_disk(
    bucket: Bucket, home: Home, s3_server: S3Server, models: ModelLibrary, tmp_path: Path
) -> None:
    shape: dict[str, Any] = {"max_shard_size": "60KB", "with_tokenizer": True}
    folders = [models.get("llama", variant, **shape) for variant in range(3)]
    path = write_recipe(home, recipe_on(bucket, folders, output={"max_shard_size": 50_000}))
    env, out = home.environment(s3_server), f"{bucket.uri}/out"
    before = home.files()
    done = run_command("merge", path, out, cwd=home.cwd, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out}\n"
    assert home.files() == before
    assert bucket.unfinished() == []
    assert not any(key.startswith(".mergekit-ray") for key in bucket.keys("out"))
    assert SECRET_KEY not in done.stderr + done.stdout

    checked = run_command("mergekit-ray", "verify", out, "--json", cwd=home.cwd, env=env)
    assert checked.returncode == 0, checked.stderr
    assert json.loads(checked.stdout)["ok"] is True
    assert home.files() == before

    fetched = bucket.download("out", tmp_path / "fetched")
    assert not any(SECRET_KEY.encode() in data for data in contents(fetched).values())
    # The same numbers as from disk to disk; where the inputs were is all that tells the two apart.
    here = recipe_of("ties", folders[0], folders[1:], output={"max_shard_size": 50_000})
    mergekit_ray.merge(here, tmp_path / "local", options=MergeOptions(executor="local"))
    ours, theirs = contents(fetched), contents(tmp_path / "local")
    assert ours.keys() == theirs.keys()
    assert {name for name in ours if ours[name] != theirs[name]} == {"README.md", "mergekit-ray.json"}
    torch.testing.assert_close(logits(load(fetched)), logits(load(tmp_path / "local")), rtol=0, atol=0)

    again = run_command("merge", path, out, cwd=home.cwd, env=env)
    assert again.returncode == 0
    assert "already holds the result" in again.stderr


@pytest.fixture
def large_recipe(bucket: Bucket, models: ModelLibrary) -> dict[str, Any]:
    """One shard of 38 MB."""
    return recipe_on(bucket, [models.get("llama", variant, **LARGE) for variant in range(2)], "linear")


def test_every_byte_is_fetched_once(bucket: Bucket, s3_environment: S3Server, models: ModelLibrary) -> None:
    """As the merge tells, and as the server sees it."""
    sources = [bucket.upload(models.get("llama", variant, **LARGE), f"in{variant}") for variant in range(2)]
    listed = [{"model": uri, "parameters": {"weight": 0.5}} for uri in sources]
    recipe = {"merge_method": "linear", "models": listed, "output": {"max_shard_size": 10_000_000}}
    events = Events()
    with HostileProxy(s3_environment.endpoint_url, Schedule(0, {})) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.endpoint_url)
        options = MergeOptions(executor="local", num_workers=2)
        result = mergekit_ray.merge(recipe, f"{bucket.uri}/out", options=options, reporter=events)
    [told] = events.of("fetched")
    assert told["needed_bytes"] == result.plan.read_bytes
    assert 1.0 <= told["fetched_bytes"] / told["needed_bytes"] <= 1.02
    weights = {path: num for path, num in proxy.sent_bytes.items() if "/in" in path and path.endswith(".safetensors")}
    assert len(weights) == len(sources)
    headers = 2 * len(weights) * HEAD_BYTES  # for the plan, and for their digests in the manifest
    assert sum(weights.values()) <= told["fetched_bytes"] + headers


def test_large_shards_go_up_in_parts(
    bucket: Bucket, home: Home, s3_server: S3Server, large_recipe: dict[str, Any], tmp_path: Path
) -> None:
    path = write_recipe(home, large_recipe)
    before = home.files()
    out, env = f"{bucket.uri}/out", home.environment(s3_server)
    done = run_command("merge", path, out, "--quiet", cwd=home.cwd, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert home.files() == before
    assert bucket.unfinished() == []
    assert run_command("mergekit-ray", "verify", out, cwd=home.cwd, env=env).returncode == 0
    assert load(bucket.download("out", tmp_path / "fetched")).num_parameters() > 150_000 * 64


def test_interrupted_it_leaves_no_upload_and_no_file(
    bucket: Bucket, home: Home, s3_server: S3Server, models: ModelLibrary, tmp_path: Path
) -> None:
    # Ten parts: more than are under way at a time.
    large = shutil.copytree(models.get("llama", tied=True), tmp_path / "large")
    rewrite(large, {"model.embed_tokens.weight": torch.zeros(2_500_000, 32, dtype=torch.bfloat16)})
    path = write_recipe(home, {"merge_method": "passthrough", "models": [{"model": str(large)}]})
    before = home.files()
    command = [str(COMMANDS / "merge"), str(path), f"{bucket.uri}/out"]
    env = home.environment(s3_server)
    server = psutil.Process(s3_server.process_group)
    with subprocess.Popen(command, cwd=home.cwd, env=env, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        wait_until(bucket.unfinished, every=0.002)
        # Nothing more is stored until the merge has understood.
        server.suspend()
        try:
            process.send_signal(signal.SIGTERM)
            assert any("stopping cleanly" in line for line in process.stderr)
        finally:
            server.resume()
        _, said = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 130, said
    assert "run the same command to resume" in said
    assert bucket.unfinished() == []
    assert [key for key in bucket.keys("out") if not key.startswith(".mergekit-ray/")] == []
    assert home.files() == before


def test_nan_leaves_no_upload(bucket: Bucket, home: Home, s3_server: S3Server, models: ModelLibrary) -> None:
    bad = home.folders["tmp"] / "bad"
    shutil.copytree(models.get("llama", 1, **LARGE), bad)
    # At the end of the shard's largest tensor: most of it has been sent by then.
    embedding = tensors_of(bad)["model.embed_tokens.weight"]
    embedding[-1, -1] = float("inf")
    rewrite(bad, {"model.embed_tokens.weight": embedding})
    recipe = recipe_on(bucket, [models.get("llama", **LARGE), bad], "linear")
    shutil.rmtree(bad)
    path = write_recipe(home, recipe)
    done = run_command("merge", path, f"{bucket.uri}/out", cwd=home.cwd, env=home.environment(s3_server))
    assert done.returncode == 3, done.stderr
    assert "model.embed_tokens.weight" in done.stderr
    assert f"{bucket.uri}/in1" in done.stderr
    assert bucket.unfinished() == []
    assert [key for key in bucket.keys("out") if not key.startswith(".mergekit-ray/")] == []


def test_wrong_credentials(bucket: Bucket, home: Home, s3_server: S3Server, models: ModelLibrary) -> None:
    recipe = recipe_on(bucket, [models.get("llama"), models.get("llama", 1)], "linear")
    path = write_recipe(home, recipe)
    env = home.environment(s3_server, AWS_SECRET_ACCESS_KEY=WRONG_SECRET)
    for extra in ([], ["--debug"]):
        done = run_command("merge", path, f"{bucket.uri}/out", *extra, cwd=home.cwd, env=env)
        assert done.returncode == 4, done.stderr
        assert WRONG_SECRET not in done.stdout + done.stderr
        assert f"{bucket.uri}/in" in done.stderr
        assert "403" in done.stderr
        assert "check the credentials" in done.stderr
    assert bucket.keys("out") == []


def test_tensors_are_read_from_where_the_result_is(
    s3_environment: S3Server, bucket: Bucket, models: ModelLibrary, tmp_path: Path
) -> None:
    recipe = {"merge_method": "passthrough", "models": [{"model": str(models.get("llama", 0))}]}
    result = mergekit_ray.merge(recipe, f"{bucket.uri}/out", options=MergeOptions(executor="local"))
    stored = tensors_of(bucket.download("out", tmp_path / "fetched"))
    assert result.tensors().keys() == stored.keys()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in result.tensors().items())
    assert mergekit_ray.inspect(result.uri).num_parameters == result.plan.num_parameters
    assert mergekit_ray.verify(result.uri).ok
