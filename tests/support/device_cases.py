"""One expression of every merge method and of every other kind: what a device must calculate as the CPU does."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from mergekit_ray.core.declaration import BaseUse
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.expressions import (
    ZEROS,
    BlockScaled,
    Cast,
    Concat,
    Constant,
    ExpertLowRank,
    Expression,
    Literal,
    LowRank,
    LowRankFactors,
    Merge,
    Mxfp4,
    Noise,
    Scale,
    SingularValues,
    gathered,
    rows,
)
from mergekit_ray.core.registry import METHODS
from mergekit_ray.core.tensors import TensorSpec
from mergekit_ray.evaluation.device.evaluate import DeviceEvaluation, DeviceSession
from mergekit_ray.evaluation.scratch import TORCH_DTYPES
from mergekit_ray.methods.shared.protocol import is_portable
from support.memory_inputs import DTYPES, Inputs
from support.references.merge import ulp
from support.references.rows import mapping, runs_of

SHAPE = (263, 1009)
"""Of most tensors: 265,367 elements, a block and a bit, in rows and runs that end nowhere together."""

MATRIX = (60, 41)
"""For methods that decompose."""


@dataclass(frozen=True)
class MethodCase:
    """A merge.

    Attributes:
        parameters: global ones.
        weights: parameters of each model.
        is_exact: whether its result is the CPU's to the bit. Otherwise it rests on sums of many numbers, in float64,
            which are taken in another order elsewhere, or on a library's decompositions.
        tolerance: how far results may be apart beside an ulp, as part of the largest element.
    """

    method: str
    parameters: dict[str, Any] = field(default_factory=dict)
    weights: tuple[dict[str, Any], ...] = ({}, {}, {})
    has_base: bool = True
    shape: tuple[int, ...] = SHAPE
    is_exact: bool = True
    tolerance: float = 0.0

    def __str__(self) -> str:
        given = [f"{name}={value}" for name, value in self.parameters.items()]
        return "-".join([self.method, *given, "x".join(map(str, self.shape))])

    def tree(self, inputs: Inputs, dtype: torch.dtype = torch.bfloat16, out: DType | None = None) -> Merge:
        """The merge of random models, near each other as fine-tunes are."""
        generator = torch.Generator().manual_seed(5)
        base = torch.randn(self.shape, generator=generator)
        shared = torch.randn(self.shape, generator=generator)
        xs = []
        for _ in self.weights:
            own = torch.randn(self.shape, generator=generator)
            changed = torch.rand(self.shape, generator=generator) < 0.8
            xs.append((base + (0.01 * shared + 0.03 * own) * changed).to(dtype))
        loads = [inputs.load(f"model {index}", x) for index, x in enumerate(xs)]
        return Merge(
            self.method,
            TensorSpec("out", out or DTYPES[dtype], self.shape),
            tuple(loads),
            base=inputs.load("base", base.to(dtype)) if self.has_base else None,
            parameters=self.parameters,
            input_parameters=self.weights,
            keys=tuple(f"key {index}" for index in range(len(xs))),
        )


def weighted(*weights: float, **others: Any) -> tuple[dict[str, Any], ...]:
    return tuple({"weight": weight} | others for weight in weights)


W = weighted(0.3, 0.5, 0.4)
TRIMMED = weighted(0.3, 0.5, 0.4, density=0.4)
SPECTRAL = {"shape": MATRIX, "is_exact": False, "tolerance": 1e-6}

_WRITTEN = [
    MethodCase("linear", weights=W, has_base=False),
    MethodCase("passthrough", weights=({"scale": 1.3},), has_base=False),
    MethodCase("task_arithmetic", {"normalize": True}, W),
    MethodCase("slerp", {"t": 0.4}, ({},), is_exact=False),
    MethodCase("nuslerp", {}, weighted(0.3, 0.6), is_exact=False),
    MethodCase("nuslerp", {"nuslerp_flatten": False}, weighted(0.3, 0.6), has_base=False, is_exact=False),
    MethodCase("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}, weighted(0.3, 0.6), is_exact=False),
    MethodCase("multislerp", weights=W, is_exact=False),
    MethodCase("karcher", has_base=False, is_exact=False),
    MethodCase("ties", {"normalize": True}, TRIMMED),
    MethodCase("ties", {"normalize": False}, weighted(1.0, -0.5, density=0.7), shape=(7,)),
    MethodCase("dare_linear", weights=TRIMMED, is_exact=False),
    MethodCase("dare_linear", {"rescale": False}, TRIMMED),
    MethodCase("dare_ties", {"normalize": True}, TRIMMED, is_exact=False),
    MethodCase("dare_ties", {"rescale": False}, TRIMMED),
    MethodCase("breadcrumbs", {"rescale": True}, weighted(0.3, 0.5, density=0.6, gamma=0.05), is_exact=False),
    MethodCase("breadcrumbs_ties", {}, weighted(0.3, 0.5, density=0.6, gamma=0.05)),
    MethodCase("della_linear", {"rescale": False}, weighted(0.3, 0.5, density=0.5, epsilon=0.2)),
    MethodCase("della", {}, weighted(0.3, 0.5, density=0.5, epsilon=0.2), is_exact=False),
    MethodCase("model_stock", is_exact=False),
    MethodCase("model_stock", {"filter_wise": True}, is_exact=False),
    MethodCase("sce", {"select_topk": 0.3}, is_exact=False),
    MethodCase("sce", {}, is_exact=False),
    MethodCase("ram", {"epsilon": 0.01}),
    MethodCase("ramplus_tl", {"epsilon": 0.01}),
    MethodCase("nearswap", {"t": 0.01}, ({},)),
    MethodCase("arcee_fusion", {}, ({},)),
    MethodCase("consensus_ta", {"k": 2}, weighted(0.3, 0.5, 0.4, tall_mask_lambda=0.4)),
    MethodCase("consensus_ties", {"k": 2}, weighted(0.3, 0.5, 0.4, density=0.3)),
    MethodCase("cabs", {"n": 2, "m": 7}, weighted(0.3, 0.5)),
    MethodCase("pcb", {}, weighted(0.3, 0.5, density=0.2), shape=(90, 101)),
    MethodCase("geometric_median", has_base=False, is_exact=False),
    MethodCase("tsv_m", weights=weighted(1.0, 0.8), **SPECTRAL),
    MethodCase("iso_c", weights=weighted(1.0, 0.8), **SPECTRAL),
    MethodCase("iso_cts", weights=weighted(1.0, 0.8), **SPECTRAL),
    MethodCase("wudi", {"steps": 5}, weighted(1.0, 0.8), shape=MATRIX, is_exact=False, tolerance=1e-4),
    MethodCase("iso_c", weights=weighted(1.0, 0.8), shape=(50,)),
]


def usual_case(name: str) -> MethodCase:
    """A method as its declaration has it: defaults, a half for what has none, three models or as many as it takes."""
    method = METHODS.get(name)
    count = max(method.min_models, min(method.max_models or 3, 3))
    per_model, overall = (
        {field.alias or key: 0.5 for key, field in model.model_fields.items() if field.is_required()}
        for model in (method.model_parameters, method.global_parameters)
    )
    has_base = method.base is not BaseUse.FORBIDDEN
    return MethodCase(name, overall, (per_model,) * count, has_base, is_exact=False, tolerance=1e-5)


METHOD_CASES = [
    *_WRITTEN,
    *(usual_case(name) for name in METHODS.names() if name not in {case.method for case in _WRITTEN}),
]
"""At least one of every method there is."""

ON_DEVICES = [case for case in METHOD_CASES if is_portable(METHODS.get(case.method))]
"""Of methods that devices are given."""


def normal(seed: int, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def whole_numbers(seed: int, shape: tuple[int, ...], high: int = 256) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def low_rank(inputs: Inputs, *, transposed: bool, has_magnitude: bool) -> Expression:
    rows, columns, rank = 67, 301, 5
    a, b = normal(1, (rank, rows if transposed else columns)), normal(2, (columns if transposed else rows, rank))
    magnitude = None
    if has_magnitude:
        size = columns if transposed else rows
        magnitude = inputs.load("magnitude", normal(3, (size,)).abs().float())
    return LowRank(
        inputs.load("x", normal(0, (rows, columns))),
        inputs.load("a", a),
        inputs.load("b", b),
        0.3,
        transposed,
        DType.BF16,
        magnitude,
    )


def expert_low_rank(inputs: Inputs, *, transposed: bool) -> Expression:
    outputs, columns, rank, experts = 31, 67, 5, 4
    return ExpertLowRank(
        inputs.load("x", normal(0, (2, *((columns, outputs) if transposed else (outputs, columns))))),
        inputs.load("a", normal(1, (2 * rank, columns))),
        inputs.load("b", normal(2, (outputs, rank * experts))),
        0.3,
        experts,
        1,
        transposed,
        DType.BF16,
    )


def block_scaled(inputs: Inputs, dtype: torch.dtype) -> Expression:
    codes = whole_numbers(4, (130, 200), 0x78).view(dtype)
    scales = normal(5, (2, 2), torch.float32).abs()
    return BlockScaled(inputs.load("m", codes, "codes"), inputs.load("m", scales, "scales"), (128, 128))


def mxfp4(inputs: Inputs) -> Expression:
    blocks = whole_numbers(6, (2, 9, 3, 16))
    scales = whole_numbers(7, (2, 9, 3)) // 4 + 96
    return Mxfp4(inputs.load("m", blocks, "blocks"), inputs.load("m", scales, "scales"), "out")


def literal(inputs: Inputs) -> Expression:
    del inputs
    values = normal(8, (301,), torch.float32).tolist()
    return Literal.of(TensorSpec("l", DType.BF16, (301,)), struct.pack("<301f", *values))


def concatenated(inputs: Inputs) -> Expression:
    parts = (
        Cast(inputs.load("a", normal(9, (300, 7))), DType.F32),
        Cast(literal(inputs), DType.F32),
        Constant(TensorSpec("c", DType.F32, (11,)), 0.1),
    )
    return Concat(parts, TensorSpec("out", DType.F32, (2412,)))


def gathered_rows(inputs: Inputs) -> Expression:
    parts = [inputs.load(name, normal(seed, (90, 301))) for seed, name in ((11, "a"), (12, "b"))]
    return gathered(parts, TensorSpec("out", DType.BF16, (260, 301)), runs_of(mapping(1, [90, 90], 260)))


def rows_in_order(inputs: Inputs) -> Expression:
    parts = [gathered_rows(inputs), low_rank(inputs, transposed=False, has_magnitude=False)]
    wanted = [(index % 2, index // 2) for index in range(120)]
    return rows(parts, TensorSpec("out", DType.BF16, (121, 301)), runs_of([*wanted, (ZEROS, 0)]))


def rows_of_an_embedding(inputs: Inputs) -> Expression:
    adapted = low_rank(inputs, transposed=True, has_magnitude=False)
    return rows([adapted], TensorSpec("out", DType.BF16, (150, 301)), runs_of(mapping(3, [67], 150, zeros=0.0)))


def rows_out_of_order(inputs: Inputs) -> Expression:
    parts = [Scale(inputs.load("x", normal(13, (90, 301))), 0.3, DType.BF16), gathered_rows(inputs)]
    return rows(parts, TensorSpec("out", DType.BF16, (150, 301)), runs_of(mapping(2, [90, 260], 150)))


def noisy(inputs: Inputs, distribution: str) -> Expression:
    return Noise(
        inputs.load("x", normal(10, (70_001,), torch.float32)), distribution, 0.1, "seed", DType.F32, DType.F32
    )


def difference(inputs: Inputs) -> Expression:
    case = MethodCase("task_arithmetic", {}, weighted(1.0), shape=MATRIX)
    return case.tree(inputs, torch.float32)


KIND_CASES: dict[str, Callable[[Inputs], Expression]] = {
    "load": lambda inputs: inputs.load("x", normal(0, SHAPE)),
    "cast": lambda inputs: Cast(inputs.load("x", normal(0, SHAPE, torch.float32)), DType.F16),
    "cast of float64": lambda inputs: Cast(inputs.load("x", normal(0, SHAPE, torch.float64)), DType.BF16),
    "scale": lambda inputs: Scale(inputs.load("x", normal(0, SHAPE)), 0.3, DType.BF16),
    "LoRA": lambda inputs: low_rank(inputs, transposed=False, has_magnitude=False),
    "LoRA, transposed": lambda inputs: low_rank(inputs, transposed=True, has_magnitude=False),
    "DoRA": lambda inputs: low_rank(inputs, transposed=False, has_magnitude=True),
    "DoRA, transposed": lambda inputs: low_rank(inputs, transposed=True, has_magnitude=True),
    "LoRA of experts": lambda inputs: expert_low_rank(inputs, transposed=False),
    "LoRA of experts, transposed": lambda inputs: expert_low_rank(inputs, transposed=True),
    "e4m3": lambda inputs: block_scaled(inputs, torch.float8_e4m3fn),
    "e5m2": lambda inputs: block_scaled(inputs, torch.float8_e5m2),
    "mxfp4": mxfp4,
    "literal": literal,
    "concatenation": concatenated,
    "gather": gathered_rows,
    "rows in order": rows_in_order,
    "rows out of order": rows_out_of_order,
    "rows of a LoRA, transposed": rows_of_an_embedding,
    "normal noise": lambda inputs: noisy(inputs, "normal"),
    "uniform noise": lambda inputs: noisy(inputs, "uniform"),
}
"""All of them are the CPU's to the bit, but for the norms of a DoRA."""

