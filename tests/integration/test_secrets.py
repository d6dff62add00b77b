"""A credential that is planted wherever a URL can be is in nothing that is printed or written."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

import mergekit_ray
from mergekit_ray.core.errors import MergekitRayError
from mergekit_ray.operations.options import MergeOptions
from support.merging import Events, command_environment, recipe_of, run_command
from support.models import ModelLibrary

SECRET = "pl4nted-Secret"
HUB_TOKEN = "hf_" + "Pl4nted" * 5

URLS = {
    "hub": f"hf://user:{SECRET}@org/name",
    "hub, plus": f"hf://user:x+{SECRET}@org/name",
    "hub, token": f"hf://{HUB_TOKEN}@org/name",
    "file": f"file://user:{SECRET}@/tmp/model",
    "s3": f"s3://key:{SECRET}@bucket/model",
    "s3, slash": f"s3://key:x/{SECRET}@bucket/model",
    "signed": f"https://host/model?X-Amz-Date=1&X-Amz-Signature={SECRET}",
    "signed prefix": f"s3://bucket/model?X-Amz-Signature={SECRET}",
}


@pytest.fixture(scope="module")
def sound(models: ModelLibrary) -> dict[str, Any]:
    """A recipe that can be merged."""
    base, *tuned = (models.get("llama", variant, with_tokenizer=True) for variant in range(3))
    return recipe_of("ties", base, tuned)


def planted(recipe: Mapping[str, Any], url: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The recipe with a URL in each place where one can be."""
    first, *others = recipe["models"]
    yield "base_model", {**recipe, "base_model": url}
    yield "model", {**recipe, "models": [{**first, "model": url}, *others]}
    yield "mapping", {**recipe, "models": [{**first, "model": {"path": url}}, *others]}
    yield "lora", {**recipe, "models": [{**first, "model": f"{first['model']}+{url}"}, *others]}
    yield "tokenizer", {**recipe, "tokenizer": {"source": url}}
    yield "tokenizer_source", {**recipe, "tokenizer_source": url}
    yield "output", {**recipe, "output": {"path": url}}
    yield "unknown key", {**recipe, url: url}
    yield "parameter", {**recipe, "parameters": {"normalize": url}}


def is_hidden(text: str) -> bool:
    return SECRET not in text and HUB_TOKEN not in text


def written(folder: Path) -> str:
    """All small files below a folder."""
    return "\n".join(path.read_text("latin-1") for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("url", URLS.values(), ids=URLS)
def test_in_a_recipe(url: str, sound: dict[str, Any], tmp_path: Path) -> None:
    """No error quotes it, and where the merge goes on without it, no file and no event does."""
    for place, recipe in planted(sound, url):
        out = tmp_path / place
        events = Events()
        said = ""
        try:
            mergekit_ray.merge(recipe, out, options=MergeOptions(executor="local"), reporter=events)
        except MergekitRayError as error:
            said = f"{error} {error!r}"
        assert is_hidden(said + str(events.all)), place
        assert is_hidden(written(out)), place
        if place == "output":
            assert (out / "mergekit-ray.json").exists(), said


@pytest.mark.parametrize("url", URLS.values(), ids=URLS)
def test_as_an_output(url: str, sound: dict[str, Any]) -> None:
    with pytest.raises(MergekitRayError, match="must not hold a credential") as caught:
        mergekit_ray.merge(sound, url)
    assert is_hidden(str(caught.value))
    assert caught.value.exit_code == 2


COMMANDS: dict[str, Callable[[Path, str], list[str]]] = {
    "merge": lambda recipe, url: ["merge", str(recipe), url],
    "merge, a recipe there": lambda recipe, url: ["merge", f"{url}/recipe.yml", "out"],
    "merge, logged": lambda recipe, url: ["merge", str(recipe), "out", "--log-format", "json"],
    "plan": lambda recipe, url: ["plan", str(recipe), "--json"],
    "validate": lambda recipe, url: ["validate", str(recipe), "--models"],
    "verify": lambda recipe, url: ["verify", url, "--json"],
    "attest": lambda recipe, url: ["attest", url],
    "reproduce": lambda recipe, url: ["reproduce", url, "out"],
    "extract-lora": lambda recipe, url: ["extract-lora", url, url, url, "--rank", "2"],
    "transplant": lambda recipe, url: ["transplant", url, url, url],
    "convert": lambda recipe, url: ["convert", url, "out"],
    "compat": lambda recipe, url: ["compat", "mergekit-yaml", str(recipe), url],
    "too many": lambda recipe, url: ["verify", "/tmp/a-long-path-of-a-model", f"/tmp/beyond/the/edge/{url}"],
}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_on_the_command_line(command: Callable[[Path, str], list[str]], sound: dict[str, Any], tmp_path: Path) -> None:
    """With --debug, which shows more."""
    url = URLS["s3, slash"]
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(yaml.safe_dump({**sound, "output": {"path": url}}))
    (tmp_path / "there").mkdir()
    arguments = command(recipe, url)
    result = run_command("mergekit-ray", *arguments, "--debug", cwd=tmp_path / "there")
    assert is_hidden(result.stdout + result.stderr), result
    assert is_hidden(written(tmp_path / "there"))
    # The output that the recipe names is of no use to plan, nor to a merge to another one.
    succeeds = str(recipe) in arguments and url not in arguments and arguments[0] != "validate"
    assert result.returncode == (0 if succeeds else 2), result.stderr
    if "--json" in arguments and result.returncode == 0:
        json.loads(result.stdout)


@pytest.fixture
def nowhere() -> str:
    """A port of this machine at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return "127.0.0.1:{1}".format(*listener.getsockname())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "HF_ENDPOINT", "HTTPS_PROXY", "HF_TOKEN", "RAY_ADDRESS"])
def test_in_the_environment(name: str, nowhere: str, tmp_path: Path, sound: dict[str, Any]) -> None:
    store = "s3://bucket/model" if name.startswith("AWS") else "hf://org/name"
    value = f"https://user:{SECRET}@{nowhere}" if name != "HF_TOKEN" else f"{SECRET}\n {SECRET}"
    environment = {
        **command_environment(),
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": f"{SECRET}-of-s3",
        "AWS_REGION": "us-east-1",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "hub"),
        name: value,
    }
    arguments = ["verify", store]
    if name == "RAY_ADDRESS":
        recipe = tmp_path / "recipe.yml"
        recipe.write_text(yaml.safe_dump(sound))
        arguments = ["merge", str(recipe), str(tmp_path / "out"), "--executor", "ray"]
    result = run_command("mergekit-ray", *arguments, "--debug", env=environment)
    assert is_hidden(result.stdout + result.stderr), result.stderr
    assert result.returncode in (2, 3, 4), result.stderr


@pytest.mark.parametrize("form", ["ray://user:{}@127.0.0.1:1", "user:{}@127.0.0.1:1", "ray://{}@127.0.0.1:1"])
def test_in_the_address_of_a_cluster(form: str, sound: dict[str, Any], tmp_path: Path) -> None:
    options = MergeOptions(executor="ray", address=form.format(SECRET))
    with pytest.raises(MergekitRayError, match="takes no user or password") as caught:
        mergekit_ray.merge(sound, tmp_path / "out", options=options)
    assert is_hidden(str(caught.value))
    assert is_hidden(written(tmp_path))
