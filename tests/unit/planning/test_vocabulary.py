"""Vocabularies of different sizes: one number of rows for all tensors, and the rows that the donor's tokens need."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mergekit_ray.checkpoint.adapter import adapted, open_adapter
from mergekit_ray.checkpoint.layout import encode_header
from mergekit_ray.checkpoint.token_ids import token_ids
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import ModelError, PlanError
from mergekit_ray.core.expressions import Cast, Concat, Load
from mergekit_ray.core.tensors import TensorSpec
from mergekit_ray.storage.protocols import FileStat
from support.fake_checkpoints import LINEAR, checkpoint, expressions_of, llama_shapes, plan_of
from support.memory_source import MemorySource

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SLICES = """
merge_method: passthrough
slices:
- sources: [{model: /a, layer_range: [0, 1]}]
- sources: [{model: /b, layer_range: [1, 2]}]
"""


def model(path: str, vocabulary: int, *, tied: bool = False, dtype: DType = DType.BF16, **config: Any) -> Any:
    shapes = llama_shapes(2, vocabulary=vocabulary, head=not tied)
    return checkpoint(path, shapes, {"num_hidden_layers": 2, "tie_word_embeddings": tied, **config}, dtype)


def with_files(folder: Path, files: dict[str, Any], vocabulary: int, **config: Any) -> Any:
    """A model in a folder, with JSON files beside it."""
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    shapes = llama_shapes(2, vocabulary=vocabulary)
    stats = [FileStat(name, 1, "1") for name in files]
    return checkpoint(str(folder), shapes, {"num_hidden_layers": 2, **config}, side_files=stats)


def shapes_of(plan: Any) -> dict[str, tuple[int, ...]]:
    return {name: x.spec.shape for name, x in expressions_of(plan).items() if name in (EMBEDDING, HEAD)}


class TestSlices:
    @pytest.mark.parametrize(("of_a", "of_b"), [(7, 10), (10, 7)])
    def test_head_and_embedding_have_the_rows_that_both_models_have(self, of_a: int, of_b: int) -> None:
        plan = plan_of(SLICES, model("/a", of_a), model("/b", of_b))
        assert shapes_of(plan) == {EMBEDDING: (7, 4), HEAD: (7, 4)}
        assert plan.config["vocab_size"] == 7
        assert [w.split(" has ")[1] for w in plan.warnings] == [
            "between 7 and 10 rows in the models: the first 7 are merged, the rest left out"
        ] * 2

    def test_a_head_gets_the_donors_rows_that_its_config_needs(self) -> None:
        a = model("/a", 10, eos_token_id=8)
        plan = plan_of(SLICES, a, model("/b", 7))
        assert shapes_of(plan) == {EMBEDDING: (10, 4), HEAD: (10, 4)}
        head = expressions_of(plan)[HEAD]
        theirs, ours = head.parts
        assert (theirs.model, theirs.spec.shape, ours.model, ours.spec.shape) == ("m1", (7, 4), "m0", (3, 4))
        whole = a.tensors[HEAD][1]
        assert (ours.location.start, ours.location.end) == (whole.start + 7 * 4 * 2, whole.end)
        assert plan.config["vocab_size"] == 10
        assert all("needed by eos_token_id of config.json (8)" in warning for warning in plan.warnings)
        assert not any(name.startswith("/a: lm_head") for name in plan.dropped)

    def test_biases_of_the_head_go_with_it(self) -> None:
        def biased(path: str, rows: int) -> Any:
            shapes = {**llama_shapes(2, vocabulary=rows), "lm_head.bias": (rows,), "cls.predictions.bias": (rows,)}
            return checkpoint(path, shapes, {"num_hidden_layers": 2, "tie_word_embeddings": False})

        found = expressions_of(plan_of(SLICES, biased("/a", 7), biased("/b", 10)))
        assert (found["lm_head.bias"].spec.shape, found["cls.predictions.bias"].spec.shape) == ((7,), (7,))


class TestBiasInOneRow:
    """``final_logits_bias`` ``[1, rows]`` of Marian, BART and MBart."""

    NAME = "final_logits_bias"

    def biased(self, path: str, rows: int, **config: Any) -> Any:
        shapes = {**llama_shapes(2, vocabulary=rows), self.NAME: (1, rows)}
        return checkpoint(path, shapes, {"num_hidden_layers": 2, "tie_word_embeddings": False, **config})

    @pytest.mark.parametrize(("of_a", "of_b"), [(7, 10), (10, 7)])
    @pytest.mark.parametrize("rules", ["", "exclude: [final_logits_bias]\n", "exclude: [lm_head.weight]\n"])
    def test_it_is_cut_with_the_rest(self, of_a: int, of_b: int, rules: str) -> None:
        plan = plan_of(rules + LINEAR, self.biased("/a", of_a), self.biased("/b", of_b))
        assert shapes_of(plan) == {EMBEDDING: (7, 4), HEAD: (7, 4)}
        assert expressions_of(plan)[self.NAME].spec.shape == (1, 7)
        assert plan.config["vocab_size"] == 7

    @pytest.mark.parametrize("source", ["/a", "/b"])
    def test_it_keeps_what_the_donor_needs(self, source: str) -> None:
        a, b = self.biased("/a", 10, eos_token_id=8), self.biased("/b", 7)
        found = expressions_of(plan_of(f"exclude: [{self.NAME}]\nfrom: {source}\n" + LINEAR, a, b))[self.NAME]
        assert found.spec.shape == (1, 10)
        copied, own = found.parts
        models = {"/a": "m0", "/b": "m1"}
        assert (copied.model, copied.spec.shape) == (models[source], (1, 7))
        assert (own.model, own.spec.shape) == ("m0", (1, 3))
        whole = a.tensors[self.NAME][1]
        assert (own.location.start, own.location.end) == (whole.start + 7 * 2, whole.end)

    def test_a_bias_of_another_width_is_none(self) -> None:
        shapes = {**llama_shapes(2, vocabulary=10), self.NAME: (1, 9)}
        b = checkpoint("/b", shapes, {"num_hidden_layers": 2, "tie_word_embeddings": False})
        with pytest.raises(ModelError, match=r"final_logits_bias: different shapes \(/a: \[1, 7\], /b: \[1, 9\]\)"):
            plan_of(LINEAR, self.biased("/a", 7), b)


class TestDonorsRows:
    @pytest.mark.parametrize("dtype", [DType.BF16, DType.F32])
    def test_merged_rows_come_first(self, dtype: DType) -> None:
        plan = plan_of(LINEAR, model("/a", 10, eos_token_id=[1, 9], dtype=dtype), model("/b", 7))
        for name in (EMBEDDING, HEAD):
            whole = expressions_of(plan)[name]
            assert isinstance(whole, Concat)
            merged, own = whole.parts
            assert (merged.method, merged.spec.shape) == ("linear", (7, 4))
            assert isinstance(own, Load)
            assert (own.model, own.spec.name, own.spec.shape) == ("m0", name, (3, 4))

    def test_they_are_rounded_to_the_outputs_dtype(self) -> None:
        plan = plan_of("dtype: float32\n" + LINEAR, model("/a", 10, eos_token_id=9), model("/b", 7))
        own = expressions_of(plan)[EMBEDDING].parts[1]
        assert isinstance(own, Cast)
        assert own.dtype is DType.F32

    def test_a_tied_donor_gives_those_of_its_embedding(self) -> None:
        plan = plan_of(LINEAR, model("/a", 10, tied=True, eos_token_id=9), model("/b", 7))
        assert expressions_of(plan)[HEAD].parts[1].spec.name == EMBEDDING

    def test_a_donor_that_is_not_merged_may_give_them(self) -> None:
        donor = model("/c", 10, eos_token_id=9)
        plan = plan_of("base_model: /c\n" + LINEAR, donor, model("/a", 7), model("/b", 7))
        assert shapes_of(plan) == {EMBEDDING: (10, 4), HEAD: (10, 4)}
        assert {x.parts[1].model for x in expressions_of(plan).values() if isinstance(x, Concat)} == {"m0"}

    @pytest.mark.parametrize("rows", [5, 10])
    def test_the_config_of_a_donor_that_is_not_merged_says_the_rows_that_are_there(self, rows: int) -> None:
        plan = plan_of("base_model: /c\n" + LINEAR, model("/c", rows), model("/a", 7), model("/b", 7))
        assert shapes_of(plan) == {EMBEDDING: (7, 4), HEAD: (7, 4)}
        assert plan.config["vocab_size"] == 7

    @pytest.mark.parametrize(
        "config",
        [
            {"eos_token_id": 6},
            {"pad_token_id": 10, "eos_token_id": -1},  # beyond its own rows too
            {"bos_token_id": None, "eos_token_id": True},
        ],
    )
    def test_rows_that_nothing_needs_are_left_out(self, config: dict[str, Any]) -> None:
        plan = plan_of(LINEAR, model("/a", 10, **config), model("/b", 7))
        assert shapes_of(plan) == {EMBEDDING: (7, 4), HEAD: (7, 4)}

    def test_a_base_with_fewer_rows_needs_no_more(self) -> None:
        text = "merge_method: task_arithmetic\nbase_model: /a\nmodels: [{model: /b, parameters: {weight: 1}}]"
        plan = plan_of(text, model("/a", 7), model("/b", 10, eos_token_id=9))
        assert shapes_of(plan) == {EMBEDDING: (7, 4), HEAD: (7, 4)}

    def test_rows_that_cannot_be_given_are_refused_with_the_ids(self) -> None:
        wide = checkpoint(
            "/c",
            llama_shapes(2) | {EMBEDDING: (10, 8), HEAD: (10, 8)},
            {"num_hidden_layers": 2, "text_config": {"eos_token_id": [1, 9], "image_token_index": 8}},
        )
        with pytest.raises(PlanError) as caught:
            plan_of("base_model: /c\n" + LINEAR, wide, model("/a", 7), model("/b", 7))
        assert "eos_token_id of config.json (9), image_token_index of config.json (8)" in caught.value.what
        assert "[10, 8]" in caught.value.what


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("generation_config.json", {"decoder_start_token_id": 8}, "decoder_start_token_id of generation_config.json"),
        ("tokenizer.json", {"model": {"vocab": {"a": 0, "b": 9}}}, "tokenizer.json (9)"),
        ("tokenizer.json", {"model": {"vocab": [["a", -1.0]] * 9}}, "tokenizer.json (7, 8)"),
        ("tokenizer.json", {"model": {"vocab": {}}, "added_tokens": [{"id": 7, "content": "x"}]}, "tokenizer.json (7)"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9": {}}}, "of tokenizer_config.json (9)"),
        ("added_tokens.json", {"<x>": 7}, "added_tokens.json (7)"),
        ("vocab.json", {"<x>": 8}, "vocab.json (8)"),
    ],
)
def test_what_the_donors_files_need(name: str, content: Any, what: str, tmp_path: Path) -> None:
    donor = with_files(tmp_path, {name: content}, 10)
    text = LINEAR.replace("/a", str(tmp_path))
    plan = plan_of(text, donor, model("/b", 7))
    assert shapes_of(plan) == {EMBEDDING: (10, 4), HEAD: (10, 4)}
    assert all(what in warning for warning in plan.warnings)


def test_files_of_another_form_say_nothing(tmp_path: Path) -> None:
    files = {
        "tokenizer.json": {"model": ["vocab"], "added_tokens": [3, {"id": "x"}]},
        "generation_config.json": ["eos_token_id"],
        "tokenizer_config.json": {"added_tokens_decoder": {"x": 9, "²": 1}},
    }
    found = with_files(tmp_path, files, 10)
    assert token_ids(found) == {}
    (tmp_path / "tokenizer.json").write_bytes(b"\xff{")
    assert token_ids(found) == {}


def test_the_tokenizer_of_an_adapter_speaks_for_the_adapted_model(tmp_path: Path) -> None:
    base = with_files(tmp_path, {"tokenizer.json": {"model": {"vocab": {"a": 9}}}}, 10)
    specs = [TensorSpec(f"base_model.model.{EMBEDDING}", DType.F32, (10, 4))]
    files = {
        "adapter_config.json": b'{"peft_type": "LORA"}',
        "adapter_model.safetensors": encode_header(specs) + bytes(160),
        "vocab.json": b'{"b": 8}',
    }
    adapter = open_adapter(MemorySource("/adapter", files), "/adapter")
    assert token_ids(adapted(base, adapter)) == {"vocab.json": {8}}
