"""How an operation is run, as the command line's options and Python's arguments have it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mergekit_ray.core.arguments import check_fields, is_whole
from mergekit_ray.core.errors import ConfigError
from mergekit_ray.evaluation.device.names import AUTO, check_device, resolve
from mergekit_ray.executors.cluster import check_ray_device, wants_ray


@dataclass(frozen=True)
class MergeOptions:
    """How a merge is run. Of this only ``device`` may change the bytes written, by the last bit of some elements.

    Attributes:
        executor: ``local`` threads, ``ray`` actors, or None: Ray inside a Ray job or when an address is given.
        address: of the Ray cluster.
        num_workers: shards processed at a time; None for one or two here, and as many as the CPUs allow on Ray.
        memory_bytes: budget of each worker; None for what the plan needs to overlap its work.
        overwrite: replace another model that is at the output.
        allow_non_finite: let NaN and infinities pass.
        allow_config_conflicts: merge models whose configs contradict each other, with warnings.
        unsafe_ignore_tokenizers: merge rows of embeddings even if they belong to different tokens, with warnings.
        chunk_elements: elements computed at a time on the CPU; None for the default.
        device: ``auto`` (a GPU if there is one), ``cpu``, ``cuda``, or one GPU by its number, ``cuda:1``.

    Raises:
        ConfigError: a value that none of them can have.
    """

    executor: Literal["local", "ray"] | None = None
    address: str | None = None
    num_workers: int | None = None
    memory_bytes: int | None = None
    overwrite: bool = False
    allow_non_finite: bool = False
    allow_config_conflicts: bool = False
    unsafe_ignore_tokenizers: bool = False
    chunk_elements: int | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        counts = ("num_workers", "memory_bytes", "chunk_elements")
        flags = ("overwrite", "allow_non_finite", "allow_config_conflicts", "unsafe_ignore_tokenizers")
        checks = {
            **{name: (_is_count(getattr(self, name)), "None or a positive integer") for name in counts},
            "executor": (self.executor in (None, "local", "ray"), "None, 'local' or 'ray'"),
            "address": (self.address is None or isinstance(self.address, str), "None or a string"),
            **{name: (isinstance(getattr(self, name), bool), "True or False") for name in flags},
            "device": (isinstance(self.device, str), "a string"),
        }
        check_fields(self, checks)
        check_device(self.device)

    def check(self) -> None:
        """Check that the options go together and that the device is there, before anything is read.

        Raises:
            ConfigError: an address that nobody would connect to, or a device that is not there.
        """
        if self.executor == "local" and self.address is not None:
            raise ConfigError(
                "`executor='local'` runs in this process, and `address=` names a Ray cluster",
                remedy="leave one of them out",
            )
        if self.device == AUTO:
            return
        if wants_ray(self.executor, self.address):
            check_ray_device(self.device)
        else:
            resolve(self.device)


def _is_count(value: object) -> bool:
    return value is None or is_whole(value, 1)
