"""Draws docs/pictures/*.svg, which read on light and dark pages alike: white on colours, and a grey between both.

python docs/draw_pictures.py            # writes them
python docs/draw_pictures.py --check    # exit code 1 if one is not current
"""

from __future__ import annotations

import sys
from html import escape
from pathlib import Path
from typing import Final

FOLDER: Final = Path(__file__).with_name("pictures")
BLUE, ORANGE, GREEN, PURPLE, SLATE, GREY = "#3b6fb6", "#b45f16", "#2f7d4f", "#7a56b3", "#5f6b7a", "#7b8591"
_FONT: Final = "system-ui, -apple-system, 'Segoe UI', sans-serif"


class Picture:
    """A drawing of boxes, arrows and words.

    Args:
        width, height: in pixels.
        title: what a screen reader says.
    """

    def __init__(self, width: int, height: int, title: str) -> None:
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'role="img" font-family="{_FONT}" font-size="14">',
            f"<title>{escape(title)}</title>",
            f'<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" '
            f'markerHeight="7" orient="auto">'
            f'<path d="M0 0L10 5L0 10z" fill="{GREY}"/></marker></defs>',
        ]

    def box(self, x: int, y: int, width: int, height: int, colour: str, *lines: str, hollow: bool = False) -> None:
        """A rounded box with centred lines; a hollow one has a dashed border and grey words."""
        look = (
            f'fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="6 4"' if hollow else f'fill="{colour}"'
        )
        self._parts.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" {look}/>')
        first = y + height / 2 - 9 * (len(lines) - 1) + 5
        for number, line in enumerate(lines):
            self._word(x + width / 2, first + 18 * number, line, GREY if hollow else "#fff", "middle", bold=number == 0)

    def text(self, x: float, y: float, words: str, anchor: str = "middle", *, bold: bool = False) -> None:
        """Grey words."""
        self._word(x, y, words, GREY, anchor, bold=bold)

    def arrow(self, *points: tuple[int, int], dashed: bool = False) -> None:
        """A line through points with a tip at its end."""
        self.line(*points, more=' marker-end="url(#tip)"' + (' stroke-dasharray="5 4"' if dashed else ""))

    def line(self, *points: tuple[int, int], more: str = "") -> None:
        """A line through points."""
        path = "L".join(f"{x} {y}" for x, y in points)
        self._parts.append(f'<path d="M{path}" fill="none" stroke="{GREY}" stroke-width="2"{more}/>')

    def _word(self, x: float, y: float, words: str, colour: str, anchor: str, *, bold: bool) -> None:
        weight = ' font-weight="600"' if bold else ""
        self._parts.append(
            f'<text x="{x:g}" y="{y:g}" fill="{colour}" text-anchor="{anchor}"{weight}>{escape(words)}</text>'
        )

    def __str__(self) -> str:
        return "\n".join([*self._parts, "</svg>\n"])


def data_path() -> Picture:
    """Of a merge."""
    picture = Picture(760, 330, "Headers become a plan; workers read byte ranges, compute and write shards.")
    picture.text(90, 26, "Models", bold=True)
    for y, name, place in ((44, "Base", "Hub"), (144, "Model A", "S3"), (244, "Model B", "disk")):
        picture.box(20, y, 140, 66, BLUE, name, place)
    picture.box(290, 14, 180, 62, PURPLE, "Plan", "every output tensor")
    picture.arrow((162, 58), (286, 44), dashed=True)
    picture.text(222, 38, "headers")
    picture.arrow((380, 78), (380, 124), dashed=True)
    picture.text(392, 106, "shards to write", "start")
    for y in (128, 194, 260):
        picture.box(290, y, 180, 54, ORANGE, "Worker", "read · compute · write")
        picture.arrow((200, y + 27), (286, y + 27))
        picture.arrow((472, y + 27), (596, y + 27))
    for y in (92, 177, 277):
        picture.line((162, y), (200, y))
    picture.line((200, 92), (200, 287))
    picture.text(243, 146, "byte ranges")
    picture.text(670, 26, "Output", bold=True)
    picture.box(600, 44, 140, 66, SLATE, "Index", "written last")
    for y, name in ((128, "Shard 1"), (194, "Shard 2"), (260, "Shard 3")):
        picture.box(600, y, 140, 54, GREEN, name, "safetensors")
    picture.arrow((670, 126), (670, 114), dashed=True)
    return picture


