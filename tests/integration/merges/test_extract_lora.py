"""Adapters extracted from a difference, and loaded by PEFT."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

import mergekit_ray
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import ConfigError, MergekitRayError, ModelError, PlanError
from mergekit_ray.operations import extract_lora as extraction
from mergekit_ray.operations.extract_lora import extract_lora
from mergekit_ray.operations.extract_options import ExtractOptions
from mergekit_ray.operations.options import MergeOptions
from mergekit_ray.planning.extraction import Coverage
from support.adapters import EMBEDDING, HEAD, fresh, llama, passthrough, quiet, save_bases
from support.merging import run_command
from support.models import contents, tensors_of
from support.servers.s3_server import S3Server
from support.sweep.building import families
from support.sweep.small_configs import small_config


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet():
        yield


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_bases(tmp_path_factory.mktemp("bases"))


class Tuned:
    """A base, and what became of it: matrices by a change of rank 3, all else by noise."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind = kind
        self.base, self.tuned = fresh(kind), fresh(kind)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in self.tuned.parameters():
                shape = parameter.shape
                change = 0.01 * torch.randn(shape, generator=generator)
                if len(shape) == 2:
                    left = torch.randn(shape[0], 3, generator=generator) * torch.tensor([1.0, 0.3, 0.03])
                    change = 0.05 * left @ torch.randn(3, shape[1], generator=generator)
                parameter.add_(change)
        self.base_folder, self.folder = folder / "base", folder / "tuned"
        self.base.save_pretrained(self.base_folder)
        self.tuned.save_pretrained(self.folder)

    def loaded_by_peft(self, adapter: Path) -> dict[str, torch.Tensor]:
        """The base with the adapter; PEFT must find every tensor in it, and no other."""
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            merged = PeftModel.from_pretrained(fresh(self.kind), adapter)
        found: dict[str, torch.Tensor] = merged.merge_and_unload().state_dict()
        return found


@pytest.fixture(params=["llama", "tied", "gpt2"])
def tuned(request: pytest.FixtureRequest, tmp_path: Path) -> Tuned:
    return Tuned(request.param, tmp_path)


@pytest.fixture
def tuned_llama(tmp_path: Path) -> Tuned:
    return Tuned("llama", tmp_path)


def close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return float((actual - expected).norm()) <= 1e-6 * float(expected.norm())


