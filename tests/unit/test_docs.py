"""The documents are right: generated parts are up to date, recipes load, commands parse, links lead somewhere.

So are the commands of the workflows.
"""

from __future__ import annotations

import ast
import html
import inspect
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped] # its stubs are a package of their own
import pytest
import typer.main
import yaml

import mergekit_ray
from docs import recipe_schema
from mergekit_ray.architectures.moe.registry import FAMILIES
from mergekit_ray.cli import app
from mergekit_ray.config.fields import RecipeModel
from mergekit_ray.config.stages import Around
from mergekit_ray.core.registry import METHODS

ROOT = Path(__file__).parents[2]
SCHEMA = jsonschema.Draft202012Validator(json.loads(recipe_schema.FILE.read_text()))
WITH_COMMANDS = ("README.md", "CONTRIBUTING.md", "RELEASE.md", "SECURITY.md")
PAGES = [*(ROOT / name for name in WITH_COMMANDS), *sorted((ROOT / "docs").rglob("*.md"))]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
FOLDERS = (".ci/", ".github/", "configs/", "docker/", "helm/", "release/")
"""Whose files are checked for being there."""
_FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks() -> Iterator[Block]:
    for page in PAGES:
        text = page.read_text()
        for match in _FENCE.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            yield Block(str(page.relative_to(ROOT)), line, match["language"], match["text"])


def steps() -> Iterator[Block]:
    """What workflows run, as blocks without a language."""
    for page in WORKFLOWS:
        text = page.read_text()
        for job in yaml.safe_load(text)["jobs"].values():
            for run in (step["run"] for step in job.get("steps", []) if "run" in step):
                yield Block(page.name, text.count("\n", 0, text.index(run.splitlines()[0])) + 1, "", run)


BLOCKS = [*blocks(), *steps()]
YAML = [block for block in BLOCKS if block.language == "yaml"]
COMMANDS = [
    (str(block), line)
    for block in BLOCKS
    if not block.language
    for line in block.text.replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith((" ", "#"))
]


@pytest.mark.parametrize("block", YAML, ids=str)
def test_yaml_is_accepted(block: Block) -> None:
    """Recipes by our loader, values by the chart's schema, runtime environments by what Ray knows."""
    data, *stages = yaml.safe_load_all(block.text)
    if {"models", "slices", "modules", "experts"} & data.keys():
        mergekit_ray.load_recipe(block.text)
        for each in (data, *stages):
            SCHEMA.validate(each)
    elif data.keys() <= {"pip", "env_vars", "working_dir"}:
        assert all(isinstance(line, str) for line in data["pip"])
    else:
        schema = json.loads((ROOT / "helm/mergekit-ray/values.schema.json").read_text())
        values = yaml.safe_load((ROOT / "helm/mergekit-ray/values.yaml").read_text())
        jsonschema.validate(_laid_over(values, data), schema)


@pytest.mark.parametrize(("place", "line"), COMMANDS, ids=[f"{place}-{i}" for i, (place, _) in enumerate(COMMANDS)])
def test_commands_exist(place: str, line: str) -> None:
    """Ours are parsed with all their options; of others, what belongs to this project is there."""
    del place
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"\w+=.*", words[0]):
        words.pop(0)
    if "--" in words:
        _check_ours(words[words.index("--") + 1 :])
        words = words[: words.index("--")]
    if not words or words[0] not in OTHERS:
        _check_ours(words)
        return
    if words[0] == "make":
        assert {word for word in words[1:] if "=" not in word} <= TARGETS
    for word in words:
        if word.removeprefix("./").startswith(FOLDERS):
            assert (ROOT / word).exists(), word


OTHERS = (
    "make",
    "pip",
    "ray",
    "helm",
    "kubectl",
    "podman",
    "docker",
    "docker/build.sh",
    "docker/podman.sh",
    ".ci/run",
    "python",
    "python3",
    ".",
    "cd",
    "mkdir",
    "test",
    "git",
    "cosign",
    "export",
    "eval",
    "model_signing",
    "huggingface-cli",
    "hf",
    "aws",
    "argo",
    "gh",
)
"""Programs that are not ours."""


