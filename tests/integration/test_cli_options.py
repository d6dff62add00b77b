"""Arguments that cannot be, options that do not go together, what a narrow terminal shows, and the version."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from rich.cells import cell_len
from typer.testing import CliRunner

from mergekit_ray.cli import app, tables
from mergekit_ray.core.registry import METHODS
from mergekit_ray.core.version import __version__
from support.commands.terminal import plain, run_on_terminal
from support.merging import COMMANDS, command_environment, recipe_of, run_command
from support.models import Family, ModelLibrary, config_of


@pytest.fixture
def recipe(models: ModelLibrary, tmp_path: Path) -> Path:
    base, *tuned = (models.get("llama", variant) for variant in range(3))
    path = tmp_path / "ties.yml"
    path.write_text(yaml.safe_dump(recipe_of("ties", base, tuned)))
    return path


def invoke(*args: str) -> Any:
    """``mergekit-ray`` in this process."""
    return CliRunner().invoke(app, list(args))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("plan", "{}", "--device", "cpu"), "--device has no effect without --explain"),
        (("plan", "{}", "--allow-non-finite"), "--allow-non-finite has no effect without --explain"),
        (
            ("plan", "{}", "--explain", "*", "--cluster", "nodes=1,link=1Gbit"),
            "--cluster has no effect beside --explain",
        ),
        (("validate", "{}", "--allow-config-conflicts"), "--allow-config-conflicts has no effect without --models"),
        (("methods", "--json", "--markdown"), "--json has no effect beside --markdown"),
        (("methods", "ties", "--markdown"), "NAME has no effect beside --markdown"),
        (("verify", "{}", "--seed", "0"), "--seed has no effect without --sample"),
    ],
)
def test_options_without_effect_are_refused(arguments: tuple[str, ...], said: str, recipe: Path) -> None:
    done = invoke(*(argument.format(recipe) for argument in arguments))
    assert (done.exit_code, done.stdout) == (2, "")
    assert f"error: {said}\n" in done.stderr


def test_conflicts_of_configs_are_refused_unless_allowed(models: ModelLibrary, tmp_path: Path) -> None:
    """Four heads of 8 and two of 16 have tensors of equal shapes; their average means nothing."""
    ours = models.get("llama")
    theirs = models.get(Family("Llama", {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}))
    recipe, out = tmp_path / "linear.yml", tmp_path / "out"
    recipe.write_text(yaml.safe_dump(recipe_of("linear", ours, [theirs])))
    said = f"num_attention_heads: 4 in {ours}, 2 in {theirs}"
    for command in (("merge", "{}", str(out), "--executor", "local"), ("plan", "{}"), ("validate", "{}", "--models")):
        arguments = [argument.format(recipe) for argument in command]
        refused = invoke(*arguments)
        assert refused.exit_code == 3
        assert said in refused.stderr
        assert not out.exists()
        allowed = invoke(*arguments, "--allow-config-conflicts")
        assert allowed.exit_code == 0
        if command[0] != "plan":  # which wraps it
            assert f"warning: the models' configs differ: {said}" in allowed.stderr
        if command[0] == "merge":
            assert config_of(out)["num_attention_heads"] == 4
            again = ("reproduce", str(out), str(tmp_path / "again"), "--executor", "local")
            assert [invoke(*again, *more).exit_code for more in ((), ("--allow-config-conflicts",))] == [3, 0]
            shutil.rmtree(out)


@pytest.mark.parametrize("arguments", [("plan", "{}"), ("methods",), ("methods", "della")])
def test_tables_lose_no_word_on_a_narrow_terminal(
    arguments: tuple[str, ...], recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "_PIPED_WIDTH", 80)
    shown = invoke(*(argument.format(recipe) for argument in arguments)).stdout
    assert "───" in shown
    assert 60 <= max(map(cell_len, shown.splitlines())) <= 80
    assert "…" not in shown
    if arguments[0] == "plan":
        heading = next(line for line in shown.splitlines() if "tensors" in line)
        assert heading.split() == ["shard", "tensors", "parameters", "read", "write", "memory"]


def test_a_terminal_too_narrow_for_a_plan_gets_all_of_it(recipe: Path) -> None:
    code, shown = run_on_terminal("mergekit-ray", "plan", recipe, width=40)
    assert code == 0
    assert re.search(r"^model-00001-of-00001.safetensors +[\d,]+ +[\d,]+( +\d+ [kMG]?B){3}", plain(shown), re.MULTILINE)


@pytest.mark.parametrize(
    ("cluster", "said"),
    [
        ("nodes=1,link=1kbit", r"at least \d+ h .* \(reading over the links is the limit\)"),
        ("nodes=4,link=1Gbit", r"less than 1 s, .* \(reading .* limit; too few shards: 3 of 4 nodes are idle\)"),
        ("nodes=2,link=1Gbit,store=1kbit", r"\(the store is the limit; too few shards: 1 of 2 nodes is idle\)"),
    ],
)
def test_what_limits_a_cluster(cluster: str, said: str, recipe: Path) -> None:
    shown = invoke("plan", str(recipe), "--cluster", cluster).stdout
    assert re.search(said, shown)
    assert "unless `merge --memory` says otherwise" in shown


@pytest.mark.parametrize("arguments", [("plan", "{}"), ("plan", "{}", "--explain", "*"), ("methods",)])
def test_a_pipe_gets_each_row_in_one_line(arguments: tuple[str, ...], recipe: Path) -> None:
    """So that `grep` finds all of it."""
    shown = invoke(*(argument.format(recipe) for argument in arguments)).stdout.splitlines()
    if arguments[0] == "methods":
        assert f"{'ties':18}{'required':12}{METHODS.get('ties').summary}" in [line.rstrip() for line in shown]
    elif len(arguments) == 2:
        folders = [each["model"] for each in yaml.safe_load(recipe.read_text())["models"]]
        assert all(any(line.split() == [folder, "1"] for line in shown) for folder in folders)
    else:
        loads = [line for line in shown if "load float32 from" in line]
        assert loads
        assert all(re.search(r"safetensors, bytes \d+ to \d+$", line) for line in loads)


@pytest.mark.parametrize("command", [["mergekit-ray"], ["merge"], ["python", "-m", "mergekit_ray"]])
def test_the_version(command: list[str]) -> None:
    done = run_command(*command, "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"mergekit-ray {__version__}\n", "")


@pytest.mark.parametrize(
    "arguments", [("methods",), ("methods", "--json"), ("--help",), ("validate", "nothere.yml", "--log-format=json")]
)
def test_output_that_cannot_be_written_is_no_fault_of_ours(arguments: tuple[str, ...], tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [COMMANDS / "mergekit-ray", *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=command_environment(),
            check=False,
        )
    expected = "error: standard output cannot be written: No space left on device\n  write it to another place\n"
    assert (done.returncode, done.stderr) == (4, expected)


@pytest.mark.parametrize(("closed", "code"), [(">&-", 0), ("2>&-", 0), ("--nope 2>/dev/full", 4)])
def test_streams_that_are_closed_or_full(closed: str, code: int, recipe: Path) -> None:
    """A closed one is nowhere, and an error that nobody can be told of still has an exit code."""
    command = f"{COMMANDS / 'mergekit-ray'} validate {recipe} {closed}"
    done = subprocess.run(command, shell=True, capture_output=True, env=command_environment(), check=False)
    assert (done.returncode, done.stderr) == (code, b"")


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (("plan", "nothere.yml"), "ConfigError"),
        (("plan", "nothere.yml", "--nope"), "ConfigError"),
        (("methods", "tise"), "ConfigError"),
        (("verify", "./nothere"), "ModelError"),
        (("reproduce", "./nothere", "out"), "ModelError"),
        (("extract-lora", "./nothere", "./nor-here", "out", "--rank", "2"), "ModelError"),
    ],
)
def test_where_json_is_asked_for_errors_are_json(
    arguments: tuple[str, ...], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke(*arguments, "--json")
    told = json.loads(done.stdout)
    assert (told["event"], told["error"], told["exit_code"], done.stderr) == ("error", kind, done.exit_code, "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("merge r.yml --workers x", "--workers: expected a whole number, found 'x'"),
        ("merge r.yml --workers 0", "--workers: expected at least 1, found 0"),
        ("merge r.yml --memory x", "--memory: expected a size such as 2GB, 500MB or 5GiB, found 'x'"),
        ("merge r.yml --log-format jsn", "--log-format: expected text or json, found 'jsn'; did you mean 'json'?"),
        ("merge r.yml --executor rya", "--executor: expected local or ray, found 'rya'; did you mean 'ray'?"),
        ("extract-lora a b c --energy x", "--energy: expected a number, found 'x'"),
        ("extract-lora a b c --dtype int8", "--dtype: expected float32, bfloat16 or float16, found 'int8'"),
        ("transplant a b c --k 0", "--k: expected at least 1, found 0"),
        (
            "transplant a b c --byte-match head",
            "--byte-match: expected no, embed, lm_head or yes, found 'head'; did you mean 'lm_head'?",
        ),
        ("plan r.yml --seed 1.5", "--seed: expected a whole number, found '1.5'"),
        ("verify m --sample -1", "--sample: expected at least 0, found -1"),
        ("merge r.yml --sed 3", "no such option: --sed; did you mean '--seed'?"),
        ("merg", "no such command 'merg'; did you mean 'merge'?"),
        ("merge", "missing argument 'RECIPE'"),
        ("merge r.yml out more 5", "too many arguments: more 5"),
        ("merge r.yml --seed", "option '--seed' requires an argument"),
    ],
)
def test_wrong_arguments_are_told_in_our_words(arguments: str, said: str) -> None:
    done = invoke(*arguments.split())
    command = "" if arguments == "merg" else f" {arguments.split(maxsplit=1)[0]}"
    assert (done.exit_code, done.stderr) == (2, f"error: {said}\n  see `root{command} --help`\n")


def test_tables_in_a_pipe_have_no_spaces_at_the_end_of_a_line(recipe: Path) -> None:
    for arguments in (["plan", str(recipe)], ["methods"], ["methods", "ties"]):
        lines = invoke(*arguments).stdout.splitlines()
        assert len(lines) > 3
        assert [line for line in lines if line != line.rstrip()] == []


def test_help_has_neither_braces_nor_ranges() -> None:
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        for words in [[name], *([name, below] for below in getattr(command, "commands", ()))]:
            shown = invoke(*words, "--help").stdout
            assert not re.search(r"[{}]|x>=", shown.replace("{max_shard_size: 10GB}", "")), words


@pytest.mark.parametrize("command", ["validate", "plan", "merge"])
def test_a_recipe_on_standard_input(command: str, recipe: Path, tmp_path: Path) -> None:
    out = [str(tmp_path / "out")] if command == "merge" else []
    arguments = [str(COMMANDS / "mergekit-ray"), command, "-", *out]
    env = command_environment()
    done = subprocess.run(arguments, input=recipe.read_bytes(), capture_output=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "config.json").exists() == (command == "merge")
    wrong = subprocess.run(
        arguments, input=b"merge_method: linear\nmodles: []\n", capture_output=True, env=env, check=False
    )
    assert wrong.returncode == 2
    assert b"-:2: modles: unknown key" in wrong.stderr


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    done = invoke("merge", str(tmp_path), str(tmp_path / "out"))
    assert done.exit_code == 2
    assert "this is a folder" in done.stderr


@pytest.mark.parametrize("out", ["ties.yml", "ties.yml/below", ""])
def test_an_output_that_is_no_folder(out: str, recipe: Path) -> None:
    done = invoke("merge", str(recipe), f"{recipe.parent}/{out}" if out else "", "--quiet")
    assert done.exit_code == 2
    assert ("a file, where a folder is needed" if out else "an empty path") in done.stderr
