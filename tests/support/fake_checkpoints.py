"""Checkpoints that are headers only, for tests of planning: no file anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_ray.checkpoint.layout import place
from mergekit_ray.checkpoint.opening import Checkpoint
from mergekit_ray.config.load import load_recipe
from mergekit_ray.config.recipe import DenseRecipe
from mergekit_ray.config.reference import ModelReference
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.expressions import loads
from mergekit_ray.core.plan import Plan
from mergekit_ray.core.tensors import Location, TensorSpec
from mergekit_ray.planning.make import make_plan
from mergekit_ray.storage.local.store import LocalSource
from mergekit_ray.storage.protocols import FileStat

FILE = "model.safetensors"
HEADER_BYTES = 1000

Shapes = Mapping[str, Sequence[int] | tuple[DType, Sequence[int]]]
"""Shape of each tensor, or dtype and shape."""


def specs_of(shapes: Shapes, dtype: DType = DType.BF16) -> dict[str, TensorSpec]:
    found = {}
    for name, given in shapes.items():
        own, shape = given if given and isinstance(given[0], DType) else (dtype, given)
        assert isinstance(own, DType)
        assert not isinstance(shape, int | DType)
        found[name] = TensorSpec(name, own, tuple(shape))
    return found


def checkpoint(
    path: str,
    shapes: Shapes,
    config: Mapping[str, Any] | None = None,
    dtype: DType = DType.BF16,
    **more: Any,
) -> Checkpoint:
    """One file: a header of `HEADER_BYTES`, then the tensors back to back in the given order."""
    specs = specs_of(shapes, dtype)
    ranges = place(list(specs.values()))
    tensors = {
        name: (spec, Location(FILE, HEADER_BYTES + start, HEADER_BYTES + end))
        for (name, spec), (start, end) in zip(specs.items(), ranges, strict=True)
    }
    num_bytes = HEADER_BYTES + (ranges[-1][1] if ranges else 0)
    files = {FILE: FileStat(FILE, num_bytes, f"{num_bytes}-7")}
    return Checkpoint(LocalSource(path), path, files, tensors, dict(config or {}), **{"side_files": [], **more})


def llama_shapes(
    num_layers: int, *, vocabulary: int = 10, hidden: int = 4, head: bool = True, inner: int = 6
) -> dict[str, Sequence[int] | tuple[DType, Sequence[int]]]:
    shapes: dict[str, Sequence[int] | tuple[DType, Sequence[int]]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(num_layers):
        at = f"model.layers.{i}"
        shapes[f"{at}.input_layernorm.weight"] = (hidden,)
        shapes[f"{at}.self_attn.q_proj.weight"] = (hidden, hidden)
        shapes[f"{at}.mlp.up_proj.weight"] = (inner, hidden)
    shapes["model.norm.weight"] = (hidden,)
    if head:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    return shapes


def llama(path: str, num_layers: int = 2, *, tied: bool | None = False, dtype: DType = DType.BF16, **sizes: Any) -> Any:
    """A small Llama: its checkpoint. ``tied=None`` leaves the flag out of the config."""
    shapes = llama_shapes(num_layers, head=tied is False, **sizes)
    config: dict[str, Any] = {
        "model_type": "llama",
        "num_hidden_layers": num_layers,
        "vocab_size": sizes.get("vocabulary", 10),
        "torch_dtype": dtype.config_name,
    }
    if tied is not None:
        config["tie_word_embeddings"] = tied
    return checkpoint(path, shapes, config, dtype)


def recipe_of(text: str) -> DenseRecipe:
    loaded = load_recipe(text)
    assert isinstance(loaded, DenseRecipe)
    return loaded


def plan_of(text: str, *checkpoints: Checkpoint) -> Plan:
    """The plan of a recipe over checkpoints, which it names by their paths."""
    recipe = recipe_of(text)
    return make_plan(recipe, {ModelReference.parse(c.reference): c for c in _donor_first(recipe, checkpoints)})


def _donor_first(recipe: DenseRecipe, checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    return sorted(checkpoints, key=lambda c: c.reference != str(recipe.donor))


def expressions_of(plan: Plan) -> dict[str, Any]:
    """The expression of each output tensor, in file order."""
    return {tensor.spec.name: tensor.expression for shard in plan.shards for tensor in shard.tensors}


LINEAR = """
merge_method: linear
models:
- {model: /a, parameters: {weight: 0.25}}
- {model: /b, parameters: {weight: 0.75}}
"""


def sources(expression: Any) -> list[str]:
    """``model: tensor`` of everything that is read."""
    return [f"m{load.model[1:]}: {load.spec.name}" for load in loads(expression)]


def stack(text: str, *models: Any) -> dict[str, list[str]]:
    """What each output tensor is made of."""
    return {name: sources(expression) for name, expression in expressions_of(plan_of(text, *models)).items()}
