"""What operations give back in Python: tensors when asked for, and a line or a table that says what it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mergekit_ray
from mergekit_ray.core.errors import CheckpointError, ConfigError
from mergekit_ray.core.plan import Plan
from mergekit_ray.operations.extraction_report import ExtractResult, Factorised
from mergekit_ray.operations.options import MergeOptions
from mergekit_ray.operations.reproduce import Reproduction
from mergekit_ray.operations.run_plan import MergeResult, run_plan
from mergekit_ray.operations.tensors import Tensors
from mergekit_ray.operations.verify import Verification
from mergekit_ray.reporting.reporters import SilentReporter
from support.memory_inputs import random_llama, write_model

NAMES = ["model.embed_tokens.weight", "lm_head.weight"]


@pytest.fixture
def result(plan: Plan, tmp_path: Path) -> MergeResult:
    return run_plan(plan, str(tmp_path / "out"), MergeOptions(executor="local"))


def test_tensors_are_those_of_the_files(result: MergeResult, tmp_path: Path) -> None:
    expected: dict[str, torch.Tensor] = {}
    for file in sorted((tmp_path / "out").glob("*.safetensors")):
        expected |= load_file(file)
    tensors = result.tensors()
    assert len(tensors) == len(expected) == 7
    assert list(tensors) == list(tensors.specs)
    for name, tensor in tensors.items():
        assert tensor.dtype is torch.bfloat16
        assert torch.equal(tensor, expected[name])
    assert torch.equal(result.load_tensor(NAMES[0]), expected[NAMES[0]])
    assert tensors.get("nothing") is None
    assert repr(tensors).startswith(f"<Tensors of {tmp_path}/out: 7 tensors, ")


def test_tensors_of_all_shapes_and_dtypes(tmp_path: Path) -> None:
    stored = {
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "codes": torch.arange(6, dtype=torch.uint8).reshape(2, 3),
        "flags": torch.tensor([True, False]),
        "fp8": torch.ones(2, 2).to(torch.float8_e4m3fn),
    }
    tensors = Tensors.at(str(write_model(tmp_path / "model", stored, {})))
    for name, tensor in stored.items():
        found = tensors[name]
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found.to(torch.float64), tensor.to(torch.float64))
        found.zero_()  # it is the caller's own


def test_only_what_is_asked_for_is_read(result: MergeResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mergekit_ray.storage.local.store import LocalSource

    read: list[int] = []
    plain = LocalSource.read_ranges

    def counting(self: LocalSource, name: str, ranges: Any, buffers: Any, *, version: str) -> int:
        read.extend(end - start for start, end in ranges)
        return plain(self, name, ranges, buffers, version=version)

    tensors = result.tensors()
    assert NAMES[0] in tensors
    monkeypatch.setattr(LocalSource, "read_ranges", counting)
    assert [NAMES[0] in tensors, "nothing" in tensors, len(tensors)] == [True, False, 7]
    assert read == []
    assert tensors[NAMES[0]].numel() == 160
    assert read == [320]
    assert result.tensors() is tensors


def test_an_unknown_tensor_names_the_nearest(result: MergeResult) -> None:
    with pytest.raises(ConfigError, match=r"no tensor is called 'lm_head\.wieght'.*lm_head\.weight"):
        result.load_tensor("lm_head.wieght")
    with pytest.raises(KeyError):
        result.tensors()["lm_head.wieght"]


def test_a_model_that_changed_is_not_read(result: MergeResult, tmp_path: Path) -> None:
    tensors = result.tensors()
    for file in (tmp_path / "out").glob("*.safetensors"):
        file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(CheckpointError):
        tensors[NAMES[0]]


def test_plans_and_results_show_themselves_in_a_line(result: MergeResult, tmp_path: Path) -> None:
    plan = result.plan
    assert repr(plan).startswith("<Plan linear of 2 models: 472 parameters in 3 shards, 1.89 kB to read, ")
    assert repr(plan.shards[0]).startswith("<Shard model-00001-of-00003.safetensors: ")
    assert repr(plan.shards[0].tensors[0]) == "<OutputTensor model.embed_tokens.weight: bfloat16 [20, 8]>"
    assert repr(plan.inputs["m0"]) == f"<InputModel {tmp_path}/model-a: 1 file of {tmp_path}/model-a>"
    assert repr(result).startswith(f"<MergeResult {tmp_path}/out: linear of 2 models, ")
    assert repr(mergekit_ray.verify(tmp_path / "out")) == "<Verification of 7 tensors: all as written>"
    for shown in (plan, result, mergekit_ray.verify(str(tmp_path / "out"))):
        html = shown._repr_html_()
        assert html.startswith("<table>")
        assert len(html) < 3000


def test_what_was_there_is_said(result: MergeResult, plan: Plan, tmp_path: Path) -> None:
    again = run_plan(plan, str(tmp_path / "out"), MergeOptions(executor="local"))
    assert repr(again) == f"<MergeResult {tmp_path}/out: linear of 2 models, it was there>"
    assert "it was there already" in again._repr_html_()


def test_problems_are_counted_in_lines_and_listed_in_tables() -> None:
    verification = Verification(num_tensors=1, problems=["<a>: wrong", "b: missing"], notes=["c"])
    assert (verification.ok, repr(verification)) == (False, "<Verification of 1 tensor: 2 problems>")
    assert "&lt;a&gt;: wrong\nb: missing" in verification._repr_html_()
    reproduction = Reproduction("out", 2, ("a: wrong",), ())
    assert (reproduction.ok, repr(reproduction)) == (False, "<Reproduction out: 2 shards, 1 problem>")
    assert "a: wrong" in reproduction._repr_html_()
    assert repr(Reproduction("out", 1, (), ())) == "<Reproduction out: 1 shard, all as the manifest says>"
    found = ExtractResult("out", [Factorised("a", 4, 1.0, 0.1), Factorised("b", 0, 0.0, 0.0)], [], {}, [], 0.1)
    assert repr(found) == "<ExtractResult out: 1 matrix, total loss 0.1>"
    html = found._repr_html_()
    assert ">4<" in html
    assert " to " not in html


class Impatient(SilentReporter):
    """Interrupts once the first shard is there, as Ctrl-C or a notebook's stop button may."""

    def event(self, kind: str, message: str, **fields: Any) -> None:
        if kind == "shard_done":
            raise KeyboardInterrupt


