"""What rules of the kinds of layers are made of. `layer_kinds` has the rules themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

Config: TypeAlias = Mapping[str, Any]
Defaults: TypeAlias = Mapping[str, int]
"""What the families (by ``model_type``) have where their config says nothing."""

Kind: TypeAlias = Callable[[Config, int, int], Any]
"""The kind of a layer, from the config, its index and the number of layers."""

SLIDING, FULL, LINEAR, INDEXED = "sliding_attention", "full_attention", "linear_attention", "indexed_attention"


@dataclass(frozen=True)
class Rule:
    """One thing that holds for some layers and not for others.

    Attributes:
        key: the key that says which.
        kinds: the kind of each layer, from a config and its number of layers.
        say: what to put into a config so that its layers have these kinds, if it can be said; nothing if it cannot.
        families: those that it holds for even where the key is missing.
        triggers: keys whose presence makes it hold for any other family.
        told_by: keys that say the same and go first.
        is_indices: the value is made of indices, and so written anew whenever layers are cut.
    """

    key: str
    kinds: Callable[[Config, int], list[Any]]
    say: Callable[[Config, list[Any]], dict[str, Any]] = lambda *_: {}
    families: frozenset[str] = frozenset()
    triggers: tuple[str, ...] = ()
    told_by: tuple[str, ...] = ()
    is_indices: bool = False

    @property
    def can_be_said(self) -> bool:
        """Whether it gives kinds; otherwise it gives places, which differ between layers of one kind."""
        return self.say is not Rule.say


# -- kinds ------------------------------------------------------------------------------------------------------------


def family_of(config: Config) -> str:
    """The ``model_type``; empty if there is none."""
    family = config.get("model_type")
    return family if isinstance(family, str) else ""


def number(config: Config, key: str, default: int) -> int:
    """A whole number under a key; the length of a pattern that is spelt out (``LLLG``)."""
    value = config.get(key)
    if isinstance(value, str):
        return len(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else default


def items(config: Config, key: str) -> Sequence[Any]:
    """A list under a key; empty if there is none."""
    value = config.get(key)
    return value if isinstance(value, list) else ()


def nested(config: Config, key: str, inner: str) -> Sequence[Any]:
    """A list one level down."""
    part = config.get(key)
    return items(part, inner) if isinstance(part, Mapping) else ()


def each(kind: Kind) -> Callable[[Config, int], list[Any]]:
    """The kinds of all layers."""
    return lambda config, count: [kind(config, index, count) for index in range(count)]


def every(
    period: int | Defaults,
    key: str = "",
    nth: Any = FULL,
    other: Any = SLIDING,
    *,
    first: int = -1,
    last: Any = None,
) -> Kind:
    """``nth`` in every n-th layer.

    Args:
        period: n, where the config does not say it under ``key``.
        key: names n.
        nth: kind of every n-th layer.
        other: kind of the others.
        first: index of one that is an n-th; -1 for those before multiples of n.
        last: kind of the last layer, whichever it is.
    """

    def kind(config: Config, index: int, count: int) -> Any:
        if last is not None and index == count - 1:
            return last
        return nth if (index - first) % max(number(config, key, _default(config, period)), 1) == 0 else other

    return kind


def led(first: Any, kind: Kind) -> Kind:
    """``first`` in the first layer, then as ``kind`` has it."""
    return lambda config, index, count: first if index == 0 else kind(config, index, count)


def below(key: str, default: int | Defaults, low: Any, high: Any) -> Kind:
    """``low`` in as many leading layers as ``key`` says, ``high`` in the others."""
    return lambda config, index, _: low if index < number(config, key, _default(config, default)) else high


def _default(config: Config, default: int | Defaults) -> int:
    return default if isinstance(default, int) else default.get(family_of(config), 0)


# -- rules ------------------------------------------------------------------------------------------------------------


def list_rule(key: str, families: Mapping[str, Any] | str, kind: Kind) -> Rule:
    """A list with an item for each layer, which these families read, and what they have without it."""

    def kinds(config: Config, count: int) -> list[Any]:
        given = items(config, key)
        return list(given[:count]) if len(given) >= count > 0 else each(kind)(config, count)

    names = frozenset(families.split() if isinstance(families, str) else families)
    return Rule(key, kinds, lambda _, kinds: {key: kinds}, names)


def leading_rule(key: str, defaults: Defaults, *told_by: str, needs: str | None = None) -> Rule:
    """The number of leading layers that are of another kind than the rest."""

    def say(_: Config, kinds: list[Any]) -> dict[str, Any]:
        return {key: kinds.index(False) if False in kinds else len(kinds)}

    kinds = each(below(key, defaults, True, False))
    return Rule(key, kinds, say, frozenset(defaults), (needs or key,), told_by, is_indices=True)


def trailing_rule(key: str) -> Rule:
    """The number of trailing layers that are of another kind than the rest."""

    def say(_: Config, kinds: list[Any]) -> dict[str, Any]:
        return {key: kinds[::-1].index(False) if False in kinds else len(kinds)}

    kinds = each(lambda config, index, count: index >= count - number(config, key, 0))
    return Rule(key, kinds, say, triggers=(key,), is_indices=True)


def indices_rule(key: str, *told_by: str) -> Rule:
    """A list of the indices of the layers that are of one kind."""
    kinds = each(lambda config, index, _: index in items(config, key))
    return Rule(key, kinds, lambda _, kinds: {key: where(kinds)}, frozenset(), (key,), told_by, is_indices=True)


def period_rule(key: str, *told_by: str, families: Defaults | None = None) -> Rule:
    """A period of any family: an order is right if every layer keeps its place in the period."""
    defaults = families or {}
    kinds = each(lambda config, index, _: index % max(number(config, key, _default(config, defaults)), 1))
    return Rule(key, kinds, families=frozenset(defaults), triggers=(key,), told_by=told_by)


def jamba_rule(name: str, period: int, offset: int) -> Rule:
    """Jamba's period and offset: any pair that gives the kinds."""
    keys = f"{name}_period", f"{name}_offset"

    def kind(config: Config, index: int, _: int) -> bool:
        return index % max(number(config, keys[0], period), 1) == number(config, keys[1], offset)

    def say(_: Config, kinds: list[Any]) -> dict[str, Any]:
        pairs = ((p, kinds.index(True)) for p in range(1, len(kinds) + 2) if True in kinds[:p])
        found = next((pair for pair in pairs if kinds == [i % pair[0] == pair[1] for i in range(len(kinds))]), None)
        return {} if found is None else dict(zip(keys, found, strict=True))

    return Rule(keys[0], each(kind), say, frozenset({"jamba"}))


def where(kinds: Sequence[Any]) -> list[int]:
    """The indices of what is true."""
    return [index for index, kind in enumerate(kinds) if kind]
