"""Rows that a worker reads in another order: from mapped files and by ranges, for any budget."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import CheckpointError, MergeError
from mergekit_ray.core.expressions import ZEROS, Cast, Expression, Gather, Load, Merge, gathered, rows, stored
from mergekit_ray.core.plan import InputModel, OutputTensor, Plan, Shard
from mergekit_ray.core.tensors import Location, TensorSpec
from mergekit_ray.planning.windows import FIXED_BYTES, batches, comfortable_memory, is_scattered
from mergekit_ray.storage.local.store import LocalSource, LocalStore
from mergekit_ray.storage.protocols import MappedRange
from mergekit_ray.worker import gathers
from mergekit_ray.worker.resources import Resources, WorkerOptions
from mergekit_ray.worker.worker import Worker
from support.references.rows import mapping, runs_of, taken
from support.shards import BUDGETS, big_model, files_below, load_of, make_worker, merged, shard_of

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


class FarSource:
    """A folder that is not mapped, as if it were in a store; notes what it is asked for at once."""

    def __init__(self, root: str) -> None:
        self._local = LocalSource(root)
        self.uri = f"far://{root}"
        self.asked: list[tuple[str, list[tuple[int, int]]]] = []

    def read_ranges(self, name: str, ranges: Any, buffers: Any, *, version: str | None = None) -> int:
        self.asked.append((name, list(ranges)))
        return self._local.read_ranges(name, ranges, buffers, version=version)


def far_worker(inputs: dict[str, InputModel], output: Path, memory_bytes: int) -> tuple[Worker, dict[str, FarSource]]:
    sources = {key: FarSource(model.uri) for key, model in inputs.items()}
    far = {key: replace(model, uri=sources[key].uri) for key, model in inputs.items()}
    options = WorkerOptions(memory_bytes=memory_bytes)
    return Worker(Resources(far, sources, options), LocalStore(output), "records"), sources  # type: ignore[arg-type] # sources of tests


@pytest.mark.parametrize("budget", BUDGETS)
def test_from_a_store_rows_that_lie_near_each_other_are_read_together(
    case: Case, tmp_path: Path, budget: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gathers, "SPAN_BYTES", 1 << 16)
    worker, sources = far_worker(case.inputs, tmp_path, BUDGETS[budget])
    worker.run(case.shard)
    worker.close()
    case.check(load_file(tmp_path / case.shard.file))
    if budget == "ample":
        spans = [found for source in sources.values() for _, ranges in source.asked for found in ranges]
        leaves = [leaf for tensor in case.shard.tensors for leaf in stored(tensor.expression)]
        num_runs = sum(len(leaf.runs) for leaf in leaves if isinstance(leaf, Gather))
        assert len(spans) < num_runs / 5


def test_from_a_store_what_several_tensors_have_is_read_once(case: Case, tmp_path: Path) -> None:
    twice = [(tensor.spec.name, tensor.expression) for tensor in case.shard.tensors[:2]]
    asked = []
    for count in (1, 2):
        worker, sources = far_worker(case.inputs, tmp_path / str(count), BUDGETS["ample"])
        record = worker.run(shard_of(*twice[:count]))
        worker.close()
        asked.append([sorted(found for _, each in source.asked for found in each) for source in sources.values()])
    assert asked[0] == asked[1]
    found = load_file(tmp_path / "2" / record.file)
    assert torch.equal(found["copied"], case.expected["copied"])
    assert torch.equal(found["again"], case.expected["copied"])


def test_windows_of_scattered_rows_are_as_large_as_the_budget_allows(case: Case) -> None:
    tensor = case.shard.tensors[0]
    shard = shard_of((tensor.spec.name, tensor.expression))
    [[whole]] = batches(shard, FIXED_BYTES + 3 * tensor.spec.num_bytes)
    assert whole.num_elements == tensor.spec.num_elements
    assert len(list(batches(shard, FIXED_BYTES + 3 * tensor.spec.num_bytes, case.inputs.keys()))) > 1, "of mapped files"
    at_once = Merge("slerp", tensor.spec, (tensor.expression,) * 2, None, {"t": 0.5}, ({}, {}), ("", ""))
    assert not is_scattered(OutputTensor(tensor.spec, at_once, 0, tensor.spec.num_bytes), frozenset())
    assert is_scattered(tensor, frozenset())


def test_the_usual_budget_has_room_for_windows_of_scattered_rows() -> None:
    spec = TensorSpec("w", DType.BF16, (20_000, 8192))
    load = Load("a", spec, Location("f", 0, spec.num_bytes))
    inputs = {"a": InputModel("a", "org/a", "s3://bucket/a", {})}
    asked = []
    for step in (1, 7919):
        runs = runs_of([(0, (row * step + 1) % 20_000) for row in range(20_000)])
        plan = Plan(inputs, (shard_of(("w", gathered([load], spec, runs))),), {}, (), {}, 0)
        asked.append(comfortable_memory(plan))
    assert asked[0] < FIXED_BYTES + spec.num_bytes, "in order but for one row"
    assert asked[1] > FIXED_BYTES + 2 * spec.num_bytes, "one window that is read, one that is written"


@pytest.mark.parametrize("far", [True, False])
@pytest.mark.parametrize("smallest", [0, 1 << 40], ids=["mapped", "read"])
@pytest.mark.parametrize("damage", ["shorter", "touched"])
def test_a_file_that_is_not_what_it_was_is_refused(
    tmp_path: Path, damage: str, far: bool, smallest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gathers, "MIN_MAPPED_BYTES", smallest)
    case = Case(tmp_path)
    path = tmp_path / "b" / "model.safetensors"
    if damage == "shorter":
        path.write_bytes(path.read_bytes()[:-100_000])
        version = f"{path.stat().st_size}-{path.stat().st_mtime_ns}"
        [file] = case.inputs["b"].files.values()
        case.inputs["b"] = replace(case.inputs["b"], files={file.name: replace(file, version=version)})
    else:
        os.utime(path, ns=(1, 1))
    output = tmp_path / "out"
    worker = far_worker(case.inputs, output, BUDGETS["ample"])[0] if far else make_worker(case.inputs, output)
    with pytest.raises(CheckpointError, match="cut short" if damage == "shorter" else "changed") as caught:
        worker.run(case.shard)
    worker.close()
    assert caught.value.where == str(path)
    assert files_below(output) == set()


def test_a_file_that_changes_while_it_is_used_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathers, "MIN_MAPPED_BYTES", 0)
    case = Case(tmp_path)

    class Touched(LocalSource):
        """Files whose time changes once a part of them has been mapped."""

        def map_range(self, name: str, *args: Any, **options: Any) -> MappedRange:
            found = super().map_range(name, *args, **options)
            os.utime(Path(self.uri) / name, ns=(1, 1))
            return found

    worker = make_worker(case.inputs, tmp_path / "out")
    worker.resources.sources = {key: Touched(model.uri) for key, model in case.inputs.items()}
    with pytest.raises(CheckpointError, match="changed"):
        worker.run(shard_of(("bias", case.shard.tensors[2].expression)))
    assert files_below(tmp_path / "out") == set()


@pytest.mark.parametrize("index", [0, 4], ids=["copied", "merged"])
def test_what_is_not_finite_is_named_where_it_is_stored(tmp_path: Path, index: int) -> None:
    case = Case(tmp_path)
    [part, row] = next((part, row) for part, row in scattered(0, NUM_ROWS, NUM_ROWS) if part == 1)
    tensor = load_file(tmp_path / "b" / "model.safetensors")
    tensor["t0"][row, 5] = float("nan")
    case.inputs["b"] = big_model(tmp_path / "c" / "b", tensor["t0"], tensor["t1"])
    expression = case.uses([[x, x] for x in (tensor["t0"], tensor["t0"])])[0].tensors[index].expression
    worker = make_worker(case.inputs, tmp_path / "out", memory_bytes=BUDGETS["tiny"])
    with pytest.raises(MergeError, match=f"nan in the input, first at flat index {row * WIDTH + 5}\\b") as caught:
        worker.run(shard_of(("w", expression)))
    worker.close()
    assert caught.value.where == "model org/b, tensor 't0'"
    assert part == 1


WEIGHTED: Any = ({"weight": 0.3, "density": 0.6}, {"weight": 0.7, "density": 0.4})
METHODS: dict[str, tuple[dict[str, Any], Any, bool]] = {
    "linear": ({}, ({"weight": 0.3}, {"weight": 0.6}), False),
    "ties": ({}, WEIGHTED, True),
    "slerp": ({"t": 0.3}, ({},), True),
}


@pytest.mark.parametrize("budget", ["tiny", "ample"])
@pytest.mark.parametrize("method", METHODS)
def test_a_merge_writes_the_bytes_of_that_of_models_in_the_new_order(tmp_path: Path, method: str, budget: str) -> None:
    parameters, of_models, has_base = METHODS[method]
    spec = TensorSpec("new", DType.BF16, (NEW_ROWS, WIDTH))
    models: list[list[InputModel]] = [[], []]
    leaves: list[list[Expression]] = [[], []]
    for index in range(len(of_models) + has_base):
        x, wanted = random(index, NUM_ROWS, WIDTH), scattered(index, NUM_ROWS)
        in_file = big_model(tmp_path / f"m{index}", x)
        in_order = big_model(tmp_path / f"new{index}", taken([x], wanted, spec.shape))
        models[0].append(in_file)
        models[1].append(in_order)
        leaves[0].append(gathered([load_of(in_file, "t0")], spec, runs_of(wanted)))
        leaves[1].append(load_of(in_order, "t0"))
    written = []
    for used, inputs in zip(models, leaves, strict=True):
        base = inputs.pop() if has_base else None
        merge = Merge(method, spec, tuple(inputs), base, parameters, of_models, ("",) * len(inputs))
        output = tmp_path / f"out{len(written)}"
        worker = make_worker({model.key: model for model in used}, output, memory_bytes=BUDGETS[budget])
        written.append(worker.run(shard_of(("w", merge))).sha256)
        worker.close()
    assert written[0] == written[1]