def test_a_change_of_low_rank_comes_back(tuned: Tuned, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    coverage = Coverage(embeddings=True, saved=("ln_f" if tuned.kind == "gpt2" else "norm",))
    found = extract_lora(str(tuned.folder), str(tuned.base_folder), str(out), ExtractOptions(rank=3, coverage=coverage))
    assert sorted(file.name for file in out.rglob("*")) == sorted(
        ["README.md", "adapter_config.json", "adapter_model.safetensors", "mergekit-ray.json"]
    )
    covered = {each.name for each in found.factorised} | set(found.saved)
    lost = {each.name for each in found.uncovered}
    expected, before = tuned.tuned.state_dict(), tuned.base.state_dict()
    assert covered | lost == set(tensors_of(tuned.folder))
    assert all(each.error < 1e-6 for each in found.factorised)
    by_peft = tuned.loaded_by_peft(out)
    mergekit_ray.merge(passthrough(f"{tuned.base_folder}+{out}"), tmp_path / "out")
    by_us = tensors_of(tmp_path / "out")
    for name in tensors_of(tuned.folder):
        wanted = before[name] if name in lost else expected[name]
        assert close(by_peft[name], wanted), name
        assert close(by_us[name], wanted), name
    for each in found.uncovered:
        assert each.norm == pytest.approx(float((expected[each.name] - before[each.name]).norm()), rel=1e-5)
    norms = {name: float((expected[name] - before[name]).norm()) for name in lost | covered - set(found.saved)}
    share = sum(norms[name] ** 2 for name in lost) / sum(norm**2 for norm in norms.values())
    assert found.error == pytest.approx(share**0.5, rel=1e-4)


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
def test_a_smaller_rank_leaves_what_it_says(dtype: DType, tuned_llama: Tuned, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    models = str(tuned_llama.folder), str(tuned_llama.base_folder)
    found = extract_lora(*models, str(out), ExtractOptions(rank=2, dtype=dtype))
    assert all(t.dtype is (torch.float32 if dtype is DType.F32 else torch.bfloat16) for t in tensors_of(out).values())
    merged = tuned_llama.loaded_by_peft(out)
    before, after = tuned_llama.base.state_dict(), tuned_llama.tuned.state_dict()
    assert {each.rank for each in found.factorised} == {2}
    for each in found.factorised:
        change = (after[each.name] - before[each.name]).double()
        left = (after[each.name].double() - merged[each.name].double()).norm() / change.norm()
        assert each.error == pytest.approx(float(left), rel=1e-2)
        if dtype is DType.F32:
            values = torch.linalg.svdvals(change)
            assert each.error == pytest.approx(float(values[2:].norm() / values.norm()), rel=1e-3)


def test_energy_decides_on_ranks(tuned_llama: Tuned, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    models = str(tuned_llama.folder), str(tuned_llama.base_folder)
    found = extract_lora(*models, str(out), ExtractOptions(energy=0.95))
    before, after = tuned_llama.base.state_dict(), tuned_llama.tuned.state_dict()
    for each in found.factorised:
        squares = torch.linalg.svdvals((after[each.name] - before[each.name]).double()) ** 2
        shares = squares.cumsum(0) / squares.sum()
        assert each.rank == int((shares < 0.95).sum()) + 1
        assert each.error**2 <= 0.0501
    assert len({each.rank for each in found.factorised}) > 1
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] != {}
    merged = tuned_llama.loaded_by_peft(out)
    for each in found.factorised:
        left = (after[each.name] - merged[each.name]).norm() / (after[each.name] - before[each.name]).norm()
        assert float(left) == pytest.approx(each.error, rel=1e-3)
    whole = extract_lora(*models, str(tmp_path / "whole"), ExtractOptions(energy=1.0))
    assert all(each.error < 1e-6 for each in whole.factorised)


@pytest.mark.parametrize("family", ["llava", "gemma3", "mllama", "paligemma", "qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("part", ["language", "tower"])
def test_peft_finds_the_modules_of_multimodal_models(family: str, part: str, tmp_path: Path) -> None:
    kind = getattr(transformers, families()[family])
    torch.manual_seed(0)
    kind(small_config(family)).float().save_pretrained(tmp_path / "base")
    model = kind.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_language = "language_model" in name or name.startswith("lm_head")
            if parameter.dim() == 2 and is_language == (part == "language"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "tuned")
    found = extract_lora(
        str(tmp_path / "tuned"),
        str(tmp_path / "base"),
        str(tmp_path / "adapter"),
        ExtractOptions(rank=1 << 10, coverage=Coverage(saved=("norm",))),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*adapter keys.*")
        merged = PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
        merged = merged.merge_and_unload()
    merged.save_pretrained(tmp_path / "by-peft")
    mergekit_ray.merge(passthrough(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}"), tmp_path / "by-us")
    by_peft, by_us, expected = (tensors_of(tmp_path / name) for name in ("by-peft", "by-us", "tuned"))
    for name in {each.name for each in found.factorised} | set(found.saved):
        assert close(by_peft[name], expected[name]), name
        assert close(by_us[name], expected[name]), name


@pytest.mark.parametrize("tuned_part", ["mlp", "shared_experts"])
def test_peft_adapts_shared_experts_and_dense_layers_beside_routed_experts(tuned_part: str, tmp_path: Path) -> None:
    kind = transformers.DeepseekV3ForCausalLM
    torch.manual_seed(0)
    kind(small_config("deepseek_v3")).float().save_pretrained(tmp_path / "base")
    model = kind.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if (tuned_part in name and parameter.dim() > 1 and "gate.weight" not in name) or "kv_b_proj" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "tuned")
    folders = [str(tmp_path / name) for name in ("tuned", "base", "adapter")]
    found = extract_lora(*folders, ExtractOptions(rank=1 << 10))
    assert (found.uncovered, found.error < 1e-6) == ([], True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*adapter keys.*")
        merged = PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
        merged = merged.merge_and_unload()
    mergekit_ray.merge(passthrough(f"{folders[1]}+{folders[2]}"), tmp_path / "by-us")
    merged.save_pretrained(tmp_path / "by-peft")
    by_peft, by_us, expected = (tensors_of(tmp_path / name) for name in ("by-peft", "by-us", "tuned"))
    for name in expected:
        assert close(by_peft[name], expected[name]), name
        assert close(by_us[name], expected[name]), name


def test_layers_that_did_not_change_are_left_out(tmp_path: Path, bases: dict[str, Path]) -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight += 0.1
    model.save_pretrained(tmp_path / "tuned")
    out = tmp_path / "adapter"
    found = extract_lora(str(tmp_path / "tuned"), str(bases["llama"]), str(out), ExtractOptions(rank=4))
    assert [each.name for each in found.factorised if each.rank] == ["model.layers.1.self_attn.q_proj.weight"]
    assert (found.uncovered, found.error < 1e-6) == ([], True)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.1.self_attn.q_proj"]
    assert len(tensors_of(out)) == 2
    copy = shutil.copytree(bases["llama"], tmp_path / "copy")
    with pytest.raises(ModelError, match="there is nothing to extract"):
        extract_lora(str(bases["llama"]), str(copy), str(tmp_path / "x"), ExtractOptions(rank=1))


def test_what_has_no_counterpart_is_told(tmp_path: Path, bases: dict[str, Path]) -> None:
    model = llama(1)
    model.resize_token_embeddings(44)
    model.save_pretrained(tmp_path / "tuned")
    models = str(tmp_path / "tuned"), str(bases["llama"])
    found = extract_lora(*models, str(tmp_path / "a"), ExtractOptions(rank=2))
    assert found.unmatched == dict.fromkeys((HEAD, EMBEDDING), "[44, 32], in the base [40, 32]")
    saved = Coverage(saved=("lm_head", "embed_tokens"))
    found = extract_lora(*models, str(tmp_path / "b"), ExtractOptions(rank=2, coverage=saved))
    assert (found.unmatched, sorted(found.saved)) == ({}, [HEAD, EMBEDDING])
    mergekit_ray.merge(passthrough(f"{bases['llama']}+{tmp_path / 'b'}"), tmp_path / "out")
    assert torch.equal(tensors_of(tmp_path / "out")[EMBEDDING], model.get_input_embeddings().weight)


def test_it_resumes_and_ends_where_it_would_have(
    tuned_llama: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, whole = tmp_path / "adapter", tmp_path / "whole"
    models, wanted = (str(tuned_llama.folder), str(tuned_llama.base_folder)), ExtractOptions(energy=0.9)

    def fail(*_: object) -> None:
        raise ModelError("on purpose")

    with monkeypatch.context() as patched:
        patched.setattr(extraction, "adapter_config", fail)
        with pytest.raises(ModelError, match="on purpose"):
            extract_lora(*models, str(out), wanted)
    assert not (out / "adapter_config.json").exists()
    computed = {f: f.stat().st_mtime_ns for f in out.rglob("factors-*/*.safetensors")}
    assert computed
    with monkeypatch.context() as patched:
        patched.setattr(extraction, "adapter_config", fail)
        with pytest.raises(ModelError, match="on purpose"):
            extract_lora(*models, str(out), wanted)
    assert {f: f.stat().st_mtime_ns for f in out.rglob("factors-*/*.safetensors")} == computed
    extract_lora(*models, str(out), wanted)
    extract_lora(*models, str(whole), wanted, MergeOptions(num_workers=1, chunk_elements=99))
    assert contents(out) == contents(whole)


def test_the_place_is_respected(tuned_llama: Tuned, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    models = str(tuned_llama.folder), str(tuned_llama.base_folder)
    extract_lora(*models, str(out), ExtractOptions(rank=1))
    before = contents(out)
    extract_lora(*models, str(out), ExtractOptions(rank=1))
    assert contents(out) == before
    with pytest.raises(PlanError) as caught:
        extract_lora(*models, str(out), ExtractOptions(rank=2))
    assert caught.value.what == (
        f"another extraction's adapter is there: what {models[0]} learnt beyond {models[1]}, rank 1"
    )
    assert "`options=MergeOptions(overwrite=True)`" in str(caught.value.remedy)
    extract_lora(*models, str(out), ExtractOptions(rank=2), MergeOptions(overwrite=True))
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 2
    with pytest.raises(PlanError, match="the output is one of the inputs"):
        extract_lora(*models, models[1], ExtractOptions(rank=1))
    tuned_llama.base.save_pretrained(tmp_path / "model")
    with pytest.raises(PlanError, match=r"other files are there already: config\.json"):
        extract_lora(*models, str(tmp_path / "model"), ExtractOptions(rank=1), MergeOptions(overwrite=True))
    with pytest.raises(ModelError, match="are the same"):
        extract_lora(models[0], models[0], str(tmp_path / "x"), ExtractOptions(rank=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [({}, "either a rank or an energy"), ({"rank": 1, "energy": 0.5}, "either"), ({"rank": 0}, "at least 1")]
    + [({"energy": value}, "above 0 and at most 1") for value in (0.0, 1.5)],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MergekitRayError, match=message):
        ExtractOptions(**options)


def test_the_hub_is_refused_before_a_model_is_opened() -> None:
    with pytest.raises(ConfigError, match="cannot be written to the Hub") as caught:
        extract_lora("/no/such/model", "/no/such/base", "hf://org/lora", ExtractOptions(rank=4))
    assert "hf upload" in str(caught.value)


@pytest.mark.s3
def test_into_a_bucket(tuned_llama: Tuned, s3_server: S3Server, s3_prefix: str, tmp_path: Path) -> None:
    models, wanted = (str(tuned_llama.folder), str(tuned_llama.base_folder)), ExtractOptions(energy=0.9)
    remote = extract_lora(*models, f"{s3_prefix}/adapter", wanted)
    local = extract_lora(*models, str(tmp_path / "adapter"), wanted)
    assert remote.uri == f"{s3_prefix}/adapter"
    assert remote.factorised == local.factorised
    bucket, _, prefix = s3_prefix.removeprefix("s3://").partition("/")
    client = s3_server.client()
    listed = client.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/")["Contents"]
    found = {o["Key"]: client.get_object(Bucket=bucket, Key=o["Key"])["Body"].read() for o in listed}
    assert found == {f"{prefix}/adapter/{name}": data for name, data in contents(tmp_path / "adapter").items()}


def test_the_command(tuned_llama: Tuned, tmp_path: Path) -> None:
    command = ["extract-lora", tuned_llama.folder, tuned_llama.base_folder, tmp_path / "adapter", "--rank", "2"]
    done = run_command("mergekit-ray", *command, "--modules-to-save", "norm", "--exclude", "v_proj")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "adapter")
    # Neither the shards nor the folders that exist only while it runs.
    assert not re.search(r"\.mergekit-ray-extract|-of-\d{5}|is complete", done.stderr), done.stderr
    assert "factorising " in done.stderr
    assert re.search(r"^total loss: 0\.\d+ \(0\.\d+ for the factorised matrices alone\)$", done.stdout, re.MULTILINE)
    for text in ("model.layers.0.self_attn.v_proj.weight", HEAD, "stored whole:"):
        assert text in done.stdout
    told = run_command("mergekit-ray", *command, "--modules-to-save", "nrm")
    assert told.returncode == 3
    assert "no module's name ends with 'nrm'; did you mean 'norm'?" in told.stderr
