"""Lowering of recipes that add experts to a Mixture of Experts: what is copied, what is made, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from mergekit_ray.checkpoint.opening import Checkpoint
from mergekit_ray.config.load import load_recipe
from mergekit_ray.config.reference import ModelReference
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import ConfigError, ModelError
from mergekit_ray.core.expressions import Cast, Concat, Constant, Literal, Load, Noise, Scale
from mergekit_ray.core.plan import Plan
from mergekit_ray.core.tensors import TensorSpec
from mergekit_ray.planning.make import make_plan
from support.fake_checkpoints import Shapes, checkpoint, expressions_of

HIDDEN, INNER, COUNT = 4, 6, 2
ROUTER = "block_sparse_moe.gate.weight"
DENSE_OF = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def frame(num_layers: int = 2) -> dict[str, Any]:
    made: dict[str, Any] = {"model.embed_tokens.weight": (10, HIDDEN)}
    made |= {f"model.layers.{layer}.input_layernorm.weight": (HIDDEN,) for layer in range(num_layers)}
    return {**made, "model.norm.weight": (HIDDEN,), "lm_head.weight": (10, HIDDEN)}


def shape_of(name: str, inner: int) -> tuple[int, int]:
    return (HIDDEN, inner) if name in ("w2", "down_proj") else (inner, HIDDEN)


def mixtral(sparse_layers: Sequence[int] = (0, 1), more: Shapes | None = None, **config: Any) -> Checkpoint:
    made = frame()
    for layer in sparse_layers:
        made[f"model.layers.{layer}.{ROUTER}"] = (COUNT, HIDDEN)
        for name in DENSE_OF:
            for expert in range(COUNT):
                at = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}.weight"
                made[at] = shape_of(name, INNER)
    settings = {"model_type": "mixtral", "num_hidden_layers": 2, "num_local_experts": COUNT, "num_experts_per_tok": 1}
    return checkpoint("/moe", {**made, **(more or {})}, {**settings, "tie_word_embeddings": False, **config})


def dense(path: str = "/b", inner: int = INNER, dtype: DType = DType.BF16, **config: Any) -> Checkpoint:
    made = frame()
    for layer in range(2):
        made |= {f"model.layers.{layer}.mlp.{n}.weight": shape_of(n, inner) for n in DENSE_OF.values()}
    return checkpoint(path, made, {"model_type": "llama", "num_hidden_layers": 2, **config}, dtype)


@dataclass
class Routers:
    vectors: Mapping[int, Any] = field(default_factory=dict)
    shared: Mapping[int, Any] = field(default_factory=dict)
    lengths: Mapping[int, float] = field(default_factory=dict)
    warnings: Sequence[str] = ()


LENGTHS = Routers(lengths={0: 3.0, 1: 5.0})


def plan_of(*models: Checkpoint, routers: Routers | None = LENGTHS, **more: Any) -> Plan:
    experts = more.pop("experts", [{"source_model": each.reference} for each in models[1:]])
    data = {"base_model": "/moe", "add_to_base": True, "gate_mode": "random", "experts": experts, **more}
    opened = {ModelReference.parse(each.reference): each for each in models}
    return make_plan(load_recipe(data), opened, None if routers is None else lambda: routers)


def load(source: Checkpoint, name: str, key: str) -> Load:
    return Load(key, *source.tensors[name])


class TestTensors:
    def test_all_that_is_there_is_a_copy_and_the_new_comes_behind(self) -> None:
        base, b, c = mixtral(), dense("/b"), dense("/c")
        plan = plan_of(base, b, c)
        found = expressions_of(plan)
        for name in base.tensors:
            if not name.endswith(ROUTER):
                assert found.pop(name) == load(base, name, "m0")
        for layer in range(2):
            name = f"model.layers.{layer}.{ROUTER}"
            zero = Constant(TensorSpec(name, DType.F32, (2, HIDDEN)), 0.0)
            # A mean length of l is a standard deviation of l/√hidden for each element.
            sigma = {0: 3.0, 1: 5.0}[layer] / 2
            rows = Noise(zero, "normal", sigma, f"0\nrouter from 2\n{layer}", DType.BF16)
            expected = Concat((load(base, name, "m0"), rows), TensorSpec(name, DType.BF16, (COUNT + 2, HIDDEN)))
            assert found.pop(name) == expected
            for number, (source, key) in enumerate([(b, "m1"), (c, "m2")], COUNT):
                for ours, theirs in DENSE_OF.items():
                    target = f"model.layers.{layer}.block_sparse_moe.experts.{number}.{ours}.weight"
                    assert found.pop(target) == load(source, f"model.layers.{layer}.mlp.{theirs}.weight", key)
        assert found == {}
        assert plan.config["num_local_experts"] == COUNT + 2
        assert plan.config["num_experts_per_tok"] == 1

    def test_uniform_rows_have_the_same_mean_length(self) -> None:
        found = expressions_of(plan_of(mixtral(), dense(), gate_mode="uniform_random"))
        rows = found[f"model.layers.0.{ROUTER}"].parts[1]
        assert (rows.distribution, rows.scale) == ("uniform", pytest.approx(3.0 / 2 * 3**0.5))

    def test_rows_from_prompts_are_stretched_to_the_length(self) -> None:
        vectors = {layer: np.full((1, HIDDEN), 0.5, np.float32) for layer in range(2)}
        listed = [{"source_model": "/b", "positive_prompts": ["b"]}]
        routers = Routers(vectors, lengths={0: 3.0, 1: 5.0}, warnings=["close"])
        plan = plan_of(mixtral(), dense(), experts=listed, gate_mode="hidden", routers=routers)
        rows = expressions_of(plan)[f"model.layers.1.{ROUTER}"].parts[1]
        assert isinstance(rows, Literal)
        assert np.frombuffer(rows.data, "<f4").tolist() == [2.5] * HIDDEN
        assert plan.warnings == ("close",)

    def test_without_routing_it_is_said_that_rows_are_not_final(self) -> None:
        (warning,) = plan_of(mixtral(), dense(), routers=None).warnings
        assert "in this plan they are not yet what they will be" in warning

    def test_layers_without_experts_stay_dense(self) -> None:
        """As the first layers of DeepSeek's models."""
        own = {f"model.layers.0.mlp.{n}.weight": shape_of(n, 9) for n in DENSE_OF.values()}
        base, b = mixtral((1,), own), dense()
        plan = plan_of(base, b, routers=Routers(lengths={1: 1.0}))
        found = expressions_of(plan)
        assert all(found[name] == load(base, name, "m0") for name in own)
        assert not any("layers.0" in name and "experts" in name for name in found)
        assert "/b: model.layers.0.mlp.up_proj.weight" in plan.dropped

    def test_noise_scale_and_dtypes(self) -> None:
        listed = [{"source_model": "/b", "noise_scale": 0.25, "residual_scale": 0.5}]
        found = expressions_of(plan_of(mixtral(), dense(dtype=DType.F32), experts=listed, dtype="float16", seed=7))
        assert {x.spec.dtype for x in found.values()} == {DType.F16}
        target = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
        scaled = found[target]
        assert isinstance(scaled, Scale)
        assert isinstance(scaled.x, Noise)
        assert scaled.x.key == f"7\n{target}\nnoise"
        assert isinstance(found["model.norm.weight"], Cast)

    def test_experts_have_the_dtype_of_those_that_are_there(self) -> None:
        found = expressions_of(plan_of(mixtral(), dense(dtype=DType.F32)))
        assert {x.spec.dtype for x in found.values()} == {DType.BF16}

    def test_every_input_tensor_is_used_or_named(self) -> None:
        old = {"model.layers.0.self_attn.rotary_emb.inv_freq": (2,)}
        plan = plan_of(mixtral(more=old), dense())
        assert plan.dropped.pop("/moe: model.layers.0.self_attn.rotary_emb.inv_freq").startswith("a constant")
        assert set(plan.dropped) == {f"/b: {name}" for name in frame()}


