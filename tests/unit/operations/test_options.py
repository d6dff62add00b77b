"""What options may be, alone and together: known before a model is looked at."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

import mergekit_ray
from mergekit_ray.core.errors import ConfigError, MergekitRayError
from mergekit_ray.operations.extract_lora import ExtractOptions, extract_lora
from mergekit_ray.operations.options import MergeOptions
from mergekit_ray.operations.reproduce import reproduce

COUNTS = ("num_workers", "memory_bytes", "chunk_elements")
NOWHERE = "/there/is/no/such/model"
RECIPE = {"merge_method": "linear", "models": [{"model": NOWHERE, "parameters": {"weight": 1}}], "dtype": "float32"}


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    cuda = SimpleNamespace(is_available=lambda: False, device_count=lambda: 0)
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setitem(sys.modules, "torch.cuda", cuda)  # type: ignore[arg-type]  # no module, on purpose
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"executor": "local", "address": "10.0.0.1:6379"}, "`address=` names a Ray cluster"),
        ({"device": "cuda"}, "device 'cuda'"),
        ({"device": "cuda:1", "executor": "local"}, "device 'cuda:1'"),
        ({"device": "cuda:1", "executor": "ray"}, "a GPU of its own"),
        ({"device": "gpu"}, "'gpu' is not a device"),
    ],
)
@pytest.mark.usefixtures("without_gpu")
def test_wrong_options_are_told_first(options: dict[str, Any], said: str) -> None:
    """The models are not there either."""
    chosen = MergeOptions(**options)
    for run in (
        lambda: mergekit_ray.merge(RECIPE, "out", options=chosen),
        lambda: extract_lora(NOWHERE, NOWHERE, "out", ExtractOptions(rank=2), chosen),
        lambda: reproduce({}, "out", chosen),
    ):
        with pytest.raises(ConfigError, match=said):
            run()


@pytest.mark.parametrize("options", [{}, {"device": "cpu"}, {"device": "cuda", "executor": "ray"}, {"address": "h:1"}])
@pytest.mark.usefixtures("without_gpu")
def test_sound_options_come_to_the_models(options: dict[str, Any]) -> None:
    with pytest.raises(MergekitRayError, match="no such folder"):
        mergekit_ray.merge(RECIPE, "out", options=MergeOptions(**options))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in COUNTS for value in (0, -3, "2", 2.5, True)),
        ("executor", "foo"),
        ("executor", "RAY"),
        ("address", 6379),
        ("device", None),
        ("overwrite", "no"),
        ("allow_non_finite", None),
        ("allow_config_conflicts", "yes"),
    ],
)
def test_what_none_can_be_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"MergeOptions: {name} is {value!r}"):
        MergeOptions(**{name: value})


def test_what_each_can_be_is_taken() -> None:
    MergeOptions("ray", "auto", 2, 1 << 30, overwrite=True, allow_non_finite=True, chunk_elements=1, device="cuda:1")
