"""Writes the chart's README from its schema and its values, to standard output.

``python helm/document_values.py > helm/mergekit-ray/README.md``
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

CHART: Final = Path(__file__).with_name("mergekit-ray")

_HEAD: Final = """\
<!-- Made by helm/document_values.py from values.schema.json and values.yaml. -->
# mergekit-ray

{description}

```
helm install my-merge helm/mergekit-ray --set-file recipe.content=recipe.yml --set output=s3://bucket/merged
```

How to install, follow, resume and fetch: [docs/kubernetes.md](../../docs/kubernetes.md). Mode `rayjob` needs KubeRay.

## Values

Misspelt values are errors.

| value | type | default | meaning |
|---|---|---|---|
"""

_MISSING: Final = object()


@dataclass(frozen=True, slots=True)
class Value:
    """One row: a value that can be set.

    Attributes:
        path: with dots.
        kind: its type, or the words it may be.
        default: as in ``values.yaml``; None if the value is optional there.
        meaning: of the schema.
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
    return _HEAD.format(description=chart["description"]) + rows


def values() -> Iterator[Value]:
    """All that can be set, in the schema's order.

    Raises:
        ValueError: something in the schema has no description.
    """
    schema = json.loads((CHART / "values.schema.json").read_text())
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    for name, part in schema["properties"].items():
        if name != "global":
            yield from _walk(name, part, defaults.get(name, _MISSING), schema["definitions"])


def _walk(path: str, part: dict[str, Any], default: Any, definitions: dict[str, Any]) -> Iterator[Value]:
    resolved = {**definitions[part["$ref"].rpartition("/")[2]], **part} if "$ref" in part else part
    if not resolved.get("description"):
        raise ValueError(f"{path} has no description in values.schema.json")
    inner = resolved.get("properties")
    # Resources and the like are Kubernetes' own and documented there.
    if inner is None or "$ref" in part:
        text = None if default is _MISSING else json.dumps(default)
        yield Value(path, _kind(resolved), text, resolved["description"])
        return
    yield Value(path, "object", None, resolved["description"])
    for name, each in inner.items():
        below = default.get(name, _MISSING) if isinstance(default, dict) else _MISSING
        yield from _walk(f"{path}.{name}", each, below, definitions)


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
    sys.stdout.write(page())
