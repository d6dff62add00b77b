"""The image, built and run: as its user, without privileges, on a file system that cannot be written to."""

from __future__ import annotations

import io
import json
import re
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import mergekit_ray
from container.engine import ROOT, WRITABLE_TMP, Container, Image, podman
from support.models import tensors_of
from support.waiting import wait_until

# The build takes minutes, and is part of whichever test comes first.
pytestmark = [pytest.mark.container, pytest.mark.timeout(1800)]

COMMANDS = ("merge", "mergekit-ray", "ray", "python", "wget", "tini")

CLOSURE = """
import json, re
from importlib.metadata import distributions
from packaging.requirements import Requirement
name_of = lambda name: re.sub(r"[-_.]+", "-", name).lower()
found = {name_of(d.name): d for d in distributions()}
wanted, problems = [("mergekit-ray", {"", "moe"}), ("ray", {"", "default"})], []
for name, extras in wanted:
    for line in found[name].requires or []:
        r = Requirement(line)
        if r.marker and not any(r.marker.evaluate({"extra": extra}) for extra in extras):
            continue
        have = found.get(name_of(r.name))
        if have is None or have.version not in r.specifier:
            problems.append(f"{name} wants {line}")
        elif (entry := (name_of(r.name), {"", *r.extras})) not in wanted:
            wanted.append(entry)
print(json.dumps({"problems": problems, "installed": {name: d.version for name, d in found.items()}}))
"""
"""Follows what packages ask for, as `pip check` does: the image has no pip."""


@pytest.fixture
def mounted(inputs: Path) -> list[str]:
    """Options that give a container the models, to read, and start it among them."""
    return [f"--volume={inputs}:/inputs:ro", "--workdir=/inputs"]


def locked(kind: str) -> dict[str, str]:
    """Versions by name, as the image of this kind is to hold them."""
    files = [ROOT / "docker/requirements.txt", ROOT / f"docker/requirements-{kind}.txt"]
    return {name: version for f in files for name, version in re.findall(r"(?m)^([\w.-]+)==(\S+)", f.read_text())}


def inspect(image: Image) -> Any:
    """What podman knows of the image."""
    (found,) = json.loads(podman("image", "inspect", image.name).stdout)
    return found


def kind_of(image: Image) -> str:
    """What torch it has: ``cpu`` or ``cuda``."""
    return str(inspect(image)["Config"]["Labels"]["mergekit-ray.torch"])


def test_says_what_it_is(image: Image) -> None:
    config = inspect(image)["Config"]
    assert config["User"] == "10001:10001"
    labels = config["Labels"]
    assert labels["org.opencontainers.image.title"] == "mergekit-ray"
    assert labels["org.opencontainers.image.version"] == mergekit_ray.__version__
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert labels["org.opencontainers.image.base.name"]
    assert labels["mergekit-ray.torch"] in ("cpu", "cuda")


def test_is_as_large_as_documented(image: Image) -> None:
    page = (ROOT / "docs/container.md").read_text()
    (documented,) = re.findall(rf"\| `{kind_of(image)}` \| ([\d.]+) GB", page)
    assert inspect(image)["Size"] / 1e9 == pytest.approx(float(documented), rel=0.1)


@pytest.mark.parametrize("shell", ["-c", "-lc"], ids=["shell", "login shell"])
def test_commands_are_on_the_path(image: Image, shell: str) -> None:
    found = image.ok("bash", shell, f"command -v {' '.join(COMMANDS)}").split()
    assert [Path(path).name for path in found] == list(COMMANDS)


def test_has_no_build_tools_and_nothing_that_changes_user(image: Image) -> None:
    tools = "pip pip3 uv cc gcc g++ ld make git dpkg-buildpackage"
    assert image.ok("bash", "-c", f"command -v {tools}; python -m pip --version 2>/dev/null; true") == ""
    assert image.ok("bash", "-c", "find / -xdev -type f -perm /6000 2>/dev/null; true") == ""


def test_keeps_nothing_of_the_build(image: Image) -> None:
    left = (
        "/etc/pip.conf /run/secrets/ca.crt /requirements.txt /source /built /torch /dependencies /package /root/.cache"
    )
    assert image.ok("bash", "-c", f"ls -d {left} 2>/dev/null; true", options=["--user=0"]) == ""
    assert image.ok("bash", "-c", "find /usr/local -name direct_url.json") == ""


def test_holds_exactly_what_is_locked_and_nothing_is_missing(image: Image) -> None:
    said = json.loads(image.ok("python", "-c", CLOSURE))
    assert said["problems"] == []
    assert said["installed"] == {**locked(kind_of(image)), "mergekit-ray": mergekit_ray.__version__}


def test_runs_as_its_user_under_an_init(image: Image) -> None:
    assert image.ok("id", "-u").strip() == "10001"
    assert image.ok("cat", "/proc/1/comm").strip() == "tini"
    assert image.run("bash", "-c", "touch /usr/local/x || touch /data/x || touch ~/x").returncode == 1


