"""Extension of Sphinx: parts of pages are made from the code at every build, so that they are never out of date.

A page marks such a part with ``<!-- site: NAME -->`` and ``<!-- /site -->``. GitHub shows what is between the two; on
the site, what `PARTS` makes takes its place.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import typer.main
from sphinx.application import Sphinx

import mergekit_ray
from docs.recipe_schema import MODELS, build, descriptions
from mergekit_ray.architectures.moe.registry import FAMILIES
from mergekit_ray.cli import app as cli
from mergekit_ray.cli.app import HELP
from mergekit_ray.cli.tables import methods_markdown

_PART: Final = re.compile(r"<!-- site: (\w+) -->.*?<!-- /site -->", re.DOTALL)


def methods() -> str:
    """The merge methods, without what `mergekit-ray methods --markdown` says before them: the page says it."""
    return "| method |" + methods_markdown().partition("| method |")[2]


def families() -> str:
    """One row for each MoE family, in the order in which they are tried: the first line of its module describes it."""
    lines = ["| `architecture` | experts from | what it is |", "|---|---|---|"]
    for family in sorted(map(FAMILIES.get, FAMILIES.names()), key=lambda each: each.rank):
        described = (inspect.getdoc(sys.modules[family.__module__]) or "").splitlines()[0]
        lines.append(f"| `{family.name}` | {', '.join(family.dense_types)} | {described} |")
    return "\n".join(lines)


def commands() -> str:
    """Every command with its arguments and options, as ``--help`` has them, but for those of mergekit."""
    group: Any = typer.main.get_command(cli)
    lines = list(_command("mergekit-ray", group))
    for name, command in group.commands.items():
        lines += ["", f"## {name}", "", *_command(f"mergekit-ray {name}", command)]
        below = {} if name == "compat" else getattr(command, "commands", {})
        for part, each in below.items():
            lines += ["", f"## {name} {part}", "", *_command(f"mergekit-ray {name} {part}", each)]
    return "\n".join(lines)


def _command(name: str, command: Any) -> Iterator[str]:
    context = command.context_class(command, info_name=name, **HELP)
    usage = command.get_usage(context).removeprefix("Usage: ").replace("{", "").replace("}", "")
    yield from ("```", re.sub(r"\s+", " ", usage), "```", "", _marked(inspect.cleandoc(command.help or "")))
    rows = [parameter.get_help_record(context) for parameter in command.get_params(context)]
    yield from ("", "| argument or option | default | meaning |", "|---|---|---|")
    for named, said in filter(None, rows):
        names = named.removesuffix(" <str>")  # click's word for the type of all arguments
        meaning, _, rest = said.partition("  [")
        notes = dict.fromkeys(filter(None, rest.rstrip("]").split("; ")))
        default = "".join("required" if note == "required" else f"`{note[9:]}`" for note in notes if note[0] in "rd")
        yield f"| `{_cell(names)}` | {_cell(default)} | {_marked(_cell(meaning))} |"
    yield ""


def _marked(text: str) -> str:
    """Help texts with their options as code."""
    return re.sub(r"(?<![\w`-])--[a-z][a-z-]*", r"`\g<0>`", text)


def recipe_keys() -> str:
    """Every key of every part of a recipe, from the models that read them."""
    definitions = build()["$defs"]
    lines: list[str] = []
    for model in MODELS:
        name, said = model.__name__, descriptions(model)
        schema = definitions[name]
        body = next((each for each in schema.get("anyOf", ()) if "properties" in each), schema)
        lines += [
            f"## {_TITLES[name]}",
            "",
            body["description"],
            "",
            "| key | takes | default | meaning |",
            "|---|---|---|---|",
        ]
        for key, each in body["properties"].items():
            given = each.get("default")
            default = "required" if key in body.get("required", ()) else "" if given in (None, False) else f"`{given}`"
            lines.append(f"| `{key}` | {_cell(_takes(each))} | {default} | {_cell(said.get(key, ''))} |")
        lines.append("")
    return "\n".join(lines)


_TITLES: Final = {
    "DenseRecipe": "Dense recipe",
    "InputModel": "An entry of `models`",
    "SliceRecipe": "An entry of `slices`",
    "SliceSource": "An entry of `sources`",
    "ModuleRecipe": "An entry of `modules`",
    "MoeRecipe": "Mixture-of-Experts recipe",
    "ExpertRecipe": "An entry of `experts`",
    "StagedRecipe": "Recipe of several stages",
    "OutputOptions": "`output`",
    "TokenizerOptions": "`tokenizer`",
    "TokenEmbedding": "An entry of `tokenizer.tokens`",
    "ModelTokenEmbedding": "A token's `source` of `kind: model_token`",
    "ZeroEmbedding": "A token's `source` of `kind: zero`",
}
_KINDS: Final[dict[str, str]] = {
    "Model": "model",
    "Parameters": "parameters",
    "DenseRecipe": "dense recipe",
    "Stage": "dense or Mixture-of-Experts recipe",
    "OutputOptions": "text or mapping",
    "TokenizerOptions": "mapping",
}


def _takes(schema: dict[str, Any]) -> str:
    """What a key takes, in words."""
    if "$ref" in schema:
        name: str = schema["$ref"].rpartition("/")[2]
        return _KINDS.get(name, _TITLES.get(name, name).removeprefix("An entry of "))
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return "name of a method" if len(values) > 10 else ", ".join(f"`{value}`" for value in values)
    if "anyOf" in schema:
        kinds = [_takes(each) for each in schema["anyOf"] if each != {"type": "null"}]
        closed = any("enum" in each for each in schema["anyOf"])  # its other spellings need no mention
        return kinds[0] if closed else " or ".join(dict.fromkeys(kinds))
    kind: str | list[str] = schema.get("type", "anything")
    kinds = [each for each in ([kind] if isinstance(kind, str) else kind) if each != "null"]
    if "number" in kinds and "string" in kinds:
        kinds.remove("number")  # a name may look like a number
    words = {
        "string": "text",
        "boolean": "`true`, `false`",
        "integer": "whole number",
        "array": "list",
        "object": "mapping",
    }
    return " or ".join(words.get(each, each) for each in kinds)


def _cell(text: str) -> str:
    """Text that a table can hold."""
    return re.sub(r"\s*\n\s*", " ", text).replace("|", "\\|")


def python_api() -> str:
    """The documented names of the package, from `mergekit_ray.__all__`."""
    names = {name: getattr(mergekit_ray, name) for name in mergekit_ray.__all__ if not name.startswith("_")}
    for module in [name for name, found in names.items() if inspect.ismodule(found)]:
        found = names.pop(module)
        names |= {f"{module}.{name}": getattr(found, name) for name in found.__all__}
    chapters: dict[str, list[str]] = {"Functions": [], "Classes": [], "Errors": []}
    for name, found in names.items():
        is_error = inspect.isclass(found) and issubclass(found, BaseException)
        chapter = "Errors" if is_error else "Classes" if inspect.isclass(found) else "Functions"
        kind = {"Errors": "autoexception", "Classes": "autoclass", "Functions": "autofunction"}[chapter]
        chapters[chapter] += [f"### {name}", "", "```{eval-rst}", f".. {kind}:: mergekit_ray.{name}", "```", ""]
    return "\n".join(line for title, lines in chapters.items() if lines for line in (f"## {title}", "", *lines))


def contents() -> str:
    """The menu. Pages that are in none of the chapters come last, so that none is lost."""
    pages = {str(page.relative_to(_DOCS).with_suffix("")) for page in _DOCS.rglob("*.md")} - {"index"}
    chapters = {title: [page for page in listed if page in pages] for title, listed in _CHAPTERS.items()}
    chapters["More"] = sorted(pages.difference(*chapters.values()))
    lines: list[str] = []
    for title, listed in chapters.items():
        if listed:
            lines += ["```{toctree}", ":hidden:", f":caption: {title}", "", *listed, "```", ""]
    return "\n".join(lines)


_DOCS: Final = Path(__file__).parent
_CHAPTERS: Final = {
    "Start": ["tutorials/first-merge", "tutorials/70b-on-a-cluster", "from-mergekit"],
    "How to": [
        *("recipes", "tokenizers", "transplant", "moe", "lora", "python", "verify"),
        *("storage", "cluster", "kubernetes", "container", "gpu", "operations", "new-store"),
    ],
    "Help": ["troubleshooting", "glossary"],
    "Reference": ["reference/commands", "reference/recipe", "reference/methods", "reference/python", "families"],
    "Background": ["architecture", "reliability", "security", "performance", "changelog"],
}


def architecture() -> str:
    """ARCHITECTURE.md, from the repository's root."""
    return "```{include} ../ARCHITECTURE.md\n:relative-images:\n:relative-docs: docs/\n```"


def changelog() -> str:
    """CHANGELOG.md."""
    return "```{include} ../CHANGELOG.md\n```"


PARTS: Final[dict[str, Callable[[], str]]] = {
    made.__name__: made
    for made in (architecture, changelog, commands, contents, families, methods, python_api, recipe_keys)
}


def _replace(app: Sphinx, name: str, content: list[str]) -> None:
    del app, name
    content[0] = _PART.sub(lambda match: PARTS[match[1]](), content[0])


_TOGETHER: Final = re.compile(r"^ {4}\w+(?:, \w+)+(?=: )")


def _not_types(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """What napoleon would take for a type: the first of names described together, a property's text up to a colon."""
    del app, name, obj, options
    lines[:] = [_TOGETHER.sub(lambda match: match[0].replace(", ", "/"), line) for line in lines]
    if what in ("attribute", "property"):
        lines.insert(0, "\\")  # it looks into the first line only; this one, an escaped line break, is not shown


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("source-read", _replace)
    app.connect("autodoc-process-docstring", _not_types, priority=400)  # before napoleon
    return {"parallel_read_safe": True, "parallel_write_safe": True}
