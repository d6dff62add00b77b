"""A job brings mergekit-ray along to a cluster that has everything but it."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import mergekit_ray
from support.merging import COMMANDS, recipe_of, undisturbed
from support.models import ModelLibrary, contents
from support.servers.ray_head import RayHead
from support.waiting import DEADLINE_SECONDS

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, built from this tree."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(pip, check=True, timeout=DEADLINE_SECONDS)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``bin`` of an environment with all dependencies, and without mergekit-ray."""
    folder = tmp_path_factory.mktemp("cluster")
    (here,) = (Path(place) for place in sys.path if place.endswith("site-packages"))
    dependencies = folder / "dependencies"
    dependencies.mkdir()
    for entry in here.iterdir():
        if "mergekit_ray" not in entry.name:
            (dependencies / entry.name).symlink_to(entry)
    environment = folder / "venv"
    venv.create(environment, with_pip=True)
    (inside,) = environment.glob("lib/python*/site-packages")
    (inside / "dependencies.pth").write_text(f"{dependencies}\n")
    script = environment / "bin/ray"
    script.write_text(
        f"#!{environment}/bin/python\nimport sys\nfrom ray.scripts.scripts import main\nsys.exit(main())\n"
    )
    script.chmod(0o755)
    return environment / "bin"


@pytest.fixture(scope="module")
def head(commands: Path) -> Iterator[RayHead]:
    with RayHead(commands=commands) as head:
        yield head


def submit(head: RayHead, working_dir: Path, *options: str) -> subprocess.CompletedProcess[str]:
    ray = [str(COMMANDS / "ray"), "job", "submit", "--address", head.dashboard, "--working-dir", str(working_dir)]
    command = [*ray, *options, "--", "merge", "recipe.yml"]
    return subprocess.run(
        command, capture_output=True, text=True, env=head.environment, timeout=DEADLINE_SECONDS, check=False
    )


def test_the_package_comes_with_the_job(
    head: RayHead, wheel: Path, models: ModelLibrary, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    project = tmp_path / "project"
    project.mkdir()
    base, *tuned = (models.get("llama", variant) for variant in range(3))
    recipe = recipe_of("ties", base, tuned, output={"path": str(tmp_path / "out"), "max_shard_size": 60_000})
    (project / "recipe.yml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    without = submit(head, project)
    assert without.returncode != 0
    assert "merge: " in without.stdout + without.stderr  # not found, as the shell says it
    assert not (tmp_path / "out").exists()

    described = tmp_path / "runtime.yml"
    described.write_text(yaml.safe_dump({"pip": [str(wheel)]}))
    done = submit(head, project, "--runtime-env", str(described))
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"RayWorker"' in head.get(f"{head.dashboard}/api/v0/actors")  # on the cluster, which has no package either
    assert contents(tmp_path / "out") == undisturbed(project / "recipe.yml", tmp_path / "expected")
    manifest = json.loads((tmp_path / "out/mergekit-ray.json").read_text())
    assert manifest["software"]["mergekit-ray"] == mergekit_ray.__version__
