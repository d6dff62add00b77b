"""What a terminal, a log and a shell get of the commands: width, colour, JSON, completion, plugins."""

from __future__ import annotations

import json
import signal
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
import typer.main
import yaml
from rich.cells import cell_len

from mergekit_ray.cli import app
from mergekit_ray.core.registry import METHODS
from support.commands.terminal import COLOUR, plain, run_on_terminal, widest
from support.merging import COMMANDS, command_environment, recipe_of, run_command
from support.models import ModelLibrary
from support.waiting import DEADLINE_SECONDS, wait_until

GROUP: Any = typer.main.get_command(app)
NAMES = sorted(GROUP.commands)
HELP = [
    ("merge",),
    ("mergekit-ray",),
    *(("mergekit-ray", name) for name in NAMES),
    *(("mergekit-ray", name, below) for name in ("recipe", "compat") for below in GROUP.commands[name].commands),
]
WRONG = """\
merge_method: linear
models:
  - model: a
    parameters: {wieght: 1}
  - modle: b
dtype: bfloat17
"""


@pytest.fixture(scope="module")
def recipe(models: ModelLibrary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base, *tuned = (models.get("llama", variant) for variant in range(3))
    path = tmp_path_factory.mktemp("recipes") / "ties.yml"
    path.write_text(yaml.safe_dump(recipe_of("ties", base, tuned, output={"max_shard_size": 60_000})))
    return path


@pytest.fixture
def wrong(tmp_path: Path) -> Path:
    path = tmp_path / "wrong.yml"
    path.write_text(WRONG)
    return path


def events_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


class TestHelp:
    @pytest.mark.parametrize("command", HELP, ids=" ".join)
    def test_fits_80_columns_and_says_the_same_both_ways(self, command: tuple[str, ...]) -> None:
        code, shown = run_on_terminal(*command, "-h", width=80)
        assert code == 0
        assert cell_len(widest(shown)) <= 80, widest(shown)
        assert "..." not in plain(shown).replace("[ARGS]...", ""), "nothing is cut off"
        assert plain(shown) == run_on_terminal(*command, "--help", width=80, NO_COLOR="1")[1]

    def test_every_option_has_a_text(self) -> None:
        for command in HELP:
            text = run_command(*command, "-h").stdout
            rows = text.partition("Options:\n")[2].partition("\n\n")[0].splitlines()
            starts = [i for i, row in enumerate(rows) if row.startswith("  -")]
            for i in starts:
                alone = len(rows[i].split("  ")) < 3
                assert not alone or (i + 1 < len(rows) and i + 1 not in starts), rows[i]

    def test_colour_is_for_terminals_that_want_it(self) -> None:
        assert "\x1b[1m" in run_on_terminal("merge", "-h")[1]
        assert "\x1b" not in run_on_terminal("merge", "-h", NO_COLOR="1")[1]
        assert "\x1b" not in run_on_terminal("merge", "-h", TERM="dumb")[1]
        assert "\x1b" not in run_command("merge", "-h").stdout


class TestErrors:
    def test_faults_of_a_recipe_hang_by_their_indent(self, wrong: Path) -> None:
        code, shown = run_on_terminal("mergekit-ray", "validate", wrong.name, width=60, cwd=wrong.parent)
        assert code == 2
        assert plain(shown).splitlines() == [
            "error: wrong.yml: 3 problems in the recipe",
            "  wrong.yml:4: models[0].parameters.wieght: linear has no",
            "    parameter 'wieght'; accepted: normalize, weight",
            "    did you mean 'weight'?",
            "  wrong.yml:5: models[1].modle: unknown key 'modle';",
            "    accepted: model, parameters",
            "    did you mean 'model'?",
            "  wrong.yml:6: dtype: unknown dtype 'bfloat17'; accepted:",
            "    float16, bfloat16, float32, float64; did you mean",
            "    'bfloat16'?",
        ]

    def test_colour(self, wrong: Path) -> None:
        shown = run_on_terminal("mergekit-ray", "validate", wrong)[1]
        assert "\x1b[1;31merror:\x1b[0m" in shown
        assert not COLOUR.search(run_on_terminal("mergekit-ray", "validate", wrong, NO_COLOR="1")[1])
        assert "\x1b" not in run_command("mergekit-ray", "validate", wrong).stderr

    def test_a_pipe_gets_whole_lines(self, wrong: Path) -> None:
        lines = run_command("mergekit-ray", "validate", wrong).stderr.splitlines()
        assert any(
            line.startswith(f"  {wrong}:6: dtype: unknown dtype 'bfloat17'; accepted: ")
            and line.endswith("did you mean 'bfloat16'?")
            for line in lines
        )

    def test_wrong_arguments_are_errors_like_others(self) -> None:
        done = run_command("merge", "--wrokers", "3", "r.yml")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: no such option: --wrokers")
        assert done.stderr.endswith("\n  see `merge --help`\n")

    def test_without_arguments_there_is_help(self) -> None:
        done = run_command("mergekit-ray")
        assert done.returncode == 2
        assert "extract-lora" in done.stdout + done.stderr


class TestJson:
    def test_every_line_has_a_time_a_level_and_the_id_of_the_run(self, recipe: Path, tmp_path: Path) -> None:
        before = datetime.now(UTC)
        done = run_command("merge", recipe, tmp_path / "out", "--log-format", "json")
        events = events_of(done.stdout)
        assert done.returncode == 0
        assert events
        assert len({event["run_id"] for event in events}) == 1
        assert {event["level"] for event in events} == {"info"}
        times = [datetime.fromisoformat(event["time"]) for event in events]
        assert all(event["time"].endswith("Z") for event in events)
        assert times == sorted(times)
        assert abs((times[0] - before).total_seconds()) < DEADLINE_SECONDS

    @pytest.mark.parametrize("more", [(), ("--quiet",)])
    def test_a_wrong_recipe(self, wrong: Path, more: tuple[str, ...], tmp_path: Path) -> None:
        done = run_command("merge", wrong, tmp_path / "out", "--log-format", "json", *more)
        assert (done.returncode, done.stderr) == (2, "")
        [event] = events_of(done.stdout)
        assert (event["event"], event["level"], event["exit_code"]) == ("error", "error", 2)
        assert [problem["where"] for problem in event["problems"]] == [f"{wrong}:{line}" for line in (4, 5, 6)]
        assert event["problems"][0]["remedy"] == "did you mean 'weight'?"

    def test_an_error_has_its_remedy(self, recipe: Path, tmp_path: Path) -> None:
        done = run_command("merge", recipe, tmp_path / "out", "--memory", "1MB", "--log-format=json")
        assert (done.returncode, done.stderr) == (2, "")
        event = events_of(done.stdout)[-1]
        assert (event["event"], event["exit_code"], event["error"]) == ("error", 2, "PlanError")
        assert "--memory" in event["remedy"]

    @pytest.mark.parametrize("command", [("merge",), ("mergekit-ray", "merge")])
    def test_wrong_arguments(self, command: tuple[str, ...]) -> None:
        done = run_command(*command, "--log-format", "json", "--workers", "none")
        assert (done.returncode, done.stderr) == (2, "")
        [event] = events_of(done.stdout)
        assert (event["event"], event["exit_code"]) == ("error", 2)
        assert "--workers" in event["message"]
        assert event["remedy"] == f"see `{' '.join(command)} --help`"

    def test_a_warning(self, recipe: Path, tmp_path: Path) -> None:
        path = tmp_path / "r.yml"
        path.write_text(yaml.safe_dump({**yaml.safe_load(recipe.read_text()), "mrege": 1}))
        done = run_command("merge", path, tmp_path / "out", "--lenient", "--log-format", "json")
        assert (done.returncode, done.stderr) == (0, "")
        first = events_of(done.stdout)[0]
        assert (first["event"], first["level"]) == ("warning", "warning")
        assert "mrege" in first["message"]

    def test_a_signal(self, models: ModelLibrary, tmp_path: Path) -> None:
        base, *tuned = (models.get("llama", variant, num_layers=16) for variant in range(3))
        path, out = tmp_path / "many.yml", tmp_path / "out"
        path.write_text(yaml.safe_dump(recipe_of("ties", base, tuned, output={"max_shard_size": 1})))
        command = [str(COMMANDS / "merge"), str(path), str(out), "--log-format", "json"]
        with subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=command_environment()) as process:
            try:
                wait_until(lambda: list(out.glob("*.safetensors")), every=0.001)
                psutil.Process(process.pid).suspend()  # it cannot finish before the signal
                process.send_signal(signal.SIGINT)
            finally:
                psutil.Process(process.pid).resume()
            said, wrong = process.communicate(timeout=DEADLINE_SECONDS)
        assert (process.returncode, wrong) == (130, "")
        events = events_of(said)
        assert "SIGINT" in next(event["message"] for event in events if event["event"] == "stopping")
        last = events[-1]
        assert (last["event"], last["level"], last["exit_code"]) == ("error", "error", 130)
        assert last["remedy"] == "run the same command to resume"


