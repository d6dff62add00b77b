"""Work that grows with the number of tensors, not with its square: counted, as times are not the same twice."""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Callable
from typing import Any

import pytest

from support.fake_checkpoints import Shapes, checkpoint, plan_of

NUM, TIMES = 400, 4
ENDS: Shapes = {"model.embed_tokens.weight": (4, 2), "lm_head.weight": (4, 2), "model.norm.weight": (2,)}

MODELS: dict[str, Callable[[int], tuple[Shapes, int]]] = {
    "many layers": lambda n: ({f"model.layers.{i}.mlp.w.weight": (2, 2) for i in range(n)}, n),
    "many in a layer": lambda n: ({f"model.layers.0.mlp.w{i}.weight": (2, 2) for i in range(n)}, 1),
    "beyond the layers": lambda n: ({f"model.layers.{i}.mlp.w.weight": (2, 2) for i in range(n)}, 1),
    "outside of layers": lambda n: ({f"w{i}.weight": (2, 2) for i in range(n)} | {"model.layers.0.w": (2,)}, 1),
    "many stacks": lambda n: (
        {f"s{i}.0.w.weight": (2, 2) for i in range(n)} | {"model.layers.0.w": (2, 2), "model.layers.1.w": (2, 2)},
        2,
    ),
}


def model(kind: str, name: str, num: int) -> Any:
    shapes, num_layers = MODELS[kind](num)
    return checkpoint(name, {**ENDS, **shapes}, {"num_hidden_layers": num_layers})


@pytest.fixture(autouse=True, scope="module")
def imported() -> None:
    """What is imported and kept at the first plan is no work that grows."""
    plan_of(slices(2), *(model("many layers", name, 2) for name in ("a/a", "b/b")))


def num_calls(text: str, *models: Any) -> int:
    """Of functions, while a recipe is read and planned."""
    profile = cProfile.Profile()
    profile.runcall(plan_of, text, *models)
    return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined] # not in typeshed


def linear(*models: str) -> str:
    listed = "".join(f"  - {{model: {name}, parameters: {{weight: [0.1, 0.9]}}}}\n" for name in models)
    return f"merge_method: linear\nmodels:\n{listed}"


def slices(num: int) -> str:
    """A slice of each layer, as long frankenmerges have."""
    text = "merge_method: linear\nslices:\n"
    for i in range(num):
        text += "  - sources:\n"
        for name in ("a/a", "b/b"):
            text += f"    - {{model: {name}, layer_range: [{i}, {i + 1}], parameters: {{weight: 0.5}}}}\n"
    return text


@pytest.mark.parametrize("kind", MODELS)
def test_planning_is_linear_in_tensors(kind: str) -> None:
    text = linear("a/a", "b/b")
    calls = [num_calls(text, model(kind, "a/a", n), model(kind, "b/b", n)) for n in (10, NUM, TIMES * NUM)]
    assert calls[2] - calls[0] < 1.2 * TIMES * (calls[1] - calls[0])


def test_planning_is_linear_in_slices() -> None:
    models = [model("many layers", name, TIMES * NUM) for name in ("a/a", "b/b")]
    calls = [num_calls(slices(n), *models) for n in (10, NUM, TIMES * NUM)]
    assert calls[2] - calls[0] < 1.2 * TIMES * (calls[1] - calls[0])
