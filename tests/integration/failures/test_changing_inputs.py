"""Inputs that others write to while they are merged: the merge ends, says which file it was, and publishes nothing."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import yaml

from support.merging import command_environment, recipe_of, run_command
from support.models import ModelLibrary
from support.servers.ray_cluster import ENVIRONMENT

# Python runs this at the start of every process, those of Ray's workers too. When the file changes all of the shard has
# been read or mapped, and nothing has been used.
SITE = """
import os
from pathlib import Path

from mergekit_ray.worker.pipeline import ShardPipeline

original = ShardPipeline._compute_all

def compute_all(self):
    for batch in [*iter(self._read.get, None)]:
        batch.reading.result()
        self._read.put(batch)
    self._read.put(None)
    path = Path({path!r})
    {change}
    original(self)

ShardPipeline._compute_all = compute_all
"""

CHANGES = {
    "cut": "os.truncate(path, 100)",
    "written to": "path.open('r+b').write(bytes(9)); os.utime(path, ns=(1, 1))",
    "replaced": "new = path.with_suffix('.new'); new.write_bytes(bytes(9)); new.replace(path)",
    "deleted": "path.unlink(missing_ok=True)",
}

CASES = [pytest.param("local", change, id=f"local-{change}") for change in CHANGES]
CASES += [pytest.param("ray", change, id=f"ray-{change}", marks=pytest.mark.ray) for change in ("cut", "written to")]


@pytest.mark.parametrize("method", ["linear", "passthrough"])
@pytest.mark.parametrize(("executor", "change"), CASES)
def test_the_file_is_named(executor: str, change: str, method: str, models: ModelLibrary, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(models.get("llama", 1, vocab_size=32_768, hidden_size=64), bad)
    path = bad / "model.safetensors"
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SITE.format(path=str(path), change=CHANGES[change]))
    if method == "linear":
        recipe = recipe_of("linear", models.get("llama", vocab_size=32_768, hidden_size=64), [bad])
    else:
        recipe = {"merge_method": "passthrough", "models": [{"model": str(bad)}]}
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    search = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    workers = ["--executor", executor, "--workers", "1"]
    environment = command_environment(PYTHONPATH=search, **ENVIRONMENT)
    done = run_command("merge", tmp_path / "recipe.yml", tmp_path / "out", *workers, env=environment)
    assert done.returncode == 3, done.stderr
    assert "lost" not in done.stderr, "no process died of it"
    assert f"{path}: changed while it was being read" in " ".join(done.stderr.split())
    assert not list((tmp_path / "out").glob("*.safetensors"))
    assert not (tmp_path / "out" / "config.json").exists()
