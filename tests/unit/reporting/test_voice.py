"""How a command speaks: in text or in JSON, aloud or quietly."""

from __future__ import annotations

import ast
import json
import re
import warnings
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

import mergekit_ray
from mergekit_ray.cli import app
from mergekit_ray.cli.options import LogFormat
from mergekit_ray.cli.voice import Voice
from mergekit_ray.core.errors import ConfigError, Problem
from mergekit_ray.core.registry import PluginWarning

ERROR = ConfigError("two problems", where="r.yml", problems=[Problem("r.yml:1", "a", "x", "y"), Problem("", "", "z")])


def test_text_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    voice = Voice()
    voice.warn("it is so")
    voice.fail(ERROR)
    voice.say("SIGINT: stopping")
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err == (
        "warning: it is so\nerror: r.yml: two problems\n  r.yml:1: a: x\n    y\n  z\nSIGINT: stopping\n"
    )


def test_json_goes_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    voice = Voice(log_format=LogFormat.json)
    voice.warn("it is so")
    voice.fail(ERROR)
    voice.say("SIGINT: stopping")
    voice.say("SIGINT: stopped at once", exit_code=130)
    told = capsys.readouterr()
    assert told.err == ""
    events = [json.loads(line) for line in told.out.splitlines()]
    assert [(event["event"], event["level"]) for event in events] == [
        ("warning", "warning"),
        ("error", "error"),
        ("stopping", "info"),
        ("error", "error"),
    ]
    assert events[1]["message"] == "two problems"
    assert (events[1]["error"], events[1]["where"], events[1]["exit_code"]) == ("ConfigError", "r.yml", 2)
    assert events[1]["problems"] == [
        {"where": "r.yml:1", "path": "a", "what": "x", "remedy": "y"},
        {"where": "", "path": "", "what": "z", "remedy": None},
    ]
    assert (events[3]["exit_code"], events[3]["remedy"]) == (130, "run the same command to resume")


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("plan", "error: stopped\n"),
        ("validate", "error: stopped\n"),
        ("merge", "error: stopped\n  run the same command to resume\n"),
    ],
)
def test_only_what_keeps_its_work_is_resumed(command: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*recipe: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mergekit_ray.operations.recipes.load_recipe", interrupted)
    done = CliRunner().invoke(app, [command, "recipe.yml"])
    assert (done.exit_code, done.stderr) == (130, told)


@pytest.mark.parametrize(
    ("python", "told"),
    [
        ("pass `overwrite=True` to", "pass --overwrite to"),
        ("pass `options=MergeOptions(overwrite=True)` to", "pass --overwrite to"),
        ("pass `options=MergeOptions(memory_bytes=12_000_000)`", "pass --memory 12MB"),
        ("pass `device='cuda:1'`", "pass --device cuda:1"),
        ("pass `memory_bytes=12_000_000` or more", "pass --memory 12MB or more"),
        ("less `memory_bytes=`, `num_workers=`", "less --memory, --workers"),
        ("give `saved=` or `rank=16`", "give --modules-to-save or --rank 16"),
        ("`dtype=x`, `seed` and device=cpu", "`dtype=x`, `seed` and device=cpu"),
    ],
)
def test_the_command_line_names_its_own_options(python: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = ConfigError(python, remedy=python)
    for voice in (Voice(), Voice(log_format=LogFormat.json)):
        voice.fail(error)
        voice.warn(python)
    out, err = capsys.readouterr()
    assert err == f"error: {told}\n  {told}\nwarning: {told}\n"
    [failed, warned] = map(json.loads, out.splitlines())
    assert (failed["message"], failed["remedy"], warned["message"]) == (told, told, told)
    assert str(error) == f"{python}\n  {python}"


def test_messages_name_no_flag_that_python_lacks() -> None:
    """They are written for Python, and told in flags by the command line."""
    flags = {
        option for command in get_command(app).commands.values() for each in command.params for option in each.opts
    }
    ours = {flag for flag in flags if flag.startswith("--")} - {"--debug", "--cluster"}
    package = Path(mergekit_ray.__file__).parent
    texts = [
        node.value
        for folder in (
            "config",
            "storage",
            "checkpoint",
            "planning",
            "evaluation",
            "executors",
            "worker",
            "output",
            "operations",
        )
        for file in (package / folder).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    flagged = [text for text in texts if set(re.findall(r"(?<![\w`-])--[a-z-]+", text)) & ours and "\n" not in text]
    assert flagged == []


@pytest.mark.parametrize("log_format", LogFormat)
def test_quietly_only_errors_are_told(log_format: LogFormat, capsys: pytest.CaptureFixture[str]) -> None:
    voice = Voice(quiet=True, log_format=log_format)
    voice.warn("it is so")
    assert capsys.readouterr() == ("", "")
    voice.fail(ERROR)
    assert "two problems" in "".join(capsys.readouterr())


def test_warnings_of_this_package_are_told_without_their_place(capsys: pytest.CaptureFixture[str]) -> None:
    others = []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *more, **_: others.append(str(message))
        with Voice().warnings_told():
            warnings.warn("skipped", PluginWarning, stacklevel=1)
            warnings.warn("of another", UserWarning, stacklevel=1)
    assert capsys.readouterr().err == "warning: skipped\n"
    assert others == ["of another"]
