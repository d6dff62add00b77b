"""Plans: round trip, digest, sums, index."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import PlanError
from mergekit_ray.core.expressions import Concat, Constant, Expression, Literal, Load, Noise
from mergekit_ray.core.plan import InputFile, InputModel, Plan, SideFile
from mergekit_ray.core.record import ShardRecord
from mergekit_ray.core.tensors import Location, TensorSpec
from support.fake_checkpoints import llama, plan_of

RECIPE = """
merge_method: dare_ties
base_model: /a
models:
- {model: /b, parameters: {weight: 0.5, density: 0.3}}
- {model: /c, parameters: {weight: [0.1, 0.2], density: 0.6}}
dtype: bfloat16
seed: 11
output: {max_shard_size: 150}
"""


@pytest.fixture
def plan() -> Plan:
    made = plan_of(RECIPE, llama("/a"), llama("/b"), llama("/c"))
    side = SideFile("m0", InputFile("tokenizer.json", 17, "17-1"))
    generated = {"modeling_own.py": "class Own: ...\n"}
    made = replace(made, side_files=(side,), generated_files=generated)
    return replace(made, dropped={"/b: x": "why"}, aliased={"y": "x"}, warnings=("careful",))


def test_json_round_trip(plan: Plan) -> None:
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert again.digest == plan.digest
    assert [shard.header for shard in again.shards] == [shard.header for shard in plan.shards]


def test_another_format_is_refused(plan: Plan) -> None:
    with pytest.raises(PlanError, match="plan format 99 is not 1"):
        Plan.from_json({**plan.to_json(), "format": 99})


def test_digest_does_not_depend_on_warnings_or_on_the_order_of_mappings(plan: Plan) -> None:
    assert replace(plan, warnings=()).digest == plan.digest
    reversed_inputs = dict(reversed(list(plan.inputs.items())))
    assert list(reversed_inputs) != list(plan.inputs)
    assert replace(plan, inputs=reversed_inputs).digest == plan.digest
    assert plan_of(RECIPE, llama("/a"), llama("/b"), llama("/c")).digest != plan.digest  # no side file there


def moved(location: list[Any], by: int) -> list[Any]:
    """The same number of bytes at another place."""
    file, start, end = location
    return [file, start + by, end + by]


def first_merge(data: dict[str, Any]) -> list[Any]:
    found: list[Any] = data["shards"][0]["tensors"][0][1]
    assert found[0] == "merge"
    return found


def changed_file(data: dict[str, Any], index: int, value: object) -> None:
    data["inputs"]["m1"]["files"][0][index] = value


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "seed": lambda d: d.update(seed=12),
    "config": lambda d: d["config"].update(rope_theta=1.0),
    "recipe": lambda d: d["recipe"].update(name="x"),
    "version of an input": lambda d: changed_file(d, 2, "other"),
    "size of an input": lambda d: changed_file(d, 1, 99),
    "place of an input": lambda d: d["inputs"]["m1"].update(uri="/elsewhere"),
    "version of a side file": lambda d: d["side_files"][0].__setitem__(3, "17-2"),
    "text of a generated file": lambda d: d["generated_files"].update({"modeling_own.py": "class Own: pass\n"}),
    "method": lambda d: first_merge(d).__setitem__(1, "dare_linear"),
    "parameter": lambda d: first_merge(d)[5].update({"lambda": 1.0000000000000002}),
    "parameter of an input": lambda d: first_merge(d)[6][1].update(weight=0.11),
    "key of randomness": lambda d: first_merge(d)[7].__setitem__(0, "12\nw\n/b"),
    "compute dtype": lambda d: first_merge(d).__setitem__(8, "F64"),
    "byte range read": lambda d: first_merge(d)[3][0].__setitem__(3, moved(first_merge(d)[3][0][3], 2)),
    "offset written": lambda d: d["shards"][1]["tensors"][0].__setitem__(2, 2),
    "header": lambda d: d["shards"][0].update(header=d["shards"][0]["header"] + " "),
    "file": lambda d: d["shards"][0].update(file="model-1.safetensors"),
    "dropped": lambda d: d["dropped"].clear(),
    "aliased": lambda d: d["aliased"].clear(),
}


@pytest.mark.parametrize("what", CHANGES)
def test_digest_changes_with_everything_that_is_written(plan: Plan, what: str) -> None:
    data = copy.deepcopy(plan.to_json())
    CHANGES[what](data)
    assert data != plan.to_json()
    assert Plan.from_json(data).digest != plan.digest


def test_sums(plan: Plan) -> None:
    # Two layers of 4 + 16 + 24 elements, two vocabularies of 40, a norm of 4; three models of two bytes an element.
    num_elements = 2 * (4 + 16 + 24) + 2 * 40 + 4
    assert plan.num_parameters == num_elements
    assert plan.read_bytes == 3 * 2 * num_elements
    assert plan.num_bytes == 2 * num_elements + sum(len(shard.header) for shard in plan.shards)


def test_index_names_the_file_of_every_tensor(plan: Plan) -> None:
    assert plan.index["metadata"] == {"total_size": 2 * plan.num_parameters}
    assert list(plan.index["weight_map"]) == sorted(plan.index["weight_map"])
    assert plan.index["weight_map"] == {
        tensor.spec.name: shard.file for shard in plan.shards for tensor in shard.tensors
    }


def test_inputs_of_a_plan_are_pinned(plan: Plan) -> None:
    assert plan.inputs["m1"] == InputModel(
        "m1", "/b", "/b", {"model.safetensors": InputFile("model.safetensors", 1344, "1344-7")}
    )


def test_record_round_trip() -> None:
    record = ShardRecord("model-00001-of-00001.safetensors", 10, "ab" * 32, {"w": "cd" * 16}, '"etag"')
    assert ShardRecord.from_json(json.loads(json.dumps(record.to_json()))) == record
    without = {key: value for key, value in record.to_json().items() if key != "version"}
    assert ShardRecord.from_json(without) == replace(record, version="")


RECORD = ShardRecord("model-00001-of-00001.safetensors", 10, "ab" * 32, {"w": "cd" * 16}, "v").to_json()


@pytest.mark.parametrize("key", RECORD)
@pytest.mark.parametrize("value", [None, 3.5, -0.0, True, ["x"], {"x": "y"}, {"x": 1}])
def test_a_record_with_a_value_of_another_kind_is_refused(key: str, value: object) -> None:
    with pytest.raises(ValueError, match="record of a shard"):
        ShardRecord.from_json({**RECORD, key: value})


@pytest.mark.parametrize("record", [None, 3, "x", [], {}, {**RECORD, "sha256": "AB" * 32}, {**RECORD, "sha256": "ab"}])
def test_what_is_no_record_is_refused(record: Any) -> None:
    with pytest.raises(ValueError, match="record of a shard"):
        ShardRecord.from_json(record)


def test_values_of_literals_do_not_change_the_digest(plan: Plan) -> None:
    """Routers are made of prompts and a base model, which are in it, and their last bits vary between processors."""
    spec = TensorSpec("router", DType.F32, (1, 2))

    def having(*parts: Expression) -> str:
        whole = TensorSpec("router", DType.F32, (len(parts), 2))
        return replaced(plan, Concat(parts, whole) if len(parts) > 1 else parts[0]).digest

    one, other = (Literal.of(spec, struct.pack("<2f", *values)) for values in ((0.5, 0.25), (0.5, 0.75)))
    nothing, load = Constant(spec, 0.0), Load("m0", spec, Location("model.safetensors", 0, 8))
    assert having(one) == having(other) == having(nothing)
    assert having(load, one) == having(load, other) == having(load, nothing)
    assert len({having(one), having(load, one), having(one, load), having(one, one), having(Constant(spec, 1.0))}) == 5


def test_lengths_of_drawn_rows_do_not_change_the_digest(plan: Plan) -> None:
    """They are those of the base model's own, which is in it, and known only once it has been read."""
    spec = TensorSpec("router", DType.F32, (1, 2))

    def having(x: Expression, scale: float, key: str = "key") -> str:
        noise = Noise(x, "normal", scale, key, DType.F32)
        return replaced(plan, Concat((x, noise), TensorSpec("router", DType.F32, (2, 2)))).digest

    zero, load = Constant(spec, 0.0), Load("m0", spec, Location("model.safetensors", 0, 8))
    assert having(zero, 0.25) == having(zero, 0.5)
    assert len({having(zero, 0.25), having(zero, 0.25, "another"), having(load, 0.25), having(load, 0.5)}) == 4


def replaced(plan: Plan, expression: Expression) -> Plan:
    """The plan with another expression for its first tensor."""
    first, *rest = plan.shards
    tensors = (replace(first.tensors[0], expression=expression), *first.tensors[1:])
    return replace(plan, shards=(replace(first, tensors=tensors), *rest))