def test_long_commands_are_broken() -> None:
    for block in BLOCKS:
        if block.page.startswith("docs/") and not block.language:
            for line in block.text.splitlines():
                assert len(line) <= 100, f"{block}: break it with a backslash: {line}"


def _check_ours(words: list[str]) -> None:
    program, *arguments = words
    group: Any = typer.main.get_command(app)
    if program == "merge":
        command: Any = group.commands["merge"]
    else:
        assert program == "mergekit-ray", f"{program!r} is neither ours nor known"
        command = group.commands[arguments.pop(0)]
    while hasattr(command, "commands") and not arguments[0].startswith("-"):
        command = command.get_command(None, arguments.pop(0))
    # Raises for options that are not there, values of the wrong kind, and arguments that are missing.
    command.make_context(program, arguments)


def _laid_over(values: Any, changes: Any) -> Any:
    """As Helm does it: mappings are merged, and what is null is taken away."""
    if not isinstance(values, dict) or not isinstance(changes, dict):
        return changes
    merged = {**values, **{key: _laid_over(values.get(key), value) for key, value in changes.items()}}
    return {key: value for key, value in merged.items() if value is not None}


_OURS = re.compile(
    r"https://(?:github\.com/mergekit-ray/mergekit-ray/(?:blob|tree)|raw\.githubusercontent\.com/mergekit-ray/mergekit-ray)/main/"
)


@pytest.mark.parametrize(
    "page", sorted({*ROOT.glob("*.md"), *PAGES}), ids=lambda page: str(page.relative_to(ROOT)).removesuffix(".md")
)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    """On GitHub; the site checks its own when it is built."""
    for link in re.findall(r"\]\(([^)\s]+)\)", _FENCE.sub("", page.read_text())):
        _check_link(link, page)
        assert page.name != "README.md" or "://" in link, f"{link} leads nowhere on PyPI"


def test_links_have_names() -> None:
    for page in set(PAGES) - {ROOT / "docs/families.md"}:  # which quotes what others' programs say
        text = re.sub(r"`[^`]*`", "", _FENCE.sub("", page.read_text()))
        assert not re.search(r"\[(?:here|this|link|see)\]\(", text, re.IGNORECASE), page.name
        assert not re.search(r"(?<![(\"<\w/=])https?://", text), f"{page.name}: a bare address"


def test_links_of_the_package() -> None:
    for link in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"].values():
        _check_link(link, ROOT / "README.md")


def _check_link(link: str, page: Path) -> None:
    path, _, anchor = _OURS.sub(f"{ROOT}/", link).partition("#")
    if "://" in path:
        return
    target = page.parent / path if path else page
    assert target.exists(), link
    if anchor:
        headings = re.findall(r"^#+ (.*)", target.read_text(), re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}, link


@pytest.mark.parametrize("page", ["RELEASE.md", "SECURITY.md", ".github/pull_request_template.md"])
def test_files_and_targets_in_running_text_exist(page: str) -> None:
    for word in re.findall(r"`([^`\n]+)`", _FENCE.sub("", (ROOT / page).read_text())):
        if word.startswith("make "):
            assert word.removeprefix("make ") in TARGETS
        elif re.fullmatch(r"[\w./-]+\.(md|py|sh|toml|yml|yaml)", word):
            assert (ROOT / word).exists(), word


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_call_workflows_that_exist(workflow: Path) -> None:
    for job in yaml.safe_load(workflow.read_text())["jobs"].values():
        if "uses" in job:
            assert (ROOT / job["uses"]).is_file(), job["uses"]


def test_the_chart_has_the_version_that_its_archive_is_released_under() -> None:
    assert yaml.safe_load((ROOT / "helm/mergekit-ray/Chart.yaml").read_text())["version"] == mergekit_ray.__version__


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built without a warning: all links and anchors lead somewhere."""
    site = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "--fail-on-warning", "--keep-going", "docs", str(site)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return site


def read(site: Path, page: str) -> str:
    """A page's text as a reader sees it, without tags."""
    return html.unescape(re.sub(r"<[^>]+>", "", (site / page).read_text()))


