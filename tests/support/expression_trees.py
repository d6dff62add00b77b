"""Random expressions for hypothesis."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.expressions import (
    Approximated,
    BlockScaled,
    Cast,
    Concat,
    Constant,
    ExpertLowRank,
    Expression,
    Gather,
    Literal,
    Load,
    LowRank,
    LowRankFactors,
    Merge,
    Mxfp4,
    Noise,
    Rows,
    Runs,
    Scale,
    SingularValues,
)
from mergekit_ray.core.tensors import Location, TensorSpec

FLOATS = st.sampled_from([DType.F16, DType.BF16, DType.F32, DType.F64])
NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
SHAPES = st.lists(st.integers(0, 9), max_size=3).map(tuple)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-(2**53), 2**53), st.floats(allow_nan=False), NAMES)
PARAMETERS = st.dictionaries(NAMES, SCALARS, max_size=3)


@st.composite
def loads_of_files(draw: Any) -> Load:
    spec = TensorSpec(draw(NAMES), draw(st.sampled_from(list(DType))), draw(SHAPES))
    start = draw(st.integers(0, 2**40))
    return Load(draw(NAMES), spec, Location(draw(NAMES), start, start + spec.num_bytes))


@st.composite
def literals(draw: Any) -> Literal:
    spec = TensorSpec(draw(NAMES), draw(FLOATS), draw(st.lists(st.integers(0, 3), max_size=2).map(tuple)))
    return Literal.of(spec, draw(st.binary(min_size=4 * spec.num_elements, max_size=4 * spec.num_elements)))


@st.composite
def codes(draw: Any) -> BlockScaled | Mxfp4:
    def load(dtype: DType, *shape: int) -> Load:
        spec = TensorSpec(draw(NAMES), dtype, shape)
        start = draw(st.integers(0, 2**40))
        return Load(draw(NAMES), spec, Location(draw(NAMES), start, start + spec.num_bytes))

    e, n, g = (draw(st.integers(0, 4)) for _ in range(3))
    if draw(st.booleans()):
        return Mxfp4(load(DType.U8, e, n, g, 16), load(DType.U8, e, n, g), draw(NAMES))
    return BlockScaled(load(DType.F8_E4M3, n, g), load(DType.F32, n), (1, max(1, g)))


@st.composite
def runs_of(draw: Any, num_rows: list[int]) -> Runs:
    runs = []
    for part in draw(st.lists(st.integers(-1, len(num_rows) - 1), max_size=4)):
        rows = 9 if part < 0 else num_rows[part]
        first = draw(st.integers(0, rows))
        runs.append((part, first, draw(st.integers(0, rows - first))))
    return Runs.of(runs)


@st.composite
def gathers(draw: Any) -> Gather:
    dtype, columns = draw(st.sampled_from(list(DType))), draw(st.integers(1, 4))
    num_rows = draw(st.lists(st.integers(0, 5), max_size=3))
    start = draw(st.integers(0, 2**40))
    parts = []
    for rows in num_rows:
        spec = TensorSpec(draw(NAMES), dtype, (rows, columns))
        parts.append(Load(draw(NAMES), spec, Location(draw(NAMES), start, start + spec.num_bytes)))
    runs = draw(runs_of(num_rows))
    return Gather(tuple(parts), TensorSpec(draw(NAMES), dtype, (runs.num_rows, columns)), runs)


@st.composite
def approximations(draw: Any) -> Approximated:
    dtype = draw(FLOATS)
    n, m, d, e = (draw(st.integers(0, 4)) for _ in range(4))

    def matrix(*shape: int) -> Load:
        spec = TensorSpec(draw(NAMES), dtype, shape)
        return Load(draw(NAMES), spec, Location(draw(NAMES), 0, spec.num_bytes))

    donor = (matrix(n, e), matrix(m, e)) if draw(st.booleans()) else (None, None)
    model = draw(st.sampled_from([None, matrix(n, d)]))
    spec = TensorSpec(draw(NAMES), draw(FLOATS), (m, d))
    return Approximated(draw(NAMES), spec, model, *donor, draw(PARAMETERS), draw(NAMES))


LEAVES: st.SearchStrategy[Expression] = st.one_of(
    loads_of_files(),
    gathers(),
    literals(),
    codes(),
    approximations(),
    st.builds(Constant, st.builds(TensorSpec, NAMES, FLOATS, SHAPES), st.floats(allow_nan=False, allow_infinity=False)),
)


@st.composite
def concatenations(draw: Any) -> Concat:
    dtype = draw(FLOATS)
    parts = tuple(Cast(part, dtype) for part in draw(st.lists(LEAVES, max_size=3)))
    return Concat(parts, TensorSpec(draw(NAMES), dtype, (sum(part.spec.num_elements for part in parts),)))


@st.composite
def rows_of_leaves(draw: Any) -> Rows:
    """Each part is flattened, so that it has rows of one element."""
    dtype = draw(FLOATS)
    parts = []
    for leaf in draw(st.lists(LEAVES, max_size=3)):
        flat = Concat((Cast(leaf, dtype),), TensorSpec(draw(NAMES), dtype, (leaf.spec.num_elements,)))
        parts.append(flat)
    runs = draw(runs_of([part.spec.num_elements for part in parts]))
    return Rows(tuple(parts), TensorSpec(draw(NAMES), dtype, (runs.num_rows,)), runs)


def _above(below: st.SearchStrategy[Expression]) -> st.SearchStrategy[Expression]:
    return st.one_of(
        st.builds(Cast, below, FLOATS),
        st.builds(Scale, below, st.floats(allow_nan=False), FLOATS, FLOATS),
        st.builds(
            Noise,
            below,
            st.sampled_from(["normal", "uniform"]),
            st.floats(min_value=0.0, allow_infinity=False),
            NAMES,
            FLOATS,
            FLOATS,
        ),
        st.builds(LowRank, below, below, below, st.floats(allow_nan=False), st.booleans(), FLOATS, st.none() | below),
        st.builds(
            ExpertLowRank,
            *[below] * 3,
            st.floats(allow_nan=False),
            st.integers(1, 3),
            st.integers(0, 2),
            st.booleans(),
            FLOATS,
        ),
        st.builds(LowRankFactors, below, st.integers(0, 3), st.booleans(), FLOATS),
        st.builds(SingularValues, below),
        st.integers(0, 3).flatmap(
            lambda n: st.builds(
                Merge,
                method=NAMES,
                spec=st.builds(TensorSpec, NAMES, FLOATS, SHAPES),
                inputs=st.lists(below, min_size=n, max_size=n).map(tuple),
                base=st.none() | below,
                parameters=PARAMETERS,
                input_parameters=st.lists(PARAMETERS, min_size=n, max_size=n).map(tuple),
                keys=st.lists(NAMES, min_size=n, max_size=n).map(tuple),
                compute_dtype=FLOATS,
            )
        ),
    )


TREES: st.SearchStrategy[Expression] = st.recursive(LEAVES | concatenations() | rows_of_leaves(), _above, max_leaves=8)
"""Any expression that the classes can hold."""
