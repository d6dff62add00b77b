"""Sign election on cases small enough to do by hand."""

from __future__ import annotations

import pytest
import torch

from support.operands import merge


def ties(deltas: list[list[float]], weights: list[float], base: list[float] | None = None, **parameters: float) -> list:
    start = torch.tensor(base or [0.0] * len(deltas[0]))
    merged = merge(
        "ties",
        [start + torch.tensor(delta) for delta in deltas],
        start,
        parameters=parameters,
        input_parameters=[{"weight": weight} for weight in weights],
    )
    return (merged - start).tolist()


def test_what_disagrees_is_left_out_of_sum_and_divisor() -> None:
    assert ties([[4.0], [2.0], [-1.0]], [1.0, 1.0, 1.0]) == [3.0]
    assert ties([[4.0], [2.0], [-1.0]], [1.0, 1.0, 1.0], normalize=False) == [6.0]
    assert ties([[-4.0], [2.0], [-1.0]], [0.5, 1.0, 1.5]) == [-1.75]


def test_a_tie_elects_plus() -> None:
    assert ties([[3.0, -3.0], [-3.0, 3.0]], [1.0, 1.0]) == [3.0, 3.0]


def test_a_zero_agrees_with_nobody() -> None:
    """sign(0) is 0: a model without a change here does not dilute the average."""
    assert ties([[4.0, 0.0], [0.0, 0.0]], [1.0, 1.0]) == [4.0, 0.0]


def test_negative_weights_turn_the_contribution() -> None:
    """d = (4, 2): both agree; the divisor is Σ m w = 2 − 1."""
    assert ties([[2.0], [-2.0]], [2.0, -1.0]) == [6.0]


@pytest.mark.parametrize("weights", [[1.0, -1.0], [0.1, -0.1], [0.3, -0.3]])
def test_weights_that_cancel_divide_by_one(weights: list[float]) -> None:
    assert ties([[1.0], [-1.0]], weights) == pytest.approx([2 * weights[0]])


def test_weights_that_cancel_but_for_rounding_divide_by_one() -> None:
    """0.1 + 0.2 − 0.3 is 5.6e-17 in float64 and something else in float32; it means 0."""
    assert ties([[1.0], [1.0], [-1.0]], [0.1, 0.2, -0.3]) == pytest.approx([0.6])


def test_weights_of_zero() -> None:
    assert ties([[1.0], [5.0]], [1.0, 0.0]) == [1.0]
    assert ties([[1.0], [5.0]], [0.0, 0.0]) == [0.0]
    assert ties([[1.0], [5.0]], [0.0, 0.0], normalize=False) == [0.0]


def test_lambda_scales_the_change() -> None:
    assert ties([[4.0], [2.0]], [1.0, 1.0], [8.0], **{"lambda": 0.5}) == [1.5]


def test_small_weights_are_not_taken_for_zero() -> None:
    assert ties([[4.0], [2.0]], [1e-12, 1e-12]) == pytest.approx([3.0])


def test_trim_then_elect() -> None:
    """Each keeps 2 of 4: (8, 6, 0, 0) and (0, 0, −5, 7)."""
    start = torch.zeros(4)
    merged = merge(
        "ties",
        [torch.tensor([8.0, 6.0, 1.0, -2.0]), torch.tensor([1.0, -2.0, -5.0, 7.0])],
        start,
        input_parameters=[{"weight": 1.0, "density": 0.5}, {"weight": 1.0, "density": 0.5}],
    )
    assert merged.tolist() == [8.0, 6.0, -5.0, 7.0]


def test_int8_mask_has_no_effect() -> None:
    assert ties([[4.0, 1.0], [2.0, -3.0]], [1.0, 1.0], int8_mask=1) == ties([[4.0, 1.0], [2.0, -3.0]], [1.0, 1.0])
