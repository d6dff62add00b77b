"""`tokenizer: {approximate: ...}`: merged models get another model's tokens as `transplant` gives them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import mergekit_ray
from mergekit_ray import MergeOptions, TransplantOptions
from mergekit_ray.core.errors import ConfigError
from mergekit_ray.operations.reproduce import reproduce
from support.models import contents, tensors_of
from support.tokenizers.models import BYTES, EMBEDDING, HEAD, byte_level, ids_of, save_model, unigram

OURS = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "t")]
THEIRS = [("h", "e"), ("Ġ", "t"), ("Ġt", "he"), ("o", "n"), ("l", "l"), ("ll", "o")]
LOCAL = MergeOptions(executor="local", device="cpu")


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Two models of one tokenizer, one of another, and a wider donor of that."""
    theirs = byte_level(["<|im_start|>"], THEIRS, BYTES[::-1])
    wide = {"hidden_size": 12, "num_attention_heads": 3}
    return {
        "a": save_model(tmp_path / "a", byte_level(["<|a|>"], OURS), 1),
        "b": save_model(tmp_path / "b", byte_level(["<|a|>"], OURS), 2),
        "other": save_model(tmp_path / "other", theirs, 3, padding=5),
        "wide": save_model(tmp_path / "wide", theirs, 4, padding=3, **wide),
    }


def merged(folders: dict[str, Path], names: str, tokenizer: dict[str, Any], **rest: Any) -> Path:
    out = folders["a"].parent / f"out{len(list(folders['a'].parent.iterdir()))}"
    listed = [{"model": str(folders[name]), "parameters": {"weight": 1.0}} for name in names.split()]
    source = str(folders.get(tokenizer["source"], tokenizer["source"]))
    recipe = {"merge_method": "linear", "models": listed, "tokenizer": {**tokenizer, "source": source}, **rest}
    mergekit_ray.merge(recipe, out, options=LOCAL)
    return out


def transplanted(folders: dict[str, Path], name: str, donor: str, **wanted: Any) -> Path:
    out = folders[name].parent / f"{name}-like-{donor}"
    mergekit_ray.transplant(folders[name], folders[donor], out, TransplantOptions(**wanted), LOCAL, progress=False)
    return out


@pytest.mark.parametrize("donor", ["other", "wide"])
def test_models_are_merged_as_transplanted_ones(folders: dict[str, Path], donor: str) -> None:
    """The tensors of a merge of what `transplant` writes, without writing it."""
    out = merged(folders, "a b", {"source": donor, "approximate": {"method": "omp", "k": 5}})
    alone = {name: transplanted(folders, name, donor, k=5) for name in "ab"}
    listed = [{"model": str(folder), "parameters": {"weight": 1.0}} for folder in alone.values()]
    apart = out.parent / "apart"
    mergekit_ray.merge({"merge_method": "linear", "models": listed}, apart, options=LOCAL)
    found, expected = tensors_of(out), tensors_of(apart)
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    assert ids_of(out) == ids_of(folders[donor])
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.config.vocab_size == tensors_of(folders[donor])[EMBEDDING].shape[0]
    assert model.config.eos_token_id == ids_of(out)["</s>"]


def test_the_models_whose_tokens_they_are_is_merged_as_it_is(folders: dict[str, Path]) -> None:
    out = merged(folders, "a other", {"source": "other", "approximate": "mean"})
    like = tensors_of(transplanted(folders, "a", "other", method="mean"))
    for name in (EMBEDDING, HEAD):
        torch.testing.assert_close(tensors_of(out)[name], (like[name] + tensors_of(folders["other"])[name]) / 2)


def test_the_base_as_the_source(folders: dict[str, Path]) -> None:
    base = {"base_model": str(folders["other"]), "merge_method": "task_arithmetic"}
    out = merged(folders, "a", {"source": "base", "approximate": "zero"}, **base)
    like = tensors_of(transplanted(folders, "a", "other", method="zero"))
    torch.testing.assert_close(tensors_of(out)[EMBEDDING], like[EMBEDDING])
    assert ids_of(out) == ids_of(folders["other"])


