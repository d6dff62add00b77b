"""Merges of safetensors files that no config describes: every place, every executor, every promise."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mergekit_ray
from mergekit_ray.core.errors import ConfigError, Interrupted, PlanError
from mergekit_ray.operations.options import MergeOptions
from mergekit_ray.operations.reproduce import reproduce
from mergekit_ray.operations.verify import verify
from support.merging import run_command, stop_at
from support.models import contents
from support.servers.ray_cluster import RayCluster
from support.servers.s3_bucket import Bucket
from support.servers.s3_server import S3Server

SHAPES = {"down.0.conv.weight": (8, 4, 3, 3), "mid.to_q.weight": (16, 8), "out.bias": (8,)}
REST = {"README.md", "mergekit-ray.json"}


def unet(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return {**tensors, "steps": torch.tensor([1000])}


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Three files in a folder, among others."""
    folder = tmp_path / "unets"
    folder.mkdir()
    for seed, name in enumerate("abc"):
        save_file(unet(seed), folder / f"{name}.safetensors", {"ss_output_name": name, "format": "pt"})
    (folder / "vae.safetensors").write_bytes(b"of another model")
    return [folder / f"{name}.safetensors" for name in "abc"]


def linear(*models: Path | str, **rest: Any) -> dict[str, Any]:
    listed = [{"model": str(model), "parameters": {"weight": 1.0}} for model in models]
    return {"merge_method": "linear", "models": listed, **rest}


def mean(*files: Path) -> Mapping[str, torch.Tensor]:
    found = [load_file(file) for file in files]
    return {name: sum(each[name] for each in found) / len(found) for name in SHAPES}  # type: ignore[misc] # sum() begins with an int


def check(file: Path, expected: Mapping[str, torch.Tensor]) -> None:
    found = load_file(file)
    assert found.keys() == {*expected, "steps"}
    assert found["steps"].tolist() == [1000]
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)


def test_one_file_of_files(files: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = mergekit_ray.merge(linear(*files), out)
    assert contents(out).keys() == {"model.safetensors", "model.safetensors.index.json", *REST}
    check(out / "model.safetensors", mean(*files))
    with safe_open(out / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"ss_output_name": "a", "format": "pt"}
    assert result.load_tensor("out.bias").shape == (8,)
    card = (out / "README.md").read_text()
    assert "library_name" not in card
    assert "c.safetensors" in card
    assert mergekit_ray.merge(linear(*files), out).was_there
    assert verify(out).problems == []
    (out / "config.json").write_text("{}")
    assert [problem.partition(":")[0] for problem in verify(out).problems] == ["config.json"]


def test_results_can_be_merged(files: list[Path], tmp_path: Path) -> None:
    mergekit_ray.merge(linear(*files[:2]), tmp_path / "first")
    mergekit_ray.merge(linear(tmp_path / "first" / "model.safetensors", files[2]), tmp_path / "file")
    mergekit_ray.merge(linear(tmp_path / "first", files[2]), tmp_path / "folder")
    name = "model-00001-of-00001.safetensors"  # a folder is among the inputs
    assert load_file(tmp_path / "folder" / name).keys() == load_file(tmp_path / "file" / "model.safetensors").keys()
    for tensor, found in load_file(tmp_path / "folder" / name).items():
        assert torch.equal(found, load_file(tmp_path / "file" / "model.safetensors")[tensor])


def test_folders_with_and_without_an_index(tmp_path: Path, files: list[Path]) -> None:
    sharded = linear(files[0], output={"max_shard_size": 600})
    mergekit_ray.merge(sharded, tmp_path / "sharded")
    assert (tmp_path / "sharded" / "a.safetensors.index.json").exists()
    (tmp_path / "plain").mkdir()
    files[1].rename(tmp_path / "plain" / "weights.safetensors")
    (tmp_path / "plain" / "LICENSE").write_text("free")
    mergekit_ray.merge(linear(tmp_path / "plain", tmp_path / "sharded"), tmp_path / "out")
    check(
        tmp_path / "out" / "model-00001-of-00001.safetensors",
        mean(tmp_path / "plain" / "weights.safetensors", files[0]),
    )
    assert (tmp_path / "out" / "LICENSE").read_text() == "free"


def test_stages(files: list[Path], tmp_path: Path) -> None:
    first = linear(*files[:2], name="first", output=str(tmp_path / "first"), keep_precision=True)
    mergekit_ray.merge({"stages": [first, linear("first", files[2])]}, tmp_path / "out")
    check(tmp_path / "first" / "model.safetensors", mean(*files[:2]))
    a, b, c = (load_file(file) for file in files)
    check(tmp_path / "out" / "model.safetensors", {n: ((a[n] + b[n]) / 2 + c[n]) / 2 for n in SHAPES})
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"ss_output_name": "a", "format": "pt"}