class TestRefusals:
    def test_mismatches_are_all_listed(self) -> None:
        with pytest.raises(ModelError) as caught:
            plan_of(mixtral(hidden_act="silu"), dense("/b", 8, hidden_act="gelu"), dense("/c", model_type="qwen2"))
        assert str(caught.value).splitlines()[1:-1] == [
            "  hidden_act: 'silu' in /moe, 'gelu' in /b",
            "  model.layers.0.mlp.gate_proj.weight: [6, 4] in experts of /moe, [8, 4] in /b",
            "  model.layers.0.mlp.down_proj.weight: [4, 6] in experts of /moe, [4, 8] in /b",
            "  model.layers.0.mlp.up_proj.weight: [6, 4] in experts of /moe, [8, 4] in /b",
            "  model_type: /moe takes experts from llama or mistral, and /c is 'qwen2'",
        ]

    @pytest.mark.parametrize("config", [{"num_local_experts": 3}, {"num_local_experts": None}])
    def test_a_config_that_does_not_say_how_many_experts_there_are(self, config: dict[str, Any]) -> None:
        with pytest.raises(ModelError, match="as the number of experts, and the routers have 2 rows"):
            plan_of(mixtral(**config), dense())

    def test_a_mixture_without_routers(self) -> None:
        with pytest.raises(ModelError, match="the routers have no rows"):
            plan_of(mixtral(()), dense())

    @pytest.mark.parametrize("key", ["backbone", "shared_experts", "expert_layout"])
    def test_keys_that_would_change_the_rest(self, key: str) -> None:
        backbone = {"merge_method": "passthrough", "models": [{"model": "/moe"}]}
        values = {"backbone": backbone, "shared_experts": [{"source_model": "/b"}], "expert_layout": "packed"}
        with pytest.raises(ConfigError, match="keeps everything of base_model and only adds experts"):
            plan_of(mixtral(), dense(), **{key: values[key]})
