"""From recipe and headers to a plan: what is refused, what is pinned, and that it is quick to say."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from benchmarks.plan_405b import headers, layer_groups, recipe
from mergekit_ray.core.errors import PlanError
from mergekit_ray.core.plan import InputFile, Plan, SideFile
from mergekit_ray.methods.shared.order_statistics import collected_bytes
from mergekit_ray.planning.make import make_plan, referenced_models
from mergekit_ray.planning.windows import (
    BATCH_BYTES,
    FIXED_BYTES,
    MAX_PART_BYTES,
    PARTS_AT_ONCE,
    WINDOW_BYTES,
    memory_needed,
)
from mergekit_ray.storage.protocols import FileStat
from support.fake_checkpoints import checkpoint, llama, llama_shapes, plan_of, recipe_of

LINEAR = (
    "merge_method: linear\nmodels:\n- {model: /a, parameters: {weight: 1}}\n- {model: /b, parameters: {weight: 1}}\n"
)


def test_a_filter_that_matches_nothing_is_reported() -> None:
    text = """
merge_method: linear
models:
- model: /a
  parameters: {weight: [{filter: slef_attn, value: 1}, {filter: "*", value: 2}]}
- model: /b
  parameters: {weight: [{filter: mlp, value: 1}, {filter: layers.1., value: 3}, {value: 2}]}
"""
    assert plan_of(text, llama("/a"), llama("/b")).warnings == (
        "filter 'slef_attn' matches no tensor's name: its value is not used; did you mean 'self_attn'?",
    )


def test_models_that_are_needed_the_donor_first() -> None:
    text = "base_model: /c\nmerge_method: ties\nmodels:\n" + "".join(
        f"- {{model: /{m}, parameters: {{weight: 1}}}}\n" for m in "abca"
    )
    assert [str(model) for model in referenced_models(recipe_of(text))] == ["/c", "/a", "/b"]


def test_side_files_of_the_donor_are_pinned() -> None:
    side = [FileStat("tokenizer.json", 9, "9-1")]
    plan = plan_of(LINEAR, replace(llama("/a"), side_files=side), llama("/b"))
    assert plan.side_files == (SideFile("m0", InputFile("tokenizer.json", 9, "9-1")),)


def test_where_it_is_written_does_not_change_the_plan() -> None:
    plans = [plan_of(f"output: {path}\n{LINEAR}", llama("/a"), llama("/b")) for path in ("/x", "/y")]
    assert plans[0].digest == plans[1].digest
    assert "output" not in plans[0].recipe
    sized = plan_of("output: {max_shard_size: 100}\n" + LINEAR, llama("/a"), llama("/b"))
    assert sized.digest != plans[0].digest


def test_nothing_to_make_is_an_error() -> None:
    shapes = {"model.rotary_emb.inv_freq": (4,)}
    having = checkpoint("/a", shapes)
    lacking = checkpoint("/b", {})
    with pytest.raises(PlanError, match="the recipe makes no tensors"):
        plan_of(LINEAR, having, lacking)


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties"])
def test_a_model_of_the_405b_shape(method: str) -> None:
    num_layers = 6
    dense = recipe(method)
    plan = make_plan(dense, {ref: headers(str(ref), num_layers) for ref in referenced_models(dense)})
    kv = 16384 // 128 * 8
    per_layer = 2 * 16384 + 3 * 16384 * 53248 + 2 * 16384 * 16384 + 2 * kv * 16384
    num_parameters = num_layers * per_layer + 2 * 128256 * 16384 + 16384
    assert plan.num_parameters == num_parameters
    assert plan.read_bytes == 4 * 2 * num_parameters
    assert plan.config == headers("/models/0", num_layers).config
    assert {t.spec for shard in plan.shards for t in shard.tensors} == {s for g in layer_groups(num_layers) for s in g}
    # The files are mapped, and the result leaves in parts: of a whole tensor only what `ties` collects is held.
    parts = BATCH_BYTES + PARTS_AT_ONCE * MAX_PART_BYTES
    held = {"dare_ties": parts, "ties": parts + collected_bytes(128256 * 16384, 3, 4)}
    if method in held:
        assert memory_needed(plan) == FIXED_BYTES + -(-held[method] * 9 // 8)
    else:
        assert memory_needed(plan) <= FIXED_BYTES + WINDOW_BYTES * 9 // 8
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))).digest == plan.digest


def test_each_layer_of_a_plan_keeps_its_own_parameters() -> None:
    dense = recipe("linear", 2)
    plan = make_plan(dense, {ref: headers(str(ref), 3) for ref in referenced_models(dense)})
    found = {t.spec.name: t.expression for shard in plan.shards for t in shard.tensors}
    weights = [found[f"model.layers.{i}.mlp.up_proj.weight"].input_parameters[0]["weight"] for i in range(3)]
    assert weights == [0.1, 0.9, 0.4]  # three knots, three layers


def test_models_of_llama_shapes_need_no_config_but_their_own() -> None:
    plan = plan_of(LINEAR, checkpoint("/a", llama_shapes(1), {}), checkpoint("/b", llama_shapes(1), {}))
    assert plan.config == {"torch_dtype": "bfloat16", "tie_word_embeddings": False}
