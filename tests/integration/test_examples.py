"""The notebooks in examples/ run, and show what they were saved with.

To save one anew: `jupyter execute --inplace examples/first_merge.ipynb`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]


def shown(notebook: Any) -> list[list[str]]:
    """What each cell shows, as text: without the folder it ran in, times, and what the live bar leaves."""
    cells = []
    for cell in notebook.cells:
        texts = []
        for output in cell.get("outputs", []):
            if output.output_type != "display_data":
                text = output.get("text") or output["data"]["text/plain"]
                text = re.sub(r"/\S+/(?=first_merge/)", "", text)
                texts.append(re.sub(r"\b(\d+ min )?\d+ s\b", "N s", text))
        cells.append(texts)
    return cells


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_what_it_was_saved_with(path: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    saved = shown(notebook)
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where, coalesce_streams=True).execute()
    assert shown(notebook) == saved
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert all(output.output_type != "error" and output.get("name") != "stderr" for output in outputs)
    html = [output.data["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    assert sum(text.startswith("<table>") for text in html) >= 3
    assert sum(bool(re.search(r"is\s+complete", text)) for text in html) == 1  # where the bar was
