"""What a transplant can be asked to do."""

from __future__ import annotations

from typing import Any

import pytest

from mergekit_ray.config.transplant import SCHEMES, TransplantOptions, methods
from mergekit_ray.core.errors import PlanError
from mergekit_ray.planning.transplant.rows import piece_weights


@pytest.mark.parametrize("method", methods())
def test_every_method_goes_without_options(method: str) -> None:
    assert TransplantOptions(method=method).to_data()["method"] == method


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"method": "ompp"}, "did you mean 'omp'"),
        ({"k": 0}, "k of omp"),
        ({"method": "mean", "k": 3}, "mean has no k"),
        ({"method": "subword", "metric": "cosine"}, "subword has no metric"),
        ({"metric": "cosine"}, "omp has no metric"),
        ({"method": "common_interpolation", "weights": "softmax"}, "weights of common_interpolation"),
        ({"method": "subword", "subword": "median"}, "subword cannot be 'median'"),
        ({"prefix_match": "both"}, "prefix_match cannot be 'both'"),
        ({"byte_match": ""}, "byte_match cannot be ''"),
        ({"scale": float("nan")}, "scale must be finite"),
        ({"noise": -1.0}, "noise must be finite and not negative"),
        ({"max_shard_size": 0}, "at least one byte"),
    ],
)
def test_wrong_ones_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        TransplantOptions(**wrong)


def test_only_what_decides_is_written_down() -> None:
    assert TransplantOptions(seed=4, max_shard_size=10).to_data() == {"method": "omp"}
    full = TransplantOptions(
        "common_interpolation", 3, "cosine", "barycentric", prefix_match="yes", magikarp=True, scale=0.5, noise=0.1
    )
    assert TransplantOptions(**full.to_data()) == full


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_weights_of_pieces(scheme: str, count: int) -> None:
    embedding, head = (piece_weights(scheme, count, is_head=is_head) for is_head in (False, True))
    assert embedding == head[::-1]
    assert sum(embedding) == pytest.approx(count if scheme == "sum" else 1)
    assert piece_weights(scheme, 0, is_head=False) == ()
