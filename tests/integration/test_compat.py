"""Scripts written for mergekit run as they are, and give what our own commands give."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from support.merging import COMMANDS, command_environment, recipe_of, run_command
from support.models import ModelLibrary, contents, tensors_of
from support.tokenizers.models import byte_level, save_model

SCRIPT = """\
mergekit-yaml linear.yml yaml --copy-tokenizer --lazy-unpickle --out-shard-size 10K --random-seed 3
mergekit-multi multi.yml -I between --out-path multi -v
mergekit-extract-lora --model tuned --base-model base --out-path lora --max-rank 2
mergekit-layershuffle shuffled -m base -m tuned -w 1 -w 2 --random-seed 5 --write-yaml shuffled.yml
bakllama layers.yml stacked --clone-tensors
"""
OURS = """\
merge linear.yml yaml --max-shard-size 20KB --seed 3
merge multi.yml multi
mergekit-ray recipe shuffle -m base -m tuned -w 1 -w 2 --seed 5 | merge - shuffled
merge slices.yml stacked
"""


@pytest.fixture
def work(models: ModelLibrary, tmp_path: Path) -> Path:
    """A folder with models and configs."""
    for name, variant in (("base", 0), ("tuned", 1)):
        shutil.copytree(models.get("llama", variant), tmp_path / name)
    linear = recipe_of("linear", "base", ["tuned"])
    last = {**recipe_of("linear", "base", ["first"])}
    layers = [{"model": "base", "start": 0, "end": 2}, {"model": "tuned", "start": 0, "end": 1, "scale": 0.5}]
    scale = {"scale": [{"filter": "down_proj", "value": 0.5}, {"value": 1.0}]}
    slices = [
        {"sources": [{"model": "base", "layer_range": [0, 2]}]},
        {"sources": [{"model": "tuned", "layer_range": [0, 1], "parameters": scale}]},
    ]
    for name, data in {
        "linear": [linear],
        "multi": [{**linear, "name": "first"}, last],
        "layers": [{"layer_slices": layers}],
        "slices": [{"merge_method": "passthrough", "slices": slices}],
    }.items():
        (tmp_path / f"{name}.yml").write_text(yaml.safe_dump_all(data))
    return tmp_path


def shell(program: list[str], script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    env = command_environment()
    path = f"{COMMANDS}:{env['PATH']}"
    return subprocess.run(
        [*program, f"set -e\n{script}"],
        cwd=folder,
        env={**env, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def weights(folder: Path) -> dict[str, bytes]:
    """The weight files, and the config."""
    return {n: data for n, data in contents(folder).items() if n.endswith((".safetensors", "config.json"))}


def test_an_old_script_runs_in_bash_and_in_what_it_starts(work: Path) -> None:
    (work / "old.sh").write_text(SCRIPT)
    done = shell(["bash", "-c"], 'eval "$(mergekit-ray compat --aliases)"\nbash -e old.sh', work)
    assert done.returncode == 0, done.stderr
    shown = [line for line in done.stderr.splitlines() if line.startswith("mergekit-ray: this is: ")]
    assert shown[:2] == [
        "mergekit-ray: this is: merge linear.yml yaml --seed 3 --max-shard-size 20KB",
        "mergekit-ray: this is: merge multi.yml multi",
    ]
    assert len(shown) == 5
    found = {name: weights(work / name) for name in ("yaml", "multi", "shuffled", "stacked")}
    adapter = load_file(work / "lora/adapter_model.safetensors")
    assert len(found["yaml"]) > 2
    assert not (work / "between").exists()
    for name in found:
        shutil.rmtree(work / name)
    assert shell(["bash", "-c"], OURS, work).returncode == 0
    assert {name: weights(work / name) for name in found} == found
    # What the adapter does not factorise is stored whole, as mergekit does it.
    tuned = tensors_of(work / "tuned")
    whole = {name: tensor for name, tensor in adapter.items() if ".lora_" not in name}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in whole} >= {"norm", "embed_tokens", "lm_head"}
    for name, tensor in whole.items():
        assert torch.equal(tensor.float(), tuned[name.removeprefix("base_model.model.")].float()), name


def test_other_shells_get_aliases(work: Path) -> None:
    if shutil.which("dash") is None:
        pytest.skip("no dash here")
    # On one line, a shell would read all of it before it knows the aliases.
    script = 'eval "$(mergekit-ray compat --aliases)"\nmergekit-yaml linear.yml "with a space" --quiet'
    done = shell(["dash", "-c"], script, work)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (work / "with a space/config.json").exists()


def test_a_vocabulary_by_the_old_command(tmp_path: Path) -> None:
    save_model(tmp_path / "model", byte_level(), 0)
    save_model(tmp_path / "donor", byte_level(["<|im_start|>"]), 1)
    places = [tmp_path / "model", tmp_path / "donor"]
    old = ("-a", "common_interpolation", "-c", "-k", "4", "-w", "distance_proportional", "-pm", "no", "-nvs", "0.5")
    done = run_command("mergekit-ray", "compat", "mergekit-tokensurgeon", *places, tmp_path / "old", *old)
    assert done.returncode == 0, done.stderr
    new = ("--method", "common_interpolation", "--metric", "cosine", "--k", "4", "--new-vocab-scale", "0.5")
    done = run_command("mergekit-ray", "transplant", *places, tmp_path / "new", *new)
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "old") == weights(tmp_path / "new")


def test_modules_by_patterns(work: Path) -> None:
    """As `re.search` finds them in the names of modules."""
    arguments = ["--model", "tuned", "--base-model", "base", "--out-path", "lora", "--max-rank", "2"]
    patterns = ["-e", r"\.0\.", "-i", "q_proj$", "-i", "norm"]
    done = run_command("mergekit-ray", "compat", "extract-lora", *arguments, *patterns, cwd=work)
    assert done.returncode == 0, done.stderr
    names = load_file(work / "lora/adapter_model.safetensors")
    assert names
    assert all(".0." not in name for name in names)
    assert {name.split(".")[-2] for name in names if ".lora_" not in name} == {
        "norm",
        "input_layernorm",
        "post_attention_layernorm",
    }
    assert {name.split(".")[-3] for name in names if ".lora_" in name} == {"q_proj"}
    done = run_command("mergekit-ray", "compat", "extract-lora", *arguments, "-e", "(", cwd=work)
    assert (done.returncode, done.stdout) == (2, "")
    assert "error: '(' is no regular expression" in done.stderr


@pytest.mark.parametrize(
    ("words", "code"), [(("none.yml", "out"), 2), (("broken.yml", "out"), 3), (("linear.yml",), 2)]
)
def test_exit_codes_are_those_of_the_command(words: tuple[str, ...], code: int, work: Path) -> None:
    (work / "broken.yml").write_text(yaml.safe_dump(recipe_of("linear", "base", ["./nothere"])))
    done = run_command("mergekit-ray", "compat", "yaml", *words, cwd=work)
    assert done.returncode == code
    if len(words) == 2:
        ours = run_command("merge", *words, cwd=work)
        assert ours.returncode == code
        assert done.stderr == f"mergekit-ray: this is: merge {' '.join(words)}\n{ours.stderr}"


def test_another_model_at_the_output_is_replaced_on_request(work: Path) -> None:
    linear = yaml.safe_load((work / "linear.yml").read_text())
    (work / "other.yml").write_text(yaml.safe_dump({**linear, "models": linear["models"][:1]}))
    assert run_command("mergekit-ray", "compat", "yaml", "linear.yml", "out", cwd=work).returncode == 0
    done = run_command("mergekit-ray", "compat", "yaml", "other.yml", "out", cwd=work)
    assert done.returncode == 2
    assert "--overwrite" in done.stderr
    done = run_command("mergekit-ray", "compat", "yaml", "other.yml", "out", "--overwrite", cwd=work)
    assert done.returncode == 0, done.stderr
    run_command("merge", "other.yml", "ours", cwd=work)
    assert weights(work / "out") == weights(work / "ours")


def test_a_dry_run_writes_no_model(work: Path) -> None:
    shuffle = ("compat", "layershuffle", "out", "-m", "base", "-m", "tuned", "--dry-run", "--print-yaml", "--fp16")
    done = run_command("mergekit-ray", *shuffle, cwd=work)
    assert done.returncode == 0, done.stderr
    ours = run_command("mergekit-ray", "recipe", "shuffle", "-m", "base", "-m", "tuned", "--dtype", "float16", cwd=work)
    assert done.stdout == ours.stdout
    assert not (work / "out").exists()


def test_stages_that_nothing_merges_are_written_too(work: Path) -> None:
    first, last = yaml.safe_load_all((work / "multi.yml").read_text())
    other = {**first, "name": "other", "models": first["models"][:1]}
    (work / "multi.yml").write_text(yaml.safe_dump_all([first, other, {**last, "name": "last"}]))
    done = run_command("mergekit-ray", "compat", "multi", "multi.yml", "-I", "between", "--quiet", cwd=work)
    assert (done.returncode, done.stderr) == (0, "")
    assert {path.name for path in (work / "between").iterdir()} == {"other", "last"}
    assert json.loads((work / "between/last/config.json").read_text())
