"""Rows of any expressions, made of as little else as can be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from mergekit_ray.core.expressions.arithmetic import Cast, Scale
from mergekit_ray.core.expressions.base import Expression, Load, Stored
from mergekit_ray.core.expressions.gather import Gather, gathered
from mergekit_ray.core.expressions.generated import Concat, Constant
from mergekit_ray.core.expressions.low_rank import LowRank
from mergekit_ray.core.expressions.rows import Rows
from mergekit_ray.core.expressions.runs import ZEROS, Runs
from mergekit_ray.core.tensors import TensorSpec

if TYPE_CHECKING:
    from mergekit_ray.core.expressions.runs import Integers


def rows(parts: Sequence[Expression], spec: TensorSpec, runs: Runs) -> Expression:
    """Rows of any expressions: one that is taken as it is, a `Gather` where all are stored, else a `Rows`.

    All rows that are read from files become one `Gather` of just these, in the order in which they are used. So do
    the rows below a part of which each row is made of the same row of other tensors: a LoRA of a head, say. Only of
    other computed parts may rows be out of order, which costs memory (see `Rows.access`).

    Args:
        parts: what rows are taken of.
        spec: of the result.
        runs: which rows, of which parts.

    Raises:
        ValueError: see `Runs.row_elements`.
    """
    import numpy as np  # noqa: PLC0415 - plans are made without it, but for these

    size = runs.row_elements(spec, [part.spec for part in parts])
    used, runs = runs.compact()
    parts = [parts[index] for index in used]
    if len(parts) == len(runs) == 1 and parts[0].spec.shape == spec.shape:
        return parts[0]
    part, row = runs.rows(0, runs.num_rows)
    for index, each in enumerate(parts):
        here = part == index
        is_along_first = math.prod(each.spec.shape[1:]) == size  # not so of a bias [1, rows]
        selected = _selected(each, row[here]) if is_along_first and not isinstance(each, Stored) else None
        if selected is not None:
            parts[index], row[here] = selected, np.arange(here.sum())
    loads, part_read, row_read = _composed(parts, part, row)
    computed = [index for index, each in enumerate(parts) if not isinstance(each, Stored)]
    if not computed:
        return gathered(loads, spec, Runs.of_rows(part_read, row_read))
    is_read = ~np.isin(part, [ZEROS, *computed])
    count = int(is_read.sum())
    below: list[Expression] = []
    if count:
        shape = (1, count) if size == 1 and spec.shape == (1, runs.num_rows) else (count, *spec.shape[1:])
        of_read = Runs.of_rows(part_read[is_read], row_read[is_read])
        below = [gathered(loads, TensorSpec(spec.name, spec.dtype, shape), of_read)]
        row[is_read] = np.arange(count)
    number = np.zeros(len(parts) + 1, np.int64)  # the last one is that of `ZEROS`
    number[computed] = range(len(below), len(below) + len(computed))
    number[ZEROS] = ZEROS
    parts, runs = [*below, *(parts[index] for index in computed)], Runs.of_rows(number[part], row)
    if len(parts) == len(runs) == 1 and parts[0].spec.shape == spec.shape:
        return parts[0]
    return Rows(tuple(parts), spec, runs)


def _selected(x: Expression, row: Integers) -> Expression | None:
    """Rows of an expression, of which what is below it has no others; None if its rows are not made of theirs alone.

    Args:
        x: has its rows along the first dimension.
        row: indices of those that are wanted.
    """
    spec = TensorSpec(x.spec.name, x.spec.dtype, (len(row), *x.spec.shape[1:]))
    match x:
        case Stored():
            return rows([x], spec, Runs.of_rows(0 * row, row))
        case Constant():
            return replace(x, spec=spec)
        case Cast() | Scale():
            below = _selected(x.x, row)
            return None if below is None else replace(x, x=below)
        case LowRank(transposed=False):
            selected = [None if each is None else _selected(each, row) for each in (x.x, x.b, x.magnitude)]
            matrix, b, magnitude = selected
            if matrix is None or b is None or (magnitude is None) != (x.magnitude is None):
                return None
            return replace(x, x=matrix, b=b, magnitude=magnitude)
        case LowRank(magnitude=None):
            matrix = _selected(x.x, row)
            if matrix is None:
                return None
            # A column of one factor for each row.
            columns = row if x.selected is None else x.selected.rows(0, x.selected.num_rows)[1][row]
            return replace(x, x=matrix, selected=Runs.of_rows(0 * row, columns))
        case Concat() if all(part.spec.shape[1:] == x.spec.shape[1:] for part in x.parts):
            runs = Runs.of((index, 0, part.spec.shape[0]) for index, part in enumerate(x.parts))
            return _selected(Rows(x.parts, x.spec, runs), row)
        case Rows():
            part_below, row_below = x.runs.rows(0, x.runs.num_rows)
            return rows(x.parts, spec, Runs.of_rows(part_below[row], row_below[row]))
    return None


def _composed(parts: Sequence[Expression], part: Integers, row: Integers) -> tuple[list[Load], Integers, Integers]:
    """The tensors that stored parts are read from, and of each row its part among these, and its index there.

    Args:
        parts: stored or computed.
        part: of each row. What is said of rows of computed ones means nothing.
        row: its index there.
    """
    import numpy as np  # noqa: PLC0415 - as above

    loads: list[Load] = []
    part_read, row_read = part.copy(), row.copy()
    for index, each in enumerate(parts):
        if not isinstance(each, Stored):
            continue
        here = part == index
        if isinstance(each, Gather):
            inner_part, inner_row = (x[row[here]] for x in each.runs.rows(0, each.runs.num_rows))
            part_read[here] = np.where(inner_part == ZEROS, ZEROS, inner_part + len(loads))
            row_read[here] = inner_row
        else:
            part_read[here] = len(loads)
        loads += each.read_from
    return loads, part_read, row_read
