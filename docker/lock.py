#!/usr/bin/env python3
"""Write the versions and hashes that the image is built from: ``uv`` on PATH, then ``python docker/lock.py``.

``requirements.txt``        what mergekit-ray needs, without torch
``requirements-cuda.txt``   torch from PyPI with the CUDA libraries that it asks for
``requirements-build.txt``  what builds mergekit-ray's own wheel; not in the image

Versions are those of ``constraints-dev.txt``, so that the image holds what the tests ran with. ``requirements-cpu.txt``
is not written: PyPI does not have torch's CPU build, and its hashes are copied from PyTorch's index by hand.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CUDA = re.compile(r"(torch|triton|nvidia-.*|cuda-.*)==")
PLATFORMS = ("x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu")
HEADER = "# {about}. Written by docker/lock.py.\n"


def compile_requirements(source: str, platform: str, *options: str) -> list[str]:
    """One block of lines per package, hashes included, in order of names.

    Args:
        source: requirements, one a line.
        platform: as uv names it.
        options: more for uv.
    """
    command = ["uv", "pip", "compile", "-", "--quiet", "--no-header", "--generate-hashes", "--only-binary", ":all:"]
    command += ["--annotation-style", "line", "--python-version", "3.11", "--python-platform", platform]
    command += ["--constraint", "constraints-dev.txt", *options]
    output = subprocess.run(command, cwd=ROOT, input=source, text=True, stdout=subprocess.PIPE, check=True).stdout
    kept = [line for line in output.splitlines(keepends=True) if not line.lstrip().startswith("#")]
    return re.split(r"(?m)^(?=\S)", "".join(kept))[1:]


def lock(name: str, about: str, blocks: list[str]) -> None:
    """Write one of the files."""
    path = ROOT / "docker" / name
    path.write_text(HEADER.format(about=about) + "".join(blocks))
    print(f"{path.relative_to(ROOT)}: {len(blocks)} packages")


def main() -> None:
    """Resolve, compare the platforms, write."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [*project["project"]["dependencies"], *project["project"]["optional-dependencies"]["moe"]]
    everything, elsewhere = (compile_requirements("\n".join(wanted), platform) for platform in PLATFORMS)
    if everything != elsewhere:
        sys.exit(f"{' and '.join(PLATFORMS)} need different packages: the lock files hold one set for both")
    lock("requirements.txt", "The image's packages, without torch", [b for b in everything if not CUDA.match(b)])
    lock("requirements-cuda.txt", "torch with CUDA, from PyPI", [b for b in everything if CUDA.match(b)])
    build = compile_requirements("\n".join(project["build-system"]["requires"]), PLATFORMS[0])
    lock("requirements-build.txt", "What builds the wheel of mergekit-ray", build)


if __name__ == "__main__":
    main()
