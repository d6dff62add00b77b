"""What is generated is up to date."""

from __future__ import annotations

from pathlib import Path

from mergekit_ray.runtime.tables import methods_markdown

ROOT = Path(__file__).parents[2]


def test_reference_page_of_the_methods() -> None:
    page = (ROOT / "docs/methods.md").read_text()
    assert page == methods_markdown(), "run `make docs`"
