"""Coverage-guided fuzzing of what reads files that others made. Not part of `make test`: it has no end of its own.

    pip install atheris
    PYTHONPATH=tests python -m fuzz.readers header -max_total_time=300

Targets: ``header``, ``index``, ``adapter``, ``pickle``, ``archive``, ``recipe``. Options after the target are
libFuzzer's. Inputs may do nothing but be read, or be refused by one of our own errors; anything else, and memory beyond
1 GiB, ends the run with the input in a file ``crash-...`` or ``oom-...`` here.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import atheris
import torch

with atheris.instrument_imports(include=["mergekit_ray", "yaml"]):
    from mergekit_ray.checkpoint.adapter_config import parse_adapter_config
    from mergekit_ray.checkpoint.header import LENGTH_BYTES, header_length, parse_header
    from mergekit_ray.checkpoint.index import parse_index
    from mergekit_ray.checkpoint.pickled.machine import read_pickle
    from mergekit_ray.checkpoint.pickled.reading import read_pinned_pickle
    from mergekit_ray.config.load import load_recipe

from mergekit_ray.core.errors import CheckpointError, ConfigError
from mergekit_ray.storage.local.store import LocalStore

ROOT = Path(__file__).parents[2]
MAX_MEMORY_MIB = 1024
DATA_BYTES = 1 << 40
"""Of the pretended files: any offset may be in them."""


def header(data: bytes) -> None:
    """A file that begins with these bytes."""
    end = LENGTH_BYTES + header_length(data, DATA_BYTES, "fuzz")
    if end > len(data):
        raise CheckpointError("longer than what is there", where="fuzz")
    found = parse_header(data[:end], DATA_BYTES, "fuzz")
    places = sorted((location.start, location.end) for _, location in found.tensors.values())
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(places)), "tensors overlap"
    assert not places or places[-1][1] <= DATA_BYTES, "a tensor lies beyond the file"


def index(data: bytes) -> None:
    """An index of a checkpoint."""
    found = parse_index(data, "fuzz")
    assert not any(".." in Path(file).parts or Path(file).is_absolute() for file in found.values()), "outside"


def adapter(data: bytes) -> None:
    """``adapter_config.json``."""
    parse_adapter_config(data, "fuzz")


def pickle(data: bytes) -> None:
    """The structure of a pickled checkpoint."""
    read_pickle(data, "fuzz")


def archive(data: bytes) -> None:
    """A whole pickled checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "x.bin").write_bytes(data)
        found, _ = read_pinned_pickle(LocalStore(Path(folder)), "x.bin")
    assert all(0 <= p.start <= p.end <= len(data) for _, p in found.tensors.values()), "a tensor lies beyond the file"


def _saved() -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(2, 3), "b": torch.nn.Parameter(torch.ones(2))}, buffer)
    return buffer.getvalue()


def _structure() -> bytes:
    with zipfile.ZipFile(io.BytesIO(_saved())) as saved:
        return saved.read("archive/data.pkl")


def recipe(data: bytes) -> None:
    """A recipe, as the bytes of a file."""
    load_recipe(data, on_warning=lambda problem: None)


def _header_of(content: Mapping[str, object]) -> bytes:
    text = json.dumps(content).encode()
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


TARGETS: Mapping[str, tuple[Callable[[bytes], None], list[bytes]]] = {
    "header": (
        header,
        [
            _header_of({"a": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}}),
            _header_of(
                {
                    "__metadata__": {"format": "pt"},
                    "a": {"dtype": "F8_E4M3", "shape": [], "data_offsets": [0, 1]},
                    "b": {"dtype": "F32", "shape": [0], "data_offsets": [1, 1]},
                }
            ),
        ],
    ),
    "index": (index, [b'{"metadata": {"total_size": 1}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}']),
    "adapter": (adapter, [b'{"peft_type": "LORA", "r": 8, "lora_alpha": 16, "rank_pattern": {"q_proj": 4}}']),
    "pickle": (pickle, [_structure()]),
    "archive": (archive, [_saved()]),
    "recipe": (recipe, [path.read_bytes() for path in sorted((ROOT / "configs").glob("*.yml"))]),
}


def main() -> None:
    """Fuzz the target named first, starting from a few sound files."""
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        raise SystemExit(f"give one of {', '.join(TARGETS)}, then options of libFuzzer")
    read, seeds = TARGETS[sys.argv.pop(1)]

    def one(data: bytes) -> None:
        with contextlib.suppress(CheckpointError, ConfigError):
            read(data)

    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(seeds):
            (Path(corpus) / str(number)).write_bytes(seed)
        options = [f"-rss_limit_mb={MAX_MEMORY_MIB}", "-max_len=65536", "-timeout=10", *sys.argv[1:]]
        atheris.Setup([sys.argv[0], *options, corpus], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