def test_one_model_passes_through_as_a_draft(folders: dict[str, Path]) -> None:
    recipe = {
        "merge_method": "passthrough",
        "models": [{"model": str(folders["a"])}],
        "tokenizer": {"source": str(folders["wide"]), "approximate": "omp"},
    }
    out = folders["a"].parent / "draft"
    result = mergekit_ray.merge(recipe, out, options=LOCAL)
    like = tensors_of(transplanted(folders, "a", "wide"))
    assert all(torch.equal(tensor, like[name]) for name, tensor in tensors_of(out).items())
    assert reproduce(out, out.parent / "again", LOCAL).problems == ()
    assert result.plan.recipe["tokenizer"]["approximate"] == {"method": "omp"}


def test_rows_that_the_recipe_names_come_first(folders: dict[str, Path]) -> None:
    on = {"kind": "model_token", "model": str(folders["b"]), "token": "o"}
    named = {"on": {"source": on}, "Ġthe": {"source": {"kind": "zero"}}, "<|new|>": {"source": on}}
    tokenizer = {"source": "other", "approximate": "omp", "tokens": named, "pad_to_multiple_of": 16}
    out = merged(folders, "a", tokenizer)
    ids, rows = ids_of(out), tensors_of(out)[EMBEDDING]
    assert len(rows) % 16 == 0
    wanted = tensors_of(folders["b"])[EMBEDDING][ids_of(folders["b"])["o"]]
    assert torch.equal(rows[ids["on"]], wanted)
    assert torch.equal(rows[ids["<|new|>"]], wanted)
    assert not rows[ids["Ġthe"]].any()
    like = tensors_of(transplanted(folders, "a", "other"))[EMBEDDING]
    assert torch.equal(rows[ids["llo"]], like[ids_of(folders["other"])["llo"]])


@pytest.mark.parametrize("by_id", [False, True])
def test_a_row_of_a_token_that_only_an_approximated_model_has(by_id: bool, folders: dict[str, Path]) -> None:
    """Its own row, by its own id, which is another token's in the new vocabulary."""
    ids, rows = ids_of(folders["b"]), tensors_of(folders["b"])[EMBEDDING]
    named = {"token_id": ids["<|a|>"]} if by_id else {"token": "<|a|>"}
    source = {"kind": "model_token", "model": str(folders["b"]), **named}
    tokenizer = {"source": "other", "approximate": "omp", "tokens": {"on": {"source": source}}}
    out = merged(folders, "b", tokenizer)
    assert torch.equal(tensors_of(out)[EMBEDDING][ids_of(out)["on"]], rows[ids["<|a|>"]])


def test_a_row_that_the_recipe_names_leaves_those_of_models_that_have_it(folders: dict[str, Path]) -> None:
    named = {"he": {"source": {"kind": "zero"}}, "on": {"source": {"kind": "zero"}}}
    out = merged(folders, "a", {"source": "other", "approximate": "omp", "tokens": named})
    rows, own = tensors_of(out)[EMBEDDING], tensors_of(folders["a"])[EMBEDDING]
    assert torch.equal(rows[ids_of(out)["he"]], own[ids_of(folders["a"])["he"]])
    assert not rows[ids_of(out)["on"]].any()


def test_tied_and_untied_models(folders: dict[str, Path]) -> None:
    tied = save_model(folders["a"].parent / "tied", byte_level(["<|a|>"], OURS), 5, tie_word_embeddings=True)
    folders = {**folders, "tied": tied}
    out = merged(folders, "a tied", {"source": "other", "approximate": "mean"})
    one, two = (tensors_of(transplanted(folders, name, "other", method="mean")) for name in ("a", "tied"))
    torch.testing.assert_close(tensors_of(out)[HEAD], (one[HEAD] + two[EMBEDDING]) / 2)


