"""Models of several classes in one merge: the output is one of the donor's class, whole, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import mergekit_ray
from mergekit_ray.core.errors import ModelError, PlanError
from support.models import config_of, tensors_of

WIDTHS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
SMALL = {**WIDTHS, "vocab_size": 96, "max_position_embeddings": 64, "pad_token_id": 0}
DISTIL = {"vocab_size": 96, "dim": 32, "hidden_dim": 48, "n_layers": 4, "n_heads": 4}
FAMILIES = {
    "Bert": ("ForMaskedLM", SMALL),
    "Roberta": ("ForMaskedLM", SMALL),
    "DistilBert": ("ForMaskedLM", DISTIL),
    "ModernBert": ("ForMaskedLM", SMALL),
    "Llama": ("ForCausalLM", SMALL),
}
"""Families with a language model's head, its class's ending, and sizes."""


def made(folder: Path, class_name: str, config_name: str, seed: int, **values: Any) -> Path:
    torch.manual_seed(seed)
    getattr(transformers, class_name)(getattr(transformers, config_name)(**values)).save_pretrained(folder)
    return folder


def pair(family: str, at: Path, **changes: Any) -> dict[str, Path]:
    """A language model and a classifier, by their classes."""
    ending, sizes = FAMILIES[family]
    names = (f"{family}{ending}", f"{family}ForSequenceClassification")
    return {n: made(at / n, n, f"{family}Config", i, **sizes, **changes) for i, n in enumerate(names)}


def slices(*cuts: tuple[Path, int, int], **more: Any) -> dict[str, Any]:
    parts = [{"sources": [{"model": str(model), "layer_range": [first, last]}]} for model, first, last in cuts]
    return {"merge_method": "passthrough", "slices": parts, **more}


def linear(*models: Path, **more: Any) -> dict[str, Any]:
    parts = [{"model": str(model), "parameters": {"weight": 0.5}} for model in models]
    return {"merge_method": "linear", "models": parts, **more}


def loads_whole(folder: Path, class_name: str) -> Any:
    model, report = getattr(transformers, class_name).from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_language_models_and_classifiers(family: str, tied: bool, tmp_path: Path) -> None:
    models = pair(family, tmp_path, tie_word_embeddings=tied)
    for donor, other in (list(models), list(reversed(models))):
        halves = slices((models[donor], 0, 2), (models[other], 2, 4))
        for name, recipe in (("slices", halves), ("mean", linear(models[donor], models[other]))):
            plan = mergekit_ray.merge(recipe, out := tmp_path / f"{name} {donor}").plan
            loads_whole(out, donor)
            theirs, others, merged = (tensors_of(folder) for folder in (models[donor], models[other], out))
            only = theirs.keys() - others.keys()
            assert merged.keys() == theirs.keys()
            assert all(torch.equal(merged[key], theirs[key]) for key in only)
            assert any("copied from" in warning for warning in plan.warnings) is bool(only)
            assert any("left out" in warning for warning in plan.warnings) is bool(others.keys() - theirs.keys())


def test_the_base_model_decides_though_its_layers_come_last(tmp_path: Path) -> None:
    language, classifier = pair("Roberta", tmp_path).values()
    recipe = slices((classifier, 0, 2), (language, 2, 4), base_model=str(language))
    mergekit_ray.merge(recipe, tmp_path / "out")
    loads_whole(tmp_path / "out", "RobertaForMaskedLM")


def test_a_donor_that_is_not_merged_gives_its_head(tmp_path: Path) -> None:
    language, classifier = pair("Llama", tmp_path).values()
    mergekit_ray.merge(linear(classifier, classifier, base_model=str(language)), tmp_path / "out")
    loads_whole(tmp_path / "out", "LlamaForCausalLM")
    assert torch.equal(tensors_of(tmp_path / "out")["lm_head.weight"], tensors_of(language)["lm_head.weight"])


def test_an_untied_donor_that_is_not_merged_unties_nothing(tmp_path: Path) -> None:
    name, config = "LlamaForCausalLM", "LlamaConfig"
    a, b = (made(tmp_path / str(n), name, config, n, **SMALL, tie_word_embeddings=True) for n in range(2))
    donor = made(tmp_path / "donor", name, config, 2, **SMALL, tie_word_embeddings=False)
    mergekit_ray.merge(linear(a, b, base_model=str(donor)), tmp_path / "out")
    model = loads_whole(tmp_path / "out", name)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tensors_of(tmp_path / "out").keys() == tensors_of(a).keys()


@pytest.mark.parametrize("layers", [2, 6])
def test_a_donor_of_another_depth_is_refused(layers: int, tmp_path: Path) -> None:
    name, config = "LlamaForCausalLM", "LlamaConfig"
    a, b = (made(tmp_path / str(n), name, config, n, **SMALL) for n in range(2))
    donor = made(tmp_path / "donor", name, config, 2, **{**SMALL, "num_hidden_layers": layers})
    with pytest.raises(ModelError, match=rf"different numbers of layers \(.*: 4, .*donor: {layers}\)"):
        mergekit_ray.merge(linear(a, b, base_model=str(donor)), tmp_path / "out")


def test_missing_error_names_what_either_lacks_and_the_remedy(tmp_path: Path) -> None:
    language, classifier = pair("Roberta", tmp_path).values()
    with pytest.raises(ModelError) as caught:
        mergekit_ray.merge(slices((language, 0, 2), (classifier, 2, 4), missing="error"), tmp_path / "out")
    assert f"classifier.* (4 tensors): in {classifier}, not in {language}" in caught.value.what
    assert f"lm_head.* (5 tensors): in {language}, not in {classifier}" in caught.value.what
    assert "`base` copies" in str(caught.value.remedy)


def test_patterns_speak_of_the_outputs_tensors(tmp_path: Path) -> None:
    language, classifier = pair("Roberta", tmp_path).values()
    cuts = ((language, 0, 2), (classifier, 2, 4))
    with pytest.raises(PlanError, match="no tensor of the output matches 'classifier"):
        mergekit_ray.merge(slices(*cuts, exclude=["classifier*"]), tmp_path / "out")
    mergekit_ray.merge(slices(*cuts, exclude=["lm_head*"]), tmp_path / "out")
    loads_whole(tmp_path / "out", "RobertaForMaskedLM")


def test_heads_of_other_sizes_than_the_config_says_are_refused(tmp_path: Path) -> None:
    name, config = "BertForSequenceClassification", "BertConfig"
    two, three = (made(tmp_path / str(n), name, config, n, **SMALL, num_labels=n) for n in (2, 3))
    with pytest.raises(ModelError, match=r"classifier\.weight: different shapes \(.*\[2, 32\].*\[3, 32\]\)"):
        mergekit_ray.merge(slices((three, 0, 2), (two, 2, 4)), tmp_path / "out")


@pytest.mark.parametrize("donor", [2, 3])
def test_a_head_from_another_model_fits_the_config_or_is_refused(donor: int, tmp_path: Path) -> None:
    name, config = "BertForSequenceClassification", "BertConfig"
    models = {n: made(tmp_path / str(n), name, config, n, **SMALL, num_labels=n) for n in (2, 3)}
    other = models[5 - donor]
    for source in models.values():
        recipe = linear(models[donor], other, exclude=["classifier.*"]) | {"from": str(source)}
        if source == other:
            with pytest.raises(ModelError, match=rf"classifier\.weight: different shapes \(.*\[{donor}, 32\]\)"):
                mergekit_ray.merge(recipe, tmp_path / "out")
        else:
            mergekit_ray.merge(recipe, tmp_path / "out")
            assert loads_whole(tmp_path / "out", name).config.num_labels == donor
    assert tensors_of(tmp_path / "out")["classifier.weight"].shape == (donor, 32)


def test_a_head_from_another_model_of_the_same_size_is_copied(tmp_path: Path) -> None:
    name, config = "BertForSequenceClassification", "BertConfig"
    a, b = (made(tmp_path / str(n), name, config, n, **SMALL, num_labels=3) for n in range(2))
    mergekit_ray.merge(linear(a, b, exclude=["classifier.*"]) | {"from": str(b)}, tmp_path / "out")
    assert torch.equal(tensors_of(tmp_path / "out")["classifier.weight"], tensors_of(b)["classifier.weight"])


@pytest.mark.parametrize("donor", ["text", "multimodal"])
@pytest.mark.parametrize("is_last", [False, True])
def test_text_and_multimodal_models(donor: str, is_last: bool, tmp_path: Path) -> None:
    text = {**SMALL, "num_key_value_heads": 2, "head_dim": 8}
    vision = {**WIDTHS, "num_hidden_layers": 2, "image_size": 28, "patch_size": 14}
    models = {"text": made(tmp_path / "text", "Gemma3ForCausalLM", "Gemma3TextConfig", 0, **text)}
    sizes = {"text_config": text, "vision_config": vision, "mm_tokens_per_image": 4}
    name = "Gemma3ForConditionalGeneration"
    models["multimodal"] = made(tmp_path / "multimodal", name, "Gemma3Config", 1, **sizes)
    other = next(kind for kind in models if kind != donor)
    order = (other, donor) if is_last else (donor, other)
    cuts = ((models[order[0]], 0, 3), (models[order[1]], 1, 4))
    mergekit_ray.merge(slices(*cuts, base_model=str(models[donor])), tmp_path / "out")
    loads_whole(tmp_path / "out", "Gemma3ForCausalLM" if donor == "text" else name)
    config = config_of(tmp_path / "out")
    assert config.get("text_config", config)["num_hidden_layers"] == 6
    towers = {key: tensor for key, tensor in tensors_of(models[donor]).items() if "vision" in key or "multi" in key}
    merged = tensors_of(tmp_path / "out")
    assert bool(towers) is (donor == "multimodal")
    assert all(torch.equal(merged[key], tensor) for key, tensor in towers.items())
