"""What `plan --explain` says of rows in another order."""

from __future__ import annotations

import pytest

from mergekit_ray.cli.tables import print_explanations
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.expressions import Cast, Load, Runs, gathered, rows
from mergekit_ray.core.plan import InputModel, Plan
from mergekit_ray.core.tensors import Location, TensorSpec
from mergekit_ray.operations.plan import explained
from support.shards import shard_of


def load(model: str, dtype: DType = DType.BF16) -> Load:
    spec = TensorSpec("w", dtype, (8, 2))
    return Load(model, spec, Location("f.safetensors", 0, spec.num_bytes))


def test_where_rows_come_from(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    spec = TensorSpec("w", DType.BF16, (3, 2))
    gather = gathered([load("a"), load("b")], spec, Runs.of_rows([0, 1, 0], [4, 5, 6]))
    mixed = rows([gather, Cast(load("c", DType.F32), DType.BF16)], spec, Runs.of_rows([1, 0, 1], [0, 2, 1]))
    inputs = {key: InputModel(key, f"org/{key}", f"/{key}", {}) for key in "abc"}
    plan = Plan(inputs, (shard_of(("copied", gather), ("mixed", mixed)),), {}, (), {}, 0)
    found = explained(plan, "*")
    assert [list(each.models.values()) for each in found] == [["org/a", "org/b"], ["org/a", "org/c"]]
    print_explanations(plan, found)
    shown = capsys.readouterr().out
    assert "copied: the input's bytes are the result" in shown
    assert "gather -> bfloat16, 3 runs of rows" in shown
    assert "load bfloat16 from org/b/f.safetensors, bytes 0 to 32" in shown
    assert "rows -> bfloat16, 3 runs of rows" in shown