FACTOR_CASES: dict[str, Callable[[Inputs], Expression]] = {
    "factors": lambda inputs: LowRankFactors(difference(inputs), 6, False, DType.F32),
    "factors, transposed": lambda inputs: LowRankFactors(difference(inputs), 6, True, DType.F32),
    "norm alone": lambda inputs: LowRankFactors(difference(inputs), 0, False, DType.F32),
    "singular values": lambda inputs: SingularValues(difference(inputs)),
}


def on_device(
    session: DeviceSession,
    tree: Expression,
    inputs: Inputs,
    *,
    window: int | None = None,
    part: int | None = None,
    streamed: bool = False,
    **options: Any,
) -> torch.Tensor:
    """The whole result, window by window as a worker would have it: one is handed over while another comes back.

    Args:
        window: elements of a window, all by default.
        part: elements of a part of a window that is handed over at once, all by default.
        streamed: upload runs as they are computed, though all would fit.
    """
    size = tree.spec.num_elements
    out = torch.empty(size, dtype=TORCH_DTYPES[tree.spec.dtype])
    running: list[Callable[[], None]] = []
    step = window or max(1, size)
    for start in range(0, size, step):
        stop = min(start + step, size)
        pieces = inputs.pieces(tree, start, stop)
        staged = None if streamed else session.stage(tree, pieces)
        evaluation = DeviceEvaluation(session, tree, pieces, staged, **options)
        for first in range(start, stop, part or size):
            last = min(first + (part or size), stop)
            running.append(evaluation.start(first, last, out[first:last], is_last=last == stop))
            if len(running) > 1:
                running.pop(0)()
    for finish in running:
        finish()
    return out.view(tree.spec.shape)


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 0.0) -> None:
    """Within an ulp, and ``tolerance`` of the largest element."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    value = expected.to(torch.float64).numpy()
    largest = float(np.abs(value).max(initial=0.0))
    # Terms are at most a few times the largest result; where they cancel, float32 leaves this of them.
    allowed = ulp(value, expected.dtype) + 2.0**-22 * largest * (expected.dtype == torch.float32) + tolerance * largest
    wrong = ~(np.abs(found.to(torch.float64).numpy() - value) <= allowed)
    assert not wrong.any(), f"{wrong.sum()} of {wrong.size} elements differ"


def assert_same_choices(found: torch.Tensor, expected: torch.Tensor, base: torch.Tensor) -> None:
    """The same elements were changed: masks and selections are the CPU's."""
    assert torch.equal(found != base, expected != base)
