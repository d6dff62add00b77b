"""The tensors of a published model, each read when asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from mergekit_ray.checkpoint.opening import Checkpoint, open_checkpoint
from mergekit_ray.core.errors import ConfigError
from mergekit_ray.core.sizes import counted, format_bytes
from mergekit_ray.core.spelling import nearest
from mergekit_ray.core.tensors import TensorSpec
from mergekit_ray.storage.opening import open_source

if TYPE_CHECKING:
    import torch


class Tensors(Mapping[str, "torch.Tensor"]):
    """A model's tensors by name, in file order. Looking one up reads it, from wherever the model is; none is kept.

    Attributes:
        specs: name, dtype and shape of every tensor, from the headers.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self.specs: Mapping[str, TensorSpec] = {name: spec for name, (spec, _) in checkpoint.tensors.items()}

    @classmethod
    def at(cls, uri: str) -> Tensors:
        """Open the model at a folder or URI: its config and headers.

        Raises:
            MergekitRayError: see `checkpoint.opening.open_checkpoint`.
        """
        return cls(open_checkpoint(open_source(uri), uri, allow_raw=True))

    def load(self, name: str) -> torch.Tensor:
        """Read a tensor into memory of the CPU, in the dtype it is stored in.

        Raises:
            ConfigError: there is none of this name; says which name is nearest.
            CheckpointError: its file changed since the model was opened.
            StorageError: the store failed.
        """
        if name not in self.specs:
            raise ConfigError(
                f"no tensor is called {name!r}{nearest(name, self.specs)}",
                where=self._checkpoint.source.uri,
                remedy="`tensors()` lists them all",
            )
        import torch  # noqa: PLC0415 - only whoever looks at values pays for torch

        from mergekit_ray.evaluation.scratch import TORCH_DTYPES  # noqa: PLC0415

        spec, place = self._checkpoint.tensors[name]
        if not spec.num_bytes:
            return torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype])
        data = bytearray(spec.num_bytes)
        version = self._checkpoint.files[place.file].version
        self._checkpoint.source.read_ranges(place.file, [(place.start, place.end)], [memoryview(data)], version=version)
        return torch.frombuffer(data, dtype=TORCH_DTYPES[spec.dtype]).reshape(spec.shape)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.specs:
            raise KeyError(name)
        return self.load(name)

    def __contains__(self, name: object) -> bool:
        return name in self.specs

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def __repr__(self) -> str:
        size = format_bytes(sum(spec.num_bytes for spec in self.specs.values()))
        return f"<Tensors of {self._checkpoint.source.uri}: {counted(len(self), 'tensor')}, {size}>"
