"""The worked examples of CONTRIBUTING.md and docs/new-store.md, in a copy of the tree, where nothing else is edited.

An example is a fenced block of Python, and the paragraph before it is the path of its file.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.affected import KNOWN

ROOT = Path(__file__).parents[2]
TEXT = "".join((ROOT / page).read_text() for page in ("CONTRIBUTING.md", "docs/new-store.md"))
EXAMPLES = dict(re.findall(r"^`([\w/]+\.py)`\n\n```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL))
COLLECTED = ["tests/unit", "tests/integration", f"--ignore=tests/unit/{Path(__file__).name}"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def run(tree: Path, *command: str, **environment: str) -> str:
    """Run a program on a tree, which it imports from, too; what it wrote if all is well."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=tree,
        env=inherited | {"PYTHONPATH": f"{tree}:{tree / 'tests'}"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git knows, as it is on the disk, with the examples."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone: which files are of the tree is not known")
    tree = tmp_path_factory.mktemp("contribution")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.rstrip("\0").split("\0"):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    for name, text in EXAMPLES.items():
        assert not (tree / name).exists(), "an example is a new file"
        (tree / name).write_text(text)
    return tree


def test_there_is_an_example_and_its_test_of_each_kind() -> None:
    assert len(EXAMPLES) == TEXT.count("```python\n") == 6
    for folder in ("methods", "storage", "architectures/moe"):
        [example] = [Path(name) for name in EXAMPLES if name.startswith(f"mergekit_ray/{folder}/")]
        assert f"test_{example.name}" in {Path(name).name for name in EXAMPLES}


def test_another_distribution_registers_the_same_files_by_entry_points(tmp_path: Path) -> None:
    groups = {"methods": "methods", "stores": "storage", "moe_families": "architectures/moe"}
    metadata = tmp_path / "your_package-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: your-package\nVersion: 1\n")
    (tmp_path / "your_package").mkdir()
    with (metadata / "entry_points.txt").open("w") as declared:
        for group, folder in groups.items():
            [name] = [Path(name) for name in EXAMPLES if name.startswith(f"mergekit_ray/{folder}/")]
            (tmp_path / "your_package" / name.name).write_text(EXAMPLES[str(name)])
            declared.write(f"[mergekit_ray.{group}]\n{name.stem} = your_package.{name.stem}\n")
    code = (
        "from mergekit_ray.architectures.moe.registry import FAMILIES\n"
        "from mergekit_ray.core.registry import METHODS\n"
        "from mergekit_ray.storage import open_sink\n"
        "for found in (METHODS.get('harmonic'), FAMILIES.get('cohere2_moe'), type(open_sink('memory://x'))):\n"
        "    assert found.__module__.startswith('your_package.'), found\n"
    )
    run(ROOT, "-c", code, PYTHONPATH=f"{ROOT}:{tmp_path}")


@pytest.mark.parametrize(
    "command",
    [
        ("-m", "ruff", "check"),
        ("-m", "ruff", "format", "--check"),
        ("-m", "mypy"),
        ("-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"),
    ],
    ids=["ruff check", "ruff format", "mypy", "lint-imports"],
)
def test_the_checks_pass(tree: Path, command: tuple[str, ...]) -> None:
    run(tree, *command)


def test_all_tests_pass_that_a_new_entry_can_break(tree: Path, tmp_path: Path) -> None:
    """The examples' own, and those that `support.affected` finds to depend on what the registries have."""
    (tmp_path / "known").write_text(run(ROOT, "-m", "pytest", "--collect-only", "-q", *COLLECTED))
    report = tmp_path / "report.xml"
    options = ["-q", "-n", "2", "--dist", "loadfile", "-p", "support.affected", f"--junit-xml={report}"]
    run(tree, "-m", "pytest", *options, *COLLECTED, **{KNOWN: str(tmp_path / "known")})
    for name in EXAMPLES:
        if name.startswith("tests/"):
            assert name.removesuffix(".py").replace("/", ".") in report.read_text(), f"{name} was not run"
