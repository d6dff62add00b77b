"""Adapters made, loaded and merged by PEFT itself, applied on the way into a merge."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import mergekit_ray
from mergekit_ray.core.errors import ModelError
from mergekit_ray.operations.options import MergeOptions
from mergekit_ray.operations.verify import verify
from mergekit_ray.storage.opening import open_source
from support.adapters import EMBEDDING, HEAD, fresh, llama, make_adapter, merged_by_peft, passthrough, quiet, save_bases
from support.models import config_of, contents, load, save_tokenizer, tensors_of
from support.references.merge import ulp
from support.servers.s3_server import S3Server


def check(actual: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """Within an ulp of what PEFT makes of it in float64."""
    exact = expected.to(torch.float64).numpy()
    off = np.abs(actual.to(torch.float64).numpy() - exact)
    assert (off <= ulp(exact, actual.dtype)).all(), (name, (off / ulp(exact, actual.dtype)).max())


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet():
        yield


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_bases(tmp_path_factory.mktemp("bases"))


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "all linear layers": ("llama", {"target_modules": "all-linear"}),
    "patterns and rsLoRA": (
        "llama",
        {
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 5, r"layers\.0\.mlp\.up_proj": 1, "^model.layers.1.mlp.down_proj": 4},
            "alpha_pattern": {"mlp.up_proj": 2, "q_proj": 16},
            "use_rslora": True,
        },
    ),
    "embedding and head": ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "whole modules": ("llama", {"target_modules": ["v_proj"], "modules_to_save": ["norm", "lm_head"]}),
    "DoRA": ("llama", {"target_modules": ["o_proj", "embed_tokens", "lm_head", "up_proj"], "use_dora": True}),
    "tied, embedding": ("tied", {"target_modules": ["q_proj", "embed_tokens"]}),
    "tied, head": ("tied", {"target_modules": ["q_proj", "lm_head"]}),
    "tied, both": ("tied", {"target_modules": ["embed_tokens", "lm_head"]}),
    "tied, whole embedding": ("tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "tied, whole head": ("tied", {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}),
    "tied and kept so": (
        "tied",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "single tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 39, 4, 0]}),
    "single tokens of the head": (
        "llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3], "lm_head": [1, 2]}},
    ),
    "tied, single tokens": ("tied", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 39]}),
    "Conv1D with its biases": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "bias": "all"}),
    "Conv1D with biases of factors": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "lora_bias": True}),
    "Conv1D and head": ("gpt2", {"target_modules": ["c_attn", "c_proj", "lm_head"]}),
    "Conv1D, DoRA, positions": ("gpt2", {"target_modules": ["c_attn", "c_proj", "wte", "wpe"], "use_dora": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_what_peft_merges(case: str, bases: dict[str, Path], tmp_path: Path) -> None:
    kind, settings = CASES[case]
    base, adapter = bases[kind], make_adapter(fresh(kind), tmp_path / "adapter", **settings)
    result = mergekit_ray.merge(passthrough(f"{base}+{adapter}"), tmp_path / "out")
    theirs = merged_by_peft(base, adapter)
    ours = load(tmp_path / "out")
    assert ours.config.tie_word_embeddings == theirs.config.tie_word_embeddings
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    before = fresh(kind).state_dict()
    assert any(not torch.equal(ours[name], before[name]) for name in ours)
    for name, tensor in ours.items():
        check(tensor, theirs[name], name)
    assert [model.reference for model in result.plan.inputs.values()] == [str(base), str(adapter)]
    assert result.plan.warnings == ()


def test_a_16_bit_base_gets_what_peft_gives_it(tmp_path: Path) -> None:
    base = tmp_path / "base"
    llama(dtype=torch.bfloat16).save_pretrained(base)
    adapter = make_adapter(load(base), tmp_path / "adapter", target_modules="all-linear", modules_to_save=["norm"])
    mergekit_ray.merge(passthrough(f"{base}+{adapter}"), tmp_path / "out")
    ours, in_16_bit = tensors_of(tmp_path / "out"), merged_by_peft(base, adapter, torch.bfloat16).state_dict()
    exact = merged_by_peft(base, adapter).state_dict()
    for name, tensor in ours.items():
        assert tensor.dtype is torch.bfloat16
        check(tensor, exact[name], name)
        check(tensor, in_16_bit[name], name)


def test_an_adapter_of_a_resized_vocabulary(bases: dict[str, Path], tmp_path: Path) -> None:
    model = llama()
    model.resize_token_embeddings(44)
    adapter = make_adapter(
        model, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
    )
    mergekit_ray.merge(passthrough(f"{bases['llama']}+{adapter}"), tmp_path / "out")
    ours, stored = tensors_of(tmp_path / "out"), load_file(adapter / "adapter_model.safetensors")
    assert config_of(tmp_path / "out")["vocab_size"] == 44
    assert torch.equal(ours[EMBEDDING], stored[f"base_model.model.{EMBEDDING}"])
    assert torch.equal(ours[HEAD], stored[f"base_model.model.{HEAD}"])
    assert load(tmp_path / "out").get_input_embeddings().weight.shape[0] == 44


RESIZED: dict[str, tuple[str, dict[str, Any]]] = {
    "whole modules": ("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "whole head": ("llama", {"modules_to_save": ["lm_head"]}),
    "tied, whole embedding": ("tied", {"modules_to_save": ["embed_tokens"]}),
    "tied and kept so": ("tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "single tokens": ("llama", {"trainable_token_indices": [41, 43, 2]}),
    "factors": ("tied", {"target_modules": ["embed_tokens", "q_proj"]}),
}


@pytest.mark.parametrize("case", RESIZED)
def test_what_peft_stores_of_a_resized_base(case: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """Where PEFT sees that the vocabulary was resized it stores embeddings once more, whole modules under two names."""
    kind, settings = RESIZED[case]
    base = load(bases[kind])
    base.resize_token_embeddings(44, mean_resizing=False)
    base.save_pretrained(tmp_path / "resized")
    model = load(tmp_path / "resized")
    model.name_or_path = str(bases[kind])
    adapter = make_adapter(model, tmp_path / "adapter", **{"target_modules": ["q_proj"], **settings})
    stored = load_file(adapter / "adapter_model.safetensors")
    assert any(name.endswith((".embed_tokens.weight", ".base_layer.weight")) for name in stored), stored
    mergekit_ray.merge(passthrough(f"{bases[kind]}+{adapter}"), tmp_path / "out")
    ours, theirs = load(tmp_path / "out").state_dict(), merged_by_peft(tmp_path / "resized", adapter).state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        check(tensor, theirs[name], name)


@pytest.mark.parametrize("rows", [40, 44])
def test_the_tokenizer_saved_with_an_adapter_travels(rows: int, bases: dict[str, Path], tmp_path: Path) -> None:
    base = shutil.copytree(bases["llama"], tmp_path / "base")
    save_tokenizer(base, 40)
    (base / "added_tokens.json").write_text("{}")
    model = llama()
    model.resize_token_embeddings(rows, mean_resizing=False)
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    adapter = make_adapter(model, tmp_path / "adapter", **settings)
    save_tokenizer(adapter, 42)
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    (adapter / "trainer_state.json").write_text("{}")
    plan = mergekit_ray.merge(passthrough(f"{base}+{adapter}"), tmp_path / "out").plan
    ours, theirs = contents(tmp_path / "out"), contents(adapter)
    names = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {name: ours[name] for name in names} == {name: theirs[name] for name in names}
    assert "generation_config.json" in ours  # the base's
    assert ours.keys().isdisjoint({"added_tokens.json", "trainer_state.json"})
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "out")) == 42
    assert verify(open_source(str(tmp_path / "out"))).problems == []
    beyond = [warning for warning in plan.warnings if "2 tokens without embeddings, from 40 on" in warning]
    assert len(beyond) == (rows == 40)


def test_settings_of_a_tokenizer_stay_with_its_vocabulary(bases: dict[str, Path], tmp_path: Path) -> None:
    base = shutil.copytree(bases["llama"], tmp_path / "base")
    save_tokenizer(base)
    adapter = make_adapter(llama(), tmp_path / "adapter", target_modules=["q_proj"])
    (adapter / "tokenizer_config.json").write_text("{}")
    mergekit_ray.merge(passthrough(f"{base}+{adapter}"), tmp_path / "out")
    assert contents(tmp_path / "out")["tokenizer_config.json"] == contents(base)["tokenizer_config.json"]


WEIGHTS = (0.25, 0.6)


class TestInMerges:
    """Several adapters on one base, as models of a recipe like any other."""

    @pytest.fixture
    def adapters(self, tmp_path: Path) -> list[Path]:
        settings: list[dict[str, Any]] = [
            {"target_modules": "all-linear"},
            {"target_modules": ["q_proj", "lm_head"], "r": 5, "use_dora": True},
        ]
        return [make_adapter(llama(), tmp_path / f"adapter{i}", i, **each) for i, each in enumerate(settings)]

    def recipe(self, method: str, base: Path, adapters: list[Path]) -> dict[str, Any]:
        models = [{"path": str(base), "lora": str(adapter)} for adapter in adapters]
        if method == "slerp":
            listed = [{"model": model} for model in models]
            return {"merge_method": method, "base_model": models[0], "models": listed, "parameters": {"t": 0.3}}
        given = {} if method == "linear" else {"density": 0.5}
        listed = [{"model": m, "parameters": {"weight": w, **given}} for m, w in zip(models, WEIGHTS, strict=True)]
        if method == "linear":
            return {"merge_method": method, "models": listed, "parameters": {"normalize": False}}
        return {"merge_method": method, "base_model": str(base), "models": listed}

    def test_mean_of_two(self, bases: dict[str, Path], adapters: list[Path], tmp_path: Path) -> None:
        mergekit_ray.merge(self.recipe("linear", bases["llama"], adapters), tmp_path / "out")
        ours = tensors_of(tmp_path / "out")
        a, b = (merged_by_peft(bases["llama"], adapter).state_dict() for adapter in adapters)
        for name, tensor in ours.items():
            expected = 0.25 * a[name] + 0.6 * b[name]
            size = (0.25 * a[name]).abs() + (0.6 * b[name]).abs()
            assert ((tensor.double() - expected).abs() <= 4 * 2.0**-24 * size).all()

    def test_the_base_is_read_once(self, bases: dict[str, Path], adapters: list[Path]) -> None:
        plan = mergekit_ray.plan(self.recipe("ties", bases["llama"], adapters))
        assert list(plan.inputs) == ["m0", "a0", "a1"]
        sizes = [sum(t.numel() * t.itemsize for t in tensors_of(f).values()) for f in (bases["llama"], *adapters)]
        # Of the head, too, which the second adapter stores as well as its factors: the base itself is merged.
        assert plan.read_bytes == sum(sizes)

    @pytest.mark.parametrize("method", ["linear", "dare_ties", "slerp"])
    def test_how_it_is_run_does_not_change_a_byte(
        self, method: str, bases: dict[str, Path], adapters: list[Path], tmp_path: Path
    ) -> None:
        recipe = self.recipe(method, bases["llama"], adapters)
        mergekit_ray.merge(recipe, tmp_path / "one")
        mergekit_ray.merge(recipe, tmp_path / "two", options=MergeOptions(chunk_elements=77, num_workers=2))
        assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_an_adapter_alone_is_no_model(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = make_adapter(llama(), tmp_path / "adapter", target_modules=["q_proj"])
    with pytest.raises(ModelError, match="this is a LoRA adapter, not a model") as caught:
        mergekit_ray.plan(passthrough(str(adapter)))
    assert "base+adapter" in str(caught.value.remedy)
    with pytest.raises(ModelError, match="this is a model, not a LoRA adapter"):
        mergekit_ray.plan(passthrough(f"{bases['llama']}+{bases['llama']}"))
    with pytest.raises(ModelError, match=r"adapter .* do not fit"):
        mergekit_ray.plan(passthrough(f"{bases['gpt2']}+{make_gpt2_of_another_width(tmp_path)}"))


def make_gpt2_of_another_width(folder: Path) -> Path:
    config = transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    return make_adapter(transformers.GPT2LMHeadModel(config), folder / "narrow", target_modules=["c_attn"])


@pytest.mark.s3
def test_an_adapter_in_a_bucket(bases: dict[str, Path], s3_server: S3Server, s3_prefix: str, tmp_path: Path) -> None:
    adapter = make_adapter(llama(), tmp_path / "adapter", target_modules="all-linear")
    bucket, _, prefix = s3_prefix.removeprefix("s3://").partition("/")
    for file in adapter.iterdir():
        s3_server.client().upload_file(str(file), bucket, f"{prefix}/adapter/{file.name}")
    result = mergekit_ray.merge(passthrough(f"{bases['llama']}+{s3_prefix}/adapter"), tmp_path / "remote")
    mergekit_ray.merge(passthrough(f"{bases['llama']}+{adapter}"), tmp_path / "local")
    assert result.plan.inputs["a0"].uri == f"{s3_prefix}/adapter"
    for name, tensor in tensors_of(tmp_path / "local").items():
        assert torch.equal(tensor, tensors_of(tmp_path / "remote")[name])
