"""Recipes of several stages: one pass writes what merging stage by stage writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
import transformers
import yaml
from botocore.httpsession import URLLib3Session

import mergekit_ray
from mergekit_ray import MergeOptions
from mergekit_ray.config.stages import MAX_STAGES
from mergekit_ray.core.errors import ConfigError, PlanError
from mergekit_ray.operations.reproduce import reproduce
from mergekit_ray.operations.verify import verify
from mergekit_ray.storage.opening import open_source
from support.models import contents, load, logits, tensors_of
from support.servers.ray_cluster import RayCluster
from support.servers.s3_bucket import Bucket
from support.servers.s3_server import S3Server
from support.tokenizers.models import byte_level, ids_of, save_model

LOCAL = MergeOptions(executor="local", device="cpu")
TAKES_BASE = {"slerp", "ties", "dare_ties", "task_arithmetic", "della", "sce", "model_stock", "breadcrumbs", "nearswap"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three models in bfloat16, and one that added tokens."""
    root = tmp_path_factory.mktemp("models")
    tokenizers = {"a": byte_level(), "b": byte_level(), "c": byte_level(), "chat": byte_level(["<|x|>", "<|y|>"])}
    wide = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 4}
    return {
        name: save_model(root / name, tokenizer, seed, dtype=torch.bfloat16, **wide)
        for seed, (name, tokenizer) in enumerate(tokenizers.items())
    }


def of(folders: dict[str, Path], method: str, *models: str, **rest: Any) -> dict[str, Any]:
    """A recipe with weights; a method with a base takes the first model for it."""
    places = [str(folders.get(name, name)) for name in models]
    weights = [0.7, 0.4, 0.2]
    first = 1 if method in TAKES_BASE else 0
    entry = [{"model": place} for place in places[first:]]
    if method not in ("slerp", "model_stock", "passthrough", "nearswap", "sce", "karcher"):
        entry = [{**each, "parameters": {"weight": w}} for each, w in zip(entry, weights, strict=False)]
    found: dict[str, Any] = {"merge_method": method, "models": entry, "dtype": "bfloat16"}
    if first:
        found["base_model"] = places[0]
    if method in ("slerp", "nearswap"):
        found["parameters"] = {"t": 0.3}
    return {**found, **rest}


def one_pass(stages: list[dict[str, Any]], out: Path, options: MergeOptions = LOCAL) -> Path:
    mergekit_ray.merge({"stages": stages}, out, options=options)
    return out


