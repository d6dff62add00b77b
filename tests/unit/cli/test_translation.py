"""Command lines of mergekit, and what each is here."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

import mergekit_ray
from mergekit_ray.cli import app
from mergekit_ray.cli.mergekit_options import ARGUMENTS, OPTIONS, Option
from mergekit_ray.cli.translation import Translation, translate
from mergekit_ray.core.errors import ConfigError

LINEAR = "merge_method: linear\nmodels:\n- {model: a, parameters: {weight: 1}}  # mine\n"
CASES: dict[str, str] = {
    "yaml c.yml out": "merge c.yml out",
    "mergekit-yaml c.yml out": "merge c.yml out",
    "yaml c.yml out --overwrite": "merge c.yml out --overwrite",
    "yaml c.yml out --cuda": "merge c.yml out --device cuda",
    "yaml c.yml out --no-cuda": "merge c.yml out --device cpu",
    "yaml c.yml out --gpu-rich": "merge c.yml out --device cuda",
    "yaml c.yml out --cuda --device cuda:1": "merge c.yml out --device cuda:1",
    "yaml c.yml out --allow-crimes": "merge c.yml out --allow-config-conflicts",
    "yaml c.yml out --no-allow-crimes": "merge c.yml out",
    "yaml c.yml out --random-seed 7 --quiet": "merge c.yml out --seed 7 --quiet",
    "yaml c.yml out --out-shard-size 5B": "merge c.yml out --max-shard-size 10GB",
    "yaml c.yml out --out-shard-size 500m": "merge c.yml out --max-shard-size 1GB",
    "yaml c.yml out --out-shard-size 7": "merge c.yml out --max-shard-size 14",
    "yaml c.yml out --transformers-cache /hub": "HF_HUB_CACHE=/hub merge c.yml out",
    "moe 'my config.yml' out --load-in-4bit": "merge 'my config.yml' out",
    "tokensurgeon m d o": "mergekit-ray transplant m d o",
    "tokensurgeon m d o -k 8": "mergekit-ray transplant m d o --k 8",
    "tokensurgeon m d o -a common_interpolation -c -k 8 -w barycentric": (
        "mergekit-ray transplant m d o --method common_interpolation --k 8 --metric cosine --weights barycentric"
    ),
    "tokensurgeon m d o -a common_interpolation -nc": (
        "mergekit-ray transplant m d o --method common_interpolation --metric euclidean"
    ),
    "tokensurgeon m d o -a subword -s sum": "mergekit-ray transplant m d o --method subword --subword sum",
    "tokensurgeon m d o -a zero -s sum -c -k 8": "mergekit-ray transplant m d o --method zero",
    "tokensurgeon m d o -pm yes -bm lm_head --magikarp -nvn 0.5 -nvs 0": (
        "mergekit-ray transplant m d o --prefix-match yes --byte-match lm_head --magikarp --new-vocab-noise 0.5 "
        "--new-vocab-scale 0.0"
    ),
    "tokensurgeon m d o --random-seed 3 --device cuda": "mergekit-ray transplant m d o --seed 3 --device cuda",
}


def translated(*words: str) -> Translation:
    """Parse a command line as `compat` does, and translate it."""
    group: Any = typer.main.get_command(app)
    name = words[0].removeprefix("mergekit-")
    command = group.commands["compat"].get_command(None, words[0])
    given = command.make_context(name, list(words[1:])).params
    return translate(name, {key: value or None if key == "v" else value for key, value in given.items()})


def first_line(found: Translation) -> str:
    return found.told().splitlines()[0].removeprefix("mergekit-ray: this is: ")


@pytest.mark.parametrize("line", CASES)
def test_what_a_command_line_is_here(line: str) -> None:
    assert first_line(translated(*shlex.split(line))) == CASES[line]


def places(command: str, tmp_path: Path) -> list[str]:
    """Arguments of a command that can be translated without models."""
    config = tmp_path / "config.yml"
    layers = {"layer_slices": [{"model": "a", "start": 0, "end": 2}]}
    config.write_text(yaml.safe_dump(layers) if command == "bakllama" else f"name: x\n{LINEAR}")
    named = {"CONFIG": str(config), "OUT": str(tmp_path / "out"), "MODEL": "m", "DONOR": "d"}
    more = {"multi": ["-I", "between"]}
    more["extract-lora"] = ["--model", "m", "--base-model", "b", "--out-path", "o"]
    return [*(named[name] for name in ARGUMENTS[command]), *more.get(command, [])]


VALUES = {"INTEGER": "3", "FLOAT": "0.5", "SIZE": "1B", "PATH": "place", "TEXT": "word"}
EVERY = [(command, option) for command, options in OPTIONS.items() for option in options]


@pytest.mark.parametrize(("command", "option"), EVERY, ids=[f"{c} {o.names[-1]}" for c, o in EVERY])
def test_no_option_is_dropped_without_a_word(
    command: str, option: Option, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each spelling is taken, and changes our command, is explained, or ends in an error that names it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "mergekit_ray.cli.translated_modules.modules",
        lambda *_, saved, excluded, included, embeddings: ([*saved], [*excluded, *included]),
    )
    monkeypatch.setattr("mergekit_ray.operations.shuffle.shuffle", lambda *_, **__: mergekit_ray.load_recipe(LINEAR))

    def effect(*more: str) -> object:
        """What is told, printed and run; the error, if there is one."""
        try:
            found = translated(command, *arguments, *more)
        except ConfigError as error:
            return error
        return found.told(), found.prints, found.words

    arguments = places(command, tmp_path)
    plain = effect()
    values = {"approximation_method": "mean", "prefix_match": "yes", "byte_match": "yes"}
    value = [values.get(option.key, VALUES[option.takes])] if option.takes else []
    outcomes = {name: effect(name, *value) for name in option.names}
    for name, outcome in outcomes.items():
        assert outcome != plain, name
    for name in option.off:
        outcomes[name] = effect(name)
        says = bool(option.off_here) or option.key == "cosine_similarity"
        assert (outcomes[name] != plain) == says, name  # else it asks for what mergekit does anyway, and so do we
        assert isinstance(outcomes[name], ConfigError) == option.off_refused
    for outcome in outcomes.values():
        if isinstance(outcome, ConfigError):
            assert any(max(names, key=len) in str(outcome) for names in (option.names, option.off) if names)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("yaml c.yml out --no-safe-serialization", "--no-safe-serialization is not supported: results are safetensors"),
        ("yaml c.yml out --out-shard-size 10GB", "expected a number of parameters such as 5B, found '10GB'"),
        ("yaml c.yml out --out-shard-size 0", "expected a number of parameters such as 5B, found '0'"),
        ("tokensurgeon m d o -a stb", "--approximation-method stb is not supported"),
        ("extract-lora --model a --base-model b --out-path c --sv-epsilon 0.1", "--sv-epsilon"),
        ("pytorch none.yml out -u", "none.yml: the recipe cannot be read"),
        ("bakllama none.yml out", "none.yml: the recipe cannot be read"),
    ],
)
def test_what_cannot_be_done_is_refused(line: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        translated(*line.split())
    assert said in str(caught.value)
    assert caught.value.remedy


def test_options_without_effect_are_explained_once() -> None:
    line = "yaml c.yml out --lazy-unpickle --low-cpu-memory --no-async-write -vv -j 4 --write-threads 2"
    assert translated(*line.split()).told().splitlines() == [
        "mergekit-ray: this is: merge c.yml out",
        "  -v: not needed: progress and warnings are shown; `--debug` shows an error's traceback",
        "  --low-cpu-memory, --lazy-unpickle: not needed: memory is bounded by `--memory`",
        "  --num-threads, --write-threads: not needed: reading, arithmetic and writing overlap; `--workers` says how "
        "many shards are processed at once",
    ]


@pytest.mark.parametrize(("options", "wanted"), [("-u", "union"), ("-i", "intersection"), ("-i -u", "intersection")])
@pytest.mark.parametrize("text", [LINEAR, LINEAR.rstrip(), '{"merge_method": "linear", "models": [{"model": "a"}]}'])
def test_raw_files_by_the_set_of_their_tensors(options: str, wanted: str, text: str, tmp_path: Path) -> None:
    """The author's lines keep their numbers."""
    config = tmp_path / "c.yml"
    config.write_text(text)
    found = translated("pytorch", str(config), "out", *options.split(), "--quiet")
    command, recipe, *rest = found.words
    assert (command, rest) == ("merge", ["out", "--quiet"])
    assert yaml.safe_load(recipe) == {**yaml.safe_load(text), "tensors": wanted}
    if text.startswith("merge"):
        assert recipe.startswith(text)
        assert first_line(found) == f"{{ cat {config}; echo; echo 'tensors: {wanted}'; }} | merge - out --quiet"