class TestCompletion:
    @staticmethod
    def complete(*words: str) -> list[str]:
        name = words[0]
        environment = {
            f"_{name.upper().replace('-', '_')}_COMPLETE": "complete_bash",
            "COMP_WORDS": " ".join(words),
            "COMP_CWORD": str(len(words) - 1),
        }
        return run_command(name, env=command_environment(**environment)).stdout.split()

    def test_methods(self) -> None:
        assert self.complete("mergekit-ray", "methods", "dare_") == ["dare_linear", "dare_ties"]
        assert self.complete("mergekit-ray", "methods", "") == METHODS.names()

    @pytest.mark.parametrize("command", [("merge",), ("mergekit-ray", "merge"), ("mergekit-ray", "extract-lora")])
    def test_executors_and_devices(self, command: tuple[str, ...]) -> None:
        assert self.complete(*command, "--executor", "") == ["local", "ray"]
        assert self.complete(*command, "--device", "c") == ["cpu", "cuda", "cuda:0"]
        assert "--executor" in self.complete(*command, "--e")

    def test_commands(self) -> None:
        assert sorted(self.complete("mergekit-ray", "")) == NAMES

    @pytest.mark.parametrize("name", ["merge", "mergekit-ray"])
    def test_the_script_is_shown(self, name: str) -> None:
        shown = run_on_terminal(
            name, "--show-completion", SHELL="/bin/bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1"
        )
        assert "completion" in shown[1]


