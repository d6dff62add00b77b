"""What is tried with each family: a linear merge, a frankenmerge, a LoRA; and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

import mergekit_ray
from mergekit_ray.core.errors import MergekitRayError
from mergekit_ray.operations.options import MergeOptions
from mergekit_ray.operations.verify import verify
from mergekit_ray.storage.opening import open_source
from support.adapters import passthrough, quiet
from support.models import tensors_of
from support.sweep.building import SmallFamily, difference
from support.sweep.layers import Order, different_kinds, expected_after_slices, stacks_of, text_layers
from support.sweep.small_configs import FIRST_PLACEHOLDER

_OPTIONS = MergeOptions(executor="local", num_workers=1, device="cpu")

_ROUNDING = 2.0**-22
"""Of float32, relative to the largest number of a tensor."""

_PEFT_ROUNDING = 1e-4
"""PEFT multiplies the factors in float32."""


class Status(Enum):
    """How a column ended."""

    WORKS = "works"
    REFUSED = "refused"
    WRONG = "WRONG"
    NONE = "–"


@dataclass(frozen=True)
class Outcome:
    """What came of one column of one family.

    Attributes:
        status: how it ended.
        note: the sentence of a refusal, what is wrong, or what could not be tried.
    """

    status: Status
    note: str = ""


class _WrongError(Exception):
    """A merged model is not what it must be."""


class _NotTriedError(Exception):
    """A column that a family does not have."""


def outcomes(model_type: str, folder: Path) -> dict[str, Outcome]:
    """Try all columns with a family.

    Args:
        model_type: the family.
        folder: an empty one, for its models.

    Raises:
        CannotBuildError: there is no small model of it.
    """
    family = SmallFamily(model_type, folder)
    with quiet():
        family.make()
        return {name: _outcome(column, family) for name, column in COLUMNS.items()}


def _outcome(column: Callable[[SmallFamily], str], family: SmallFamily) -> Outcome:
    try:
        return Outcome(Status.WORKS, column(family))
    except _NotTriedError as reason:
        return Outcome(Status.NONE, str(reason))
    except MergekitRayError as refusal:
        return Outcome(Status.REFUSED, _sentence(refusal, family.folder))
    except Exception as error:  # noqa: BLE001 - a crash is a finding like any other
        text = str(error) if isinstance(error, _WrongError) else f"{type(error).__name__}: {error}"
        return Outcome(Status.WRONG, " ".join(text.replace(f"{family.folder}/", "").split())[:400])


def _sentence(refusal: MergekitRayError, folder: Path) -> str:
    """A refusal in one line, without the folder of the day."""
    return "; ".join(line.strip() for line in str(refusal).replace(f"{folder}/", "").splitlines())


def _linear(family: SmallFamily) -> str:
    a, b, out = (family.folder / name for name in ("a", "b", "linear"))
    models = [{"model": str(model), "parameters": {"weight": 0.5}} for model in (a, b)]
    mergekit_ray.merge({"merge_method": "linear", "models": models}, out, options=_OPTIONS)
    _check(tensors_of(out), _mean(tensors_of(a), tensors_of(b)), _ROUNDING, "the files")
    merged = _loaded(family, out)
    loaded = [family.load(path)[0].state_dict() for path in (a, b)]
    _check(merged.state_dict(), _mean(*loaded), _ROUNDING, "the loaded model")
    return ""


def _mean(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: ((tensor.double() + b[name].double()) / 2).to(tensor.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in a.items()
    }


def _slices(family: SmallFamily) -> str:
    a, b, out = (family.folder / name for name in ("a", "b", "slices"))
    sources = {"a": family.load(a)[0], "b": family.load(b)[0]}
    depth = text_layers(sources["a"].config)
    if depth is None or depth < 4:
        raise _NotTriedError("it has no layers to cut")
    cuts = [("a", 0, 3), ("b", 1, 4), ("a", 3, depth)]
    listed = [{"sources": [{"model": str(family.folder / m), "layer_range": [i, j]}]} for m, i, j in cuts]
    mergekit_ray.merge({"merge_method": "passthrough", "slices": listed}, out, options=_OPTIONS)
    order: Order = [(model, layer) for model, first, last in cuts for layer in range(first, last)]
    merged = _loaded(family, out)
    states = {name: model.state_dict() for name, model in sources.items()}
    stack = stacks_of(merged.state_dict(), states["a"], order)
    if not stack:
        raise _WrongError("no stack of the loaded model has the layers that the recipe says")
    _check(merged.state_dict(), expected_after_slices(merged.state_dict(), states, order), 0.0, "the loaded model")
    if different := different_kinds(merged, sources, stack, order):
        raise _WrongError(different)
    return _run(merged, sources["a"])


def _run(merged: Any, source: Any) -> str:
    """Let a model read random ids; says why not where even its source does not."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, FIRST_PLACEHOLDER, (1, 16), generator=generator)
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if source.config.is_encoder_decoder else {})
    try:
        with torch.inference_mode():
            source(**inputs)
    except Exception:  # noqa: BLE001 - whatever it lacks
        return "loaded and compared, but not run: its forward wants more than text"
    with torch.inference_mode():
        said = merged(**inputs)
    if not all(value.isfinite().all() for value in said.values() if isinstance(value, torch.Tensor)):
        raise _WrongError("its output is not finite")
    return ""


def _lora(family: SmallFamily) -> str:
    a, adapter, out = (family.folder / name for name in ("a", "adapter", "lora"))
    adapted = _adapted(family, a)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    adapted.save_pretrained(adapter)
    mergekit_ray.merge(passthrough(f"{a}+{adapter}"), out, options=_OPTIONS)
    merged = _loaded(family, out)
    _check(merged.state_dict(), adapted.merge_and_unload().state_dict(), _PEFT_ROUNDING, "the loaded model")
    return ""


def _adapted(family: SmallFamily, path: Path) -> Any:
    """A model with LoRA on what PEFT has for its family, or else on all that is linear and that PEFT can adapt."""
    reasons = []
    for targets, excluded in ((None, None), ("all-linear", None), ("all-linear", ["out_proj", "conv1d"])):
        model = family.load(path)[0]
        try:
            settings = LoraConfig(r=4, lora_alpha=6, target_modules=targets, exclude_modules=excluded)
            return get_peft_model(model, settings)
        except Exception as error:  # noqa: BLE001 - told in the table
            reasons.append(" ".join(str(error).split())[:100])
    raise _NotTriedError(f"PEFT finds no targets: {reasons[1]}")


def _loaded(family: SmallFamily, path: Path) -> Any:
    model, complaint = family.load(path)
    if complaint:
        raise _WrongError(f"transformers finds {complaint}")
    if problems := verify(open_source(str(path))).problems:
        raise _WrongError(f"verify finds {'; '.join(problems)}")
    return model


def _check(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float, where: str) -> None:
    if different := difference(ours, expected, tolerance):
        raise _WrongError(f"{where}: {different}")


COLUMNS: dict[str, Callable[[SmallFamily], str]] = {"linear": _linear, "slices": _slices, "LoRA": _lora}
"""What is tried, by the column's title. Each says what could not be tried, nothing if all could."""
