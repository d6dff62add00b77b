"""Layers that are cut anew: those that the config does not tell apart, and what is stored outside of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from mergekit_ray.core.errors import PlanError
from mergekit_ray.core.plan import Plan
from support.fake_checkpoints import checkpoint, plan_of


def model(kinds: str, outside: Mapping[str, Sequence[int]] | None = None, path: str = "/a", **config: Any) -> Any:
    """A checkpoint whose layers have a tensor each that is called after their kind."""
    shapes: dict[str, Sequence[int]] = {"model.embed_tokens.weight": (10, 4)}
    for layer, kind in enumerate(kinds):
        shapes |= {f"model.layers.{layer}.{part}.weight": (4, 4) for part in ("mlp", kind)}
    shapes |= {"model.norm.weight": (4,), **(outside or {})}
    return checkpoint(path, shapes, {"num_hidden_layers": len(kinds), **config})


def frankenmerge(given: Any, *cuts: tuple[int, int]) -> Plan:
    slices = "".join(f"- sources: [{{model: /a, layer_range: [{a}, {b}]}}]\n" for a, b in cuts)
    return plan_of(f"merge_method: passthrough\nslices:\n{slices}", given)


@pytest.mark.parametrize(
    ("kinds", "cuts", "place"),
    [
        ("abbb", [(0, 3), (1, 4)], None),  # the first is special, as T5's
        ("abbb", [(1, 4)], 0),
        ("abbb", [(0, 2), (0, 4)], 2),
        ("aabb", [(0, 4), (2, 4)], None),
        ("ababab", [(0, 6), (2, 6)], None),  # a period that goes on
        ("ababab", [(0, 6), (1, 6)], 6),
        ("ababab", [(0, 2), (3, 6)], 2),
        ("abbabb", [(0, 6), (0, 5)], None),
        ("aaaa", [(2, 4), (0, 1)], None),  # all alike
    ],
)
def test_layers_that_the_config_does_not_tell_apart_keep_their_order(
    kinds: str, cuts: list[tuple[int, int]], place: int | None
) -> None:
    if place is None:
        num_layers = sum(last - first for first, last in cuts)
        assert frankenmerge(model(kinds), *cuts).config["num_hidden_layers"] == num_layers
        return
    with pytest.raises(
        PlanError, match=rf"output layer {place} is layer .* with\w* '[ab]\.weight'.*does not say"
    ) as raised:
        frankenmerge(model(kinds), *cuts)
    assert raised.value.remedy


@pytest.mark.parametrize(
    "config",
    [
        {"layer_types": ["x", "y"] * 3},
        {"model_type": "qwen3_next", "full_attention_interval": 2},
        {"block_configs": [{"attention": {"no_op": kind == "b"}} for kind in "ababab"]},
        {"text_config": {"num_hidden_layers": 6, "kinds": [1, 0] * 3}},
    ],
)
def test_layers_that_the_config_tells_apart_stand_anywhere(config: dict[str, Any]) -> None:
    plan = frankenmerge(model("ababab", **config), (0, 2), (3, 6), (0, 6))
    assert plan.config["num_hidden_layers"] == 11


def test_of_each_kind_that_the_config_tells_the_first_may_have_more() -> None:
    """Zamba's first attention has the weights that all others share."""
    zamba = model("aabacac", layers_block_type=["m", "m", "h", "m", "h", "m", "h"])
    assert frankenmerge(zamba, (0, 5), (3, 7)).config["num_hidden_layers"] == 9
    with pytest.raises(PlanError, match=r"output layer 1 is layer 4 of its model, without 'b\.weight'"):
        frankenmerge(zamba, (3, 7))


@pytest.mark.parametrize(
    ("config", "outside", "message"),
    [
        ({"cross_layer_interval": 2}, {}, "cross_layer_interval says that layers of 'model.layers' share weights, or"),
        ({"num_hidden_groups": 4, "num_hidden_layers": 12}, {}, "num_hidden_groups says that layers"),
        ({}, {f"model.ffns.{layer}.weight": (4, 4) for layer in range(4)}, r"'model\.layers' and 'model\.ffns'"),
        (
            {"num_hidden_layers": None},
            {},
            r"no known key in config\.json gives the number of layers of 'model\.layers'",
        ),
    ],
)
def test_layers_that_one_stack_does_not_hold_or_nothing_counts_stay_in_order(
    config: dict[str, Any], outside: dict[str, Sequence[int]], message: str
) -> None:
    given = model("aaaa", outside, **config)
    frankenmerge(given, (0, 2), (2, 4))
    with pytest.raises(PlanError, match=message):
        frankenmerge(given, (0, 3), (1, 4))


PER_LAYER = {
    "model.embed_tokens_per_layer.weight": (10, 8),
    "model.per_layer_model_projection.weight": (8, 4),
    "model.per_layer_projection_norm.weight": (2,),
}
NARROW = {"model.embed_tokens_per_layer.weight": (10, 4), "model.per_layer_model_projection.weight": (4, 4)}
"""All parts together as wide as the model."""


@pytest.mark.parametrize(
    ("outside", "config", "name"),
    [
        (PER_LAYER, {"hidden_size_per_layer_input": 2}, "model.embed_tokens_per_layer.weight"),
        (PER_LAYER, {"text_config": {"hidden_size_per_layer_input": 2}}, "model.embed_tokens_per_layer.weight"),
        (NARROW, {"hidden_size_per_layer_input": 1}, "model.embed_tokens_per_layer.weight"),
        ({"model.scales": (4,)}, {}, "model.scales"),
        ({f"model.queries.{i}": (5,) for i in range(4)}, {}, "model.queries.0"),
        ({f"model.queries.{i}": (5,) for i in range(3)}, {}, "model.queries.0"),
    ],
)
def test_what_has_a_part_for_each_layer_outside_of_them(
    outside: dict[str, Sequence[int]], config: dict[str, Any], name: str
) -> None:
    given = model("aaaa", outside, **config)
    for cuts in ([(0, 3)], [(0, 4), (3, 4)], [(2, 4), (0, 2)]):
        with pytest.raises(PlanError, match=f"for each layer outside the layers: '{name}'") as raised:
            frankenmerge(given, *cuts)
        assert raised.value.remedy
    assert frankenmerge(given, (0, 2), (2, 4)).num_parameters


def test_what_happens_to_be_as_long_as_there_are_layers() -> None:
    outside = {"model.a_norm.weight": (4,), "head.bias": (4,), "model.pair.0": (5,), "model.pair.1": (5,)}
    assert frankenmerge(model("aaaa", outside), (0, 3)).config["num_hidden_layers"] == 3


def test_a_tower_with_as_many_layers_is_no_part_of_them() -> None:
    outside = {f"vision.layers.{layer}.lin.weight": (4, 2) for layer in range(4)}
    assert frankenmerge(model("aaaa", outside), (0, 3)).config["num_hidden_layers"] == 3


def test_every_key_that_counts_them_is_changed_and_no_other() -> None:
    found = frankenmerge(model("aaaa", num_blocks=4, n_layers=9), (0, 3)).config
    assert [found[key] for key in ("num_hidden_layers", "num_blocks", "n_layers")] == [3, 3, 9]


def test_a_list_of_scalars_for_each_layer_beside_them() -> None:
    outside = {f"model.encoder.layers.{layer}.layer_scalar": (1,) for layer in range(4)}
    with pytest.raises(
        PlanError, match=r"something for each layer outside the layers: 'model.encoder.layers.0.layer_sc"
    ):
        frankenmerge(model("aaaa", outside), (0, 3))
