"""Names the machine and the software that figures were taken with."""

from __future__ import annotations

import mmap
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import psutil


def describe_machine(folder: Path) -> str:
    """One line: CPU model, cores, memory, kernel, and the device and file system below ``folder``."""
    memory_gib = psutil.virtual_memory().total / (1 << 30)
    return (
        f"Machine: {_cpu_model()}, {os.cpu_count()} cores, {memory_gib:.0f} GiB memory, "
        f"Linux {platform.release()}, {_disk(folder)}"
    )


def touch_memory(spare_bytes: int = 3 << 30) -> None:
    """Write to nearly all memory that is free, once, and let go of it.

    A virtual machine gets its memory from the host page by page when it is first touched, which takes many times as
    long as any later touch. Whoever is measured first would pay for that, or whoever takes more memory.
    """
    num_bytes = psutil.virtual_memory().available - spare_bytes
    if num_bytes <= 0:
        return
    with mmap.mmap(-1, num_bytes) as memory:
        zeros = bytes(1 << 20)
        for _ in range(num_bytes >> 20):
            memory.write(zeros)


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    fields = {name.strip(): value.strip() for name, value in pairs}
    family = f" (family {fields['cpu family']}, model {fields['model']})" if "cpu family" in fields else ""
    return fields.get("model name", platform.machine()) + family


def _disk(folder: Path) -> str:
    place = folder.resolve()
    mounts = [part for part in psutil.disk_partitions(all=True) if place.is_relative_to(part.mountpoint)]
    if not mounts:
        return "unknown disk"
    mount = max(mounts, key=lambda part: len(part.mountpoint))
    device = Path(mount.device).name
    rotational = Path("/sys/block") / device / "queue/rotational"
    if device.startswith(("vd", "xvd")):  # says "rotational" whatever is behind it
        kind: str | None = "virtual"
    else:
        kind = (
            {"0": "solid state", "1": "rotational"}.get(rotational.read_text().strip()) if rotational.exists() else None
        )
    return f"{mount.fstype} on {mount.device}" + (f" ({kind})" if kind else "")


def describe_versions(mergekit_python: Path) -> str:
    """One line: versions of Python, torch, mergekit-ray, and of mergekit in its own environment."""
    ours = {name: _version(name) for name in ("mergekit-ray", "torch", "safetensors")}
    script = "from importlib.metadata import version as v; print(v('mergekit'), 'with torch', v('torch'))"
    theirs = "not installed"
    if mergekit_python.exists():
        theirs = subprocess.run(
            [str(mergekit_python), "-c", script], capture_output=True, text=True, check=True
        ).stdout.strip()
    listed = ", ".join(f"{name} {version}" for name, version in ours.items())
    return f"Versions: Python {sys.version.split()[0]}, {listed}; mergekit {theirs}"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "(from the working tree)"
