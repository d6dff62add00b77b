"""Windows of attention in the output's ``config.json``, where layers of models with and without one are stacked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from mergekit_ray.planning.output_config import Layers, output_config


def adapted(donor: dict[str, Any], layers: Layers) -> dict[str, Any]:
    return output_config(donor, layers=layers, stacks={}, main=None, dtype=None, tied=None, vocab_size=None)


def cut(config: dict[str, Any], indices: Sequence[int]) -> list[tuple[dict[str, Any], int]]:
    return [(config, i) for i in indices]


WINDOWLESS = {"model_type": "qwen2", "num_hidden_layers": 2, "max_window_layers": 28}
WINDOWED = {**WINDOWLESS, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}


@pytest.mark.parametrize(
    "own",
    [
        {"use_sliding_window": False, "sliding_window": None, "layer_types": ["full_attention"] * 2},
        {"use_sliding_window": False, "sliding_window": 4096},
        {},
    ],
)
def test_layers_bring_the_window_that_the_donor_lacks(own: dict[str, Any]) -> None:
    donor = {**WINDOWLESS, **own}
    found = adapted(donor, [*cut(donor, [0, 1]), *cut(WINDOWED, [0, 1])])
    assert (found["use_sliding_window"], found["sliding_window"]) == (True, 16)
    assert found["max_window_layers"] == 3
    assert found.get("layer_types") in (None, ["full_attention"] * 3 + ["sliding_attention"])
    assert adapted(donor, [*cut(donor, [0]), *cut(WINDOWED, [0])]) == donor
    back = adapted(WINDOWED, [*cut(WINDOWED, [0, 1]), *cut(donor, [1])])
    assert (back["sliding_window"], back["layer_types"]) == (
        16,
        ["full_attention", "sliding_attention", "full_attention"],
    )


@pytest.mark.parametrize(
    ("family", "key", "kind"),
    [("olmo3", "sliding_window", "sliding_attention"), ("x", "attention_chunk_size", "chunked_attention")],
)
def test_a_window_of_none_is_filled(family: str, key: str, kind: str) -> None:
    donor = {"model_type": family, "num_hidden_layers": 1, "layer_types": ["full_attention"], key: None}
    other = {**donor, "layer_types": [kind], key: 8}
    assert adapted(donor, [*cut(donor, [0]), *cut(other, [0])])[key] == 8
    assert adapted(other, [*cut(donor, [0]), *cut({**other, key: 9}, [0])])[key] == 8
