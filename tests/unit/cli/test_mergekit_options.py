"""Options of mergekit that our commands are given, and the page that lists them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mergekit_ray.cli import app
from mergekit_ray.cli.mergekit_options import OPTIONS, SHARED, Option
from support.commands.mergekit_help import Told, options_told, rows

PAGE = (Path(__file__).parents[3] / "docs/from-mergekit.md").read_text()
OURS = {
    "yaml": "merge c.yml out",
    "moe": "merge c.yml out",
    "multi": "merge c.yml out",
    "pytorch": "merge c.yml out",
    "bakllama": "merge c.yml out",
    "extract-lora": "extract-lora tuned base out",
    "tokensurgeon": "transplant model donor out",
    "layershuffle": "recipe shuffle",
}
EVERY = [(name, option) for name, options in OPTIONS.items() for option in options]


def invoke(*args: str) -> Any:
    return CliRunner().invoke(app, list(args))


@pytest.mark.parametrize(("name", "option"), EVERY, ids=[f"{name} {option.key}" for name, option in EVERY])
def test_our_commands_explain_options_that_they_lack(name: str, option: Option) -> None:
    """Each spelling is one of ours, or is answered with what it is here."""
    for given in (*option.names, *option.off):
        done = invoke(*OURS[name].split(), given, "5")
        if done.stderr.startswith(f"error: {given} is an option of mergekit\n  here: "):
            answer = done.stderr.partition("here: ")[2].rstrip()
            known = {
                here for each in OPTIONS[name] for here in (each.here, each.off_here) if given in each.names + each.off
            }
            # In `merge`, options of the same name in several commands of mergekit share an answer.
            assert answer in known or OURS[name].startswith("merge")
            assert done.exit_code == 2
        else:
            assert "no such option" not in done.stderr, given


def test_options_of_other_commands_are_no_answer() -> None:
    assert "no such option: --max-rank" in invoke("merge", "c.yml", "out", "--max-rank", "3").stderr
    assert "no such option: --lazy" in invoke("transplant", "a", "b", "c", "--lazy").stderr


def test_a_long_name_of_a_short_option_is_explained_too() -> None:
    assert "here: not needed: progress and warnings" in invoke("merge", "recipe.yml", "out", "--verbose").stderr


def test_the_page_for_users_of_mergekit_has_the_same_tables() -> None:
    wanted = rows(SHARED)
    for options in OPTIONS.values():
        wanted += rows(option for option in options if option not in SHARED)
    assert sorted(re.findall(r"^\| `-.*\|$", PAGE, re.MULTILINE)) == sorted(wanted)


def test_what_a_help_text_tells() -> None:
    text = """Usage: x [OPTIONS]

Options:
  -j, --num-threads INTEGER  Threads
  -c, --cosine / -nc, --no-cosine
                             Use - or --this
  -a, --method [omp|mean]    How
  --dry-run                  No Merge
  --help                     Show this
"""
    assert options_told(text) == {
        Told(frozenset({"-j", "--num-threads"}), frozenset(), takes=True),
        Told(frozenset({"-c", "--cosine"}), frozenset({"-nc", "--no-cosine"}), takes=False),
        Told(frozenset({"-a", "--method"}), frozenset(), takes=True),
        Told(frozenset({"--dry-run"}), frozenset(), takes=False),
    }
