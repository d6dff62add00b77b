"""Every option of mergekit's commands is in our table, with its spellings and whether it takes a value."""

from __future__ import annotations

import subprocess

import pytest

from mergekit_ray.cli.mergekit_options import ARGUMENTS, COMMANDS, OPTIONS
from parity.conftest import mergekit_python
from support.commands.mergekit_help import declared, options_told
from support.merging import command_environment

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("command", COMMANDS)
def test_the_table_has_what_the_help_tells(command: str) -> None:
    script = mergekit_python().parent / COMMANDS[command]
    # Wide enough for the spellings of an option to stand on one line.
    environment = command_environment(COLUMNS="200")
    done = subprocess.run([str(script), "--help"], capture_output=True, text=True, env=environment, check=True)
    told = options_told(done.stdout)
    assert told == declared(OPTIONS[command])
    usage = done.stdout.splitlines()[0].split()[3:]
    assert len(usage) == len(ARGUMENTS[command])


def test_there_is_no_other_command() -> None:
    scripts = {path.name for path in mergekit_python().parent.glob("mergekit-*")} | {"bakllama"}
    left = {"mergekit-evolve", "mergekit-legacy"}  # which needs models of its own to judge merges; an old name
    assert scripts - left == set(COMMANDS.values())
