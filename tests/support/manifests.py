"""Manifests of published models, changed as somebody would who also puts their digests right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mergekit_ray.output.destination import MANIFEST_FILE
from mergekit_ray.output.manifest import FileDigest, own_digest


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a model's manifest, and its own digest with it."""
    path = folder / MANIFEST_FILE
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps({**data, "manifest_sha256": own_digest(data)}))


def list_files_anew(folder: Path) -> None:
    """Make a model's manifest list its files as they are."""
    edit_manifest(
        folder,
        lambda found: found.update(
            files={name: FileDigest.of((folder / name).read_bytes()).to_json() for name in found["files"]}
        ),
    )


def make_old(folder: Path) -> None:
    """Give a model the manifest that earlier versions wrote: of the shards alone."""
    path = folder / MANIFEST_FILE
    data = json.loads(path.read_text())
    del data["files"], data["manifest_sha256"]
    path.write_text(json.dumps(data))