def test_an_interrupt_stops_the_merge_and_the_next_call_resumes(plan: Plan, tmp_path: Path) -> None:
    out, options = tmp_path / "out", MergeOptions(executor="local", num_workers=1)
    with pytest.raises(KeyboardInterrupt):
        run_plan(plan, str(out), options, reporter=Impatient())
    assert not (out / "mergekit-ray.json").exists()
    result = run_plan(plan, str(out), options)
    assert 1 <= result.num_resumed < 3 == len(plan.shards)
    assert len(result.tensors()) == 7


def test_a_model_is_reproduced_by_its_name(models: list[Path], tmp_path: Path) -> None:
    recipe = mergekit_ray.DenseRecipe(
        merge_method="linear", models=[{"model": m, "parameters": {"weight": 1}} for m in models]
    )
    mergekit_ray.merge(recipe, tmp_path / "out")
    assert mergekit_ray.reproduce(tmp_path / "out", tmp_path / "again").ok


def test_an_adapter_is_extracted_from_paths(tmp_path: Path) -> None:
    config = {"model_type": "llama", "num_hidden_layers": 2, "tie_word_embeddings": False, "vocab_size": 20}
    base = random_llama(0)
    tuned = {**base, "model.layers.0.self_attn.q_proj.weight": base["model.layers.0.self_attn.q_proj.weight"] + 1}
    folders = [write_model(tmp_path / name, tensors, config) for name, tensors in (("tuned", tuned), ("base", base))]
    found = mergekit_ray.extract_lora(*folders, tmp_path / "lora", mergekit_ray.ExtractOptions(rank=1))
    assert [each.name for each in found.factorised if each.rank] == ["model.layers.0.self_attn.q_proj.weight"]
    adapted = mergekit_ray.inspect(f"{folders[1]}+{tmp_path}/lora")
    plain = mergekit_ray.inspect(folders[1])
    assert (adapted.num_files, adapted.num_parameters) == (2, plain.num_parameters)
    assert adapted.num_bytes > plain.num_bytes
