"""Adapters of parameters that hold all experts of a layer, by headers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from mergekit_ray.checkpoint.adapter import Adapter
from mergekit_ray.checkpoint.opening import Checkpoint
from mergekit_ray.core.errors import ModelError
from mergekit_ray.core.expressions import ExpertLowRank, Load, loads
from mergekit_ray.planning.lora import LoraWeights
from mergekit_ray.planning.weights import StoredWeights
from support.adapter_headers import adapter_of
from support.fake_checkpoints import checkpoint, llama_shapes

MODULE = "model.layers.0.mlp.experts"
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
EXPERTS, HIDDEN, INNER, RANK = 3, 4, 6, 2


def base_of(shapes: Mapping[str, Sequence[int]], **config: Any) -> Checkpoint:
    settings = {"num_hidden_layers": 1, "tie_word_embeddings": False, **config}
    return checkpoint("/base", llama_shapes(1) | dict(shapes), settings)


def packed(hidden: int = HIDDEN, inner: int = INNER, **config: Any) -> Checkpoint:
    """Inputs by outputs, as GPT-OSS has them."""
    shapes = {f"{MODULE}.gate_up_proj": (EXPERTS, hidden, 2 * inner), f"{MODULE}.down_proj": (EXPERTS, inner, hidden)}
    return base_of(shapes, **config)


def separate(module: str = MODULE, leaves: Sequence[str] = ("gate_proj", "up_proj", "down_proj")) -> Checkpoint:
    shapes = {}
    for expert in range(EXPERTS):
        for leaf in leaves:
            is_down = leaf == leaves[2]
            shapes[f"{module}.{expert}.{leaf}.weight"] = (HIDDEN, INNER) if is_down else (INNER, HIDDEN)
    return base_of(shapes)


def pair(module: str, outputs: int, inputs: int, rank: int = RANK) -> dict[str, tuple[int, int]]:
    return {f"{module}.lora_A.weight": (rank * EXPERTS, inputs), f"{module}.lora_B.weight": (outputs, rank * EXPERTS)}


def both(hidden: int = HIDDEN, inner: int = INNER, **settings: Any) -> Adapter:
    """As PEFT nests them: the parameter that is defined first has the longer name."""
    shapes = pair(f"{MODULE}.base_layer", 2 * inner, hidden) | pair(MODULE, hidden, inner)
    return adapter_of(shapes, target_parameters=PARAMETERS, **settings)


def view(base: Checkpoint, adapter: Adapter) -> LoraWeights:
    return LoraWeights(StoredWeights("m0", base), base.config, "a0", adapter)


def test_experts_in_one_tensor() -> None:
    found = view(packed(), both(rank_pattern={"experts.down_proj": RANK}, alpha_pattern={"experts.down_proj": 1}))
    for name, module, scale in (("gate_up_proj", f"{MODULE}.base_layer", 3.0), ("down_proj", MODULE, 0.5)):
        expression = found.expression(f"{MODULE}.{name}")
        assert isinstance(expression, ExpertLowRank)
        assert expression.transposed
        assert (expression.scale, expression.num_experts, expression.first_expert) == (scale, EXPERTS, 0)
        assert [x.spec.name.removeprefix("base_model.model.") for x in loads(expression)] == [
            f"{MODULE}.{name}",
            f"{module}.lora_A.weight",
            f"{module}.lora_B.weight",
        ]
    assert isinstance(found.expression("model.norm.weight"), Load)


@pytest.mark.parametrize(("model_type", "transposed"), [("gpt_oss", True), ("llama4_text", False)])
def test_which_way_a_square_matrix_lies_is_known_by_the_family(model_type: str, transposed: bool) -> None:
    found = view(packed(4, 4, model_type=model_type), both(4, 4))
    expression = found.expression(f"{MODULE}.down_proj")
    assert isinstance(expression, ExpertLowRank)
    assert expression.transposed is transposed


@pytest.mark.parametrize(
    ("module", "leaves"),
    [
        (MODULE, ("gate_proj", "up_proj", "down_proj")),
        ("model.layers.0.block_sparse_moe.experts", ("w1", "w3", "w2")),
        ("model.language_model.layers.0.mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    ],
)
def test_experts_by_themselves_read_only_what_is_theirs(module: str, leaves: Sequence[str]) -> None:
    base, adapter = separate(module, leaves), both()
    found = view(base, adapter)
    stored = adapter.checkpoint.tensors
    for expert in range(EXPERTS):
        for leaf, first, stop, name in (
            (leaves[0], 0, INNER, f"{MODULE}.base_layer"),
            (leaves[1], INNER, 2 * INNER, f"{MODULE}.base_layer"),
            (leaves[2], 0, HIDDEN, MODULE),
        ):
            expression = found.expression(f"{module}.{expert}.{leaf}.weight")
            assert isinstance(expression, ExpertLowRank)
            assert not expression.transposed
            assert (expression.num_experts, expression.first_expert) == (EXPERTS, expert)
            assert isinstance(expression.a, Load)
            assert isinstance(expression.b, Load)
            _, a = stored[f"base_model.model.{name}.lora_A.weight"]
            _, b = stored[f"base_model.model.{name}.lora_B.weight"]
            inputs = expression.spec.shape[1]
            assert expression.a.spec.shape == (RANK, inputs)
            assert expression.a.location.start == a.start + 4 * expert * RANK * inputs
            assert expression.b.spec.shape == (stop - first, RANK * EXPERTS)
            assert expression.b.location.start == b.start + 4 * first * RANK * EXPERTS


def test_a_module_may_be_adapted_beside_its_parameters() -> None:
    shapes = {"lora_A.weight": (RANK, HIDDEN), "lora_B.weight": (HIDDEN, RANK)}
    module = "model.layers.0.self_attn.q_proj"
    adapter = adapter_of({f"{module}.{n}": shape for n, shape in shapes.items()}, target_parameters=PARAMETERS)
    assert not isinstance(view(packed(), adapter).expression(f"{module}.weight"), ExpertLowRank | Load)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (pair(MODULE, HIDDEN, INNER, rank=3), r"and none would fit: .*gate_up_proj \[3, 4, 12\]"),
        (pair(MODULE, HIDDEN, 5), "and none would fit"),
        ({f"{MODULE}.lora_A.weight": (RANK * EXPERTS, INNER)}, "has no pair of factors"),
        (pair(MODULE, HIDDEN, INNER) | {f"{MODULE}.lora_B.bias": (HIDDEN,)}, "has no pair of factors and nothing else"),
        (pair("model.layers.7.mlp.experts", HIDDEN, INNER), "and none would fit: none of them in the base"),
        (pair(MODULE, HIDDEN, INNER) | pair(f"{MODULE}.base_layer", HIDDEN, INNER), "both fit '.*experts.down_proj'"),
    ],
)
def test_what_does_not_fit_is_named(shapes: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        view(packed(), adapter_of(shapes, target_parameters=PARAMETERS))
    assert caught.value.where == "adapter /adapter"
    assert caught.value.remedy


def test_factors_that_fit_two_parameters_are_refused() -> None:
    shapes = {f"{MODULE}.gate_up_proj": (EXPERTS, 4, 4), f"{MODULE}.down_proj": (EXPERTS, 4, 4)}
    adapter = adapter_of(pair(MODULE, 4, 4), target_parameters=PARAMETERS)
    with pytest.raises(ModelError, match=r"adapt one of the parameters down_proj, gate_up_proj .*several would fit"):
        view(base_of(shapes), adapter)
