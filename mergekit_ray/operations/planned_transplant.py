"""The plan of a transplant, for which rows may have to be read: whether tokens were trained shows only there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Final

from mergekit_ray.checkpoint.opening import Checkpoint
from mergekit_ray.config.reference import ModelReference
from mergekit_ray.config.transplant import TransplantOptions
from mergekit_ray.core.errors import ModelError
from mergekit_ray.core.expressions import Load
from mergekit_ray.core.plan import Plan
from mergekit_ray.planning.lowering import Model
from mergekit_ray.planning.make import models_of
from mergekit_ray.planning.transplant.plan import transplant_plan
from mergekit_ray.tokenizers.reading import read_tokenizer
from mergekit_ray.tokenizers.spelling import spellings

if TYPE_CHECKING:
    import torch

_SHARE: Final = 50
"""One of so many rows counts as hardly trained: the two in a hundred that the paper takes as candidates."""

_UNUSED: Final = frozenset({0xC0, 0xC1, *range(0xF5, 0x100)})
"""Bytes that are in no UTF-8."""

_READ_BYTES: Final = 64 << 20


def planned(
    model: ModelReference,
    donor: ModelReference,
    checkpoints: Mapping[ModelReference, Checkpoint],
    wanted: TransplantOptions,
) -> Plan:
    """Plan a transplant. See `planning.transplant.plan.transplant_plan` for the errors.

    Args:
        model: that gets new tokens.
        donor: whose tokens it gets.
        checkpoints: the opened headers of both.
        wanted: how. With ``magikarp``, both embeddings are read.
    """
    opened = models_of(checkpoints)
    both = opened[model], opened[donor]
    out = (
        (hardly_trained(both[0]), hardly_trained(both[1])) if wanted.magikarp else (frozenset[int](), frozenset[int]())
    )
    return transplant_plan(*both, wanted, out)


def hardly_trained(model: Model) -> frozenset[int]:
    """The rows of an embedding whose tokens were hardly trained, by the look of them.

    Tokens that never occur keep what they began with, so rows close to those of tokens that cannot occur are suspect
    (S. Land and M. Bartolo 2024, "Fishing for Magikarp", https://arxiv.org/abs/2405.05417). Taken are the 2 % whose
    distance is the smallest, to the mean of rows without a token or for bytes that are in no text; or to zero, if there
    are none. These themselves are taken, too.

    Raises:
        ModelError: the embedding is not stored as it is.
        CheckpointError, StorageError: it could not be read.
    """
    import numpy as np  # noqa: PLC0415 - only needed here
    import torch  # noqa: PLC0415

    assert model.anatomy.embedding is not None
    load = model.weights.expression(model.anatomy.embedding)
    if not isinstance(load, Load) or not load.spec.dtype.is_floating:
        raise ModelError(
            "whether tokens were trained is seen from the embedding as it is stored, and it is computed (an adapter, "
            "or codes)",
            where=f"model {model.reference}",
            remedy="leave out `magikarp=True`, or merge the adapter first",
        )
    unused = _unused(model, load.spec.shape[0])
    total = torch.zeros(load.spec.shape[1], dtype=torch.float64)
    for first, rows in _read(model, load) if unused else ():
        here = [row - first for row in unused if first <= row < first + rows.shape[0]]
        total += rows[here].sum(dim=0)
    middle = total / max(1, len(unused))
    distances = np.concatenate([(rows - middle).norm(dim=1).numpy() for _, rows in _read(model, load)])
    distances[unused] = np.inf
    count = max(1, (len(distances) - len(unused)) // _SHARE)
    return frozenset(np.argsort(distances, kind="stable")[:count].tolist()) | frozenset(unused)


def _unused(model: Model, num_rows: int) -> list[int]:
    """Rows without a token, or for a byte that is in no text."""
    tokenizer = read_tokenizer(model.checkpoint)
    if tokenizer is None:
        return []
    found = {number for number in range(num_rows) if number not in tokenizer.names()}
    for token, spelling in spellings(tokenizer).items():
        if spelling.is_byte and spelling.data[0] in _UNUSED:
            found.add(tokenizer.ids[token])
    return sorted(row for row in found if row < num_rows)


def _read(model: Model, load: Load) -> Iterator[tuple[int, torch.Tensor]]:
    """Runs of rows in float64, each with the index of the first."""
    import numpy as np  # noqa: PLC0415

    from mergekit_ray.evaluation.scratch import as_tensor  # noqa: PLC0415 - imports torch

    checkpoint = model.weights.inputs[load.model]
    rows, width = load.spec.shape[0], load.spec.num_bytes // max(1, load.spec.shape[0])
    step = max(1, _READ_BYTES // max(1, width))
    for first in range(0, rows, step):
        last = min(first + step, rows)
        data = np.empty((last - first) * width, np.uint8)
        start = load.location.start
        run = (start + first * width, start + last * width)
        version = checkpoint.files[load.location.file].version
        checkpoint.source.read_ranges(load.location.file, [run], [data.data], version=version)
        yield first, as_tensor(data, load.spec.dtype).view(last - first, -1).double()
