"""The notebooks in examples/ run, and show what they were saved with.

To save one anew: `SAVE_NOTEBOOKS=1 pytest tests/integration/test_examples.py`, which runs it beside a Hub of its own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from support.servers.hub_server import TOKEN, Repo, environment
from support.servers.hub_writing import WritableHubServer
from support.tokenizers.models import byte_level, save_model

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


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WritableHubServer]:
    """A Hub with the models that notebooks read, for the processes that the test starts."""
    with WritableHubServer() as server:
        for seed, name in enumerate(("chat", "math")):
            folder = save_model(tmp_path / name, byte_level(), seed, num_hidden_layers=4)
            files = {path.name: path.read_bytes() for path in folder.iterdir()}
            server.repos[f"tiny-models/{name}"] = Repo(f"tiny-models/{name}")
            server.repos[f"tiny-models/{name}"].commit(files)
        for setting, value in environment(server, tmp_path / "home", token=TOKEN).items():
            monkeypatch.setenv(setting, value)
        monkeypatch.setenv("PYTHONWARNINGS", "ignore:IProgress not found")  # tqdm's, where ipywidgets are not installed
        yield server


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_what_it_was_saved_with(path: Path, tmp_path: Path, hub: WritableHubServer) -> None:
    notebook = nbformat.read(path, as_version=4)
    saved = shown(notebook)
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where, coalesce_streams=True).execute()
    if os.environ.get("SAVE_NOTEBOOKS"):
        nbformat.write(notebook, path)
        return
    assert shown(notebook) == saved
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert all(output.output_type != "error" and output.get("name") != "stderr" for output in outputs)
    html = [output.data["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    assert sum(text.startswith("<table>") for text in html) >= 3
    assert sum(bool(re.search(r"is\s+complete", text)) for text in html) == 1  # where the bar was
    if path.stem == "yaml_to_hub":
        assert {"config.json", "tokenizer.json", "README.md", "mergekit-ray.json"} <= hub.repos[
            "your-name/Pair-slerp"
        ].head().keys()
        assert hub.private == {"your-name/Pair-slerp"}