class TestPlugins:
    @pytest.fixture
    def environment(self, tmp_path: Path) -> dict[str, str]:
        """With a distribution whose methods cannot be imported."""
        folder = tmp_path / "site" / "broken_methods-1.0.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-methods\nVersion: 1.0\n")
        (folder / "entry_points.txt").write_text("[mergekit_ray.methods]\nharmonic = broken_methods.harmonic\n")
        before = command_environment()
        path = ":".join(filter(None, [str(tmp_path / "site"), before.get("PYTHONPATH", "")]))
        return {**before, "PYTHONPATH": path}

    def test_one_that_is_broken_is_skipped_with_a_warning(self, recipe: Path, environment: dict[str, str]) -> None:
        done = run_command("mergekit-ray", "validate", recipe, env=environment)
        assert done.returncode == 0
        assert done.stderr == (
            "warning: skipped plugin 'harmonic' of broken-methods (mergekit_ray.methods: broken_methods.harmonic): "
            "ModuleNotFoundError: No module named 'broken_methods'\n"
            "  upgrade, reinstall or uninstall broken-methods\n"
        )

    def test_in_json(self, recipe: Path, environment: dict[str, str], tmp_path: Path) -> None:
        done = run_command("merge", recipe, tmp_path / "out", "--log-format", "json", env=environment)
        assert (done.returncode, done.stderr) == (0, "")
        [warning] = [event for event in events_of(done.stdout) if event["level"] == "warning"]
        assert "skipped plugin 'harmonic' of broken-methods" in warning["message"]

    def test_whoever_is_quiet_is_not_bothered(self, recipe: Path, environment: dict[str, str], tmp_path: Path) -> None:
        done = run_command("merge", recipe, tmp_path / "out", "--quiet", env=environment)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("colour", [{}, {"NO_COLOR": "1"}], ids=["colour", "NO_COLOR"])
def test_a_merge_fits_80_columns(recipe: Path, tmp_path: Path, colour: dict[str, str]) -> None:
    out = tmp_path / "o"
    code, shown = run_on_terminal("merge", recipe, out, width=80, **colour)
    assert code == 0, shown
    text = plain(shown)
    assert "read " in text
    assert "wrote " in text
    assert " ".join(text.split()).count(f"{out} is complete") == 1  # on two lines if the path is long
    assert text.count(str(out)) == 1
    others = text.replace(str(out), "OUT")
    assert cell_len(widest(others)) <= 80, widest(others)
    assert bool(COLOUR.search(shown)) is not bool(colour)


@pytest.mark.ray
def test_ray_writes_nothing_of_its_own(recipe: Path, tmp_path: Path) -> None:
    """As of constructors' arguments, which it would have to keep for restarts."""
    done = run_command("merge", recipe, tmp_path / "out", "--executor", "ray", "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'out'}\n"
    assert all(line.startswith("[") and "s] " in line for line in done.stderr.splitlines()), done.stderr
    assert "constructor" not in done.stderr
