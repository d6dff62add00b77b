"""Codes with scales against float64 references written from the formats, for every way of cutting."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import MergeError
from mergekit_ray.core.expressions import BlockScaled, Cast, Expression, Merge, Mxfp4
from mergekit_ray.core.tensors import TensorSpec
from mergekit_ray.evaluation.evaluate import Evaluation
from mergekit_ray.evaluation.nodes.base import Compilation
from mergekit_ray.evaluation.nodes.quantised import boxes, parts
from mergekit_ray.evaluation.pool import ComputePool
from support.memory_inputs import Inputs, evaluate

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def cuts(num_elements: int) -> list[tuple[int, int]]:
    """Numbers of threads and sizes of chunks: all at one go, and down to a few dozen pieces."""
    few = max(1, num_elements // 40)
    return [(1, 1 << 20), (1, few | 1), (2, 3 * few + 1), (3, 4097)]


def minifloat(codes: Any, exponent_bits: int, mantissa_bits: int) -> Any:
    """The numbers that codes of a small float stand for, by the definition; NaN and infinities are left aside."""
    codes = np.asarray(codes, dtype=np.int64)
    bias = 2 ** (exponent_bits - 1) - 1
    mantissa = (codes & ((1 << mantissa_bits) - 1)) / 2.0**mantissa_bits
    exponent = (codes >> mantissa_bits) & ((1 << exponent_bits) - 1)
    sign = 1.0 - 2.0 * (codes >> (mantissa_bits + exponent_bits))
    normal = (1 + mantissa) * 2.0 ** (exponent - float(bias))
    return sign * np.where(exponent == 0, mantissa * 2.0 ** (1.0 - bias), normal)


def random_codes(seed: int, shape: tuple[int, ...], dtype: torch.dtype = E4M3) -> torch.Tensor:
    """Codes of finite numbers."""
    codes = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    largest = 0x7E if dtype == E4M3 else 0x7B
    return torch.where((codes & 0x7F) > largest, codes & 0x80, codes).view(dtype)


def fp8_reference(codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, ...]) -> torch.Tensor:
    """In float64, then once to float32."""
    bits = (4, 3) if codes.dtype == E4M3 else (5, 2)
    grid = tuple(-(-size // b) for size, b in zip(codes.shape, block, strict=True))
    spread = scales.double().numpy().reshape(grid)
    for axis, (size, b) in enumerate(zip(codes.shape, block, strict=True)):
        spread = np.take(spread, np.arange(size) // b, axis=axis)
    return torch.from_numpy(np.asarray(minifloat(codes.view(torch.uint8), *bits) * spread)).float()


def mxfp4_reference(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    pairs = np.stack([blocks.numpy() & 15, blocks.numpy() >> 4], axis=-1).reshape(*scales.shape, 32)
    values = minifloat(pairs, 2, 1) * 2.0 ** (scales.numpy()[..., None].astype(np.float64) - 127)
    return torch.from_numpy(values.reshape(*scales.shape[:2], -1).swapaxes(1, 2).copy()).float()


def block_scaled(
    inputs: Inputs, codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, ...], model: str = "m"
) -> BlockScaled:
    return BlockScaled(inputs.load(model, codes, "w"), inputs.load(model, scales, "w_scale_inv"), block)


def random_packed(seed: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
    return blocks, torch.randint(0, 253, shape, generator=generator, dtype=torch.uint8)


def mxfp4(inputs: Inputs, blocks: torch.Tensor, scales: torch.Tensor, model: str = "m") -> Mxfp4:
    return Mxfp4(inputs.load(model, blocks, "x_blocks"), inputs.load(model, scales, "x_scales"), "x")


def average(*inputs: Expression, dtype: DType = DType.BF16, compute: DType = DType.F32, weight: float = 1.0) -> Merge:
    spec = TensorSpec("out", dtype, inputs[0].spec.shape)
    return Merge(
        "linear",
        spec,
        inputs,
        None,
        {},
        ({"weight": weight},) * len(inputs),
        ("",) * len(inputs),
        compute_dtype=compute,
    )


@pytest.mark.parametrize(("dtype", "bits"), [(E4M3, (4, 3)), (E5M2, (5, 2))])
def test_every_code_is_the_number_it_stands_for(dtype: torch.dtype, bits: tuple[int, int]) -> None:
    inputs, codes = Inputs(), torch.arange(256, dtype=torch.uint8)
    found = evaluate(block_scaled(inputs, codes.view(dtype), torch.tensor(1.0), (256,)), inputs, allow_non_finite=True)
    theirs = codes.view(dtype).float()
    assert torch.equal(found.isnan(), theirs.isnan())
    assert torch.equal(found.isinf(), theirs.isinf())
    finite = theirs.isfinite()
    assert torch.equal(found[finite].double(), torch.from_numpy(minifloat(codes[finite], *bits)))
    # Zeros keep their sign.
    assert torch.equal(found.signbit()[finite], codes[finite] >= 128)


def test_every_code_of_four_bits_at_every_exponent() -> None:
    inputs = Inputs()
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 254, 16, 16).contiguous()
    scales = torch.arange(254, dtype=torch.uint8).view(1, 254, 1).expand(1, 254, 16).contiguous()
    found = evaluate(mxfp4(inputs, blocks, scales), inputs, allow_non_finite=True)
    assert torch.equal(found, mxfp4_reference(blocks, scales))  # infinities at the very top on both sides
    assert float(found[0, 1, 0]) == 0.0
    assert float(found[0, 2, 0]) == 2.0**-128  # the smallest there is, no normal number


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize(
    ("shape", "block", "scales"),
    [
        ((300, 500), (128, 128), (3, 4)),
        ((256, 384), (128, 128), (2, 3)),
        ((70, 130), (7, 5), (10, 26)),
        ((70, 130), (1, 130), (70,)),
        ((70, 130), (1, 130), (70, 1)),
        ((70, 130), (70, 1), (1, 130)),
        ((70, 130), (70, 130), ()),
        ((70, 130), (70, 130), (1,)),
        ((70, 130), (1, 32), (70, 5)),
        ((3, 50, 70), (1, 16, 32), (3, 4, 3)),
        ((3, 50, 70), (1, 50, 70), (3, 1, 1)),
        ((3, 50, 70), (1, 50, 1), (3, 1, 70)),
        ((5000,), (128,), (40,)),
        ((), (), ()),
    ],
)
def test_scales_of_blocks(
    dtype: torch.dtype, shape: tuple[int, ...], block: tuple[int, ...], scales: tuple[int, ...]
) -> None:
    inputs, codes = Inputs(), random_codes(1, shape, dtype)
    factors = torch.rand(scales, generator=torch.Generator().manual_seed(2)) * 0.01
    expected = fp8_reference(codes, factors, block)
    tree = block_scaled(inputs, codes, factors, block)
    for num_threads, chunk_elements in cuts(expected.numel()):
        assert torch.equal(evaluate(tree, inputs, num_threads=num_threads, chunk_elements=chunk_elements), expected)
    window = max(1, expected.numel() // 9)
    assert torch.equal(evaluate(tree, inputs, window=window, chunk_elements=window // 2 + 1), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_of_sixteen_bits(dtype: torch.dtype) -> None:
    inputs, codes = Inputs(), random_codes(3, (40, 60))
    scales = torch.rand(2, 2, generator=torch.Generator().manual_seed(4)).to(dtype)
    found = evaluate(block_scaled(inputs, codes, scales, (32, 32)), inputs)
    assert torch.equal(found, fp8_reference(codes, scales, (32, 32)))


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 2), (2, 33, 3), (7, 4, 1)])
def test_packed_codes_are_transposed(shape: tuple[int, int, int]) -> None:
    inputs = Inputs()
    blocks, scales = random_packed(5, *shape)
    tree, expected = mxfp4(inputs, blocks, scales), mxfp4_reference(blocks, scales)
    for num_threads, chunk_elements in cuts(expected.numel()):
        assert torch.equal(evaluate(tree, inputs, num_threads=num_threads, chunk_elements=chunk_elements), expected)
    for window in (1, 100, 777) if expected.numel() < 200 else (100, 777):
        assert torch.equal(evaluate(tree, inputs, window=window), expected)


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 2), st.data())
@settings(max_examples=40, deadline=None)
def test_any_run_of_packed_codes(e: int, n: int, g: int, data: st.DataObject) -> None:
    inputs = Inputs()
    blocks, scales = random_packed(6, e, n, g)
    tree, expected = mxfp4(inputs, blocks, scales), mxfp4_reference(blocks, scales)
    chunk = data.draw(st.integers(1, expected.numel() + 1))
    window = data.draw(st.integers(max(1, expected.numel() // 5), expected.numel()))
    assert torch.equal(evaluate(tree, inputs, chunk_elements=chunk, window=window), expected)


def test_packed_codes_as_transformers_has_them() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = random_packed(7, 4, 36, 3)
    scales = scales // 8 + 110  # where its bfloat16 is exact
    inputs = Inputs()
    found = evaluate(Cast(mxfp4(inputs, blocks, scales), DType.BF16), inputs, chunk_elements=1000)
    assert torch.equal(found, convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16))


@pytest.mark.parametrize("compute", [DType.F32, DType.F64, DType.BF16])
def test_a_merge_of_codes_and_numbers(compute: DType) -> None:
    inputs, codes = Inputs(), random_codes(8, (300, 200))
    scales = torch.rand(3, 2, generator=torch.Generator().manual_seed(9)) * 0.01
    plain = torch.randn(300, 200, generator=torch.Generator().manual_seed(10)).bfloat16()
    tree = average(block_scaled(inputs, codes, scales, (128, 128)), inputs.load("n", plain), compute=compute)
    dequantised = fp8_reference(codes, scales, (128, 128))
    if compute is DType.BF16:
        expected = (dequantised.bfloat16() + plain) / 2
    else:
        expected = ((dequantised.double() + plain.double()) / 2).bfloat16()
    allowed = 2.0**-7 if compute is DType.BF16 else 2.0**-8
    for window in (None, 1000):
        found = evaluate(tree, inputs, window=window, chunk_elements=777).double()
        assert ((found - expected.double()).abs() <= allowed * expected.double().abs() + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_node_gives_its_scratch_back(dtype: torch.dtype) -> None:
    """Operands of a merge are filled one after the other: they share it."""
    inputs, pool = Inputs(), ComputePool(1)
    for tree in (
        mxfp4(inputs, *random_packed(16, 3, 5, 2)),
        block_scaled(inputs, random_codes(17, (40, 60)), torch.ones(2, 2), (32, 32)),
    ):
        node = Compilation(inputs.pieces(tree), pool).compile(tree)
        held = pool.scratch.take(3, torch.float32).zero_()
        node.fill(7, 800, torch.empty(793, dtype=dtype))
        assert {of: used for of, used in pool.scratch.mark().items() if used} == {torch.float32: 1}
        assert not held.any()
        pool.scratch.release({})


def test_scratch_does_not_grow_with_the_tensor() -> None:
    def buffers_after(num_matrices: int) -> dict[torch.dtype, int]:
        inputs, pool = Inputs(), ComputePool(1)
        blocks, scales = random_packed(11, num_matrices, 64, 8)
        codes, factors = random_codes(12, (num_matrices * 64, 256)), torch.ones(num_matrices * 2, 8)
        trees = mxfp4(inputs, blocks, scales), block_scaled(inputs, codes, factors, (32, 32))
        for tree in trees:
            for compute in (torch.float32, torch.float64):
                out = torch.empty(tree.spec.num_elements, dtype=compute)
                evaluation = Evaluation(tree, inputs.pieces(tree), pool, chunk_elements=5000)
                evaluation.fill(0, len(out), out)
        assert not any(pool.scratch.mark().values()), "everything taken was released"
        return pool.scratch.held_elements

    few, many = buffers_after(4), buffers_after(16)
    assert few == many
    assert sum(dtype.itemsize * size for dtype, size in many.items()) < 5000 * 48


class TestBadValues:
    """What is no finite number is named by model, tensor and index, whatever it is stored as."""

    @pytest.mark.parametrize("weight", [1.0, 0.0])
    @pytest.mark.parametrize(("dtype", "code"), [(E4M3, 0x7F), (E4M3, 0xFF), (E5M2, 0x7C), (E5M2, 0xFE)])
    def test_codes(self, dtype: torch.dtype, code: int, weight: float) -> None:
        inputs, codes = Inputs(), random_codes(13, (100, 100), dtype)
        codes.view(torch.uint8)[90, 7] = code
        bad = block_scaled(inputs, codes, torch.ones(1), (100, 100), "m1")
        good = inputs.load("m2", torch.ones(100, 100))
        spec = TensorSpec("out", DType.BF16, (100, 100))
        tree = Merge("linear", spec, (bad, good), None, {}, ({"weight": weight}, {"weight": 1.0}), ("", ""))
        for window in (None, 3000):
            with pytest.raises(MergeError) as caught:
                evaluate(tree, inputs, window=window, references={"m1": "org/damaged"})
            assert caught.value.where == "model org/damaged, tensor 'w'"
            expected = f"code 0x{code:02X}, no finite number, in the input, first at flat index 9007 (1 such"
            assert expected in caught.value.what
        assert evaluate(tree, inputs, allow_non_finite=True).isfinite().sum() == 100 * 100 - 1

    @pytest.mark.parametrize("method", ["linear", "ties"])
    def test_shared_exponents(self, method: str) -> None:
        inputs = Inputs()
        blocks, scales = random_packed(14, 3, 4, 2)
        scales = scales // 8 + 110
        scales[2, 1, 1] = 255
        base = inputs.load("m0", torch.zeros(3, 64, 4)) if method == "ties" else None
        parameters = {"weight": 0.0, "density": 0.1} if method == "ties" else {"weight": 1.0}
        bad = mxfp4(inputs, blocks, scales, "m1")
        tree = Merge(method, TensorSpec("o", DType.BF16, (3, 64, 4)), (bad,), base, {}, (parameters,), ("",))
        with pytest.raises(MergeError, match="code 0xFF, no finite number, in the input, first at flat index 19 ") as e:
            evaluate(tree, inputs)
        assert e.value.where == "model m1, tensor 'x_scales'"

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_scales(self, value: float) -> None:
        inputs, codes, scales = Inputs(), random_codes(15, (10, 10)), torch.ones(10, 1)
        scales[4] = value
        tree = block_scaled(inputs, codes, scales, (1, 10))
        for root in (tree, Cast(tree, DType.BF16)):
            with pytest.raises(MergeError, match=f"{value} in the input, first at flat index 4 ") as caught:
                evaluate(root, inputs)
            assert caught.value.where == "model m, tensor 'w_scale_inv'"

    def test_a_code_that_would_be_nan_elsewhere_is_a_number(self) -> None:
        inputs = Inputs()
        blocks = torch.full((1, 2, 1, 16), 0xFF, dtype=torch.uint8)  # twice -6 each
        found = evaluate(mxfp4(inputs, blocks, torch.full((1, 2, 1), 127, dtype=torch.uint8)), inputs)
        assert (found == -6.0).all()

    def test_overflow_is_told_apart(self) -> None:
        inputs = Inputs()
        codes = torch.full((4, 4), 0x7E, dtype=torch.uint8).view(E4M3)  # 448
        tree = block_scaled(inputs, codes, torch.tensor([3e38]), (4, 4))
        with pytest.raises(MergeError, match=r"overflow float32 .* though all inputs are finite"):
            evaluate(tree, inputs)


RUNS = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6)).flatmap(
    lambda shape: st.tuples(
        st.just(shape),
        *(st.integers(0, shape[0] * shape[1] * shape[2]) for _ in range(2)),
    )
)


@given(RUNS)
def test_boxes_cover_a_run_in_order(case: tuple[tuple[int, int, int], int, int]) -> None:
    shape, *ends = case
    start, stop = sorted(ends)
    index = np.arange(np.prod(shape)).reshape(shape)
    found = list(boxes(start, stop, shape))
    assert len(found) <= 5
    elements = [index[b.a0 : b.a1, b.b0 : b.b1, b.c0 : b.c1].reshape(-1) for b in found]
    assert [len(e) for e in elements] == [b.num_elements for b in found]
    assert np.array_equal(np.concatenate([np.arange(0), *elements]), np.arange(start, stop))


@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 20))
def test_parts_cover_a_line_cell_by_cell(start: int, length: int, size: int) -> None:
    found = list(parts(start, start + length, size))
    assert len(found) <= 3
    covered = [i for part in found for i in range(part.start, part.stop)]
    assert covered == list(range(start, start + length))
    for part in found:
        assert part.start // size == part.cell
        assert (part.stop - 1) // size == part.cell + part.num_cells - 1
        assert part.num_cells == 1 or part.stop - part.start == part.num_cells * size
