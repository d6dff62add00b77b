"""Plans of merges of tensors that no config describes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import mergekit_ray
from mergekit_ray.checkpoint.header import parse_header
from mergekit_ray.core.errors import ConfigError, ModelError, PlanError
from mergekit_ray.core.expressions import loads
from mergekit_ray.core.plan import Plan
from mergekit_ray.operations.plan import plan
from support.memory_inputs import random_llama, write_model

COMMON = {"conv.weight": (3, 2), "blocks.0.w": (4,), "blocks.1.w": (4,), "attn.bias": (5,)}


def tensors(seed: int, *more: str, **shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    wanted = {**COMMON, **dict.fromkeys(more, (2,)), **{k.replace("__", "."): v for k, v in shapes.items()}}
    return {name: torch.randn(shape, generator=generator) for name, shape in wanted.items()}


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., str]:
    def saved(path: str, content: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> str:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(content), tmp_path / path, metadata)
        return str(tmp_path / path)

    return saved


@pytest.fixture
def files(save: Callable[..., str]) -> dict[str, str]:
    """Two files with a tensor more each, one that both have, and one with all of it."""
    return {
        "a": save("a.safetensors", tensors(0, "only_a", "both")),
        "b": save("b.safetensors", tensors(1, "only_b", "both")),
        "c": save("c.safetensors", tensors(2)),
    }


def linear(*models: str, **rest: Any) -> dict[str, Any]:
    return {"merge_method": "linear", "models": [{"model": m} for m in models], "parameters": {"weight": 1}, **rest}


def arithmetic(base: str, *models: str, **rest: Any) -> dict[str, Any]:
    return {**linear(*models, **rest), "merge_method": "task_arithmetic", "base_model": base}


def made(planned: Plan) -> dict[str, int]:
    """The output's tensors, each with the number of those that it is made of."""
    return {t.spec.name: len(set(loads(t.expression))) for shard in planned.shards for t in shard.tensors}


class TestTensors:
    def test_all_is_the_default_and_names_what_is_not_in_all(self, files: dict[str, str]) -> None:
        for recipe in (linear(*files.values()), linear(*files.values(), tensors="all")):
            with pytest.raises(ModelError) as caught:
                plan(recipe)
            assert f"only_a: in {files['a']}, not in {files['b']}, {files['c']}" in caught.value.what
            assert f"both: in {files['a']}, {files['b']}, not in {files['c']}" in caught.value.what
            assert caught.value.remedy is not None
            assert "`tensors: intersection`" in caught.value.remedy

    def test_intersection(self, files: dict[str, str]) -> None:
        planned = plan(linear(*files.values(), tensors="intersection"))
        assert made(planned) == dict.fromkeys(COMMON, 3)
        assert planned.dropped == {
            f"{files['a']}: only_a": "left out",
            f"{files['a']}: both": "left out",
            f"{files['b']}: both": "left out",
            f"{files['b']}: only_b": "left out",
        }
        assert f"only_b is in {files['b']}, not in {files['a']}, {files['c']}: left out" in planned.warnings

    def test_union(self, files: dict[str, str]) -> None:
        planned = plan(linear(*files.values(), tensors="union"))
        assert made(planned) == {**dict.fromkeys(COMMON, 3), "only_a": 1, "both": 2, "only_b": 1}

    def test_a_base_beside_the_models_adds_none(self, files: dict[str, str], save: Callable[..., str]) -> None:
        base = save("base.safetensors", tensors(3, "both", "only_base"))
        for missing in ("union", "intersection"):
            planned = plan(arithmetic(base, files["c"], tensors=missing))
            assert made(planned) == dict.fromkeys(COMMON, 2)
            assert planned.dropped[f"{base}: only_base"] == "left out, as no model that is merged has it"

    def test_a_base_among_the_models_adds_its_own(self, files: dict[str, str], save: Callable[..., str]) -> None:
        base = save("base.safetensors", tensors(3, "only_base"))
        planned = plan(arithmetic(base, base, files["c"], tensors="union"))
        assert made(planned) == {**dict.fromkeys(COMMON, 2), "only_base": 1}

    def test_there_is_no_task_vector_of_what_the_base_lacks(self, files: dict[str, str]) -> None:
        with pytest.raises(ModelError, match=r"only_a: in .*: task_arithmetic needs that of the base"):
            plan(arithmetic(files["c"], files["a"], tensors="union"))

    def test_a_method_for_two_does_not_merge_one(self, files: dict[str, str]) -> None:
        recipe = {**linear(files["a"], files["c"], tensors="union"), "merge_method": "nuslerp"}
        with pytest.raises(ModelError, match="too few for nuslerp"):
            plan(recipe)

    @pytest.mark.parametrize(("missing", "expected"), [("base", {"both", "only_a"}), ("first", {"both", "only_a"})])
    def test_copies_as_other_models_do(self, files: dict[str, str], missing: str, expected: set[str]) -> None:
        planned = plan(linear(files["a"], files["b"], files["c"], missing=missing))
        assert made(planned).keys() >= COMMON.keys() | expected
        assert ("only_b" in made(planned)) == (missing == "first")

    def test_beside_missing_is_one_word_too_many(self, files: dict[str, str]) -> None:
        with pytest.raises(ConfigError, match="both decide on what only some models have"):
            plan(linear(*files.values(), missing="drop", tensors="union"))

    def test_is_for_models_with_a_config_too(self, tmp_path: Path) -> None:
        config = {"model_type": "llama", "num_hidden_layers": 2, "tie_word_embeddings": False, "vocab_size": 20}
        more = {"model.extra.weight": torch.ones(3)}
        models = [
            str(write_model(tmp_path / "0", random_llama(0), config)),
            str(write_model(tmp_path / "1", {**random_llama(1), **more}, config)),
        ]
        with pytest.raises(ModelError, match=r"model\.extra\.weight"):
            plan(linear(*models))
        assert made(plan(linear(*models, tensors="union")))["model.extra.weight"] == 1
        assert "model.extra.weight" not in made(plan(linear(*models, tensors="intersection")))


