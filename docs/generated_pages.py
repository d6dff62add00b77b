"""Hooks of mkdocs: what the site says of merge methods and MoE families comes from their registries, at every build."""

from __future__ import annotations

import inspect
import sys

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from mergekit_ray.architectures.moe.registry import FAMILIES
from mergekit_ray.cli.tables import methods_markdown

_FAMILIES_GO_HERE = "<!-- table of the families -->"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add ``methods.md``, which is in no folder."""
    files.append(File.generated(config, "methods.md", content=methods_markdown()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put the table of MoE families where a page asks for it."""
    del page, config, files
    return markdown.replace(_FAMILIES_GO_HERE, families_markdown())


def families_markdown() -> str:
    """One row for each MoE family, in the order in which they are tried: the first line of its module describes it."""
    lines = ["| `architecture` | experts from | what it is |", "|---|---|---|"]
    for family in sorted(map(FAMILIES.get, FAMILIES.names()), key=lambda each: each.rank):
        described = (inspect.getdoc(sys.modules[family.__module__]) or "").splitlines()[0]
        lines.append(f"| `{family.name}` | {', '.join(family.dense_types)} | {described} |")
    return "\n".join(lines)
