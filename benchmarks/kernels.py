"""Seconds per 64M elements of every merge method, through the evaluator and as one would write it in plain torch.

    python -m benchmarks.kernels [--elements 16777216] [--threads 2]

Three models and a base in bfloat16 (slerp: one and a base), output in bfloat16, all in memory: no disk, no network. The
plain formulations work on whole tensors in float32 and trim by the whole tensor's order, as the formulas read.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.expressions import Load, Merge, Stored
from mergekit_ray.core.tensors import Location, TensorSpec
from mergekit_ray.evaluation.evaluate import Evaluation
from mergekit_ray.evaluation.nodes.base import Piece
from mergekit_ray.evaluation.pool import ComputePool

REFERENCE_ELEMENTS = 64 << 20
WEIGHTS = (0.3, 0.5, 0.4)
DENSITY = 0.5

Plain = Callable[[Sequence[torch.Tensor], torch.Tensor], torch.Tensor]


def plain_linear(xs: Sequence[torch.Tensor], base: torch.Tensor) -> torch.Tensor:
    """Weighted average."""
    del base
    stacked = torch.stack([x.float() for x in xs])
    weights = torch.tensor(WEIGHTS).view(-1, 1)
    return (stacked * weights).sum(dim=0) / weights.sum()


def plain_slerp(xs: Sequence[torch.Tensor], base: torch.Tensor) -> torch.Tensor:
    """Along the arc, by unit vectors."""
    b, x = base.float(), xs[0].float()
    theta = torch.acos(torch.dot(b / b.norm(), x / x.norm()))
    return torch.sin(0.6 * theta) / torch.sin(theta) * b + torch.sin(0.4 * theta) / torch.sin(theta) * x


def plain_task_arithmetic(xs: Sequence[torch.Tensor], base: torch.Tensor) -> torch.Tensor:
    """Weighted sum of task vectors."""
    b = base.float()
    return b + sum((w * (x.float() - b) for w, x in zip(WEIGHTS, xs, strict=True)), torch.zeros(()))


def plain_ties(xs: Sequence[torch.Tensor], base: torch.Tensor) -> torch.Tensor:
    """Trim by a full order of magnitudes, then elect."""
    b = base.float()
    deltas = []
    for x in xs:
        delta = x.float() - b
        order = delta.abs().argsort(descending=True, stable=True)
        delta[order[int(DENSITY * delta.numel()) :]] = 0
        deltas.append(delta)
    return b + _elect(deltas, normalize=True)


def plain_dare_linear(xs: Sequence[torch.Tensor], base: torch.Tensor) -> torch.Tensor:
    """Random trim, rescaled, weighted sum."""
    b = base.float()
    return b + sum((w * _drop(x.float() - b) for w, x in zip(WEIGHTS, xs, strict=True)), torch.zeros(()))


def plain_dare_ties(xs: Sequence[torch.Tensor], base: torch.Tensor) -> torch.Tensor:
    """Random trim, rescaled, then elect."""
    b = base.float()
    return b + _elect([_drop(x.float() - b) for x in xs], normalize=False)


def _drop(delta: torch.Tensor) -> torch.Tensor:
    trimmed = delta * torch.bernoulli(torch.full_like(delta, DENSITY))
    return trimmed * (delta.abs().sum() / trimmed.abs().sum())


def _elect(deltas: Sequence[torch.Tensor], *, normalize: bool) -> torch.Tensor:
    weights = torch.tensor(WEIGHTS).view(-1, 1)
    weighted = torch.stack(list(deltas)) * weights
    sign = torch.where(weighted.sum(dim=0) >= 0, 1.0, -1.0)
    mask = weighted.sign() == sign
    merged = (weighted * mask).sum(dim=0)
    if not normalize:
        return merged
    divisor = (mask * weights).sum(dim=0)
    return merged / torch.where(divisor == 0, 1.0, divisor)


WEIGHTED = tuple({"weight": weight} for weight in WEIGHTS)
TRIMMED = tuple({"weight": weight, "density": DENSITY} for weight in WEIGHTS)
METHODS: dict[str, tuple[dict[str, Any], tuple[dict[str, Any], ...], bool, Plain]] = {
    "linear": ({}, WEIGHTED, False, plain_linear),
    "slerp": ({"t": 0.4}, ({},), True, plain_slerp),
    "task_arithmetic": ({}, WEIGHTED, True, plain_task_arithmetic),
    "ties": ({}, TRIMMED, True, plain_ties),
    "dare_linear": ({}, TRIMMED, True, plain_dare_linear),
    "dare_ties": ({}, TRIMMED, True, plain_dare_ties),
}


def expression_of(
    name: str, parameters: dict[str, Any], per_model: Sequence[dict[str, Any]], num_elements: int, *, has_base: bool
) -> Merge:
    """The merge as a plan would hold it."""
    spec = TensorSpec("x", DType.BF16, (num_elements,))
    loads = [
        Load(model, spec, Location("model.safetensors", 0, spec.num_bytes))
        for model in ("base", *(f"model {index}" for index in range(len(per_model))))
    ]
    return Merge(
        method=name,
        spec=spec,
        inputs=tuple(loads[1:]),
        base=loads[0] if has_base else None,
        parameters=parameters,
        input_parameters=tuple(per_model),
        keys=tuple(load.model for load in loads[1:]),
    )


def best_of(function: Callable[[], object], repeats: int) -> float:
    """Seconds of the quickest of ``repeats`` runs."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=REFERENCE_ELEMENTS // 4, help="size of the tensors")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="the best counts")
    options = parser.parse_args()

    generator = torch.Generator().manual_seed(0)
    base = torch.randn(options.elements, generator=generator).mul_(0.02).bfloat16()
    xs = [torch.randn(options.elements, generator=generator).mul_(0.002).add_(base).bfloat16() for _ in WEIGHTS]
    tensors = dict(zip(("base", "model 0", "model 1", "model 2"), (base, *xs), strict=True))
    out = torch.empty_like(base)
    pool = ComputePool(options.threads)
    scale = REFERENCE_ELEMENTS / options.elements

    print(f"torch {torch.__version__}, {options.threads} threads, seconds per 64M elements")
    print(f"{'method':16} {'evaluator':>10} {'plain torch':>12} {'ratio':>7}")
    for name, (parameters, per_model, has_base, plain) in METHODS.items():
        merge = expression_of(name, parameters, per_model, options.elements, has_base=has_base)
        loads = [*merge.inputs, *([merge.base] if merge.base is not None else [])]
        pieces: dict[Stored, Piece] = {load: Piece(tensors[load.model], 0) for load in loads if isinstance(load, Load)}

        def evaluate(merge: Merge = merge, pieces: dict[Stored, Piece] = pieces) -> None:
            Evaluation(merge, pieces, pool).fill(0, options.elements, out)

        def whole(plain: Plain = plain) -> None:
            out.copy_(plain(xs, base))

        # Inside the evaluator one chunk is one thread's; the plain formulation has torch's threads to itself.
        torch.set_num_threads(1)
        ours = best_of(evaluate, options.repeats) * scale
        torch.set_num_threads(options.threads)
        theirs = best_of(whole, 1 if name == "ties" else options.repeats) * scale
        print(f"{name:16} {ours:10.3f} {theirs:12.3f} {theirs / ours:6.1f}x", flush=True)
    pool.close()


if __name__ == "__main__":
    main()