def slices() -> Picture:
    """A frankenmerge."""
    picture = Picture(760, 380, "Layers 0 to 23 of model A and 16 to 31 of model B, stacked to 40 layers.")
    for x, name, colour, taken, left, first in (
        (40, "Model A", BLUE, "layers 0-23", "24-31 unused", True),
        (280, "Model B", ORANGE, "layers 16-31", "0-15 unused", False),
    ):
        picture.text(x + 80, 24, f"{name}, 32 layers", bold=True)
        top, rest = (192, 64) if first else (128, 128)
        if first:
            picture.box(x, 40, 160, top, colour, taken, "[0, 24]")
            picture.box(x, 40 + top, 160, rest, colour, left, hollow=True)
        else:
            picture.box(x, 40, 160, rest, colour, left, hollow=True)
            picture.box(x, 40 + rest, 160, top, colour, taken, "[16, 32]")
    picture.text(620, 24, "Result, 40 layers", bold=True)
    picture.box(540, 40, 160, 192, BLUE, "layers 0-23", "A's 0-23")
    picture.box(540, 232, 160, 128, ORANGE, "layers 24-39", "B's 16-31")
    picture.arrow((204, 84), (240, 84), (240, 32), (488, 32), (488, 100), (536, 100))
    picture.arrow((444, 236), (490, 236), (490, 296), (536, 296))
    picture.text(120, 322, "first layer on top")
    return picture


def mixture() -> Picture:
    """Of Experts, in one layer."""
    picture = Picture(
        760, 320, "In each layer, the feed-forward networks of dense models become experts behind a router."
    )
    picture.text(150, 24, "A layer of each dense model", bold=True)
    for y, name, colour in ((40, "Base", BLUE), (130, "Model A", ORANGE), (220, "Model B", GREEN)):
        picture.text(20, y + 40, name, "start")
        picture.box(100, y, 100, 66, colour, "attention", hollow=name != "Base")
        picture.box(210, y, 100, 66, colour, "MLP")
    picture.text(575, 24, "The same layer of the mixture", bold=True)
    picture.box(420, 130, 100, 66, BLUE, "attention", "of the base")
    picture.box(550, 130, 80, 66, PURPLE, "router")
    for y, name, colour in ((40, "Expert 0", BLUE), (130, "Expert 1", ORANGE), (220, "Expert 2", GREEN)):
        picture.box(664, y, 90, 66, colour, name, "MLP")
        picture.arrow((632, 163), (662, y + 33))
    picture.arrow((522, 163), (548, 163))
    picture.text(590, 222, "picks 2 experts")
    picture.text(590, 240, "for each token")
    picture.arrow((330, 163), (404, 163))
    return picture


def swap() -> Picture:
    """Of the old model for the new one."""
    picture = Picture(
        760, 230, "With --overwrite the new model is made beside the old one, and takes its place when it is whole."
    )
    for x, title, left, right in (
        (10, "1. Merging", ("Old model", "in use"), ("New model", "hidden")),
        (264, "2. Complete", ("Old model", "in use"), ("New model", "checked")),
        (518, "3. Swapped", ("New model", "in use"), None),
    ):
        picture.text(x + 116, 26, title, bold=True)
        picture.box(x, 40, 232, 160, SLATE, hollow=True)
        picture.box(x + 14, 66, 98, 92, GREEN if right is None else BLUE, *left)
        if right is not None:
            picture.box(x + 118, 66, 102, 92, GREEN, *right, hollow=title.startswith("1"))
        picture.text(x + 116, 188, "output folder or prefix")
    return picture


PICTURES: Final = {"data-path": data_path, "slices": slices, "mixture": mixture, "swap": swap}


def main() -> None:
    """Write the pictures, or compare them."""
    for name, draw in PICTURES.items():
        file = FOLDER / f"{name}.svg"
        if "--check" in sys.argv[1:]:
            if file.read_text() != str(draw()):
                sys.exit(f"{file} is not current: run python docs/draw_pictures.py")
        else:
            file.write_text(str(draw()))


if __name__ == "__main__":
    main()
