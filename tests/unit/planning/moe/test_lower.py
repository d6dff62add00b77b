"""Lowering of Mixture-of-Experts recipes: which bytes make which tensor, and what is refused with all its reasons."""

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
from mergekit_ray.core.errors import ConfigError, MergekitRayError, ModelError, PlanError
from mergekit_ray.core.expressions import Cast, Concat, Constant, Expression, Literal, Load, Merge, Noise, Scale, loads
from mergekit_ray.core.plan import Plan
from mergekit_ray.core.tensors import TensorSpec
from mergekit_ray.planning.make import make_plan
from support.fake_checkpoints import Shapes, checkpoint, expressions_of

HIDDEN, INNER, VOCABULARY = 4, 6, 10
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


def shapes(
    num_layers: int = 2, *, inner: int = INNER, vocabulary: int = VOCABULARY, head: bool = True
) -> dict[str, Any]:
    """A Llama with all that the families look for."""
    made: dict[str, Any] = {"model.embed_tokens.weight": (vocabulary, HIDDEN)}
    for layer in range(num_layers):
        at = f"model.layers.{layer}"
        made |= {f"{at}.{norm}_layernorm.weight": (HIDDEN,) for norm in ("input", "post_attention")}
        made |= {f"{at}.self_attn.{x}_proj.weight": (HIDDEN if x in "qo" else 2, HIDDEN) for x in "qkvo"}
        made[f"{at}.self_attn.o_proj.weight"] = (HIDDEN, HIDDEN)
        made |= {f"{at}.mlp.{x}.weight": (inner, HIDDEN) for x in ("gate_proj", "up_proj")}
        made[f"{at}.mlp.down_proj.weight"] = (HIDDEN, inner)
    made["model.norm.weight"] = (HIDDEN,)
    return {**made, "lm_head.weight": (vocabulary, HIDDEN)} if head else made


def model(
    path: str, num_layers: int = 2, dtype: DType = DType.BF16, more: Shapes | None = None, **sizes: Any
) -> Checkpoint:
    config = {
        "model_type": sizes.pop("model_type", "llama"),
        "num_hidden_layers": num_layers,
        "num_attention_heads": 2,
        "tie_word_embeddings": not sizes.get("head", True),
        "torch_dtype": dtype.config_name,
    }
    return checkpoint(path, {**shapes(num_layers, **sizes), **(more or {})}, config, dtype)


@dataclass
class Routers:
    vectors: Mapping[int, Any]
    shared: Mapping[int, Any] = field(default_factory=dict)
    warnings: Sequence[str] = ()


