"""Draws docs/floors.svg: the rooms of the package on the floors that import-linter holds, and the imports between them.

python docs/draw_floors.py            # writes it
python docs/draw_floors.py --check    # exit code 1 if it is not current
"""

from __future__ import annotations

import ast
import importlib.util
import sys
import tomllib
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Final

import grimp

PACKAGE: Final = "mergekit_ray"
ROOT: Final = Path(__file__).parents[1]
PICTURE: Final = ROOT / "docs" / "floors.svg"

WIDTH: Final = 960
BETWEEN: Final = 30
MARGIN: Final = 24
GAP: Final = 20
FONT: Final = "font-family='system-ui, -apple-system, Segoe UI, sans-serif'"


def rooms() -> dict[str, str]:
    """The folders of the package, with the first sentence of each one's docstring."""
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    found = {}
    for init in sorted(Path(spec.origin).parent.glob("*/__init__.py")):
        text = ast.get_docstring(ast.parse(init.read_text())) or ""
        found[init.parent.name] = text.replace("\n", " ").replace("`", "").partition(". ")[0].rstrip(".")
    return found


def imports(names: list[str]) -> dict[str, set[str]]:
    """Which rooms each room imports, also for annotations."""
    graph = grimp.build_graph(PACKAGE)
    found: dict[str, set[str]] = {name: set() for name in names}
    for module in graph.modules:
        room = module.split(".")[1] if "." in module else ""
        for imported in graph.find_modules_directly_imported_by(module):
            other = imported.split(".")[1] if "." in imported else ""
            if room in found and other in found and other != room:
                found[room].add(other)
    return found


def floors() -> list[list[str]]:
    """The floors from the top, as the first contract of pyproject.toml has them."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    return [[name.strip() for name in layer.split("|")] for layer in contracts[0]["layers"]]


def reduced(below: dict[str, set[str]]) -> dict[str, set[str]]:
    """Without the arrows that follow from others."""

    def reached(name: str) -> set[str]:
        return below[name].union(*(reached(other) for other in below[name]))

    return {
        name: {other for other in others if not any(other in reached(third) for third in others - {other})}
        for name, others in below.items()
    }


@dataclass(frozen=True)
class Place:
    """Where a room is drawn."""

    floor: int
    x: float
    y: int
    width: float
    height: int
    text: list[str]


def arrows(place: Place, targets: list[Place]) -> list[str]:
    """From a room to what it imports: dashed where it passes behind another floor."""
    lines = []
    for i, other in enumerate(targets):
        # Where the two overlap the arrow is straight down, spread over the overlap.
        low, high = max(place.x, other.x) + 16, min(place.x + place.width, other.x + other.width) - 16
        share = (i + 1) / (len(targets) + 1)
        start = end = low + (high - low) * share
        if low > high:
            start = place.x + place.width * share
            end = other.x + (other.width - 24 if other.x < place.x else 24)
        dashes = "" if other.floor - place.floor == 1 else " stroke-dasharray='4 4'"
        lines.append(
            f"<path d='M{start:.0f} {place.y + place.height} L{end:.0f} {other.y - 2}' stroke='#5b6b7d' "
            f"stroke-width='1.5'{dashes} fill='none' marker-end='url(#tip)'/>"
        )
    return lines


def draw() -> str:
    """The picture as SVG."""
    said = rooms()
    below = imports(list(said))
    places: dict[str, Place] = {}
    y = MARGIN
    for floor, names in enumerate(floors()):
        width = (WIDTH - 2 * MARGIN - GAP * (len(names) - 1)) / len(names)
        texts = {name: wrapped(said[name], int((width - 24) / 6.3)) for name in names}
        height = 40 + 14 * max(len(text) for text in texts.values())
        for i, name in enumerate(names):
            places[name] = Place(floor, MARGIN + i * (width + GAP), y, width, height, texts[name])
        y += height + BETWEEN
    height = y - BETWEEN + MARGIN
    lines = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {height}' role='img' {FONT}>",
        "<title>The rooms of mergekit_ray: each imports only what is below it</title>",
        "<defs><marker id='tip' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='7' markerHeight='7' orient='auto'>"
        "<path d='M0 0 8 4 0 8z' fill='#5b6b7d'/></marker></defs>",
        f"<rect width='{WIDTH}' height='{height}' fill='#ffffff'/>",
    ]
    for name, others in sorted(reduced(below).items()):
        lines += arrows(places[name], sorted((places[other] for other in others), key=lambda place: (place.x, place.y)))
    for name, place in places.items():
        lines.append(
            f"<rect x='{place.x:.0f}' y='{place.y}' width='{place.width:.0f}' height='{place.height}' rx='8' "
            "fill='#eef3f8' stroke='#9db2c6'/>"
        )
        left = f"x='{place.x + 14:.0f}'"
        lines.append(f"<text {left} y='{place.y + 24}' font-size='17' font-weight='600' fill='#1c2b3a'>{name}/</text>")
        for i, line in enumerate(place.text):
            lines.append(
                f"<text {left} y='{place.y + 42 + 14 * i}' font-size='12' fill='#3a4a5a'>{escape(line)}</text>"
            )
    return "\n".join([*lines, "</svg>"]) + "\n"


def wrapped(text: str, width: int) -> list[str]:
    """Lines of at most so many characters."""
    words, lines = text.split(), [""]
    for word in words:
        if len(lines[-1]) + len(word) + 1 > width and lines[-1]:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def main(arguments: list[str]) -> int:
    """Writes the picture, or compares it."""
    picture = draw()
    if "--check" in arguments:
        current = PICTURE.exists() and PICTURE.read_text() == picture
        sys.stdout.write("" if current else f"{PICTURE.name} is not current: run `python docs/draw_floors.py`\n")
        return 0 if current else 1
    PICTURE.write_text(picture)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
