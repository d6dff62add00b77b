"""Files beside the weights that models of other libraries need: copied, covered by the manifest, replaced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import mergekit_ray
from mergekit_ray.operations.options import MergeOptions
from mergekit_ray.operations.verify import verify
from mergekit_ray.storage.opening import open_source
from support.models import ModelLibrary, contents

MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
]


def sentence_transformer(source: Path, folder: Path) -> Path:
    """A copy of a model as sentence-transformers stores one."""
    for name, data in contents(source).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    (folder / "modules.json").write_text(json.dumps(MODULES))
    (folder / "config_sentence_transformers.json").write_text("{}")
    for name in ("1_Pooling", "2_Dense"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({"of": name}))
    save_file({"linear.weight": torch.ones(4, 32)}, folder / "2_Dense" / "model.safetensors")
    return folder


def recipe(*models: Path) -> dict[str, Any]:
    return {"merge_method": "linear", "models": [{"model": str(m), "parameters": {"weight": 1.0}} for m in models]}


def test_modules_of_sentence_transformers_travel_with_the_model(models: ModelLibrary, tmp_path: Path) -> None:
    donor = sentence_transformer(models.get("llama", 1), tmp_path / "donor")
    out = tmp_path / "out"
    plan = mergekit_ray.merge(recipe(donor, models.get("llama", 2)), out).plan
    ours, theirs = contents(out), contents(donor)
    beside = {"1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "modules.json"}
    assert {name: ours[name] for name in beside} == {name: theirs[name] for name in beside}
    assert any("2_Dense/model.safetensors is that of" in warning for warning in plan.warnings)
    assert beside <= json.loads(ours["mergekit-ray.json"])["files"].keys()
    assert verify(open_source(str(out))).problems == []
    (out / "2_Dense" / "model.safetensors").write_bytes(b"x" * len(ours["2_Dense/model.safetensors"]))
    assert [problem.split(":")[0] for problem in verify(open_source(str(out))).problems] == [
        "2_Dense/model.safetensors"
    ]


def test_modules_are_replaced_with_the_model(models: ModelLibrary, tmp_path: Path) -> None:
    out = tmp_path / "out"
    mergekit_ray.merge(recipe(sentence_transformer(models.get("llama", 1), tmp_path / "first")), out)
    second = sentence_transformer(models.get("llama", 2), tmp_path / "second")
    (second / "1_Pooling" / "config.json").write_text('{"of": "another"}')
    mergekit_ray.merge(recipe(second), out, options=MergeOptions(overwrite=True))
    assert contents(out)["1_Pooling/config.json"] == b'{"of": "another"}'
    assert verify(open_source(str(out))).problems == []


def test_modules_that_are_set_otherwise_are_named(models: ModelLibrary, tmp_path: Path) -> None:
    both = [sentence_transformer(models.get("llama", variant), tmp_path / f"{variant}") for variant in (1, 2)]
    for folder, value in zip(both, (True, False), strict=True):
        settings = {"pooling_mode_cls_token": value, "word_embedding_dimension": 32}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))
        (folder / "2_Dense" / "config.json").write_text("[")
    plan = mergekit_ray.plan(recipe(*both))
    told = [warning for warning in plan.warnings if "1_Pooling" in warning]
    assert told == [
        f"1_Pooling/config.json: pooling_mode_cls_token is True in {both[0]}, False in {both[1]}; the result has the "
        f"file of {both[0]}"
    ]
    assert not any("1_Pooling" in warning for warning in mergekit_ray.plan(recipe(both[0], both[0])).warnings)


def test_other_modules_and_prompts_are_named(models: ModelLibrary, tmp_path: Path) -> None:
    both = [sentence_transformer(models.get("llama", variant), tmp_path / f"{variant}") for variant in (1, 2)]
    (both[1] / "modules.json").write_text(json.dumps(MODULES[:2]))
    settings = [{"prompts": {"query": "q: ", "document": ""}}, {"prompts": {}, "similarity_fn_name": "dot"}]
    for folder, content in zip(both, settings, strict=True):
        (folder / "config_sentence_transformers.json").write_text(json.dumps(content))
    told = [w for w in mergekit_ray.plan(recipe(*both)).warnings if w.startswith(("modules.json", "config_sentence"))]
    end = f"the result has the file of {both[0]}"
    three, two = "['Transformer', 'Pooling (1_Pooling)', 'Dense (2_Dense)']", "['Transformer', 'Pooling (1_Pooling)']"
    assert sorted(told) == [
        f"config_sentence_transformers.json: prompts is {{'query': 'q: '}} in {both[0]}, {{}} in {both[1]}; {end}",
        f"config_sentence_transformers.json: similarity_fn_name is 'cosine' in {both[0]}, 'dot' in {both[1]}; {end}",
        f"modules.json: the list of modules is {three} in {both[0]}, {two} in {both[1]}; {end}",
    ]


def test_versions_of_sentence_transformers_that_say_the_same_in_other_words_are_alike(
    models: ModelLibrary, tmp_path: Path
) -> None:
    both = [sentence_transformer(models.get("llama", variant), tmp_path / f"{variant}") for variant in (1, 2)]
    newer = [{**module, "type": module["type"].replace(".models.", ".base.modules.")} for module in MODULES]
    (both[1] / "modules.json").write_text(json.dumps(newer))
    defaults = {"__version__": {"x": 1}, "prompts": {"query": ""}, "similarity_fn_name": "cosine"}
    (both[1] / "config_sentence_transformers.json").write_text(json.dumps({**defaults, "default_prompt_name": None}))
    told = mergekit_ray.plan(recipe(*both)).warnings
    assert not any(warning.startswith(("modules.json", "config_sentence")) for warning in told)
