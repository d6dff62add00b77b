from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_ray.config.settings import (
    MISSING,
    Resolver,
    dump_setting,
    gradient_position,
    interpolate,
    parse_setting,
    resolve,
)
from mergekit_ray.core.errors import ConfigError
from support.declared_methods import Lambda, Scale, Weight, WeightDensity

FLOATS = st.floats(-1e3, 1e3)


def level(**raw: Any) -> dict[str, Any]:
    parsed = {}
    for name, value in raw.items():
        setting, issues = parse_setting(value)
        assert not issues
        parsed[name] = setting
    return parsed


def at(raw: Any, tensor: str = "model.layers.0.mlp.up_proj.weight", t: float = 0.0) -> Any:
    return resolve([level(x=raw)], "x", tensor, t)


@given(st.lists(FLOATS, min_size=2, max_size=9), st.floats(0, 1))
def test_gradients_are_piecewise_linear(values: list[float], t: float) -> None:
    # Independent reference: a sum of hat functions.
    last = len(values) - 1
    expected = math.fsum(v * max(0.0, 1 - abs(t * last - i)) for i, v in enumerate(values))
    assert interpolate(tuple(values), t) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(st.lists(FLOATS, min_size=2, max_size=9))
def test_gradients_hit_their_ends_exactly(values: list[float]) -> None:
    assert interpolate(tuple(values), 0.0) == values[0]
    assert interpolate(tuple(values), 1.0) == values[-1]


@given(FLOATS, st.integers(1, 6), st.floats(0, 1))
def test_a_constant_gradient_is_that_constant(value: float, count: int, t: float) -> None:
    assert at([value] * count, t=t) == value


def test_position_in_the_slice() -> None:
    assert [gradient_position(i, 5) for i in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert gradient_position(0, 1) == 1.0


def test_a_gradient_of_three_over_five_layers() -> None:
    assert [at([0, 1, 0.5], t=gradient_position(i, 5)) for i in range(5)] == [0, 0.5, 1, 0.75, 0.5]


@pytest.mark.parametrize(
    ("tensor", "t", "expected"),
    [("a.self_attn.q", 0.5, 0.5), ("a.mlp.up", 0.25, 0.75), ("a.mlp.self_attn", 0.0, 0.0), ("norm", 0.7, 0.2)],
)
def test_the_first_filter_that_matches_counts(tensor: str, t: float, expected: float) -> None:
    setting = [{"filter": "self_attn", "value": [0, 1]}, {"filter": "mlp", "value": [1, 0]}, {"value": 0.2}]
    assert at(setting, tensor, t) == expected


def test_a_star_matches_all_and_hides_what_follows() -> None:
    assert at([{"filter": "*", "value": 1}, {"filter": "mlp", "value": 2}]) == 1


@pytest.mark.parametrize(
    ("pattern", "is_meant"),
    [
        ("*.mlp.*", True),
        ("model.layers.?.mlp.up_proj.weight", True),
        ("model.layers.[0-3].*", True),
        ("*.self_attn.*", False),
        ("mlp.*", False),
        ("layers.[1-3].*", False),
        ("mlp.up", True),
        ("model.layers.1", False),
    ],
)
def test_a_filter_is_a_part_of_a_name_or_a_pattern_for_all_of_it(pattern: str, is_meant: bool) -> None:
    assert at([{"filter": pattern, "value": 1}, {"value": 2}]) == (1 if is_meant else 2)


def test_precedence_is_the_order_of_levels_and_misses_fall_through() -> None:
    levels = [None, level(x={"filter": "attn", "value": 1}), {}, level(x=None), level(x=[2, 4]), level(x=9)]
    assert resolve(levels, "x", "a.attn.q", 0.5) == 1
    assert resolve(levels, "x", "a.mlp.up", 0.5) == 3
    assert resolve(levels, "y", "a.mlp.up", 0.5) is MISSING
    assert resolve(levels[:2], "x", "a.mlp.up", 0.5) is MISSING


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("1e-3", 0.001),
        (True, True),
        ("true", "true"),
        ([0.5], 0.5),
        ([[0.5]][0], 0.5),
        (["1"], 1.0),
        ([True, 1.0], True),
    ],
)
def test_untidy_scalars(raw: object, expected: object) -> None:
    assert at(raw) == expected