class TestNames:
    def test_say_nothing_of_buffers_and_vocabularies(self, save: Callable[..., str]) -> None:
        """A model with a config keeps ``attn.bias``, a causal mask, and the common rows of its embedding."""
        models = [save(f"{i}.safetensors", tensors(i, model__embed_tokens__weight=(8 + i, 2))) for i in range(2)]
        with pytest.raises(ModelError, match=r"model\.embed_tokens\.weight: different shapes"):
            plan(linear(*models))
        assert made(plan(linear(*models, exclude="*embed*")))["attn.bias"] == 2

    def test_say_nothing_of_layers(self, files: dict[str, str]) -> None:
        recipe = linear(files["c"], files["c"], parameters={"weight": [0, 1]})
        with pytest.raises(PlanError, match="nothing says which layers") as caught:
            plan(recipe)
        assert caught.value.remedy is not None
        assert "weight: [{filter" in caught.value.remedy

    def test_are_what_filters_look_at(self, files: dict[str, str]) -> None:
        recipe = linear(files["c"], files["c"])
        recipe["models"][0]["parameters"] = {"weight": [{"filter": "blocks.0", "value": 0.25}, {"value": 3}]}
        merges = {t.spec.name: t.expression for shard in plan(recipe).shards for t in shard.tensors}
        weights = {name: merge.input_parameters[0]["weight"] for name, merge in merges.items()}  # type: ignore[attr-defined] # each is a Merge
        assert weights == {**dict.fromkeys(COMMON, 3.0), "blocks.0.w": 0.25}

    def test_may_be_excluded(self, files: dict[str, str]) -> None:
        planned = plan(linear(*files.values(), exclude=["blocks.*", "only_b"], tensors="union"))
        expected = {**dict.fromkeys(COMMON, 3), "only_a": 1, "both": 2, "only_b": 1, "blocks.0.w": 1, "blocks.1.w": 1}
        assert made(planned) == expected


