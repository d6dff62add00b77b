"""A small model of every causal and multimodal family that the installed transformers knows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

from support.sweep.small_configs import small_config

MAPPINGS = (
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)
"""What families are swept: those of these classes. A family that is in several is made as the first says."""

_MOST_PARAMETERS = 8_000_000


class CannotBuildError(Exception):
    """Why a family is not swept."""


def families() -> dict[str, str]:
    """The name of the class of each family, by its ``model_type``."""
    named: dict[str, str] = {}
    for mapping in MAPPINGS:
        for model_type, name in mapping.items():
            named.setdefault(model_type, name if isinstance(name, str) else name[0])
    return dict(sorted(named.items()))


@dataclass
class SmallFamily:
    """Two small models of a family, saved by transformers.

    Attributes:
        model_type: the family.
        folder: where its models are kept.
    """

    model_type: str
    folder: Path

    @cached_property
    def model_class(self) -> Any:
        """Of its models."""
        return getattr(transformers, families()[self.model_type])

    def make(self) -> list[Path]:
        """Save two models with other weights.

        Raises:
            CannotBuildError: transformers does not make one this small, or does not read back what it saves.
        """
        try:
            return [self._save(self.folder / name, seed) for seed, name in enumerate("ab")]
        except CannotBuildError:
            raise
        except Exception as error:
            raise CannotBuildError(f"transformers: {_in_one_line(error, self.folder)}") from error

    def _save(self, path: Path, seed: int) -> Path:
        config = small_config(self.model_type)
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in self.model_class(config).parameters())
        if size > _MOST_PARAMETERS:
            raise CannotBuildError(f"the smallest has {size / 1e6:.0f} million parameters")
        torch.manual_seed(seed)
        model = self.model_class(config).float().eval()
        _fill(model, seed)
        model.save_pretrained(path)
        loaded, complaint = self.load(path)
        if complaint := complaint or difference(loaded.state_dict(), model.state_dict()):
            raise CannotBuildError(f"transformers does not read back what it saves: {complaint}")
        return path

    def load(self, path: Path) -> tuple[Any, str]:
        """A model as transformers loads it, and what it says of missing, unexpected or misshapen weights."""
        model, report = self.model_class.from_pretrained(
            path, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True
        )
        complaints = []
        for key, found in report.items():
            if found:
                listed = sorted(map(str, found))
                more = f" and {len(listed) - 1} more" if len(listed) > 1 else ""
                complaints.append(f"{key.replace('_', ' ')}: {listed[0]}{more}")
        return model.eval(), "; ".join(complaints)


def difference(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 0.0) -> str:
    """How two sets of tensors differ, in a few words; empty if they do not.

    Args:
        ours, expected: tensors by name.
        tolerance: relative to the largest magnitude of a tensor.
    """
    for some, what in ((expected.keys() - ours.keys(), "missing"), (ours.keys() - expected.keys(), "too many")):
        if some:
            return f"{len(some)} tensors {what}, such as {min(some)}"
    wrong = []
    for name, tensor in ours.items():
        other = expected[name]
        if tensor.shape != other.shape or tensor.dtype != other.dtype:
            return f"{name}: {tensor.dtype} {list(tensor.shape)} instead of {other.dtype} {list(other.shape)}"
        if not tensor.is_floating_point():
            if not torch.equal(tensor, other):
                wrong.append(name)
        elif tensor.numel() and not (tensor - other).abs().max() <= tolerance * other.abs().max():
            wrong.append(name)
    return f"{len(wrong)} of {len(ours)} tensors have other numbers, such as {wrong[0]}" if wrong else ""


def _fill(model: Any, seed: int) -> None:
    """Random numbers in all parameters and stored buffers, in norms and biases too: ones and zeros hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    stored = set(model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        for name, buffer in model.named_buffers():
            if name in stored and buffer.is_floating_point():
                buffer.mul_(1 + 0.1 * torch.rand(buffer.shape, generator=generator))


def _in_one_line(error: Exception, folder: Path) -> str:
    return " ".join(str(error).replace(f"{folder}/", "").split())[:200] or type(error).__name__
