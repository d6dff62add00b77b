"""Heads that are tied under other names than ``lm_head``, and models without one: what transformers then loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import mergekit_ray
from support.models import config_of, tensors_of

WIDTHS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
SMALL = {**WIDTHS, "vocab_size": 96, "max_position_embeddings": 64, "pad_token_id": 0}
TIED = {
    "BertForMaskedLM": ("BertConfig", "bert.embeddings.word_embeddings.weight"),
    "ModernBertForMaskedLM": ("ModernBertConfig", "model.embeddings.tok_embeddings.weight"),
    "RobertaForMaskedLM": ("RobertaConfig", "roberta.embeddings.word_embeddings.weight"),
    "DistilBertForMaskedLM": ("DistilBertConfig", "distilbert.embeddings.word_embeddings.weight"),
}
"""Class, config and embedding of models whose head is not stored."""


def made(folder: Path, class_name: str, config_name: str, seed: int, **changes: Any) -> Path:
    """A checkpoint with random weights."""
    values = {**SMALL, **changes}
    if config_name == "DistilBertConfig":
        values = {"vocab_size": 96, "dim": 32, "hidden_dim": 48, "n_layers": 4, "n_heads": 4, **changes}
    torch.manual_seed(seed)
    getattr(transformers, class_name)(getattr(transformers, config_name)(**values)).save_pretrained(folder)
    return folder


def loaded(folder: Path, class_name: str) -> Any:
    """As transformers loads it, which must find every weight and no other."""
    model, report = getattr(transformers, class_name).from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model


def halves(first: Path, last: Path) -> dict[str, Any]:
    """A recipe: the first layers of one model, then the last of another."""
    cuts = [(first, [0, 3]), (last, [1, 4])]
    return {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": str(model), "layer_range": layers}]} for model, layers in cuts],
    }


def average(*models: Path) -> dict[str, Any]:
    return {"merge_method": "linear", "models": [{"model": str(m), "parameters": {"weight": 1.0}} for m in models]}


@pytest.mark.parametrize("class_name", TIED)
class TestTiedUnderAnotherName:
    def test_slices_keep_the_tie_and_say_so(self, class_name: str, tmp_path: Path) -> None:
        config, embedding = TIED[class_name]
        a, b = (made(tmp_path / name, class_name, config, seed) for seed, name in enumerate("ab"))
        plan = mergekit_ray.merge(halves(a, b), tmp_path / "out").plan
        model = loaded(tmp_path / "out", class_name)
        assert torch.equal(model.get_output_embeddings().weight, tensors_of(a)[embedding])
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert tensors_of(tmp_path / "out").keys() == loaded_keys(plan)
        assert [w for w in plan.warnings if "stays tied" in w and str(a) in w and str(b) in w] != []

    def test_means_are_tied_as_their_models_are(self, class_name: str, tmp_path: Path) -> None:
        config, embedding = TIED[class_name]
        a, b = (made(tmp_path / name, class_name, config, seed) for seed, name in enumerate("ab"))
        plan = mergekit_ray.merge(average(a, b), tmp_path / "out").plan
        model = loaded(tmp_path / "out", class_name)
        mean = (tensors_of(a)[embedding] + tensors_of(b)[embedding]) / 2
        torch.testing.assert_close(model.get_output_embeddings().weight, mean)
        assert (tensors_of(tmp_path / "out").keys(), plan.warnings) == (tensors_of(a).keys(), ())


def test_layers_that_share_weights_are_merged_once(tmp_path: Path) -> None:
    """ALBERT stores one layer for all."""
    name, config = "AlbertForMaskedLM", "AlbertConfig"
    a, b = (made(tmp_path / each, name, config, seed, embedding_size=16) for seed, each in enumerate("ab"))
    mergekit_ray.merge(average(a, b), tmp_path / "out")
    merged, *models = (loaded(folder, name).state_dict() for folder in (tmp_path / "out", a, b))
    for key, tensor in merged.items():
        torch.testing.assert_close(tensor, (models[0][key] + models[1][key]) / 2)
    assert config_of(tmp_path / "out")["num_hidden_layers"] == 4


def loaded_keys(plan: Any) -> set[str]:
    return {tensor.spec.name for shard in plan.shards for tensor in shard.tensors}


@pytest.mark.parametrize("class_name", ["ModernBertForMaskedLM", "DistilBertForMaskedLM"])
def test_an_untied_model_beside_a_tied_one_unties(class_name: str, tmp_path: Path) -> None:
    config, embedding = TIED[class_name]
    tied = made(tmp_path / "tied", class_name, config, 0)
    untied = made(tmp_path / "untied", class_name, config, 1, tie_word_embeddings=False)
    mergekit_ray.merge(average(tied, untied), tmp_path / "out")
    model = loaded(tmp_path / "out", class_name)
    (head,) = tensors_of(untied).keys() - tensors_of(tied).keys() - {n for n in tensors_of(untied) if "bias" in n}
    mean = (tensors_of(tied)[embedding] + tensors_of(untied)[head]) / 2
    torch.testing.assert_close(model.get_output_embeddings().weight, mean)
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False


def test_a_model_without_a_head_gets_none_and_no_warning(tmp_path: Path) -> None:
    a, b = (made(tmp_path / name, "BertModel", "BertConfig", seed) for seed, name in enumerate("ab"))
    plan = mergekit_ray.merge(halves(a, b), tmp_path / "out").plan
    loaded(tmp_path / "out", "BertModel")
    assert plan.warnings == ()
    assert config_of(tmp_path / "out") == {**config_of(a), "num_hidden_layers": 6}


@pytest.mark.parametrize("recipe", [average, halves])
def test_clip_gets_no_head(recipe: Any, tmp_path: Path) -> None:
    text = {**SMALL, "bos_token_id": 1, "eos_token_id": 2}
    vision = {**WIDTHS, "image_size": 16, "patch_size": 8}
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
        transformers.CLIPModel(config).save_pretrained(tmp_path / name)
    plan = mergekit_ray.merge(recipe(tmp_path / "a", tmp_path / "b"), tmp_path / "out").plan
    assert not any("lm_head" in name for name in loaded_keys(plan))
    if recipe is average:
        loaded(tmp_path / "out", "CLIPModel")
        assert config_of(tmp_path / "out") == config_of(tmp_path / "a")


def test_gpt2_without_its_prefix_gets_a_head_that_is_loaded(tmp_path: Path) -> None:
    """The first published files of GPT-2 hold the names of the model without its head."""
    sizes = {"vocab_size": 96, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(tmp_path / name)
        file = tmp_path / name / "model.safetensors"
        save_file({n.removeprefix("transformer."): t for n, t in load_file(file).items()}, file, {"format": "pt"})
    mergekit_ray.merge(halves(tmp_path / "a", tmp_path / "b"), tmp_path / "out")
    model = loaded(tmp_path / "out", "GPT2LMHeadModel")
    assert torch.equal(model.lm_head.weight, tensors_of(tmp_path / "b")["wte.weight"])
    assert torch.equal(model.transformer.wte.weight, tensors_of(tmp_path / "a")["wte.weight"])


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("OPT", {"word_embed_proj_dim": 32, "ffn_dim": 48, "pad_token_id": 1}),
        ("GPTNeoX", {"intermediate_size": 48, "tie_word_embeddings": True}),
    ],
)
def test_slices_of_tied_decoders_get_the_head_that_their_class_loads(family: str, sizes: Any, tmp_path: Path) -> None:
    shape = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        config = getattr(transformers, f"{family}Config")(**shape, max_position_embeddings=64, **sizes)
        getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(tmp_path / name)
    mergekit_ray.merge(halves(tmp_path / "a", tmp_path / "b"), tmp_path / "out")
    model, b = loaded(tmp_path / "out", f"{family}ForCausalLM"), tensors_of(tmp_path / "b")
    embeddings = [name for name in b if name.endswith(("embed_tokens.weight", "embed_in.weight"))]
    assert torch.equal(model.get_output_embeddings().weight, b[embeddings[0]])
