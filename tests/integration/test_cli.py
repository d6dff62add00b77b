"""The commands as a user meets them: what they print, where, and how they exit."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from typer.testing import CliRunner

import mergekit_ray
from mergekit_ray.cli import app
from support.commands.terminal import run_on_terminal
from support.merging import COMMANDS, command_environment, recipe_of, run_command
from support.models import ModelLibrary, contents, load
from support.waiting import DEADLINE_SECONDS, wait_until

METHODS = {"linear", "slerp", "passthrough", "task_arithmetic", "ties", "dare_linear", "dare_ties"}


@pytest.fixture(scope="module")
def recipe(models: ModelLibrary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of several shards, in a file."""
    base, *tuned = (models.get("llama", variant, with_tokenizer=True) for variant in range(3))
    return write_recipe(
        tmp_path_factory.mktemp("recipes") / "ties.yml",
        recipe_of("ties", base, tuned, output={"max_shard_size": 60_000}),
    )


@pytest.fixture(scope="module")
def many(models: ModelLibrary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of over a hundred shards."""
    base, *tuned = (models.get("llama", variant, num_layers=16) for variant in range(3))
    return write_recipe(
        tmp_path_factory.mktemp("recipes") / "many.yml", recipe_of("ties", base, tuned, output={"max_shard_size": 1})
    )


@pytest.fixture(scope="module")
def published(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the recipe gives. To be copied before it is damaged."""
    out = tmp_path_factory.mktemp("published") / "out"
    mergekit_ray.merge(recipe, out)
    return out


def write_recipe(path: Path, data: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def invoke(*args: str | Path) -> Any:
    """``mergekit-ray`` in this process."""
    return CliRunner().invoke(app, [str(arg) for arg in args])


class TestMergeCommand:
    def test_help_names_the_options(self) -> None:
        done = run_command("merge", "--help")
        assert done.returncode == 0
        assert done.stderr == ""
        for option in ("--executor", "--workers", "--memory", "--overwrite", "--seed", "--quiet", "--debug"):
            assert option in done.stdout
        assert "RECIPE" in done.stdout

    def test_piped_it_writes_timed_lines_and_the_place(self, recipe: Path, published: Path, tmp_path: Path) -> None:
        done = run_command("merge", recipe, tmp_path / "out")
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{tmp_path / 'out'}\n"
        lines = done.stderr.splitlines()
        assert lines
        assert all(re.match(r"\[ *\d+\.\ds\] \S", line) for line in lines), done.stderr
        assert "\x1b" not in done.stderr
        assert any("model-00001-of-" in line for line in lines)
        assert contents(tmp_path / "out") == contents(published)
        load(tmp_path / "out")

    def test_quiet_says_nothing(self, recipe: Path, tmp_path: Path) -> None:
        done = run_command("merge", recipe, tmp_path / "out", "--quiet")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert (tmp_path / "out" / "model.safetensors.index.json").exists()

    def test_json_lines(self, recipe: Path, tmp_path: Path) -> None:
        done = run_command("merge", recipe, tmp_path / "out", "--log-format", "json")
        assert done.returncode == 0, done.stderr
        events = [json.loads(line) for line in done.stdout.splitlines()]
        planned = mergekit_ray.plan(recipe)
        assert [event["event"] for event in events if event["event"] != "progress"] == [
            "planned",
            *["shard_done"] * len(planned.shards),
            "checking",
            "publishing",
            "published",
        ]
        assert events[0]["plan_digest"] == planned.digest
        assert events[0]["num_parameters"] == planned.num_parameters
        assert {e["file"] for e in events if e["event"] == "shard_done"} == {shard.file for shard in planned.shards}
        seconds = [event["seconds"] for event in events]
        assert seconds == sorted(seconds)
        assert events[-1]["merge_seconds"] > 0
        assert done.stderr == ""

    def test_live_bar_on_a_terminal(self, many: Path, tmp_path: Path) -> None:
        code, shown = run_on_terminal("merge", many, tmp_path / "out")
        assert code == 0, shown
        assert "\x1b[" in shown
        assert "merging" in shown
        assert re.search(r"\d+/\d+", shown)
        assert re.search(r"\d(\.\d+)? ?[kKMGT]?i?B/s", shown)
        assert str(tmp_path / "out") in shown
        # The cursor is shown again: the terminal is as it was.
        assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l")

    def test_output_may_be_named_by_the_recipe(self, recipe: Path, published: Path, tmp_path: Path) -> None:
        data = yaml.safe_load(recipe.read_text())
        data["output"]["path"] = "named"
        write_recipe(tmp_path / "r.yml", data)
        done = run_command("merge", "r.yml", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        found, expected = contents(tmp_path / "named"), contents(published)
        told = {
            "README.md",
            "mergekit-ray.json",
        }  # the card shows the recipe as it is written, and the manifest its digest
        assert found.keys() == expected.keys()
        assert {name: found[name] for name in found.keys() - told} == {
            name: expected[name] for name in found.keys() - told
        }

    def test_no_output_named(self, recipe: Path) -> None:
        done = invoke("merge", recipe)
        assert done.exit_code == 2
        assert "no output is named" in done.stderr

    def test_terminated_it_leaves_records_and_the_next_run_resumes(self, many: Path, tmp_path: Path) -> None:
        out, fresh = tmp_path / "out", tmp_path / "fresh"
        command = [str(COMMANDS / "merge"), str(many), str(out)]
        with subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=command_environment()) as process:
            try:
                wait_until(lambda: list(out.glob("*.safetensors")), every=0.001)
                # Still until the signal waits for it: it cannot finish in between.
                psutil.Process(process.pid).suspend()
                process.send_signal(signal.SIGTERM)
            finally:
                psutil.Process(process.pid).resume()
            _, said = process.communicate(timeout=DEADLINE_SECONDS)
        assert process.returncode == 130, said
        assert "SIGTERM" in said
        assert "run the same command to resume" in said
        assert "Traceback" not in said
        done = sorted(out.glob("*.safetensors"))
        assert done
        assert not (out / "model.safetensors.index.json").exists()
        times = [file.stat().st_mtime_ns for file in done]
        again = run_command("merge", many, out)
        assert again.returncode == 0, again.stderr
        assert f"{len(done)} of {len(mergekit_ray.plan(many).shards)} shards already there" in again.stderr
        assert [file.stat().st_mtime_ns for file in done] == times
        mergekit_ray.merge(many, fresh)
        assert contents(out) == contents(fresh)

    def test_another_plan_is_refused_unless_overwritten(self, recipe: Path, published: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        shutil.copytree(published, out)
        refused = invoke("merge", recipe, out, "--seed", "5", "--quiet")
        assert refused.exit_code == 2
        assert "--overwrite" in refused.stderr
        assert contents(out) == contents(published)
        assert invoke("merge", recipe, out, "--seed", "5", "--quiet", "--overwrite").exit_code == 0
        assert json.loads((out / "mergekit-ray.json").read_text())["seed"] == 5

    def test_memory_that_does_not_fit(self, recipe: Path, tmp_path: Path) -> None:
        done = invoke("merge", recipe, tmp_path / "out", "--memory", "1MB")
        assert done.exit_code == 2
        assert re.search(r"pass --memory \d+MB or more", done.stderr)
        assert re.search(r"tensor '[\w.]+'", done.stderr)
        assert not (tmp_path / "out").exists()


class TestErrors:
    def test_name_file_and_line_for_every_problem(self, tmp_path: Path) -> None:
        text = (
            "merge_method: linear\nmodels:\n  - model: a\n    parameters: {wieght: 1}\n  - modle: b\ndtype: bfloat17\n"
        )
        path = tmp_path / "wrong.yml"
        path.write_text(text)
        for command, *more in (["validate"], ["plan"], ["merge", str(tmp_path / "out")]):
            done = invoke(command, path, *more)
            assert done.exit_code == 2
            problems = done.stderr.split("\n  ")
            for line, word in [(4, "weight"), (5, "model"), (6, "bfloat16")]:
                assert any(f"wrong.yml:{line}:" in problem and word in problem for problem in problems), done.stderr
            assert "Traceback" not in done.stderr

    def test_no_such_recipe(self, tmp_path: Path) -> None:
        done = invoke("merge", tmp_path / "no.yml", tmp_path / "out")
        assert done.exit_code == 2
        assert "no.yml" in done.stderr

    def test_no_such_model(self, tmp_path: Path) -> None:
        recipe = write_recipe(
            tmp_path / "r.yml",
            {"merge_method": "linear", "models": [{"model": "/no/such/model", "parameters": {"weight": 1}}]},
        )
        done = invoke("merge", recipe, tmp_path / "out")
        assert done.exit_code == 3
        assert "/no/such/model" in done.stderr

    def test_traceback_only_for_debug(self, tmp_path: Path) -> None:
        assert "Traceback" in run_command("mergekit-ray", "validate", tmp_path / "no.yml", "--debug").stderr
        assert "Traceback" not in run_command("mergekit-ray", "validate", tmp_path / "no.yml").stderr

    @pytest.mark.ray
    def test_unreachable_ray(self, recipe: Path, tmp_path: Path) -> None:
        done = run_command("merge", recipe, tmp_path / "out", "--address", "127.0.0.1:1")
        assert done.returncode == 4, done.stderr
        assert "127.0.0.1:1" in done.stderr
        assert "--executor local" in done.stderr


class TestOtherCommands:
    def test_plan_shows_shards_bytes_and_parameters(self, recipe: Path) -> None:
        planned = mergekit_ray.plan(recipe)
        done = run_command("mergekit-ray", "plan", recipe, env=command_environment(COLUMNS="160"))
        assert done.returncode == 0, done.stderr
        for shard in planned.shards:
            assert shard.file in done.stdout
        assert f"{planned.num_parameters:,}" in done.stdout

    def test_plan_says_how_long_it_takes_on_a_cluster(self, recipe: Path) -> None:
        done = invoke("plan", recipe, "--cluster", "nodes=2,link=1Mbit")
        assert done.exit_code == 0
        assert "On 2 nodes with links of 125 kB/s: at least" in " ".join(done.output.split())
        told = json.loads(invoke("plan", recipe, "--cluster", "nodes=2,link=1Mbit", "--json").output)
        assert told["estimate"]["seconds"] >= told["read_bytes"] / 125_000 / 2
        assert invoke("plan", recipe, "--cluster", "nodes=2").exit_code == 2

    def test_plan_as_json(self, recipe: Path) -> None:
        planned = mergekit_ray.plan(recipe)
        found = json.loads(invoke("plan", recipe, "--json").stdout)
        assert found["num_parameters"] == planned.num_parameters
        assert found["plan_digest"] == planned.digest
        assert found["plan"] == json.loads(json.dumps(planned.to_json()))

    def test_plan_explains_how_tensors_are_computed(self, recipe: Path) -> None:
        shown = " ".join(invoke("plan", recipe, "--explain", "*.layers.2.mlp.*", "--device", "cpu").stdout.split())
        for name in ("down_proj", "gate_proj", "up_proj"):
            assert f"model.layers.2.mlp.{name}.weight float32" in shown
        assert "torch: ties has no compiled loop" in shown
        assert "ties in float32 (" in shown
        found = json.loads(invoke("plan", recipe, "--explain", "model.norm.weight", "--json").stdout)
        assert [(each["tensor"], each["strategy"]) for each in found] == [("model.norm.weight", "torch")]
        assert found[0]["expression"][0] == "merge"
        models = [each["model"] for each in yaml.safe_load(recipe.read_text())["models"]]
        assert set(found[0]["models"].values()) >= set(models)
        assert [found[0]["models"][load[1]] for load in found[0]["expression"][3]] == models
        wrong = invoke("plan", recipe, "--explain", "model.nrom.weight")
        assert wrong.exit_code == 2
        assert "did you mean 'model.norm.weight'?" in wrong.stderr

    def test_validate(self, recipe: Path) -> None:
        done = invoke("validate", recipe)
        assert (done.exit_code, done.stdout) == (0, f"{recipe}: a dense recipe, valid\n")
        assert "fit together" in invoke("validate", recipe, "--models").stdout

    def test_lenient_warns_of_unknown_keys(self, recipe: Path, tmp_path: Path) -> None:
        write_recipe(tmp_path / "r.yml", {**yaml.safe_load(recipe.read_text()), "mrege": 1})
        assert invoke("validate", tmp_path / "r.yml").exit_code == 2
        done = invoke("validate", tmp_path / "r.yml", "--lenient")
        assert done.exit_code == 0
        assert "mrege" in done.stderr

    def test_methods(self) -> None:
        done = invoke("methods", "--json")
        assert done.exit_code == 0
        assert {method["name"] for method in json.loads(done.stdout)} >= METHODS
        table = run_command("mergekit-ray", "methods", env=command_environment(COLUMNS="160")).stdout
        assert all(method in table for method in METHODS)
        one = invoke("methods", "ties").stdout
        assert "density" in one
        assert "2306.01708" in one
        wrong = invoke("methods", "tise")
        assert wrong.exit_code == 2
        assert "ties" in wrong.stderr


class TestVerify:
    @pytest.fixture
    def copy(self, published: Path, tmp_path: Path) -> Path:
        """A published model to be damaged."""
        return Path(shutil.copytree(published, tmp_path / "copy"))

    def test_all_as_written(self, published: Path) -> None:
        planned = json.loads((published / "model.safetensors.index.json").read_text())
        done = invoke("verify", published)
        assert done.exit_code == 0
        assert f"{len(planned['weight_map'])} tensors" in done.stdout
        assert json.loads(invoke("verify", published, "--json").stdout)["ok"] is True

    def test_flipped_byte_names_the_tensor(self, copy: Path) -> None:
        file = sorted(copy.glob("*.safetensors"))[1]
        data = bytearray(file.read_bytes())
        data[-5] ^= 1
        file.write_bytes(data)
        self.assert_wrong(copy, file.name, "SHA-256")
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        last = max((name for name in header if name != "__metadata__"), key=lambda n: header[n]["data_offsets"])
        assert last in invoke("verify", copy).stderr

    def test_flipped_byte_of_a_header(self, copy: Path) -> None:
        file = min(copy.glob("*.safetensors"))
        # Padding: the header says the same, the file is another.
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header["__metadata__"] = {"format": "np"}
        text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
        file.write_bytes(data[:8] + text + data[8 + length :])
        self.assert_wrong(copy, file.name, "SHA-256")

    def test_truncated_shard(self, copy: Path) -> None:
        file = min(copy.glob("*.safetensors"))
        file.write_bytes(file.read_bytes()[:-1])
        self.assert_wrong(copy, file.name, "bytes instead of")

    def test_missing_shard(self, copy: Path) -> None:
        file = max(copy.glob("*.safetensors"))
        file.unlink()
        self.assert_wrong(copy, file.name, "missing")

    def test_swapped_shards(self, copy: Path) -> None:
        first, second = sorted(copy.glob("*.safetensors"))[1:3]
        a, b = first.read_bytes(), second.read_bytes()
        first.write_bytes(b)
        second.write_bytes(a)
        self.assert_wrong(copy, first.name, second.name)

    def test_index_of_another_run(self, copy: Path, many: Path, tmp_path: Path) -> None:
        (copy / "model.safetensors.index.json").write_text(json.dumps(mergekit_ray.plan(many).index))
        self.assert_wrong(copy, "model.safetensors.index.json", "does not belong")

    def test_missing_index(self, copy: Path) -> None:
        (copy / "model.safetensors.index.json").unlink()
        self.assert_wrong(copy, "model.safetensors.index.json", "missing")

    def test_stray_weights(self, copy: Path) -> None:
        shutil.copy(min(copy.glob("*.safetensors")), copy / "model.safetensors")
        self.assert_wrong(copy, "model.safetensors", "not part of this model")

    def test_not_a_model_of_ours(self, models: ModelLibrary) -> None:
        done = invoke("verify", models.get("llama"))
        assert done.exit_code == 3
        assert "mergekit-ray.json" in done.stderr

    @staticmethod
    def assert_wrong(folder: Path, *words: str) -> None:
        done = invoke("verify", folder)
        assert done.exit_code == 3
        assert done.stdout == ""
        for word in words:
            assert word in done.stderr
        found = json.loads(invoke("verify", folder, "--json").stdout)
        assert found["ok"] is False
        assert found["problems"]