def stage(*models: str, **more: Any) -> dict[str, Any]:
    return {"merge_method": "linear", "models": [{"model": m, "parameters": {"weight": 1}} for m in models], **more}


def multi(tmp_path: Path, stages: list[dict[str, Any]], *more: str) -> Translation:
    config = tmp_path / "multi.yml"
    config.write_text(yaml.safe_dump_all(stages))
    return translated("multi", str(config), "-I", "between", *more)


def test_stages_go_where_nothing_merges_them(tmp_path: Path) -> None:
    x, y, last = stage("a", name="x"), stage("b", name="y"), stage("x", "y")
    config = str(tmp_path / "multi.yml")
    assert multi(tmp_path, [x, y, last], "--out-path", "out").words == ["merge", config, "out"]
    assert multi(tmp_path, [x, {**last, "name": "z"}, y]).words == ["merge", config, "between/z"]
    with pytest.raises(ConfigError, match="--out-path OUT"):
        multi(tmp_path, [x, y, last]).told()
    # A stage that no other merges gets an output beside the last one.
    command, text, out = multi(tmp_path, [last, x, y, stage("a", name="z")], "--out-path", "out").words
    recipe = mergekit_ray.load_recipe(text)
    assert isinstance(recipe, mergekit_ray.StagedRecipe)
    assert (command, out) == ("merge", "out")
    assert [(each.name, each.output.path) for each in recipe.written] == [("z", "between/z")]
    assert recipe.last.name is None


