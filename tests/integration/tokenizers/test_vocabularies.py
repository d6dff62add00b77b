"""Models with different numbers of tokens: what is merged, whose rows follow, and that transformers loads it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import mergekit_ray
from mergekit_ray.operations.verify import verify
from mergekit_ray.storage.opening import open_source
from support.models import ModelLibrary, config_of, load, logits, tensors_of

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WEIGHTED = {"weight": 1.0, "density": 0.5}
RECIPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": ({"weight": 1.0}, {}),
    "ties": (WEIGHTED, {"base_model": "large"}),
    "dare_linear": (WEIGHTED, {"base_model": "large"}),
    "iso_c": ({}, {"base_model": "large"}),
    "arcee_fusion": ({}, {"base_model": "large"}),
    "slerp": ({}, {"base_model": "large", "parameters": {"t": 0.3}}),
}
"""Parameters of each model, and what else the recipe says: methods of every kind of access."""


def recipe(method: str, folders: dict[str, Path]) -> dict[str, Any]:
    own, rest = RECIPES[method]
    listed = [{"model": str(folder), "parameters": own} for folder in folders.values()]
    made = {"merge_method": method, "models": listed, **rest}
    return {**made, "base_model": str(folders["large"])} if "base_model" in rest else made


def with_last_token(source: Path, folder: Path, token: int) -> Path:
    """A copy of a model that ends its texts with a token."""
    shutil.copytree(source, folder)
    for name in ("config.json", "generation_config.json"):
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**config, "eos_token_id": token}))
    return folder


@pytest.mark.parametrize("method", RECIPES)
def test_tokens_that_the_donor_needs_keep_its_rows(method: str, models: ModelLibrary, tmp_path: Path) -> None:
    large = with_last_token(models.get("llama", 1, vocab_size=128), tmp_path / "large", 125)
    cut = with_last_token(models.get("llama", 1, vocab_size=128), tmp_path / "cut", 2)
    small = models.get("llama", 2, vocab_size=120)
    mergekit_ray.merge(recipe(method, {"large": large, "small": small}), tmp_path / "out")
    mergekit_ray.merge(recipe(method, {"large": cut, "small": small}), tmp_path / "common", seed=0)
    ours, common, own = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "common"), tensors_of(large)
    for name in (EMBEDDING, HEAD):
        assert ours[name].shape == own[name].shape
        assert torch.equal(ours[name][120:], own[name][120:])
        assert common[name].shape[0] == 120
        if method != "dare_linear":  # whose random numbers depend on the models' paths
            assert torch.equal(ours[name][:120], common[name])
    assert (config_of(tmp_path / "out")["vocab_size"], config_of(tmp_path / "common")["vocab_size"]) == (128, 120)
    assert load(tmp_path / "out").get_input_embeddings().num_embeddings == 128
    assert verify(open_source(str(tmp_path / "out"))).problems == []


@pytest.mark.parametrize(("first", "last"), [(128, 120), (120, 128)])
@pytest.mark.parametrize("tied", [True, False])
def test_slices_of_models_with_different_vocabularies(
    first: int, last: int, tied: bool, models: ModelLibrary, tmp_path: Path
) -> None:
    cuts = [(models.get("llama", 1, vocab_size=first, tied=tied), [0, 3])]
    cuts += [(models.get("llama", 2, vocab_size=last, tied=tied), [1, 4])]
    slices = [{"sources": [{"model": str(model), "layer_range": layers}]} for model, layers in cuts]
    mergekit_ray.merge({"merge_method": "passthrough", "slices": slices}, tmp_path / "out")
    ours, a, b = tensors_of(tmp_path / "out"), tensors_of(cuts[0][0]), tensors_of(cuts[1][0])
    assert torch.equal(ours[EMBEDDING], a[EMBEDDING][:120])
    assert torch.equal(ours[HEAD], b[EMBEDDING if tied else HEAD][:120])
    assert config_of(tmp_path / "out")["vocab_size"] == 120
    assert torch.isfinite(logits(load(tmp_path / "out"))).all()


def test_a_head_of_fewer_rows_gets_those_of_the_donors(models: ModelLibrary, tmp_path: Path) -> None:
    large = with_last_token(models.get("llama", 1, vocab_size=128), tmp_path / "large", 125)
    cuts = [(large, [0, 3]), (models.get("llama", 2, vocab_size=120), [1, 4])]
    slices = [{"sources": [{"model": str(model), "layer_range": layers}]} for model, layers in cuts]
    mergekit_ray.merge({"merge_method": "passthrough", "slices": slices}, tmp_path / "out")
    ours, a, b = tensors_of(tmp_path / "out"), tensors_of(large), tensors_of(cuts[1][0])
    assert torch.equal(ours[EMBEDDING], a[EMBEDDING])
    assert torch.equal(ours[HEAD], torch.cat([b[HEAD], a[HEAD][120:]]))
    assert load(tmp_path / "out").lm_head.out_features == 128


@pytest.mark.parametrize("rules", [{}, {"exclude": ["final_logits_bias"]}])
def test_a_bias_in_one_row_is_cut_with_the_embedding(rules: dict[str, Any], tmp_path: Path) -> None:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "pad_token_id": 1, "eos_token_id": 2}
    made = {}
    for name, rows in (("a", 48), ("b", 40)):
        config = transformers.MarianConfig(**sizes, **heads, vocab_size=rows, decoder_start_token_id=1)
        model = transformers.MarianMTModel(config)
        model.final_logits_bias.normal_()
        model.save_pretrained(tmp_path / name)
        made[name] = tensors_of(tmp_path / name)["final_logits_bias"]
    listed = [{"model": str(tmp_path / name), "parameters": {"weight": 0.5}} for name in made]
    mergekit_ray.merge({"merge_method": "linear", "models": listed, **rules}, tmp_path / "out")
    loaded, report = transformers.MarianMTModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    cut = made["a"][:, :40]
    torch.testing.assert_close(loaded.final_logits_bias, cut if rules else (cut + made["b"]) / 2)
