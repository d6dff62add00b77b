"""Which row of which model each token gets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from mergekit_ray.planning.token_rows import NO_ROW, Holder, Row, TokenRows

BASE, CHAT, TOOLS, OTHER = range(4)


def holder(*tokens: str | None, is_merged: bool = True) -> Holder:
    ids = {token: i for i, token in enumerate(tokens) if token is not None}
    model: Any = None  # only its rows count here
    return Holder(model, ids, len(tokens), is_merged)


HOLDERS = (
    holder("a", "b", None),
    holder("b", "a", "im", "end", None),
    holder("a", "b", "end", "tool"),
    holder("a", "only", is_merged=False),
)


def chosen(
    *tokens: str | None, base: int | None = BASE, given: Mapping[str, Row] | None = None, forced: tuple[str, ...] = ()
) -> TokenRows:
    return TokenRows(tokens, HOLDERS, base, BASE, given or {}, frozenset(forced))


def of(place: int, rows: TokenRows) -> list[Row]:
    return rows.of(place)


@pytest.mark.parametrize(
    ("place", "token", "expected"),
    [
        (BASE, "b", ((BASE,), (1,))),
        (CHAT, "b", ((CHAT,), (0,))),  # its own, wherever it has it
        (BASE, "im", ((CHAT,), (2,))),  # the only one that has it
        (TOOLS, "im", ((CHAT,), (2,))),
        (BASE, "end", ((CHAT, TOOLS), (3, 2))),  # the mean of two
        (CHAT, "end", ((CHAT,), (3,))),
        (OTHER, "b", ((BASE,), (1,))),  # the base's, though three have it
        (BASE, "only", ((OTHER,), (1,))),  # nobody who is merged has it
    ],
)
def test_a_token(place: int, token: str, expected: Row) -> None:
    assert of(place, chosen(token)) == [expected]


def test_without_a_base_the_mean_of_all_that_have_it() -> None:
    assert of(OTHER, chosen("b", base=None)) == [((BASE, CHAT, TOOLS), (1, 0, 1))]


def test_a_given_row_is_for_those_that_lack_the_token() -> None:
    rows = chosen("end", "im", given={"end": ((BASE,), (0,)), "im": NO_ROW})
    assert of(BASE, rows) == [((BASE,), (0,)), NO_ROW]
    assert of(CHAT, rows) == [((CHAT,), (3,)), ((CHAT,), (2,))]


def test_a_forced_row_is_for_all() -> None:
    rows = chosen("end", "b", given={"end": ((BASE,), (0,))}, forced=("end", "b"))
    assert of(CHAT, rows) == [((BASE,), (0,)), ((BASE,), (1,))]  # without a source: what one gets that lacks it


def test_padding_is_the_models_own_or_the_donors() -> None:
    rows = chosen(None, None, None, None, None)
    assert of(BASE, rows) == [NO_ROW, NO_ROW, ((BASE,), (2,)), NO_ROW, NO_ROW]  # rows 0 and 1 are tokens'
    assert of(CHAT, rows) == [NO_ROW, NO_ROW, ((BASE,), (2,)), NO_ROW, ((CHAT,), (4,))]


def test_tokens_that_nobody_has_are_told() -> None:
    assert chosen("a", None, "x", "only", "y", given={"y": NO_ROW}).without_source == ["x"]
