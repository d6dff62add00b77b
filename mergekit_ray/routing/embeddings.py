"""Rows of a model's input embeddings: those that prompts need, and no others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from mergekit_ray.checkpoint.opening import Checkpoint
from mergekit_ray.checkpoint.reader import ByteRange, read_into
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import ModelError
from mergekit_ray.evaluation.pieces import Bytes

_KEY: Final = "model"


def embedding_rows(checkpoint: Checkpoint, name: str, tokens: Sequence[int]) -> Bytes:
    """Rows of an embedding matrix as they are stored: uint8 [len(tokens), bytes of a row].

    Args:
        checkpoint: the model.
        name: of the matrix.
        tokens: rows, ascending, each once.

    Raises:
        ModelError: there is no such row.
        CheckpointError, StorageError: it could not be read.
    """
    spec, location = checkpoint.tensors[name]
    num_rows, width = spec.shape
    strange = tokens[0] if tokens[0] < 0 else tokens[-1]
    if not 0 <= strange < num_rows:
        raise ModelError(
            f"the tokenizer knows token {strange}, and {name} has {num_rows} rows",
            where=checkpoint.reference,
            remedy="the tokenizer beside the base model is not the model's own",
        )
    row_bytes = width * spec.dtype.itemsize
    rows = np.empty((len(tokens), row_bytes), np.uint8)
    version = checkpoint.files[location.file].version
    requests = []
    for row, token in zip(rows, tokens, strict=True):
        start = location.start + token * row_bytes
        requests.append(ByteRange(_KEY, location.file, start, start + row_bytes, version, row.data))
    read_into({_KEY: checkpoint.source}, requests)
    return rows


def as_numbers(rows: Bytes, dtype: DType) -> np.ndarray:
    """Stored rows as float64, which represents each value exactly.

    Raises:
        ValueError: they are no floating numbers.
    """
    match dtype:
        case DType.BF16:
            return (rows.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        case DType.F16 | DType.F32 | DType.F64:
            return rows.view({2: np.float16, 4: np.float32, 8: np.float64}[dtype.itemsize]).astype(np.float64)
    raise ValueError(f"{dtype.config_name} is not floating point")
