"""The tutorial "Your first merge": its recipes, commands and Python run as they stand, on a Hub with tiny models."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import yaml

from support.merging import run_command
from support.models import ModelLibrary
from support.servers.hub_server import HubServer, environment

PAGE = Path(__file__).parents[3] / "docs/tutorials/first-merge.md"
_FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
REFUSED = "merge slerp.yml ./merged"
"""The page says so."""


def test_a_reader_who_types_all_of_it_gets_what_it_says(models: ModelLibrary, tmp_path: Path) -> None:
    done: list[str] = []
    with HubServer() as server:
        for variant, name in enumerate(["HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M-Instruct"]):
            folder = models.get(variant=variant, with_tokenizer=True)
            server.add(name, {file.name: file.read_bytes() for file in folder.iterdir()})
        known = environment(server, tmp_path / "home")
        for block in _FENCE.finditer(PAGE.read_text()):
            if block["language"] == "yaml":
                name = block["text"].splitlines()[0].removeprefix("# ")
                (tmp_path / name).write_text(block["text"])
            elif block["language"] == "python":
                program = [sys.executable, "-c", block["text"]]
                ran = subprocess.run(program, cwd=tmp_path, env=known, capture_output=True, text=True, check=False)
                assert ran.returncode == 0, ran.stderr
                assert "France" in ran.stdout
            elif not block["language"]:
                for line in block["text"].splitlines():
                    program, *arguments = shlex.split(line)
                    if program in ("git", "pip", "python3", ".", "cd"):  # what makes the environment
                        continue
                    ran = run_command(program, *arguments, cwd=tmp_path, env=known)
                    assert ran.returncode == (2 if line == REFUSED else 0), ran.stderr
                    done.append(line)
        assert REFUSED in done
        assert "mergekit-ray verify ./merged" in done
        recipe = yaml.safe_load((tmp_path / "recipe.yml").read_text())
        recipe["models"][0]["parameters"] = {"wieght": 0.4}
        (tmp_path / "misspelt.yml").write_text(yaml.safe_dump(recipe))
        ran = run_command("mergekit-ray", "validate", "misspelt.yml", cwd=tmp_path, env=known)
    assert ran.returncode == 2
    for said in (
        "one problem in the recipe",
        "linear has no parameter 'wieght'; accepted: normalize, weight",
        "did you mean 'weight'?",
    ):
        assert said in ran.stderr
        assert said in PAGE.read_text()