def test_a_stopped_merge_is_resumed(files: list[Path], tmp_path: Path) -> None:
    recipe, out = linear(*files, output={"max_shard_size": 100}), tmp_path / "out"
    stop = threading.Event()
    with pytest.raises(Interrupted):
        mergekit_ray.merge(recipe, out, reporter=stop_at(stop, "shard_done"), stop=stop)
    assert not (out / "model.safetensors.index.json").exists()
    result = mergekit_ray.merge(recipe, out)
    assert 0 < result.num_resumed < len(result.plan.shards)
    mergekit_ray.merge(recipe, tmp_path / "at once")
    assert contents(out) == contents(tmp_path / "at once")


def test_another_result_is_only_replaced_when_asked(files: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    mergekit_ray.merge(linear(files[0]), out)
    assert (out / "a.safetensors").exists()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(PlanError, match="another recipe's output is there"):
        mergekit_ray.merge(linear(files[1], files[2]), out)
    mergekit_ray.merge(linear(files[1], files[2]), out, options=MergeOptions(overwrite=True))
    names = {"model.safetensors", "model.safetensors.index.json", "mine.txt", *REST}
    assert {path.name for path in out.iterdir() if path.is_file()} == names
    check(out / "model.safetensors", mean(files[1], files[2]))
    assert verify(out).problems == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_folder_of_the_inputs_is_left_alone(files: list[Path], overwrite: bool) -> None:
    folder = files[0].parent
    before = contents(folder)
    with pytest.raises(PlanError, match="an input is where the output's files would go"):
        mergekit_ray.merge(linear(*files), folder, options=MergeOptions(overwrite=overwrite))
    with pytest.raises(ConfigError, match="an output is a folder"):
        mergekit_ray.merge(linear(*files), folder / "new.safetensors", options=MergeOptions(overwrite=overwrite))
    mergekit_ray.merge(linear(*files), folder / "merged", options=MergeOptions(overwrite=overwrite))
    assert {name: data for name, data in contents(folder).items() if "/" not in name} == before
    check(folder / "merged" / "model.safetensors", mean(*files))


def test_an_input_is_not_found_out_by_another_name(files: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "linked.safetensors").hardlink_to(files[0])
    with pytest.raises(PlanError, match="this file of the output's folder is an input"):
        mergekit_ray.merge(linear(*files), out, options=MergeOptions(overwrite=True))
    assert (out / "linked.safetensors").read_bytes() == files[0].read_bytes()


def test_a_file_that_changes_is_an_error(files: list[Path], tmp_path: Path) -> None:
    from mergekit_ray.core.errors import CheckpointError
    from mergekit_ray.operations.plan import plan
    from mergekit_ray.operations.run_plan import run_plan

    planned = plan(linear(*files))
    save_file(unet(9), files[1])
    with pytest.raises(CheckpointError, match="changed"):
        run_plan(planned, str(tmp_path / "out"), MergeOptions())


def test_it_can_be_reproduced(files: list[Path], tmp_path: Path) -> None:
    recipe = linear(*files, output={"max_shard_size": 600})
    mergekit_ray.merge(recipe, tmp_path / "out")
    found = reproduce(tmp_path / "out", tmp_path / "again")
    assert found.ok
    assert contents(tmp_path / "again").keys() == contents(tmp_path / "out").keys()


def test_commands(files: list[Path], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yml"
    listed = "".join(f"  - {{model: {file}, parameters: {{weight: 1}}}}\n" for file in files)
    recipe.write_text(f"merge_method: linear\ntensors: all\nmodels:\n{listed}")
    for command in (["plan", recipe], ["validate", "--models", recipe], ["plan", recipe, "--explain", "out.bias"]):
        done = run_command("mergekit-ray", *command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    done = run_command("mergekit-ray", "merge", recipe, tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = run_command("mergekit-ray", "verify", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "all as written" in done.stdout


@pytest.mark.s3
def test_in_a_bucket(files: list[Path], tmp_path: Path, s3_server: S3Server, s3_prefix: str) -> None:
    bucket = Bucket(s3_server, s3_prefix)
    place = bucket.upload(files[0].parent, "unets")
    recipe = linear(*(f"{place}/{file.name}" for file in files))
    mergekit_ray.merge(recipe, f"{s3_prefix}/out")
    mergekit_ray.merge(linear(*files), tmp_path / "local")
    here = tmp_path / "download"
    here.mkdir()
    bucket.download("out", here)
    assert (here / "model.safetensors").read_bytes() == (tmp_path / "local" / "model.safetensors").read_bytes()
    assert verify(f"{s3_prefix}/out").problems == []
    with pytest.raises(PlanError, match="an input is where the output's files would go"):
        mergekit_ray.merge(recipe, place, options=MergeOptions(overwrite=True))
    assert sorted(bucket.keys("unets")) == ["a.safetensors", "b.safetensors", "c.safetensors", "vae.safetensors"]


@pytest.mark.ray
def test_on_ray(files: list[Path], tmp_path: Path) -> None:
    recipe = linear(*files, output={"max_shard_size": 600})
    mergekit_ray.merge(recipe, tmp_path / "local", options=MergeOptions(executor="local"))
    with RayCluster(num_nodes=1):
        mergekit_ray.merge(recipe, tmp_path / "ray", options=MergeOptions(executor="ray", num_workers=1))
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")