def test_a_stage_may_be_called_as_a_method_is(tmp_path: Path) -> None:
    stages = [stage("a", name="linear"), stage("b", name="other", base_model={"model": {"path": "linear"}})]
    assert multi(tmp_path, stages).words == ["merge", str(tmp_path / "multi.yml"), "between/other"]
    _, text, out = multi(tmp_path, [stage("a", name="linear"), stage("b", name="other")]).words
    assert [each.get("output") for each in yaml.safe_load(text)["stages"]] == [{"path": "between/linear"}, None]
    assert out == "between/other"


def test_stages_without_sense_are_left_to_merge(tmp_path: Path) -> None:
    """Which says what is wrong, with the lines of the author's file."""
    config = str(tmp_path / "multi.yml")
    for stages in ([stage("y", name="x"), stage("x", name="y")], [stage("a"), stage("b")]):
        words = multi(tmp_path, stages, "--out-path", "out").words
        assert words[:2] == ["merge", config]
        with pytest.raises(ConfigError):
            mergekit_ray.load_recipe(Path(config))


def test_a_stage_with_a_name_and_an_output_path_says_where_it_goes(tmp_path: Path) -> None:
    found = multi(tmp_path, [stage("a", name="x")], "--out-path", "out")
    assert found.words[2] == "between/x"
    assert "--out-path: not used: all stages have names, so the last one goes to between/x" in found.told()


def test_layers_of_bakllama(tmp_path: Path) -> None:
    config = tmp_path / "c.yml"
    slices = [{"model": "a", "start": 0, "end": 8}, {"model": "b", "start": 4, "end": 12, "scale": 0.5}]
    config.write_text(yaml.safe_dump({"layer_slices": slices, "embedding_source": "a", "lm_head_source": "b"}))
    found = translated("bakllama", str(config), "out", "--fp16")
    scale = [{"filter": "down_proj", "value": 0.5}, {"value": 1.0}]
    assert found.words[0] == "merge"
    assert yaml.safe_load(found.words[1]) == {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": "a", "layer_range": [0, 8]}]},
            {"sources": [{"model": "b", "layer_range": [4, 12], "parameters": {"scale": scale}}]},
        ],
        "dtype": "float16",
    }
    mergekit_ray.load_recipe(found.words[1])
    assert found.told().startswith("mergekit-ray: this is: merge - out <<'YAML'\nmerge_method: passthrough\n")
    config.write_text(yaml.safe_dump({"layer_slices": slices, "embedding_source": "b"}))
    with pytest.raises(ConfigError, match="embedding_source is another model"):
        translated("bakllama", str(config), "out")
    for wrong in ({}, {"layer_slices": []}, {"layer_slices": [{"model": "a"}]}, []):
        config.write_text(yaml.safe_dump(wrong))
        with pytest.raises(ConfigError, match="layer_slices"):
            translated("bakllama", str(config), "out")
