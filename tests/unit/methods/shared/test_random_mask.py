from __future__ import annotations

import math

import pytest
import torch

from mergekit_ray.methods.shared.random_mask import HASH_BLOCK, MaskSpace, RandomMask, hash_words
from support.operands import MemoryScratch
from support.references.merge import hash_word

KNOWN = [
    [0x53FD4F79, 0xE16C0362, 0x78B0B229, 0x6EA2896E],
    [0x03365570, 0x67ABF474, 0x74666547, 0x2D92A30F],
]


def words(key: str, start: int, length: int) -> torch.Tensor:
    out = torch.empty(length, dtype=torch.int32)
    return hash_words(key, start, out, torch.empty_like(out))


def kept(key: str, density: float, start: int, length: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    ones = torch.ones(length, dtype=dtype)
    return RandomMask(key, density).apply_(ones, start, MaskSpace.like(ones, MemoryScratch())).bool()


def test_known_answers() -> None:
    """Masks of finished merges must be found again by later versions: these words never change."""
    assert [word % 2**32 for word in words("key", 0, 4).tolist()] == KNOWN[0]
    assert [word % 2**32 for word in words("seed 1/model.norm.weight/α", 3 * 2**40 + 5, 4).tolist()] == KNOWN[1]


@pytest.mark.parametrize("start", [0, 65_530, 2**31 - 10, 2**32 - 10, 2**45 + 3])
def test_against_python_integers(start: int) -> None:
    expected = [hash_word("a/b", index) for index in range(start, start + 40)]
    assert [word % 2**32 for word in words("a/b", start, 40).tolist()] == expected


def test_any_cut_gives_the_same_words() -> None:
    start, length = 3 * HASH_BLOCK - 77, 2 * HASH_BLOCK + 500
    whole = words("k", start, length)
    for step in (1 << 16, 5000, length - 1):
        pieces = [words("k", start + i, min(step, length - i)) for i in range(0, length, step)]
        assert torch.equal(torch.cat(pieces), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_keeps_what_the_words_say_in_any_dtype(dtype: torch.dtype) -> None:
    for density in (0.1, 0.5, 0.999):
        unsigned = words("k", 100, 5000).to(torch.int64) + 2**31
        assert torch.equal(kept("k", density, 100, 5000, dtype), unsigned < math.floor(density * 2**32))


def test_kept_values_are_untouched() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    trimmed = RandomMask("k", 0.5).apply_(x.clone(), 0, MaskSpace.like(x, MemoryScratch()))
    assert torch.equal(trimmed, torch.where(kept("k", 0.5, 0, 1000), x, torch.zeros(1000)))


def test_none_and_all() -> None:
    for density in (1.0, 1.5):
        assert kept("k", density, 0, 1000).all()
    for density in (0.0, -1.0, 2.0**-33):
        assert not kept("k", density, 0, 1000).any()
    assert kept("k", math.nextafter(1.0, 0.0), 0, 100_000).all()


def test_more_density_keeps_a_superset() -> None:
    less, more = kept("k", 0.3, 0, 10_000), kept("k", 0.4, 0, 10_000)
    assert (more | ~less).all()


SIZE = 1 << 20
SIGMAS = 4.5  # a true random mask fails one such test in 150 000


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """In standard deviations of what independent masks would show."""
    x, y = a.double() - a.double().mean(), b.double() - b.double().mean()
    return float((x * y).mean() / (x.std() * y.std()) * math.sqrt(a.numel()))


@pytest.mark.parametrize("density", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_part_kept_is_binomial(density: float) -> None:
    for key in ("a", "b", "c"):
        count = int(kept(key, density, 0, SIZE).sum())
        assert abs(count - density * SIZE) < SIGMAS * math.sqrt(SIZE * density * (1 - density))


def test_counts_of_blocks_spread_as_a_binomial() -> None:
    """Neither clumped nor too even: variance of the counts of 4096 runs of 256 elements."""
    counts = kept("spread", 0.5, 0, SIZE).view(-1, 256).sum(dim=1).double()
    variance = float(counts.var())
    assert abs(variance - 64) < SIGMAS * 64 * math.sqrt(2 / counts.numel())


@pytest.mark.parametrize("lag", [1, 2, 3, 64, 4096, 65_536, 2 * 65_536])
def test_no_serial_correlation(lag: int) -> None:
    for density in (0.1, 0.5):
        mask = kept("serial", density, 0, SIZE)
        assert abs(correlation(mask[:-lag], mask[lag:])) < SIGMAS


@pytest.mark.parametrize(
    ("one", "other"),
    [("model 0", "model 1"), ("a/layers.0/x", "a/layers.1/x"), ("1/t", "2/t"), ("", "\0"), ("ab", "ba")],
)
def test_keys_are_independent(one: str, other: str) -> None:
    for density in (0.1, 0.5):
        assert abs(correlation(kept(one, density, 0, SIZE), kept(other, density, 0, SIZE))) < SIGMAS


@pytest.mark.parametrize("bit", [0, 1, 5, 15, 16, 17, 31, 32, 40])
def test_every_bit_of_the_index_changes_half_of_the_word(bit: int) -> None:
    """Avalanche: flipping one bit of the index flips each upper bit of the word for half of many indices.

    The lowest bits of a product depend on few bits; no density resolves them.
    """
    length = 1 << 14
    blocks = [words("avalanche", block * HASH_BLOCK, length) for block in (0, 4, 8, 12)]
    if bit < 16:
        index = torch.arange(length if bit < 14 else 0) ^ (1 << bit)
        flipped = (
            [block[index] for block in blocks]
            if bit < 14
            else [words("avalanche", block * HASH_BLOCK + (1 << bit), length) for block in (0, 4, 8, 12)]
        )
    else:
        flipped = [words("avalanche", (block * HASH_BLOCK) ^ (1 << bit), length) for block in (0, 4, 8, 12)]
    changed = torch.cat(blocks) ^ torch.cat(flipped)
    pairs = changed.numel() / (2 if bit < 14 else 1)  # each pair is seen from both sides there
    for place in range(8, 32):
        part = float(((changed >> place) & 1).double().mean())
        assert abs(part - 0.5) < SIGMAS * 0.5 / math.sqrt(pairs), f"bit {place} of the word"


def test_words_are_uniform() -> None:
    """Chi-square over 1024 cells of the upper bits."""
    cells = torch.bincount((words("uniform", 0, SIZE).to(torch.int64) + 2**31) >> 22, minlength=1024).double()
    mean = SIZE / 1024
    statistic = float(((cells - mean) ** 2 / mean).sum())
    assert abs(statistic - 1023) < SIGMAS * math.sqrt(2 * 1023)


def test_pairs_of_neighbours_are_uniform() -> None:
    """Chi-square over 32×32 cells of two consecutive words, as a scatter plot would show lattices."""
    top = (words("pairs", 0, SIZE).to(torch.int64) + 2**31) >> 27
    cells = torch.bincount(top[0::2] * 32 + top[1::2], minlength=1024).double()
    mean = SIZE / 2 / 1024
    statistic = float(((cells - mean) ** 2 / mean).sum())
    assert abs(statistic - 1023) < SIGMAS * math.sqrt(2 * 1023)