def recipe(*experts: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    return {"base_model": "/a", "experts": list(experts), "gate_mode": "random", **more}


def plan_of(data: Mapping[str, Any], *models: Checkpoint, routers: Routers | None = None) -> Plan:
    loaded = load_recipe(data)
    opened = {ModelReference.parse(each.reference): each for each in models}
    return make_plan(loaded, opened, None if routers is None else lambda: routers)


def load(source: Checkpoint, name: str, key: str) -> Load:
    return Load(key, *source.tensors[name])


A, B, C = model("/a"), model("/b"), model("/c")
EXPERT_B, EXPERT_C = {"source_model": "/b"}, {"source_model": "/c"}


class TestTensors:
    def test_copies_experts_and_everything_else_from_the_base(self) -> None:
        found = expressions_of(plan_of(recipe(EXPERT_B, EXPERT_C), A, B, C))
        expected: dict[str, Expression] = {name: load(A, name, "m0") for name in A.tensors if ".mlp." not in name}
        for layer in range(2):
            at = f"model.layers.{layer}"
            for number, (source, key) in enumerate([(B, "m1"), (C, "m2")]):
                for ours, theirs in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
                    name = f"{at}.block_sparse_moe.experts.{number}.{ours}.weight"
                    expected[name] = load(source, f"{at}.mlp.{theirs}.weight", key)
            router = f"{at}.block_sparse_moe.gate.weight"
            zero = Constant(TensorSpec(router, DType.F32, (2, HIDDEN)), 0.0)
            expected[router] = Noise(zero, "normal", 1.0, f"0\nrouter\n{layer}", DType.BF16)
        assert found == expected

    def test_file_order_is_model_order(self) -> None:
        names = list(expressions_of(plan_of(recipe(EXPERT_B, EXPERT_C), A, B, C)))
        assert names[0] == "model.embed_tokens.weight"
        assert names[-2:] == ["lm_head.weight", "model.norm.weight"]
        layers = [int(name.split(".")[2]) for name in names if "layers" in name]
        assert layers == sorted(layers)

    def test_noise_then_scale_then_one_rounding(self) -> None:
        listed = {"source_model": "/b", "noise_scale": 0.25, "residual_scale": 0.5}
        found = expressions_of(plan_of(recipe(listed, seed=7), A, B))
        at = "model.layers.1.block_sparse_moe.experts.0"
        key = f"7\n{at}.w2.weight\nnoise"
        x = load(B, "model.layers.1.mlp.down_proj.weight", "m1")
        assert found[f"{at}.w2.weight"] == Scale(Noise(x, "normal", 0.25, key, DType.F32), 0.5, DType.BF16, DType.F32)
        up = load(B, "model.layers.1.mlp.up_proj.weight", "m1")
        key = f"7\n{at}.w3.weight\nnoise"
        assert found[f"{at}.w3.weight"] == Noise(up, "normal", 0.25, key, DType.BF16, DType.F32)

    @pytest.mark.parametrize("nothing", [{"noise_scale": 0.0, "residual_scale": 1.0}, {}])
    def test_what_changes_nothing_is_a_copy(self, nothing: dict[str, float]) -> None:
        found = expressions_of(plan_of(recipe({**EXPERT_B, **nothing}), A, B))
        copies = [x for name, x in found.items() if not name.endswith("gate.weight")]
        assert all(isinstance(x, Load) for x in copies)

    def test_residual_scale_of_zero_is_one_too(self) -> None:
        found = expressions_of(plan_of(recipe({**EXPERT_B, "residual_scale": 0.0}), A, B))
        scaled = found["model.layers.0.block_sparse_moe.experts.0.w2.weight"]
        assert isinstance(scaled, Scale)
        assert scaled.factor == 0.0

    @pytest.mark.parametrize(
        ("given", "stored", "compute"),
        [
            ({}, DType.BF16, DType.F32),
            ({"dtype": "float16"}, DType.F16, DType.F32),
            ({"compute_dtype": "float64"}, DType.BF16, DType.F64),
            ({"compute_dtype": "inputs"}, DType.BF16, DType.F32),  # that of the expert's model
            ({"compute_dtype": "inputs", "dtype": "float16"}, DType.F16, DType.F16),
        ],
    )
    def test_dtypes(self, given: dict[str, str], stored: DType, compute: DType) -> None:
        listed = {"source_model": "/w", "residual_scale": 0.5}
        plan = plan_of(recipe(listed, **given), A, model("/w", dtype=DType.F32))
        found = expressions_of(plan)
        assert {x.spec.dtype for x in found.values()} == {stored}
        at = "model.layers.0.block_sparse_moe"
        scaled, cast = found[f"{at}.experts.0.w2.weight"], found[f"{at}.experts.0.w1.weight"]
        assert isinstance(scaled, Scale)
        assert (scaled.dtype, scaled.compute_dtype) == (stored, compute)
        assert isinstance(cast, Cast)
        assert isinstance(found["model.norm.weight"], Load if stored is DType.BF16 else Cast)
        assert plan.config["torch_dtype"] == stored.config_name

    def test_packed_experts_hold_gate_and_up_of_each_in_turn(self) -> None:
        found = expressions_of(plan_of(recipe(EXPERT_B, EXPERT_C, expert_layout="packed"), A, B, C))
        at = "model.layers.1.mlp"
        parts = [
            load(source, f"{at}.{name}.weight", key)
            for source, key in ((B, "m1"), (C, "m2"))
            for name in ("gate_proj", "up_proj")
        ]
        spec = TensorSpec(f"{at}.experts.gate_up_proj", DType.BF16, (2, 2 * INNER, HIDDEN))
        assert found[spec.name] == Concat(tuple(parts), spec)
        assert found[f"{at}.experts.down_proj"].spec.shape == (2, HIDDEN, INNER)
        assert f"{at}.gate.weight" in found
        assert not any("block_sparse_moe" in name for name in found)

    def test_packed_and_separate_experts_get_the_same_noise_and_routers(self) -> None:
        noisy = {**EXPERT_B, "noise_scale": 0.5}
        keys = []
        for layout in ("separate", "packed"):
            found = expressions_of(plan_of(recipe(noisy, noisy, expert_layout=layout), A, B))
            flat = [part for x in found.values() for part in (x.parts if isinstance(x, Concat) else (x,))]
            keys.append(sorted(x.key for x in flat if isinstance(x, Noise)))
        assert keys[0] == keys[1]
        assert len(set(keys[0])) == 2 * (1 + 2 * 3)  # per layer a router, and three tensors of each expert


PROMPTED = recipe({**EXPERT_B, "positive_prompts": ["b"]}, {**EXPERT_C, "positive_prompts": ["c"]}, gate_mode="hidden")


class TestRouters:
    def test_uniform_ones_are_as_wide_as_the_hidden_size_says(self) -> None:
        found = expressions_of(plan_of(recipe(EXPERT_B, gate_mode="uniform_random"), A, B))
        router = found["model.layers.0.block_sparse_moe.gate.weight"]
        assert isinstance(router, Noise)
        assert (router.distribution, router.scale) == ("uniform", HIDDEN**-0.5)

    def test_vectors_from_prompts_are_literals(self) -> None:
        vectors = {layer: np.arange(8, dtype=np.float32).reshape(2, 4) + layer for layer in range(2)}
        routers = Routers(vectors, warnings=["they are near-identical"])
        plan = plan_of(PROMPTED, A, B, C, routers=routers)
        for layer in range(2):
            name = f"model.layers.{layer}.block_sparse_moe.gate.weight"
            expected = Literal.of(TensorSpec(name, DType.BF16, (2, HIDDEN)), vectors[layer].astype("<f4").tobytes())
            assert expressions_of(plan)[name] == expected
        assert plan.warnings == ("they are near-identical",)
        assert Plan.from_json(plan.to_json()).digest == plan.digest == plan_of(PROMPTED, A, B, C).digest

    def test_what_they_are_made_of_is_an_input(self) -> None:
        elsewhere = {"models": [{"model": "/b", "parameters": {"weight": 1}}], "merge_method": "linear"}
        listed = [{**EXPERT_B, "positive_prompts": ["b"]}, {**EXPERT_C, "positive_prompts": ["c"]}]
        plan = plan_of(recipe(*listed, gate_mode="hidden", backbone=elsewhere), A, B, C)
        assert set(plan.inputs["m0"].files) == set(A.files)
        assert all(load.model != "m0" for x in expressions_of(plan).values() for load in loads(x))

    def test_without_routing_they_are_zero_and_that_is_said(self) -> None:
        plan = plan_of(PROMPTED, A, B, C)
        name = "model.layers.0.block_sparse_moe.gate.weight"
        assert expressions_of(plan)[name] == Constant(TensorSpec(name, DType.BF16, (2, HIDDEN)), 0.0)
        (warning,) = plan.warnings
        assert "in this plan they are zero" in warning

    def test_nothing_is_routed_before_all_else_is_right(self) -> None:
        def must_not_run() -> Routers:
            raise AssertionError("routed")

        loaded = load_recipe(PROMPTED)
        opened = {ModelReference.parse(each.reference): each for each in (A, B, model("/c", inner=8))}
        with pytest.raises(ModelError):
            make_plan(loaded, opened, must_not_run)


class TestSharedExpert:
    def test_of_qwen2_moe_is_gated(self) -> None:
        data = recipe(EXPERT_B, shared_experts=[{"source_model": "/c", "residual_scale": 0.1}])
        plan = plan_of(data, A, B, C)
        found = expressions_of(plan)
        assert plan.config["model_type"] == "qwen2_moe"  # Mixtral has none
        assert plan.config["shared_expert_intermediate_size"] == INNER
        at = "model.layers.0.mlp"
        assert found[f"{at}.shared_expert.up_proj.weight"] == load(C, f"{at}.up_proj.weight", "m2")
        down = load(C, f"{at}.down_proj.weight", "m2")
        assert found[f"{at}.shared_expert.down_proj.weight"] == Scale(down, 0.1, DType.BF16)
        gate = found[f"{at}.shared_expert_gate.weight"]
        assert isinstance(gate, Noise)
        assert gate.spec.shape == (1, HIDDEN)
        assert gate.key == "0\nshared router\n0"

    def test_that_nobody_asked_for_is_all_zero(self) -> None:
        found = expressions_of(plan_of(recipe(EXPERT_B, architecture="qwen2_moe"), A, B))
        shared = {name: x for name, x in found.items() if ".shared_expert" in name}
        assert len(shared) == 2 * 4
        assert all(isinstance(x, Constant) and x.value == 0.0 for x in shared.values())
        biases = {name: x for name, x in found.items() if name.endswith(".bias")}
        assert {name: x.spec.shape for name, x in biases.items() if ".0." in name} == {
            "model.layers.0.self_attn.q_proj.bias": (HIDDEN,),
            "model.layers.0.self_attn.k_proj.bias": (2,),
            "model.layers.0.self_attn.v_proj.bias": (2,),
        }
        assert all(isinstance(x, Constant) and x.value == 0.0 for x in biases.values())

    def test_of_deepseek_is_not(self) -> None:
        data = recipe(EXPERT_B, shared_experts=[EXPERT_C], architecture="deepseek")
        found = expressions_of(plan_of(data, A, B, C))
        at = "model.layers.1.mlp"
        assert found[f"{at}.shared_experts.gate_proj.weight"] == load(C, f"{at}.gate_proj.weight", "m2")
        assert not any("shared_expert_gate" in name for name in found)

    def test_its_vectors_come_from_its_prompts(self) -> None:
        data = recipe({**EXPERT_B, "positive_prompts": ["b"]}, gate_mode="hidden")
        data["shared_experts"] = [{**EXPERT_C, "positive_prompts": ["c"]}]
        ones = {layer: np.ones((1, HIDDEN), np.float32) for layer in range(2)}
        twos = {layer: 2 * vectors for layer, vectors in ones.items()}
        found = expressions_of(plan_of(data, A, B, C, routers=Routers(ones, twos)))
        gate = found["model.layers.0.mlp.shared_expert_gate.weight"]
        assert isinstance(gate, Literal)
        assert np.frombuffer(gate.data, "<f4").tolist() == [2.0] * HIDDEN

    def test_without_prompts_where_the_gate_needs_them(self) -> None:
        data = recipe({**EXPERT_B, "positive_prompts": ["b"]}, gate_mode="hidden", shared_experts=[EXPERT_C])
        with pytest.raises(PlanError, match="it has no `positive_prompts`") as caught:
            plan_of(data, A, B, C)
        assert caught.value.where == "shared_experts[0]"


class TestEveryInputTensor:
    def test_is_used_or_named(self) -> None:
        plan = plan_of(recipe(EXPERT_B), A, B)
        expected = {
            f"/a: {name}": "a feed-forward layer that no expert is made of" for name in A.tensors if ".mlp." in name
        }
        expected |= {
            f"/b: {name}": "outside the feed-forward layers, which /a gives"
            for name in B.tensors
            if ".mlp." not in name
        }
        assert plan.dropped == expected

    def test_constants_and_stored_copies_are_left_out(self) -> None:
        old = {"model.layers.0.self_attn.rotary_emb.inv_freq": (2,)}
        a = model("/a", more={**old, "lm_head.weight": (VOCABULARY, HIDDEN)}, head=False)
        plan = plan_of(recipe({"source_model": "/a"}), a)
        assert set(plan.dropped) == {f"/a: {name}" for name in old}
        assert plan.aliased == {"lm_head.weight": "model.embed_tokens.weight"}
        assert plan.config["tie_word_embeddings"] is True
        assert "lm_head.weight" not in expressions_of(plan)

    def test_vocabularies_may_differ(self) -> None:
        plan = plan_of(recipe(EXPERT_B), A, model("/b", vocabulary=12))
        (warning,) = plan.warnings
        assert "/b has a vocabulary of 12 tokens, /a one of 10" in warning


LINEAR = {
    "merge_method": "linear",
    "models": [{"model": "/a", "parameters": {"weight": 1}}, {"model": "/b", "parameters": {"weight": 1}}],
}


class TestBackbone:
    def test_gives_what_is_outside_the_feed_forward_layers(self) -> None:
        plan = plan_of(recipe(EXPERT_B, backbone=LINEAR), A, B)
        found = expressions_of(plan)
        for name, x in found.items():
            if "experts" in name:
                assert isinstance(x, Load)
            elif not name.endswith("block_sparse_moe.gate.weight"):
                assert isinstance(x, Merge), name
        assert set(plan.dropped) == {f"/a: {name}" for name in A.tensors if ".mlp." in name}

    def test_is_stored_as_the_mixture_is(self) -> None:
        plan = plan_of(recipe(EXPERT_B, backbone={**LINEAR, "dtype": "float32"}, dtype="float16"), A, B)
        assert {x.spec.dtype for x in expressions_of(plan).values()} == {DType.F16}

    @pytest.mark.parametrize(("own", "seed"), [({}, 5), ({"seed": 9}, 9)])
    def test_has_the_seed_of_the_mixture_or_its_own(self, own: dict[str, int], seed: int) -> None:
        dare = {
            "merge_method": "dare_linear",
            "base_model": "/a",
            "models": [{"model": "/b", "parameters": {"weight": 1, "density": 0.5}}],
        }
        found = expressions_of(plan_of(recipe(EXPERT_B, backbone={**dare, **own}, seed=5), A, B))
        merged = found["model.norm.weight"]
        assert isinstance(merged, Merge)
        assert merged.keys == (f"{seed}\nmodel.norm.weight\n/b",)

    def test_of_another_depth(self) -> None:
        cut = {"merge_method": "passthrough", "slices": [{"sources": [{"model": "/a", "layer_range": [0, 1]}]}]}
        with pytest.raises(PlanError, match="the backbone does not take the place") as caught:
            plan_of(recipe(EXPERT_B, backbone=cut), A, B)
        assert "model.layers.1.input_layernorm.weight: not made" in str(caught.value)
        assert caught.value.where == "backbone"

    def test_of_another_shape_or_with_tensors_of_its_own(self) -> None:
        wide = {name: (7, 7) for name in A.tensors if name.endswith("q_proj.weight")}
        strange = model("/s", more={**wide, "model.layers.0.self_attn.q_proj.bias": (7,)})
        copy = {"merge_method": "passthrough", "models": [{"model": "/s"}]}
        with pytest.raises(PlanError) as caught:
            plan_of(recipe(EXPERT_B, backbone=copy), A, B, strange)
        message = str(caught.value)
        assert "model.layers.0.self_attn.q_proj.weight: [7, 7], but [4, 4] in /a" in message
        assert "model.layers.0.self_attn.q_proj.bias: not in /a" in message

    def test_with_a_tokenizer_of_its_own_is_refused_as_in_a_dense_recipe(self) -> None:
        with pytest.raises(MergekitRayError, match="tokenizer"):
            plan_of(recipe(EXPERT_B, backbone={**LINEAR, "tokenizer_source": "union"}), A, B)


class TestMismatches:
    def test_are_all_listed_with_both_values(self) -> None:
        b = model("/b", num_layers=3, inner=8)
        c = model("/c", more={"model.layers.0.mlp.gate_proj.bias": (INNER,)}, model_type="mistral")
        with pytest.raises(ModelError) as caught:
            plan_of(recipe(EXPERT_B, EXPERT_C), A, b, c)
        assert caught.value.where == "base_model /a"
        assert str(caught.value).splitlines()[1:-1] == [
            "  layers: 2 in /a, 3 in /b",
            "  model.layers.0.mlp.down_proj.weight: [4, 6] in /a, [4, 8] in /b (and in 1 more layer)",
            "  model.layers.0.mlp.gate_proj.weight: [6, 4] in /a, [8, 4] in /b (and in 1 more layer)",
            "  model.layers.0.mlp.up_proj.weight: [6, 4] in /a, [8, 4] in /b (and in 1 more layer)",
            "  model_type: 'llama' in /a, 'mistral' in /c",
            "  mlp.gate_proj.bias: not in /a, but in /c",
        ]

    def test_weights_that_are_not_floating(self) -> None:
        codes = {"model.layers.1.mlp.up_proj.weight": (DType.I8, (INNER, HIDDEN))}
        with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight: stored as I8 in /b"):
            plan_of(recipe(EXPERT_B), A, model("/b", more=codes))
        norm = {"model.norm.weight": (DType.I64, (HIDDEN,))}
        with pytest.raises(ModelError, match=r"model\.norm\.weight: stored as I64 in /a"):
            plan_of(recipe(EXPERT_B), model("/a", more=norm), B)

    def test_many_are_counted(self) -> None:
        many = [model(f"/m{i}", inner=8 + i) for i in range(6)]
        with pytest.raises(ModelError, match=r"\.\.\. and 6 more"):
            plan_of(recipe(*({"source_model": m.reference} for m in many)), A, *many)

    def test_an_architecture_that_does_not_fit_says_why_and_which_do(self) -> None:
        with pytest.raises(ModelError) as caught:
            plan_of(recipe(EXPERT_B, architecture="qwen3_moe"), A, B)
        message = str(caught.value)
        assert "architecture qwen3_moe takes qwen3 models, found llama" in message
        assert "these architectures fit: mixtral, qwen2_moe, deepseek" in message

    def test_an_architecture_that_there_is_not(self) -> None:
        with pytest.raises(ConfigError, match="unknown MoE architecture 'mixtrel'; did you mean 'mixtral'"):
            plan_of(recipe(EXPERT_B, architecture="mixtrel"), A, B)
