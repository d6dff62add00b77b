"""Classes that tie more than the head to the embedding: transformers unties all of it, or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

import mergekit_ray
from mergekit_ray.core.errors import ModelError, PlanError
from support.models import config_of, tensors_of
from support.sweep.small_configs import small_config

CLASSES = {
    "bart": "BartForConditionalGeneration",
    "prophetnet": "ProphetNetForConditionalGeneration",
    "florence2": "Florence2ForConditionalGeneration",
    "bert": "BertForMaskedLM",
    "roberta": "RobertaForMaskedLM",
    "zamba2": "Zamba2ForCausalLM",
}


def made(family: str, folder: Path, seed: int, *, tied: bool = True) -> Path:
    config = small_config(family)
    for part in (config, getattr(config, "text_config", None)):
        if part is not None:
            part.tie_word_embeddings = tied
    torch.manual_seed(seed)
    class_of(family)(config).save_pretrained(folder)
    return folder


def class_of(family: str) -> Any:
    return getattr(transformers, CLASSES[family])


def loaded(family: str, folder: Path) -> dict[str, torch.Tensor]:
    """All that the class reads."""
    model, report = class_of(family).from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return dict(model.state_dict())


def linear(*models: Path) -> dict[str, Any]:
    return {
        "merge_method": "linear",
        "models": [{"model": str(model), "parameters": {"weight": 0.5}} for model in models],
    }


def cut(*parts: tuple[Path, int, int]) -> dict[str, Any]:
    slices = [{"sources": [{"model": str(model), "layer_range": [first, last]}]} for model, first, last in parts]
    return {"merge_method": "passthrough", "slices": slices}


@pytest.mark.parametrize("tied_first", [True, False])
@pytest.mark.parametrize("family", sorted(CLASSES.keys() - {"zamba2"}))
def test_a_tied_and_an_untied_model(family: str, tied_first: bool, tmp_path: Path) -> None:
    """What the tied one reads twice is merged with both of the other's."""
    models = [made(family, tmp_path / "a", 0, tied=tied_first), made(family, tmp_path / "b", 1, tied=not tied_first)]
    mergekit_ray.merge(linear(*models), tmp_path / "out")
    a, b, out = (loaded(family, folder) for folder in (*models, tmp_path / "out"))
    assert a.keys() == b.keys() == out.keys()
    for name, value in out.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (a[name] + b[name]) / 2)


@pytest.mark.parametrize("saved", ["lm_head", "shared"])
def test_an_adapter_that_unties(saved: str, tmp_path: Path) -> None:
    base = made("bart", tmp_path / "base", 0)
    model = class_of("bart").from_pretrained(base)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[saved]))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.add_(0.1)
    tuned.save_pretrained(tmp_path / "adapter")
    mergekit_ray.merge(
        {"merge_method": "passthrough", "models": [{"model": f"{base}+{tmp_path / 'adapter'}"}]}, tmp_path / "out"
    )
    fresh = PeftModel.from_pretrained(class_of("bart").from_pretrained(base), tmp_path / "adapter")
    expected = fresh.merge_and_unload().state_dict()
    out = loaded("bart", tmp_path / "out")
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False
    for name, value in expected.items():
        torch.testing.assert_close(out[name], value, msg=name)


class TestSharedLayers:
    @pytest.fixture(scope="class")
    @classmethod
    def zambas(cls, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
        folder = tmp_path_factory.mktemp("zambas")
        models = {name: made("zamba2", folder / name, seed) for seed, name in enumerate("ab")}
        return models | {"untied": made("zamba2", folder / "untied", 2, tied=False)}

    def test_merged_whole(self, zambas: dict[str, Path], tmp_path: Path) -> None:
        mergekit_ray.merge(linear(zambas["a"], zambas["b"]), tmp_path / "out")
        a, b, out = (tensors_of(folder) for folder in (zambas["a"], zambas["b"], tmp_path / "out"))
        assert out.keys() == a.keys()
        for name, value in out.items():
            torch.testing.assert_close(value, (a[name] + b[name]) / 2)
        loaded("zamba2", tmp_path / "out")

    @pytest.mark.parametrize(
        ("parts", "message"),
        [
            ([("a", 2, 5)], "num_mem_blocks"),
            ([("a", 0, 3), ("b", 3, 6)], "unties all or nothing"),
            ([("a", 0, 2), ("b", 2, 4), ("a", 4, 6)], "share weights, which slices of several models would mix"),
        ],
    )
    def test_slices(self, parts: list[tuple[str, int, int]], message: str, zambas: dict[str, Path]) -> None:
        with pytest.raises(PlanError, match=message):
            mergekit_ray.plan(cut(*((zambas[name], first, last) for name, first, last in parts)))

    def test_tied_and_untied(self, zambas: dict[str, Path]) -> None:
        with pytest.raises(PlanError, match="unties all or nothing") as caught:
            mergekit_ray.plan(linear(zambas["a"], zambas["untied"]))
        assert f"model {zambas['a']}" in str(caught.value)

    def test_an_adapter_that_unties(self, zambas: dict[str, Path], tmp_path: Path) -> None:
        model = class_of("zamba2").from_pretrained(zambas["a"])
        config = LoraConfig(r=2, target_modules=["in_proj"], modules_to_save=["lm_head"])
        get_peft_model(model, config).save_pretrained(tmp_path)
        models = [{"model": f"{zambas['a']}+{tmp_path}"}]
        with pytest.raises((PlanError, ModelError), match="unties all or nothing"):
            mergekit_ray.plan({"merge_method": "passthrough", "models": models})
