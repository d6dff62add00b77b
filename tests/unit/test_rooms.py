"""The layout of the code: no circles, files and folders of a size, a picture that is current."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[2]
MOST_LINES = 400
MOST_FILES = 25


def test_no_file_imports_itself_by_way_of_others() -> None:
    """Imports for annotations and within functions count too."""
    graph = grimp.build_graph("mergekit_ray")
    packages = {module for module in graph.modules if graph.find_children(module)}
    for module in graph.modules - packages:
        for imported in graph.find_modules_directly_imported_by(module):
            chain = None if imported in packages else graph.find_shortest_chain(imported, module)
            assert chain is None, f"a circle: {' -> '.join((module, *chain))}"


@pytest.mark.parametrize("folder", ["mergekit_ray", "tests", "benchmarks", "demo", "docker", "docs", "helm"])
def test_files_and_folders_are_of_a_size(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    long = [str(file.relative_to(ROOT)) for file in files if len(file.read_text().splitlines()) > MOST_LINES]
    assert not long, "split them by what they hold"
    for parent in {file.parent for file in files}:
        assert sum(file.parent == parent for file in files) <= MOST_FILES, f"too many files in {parent}"


def test_what_methods_share_knows_no_method() -> None:
    graph = grimp.build_graph("mergekit_ray")
    rooms = ("mergekit_ray.methods.shared", "mergekit_ray.methods.compiled")
    shared = {module for room in rooms for module in graph.find_descendants(room)} | {*rooms}
    methods = graph.find_children("mergekit_ray.methods") - {*rooms}
    for module in shared:
        assert not graph.find_modules_directly_imported_by(module) & methods, module


ROOMS = sorted(init.parent.name for init in (ROOT / "mergekit_ray").glob("*/__init__.py"))
QUOTED = re.compile(rf"(?<!`)`(?:mergekit_ray[./])?((?:{'|'.join(ROOMS)})(?:[./]\w+)+)(?<!\.json)`(?!`)")
EXAMPLE = re.compile(r"^`[\w/]+\.py`\n\n```python\n.*?^```$", re.MULTILINE | re.DOTALL)
"""A file that a page has in full: it is not there."""

PROSE = [
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "README.md",
    *(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")),
]


def exists(quoted: str) -> bool:
    """Whether a path, a module, or a name in a module (a member of a class too) is there."""
    if quoted.endswith(".py"):
        return (ROOT / "mergekit_ray" / quoted).is_file()
    parts = quoted.replace("/", ".").split(".")
    for length in range(len(parts), 0, -1):
        place = ROOT / "mergekit_ray" / "/".join(parts[:length])
        file = place.with_suffix(".py") if place.with_suffix(".py").is_file() else place / "__init__.py"
        if file.is_file():
            text = file.read_text()
            return all(re.search(rf"\b{name}\b", text) for name in parts[length:])
    return False


def test_modules_and_names_that_prose_and_docstrings_quote_are_there() -> None:
    files = [*(ROOT / "mergekit_ray").rglob("*.py"), *(ROOT / "tests").rglob("*.py"), *(ROOT / name for name in PROSE)]
    wrong = [
        f"{file.relative_to(ROOT)}: {quoted}"
        for file in files
        for quoted in QUOTED.findall(EXAMPLE.sub("", file.read_text()))
        if not exists(quoted)
    ]
    assert not wrong


def test_the_picture_of_the_rooms_is_current() -> None:
    done = subprocess.run(
        [sys.executable, "docs/draw_floors.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
