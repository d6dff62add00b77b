"""What options may be, alone and together: known before a model is looked at."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

import mergekit_ray
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import ConfigError, MergekitRayError
from mergekit_ray.operations.extract_lora import extract_lora
from mergekit_ray.operations.extract_options import ExtractOptions
from mergekit_ray.operations.options import MergeOptions
from mergekit_ray.operations.reproduce import reproduce
from mergekit_ray.operations.verify import VerifyOptions
from mergekit_ray.planning.extraction import Coverage

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


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: MergeOptions(device="gpu"), "'gpu' is not a device"),
        (lambda: VerifyOptions(sample=-1), "VerifyOptions: sample is -1"),
        (lambda: VerifyOptions(sample=True), "VerifyOptions: sample is True"),
        (lambda: VerifyOptions(seed=0.5), "VerifyOptions: seed is 0.5"),  # type: ignore[arg-type] # wrong on purpose
        (lambda: VerifyOptions(finite=None), "VerifyOptions: finite is None"),  # type: ignore[arg-type] # wrong on purpose
        (lambda: ExtractOptions(rank="8"), "ExtractOptions: rank is '8'"),  # type: ignore[arg-type] # wrong on purpose
        (lambda: ExtractOptions(energy="0.9"), "ExtractOptions: energy is '0.9'"),  # type: ignore[arg-type] # wrong on purpose
        (lambda: ExtractOptions(rank=8, coverage=None), "ExtractOptions: coverage is None"),  # type: ignore[arg-type] # wrong on purpose
        (lambda: ExtractOptions(rank=8, dtype=16), "ExtractOptions: dtype is 16"),  # type: ignore[arg-type] # wrong on purpose
        (lambda: ExtractOptions(rank=8, dtype="bfloat"), "'bfloat'.*did you mean 'bfloat16'"),
        (lambda: ExtractOptions(rank=8, dtype=DType.I8), "unknown dtype 'int8'"),
        (lambda: Coverage(embeddings="yes"), "Coverage: embeddings is 'yes'"),  # type: ignore[arg-type] # wrong on purpose
    ],
)
def test_options_are_checked_when_they_are_made(make: Callable[[], object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make()


@pytest.mark.parametrize(
    "run",
    [
        lambda given: mergekit_ray.merge(RECIPE, "out", options=given),
        lambda given: mergekit_ray.plan(RECIPE, options=given),
        lambda given: extract_lora(NOWHERE, NOWHERE, "out", ExtractOptions(rank=2), given),
        lambda given: reproduce({}, "out", given),
    ],
)
def test_options_of_another_type_are_refused(run: Callable[[Any], object]) -> None:
    with pytest.raises(ConfigError, match=r"`options=MergeOptions\(overwrite=True\)`"):
        run({"overwrite": True})


def test_other_arguments_of_another_type_are_refused() -> None:
    wrong: Any = {"rank": 8}
    with pytest.raises(ConfigError, match=r"wanted is \{'rank': 8\}\n  give `wanted=ExtractOptions"):
        extract_lora(NOWHERE, NOWHERE, "out", wrong)
    with pytest.raises(ConfigError, match=r"`options=VerifyOptions\(rank=8\)`"):
        mergekit_ray.verify(NOWHERE, wrong)
    for run in (
        lambda: mergekit_ray.merge(RECIPE, wrong),
        lambda: extract_lora(NOWHERE, NOWHERE, wrong, ExtractOptions(rank=2)),
        lambda: reproduce({}, wrong),
    ):
        with pytest.raises(ConfigError, match=r"output is .*\n  give a folder or URI"):
            run()


@pytest.mark.parametrize("name", ["bfloat16", "bf16", "torch.bfloat16", "BF16", DType.BF16])
def test_a_dtype_is_named_as_in_recipes(name: str | DType) -> None:
    assert ExtractOptions(rank=8, dtype=name).dtype is DType.BF16


def test_what_each_can_be_is_taken() -> None:
    MergeOptions("ray", "auto", 2, 1 << 30, overwrite=True, allow_non_finite=True, chunk_elements=1, device="cuda:1")