def stage_by_stage(stages: list[dict[str, Any]], root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each stage is written to a folder of its name, which the next ones read."""
    root.mkdir()
    with monkeypatch.context() as patch:
        patch.chdir(root)
        for stage in stages:
            plain = {key: value for key, value in stage.items() if key not in ("keep_precision", "output")}
            mergekit_ray.merge(plain, root / stage.get("name", "last"), options=LOCAL)
    return root / stages[-1].get("name", "last")


def assert_same_model(found: Path, expected: Path) -> None:
    """All files but those that say how the model was made."""
    ours, theirs = contents(found), contents(expected)
    told = ("README.md", "mergekit-ray.json")
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name] and name not in told] == []


METHODS = ["linear", "slerp", "ties", "dare_ties", "task_arithmetic", "sce", "model_stock", "breadcrumbs", "karcher"]


@pytest.mark.parametrize("second", METHODS)
@pytest.mark.parametrize("first", ["linear", "ties", "dare_ties", "slerp", "model_stock"])
def test_bytes_are_those_of_stage_by_stage(
    first: str, second: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage is the base of the second where that has one, and a model otherwise."""
    names = ("a", "b", "c") if first != "slerp" else ("a", "b")
    then = ("x", "c") if second in ("slerp", "nearswap") else ("x", "b", "c")
    stages = [of(folders, first, *names, name="x"), of(folders, second, *then)]
    expected = stage_by_stage(stages, tmp_path / "apart", monkeypatch)
    assert_same_model(one_pass(stages, tmp_path / "out"), expected)


def test_three_stages_of_which_one_is_used_twice(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = [
        of(folders, "linear", "a", "b", name="x"),
        of(folders, "task_arithmetic", "x", "c", name="y"),
        of(folders, "ties", "x", "y", "b"),
    ]
    expected = stage_by_stage(stages, tmp_path / "apart", monkeypatch)
    assert_same_model(one_pass(stages[::-1], tmp_path / "out"), expected)
    model = load(tmp_path / "out")
    assert torch.isfinite(logits(model)).all()


def test_a_frankenmerge_of_merges(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slices = [
        {"sources": [{"model": "x", "layer_range": [0, 3]}]},
        {"sources": [{"model": "y", "layer_range": [1, 4]}]},
    ]
    stages = [
        of(folders, "linear", "a", "b", name="x"),
        of(folders, "slerp", "c", "b", name="y"),
        {"merge_method": "passthrough", "slices": slices, "name": "z"},
        of(folders, "linear", "z", "z"),
    ]
    expected = stage_by_stage(stages, tmp_path / "apart", monkeypatch)
    assert_same_model(one_pass(stages, tmp_path / "out"), expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 6


def test_stages_with_tokenizers_of_their_own(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = [
        of(folders, "linear", "a", "chat", name="x", tokenizer_source="union", chat_template="chatml"),
        of(folders, "linear", "x", "b", tokenizer_source="union"),
    ]
    expected = stage_by_stage(stages, tmp_path / "apart", monkeypatch)
    out = one_pass(stages, tmp_path / "out")
    assert_same_model(out, expected)
    assert {"<|x|>", "<|y|>"} <= ids_of(out).keys()
    assert transformers.AutoTokenizer.from_pretrained(out).chat_template


def test_a_stage_that_is_only_merged_with_models_of_other_tokens_is_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    swapped = save_model(
        tmp_path / "swapped",
        byte_level(merges=[("h", "e"), ("o", "o"), ("e", "e")]),
        9,
        dtype=torch.bfloat16,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_hidden_layers=4,
    )
    stages = [of(folders, "linear", "a", "b", name="x"), of({**folders, "s": swapped}, "linear", "x", "s")]
    with pytest.raises(PlanError, match="mean other tokens than in x"):
        one_pass(stages, tmp_path / "out")


def test_a_mixture_of_stages(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = [{"source_model": name, "positive_prompts": ["x"]} for name in ("x", str(folders["c"]))]
    stages = [
        of(folders, "linear", "a", "b", name="x"),
        {"base_model": "x", "gate_mode": "random", "experts": experts, "dtype": "bfloat16"},
    ]
    expected = stage_by_stage(stages, tmp_path / "apart", monkeypatch)
    assert_same_model(one_pass(stages, tmp_path / "out"), expected)


def test_a_mixture_as_a_stage(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mixture(name: str, *sources: str) -> dict[str, Any]:
        experts = [{"source_model": str(folders[each]), "positive_prompts": ["x"]} for each in sources]
        return {"base_model": str(folders["a"]), "gate_mode": "random", "experts": experts, "name": name}

    stages = [mixture("x", "a", "b"), mixture("y", "b", "c"), of(folders, "slerp", "x", "y")]
    expected = stage_by_stage(stages, tmp_path / "apart", monkeypatch)
    assert_same_model(one_pass(stages, tmp_path / "out"), expected)


def test_routers_from_prompts(folders: dict[str, Path], tmp_path: Path) -> None:
    """Over a stored base; a base that is a stage has no stored layers to run prompts through."""
    experts = [
        {"source_model": "x", "positive_prompts": ["he"]},
        {"source_model": str(folders["c"]), "positive_prompts": ["ll"]},
    ]
    stages = [
        of(folders, "linear", "a", "b", name="x"),
        {"base_model": str(folders["a"]), "gate_mode": "cheap_embed", "experts": experts, "dtype": "bfloat16"},
    ]
    out = one_pass(stages, tmp_path / "out")
    gates = [tensor for name, tensor in tensors_of(out).items() if name.endswith("gate.weight")]
    assert gates
    assert all(gate.any() for gate in gates)
    stages[1]["base_model"] = "x"
    with pytest.raises(PlanError, match="router made from prompts needs a base model that is stored"):
        one_pass(stages, tmp_path / "again")


@pytest.mark.parametrize("is_last", [True, False])
def test_experts_are_added_to_stored_mixtures_in_the_last_stage(
    is_last: bool, folders: dict[str, Path], tmp_path: Path
) -> None:
    """New rows of routers are as long as those that are read."""
    experts = [{"source_model": str(folders[name]), "positive_prompts": ["he"]} for name in "ab"]
    mixture = {"base_model": str(folders["a"]), "gate_mode": "random", "experts": experts}
    mergekit_ray.merge(mixture, tmp_path / "mixture", options=LOCAL)
    base = "x" if is_last else str(tmp_path / "mixture")
    added = {"base_model": base, "gate_mode": "random", "add_to_base": True, "experts": experts[:1]}
    stages = [{**mixture, "name": "x"}, added]
    if not is_last:
        stages = [{**added, "name": "x"}, {"merge_method": "passthrough", "models": [{"model": "x"}]}]
    with pytest.raises(PlanError, match="`add_to_base` needs a base model that is stored"):
        one_pass(stages, tmp_path / "out")


@pytest.mark.parametrize("overwrite", [True, False])
def test_outputs_that_are_in_each_others_way_are_refused_before_any_is_written(
    overwrite: bool, folders: dict[str, Path], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    mergekit_ray.merge({"merge_method": "passthrough", "models": [{"model": str(folders["c"])}]}, copy, options=LOCAL)
    before = contents(copy)
    options = MergeOptions(executor="local", device="cpu", overwrite=overwrite)
    read = [
        of(folders, "linear", "a", "b", name="x", output=str(copy)),
        of({**folders, "copy": copy}, "linear", "x", "copy"),
    ]
    with pytest.raises(PlanError, match="the output is one of the inputs"):
        one_pass(read, tmp_path / "out", options)
    assert contents(copy) == before
    twice = [
        of(folders, "linear", "a", "b", name="x", output=str(tmp_path / "same")),
        of(folders, "linear", "x", "c", name="y", output=str(tmp_path / "same")),
        of(folders, "linear", "y", "a"),
    ]
    with pytest.raises(PlanError, match="two stages have the same output"):
        one_pass(twice, tmp_path / "out", options)
    assert not (tmp_path / "same").exists()


def test_precision_that_is_kept(folders: dict[str, Path], tmp_path: Path) -> None:
    rounded = [of(folders, "linear", "a", "b", name="x"), of(folders, "linear", "x", "c", dtype="float32")]
    kept = [{**rounded[0], "keep_precision": True}, rounded[1]]
    found = {name: tensors_of(one_pass(stages, tmp_path / name)) for name, stages in (("r", rounded), ("k", kept))}
    parts = [tensors_of(folders[name]) for name in "abc"]
    name = "model.layers.0.mlp.up_proj.weight"
    a, b, c = (part[name].double() for part in parts)
    exact = ((0.7 * a + 0.4 * b) / 1.1 * 0.7 + 0.4 * c) / 1.1
    errors = {key: float((tensors[name].double() - exact).abs().max()) for key, tensors in found.items()}
    assert errors["k"] < 1e-7 < errors["r"]


def test_documents_of_a_file(folders: dict[str, Path], tmp_path: Path) -> None:
    stages = [of(folders, "linear", "a", "b", name="x"), of(folders, "ties", "x", "c", "b")]
    file = tmp_path / "stages.yml"
    file.write_text("---\n" + "---\n".join(map(yaml.safe_dump, stages)) + "---\n")
    mergekit_ray.merge(file, tmp_path / "out", options=LOCAL)
    assert_same_model(tmp_path / "out", one_pass(stages, tmp_path / "again"))


def test_a_stage_is_written_too(folders: dict[str, Path], tmp_path: Path) -> None:
    stages = [
        of(folders, "linear", "a", "b", name="x", output=str(tmp_path / "x")),
        of(folders, "ties", "x", "c", "b", output=str(tmp_path / "out")),
    ]
    mergekit_ray.merge({"stages": stages}, options=LOCAL)
    alone = {key: value for key, value in stages[0].items() if key != "output"}
    mergekit_ray.merge(alone, tmp_path / "alone", options=LOCAL)
    assert_same_model(tmp_path / "x", tmp_path / "alone")
    assert_same_model(tmp_path / "out", one_pass(stages, tmp_path / "again"))


def test_verified_and_reproduced(folders: dict[str, Path], tmp_path: Path) -> None:
    stages = [
        of(folders, "dare_ties", "a", "b", "c", name="x", seed=3),
        of(folders, "linear", "x", "chat", tokenizer_source="union", seed=4),
    ]
    out = one_pass(stages, tmp_path / "out")
    assert verify(open_source(str(out))).problems == []
    found = reproduce(out, tmp_path / "again", LOCAL)
    assert (found.problems, found.notes) == ((), ())


def test_no_stage_is_read_or_written(folders: dict[str, Path], tmp_path: Path) -> None:
    """Each input once, and the last stage's files only."""
    stages = [of(folders, "linear", "a", "b", name="x"), of(folders, "linear", "x", "c")]
    plan = mergekit_ray.plan({"stages": stages})
    size = sum(f.stat().st_size for f in folders["a"].glob("*.safetensors"))
    assert {model.reference for model in plan.inputs.values()} == {str(folders[name]) for name in "abc"}
    assert plan.read_bytes <= 3 * size
    one_pass(stages, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.s3
def test_only_the_last_stages_model_is_sent_to_s3(
    folders: dict[str, Path],
    s3_environment: S3Server,
    s3_prefix: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every request that writes is for a file of the result, or for the notes beside it."""
    bucket = Bucket(s3_environment, s3_prefix)
    places: dict[str, Any] = {name: bucket.upload(folders[name], name) for name in "abc"}
    sent: set[str] = set()
    send = URLLib3Session.send

    def record(self: URLLib3Session, request: Any) -> Any:
        if request.method in ("PUT", "POST"):
            sent.add(urlsplit(request.url).path)
        return send(self, request)

    monkeypatch.setattr(URLLib3Session, "send", record)
    stages = [of(places, "linear", "a", "b", name="x"), of(places, "ties", "x", "c", "b")]
    mergekit_ray.merge({"stages": stages}, f"{bucket.uri}/out", options=LOCAL)
    found = contents(bucket.download("out", tmp_path / "out"))
    written = {path.partition("/out/")[2] for path in sent} - {""}  # what is deleted is named in a request's body
    assert {name for name in written if not name.startswith(".mergekit-ray/")} == found.keys()
    local = [of(folders, "linear", "a", "b", name="x"), of(folders, "ties", "x", "c", "b")]
    assert_same_model(tmp_path / "out", one_pass(local, tmp_path / "local"))


@pytest.mark.ray
def test_by_ray(folders: dict[str, Path], tmp_path: Path) -> None:
    stages = [of(folders, "ties", "a", "b", "c", name="x"), of(folders, "slerp", "x", "c")]
    stages[-1]["output"] = {"path": str(tmp_path / "ray"), "max_shard_size": 20_000}
    with RayCluster(num_nodes=2):
        mergekit_ray.merge({"stages": stages}, options=MergeOptions(executor="ray", num_workers=2))
    mergekit_ray.merge({"stages": stages}, tmp_path / "local", options=LOCAL)
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")


def test_a_stage_is_not_called_as_a_folder(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="has the name of a folder"):
        one_pass([of(folders, "linear", "a", "b", name="x"), of(folders, "linear", "x", "c")], tmp_path / "out")


def chain(folders: dict[str, Path], length: int, *, twice: bool) -> list[dict[str, Any]]:
    """Each stage merges the one before with a model, or with itself."""

    def after(i: int) -> dict[str, Any]:
        return of(folders, "linear", f"s{i - 1}", f"s{i - 1}" if twice else "c", name=f"s{i}")

    return [of(folders, "linear", "a", "b", name="s0"), *map(after, range(1, length))]


def test_as_many_stages_as_are_allowed(folders: dict[str, Path], tmp_path: Path) -> None:
    out = one_pass(chain(folders, MAX_STAGES, twice=False), tmp_path / "out")
    near = tensors_of(folders["c"])["model.norm.weight"]
    torch.testing.assert_close(tensors_of(out)["model.norm.weight"], near, rtol=0.02, atol=0.02)
    with pytest.raises(ConfigError, match=f"{MAX_STAGES + 1} stages; at most {MAX_STAGES}"):
        mergekit_ray.load_recipe({"stages": chain(folders, MAX_STAGES + 1, twice=False)})


def test_stages_that_grow_beyond_measure_are_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(PlanError, match="steps from the models, since stages merge others several times"):
        mergekit_ray.plan({"stages": chain(folders, 40, twice=True)})


def test_recipes_in_python(folders: dict[str, Path], tmp_path: Path) -> None:
    stages = [of(folders, "linear", "a", "b", name="x"), of(folders, "linear", "x", "c")]
    recipe = mergekit_ray.StagedRecipe(stages=stages)
    assert mergekit_ray.load_recipe(recipe.to_data()) == recipe
    assert "2 stages" in repr(recipe)
    mergekit_ray.merge(recipe, tmp_path / "out", options=LOCAL)
    assert_same_model(tmp_path / "out", one_pass(stages, tmp_path / "again"))
