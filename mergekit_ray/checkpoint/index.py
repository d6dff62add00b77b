"""``model.safetensors.index.json``: which file holds which tensor."""

from __future__ import annotations

from mergekit_ray.checkpoint.strict_json import parse_object
from mergekit_ray.core.errors import CheckpointError
from mergekit_ray.storage.names import is_confined

INDEX_NAME = "model.safetensors.index.json"
MAX_INDEX_BYTES = 256 << 20
"""A weight map of a million tensors has about 100 MB."""


def parse_index(data: bytes, where: str) -> dict[str, str]:
    """The weight map of an index: the file of each tensor.

    Raises:
        CheckpointError: not JSON, no ``weight_map``, or it names something that is not a weight file inside the
            checkpoint, of the kind that the index is of.
    """
    found = parse_object(data, where, "index")
    weight_map = found.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(
            "there is no weight_map from tensors to files", where=where, remedy="download the index again"
        )
    if not weight_map:
        raise CheckpointError("the weight_map is empty", where=where, remedy="download the index again")
    ending = ".bin" if where.endswith(".bin.index.json") else ".safetensors"
    for file in set(weight_map.values()):
        if not is_confined(file) or "\\" in file or ":" in file:
            raise CheckpointError(
                f"the weight_map names {file!r}, which is not a file of this checkpoint",
                where=where,
                remedy="do not use this checkpoint unless you know why it points elsewhere",
            )
        if not file.endswith(ending):
            raise CheckpointError(
                f"the weight_map names {file!r}, which is not a {ending} file",
                where=where,
                remedy="download the index again",
            )
    return weight_map