def test_gradients_of_booleans_and_quoted_numbers() -> None:
    assert at(["0", True], t=0.25) == 0.25


@pytest.mark.parametrize(
    ("raw", "path", "words"),
    [
        ([], (), "empty list"),
        ([1, None], (1,), "found nothing"),
        ([1, "two"], (1,), "found 'two'"),
        (math.nan, (), "finite"),
        ([0.1, math.inf], (1,), "finite"),
        ("nan", (), "finite"),
        ([[1]], (0,), "expected a number"),
        ([{"filter": "mlp"}], (0,), "without `value`"),
        ([{"filter": 3, "value": 1}], (0, "filter"), "expected text, found 3"),
        ([{"fliter": "mlp", "value": 1}], (0, "fliter"), "did you mean 'filter'"),
        ([{"value": 1}, 3], (1,), "like its neighbours"),
        ([{"value": [{"value": 1}]}], (0, "value"), "conditions inside"),
        ({"value": ["a", "b"]}, ("value", 0), "expected a number"),
        (10**400, (), "too large"),
        (object, (), "expected a number"),
    ],
)
def test_what_is_no_setting_says_where_and_why(raw: object, path: tuple[object, ...], words: str) -> None:
    _, issues = parse_setting(raw)
    assert issues[0][0] == path
    assert words in issues[0][1]


SCALAR = st.booleans() | FLOATS | st.integers(-9, 9) | st.sampled_from(["yes", "abc"])
VALUE = st.one_of(SCALAR, st.lists(FLOATS, min_size=1, max_size=4))
CASE = st.fixed_dictionaries({"value": VALUE}, optional={"filter": st.sampled_from(["*", "mlp", "attn"])})


@given(VALUE | CASE | st.lists(CASE, min_size=1, max_size=3))
def test_settings_survive_a_round_trip(raw: object) -> None:
    setting, issues = parse_setting(raw)
    assert not issues
    assert parse_setting(dump_setting(setting)) == (setting, [])


@given(st.lists(st.dictionaries(st.sampled_from(["weight", "density"]), VALUE | CASE, max_size=2), max_size=4))
def test_the_resolver_agrees_with_resolve(raw_levels: list[dict[str, Any]]) -> None:
    levels = [level(**raw) for raw in raw_levels]
    try:
        resolver = Resolver(WeightDensity, levels)
    except ConfigError:
        return  # a word, or a density beyond [0, 1]
    for tensor in ("a.mlp.up", "a.attn.q", "norm"):
        for t in (0.0, 0.3, 1.0):
            weight = resolve(levels, "weight", tensor, t)
            density = resolve(levels, "density", tensor, t)
            if weight is MISSING:
                with pytest.raises(ConfigError, match="weight"):
                    resolver.at(tensor, t)
            else:
                expected = {"weight": weight, "density": 1.0 if density is MISSING else density}
                assert resolver.at(tensor, t) == expected


def test_the_resolver_gives_declared_types_and_yaml_names() -> None:
    resolver = Resolver(Lambda, [level(normalize=0.0, steps="4"), level(**{"lambda": "1e-1"})])
    found = resolver.at("x", 0.0)
    assert found == {"normalize": False, "lambda": 0.1, "steps": 4}
    assert [type(value) for value in found.values()] == [bool, float, int]
    assert Lambda(**found).lambda_ == 0.1
    assert Resolver(Scale, []).at("x", 0.0) == {"scale": None}


def test_a_required_value_that_filters_leave_out_names_tensor_and_model() -> None:
    resolver = Resolver(Weight, [level(weight={"filter": "mlp", "value": 1})], "org/a")
    assert resolver.at("a.mlp.up", 0.0) == {"weight": 1.0}
    with pytest.raises(ConfigError, match=r"'weight' of org/a has no value for the tensor lm_head\.weight"):
        resolver.at("lm_head.weight", 0.0)


def test_a_yes_or_no_parameter_cannot_be_a_gradient() -> None:
    with pytest.raises(ConfigError, match="normalize: cannot vary gradually"):
        Resolver(Lambda, [level(normalize=[0, 1])])
    assert Resolver(Lambda, [level(normalize=[1, True])]).at("x", 0.0)["normalize"] is True
