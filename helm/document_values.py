"""Writes what is known about the chart's values from the comments of ``values.yaml``.

Run ``python -m helm.document_values`` after changing ``values.yaml``, ``values.schema.json`` or ``Chart.yaml``. It
writes the chart's ``README.md`` and the descriptions in ``values.schema.json``. Types come from the schema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

CHART: Final = Path(__file__).with_name("mergekit-ray")

_HEAD: Final = """\
<!-- Made by helm/document_values.py from Chart.yaml, values.yaml and values.schema.json. -->
# mergekit-ray

{description}

```
helm install my-merge oci://ghcr.io/mergekit-ray/charts/mergekit-ray --version {version} \\
  --set-file recipe.content=recipe.yml \\
  --set output=s3://bucket/merged
```

Helm prints the commands that follow, resume and fetch the merge. Mode `rayjob`, the default, needs the KubeRay
operator; `--set mode=job` does not.

[Merging on Kubernetes]({docs}) explains modes, credentials, GPUs, spot nodes, queues and security.

## Values

The chart refuses misspelt values, recipes without an output, and merge methods it does not know.

| value | type | default | meaning |
|---|---|---|---|
"""
_DOCS: Final = "https://github.com/mergekit-ray/mergekit-ray/blob/main/docs/kubernetes.md"

_KEY: Final = re.compile(r"(?P<indent> *)(?P<name>[A-Za-z0-9]+):")
_MISSING: Final = object()


@dataclass(frozen=True, slots=True)
class Value:
    """One row: a value that can be set.

    Attributes:
        path: with dots.
        kind: its type, or the words it may be.
        default: as in ``values.yaml``, in JSON; None for a group of values.
        meaning: its comment.
    """

    path: str
    kind: str
    default: str | None
    meaning: str


def page() -> str:
    """The README."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    rows = "".join(
        f"| `{value.path}` | {value.kind} | {_code(value.default)} | {_cell(value.meaning)} |\n" for value in values()
    )
    return _HEAD.format(description=chart["description"], version=chart["version"], docs=_DOCS) + rows


def schema() -> str:
    """``values.schema.json``, each value described as in ``values.yaml``."""
    out = json.loads((CHART / "values.schema.json").read_text())
    for path, part in _parts(out):
        part["description"] = comments()[path]
    # A group says the same of its values as the defaults of all groups do.
    group = out["definitions"]["workerGroup"]["properties"]
    for name, part in out["properties"]["workerDefaults"]["properties"].items():
        group[name]["description"] = part["description"]
    return json.dumps(out, indent=2, ensure_ascii=False) + "\n"


def values() -> Iterator[Value]:
    """All that can be set, in the schema's order.

    Raises:
        KeyError: a value has no comment in ``values.yaml``.
    """
    whole = json.loads((CHART / "values.schema.json").read_text())
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    meanings = comments()
    for path, part in _parts(whole):
        default = defaults
        for name in path.split("."):
            default = default.get(name, _MISSING) if isinstance(default, dict) else _MISSING
        text = None if "properties" in part or default is _MISSING else json.dumps(default)
        reference = part.get("$ref", "").rpartition("/")[2]
        yield Value(path, _kind({**whole["definitions"].get(reference, {}), **part}), text, meanings[path])


def comments() -> dict[str, str]:
    """What ``values.yaml`` says of each value, by path: comments of lines that begin with ``# --``."""
    found: dict[str, str] = {}
    above: list[tuple[int, str]] = []  # the keys that the line is below, with their indents
    words: list[str] = []
    for line in (CHART / "values.yaml").read_text().splitlines():
        text = line.strip()
        if text.startswith("# -- "):
            words = [text.removeprefix("# -- ")]
        elif text.startswith("# ") and words:
            words.append(text.removeprefix("# "))
        elif key := _KEY.match(line):
            indent = len(key["indent"])
            above = [*(each for each in above if each[0] < indent), (indent, key["name"])]
            if words:
                found[".".join(name for _, name in above)] = " ".join(words)
            words = []
        else:
            words = []
    return found


def _parts(whole: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """All values with their schemas. What is inside resources and the like is Kubernetes' own."""

    def walk(part: dict[str, Any], above: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, each in part.get("properties", {}).items():
            path = f"{above}{name}"
            if path != "global":
                yield path, each
                yield from walk(each, f"{path}.")

    return walk(whole, "")


def _kind(part: dict[str, Any]) -> str:
    if "enum" in part:
        return " or ".join(f"`{word}`" for word in part["enum"])
    kinds = part["type"] if isinstance(part["type"], list) else [part["type"]]
    return " or ".join(kinds)


def _code(text: str | None) -> str:
    return "" if text is None else f"`{_cell(text)}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    (CHART / "values.schema.json").write_text(schema())
    (CHART / "README.md").write_text(page())
