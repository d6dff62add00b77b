"""Merges of every family, loaded by transformers: every weight found, no other, the right numbers in each."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mergekit_ray
from mergekit_ray.core.errors import ModelError
from mergekit_ray.operations.options import MergeOptions
from mergekit_ray.operations.run_plan import MergeResult
from support.models import (
    FAMILIES,
    ModelLibrary,
    config_of,
    load,
    logits,
    metadata_of,
    rewrite,
    tensors_of,
)
from support.references import merge as reference

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


def average(*models: Path, **more: Any) -> dict[str, Any]:
    """A recipe: the mean of models."""
    listed = [{"model": str(model), "parameters": {"weight": 1.0}} for model in models]
    return {"merge_method": "linear", "models": listed, **more}


def merge_and_load(recipe: dict[str, Any], out: Path) -> tuple[MergeResult, Any]:
    """Merge, and see that what transformers loads has as many parameters as the plan and the files say."""
    result = mergekit_ray.merge(recipe, out)
    model = load(out)
    stored = sum(tensor.numel() for tensor in tensors_of(out).values())
    assert result.plan.num_parameters == model.num_parameters() == stored
    assert all(metadata == {"format": "pt"} for metadata in metadata_of(out))
    return result, model


def as_float64(tensor: torch.Tensor) -> Any:
    return tensor.to(torch.float64).numpy()


@pytest.mark.parametrize("family", FAMILIES)
class TestEveryFamily:
    def test_mean_of_a_model_with_itself_is_the_model(self, family: str, models: ModelLibrary, tmp_path: Path) -> None:
        source = models.get(family, max_shard_size="60KB")
        _, model = merge_and_load(average(source, source), tmp_path / "out")
        torch.testing.assert_close(logits(model), logits(load(source)), rtol=0, atol=0)
        assert config_of(tmp_path / "out") == config_of(source)

    def test_linear(self, family: str, models: ModelLibrary, tmp_path: Path) -> None:
        a, b = models.get(family, 1), models.get(family, 2)
        recipe = average(a, b)
        recipe["models"][1]["parameters"]["weight"] = 3.0
        merge_and_load(recipe, tmp_path / "out")
        ours, first, second = tensors_of(tmp_path / "out"), tensors_of(a), tensors_of(b)
        assert ours.keys() == first.keys()
        for name, tensor in ours.items():
            xs = [as_float64(first[name]), as_float64(second[name])]
            reference.linear(xs, [1.0, 3.0], normalize=True).check(tensor, roundings=3)

    def test_slerp(self, family: str, models: ModelLibrary, tmp_path: Path) -> None:
        base, other = models.get(family), models.get(family, 1)
        recipe = {
            "merge_method": "slerp",
            "base_model": str(base),
            "models": [{"model": str(base)}, {"model": str(other)}],
            "parameters": {"t": 0.25},
        }
        merge_and_load(recipe, tmp_path / "out")
        ours, first, second = tensors_of(tmp_path / "out"), tensors_of(base), tensors_of(other)
        for name, tensor in ours.items():
            expected = reference.slerp(as_float64(first[name]), as_float64(second[name]), 0.25)
            # Near the colinear limit the sines are small, and so a rounding of the angle counts for more.
            expected.check(tensor, roundings=64)

    def test_ties(self, family: str, models: ModelLibrary, tmp_path: Path) -> None:
        base, tuned = models.get(family), [models.get(family, 1), models.get(family, 2)]
        recipe = {
            "merge_method": "ties",
            "base_model": str(base),
            "models": [{"model": str(m), "parameters": {"weight": 0.5, "density": 0.5}} for m in tuned],
        }
        merge_and_load(recipe, tmp_path / "out")
        ours, before = tensors_of(tmp_path / "out"), tensors_of(base)
        after = [tensors_of(model) for model in tuned]
        for name, tensor in ours.items():
            # In float32, as the task vectors are: what is kept hangs on which magnitudes are equal.
            deltas = [(model[name] - before[name]).to(torch.float64).numpy() for model in after]
            kept = [np.where(reference.keep_largest(np.abs(delta), 0.5), delta, 0.0) for delta in deltas]
            expected = reference.elected(as_float64(before[name]), kept, [0.5, 0.5], normalize=True, scale=1.0)
            expected.check(tensor, roundings=8)

    def test_repeated_layers(self, family: str, models: ModelLibrary, tmp_path: Path) -> None:
        source = models.get(family, num_layers=4)
        cuts = [(0, 3), (1, 4), (1, 2)]
        recipe = {
            "merge_method": "passthrough",
            "slices": [{"sources": [{"model": str(source), "layer_range": list(cut)}]} for cut in cuts],
        }
        _, model = merge_and_load(recipe, tmp_path / "out")
        order = [layer for first, last in cuts for layer in range(first, last)]
        before, after = config_of(source), config_of(tmp_path / "out")
        changed: dict[str, Any] = {"num_hidden_layers": len(order)}
        if before.get("layer_types") is not None:
            changed["layer_types"] = [before["layer_types"][layer] for layer in order]
        assert after == {**before, **changed}
        assert len(model.base_model.layers) == len(order)
        assert torch.isfinite(logits(model)).all()
        ours, theirs = tensors_of(tmp_path / "out"), tensors_of(source)
        stack = "gpt_neox.layers" if family == "gpt_neox" else "model.layers"
        outside = {name for name in theirs if not name.startswith(f"{stack}.")}
        assert {name for name in ours if not name.startswith(f"{stack}.")} == outside
        for name, tensor in ours.items():
            origin = name
            if name not in outside:
                layer, rest = name.removeprefix(f"{stack}.").split(".", maxsplit=1)
                origin = f"{stack}.{order[int(layer)]}.{rest}"
            torch.testing.assert_close(tensor, theirs[origin], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_layer_types_follow_the_layers_of_two_models(family: str, models: ModelLibrary, tmp_path: Path) -> None:
    a, b = models.get(family, 1, num_layers=4), models.get(family, 2, num_layers=4)
    cuts = [(a, [1, 4]), (b, [0, 3])]
    recipe = {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": str(model), "layer_range": cut}]} for model, cut in cuts],
    }
    _, model = merge_and_load(recipe, tmp_path / "out")
    types = config_of(a)["layer_types"]
    assert config_of(tmp_path / "out")["layer_types"] == [*types[1:4], *types[0:3]]
    assert torch.isfinite(logits(model)).all()
    # The head comes from the last model, the embedding from the first: they are no longer one.
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False
    ours = tensors_of(tmp_path / "out")
    assert torch.equal(ours[EMBEDDING], tensors_of(a)[EMBEDDING])
    assert torch.equal(ours[HEAD], tensors_of(b)[EMBEDDING])


class TestTiedWeights:
    @pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2"])
    @pytest.mark.parametrize("which", [(True, True), (True, False), (False, True), (False, False)])
    def test_output_is_tied_exactly_if_all_are(
        self, family: str, which: tuple[bool, bool], models: ModelLibrary, tmp_path: Path
    ) -> None:
        inputs = [models.get(family, number, tied=tied) for number, tied in enumerate(which)]
        result, model = merge_and_load(average(*inputs), tmp_path / "out")
        ours, theirs = tensors_of(tmp_path / "out"), [tensors_of(folder) for folder in inputs]
        is_tied = all(which)
        assert config_of(tmp_path / "out")["tie_word_embeddings"] is is_tied
        assert (HEAD in ours) is not is_tied
        assert (model.lm_head.weight is model.model.embed_tokens.weight) is is_tied
        heads = [tensors.get(HEAD, tensors[EMBEDDING]) for tensors in theirs]
        expected = (heads[0].double() + heads[1].double()) / 2
        torch.testing.assert_close(model.lm_head.weight.double(), expected, rtol=1e-6, atol=1e-7)
        assert result.plan.dropped == {}

    def test_stored_copy_of_the_embedding_is_left_out_and_named(self, models: ModelLibrary, tmp_path: Path) -> None:
        redundant = tmp_path / "redundant"
        shutil.copytree(models.get("llama", 1, tied=True), redundant)
        # Not even equal: what a tied model's file says of its head has no effect.
        rewrite(redundant, {HEAD: torch.ones_like(tensors_of(redundant)[EMBEDDING])})
        result, _ = merge_and_load(average(redundant, models.get("llama", tied=True)), tmp_path / "out")
        assert HEAD not in tensors_of(tmp_path / "out")
        assert config_of(tmp_path / "out")["tie_word_embeddings"] is True
        assert result.plan.aliased == {HEAD: EMBEDDING}

    def test_stored_copy_of_the_embedding_does_not_reach_an_untied_output(
        self, models: ModelLibrary, tmp_path: Path
    ) -> None:
        redundant, untied = tmp_path / "redundant", models.get("llama", tied=False)
        shutil.copytree(models.get("llama", 1, tied=True), redundant)
        embedding = tensors_of(redundant)[EMBEDDING]
        rewrite(redundant, {HEAD: torch.ones_like(embedding)})
        result, model = merge_and_load(average(redundant, untied), tmp_path / "out")
        expected = (embedding.double() + tensors_of(untied)[HEAD].double()) / 2
        torch.testing.assert_close(model.lm_head.weight.double(), expected, rtol=1e-6, atol=1e-7)
        assert list(result.plan.dropped) == [f"{redundant}: {HEAD}"]


class TestBuffersOfGptNeoX:
    """Old checkpoints store causal masks and rotary frequencies, which newer code makes itself."""

    def with_buffers(self, source: Path, folder: Path) -> Path:
        shutil.copytree(source, folder)
        mask = torch.ones(64, 64, dtype=torch.bool).tril().view(1, 1, 64, 64)
        buffers: dict[str, torch.Tensor | None] = {}
        for layer in range(config_of(source)["num_hidden_layers"]):
            prefix = f"gpt_neox.layers.{layer}.attention"
            buffers[f"{prefix}.bias"] = mask.clone()
            buffers[f"{prefix}.masked_bias"] = torch.tensor(-1e9)
            buffers[f"{prefix}.rotary_emb.inv_freq"] = torch.tensor([1.0])
        rewrite(folder, buffers)
        return folder

    def test_in_one_input_they_are_dropped_and_named(self, models: ModelLibrary, tmp_path: Path) -> None:
        plain = models.get("gpt_neox")
        old = self.with_buffers(models.get("gpt_neox", 1), tmp_path / "old")
        for number, inputs in enumerate([(old, plain), (plain, old)]):
            result, _ = merge_and_load(average(*inputs), tmp_path / f"out{number}")
            assert tensors_of(tmp_path / f"out{number}").keys() == tensors_of(plain).keys()
            assert set(result.plan.dropped) == {
                f"{old}: gpt_neox.layers.{layer}.attention.{rest}"
                for layer in range(4)
                for rest in ("bias", "masked_bias", "rotary_emb.inv_freq")
            }

    def test_in_all_inputs_the_donors_are_copied(self, models: ModelLibrary, tmp_path: Path) -> None:
        inputs = [self.with_buffers(models.get("gpt_neox", number), tmp_path / f"old{number}") for number in range(2)]
        mergekit_ray.merge(average(*inputs), tmp_path / "out")
        ours, theirs = tensors_of(tmp_path / "out"), tensors_of(inputs[0])
        assert ours.keys() == theirs.keys()
        buffers = [name for name in ours if name.endswith((".attention.bias", "masked_bias", "inv_freq"))]
        assert len(buffers) == 12
        assert all(torch.equal(ours[name], theirs[name]) for name in buffers)
        assert load(tmp_path / "out").num_parameters() == load(models.get("gpt_neox")).num_parameters()


class TestVocabulary:
    def test_common_rows_of_different_vocabularies(self, models: ModelLibrary, tmp_path: Path) -> None:
        large, small = models.get("llama", 1, vocab_size=128), models.get("llama", 2, vocab_size=120)
        result, _ = merge_and_load(average(large, small), tmp_path / "out")
        assert config_of(tmp_path / "out")["vocab_size"] == 120
        ours, first, second = tensors_of(tmp_path / "out"), tensors_of(large), tensors_of(small)
        for name in (EMBEDDING, HEAD):
            assert any(name in warning and "120" in warning and "128" in warning for warning in result.plan.warnings)
            expected = (first[name][:120].double() + second[name].double()) / 2
            torch.testing.assert_close(ours[name].double(), expected, rtol=1e-6, atol=1e-7)

    def test_other_shapes_are_refused_with_tensor_models_and_shapes(self, models: ModelLibrary, tmp_path: Path) -> None:
        narrow, wide = models.get("llama"), models.get("llama", hidden_size=48)
        with pytest.raises(ModelError, match=f"hidden_size: 32 in {narrow}, 48 in {wide}"):
            mergekit_ray.merge(average(narrow, wide), tmp_path / "out")
        with pytest.raises(ModelError) as caught:
            mergekit_ray.merge(
                average(narrow, wide), tmp_path / "out", options=MergeOptions(allow_config_conflicts=True)
            )
        message = str(caught.value)
        for part in (EMBEDDING, str(narrow), str(wide), "[128, 32]", "[128, 48]"):
            assert part in message
        assert not (tmp_path / "out").exists()


class TestDType:
    @pytest.mark.parametrize(
        ("inputs", "asked", "expected"),
        [
            ((torch.bfloat16, torch.bfloat16), {}, torch.bfloat16),
            ((torch.bfloat16, torch.float32), {}, torch.float32),
            ((torch.bfloat16, torch.float16), {}, torch.float32),
            ((torch.float32, torch.float32), {"dtype": "bfloat16"}, torch.bfloat16),
            ((torch.bfloat16, torch.bfloat16), {"dtype": "float32", "out_dtype": "float16"}, torch.float16),
        ],
    )
    def test_config_says_what_is_stored(
        self,
        inputs: tuple[torch.dtype, torch.dtype],
        asked: dict[str, str],
        expected: torch.dtype,
        models: ModelLibrary,
        tmp_path: Path,
    ) -> None:
        folders = [models.get("llama", number, dtype=dtype) for number, dtype in enumerate(inputs)]
        _, model = merge_and_load(average(*folders, **asked), tmp_path / "out")
        assert model.dtype == expected
        config = config_of(tmp_path / "out")
        assert config.get("dtype", config.get("torch_dtype")) == str(expected).removeprefix("torch.")
        assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {expected}


class TestSideFiles:
    def test_tokenizer_and_generation_config_travel_and_strays_do_not(
        self, models: ModelLibrary, tmp_path: Path
    ) -> None:
        import transformers

        donor = tmp_path / "donor"
        shutil.copytree(models.get("llama", with_tokenizer=True), donor)
        strays = {"README.md": "stray", "pytorch_model.bin": "stray", "notes.txt": "stray", ".hidden.json": "{}"}
        kept = {"LICENSE": "licence", "chat_template.jinja": "{{ messages }}"}
        for name, text in {**strays, **kept}.items():
            (donor / name).write_text(text)
        mergekit_ray.merge(average(donor, models.get("llama", 1, max_shard_size="60KB")), tmp_path / "out")
        found = {file.name for file in (tmp_path / "out").iterdir()}
        copied = {"tokenizer.json", "tokenizer_config.json", "generation_config.json", *kept}
        made = {"config.json", "README.md", "mergekit-ray.json", "model.safetensors.index.json"}
        assert found == copied | made | {"model-00001-of-00001.safetensors"}
        for name in copied:
            assert (tmp_path / "out" / name).read_bytes() == (donor / name).read_bytes()
        card = (tmp_path / "out" / "README.md").read_text()
        assert card.startswith("---\n")
        assert "stray" not in card
        assert "merge_method: linear" in card
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
        assert tokenizer.decode(tokenizer("the capital of France")["input_ids"]) == "the capital of France"

    def test_the_base_model_is_the_donor(self, models: ModelLibrary, tmp_path: Path) -> None:
        base = models.get("llama", 3, with_tokenizer=True)
        recipe = {**average(models.get("llama"), models.get("llama", 1)), "base_model": str(base)}
        mergekit_ray.merge(recipe, tmp_path / "out")
        assert (tmp_path / "out" / "tokenizer.json").exists()