def test_all_pages_are_in_the_site(site: Path) -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        built = (site / page.relative_to(ROOT / "docs")).with_suffix(".html").read_text()
        assert "<h1" in built, page.name
        assert "site: " not in built, page.name


def test_the_site_needs_no_server(site: Path) -> None:
    """Scripts, styles and the search's index are files beside the pages, none of which is fetched."""
    assert (site / "searchindex.js").read_text().startswith("Search.setIndex(")
    for page in site.rglob("*.html"):
        for source in re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"([^\"]+)\"", page.read_text()):
            assert not re.match(r"https?:|//", source), f"{page.name} fetches {source}"


def test_the_site_describes_every_method(site: Path) -> None:
    page = read(site, "reference/methods.html")
    for name in METHODS.names():
        assert METHODS.get(name).summary in page
        assert METHODS.get(name).parameter_names().keys() <= set(re.findall(r"[\w-]+", page))


def test_the_site_describes_every_command(site: Path) -> None:
    page = read(site, "reference/commands.html")
    assert "<str>" not in page
    assert "-h, --help" in page
    group: Any = typer.main.get_command(app)
    commands = dict(group.commands)
    commands |= {f"recipe {name}": command for name, command in commands["recipe"].commands.items()}
    for name, command in commands.items():
        assert f"mergekit-ray {name} " in page
        assert {option for parameter in command.params for option in parameter.opts if option[0] == "-"} <= set(
            re.findall(r"--?[\w-]+", page)
        )


def test_the_site_describes_every_key(site: Path) -> None:
    words = set(re.findall(r"\w+", read(site, "reference/recipe.html")))
    for model in recipe_schema.MODELS:
        keys = {field.alias or name for name, field in model.model_fields.items()}
        assert keys <= words
        assert keys <= recipe_schema.descriptions(model).keys(), f"{model.__name__} leaves keys undescribed"


def test_every_part_of_a_recipe_is_described() -> None:
    assert set(RecipeModel.__subclasses__()) == {*recipe_schema.MODELS, Around}


def test_the_site_describes_every_name_of_the_package(site: Path) -> None:
    page = (site / "reference/python.html").read_text()
    names = [name for name in mergekit_ray.__all__ if not name.startswith("_")]
    for name in [name for name in names if inspect.ismodule(getattr(mergekit_ray, name))]:
        names.remove(name)
        names += [f"{name}.{each}" for each in getattr(mergekit_ray, name).__all__]
    for name in names:
        assert f'id="mergekit_ray.{name}"' in page


def test_the_site_shows_types_and_whole_sentences(site: Path) -> None:
    page = read(site, "reference/python.html")
    assert "options: MergeOptions | None = None" in page
    assert "Whether values of this type can be averaged: float16" in page
    assert "<function" not in page
    assert "MergeResult" in page.partition("merge(recipe: ")[2].partition("\n")[0]


def test_the_site_lists_every_moe_family(site: Path) -> None:
    page = read(site, "moe.html")
    for name in FAMILIES.names():
        assert name in page


def messages() -> list[str]:
    """Every text in the package's source, with a null character in place of what an f-string fills in."""
    found = []
    for file in (ROOT / "mergekit_ray").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_messages_that_are_explained_are_ours() -> None:
    ours = messages()
    pages = "".join(page.read_text() for page in (ROOT / "docs").glob("*.md"))
    tables = re.findall(r"^\| message \|.*\n\|[-|]+\n((?:\|.*\n)+)", pages, re.MULTILINE)
    explained = re.findall(r"^\| `([^`]+)` \|", "".join(tables), re.MULTILINE)
    assert len(explained) > 35
    for message in explained:
        parts = [part.strip() for part in message.split("…") if part.strip()]
        assert any(all(part in text for part in parts) for text in ours), f"nothing says {message!r}"


def test_the_pictures_are_current() -> None:
    done = subprocess.run([sys.executable, "docs/draw_pictures.py", "--check"], cwd=ROOT, check=False)
    assert done.returncode == 0, "run `python docs/draw_pictures.py`"