def test_a_mixture_speaks_the_tokens_too(folders: dict[str, Path]) -> None:
    experts = [{"source_model": str(folders[name]), "positive_prompts": ["x"]} for name in "ab"]
    recipe = {
        "base_model": str(folders["a"]),
        "gate_mode": "random",
        "experts": experts,
        "tokenizer": {"source": str(folders["wide"]), "approximate": {"method": "landmark_pca"}},
    }
    out = folders["a"].parent / "mixture"
    mergekit_ray.merge(recipe, out, options=LOCAL)
    like = tensors_of(transplanted(folders, "a", "wide", method="landmark_pca"))
    assert torch.equal(tensors_of(out)[EMBEDDING], like[EMBEDDING])
    assert ids_of(out) == ids_of(folders["wide"])


def test_the_same_bytes_with_little_memory_and_in_small_shards(folders: dict[str, Path]) -> None:
    """Windows of a few rows, each approximated by itself."""
    tokenizer = {"source": str(folders["wide"]), "approximate": {"method": "omp", "k": 4}}
    recipe = {
        "merge_method": "slerp",
        "base_model": str(folders["a"]),
        "models": [{"model": str(folders["b"])}],
        "parameters": {"t": 0.4},
        "tokenizer": tokenizer,
    }
    outs = [folders["a"].parent / name for name in ("whole", "parts")]
    mergekit_ray.merge(recipe, outs[0], options=LOCAL)
    small = MergeOptions(executor="local", device="cpu", num_workers=2, chunk_elements=64)
    mergekit_ray.merge(recipe, outs[1], options=small)
    assert contents(outs[0]) == contents(outs[1])


def test_few_shared_tokens_are_told(folders: dict[str, Path]) -> None:
    pieces = {"▁h": -1.0, **{f"▁w{i}": -2.0 - i for i in range(40)}}
    few = save_model(folders["a"].parent / "few", unigram(pieces), 7)
    recipe = {
        "merge_method": "passthrough",
        "models": [{"model": str(folders["a"])}],
        "tokenizer": {"source": str(few), "approximate": "mean"},
    }
    warnings = mergekit_ray.plan(recipe).warnings
    assert any("are in both models" in warning and str(folders["a"]) in warning for warning in warnings)


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        ({"source": "union", "approximate": "omp"}, "`source` is union"),
        ({"source": "other", "approximate": "opm"}, "did you mean 'omp'"),
        ({"source": "other", "approximate": {"method": "omp", "metric": "cosine"}}, "omp has no metric"),
        ({"source": "other", "approximate": {"kk": 3}}, "unknown key 'kk'"),
        ({"source": "other", "approximate": {"k": "3"}}, "expected a number, not '3'"),
        ({"source": "other", "approximate": {"k": True}}, "expected a number, not True"),
        ({"source": "other", "approximate": {"magikarp": True}}, "unknown key 'magikarp'"),
        ({"source": "other", "approximate": 3}, "expected the name of a method"),
        ({"source": "other", "approximate": {"k": 0}}, "k of omp"),
    ],
)
def test_what_cannot_be_approximated_is_refused(
    folders: dict[str, Path], tokenizer: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        merged(folders, "a", tokenizer)
    assert message in str(caught.value)


def test_yes_and_no_of_yaml(folders: dict[str, Path]) -> None:
    tokenizer = {"source": "other", "approximate": {"method": "zero", "prefix_match": True, "byte_match": False}}
    out = merged(folders, "a", tokenizer)
    like = tensors_of(transplanted(folders, "a", "other", method="zero", prefix_match="yes"))
    assert torch.equal(tensors_of(out)[EMBEDDING], like[EMBEDDING])


def test_options_in_python(folders: dict[str, Path]) -> None:
    options = mergekit_ray.TokenizerOptions(source=str(folders["other"]), approximate=TransplantOptions(k=3))
    assert mergekit_ray.TokenizerOptions.model_validate(options.model_dump(mode="json")) == options
    with pytest.raises(ConfigError, match="magikarp"):
        mergekit_ray.TokenizerOptions(source="org/x", approximate=TransplantOptions(magikarp=True))
