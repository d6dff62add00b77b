from __future__ import annotations

import pytest
import torch

from mergekit_ray.methods.shared import packed_mask
from mergekit_ray.methods.shared.packed_mask import MaskBuilder, PackedMask, pack, pack_by_torch, trim_, unpack_by_torch


def flags(size: int) -> torch.Tensor:
    return torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(size), dtype=torch.uint8)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 1001])
def test_any_run_comes_back(size: int) -> None:
    kept = flags(size)
    mask = PackedMask.join([pack(kept[: size // 16 * 8]), pack(kept[size // 16 * 8 :])])
    assert mask.bits.numel() == -(-size // 8)
    for start in range(0, size, max(1, size // 13)):
        for length in (0, 1, (size - start) // 2, size - start):
            assert torch.equal(mask.unpack(start, length), kept[start : start + length])


@pytest.mark.parametrize("size", [0, 1, 8, 23])
def test_the_bits_are_the_same_by_the_operations_of_any_device(size: int) -> None:
    kept = flags(size)
    bits = [sum(int(bit) << (7 - i) for i, bit in enumerate(kept[at : at + 8])) for at in range(0, size, 8)]
    assert pack(kept).tolist() == bits
    packed = pack_by_torch(kept)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == bits
    assert torch.equal(unpack_by_torch(packed)[:size], kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_what_is_not_kept_is_zero(dtype: torch.dtype) -> None:
    kept = flags(500)
    values = torch.randn(500, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = torch.where(kept.bool(), values, torch.zeros_like(values))
    assert torch.equal(PackedMask(pack(kept)).trim_(values[100:].clone(), 100), expected[100:])
    assert torch.equal(trim_(values.clone(), kept), expected)


def test_trimming_by_torch_is_the_compiled_one(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, values = flags(500), torch.linspace(-1, 1, 500)
    values[3] = float("inf")
    compiled = trim_(values.clone(), kept)
    monkeypatch.setattr(packed_mask, "is_compiled_for", lambda _: False)
    assert torch.equal(trim_(values.clone(), kept), compiled)


@pytest.mark.parametrize("num_elements", [1, 8, 4096, 10_001])
def test_runs_that_come_in_any_order_make_the_mask(num_elements: int) -> None:
    kept = torch.randint(0, 2, (num_elements,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    builder = MaskBuilder(num_elements)
    assert builder.mask() is None
    for start in reversed(range(0, num_elements, 1024)):
        builder.put(kept[start : start + 1024], start)
    mask = builder.mask()
    assert mask is not None
    assert torch.equal(mask.unpack(0, num_elements), kept)