def test_help_is_what_it_does_by_itself(image: Image) -> None:
    assert "Usage: merge [OPTIONS] RECIPE [OUT]" in image.ok()
    assert image.ok() == image.ok("merge", "--help")


def test_validate(image: Image, mounted: list[str]) -> None:
    assert "valid" in image.ok("mergekit-ray", "validate", "--models", "recipe.yml", options=mounted)
    wrong = image.run("mergekit-ray", "validate", "wrong.yml", options=mounted)
    assert wrong.returncode == 2
    assert b"wrong.yml:1" in wrong.stderr
    assert b"dare_ties" in wrong.stderr


@pytest.mark.parametrize("user", ["10001:10001", "23456:0"], ids=["own", "any"])
def test_merge_on_a_read_only_file_system(
    image: Image, inputs: Path, mounted: list[str], tmp_path: Path, user: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = "merge recipe.yml /tmp/merged >&2 && mergekit-ray verify /tmp/merged >&2"
    command += " && ls /tmp/numba/*/*.nbi >&2 && tar --create --directory /tmp/merged ."
    done = image.run("bash", "-c", command, options=[*mounted, WRITABLE_TMP, f"--user={user}"])
    assert done.returncode == 0, done.stderr.decode()
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(tmp_path / "merged", filter="data")

    monkeypatch.chdir(inputs)
    mergekit_ray.merge("recipe.yml", tmp_path / "here")
    expected, found = tensors_of(tmp_path / "here"), tensors_of(tmp_path / "merged")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_merge_where_nothing_can_be_written_but_the_destination(image: Image, mounted: list[str]) -> None:
    options = [*mounted, "--tmpfs=/data:rw,mode=1777,size=100m"]
    command = "! touch /tmp/x ~/x 2>/dev/null && merge recipe.yml /data/merged && ls /data/merged"
    assert "model.safetensors.index.json" in image.ok("bash", "-c", command, options=options)


# ---------------------------------------------------------------------------------------------------- as KubeRay's head

START = (
    "ulimit -n 65536; ray start --head --block --dashboard-agent-listen-port=52365 --dashboard-host=0.0.0.0"
    " --metrics-export-port=8080 --num-cpus=2 --memory=2000000000 --object-store-memory=100000000"
)
"""As KubeRay generates it, with a smaller object store."""

PROBE = (
    "wget --tries 1 -T 2 -q -O- http://localhost:52365/api/local_raylet_healthz | grep success"
    " && wget --tries 1 -T 10 -q -O- http://localhost:8265/api/gcs_healthz | grep success"
)
"""KubeRay's probes of a head, as it writes them."""


@pytest.fixture(scope="module")
def head(image: Image, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    """A head node, ready by KubeRay's probe, with a wheel of a package `plugged` in ``/wheels``."""
    wheels = tmp_path_factory.mktemp("wheels")
    with zipfile.ZipFile(wheels / "plugged-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("plugged.py", "ANSWER = 42\n")
        wheel.writestr("plugged-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: plugged\nVersion: 1\n")
        wheel.writestr("plugged-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("plugged-1.dist-info/RECORD", "")
    wheels.chmod(0o755)
    options = [WRITABLE_TMP, "--shm-size=256m", f"--volume={wheels}:/wheels:ro"]
    options += [f"--volume={inputs}:/inputs:ro", "--workdir=/inputs"]
    with image.start("/bin/bash", "-c", "--", START, options=options) as container:
        try:
            wait_until(lambda: container.run("bash", "-c", PROBE).returncode == 0, seconds=90, every=1)
        except AssertionError:
            raise AssertionError(container.log()) from None
        yield container


def submit(head: Container, *command: str, environment: str = "{}") -> str:
    """What a job prints that succeeds."""
    options = ["--address", "http://localhost:8265", "--runtime-env-json", environment]
    done = head.run("ray", "job", "submit", *options, "--", *command)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_head_is_found_by_workers(head: Container) -> None:
    assert head.run("ray", "health-check", "--address", "127.0.0.1:6379").returncode == 0


def test_job_merges(head: Container) -> None:
    assert "/tmp/merged is complete" in submit(head, "merge", "recipe.yml", "/tmp/merged")
    verified = head.run("mergekit-ray", "verify", "/tmp/merged")
    assert verified.returncode == 0, verified.stdout


def test_job_that_cannot_merge_fails(head: Container) -> None:
    done = head.run(
        "ray", "job", "submit", "--address", "http://localhost:8265", "--", "merge", "wrong.yml", "/tmp/wrong"
    )
    assert done.returncode == 1
    assert "wrong.yml:1" in done.stdout


def test_job_brings_packages_of_its_own(head: Container) -> None:
    environment = json.dumps({"pip": ["/wheels/plugged-1-py3-none-any.whl"]})
    program = "import mergekit_ray, plugged, torch; print(mergekit_ray.__file__, plugged.ANSWER)"
    said = submit(head, "python", "-c", program, environment=environment)
    assert "/usr/local/lib/python3.11/dist-packages/mergekit_ray/__init__.py 42" in said
