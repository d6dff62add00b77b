"""Every family, and the page that says what came of it.

python -m support.sweep            # write docs/families.md
python -m support.sweep --check    # fail if it says something else, or if anything is wrong
python -m support.sweep qwen3 bart # only say what comes of these
"""

from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path

from support.sweep.building import families
from support.sweep.run import say, sweep
from support.sweep.table import page, wrong

PAGE = Path(__file__).parents[3] / "docs" / "families.md"


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(prog="python -m support.sweep")
    parser.add_argument("families", nargs="*", help="only these, and only to say what comes of them")
    parser.add_argument("--check", action="store_true", help="compare with the page instead of writing it")
    arguments = parser.parse_args()
    if unknown := set(arguments.families) - families().keys():
        parser.error(f"transformers has no causal or multimodal family {', '.join(sorted(unknown))}")
    results = sweep(arguments.families or list(families()))
    if arguments.families:
        return int(bool(wrong(results)))
    if not arguments.check:
        PAGE.write_text(page(results), encoding="utf-8")
        return 0
    before = PAGE.read_text(encoding="utf-8").splitlines()
    changes = list(difflib.unified_diff(before, page(results).splitlines(), str(PAGE), "found", lineterm="", n=0))
    say("\n".join([*changes, *(f"WRONG: {each}" for each in wrong(results))]))
    return int(bool(changes or wrong(results)))


if __name__ == "__main__":
    sys.exit(main())
