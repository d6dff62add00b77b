"""Rows that a worker reads in another order: from mapped files and by ranges, for any budget."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.expressions import ZEROS, Cast, Expression, gathered, rows
from mergekit_ray.core.plan import Shard
from mergekit_ray.core.tensors import TensorSpec
from mergekit_ray.worker import gathers
from support.references.rows import mapping, runs_of, taken
from support.shards import BUDGETS, big_model, load_of, make_worker, merged, shard_of

NUM_ROWS, WIDTH, NEW_ROWS = 3001, 67, 4003
"""Rows end nowhere together with windows."""


def random(seed: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def scattered(seed: int, *num_rows: int, count: int = NEW_ROWS) -> list[tuple[int, int]]:
    """Single rows and runs; a long run, which is read by itself, is among them."""
    found = mapping(seed, num_rows, count)
    found[700:2000] = [(0, 900 + row) for row in range(1300)]
    return found


@pytest.fixture(params=["mapped", "read"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathers, "MIN_MAPPED_BYTES", 0 if request.param == "mapped" else 1 << 40)
    monkeypatch.setattr(gathers, "_MIN_DIRECT_BYTES", 1 << 14)


class Case:
    """Two models, and a shard of every use of their rows in another order."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        tensors = [[random(10 * i, NUM_ROWS, WIDTH, dtype=dtype), random(10 * i + 1, 1, NUM_ROWS)] for i in range(2)]
        self.inputs = {name: big_model(folder / name, *tensors[i]) for i, name in enumerate("ab")}
        self.shard, self.expected = self.uses(tensors)

    def uses(self, tensors: list[list[torch.Tensor]]) -> tuple[Shard, dict[str, torch.Tensor]]:
        a, b = (load_of(model, "t0") for model in self.inputs.values())
        a_bias = load_of(self.inputs["a"], "t1")
        spec = TensorSpec("new", a.spec.dtype, (NEW_ROWS, WIDTH))
        of_both, of_a, of_bias = scattered(0, NUM_ROWS, NUM_ROWS), scattered(1, NUM_ROWS), scattered(2, NUM_ROWS)
        copied = gathered([a, b], spec, runs_of(of_both))
        other = gathered([a], spec, runs_of(of_a))
        bias = gathered([a_bias], TensorSpec("bias", DType.BF16, (1, NEW_ROWS)), runs_of(of_bias))
        merge = merged("merged", copied, other, copied)
        some = [(0, 1), *((1, 9 * i) for i in range(300)), (0, 7), *[(0, 2)] * (NEW_ROWS - 302)]
        mixed = rows([copied, Cast(Cast(b, DType.F64), spec.dtype)], spec, runs_of(some))
        both, one = (taken([tensors[0][0], tensors[1][0]], found, spec.shape) for found in (of_both, of_a))
        mean = (both.double() + 2 * one.double() + 3 * both.double()) / 6
        expected = {
            "copied": both,
            "again": both,
            "bias": taken([tensors[0][1]], of_bias, (1, NEW_ROWS)),
            "mixed": taken([both, tensors[1][0]], some, spec.shape),
            "merged": mean,
        }
        trees: dict[str, Expression] = {"copied": copied, "again": copied, "bias": bias, "mixed": mixed}
        trees["merged"] = merge
        return shard_of(*trees.items()), expected

    def check(self, found: dict[str, torch.Tensor]) -> None:
        mean = self.expected["merged"]
        assert (found["merged"].double() - mean).abs().le(mean.abs() * 2.0**-8 * 1.001 + 1e-6).all()
        for name in self.expected.keys() - {"merged"}:
            assert torch.equal(found[name], self.expected[name]), name


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("models"))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("num_threads", [1, 3])
def test_any_budget_gives_the_rows(case: Case, tmp_path: Path, budget: str, num_threads: int) -> None:
    worker = make_worker(case.inputs, tmp_path, memory_bytes=BUDGETS[budget], num_threads=num_threads)
    worker.run(case.shard)
    worker.close()
    case.check(load_file(tmp_path / case.shard.file))
    assert worker.resources.budget.held_bytes == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_every_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    case = Case(tmp_path, dtype)
    make_worker(case.inputs, tmp_path / "out").run(case.shard)
    found = load_file(tmp_path / "out" / case.shard.file)
    for name in ("copied", "mixed"):
        assert torch.equal(found[name], case.expected[name])


@pytest.mark.parametrize("budget", BUDGETS)
def test_what_is_read_is_counted_once(case: Case, tmp_path: Path, budget: str) -> None:
    shard = shard_of(*((tensor.spec.name, tensor.expression) for tensor in case.shard.tensors[:3]))
    worker = make_worker(case.inputs, tmp_path, memory_bytes=BUDGETS[budget])
    worker.run(shard)
    worker.close()
    wanted = [scattered(0, NUM_ROWS, NUM_ROWS)] * 2, [scattered(2, NUM_ROWS)]
    sizes = [sum(part != ZEROS for part, _ in rows) * 2 for each in wanted for rows in each]
    assert worker.progress.read_bytes == shard.read_bytes == WIDTH * sum(sizes[:2]) + sizes[2]
