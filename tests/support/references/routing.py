"""What routing is compared with: transformers' forward of a whole model, one prompt at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mergekit_ray.checkpoint.opening import Checkpoint, open_checkpoint
from mergekit_ray.config.moe_recipe import MoeRecipe
from mergekit_ray.routing.batches import Batch
from mergekit_ray.routing.layers import prompt_states
from mergekit_ray.routing.routers import Routers, routers
from mergekit_ray.storage.opening import open_source

NUM_LAYERS = 4

LONG = "the capital of France is Paris the capital of Paris is France is"
"""Longer than every family's sliding window here."""

TOKENS = [(1, 4, 5), (1, 9), (1, *range(20, 40)), (1, 7, 8, 9), (1, *range(60, 71)), (1, 4, 5, 6)]


class WatchedSource:
    """A store that notes what is read of it."""

    def __init__(self, folder: Path) -> None:
        self._inner = open_source(str(folder))
        self.whole: list[str] = []
        self.reads: list[list[tuple[int, int]]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def read(self, name: str, *, max_bytes: int) -> bytes:
        self.whole.append(name)
        return self._inner.read(name, max_bytes=max_bytes)

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]], buffers: Any, **options: Any) -> int:
        self.reads.append(list(ranges))
        return self._inner.read_ranges(name, ranges, buffers, **options)


def opened(folder: Path) -> Checkpoint:
    return open_checkpoint(open_source(str(folder)), str(folder))


def whole_model_states(model: Any, tokens: Sequence[Sequence[int]], *, average: bool) -> np.ndarray:
    """The states of each prompt, alone, by transformers' forward of a whole model: [layers, prompts, hidden]."""
    states = []
    for prompt in tokens:
        with torch.inference_mode():
            found = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[:-1]
        states.append(torch.stack([h[0].double().mean(0) if average else h[0, -1].double() for h in found]))
    return torch.stack(states, 1).numpy()


def streamed_states(checkpoint: Checkpoint, batches: Sequence[Batch], *, average: bool) -> np.ndarray:
    """`prompt_states` in the order of the prompts."""
    states = prompt_states(checkpoint, batches, average=average)
    order = np.argsort([index for batch in batches for index in batch.indices])
    return states[:, order]


def assert_same_states(ours: np.ndarray, expected: np.ndarray) -> None:
    """Within float32 rounding of each layer's largest state."""
    assert ours.dtype == np.float32
    assert ours.shape == expected.shape
    for layer, (found, wanted) in enumerate(zip(ours, expected, strict=True)):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=5e-6 * np.abs(wanted).max(), err_msg=f"layer {layer}")


def recipe_of(base: Path, experts: Sequence[tuple[Sequence[str], Sequence[str]]], **more: Any) -> MoeRecipe:
    listed = [
        {"source_model": f"./expert-{i}", "positive_prompts": list(positive), "negative_prompts": list(negative)}
        for i, (positive, negative) in enumerate(experts)
    ]
    return MoeRecipe.model_validate({"base_model": str(base), "experts": listed, **more})


def route(recipe: MoeRecipe, **options: Any) -> Routers:
    return routers(recipe, {recipe.base_model: opened(Path(recipe.base_model.path))}, **options)


def unit(x: np.ndarray) -> np.ndarray:
    return np.asarray(x / np.linalg.norm(x))


PROMPTS = [(["the capital of France", "Paris", LONG], ["is the", "of France"]), (["France is", "of the of"], [])]