class TestRefused:
    def test_a_model_with_a_config_beside_one_without(self, files: dict[str, str], tmp_path: Path) -> None:
        config = {"model_type": "llama", "num_hidden_layers": 2}
        folder = str(write_model(tmp_path / "llama", random_llama(0), config))
        with pytest.raises(ModelError) as caught:
            plan(linear(folder, files["a"]))
        assert caught.value.what.startswith(f"{files['a']} has no config.json, and {folder} has one")

    @pytest.mark.parametrize(
        "more",
        [
            {"slices": [{"sources": [{"model": "c", "layer_range": [0, 1]}]}], "models": None},
            {"modules": {"unet": {"models": [{"model": "c"}]}}, "models": None},
            {"tokenizer_source": "union"},
            {"tokenizer": {"source": "base"}},
            {"chat_template": "auto"},
        ],
        ids=lambda more: next(iter(more)),
    )
    def test_what_needs_a_config(self, files: dict[str, str], more: dict[str, Any]) -> None:
        text = str({k: v for k, v in linear(files["c"], **more).items() if v is not None})
        recipe = mergekit_ray.load_recipe(text.replace("'c'", repr(files["c"])))
        with pytest.raises(PlanError, match=f"`{next(iter(more))}` needs models with a config"):
            plan(recipe)

    def test_a_mixture(self, files: dict[str, str]) -> None:
        experts = [{"source_model": files["a"]}, {"source_model": files["b"]}]
        with pytest.raises(PlanError, match="a Mixture of Experts is built of models with a config"):
            plan({"base_model": files["c"], "gate_mode": "random", "experts": experts})

    def test_an_adapter_on_a_file(self, files: dict[str, str], save: Callable[..., str], tmp_path: Path) -> None:
        factors = {f"base_model.model.conv.lora_{part}.weight": torch.ones(2, 2) for part in "AB"}
        save("adapter/adapter_model.safetensors", factors)
        settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["conv"]}
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
        with pytest.raises(ModelError, match=r"an adapter is applied to a model with a config\.json"):
            plan(linear(f"{files['a']}+{tmp_path}/adapter"))

    def test_the_folder_of_an_adapter_but_not_its_file(self, save: Callable[..., str], tmp_path: Path) -> None:
        file = save("adapter/adapter_model.safetensors", {"conv.lora_A.weight": torch.ones(2, 2)})
        (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
        with pytest.raises(ModelError, match="this is a LoRA adapter, not a model") as caught:
            plan(linear(str(tmp_path / "adapter")))
        assert caught.value.remedy is not None
        assert caught.value.remedy.endswith("name their safetensors files")
        [shard] = plan(linear(file, file)).shards
        assert shard.file == "adapter_model.safetensors"

    def test_a_base_that_the_method_has_no_use_for(self, files: dict[str, str]) -> None:
        with pytest.raises(PlanError, match="linear has no base model"):
            plan(linear(files["a"], files["a"], base_model=files["c"]))

    def test_shapes_that_differ_are_listed(self, files: dict[str, str], save: Callable[..., str]) -> None:
        other = save("other.safetensors", tensors(5, conv__weight=(3, 9), blocks__1__w=(1,)))
        with pytest.raises(ModelError) as caught:
            plan(linear(files["c"], other))
        assert f"conv.weight: different shapes ({files['c']}: [3, 2], {other}: [3, 9])" in caught.value.what
        assert f"blocks.1.w: different shapes ({files['c']}: [4], {other}: [1])" in caught.value.what

    def test_folders_that_lack_their_config_are_named(self, save: Callable[..., str], tmp_path: Path) -> None:
        save("x/model.safetensors", tensors(0))
        planned = plan(linear(str(tmp_path / "x"), str(tmp_path / "x")))
        assert f"{tmp_path / 'x'} has no config.json: its tensors are merged by their names alone" in planned.warnings

    def test_a_misspelt_config_is_an_error(self, save: Callable[..., str], tmp_path: Path) -> None:
        save("x/model.safetensors", tensors(0))
        (tmp_path / "x" / "Config.json").write_text("{}")
        with pytest.raises(ModelError, match=r"there is no config\.json; did you mean"):
            plan(linear(str(tmp_path / "x")))


class TestOutput:
    def test_of_files_is_one_file_whatever_its_size(self, files: dict[str, str], save: Callable[..., str]) -> None:
        big = save("big.safetensors", {"x": torch.zeros(3000), "y": torch.zeros(3000)})
        [shard] = plan(linear(big, big)).shards
        assert shard.file == "big.safetensors"
        shards = plan(linear(big, big, output={"max_shard_size": 13_000})).shards
        assert [shard.file for shard in shards] == ["big-00001-of-00002.safetensors", "big-00002-of-00002.safetensors"]
        [shard] = plan(linear(files["c"], big, missing="first")).shards
        assert shard.file == "model.safetensors"

    def test_is_called_like_the_inputs(self, save: Callable[..., str]) -> None:
        planned = plan(linear(*(save(f"{i}/unet.safetensors", tensors(i)) for i in range(2))))
        assert [shard.file for shard in planned.shards] == ["unet.safetensors"]
        assert planned.index_file == "unet.safetensors.index.json"
        assert planned.config == {}

    def test_of_folders_is_numbered(self, save: Callable[..., str], tmp_path: Path) -> None:
        for i in range(2):
            save(f"{i}/unet.safetensors", tensors(i))
        [shard] = plan(linear(*(str(tmp_path / str(i)) for i in range(2)))).shards
        assert shard.file == "model-00001-of-00001.safetensors"

    def test_has_the_metadata_of_the_donor_but_for_digests_of_its_tensors(self, save: Callable[..., str]) -> None:
        first = {"ss_base_model_version": "sdxl", "sshs_model_hash": "01", "ss_tag": "é"}
        a = save("a.safetensors", tensors(0), first)
        b = save("b.safetensors", tensors(1), {"ss_network_dim": "8", "format": "np"})
        expected = {"format": "pt", "ss_base_model_version": "sdxl", "ss_tag": "é"}
        for recipe, metadata in (
            (linear(a, b), expected),
            (linear(b, a), {"ss_network_dim": "8", "format": "np"}),
            (arithmetic(a, b), expected),
        ):
            [shard] = plan(recipe).shards
            assert parse_header(shard.header, shard.num_bytes, shard.file).metadata == metadata

    def test_digest_depends_on_the_metadata(self, save: Callable[..., str]) -> None:
        digests = set()
        for text in ("x", "y", "x"):
            a = save("a.safetensors", tensors(0), {"ss_comment": text})
            digests.add(plan(linear(a, a)).shards[0].header)
        assert len(digests) == 2

    def test_of_stages_is_one_file_too(self, files: dict[str, str]) -> None:
        stages = [{**linear(files["c"], files["a"], tensors="intersection"), "name": "x"}, linear("x", files["c"])]
        planned = plan({"stages": stages})
        assert [shard.file for shard in planned.shards] == ["model.safetensors"]
        assert made(planned) == dict.fromkeys(COMMON, 2)  # one of them twice
