"""What is filled in where no file holds it: exact values, distributions, and the same for every cut."""

from __future__ import annotations

import itertools
import math
import statistics
import struct

import numpy as np
import pytest
import torch

from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import MergeError
from mergekit_ray.core.expressions import Cast, Concat, Constant, Expression, Literal, Merge, Noise, Scale
from mergekit_ray.core.tensors import TensorSpec
from mergekit_ray.evaluation import noise as by_numpy
from mergekit_ray.evaluation.nodes.generated import normal_numbers, uniform_numbers
from mergekit_ray.evaluation.scratch import TORCH_DTYPES
from mergekit_ray.methods.shared.random_mask import hash_words
from support.memory_inputs import DTYPES, Inputs, evaluate

CPU = torch.device("cpu")
FLOATS = [DType.F16, DType.BF16, DType.F32, DType.F64]
CUTS = [(1, 1 << 16), (1, 999), (3, 4097), (2, 1 << 20)]


def random(seed: int, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def literal(values: torch.Tensor, dtype: DType = DType.F32) -> Literal:
    packed = struct.pack(f"<{values.numel()}f", *values.reshape(-1).tolist())
    return Literal.of(TensorSpec("l", dtype, tuple(values.shape)), packed)


def zeros(*shape: int, dtype: DType = DType.F32) -> Constant:
    return Constant(TensorSpec("z", dtype, shape), 0.0)


def every_cut(expression: Expression, inputs: Inputs, window: int | None = None) -> torch.Tensor:
    """The result, seen to be the same for every cut and number of threads."""
    results = [
        evaluate(expression, inputs, num_threads=threads, chunk_elements=chunk, window=size)
        for (threads, chunk), size in itertools.product(CUTS, [None, *([window] if window else [])])
    ]
    assert all(torch.equal(result, results[0]) for result in results[1:])
    return results[0]


class TestNumbers:
    def test_uniform_ones_are_the_hash_words_read_as_odd_multiples_of_two_to_the_minus_32(self) -> None:
        words = torch.empty(1000, dtype=torch.int32)
        hash_words("k", 123, words, torch.empty_like(words))
        expected = [(2 * word + 1) / 2**32 for word in words.tolist()]
        assert uniform_numbers("k", 123, 1000, CPU).tolist() == expected

    def test_normal_ones_are_the_quantiles_of_the_uniform_ones(self) -> None:
        """Against the standard library's inverse of the normal distribution."""
        uniform = uniform_numbers("k", 0, 40_000, CPU)
        found = normal_numbers("k", 0, 40_000, CPU)
        exact = statistics.NormalDist()
        for u, z in zip(uniform.tolist(), found.tolist(), strict=True):
            assert z == pytest.approx(exact.inv_cdf((u + 1) / 2), rel=1e-14, abs=1e-16)

    @pytest.mark.parametrize("word", [0, -1, 1, 2**31 - 1, -(2**31), int(0.85 * 2**31), -int(0.85 * 2**31), 2**31 - 2])
    def test_ends_and_borders_of_the_normal_ones(self, word: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            "mergekit_ray.evaluation.nodes.generated.hash_words", lambda key, start, out, scratch: out.fill_(word)
        )
        (found,) = normal_numbers("k", 0, 1, CPU).tolist()
        tail = (2 * (-word - 1 if word >= 0 else word) + 1) / 2**33 + 0.5  # the probability of the nearer end
        expected = statistics.NormalDist().inv_cdf(tail) * (-1 if word >= 0 else 1)
        assert found == pytest.approx(expected, rel=1e-13, abs=1e-16)
        assert abs(found) < 6.34

    def test_moments(self) -> None:
        n = 400_000
        z, u = normal_numbers("moments", 0, n, CPU), uniform_numbers("moments", 0, n, CPU)
        # Five standard errors of each estimate.
        for power, expected, variance in [(1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)]:
            assert float((z**power).mean()) == pytest.approx(expected, abs=5 * math.sqrt(variance / n))
        assert float(u.mean()) == pytest.approx(0.0, abs=5 * math.sqrt(1 / 3 / n))
        assert float((u**2).mean()) == pytest.approx(1 / 3, abs=5 * math.sqrt(4 / 45 / n))
        other = normal_numbers("other", 0, n, CPU)
        assert float((z * other).mean()) == pytest.approx(0.0, abs=5 / math.sqrt(n))
        assert float((z[1:] * z[:-1]).mean()) == pytest.approx(0.0, abs=5 / math.sqrt(n))

    def test_they_follow_their_distributions(self) -> None:
        """Kolmogorov and Smirnov's statistic, at the level 10^-4."""
        n = 100_000
        z = np.sort(normal_numbers("ks", 0, n, CPU).numpy())
        below = 0.5 * np.array([math.erfc(-x / math.sqrt(2)) for x in z])
        steps = np.arange(1, n + 1) / n
        assert max(np.max(steps - below), np.max(below - steps + 1 / n)) < 2.23 / math.sqrt(n)

    def test_a_run_is_the_same_from_wherever_it_is_drawn(self) -> None:
        start = (1 << 40) + 12_345
        whole = normal_numbers("k", start, 200_000, CPU)
        parts = [normal_numbers("k", start + i, min(777, 200_000 - i), CPU) for i in range(0, 200_000, 777)]
        assert torch.equal(torch.cat(parts), whole)

    @pytest.mark.parametrize("start", [0, 65_535, (1 << 40) + 12_345])
    def test_on_the_cpu_and_on_devices_they_are_the_same(self, start: int, monkeypatch: pytest.MonkeyPatch) -> None:
        # On CPUs torch has a library take square roots, which does not round all of them right; devices do.
        monkeypatch.setattr(torch.Tensor, "sqrt_", lambda x: x.copy_(torch.from_numpy(np.sqrt(x.numpy()))))
        for key in ("k", "another"):
            uniform, normal = (draw(key, start, 300_000, CPU) for draw in (uniform_numbers, normal_numbers))
            assert np.array_equal(by_numpy.uniform_numbers(key, start, 300_000), uniform.numpy())
            assert np.array_equal(by_numpy.normal_numbers(key, start, 300_000), normal.numpy())


class TestNoise:
    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("distribution", ["normal", "uniform"])
    def test_is_added_in_compute_dtype_and_rounded_once(self, dtype: DType, distribution: str) -> None:
        inputs, x = Inputs(), random(0, (401, 203), TORCH_DTYPES[dtype])
        noise = Noise(inputs.load("a", x), distribution, 0.3, "key", dtype, DType.F64)
        draw = by_numpy.DRAW[distribution]
        exact = x.double() + 0.3 * torch.from_numpy(draw("key", 0, x.numel())).view(x.shape)
        found = every_cut(noise, inputs, window=1 << 15)
        spacing = torch.finfo(TORCH_DTYPES[dtype])
        allowed = exact.abs() * spacing.eps / 2 + spacing.smallest_normal * spacing.eps
        assert bool(((found.double() - exact).abs() <= allowed * (1 + 2**-20)).all())

    def test_in_float32_by_default(self) -> None:
        inputs, x = Inputs(), random(1, (50_000,), torch.float32)
        found = every_cut(Noise(inputs.load("a", x), "normal", 0.01, "key", DType.F32), inputs, window=1 << 14)
        assert torch.equal(found, x + (torch.from_numpy(by_numpy.normal_numbers("key", 0, 50_000)) * 0.01).float())

    def test_of_scale_zero_adds_nothing(self) -> None:
        inputs, x = Inputs(), random(2, (999,))
        assert torch.equal(every_cut(Noise(inputs.load("a", x), "normal", 0.0, "key", DType.BF16), inputs), x)

    def test_keys_and_shapes(self) -> None:
        inputs = Inputs()
        a, b = (evaluate(Noise(zeros(4, 6), "normal", 1.0, key, DType.F32), inputs) for key in ("a", "b"))
        assert not torch.equal(a, b)
        flat = evaluate(Noise(zeros(24), "normal", 1.0, "a", DType.F32), inputs)
        assert torch.equal(flat.view(4, 6), a)  # by the element's index alone
        assert evaluate(Noise(zeros(0, 5), "normal", 1.0, "a", DType.F32), inputs).shape == (0, 5)
        assert evaluate(Noise(zeros(), "uniform", 1.0, "a", DType.F32), inputs).shape == ()

    def test_scaled_afterwards_without_rounding_between(self) -> None:
        inputs, x = Inputs(), random(3, (5000,))
        inner = Noise(inputs.load("a", x), "normal", 0.5, "key", DType.F32)
        exact = (x.double() + 0.5 * torch.from_numpy(by_numpy.normal_numbers("key", 0, 5000))) * 0.1
        found = every_cut(Scale(inner, 0.1, DType.BF16), inputs)
        # One rounding to bfloat16, and those of float32 on the way.
        assert bool(((found.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all())

    def test_what_is_not_finite_is_named(self) -> None:
        inputs, x = Inputs(), random(4, (100,))
        x[17] = math.inf
        noise = Noise(inputs.load("a", x), "normal", 0.1, "key", DType.BF16)
        with pytest.raises(MergeError, match=r"inf in the input, first at flat index 17"):
            evaluate(noise, inputs)
        assert evaluate(noise, inputs, allow_non_finite=True)[17] == math.inf
        wide = Noise(inputs.load("b", random(5, (100,))), "normal", 1e6, "key", DType.F16)
        with pytest.raises(MergeError, match="overflow float16"):
            evaluate(wide, inputs)


class TestConstant:
    @pytest.mark.parametrize("dtype", [*FLOATS, DType.I64, DType.BOOL])
    @pytest.mark.parametrize("value", [0.0, 1.0])
    def test_fills(self, dtype: DType, value: float) -> None:
        found = every_cut(Constant(TensorSpec("c", dtype, (7, 9)), value), Inputs())
        assert torch.equal(found, torch.full((7, 9), value).to(TORCH_DTYPES[dtype]))

    def test_is_rounded_to_its_own_dtype_under_a_wider_one(self) -> None:
        found = evaluate(Cast(Constant(TensorSpec("c", DType.BF16, (3,)), 0.1), DType.F32), Inputs())
        assert torch.equal(found, torch.tensor(0.1).bfloat16().float().expand(3))

    def test_that_its_dtype_cannot_hold_is_refused(self) -> None:
        with pytest.raises(MergeError, match="overflow float16"):
            evaluate(Constant(TensorSpec("c", DType.F16, (3,)), 1e6), Inputs())


class TestLiteral:
    @pytest.mark.parametrize("dtype", FLOATS)
    def test_is_rounded_once(self, dtype: DType) -> None:
        values = random(6, (8, 129), torch.float32)
        assert torch.equal(every_cut(literal(values, dtype), Inputs(), window=100), values.to(TORCH_DTYPES[dtype]))

    def test_evaluating_it_does_not_change_it(self) -> None:
        values = random(7, (100,), torch.float32)
        made, inputs = literal(values), Inputs()
        tree = Merge("linear", made.spec, (made, made), None, {}, ({"weight": 1.0}, {"weight": 3.0}), ("", ""))
        for _ in range(2):
            torch.testing.assert_close(evaluate(tree, inputs), values)

    def test_may_be_empty(self) -> None:
        assert evaluate(literal(torch.empty(0, 4)), Inputs()).shape == (0, 4)

    def test_that_is_not_finite_is_refused(self) -> None:
        with pytest.raises(MergeError, match="not numbers"):
            evaluate(literal(torch.tensor([1.0, math.nan])), Inputs())


class TestConcat:
    def test_is_torchs_cat_of_flattened_parts(self) -> None:
        inputs = Inputs()
        parts = [random(i, shape) for i, shape in enumerate([(101, 300), (1, 300), (0, 300), (77, 300)])]
        loads = [inputs.load(f"m{i}", part) for i, part in enumerate(parts)]
        spec = TensorSpec("packed", DType.BF16, (179, 300))
        assert torch.equal(every_cut(Concat(tuple(loads), spec), inputs, window=10_007), torch.cat(parts))

    def test_parts_may_be_any_expressions(self) -> None:
        inputs, x = Inputs(), random(8, (500, 20), torch.float32)
        a = inputs.load("a", x)
        parts = (
            Cast(a, DType.BF16),
            Scale(a, 0.5, DType.BF16),
            Constant(TensorSpec("c", DType.BF16, (4, 20)), 2.0),
            Noise(a, "normal", 0.1, "key", DType.BF16),
        )
        spec = TensorSpec("packed", DType.BF16, (1504, 20))
        noisy = (
            x + (torch.from_numpy(by_numpy.normal_numbers("key", 0, x.numel())) * 0.1).float().view(x.shape)
        ).bfloat16()
        expected = torch.cat([x.bfloat16(), (x * 0.5).bfloat16(), torch.full((4, 20), 2.0).bfloat16(), noisy])
        assert torch.equal(every_cut(Concat(parts, spec), inputs), expected)

    def test_a_part_may_be_of_parts_of_which_a_window_touches_some(self) -> None:
        inputs = Inputs()
        tensors = [random(i, (100,)) for i in range(4)]
        a, b, c, d = (inputs.load(f"m{i}", x) for i, x in enumerate(tensors))
        inner = Scale(Concat((a, b), TensorSpec("inner", DType.BF16, (200,))), 0.5, DType.BF16)
        packed = Concat((c, inner, d), TensorSpec("packed", DType.BF16, (400,)))
        expected = torch.cat([tensors[2], tensors[0] * 0.5, tensors[1] * 0.5, tensors[3]])
        assert torch.equal(every_cut(packed, inputs, window=30), expected)

    def test_what_is_not_finite_is_named_in_whichever_part(self) -> None:
        inputs = Inputs()
        good, bad = random(9, (5000,)), random(10, (5000,))
        bad[4321] = math.nan
        parts = (inputs.load("good", good), inputs.load("bad", bad))
        packed = Concat(parts, TensorSpec("packed", DTYPES[good.dtype], (10_000,)))
        for window in (None, 4000):  # in windows of that size, the last has no input of the first part
            with pytest.raises(MergeError, match="nan in the input, first at flat index 4321") as caught:
                evaluate(packed, inputs, window=window)
            assert caught.value.where == "model bad, tensor 'w'"
        assert evaluate(packed, inputs, allow_non_finite=True)[9321].isnan()
