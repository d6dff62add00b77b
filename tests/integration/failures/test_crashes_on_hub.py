"""kill -9 at commits of a merge to the Hub; the same command then publishes the same model, and nothing else."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

import mergekit_ray
from support.memory_inputs import random_llama, write_model
from support.merging import COMMANDS, run_command
from support.servers.hub_server import TOKEN, environment
from support.servers.hub_writing import WritableHubServer
from support.waiting import DEADLINE_SECONDS

RECIPE = """
merge_method: linear
models:
  - {{model: {0}, parameters: {{weight: 1}}}}
  - {{model: {1}, parameters: {{weight: 2}}}}
output: {{max_shard_size: 400}}
"""


class Commits(list[Any]):
    """What a server notes of its commits, which kills a process as one is made: its answer is never read.

    Args:
        number: of the commit, counted from 1.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self._number = number
        self.driver: subprocess.Popen[bytes] | None = None

    def append(self, commit: Any) -> None:
        super().append(commit)
        if len(self) == self._number and self.driver is not None:
            self.driver.kill()
            self.driver.wait(DEADLINE_SECONDS)


@pytest.mark.parametrize("number", [2, 5])
def test_kill_at_a_commit(number: int, tmp_path: Path) -> None:
    config = {"model_type": "llama", "num_hidden_layers": 6, "tie_word_embeddings": False, "vocab_size": 20}
    folders = [write_model(tmp_path / f"model-{i}", random_llama(i, num_layers=6), config) for i in range(2)]
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(RECIPE.format(*folders))
    mergekit_ray.merge(recipe, tmp_path / "out")
    with WritableHubServer() as server:
        server.messages = commits = Commits(number)
        around = environment(server, tmp_path / "home", token=TOKEN)
        arguments = ["merge", str(recipe), "hf://org/merged", "--executor", "local"]
        with subprocess.Popen([str(COMMANDS / "mergekit-ray"), *arguments], env=around) as driver:
            commits.driver = driver
            driver.wait(DEADLINE_SECONDS)
        assert driver.returncode == -signal.SIGKILL
        again = run_command("mergekit-ray", *arguments, env=around)
        assert again.returncode == 0, again.stderr
        repo = server.repos["org/merged"]
        found = {name: data for name, data in repo.head().items() if name != ".gitattributes"}  # the Hub's own
        assert found == {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir() if file.is_file()}
        assert list(repo.branches) == ["main"]
        assert sum(branch == "main" for branch, _ in server.messages) == 1
