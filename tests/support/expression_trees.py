"""Random expressions for hypothesis."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.expressions import Cast, Expression, Load, Merge, Scale
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


def _above(below: st.SearchStrategy[Expression]) -> st.SearchStrategy[Expression]:
    return st.one_of(
        st.builds(Cast, below, FLOATS),
        st.builds(Scale, below, st.floats(allow_nan=False), FLOATS, FLOATS),
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


TREES: st.SearchStrategy[Expression] = st.recursive(loads_of_files(), _above, max_leaves=8)
"""Any expression that the classes can hold."""
