"""`verify` with its options; what it does without is in test_publish.py."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mergekit_ray.checkpoint.header import read_header
from mergekit_ray.core.errors import CheckpointError
from mergekit_ray.core.plan import Plan
from mergekit_ray.operations.options import MergeOptions
from mergekit_ray.operations.run_plan import run_plan
from mergekit_ray.operations.verify import Verification, VerifyOptions, verify
from mergekit_ray.output.destination import INDEX_FILE, MANIFEST_FILE
from mergekit_ray.storage.local.store import LocalSource
from support.manifests import edit_manifest, list_files_anew, make_old


@pytest.fixture
def out(plan: Plan, tmp_path: Path) -> Path:
    """A published model, to be damaged."""
    run_plan(plan, str(tmp_path / "out"), MergeOptions(executor="local"))
    return tmp_path / "out"


def look(folder: Path, **options: Any) -> Verification:
    return verify(LocalSource(folder), options=VerifyOptions(**options))


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def start_of(out: Path, plan: Plan, name: str) -> tuple[Path, int]:
    """Where a tensor's data lies."""
    file = next(shard.file for shard in plan.shards for tensor in shard.tensors if tensor.spec.name == name)
    return out / file, read_header(LocalSource(out), file).tensors[name][1].start


def flip(out: Path, plan: Plan, name: str) -> None:
    path, start = start_of(out, plan, name)
    data = bytearray(path.read_bytes())
    data[start] ^= 1
    path.write_bytes(data)


def names_of(plan: Plan) -> list[str]:
    return sorted(tensor.spec.name for shard in plan.shards for tensor in shard.tensors)


class TestSample:
    def test_so_many_tensors_are_read(self, out: Path, plan: Plan) -> None:
        read: list[int] = []
        found = verify(LocalSource(out), VerifyOptions(sample=3), on_bytes=read.append)
        assert (found.problems, found.num_tensors, found.num_shards) == ([], 3, len(plan.shards))
        headers = sum(len(shard.header) for shard in plan.shards)
        assert found.num_bytes == headers + sum(read) < plan.num_bytes

    def test_zero_reads_no_weights(self, out: Path, plan: Plan) -> None:
        for name in names_of(plan):
            flip(out, plan, name)
        found = look(out, sample=0)
        assert (found.problems, found.num_tensors) == ([], 0)

    def test_more_than_there_are_is_all_with_the_files_digests(self, out: Path, plan: Plan) -> None:
        path = out / plan.shards[0].file
        path.write_bytes(path.read_bytes().replace(b'"format":"pt"', b'"format":"np"'))
        found = look(out, sample=1000)
        assert found.num_tensors == len(names_of(plan))
        assert found.problems == [f"{path.name}: the file is not what was written (SHA-256 differs)"]

    @pytest.mark.parametrize("seed", range(4))
    def test_a_flipped_bit_is_found_by_whoever_draws_its_tensor(self, out: Path, plan: Plan, seed: int) -> None:
        names = names_of(plan)
        drawn = random.Random(seed).sample(names, 4)
        for name in names:
            flip(out, plan, name)
        problems = look(out, sample=4, seed=seed).problems
        assert {name for name in names if any(repr(name) in problem for problem in problems)} == set(drawn)

    @pytest.mark.parametrize(
        ("harm", "problem"),
        [("missing", "missing"), ("truncated", "bytes instead of"), ("swapped", "its header names other tensors")],
    )
    def test_what_harms_a_whole_shard_is_found_without_reading_it(
        self, out: Path, plan: Plan, harm: str, problem: str
    ) -> None:
        first, second = (out / shard.file for shard in plan.shards[:2])
        if harm == "missing":
            first.unlink()
        elif harm == "truncated":
            first.write_bytes(first.read_bytes()[:-1])
        else:
            data = first.read_bytes(), second.read_bytes()
            # As long as the one whose place it takes, as the shards of alike layers are.
            edit_manifest(out, lambda found: [s.update(num_bytes=len(data[1 - i])) for i, s in _two(found)])
            first.write_bytes(data[1])
            second.write_bytes(data[0])
        problems = look(out, sample=0).problems
        assert problems
        assert all(problem in each for each in problems)

    def test_a_shard_of_another_run_with_the_same_header_is_found(self, out: Path, plan: Plan, tmp_path: Path) -> None:
        path = out / plan.shards[0].file
        size = len(plan.shards[0].header)
        data = path.read_bytes()
        path.write_bytes(data[:size] + bytes(byte ^ 0x10 for byte in data[size:]))
        problems = look(out).problems
        assert len(problems) == len(plan.shards[0].tensors) + 1
        assert look(out, sample=len(names_of(plan)) - 1, seed=1).problems

    def test_an_index_of_another_run_is_found(self, out: Path, plan: Plan) -> None:
        edit(out / INDEX_FILE, lambda found: found.update(weight_map={"a": "b.safetensors"}))
        [problem] = look(out, sample=0).problems
        assert problem.startswith(f"{INDEX_FILE}: does not belong to this run, first at tensor 'a'")


def _two(manifest: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    return list(enumerate(manifest["shards"][:2]))


class TestFinite:
    @pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0], ids=["inf", "-inf", "nan"])
    def test_values_that_are_not_are_told_with_their_tensor(self, out: Path, plan: Plan, bits: int) -> None:
        name = names_of(plan)[2]
        path, start = start_of(out, plan, name)
        data = bytearray(path.read_bytes())
        data[start : start + 2] = struct.pack("<H", bits)
        path.write_bytes(data)
        told = f"{path.name}: tensor {name!r} holds NaN or infinite values"
        assert told in look(out, finite=True).problems
        assert told not in look(out).problems

    def test_all_are(self, out: Path) -> None:
        assert look(out, finite=True).problems == []

    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    def test_of_other_types(self, models: list[Path], tmp_path: Path, dtype: str) -> None:
        import mergekit_ray

        recipe = {"merge_method": "passthrough", "models": [{"model": str(models[0])}], "dtype": dtype}
        mergekit_ray.merge(recipe, tmp_path / "out")
        assert look(tmp_path / "out", finite=True).problems == []
        [path] = (tmp_path / "out").glob("*.safetensors")
        path.write_bytes(path.read_bytes()[:-4] + b"\xff\xff\xff\xff")
        assert any("holds NaN" in problem for problem in look(tmp_path / "out", finite=True).problems)


class TestShapes:
    @pytest.mark.parametrize(
        ("changes", "problem"),
        [
            ({"vocab_size": 21}, "says vocab_size 21, and 'model.embed_tokens.weight' has 20 rows"),
            ({"hidden_size": 9}, "says hidden_size 9, and 'model.embed_tokens.weight' has 8 columns"),
            ({"num_hidden_layers": 3}, "3 layers"),
        ],
    )
    def test_a_config_that_does_not_fit_is_told(self, out: Path, changes: dict[str, int], problem: str) -> None:
        edit(out / "config.json", lambda config: config.update(changes))
        [found] = look(out, sample=0).problems
        assert found.startswith("config.json: ")
        assert problem in found

    def test_one_that_fits(self, out: Path) -> None:
        edit(out / "config.json", lambda config: config.update(hidden_size=8))
        list_files_anew(out)
        assert look(out).problems == []

    def test_sizes_inside_of_a_multimodal_config(self, out: Path) -> None:
        inner = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps({"text_config": {**inner, "vocab_size": 7}}))
        [found] = look(out).problems
        assert "says vocab_size 7" in found

    def test_no_config(self, out: Path) -> None:
        (out / "config.json").unlink()
        [found] = look(out).problems
        assert found.startswith("config.json: missing")


@pytest.mark.parametrize(
    "manifest", ["{}", '{"shards": 3}', '{"shards": [3]}', '{"shards": [{}]}', "[]", "{", "9" * 5000]
)
def test_a_manifest_that_is_none(out: Path, manifest: str) -> None:
    (out / MANIFEST_FILE).write_text(manifest)
    with pytest.raises(CheckpointError, match=r"not the manifest|not a JSON object|not valid JSON"):
        look(out)


DIGEST = "not what was written (SHA-256 differs)"


class TestFiles:
    """All that is published beside the weights."""

    @pytest.mark.parametrize("sample", [None, 0])
    def test_all_are_compared(self, out: Path, sample: int | None) -> None:
        found = look(out, sample=sample)
        beside = {path.name for path in out.iterdir()} - {path.name for path in out.glob("*.safetensors")}
        assert found.num_files == len(beside - {MANIFEST_FILE}) == 4
        assert (found.problems, found.notes) == ([], [])

    @pytest.mark.parametrize("sample", [None, 0])
    @pytest.mark.parametrize("name", ["config.json", "tokenizer.json", INDEX_FILE])
    def test_a_changed_byte_is_found(self, out: Path, name: str, sample: int | None) -> None:
        data = (out / name).read_bytes()
        (out / name).write_bytes(data[:-1] + b" ")
        [found] = look(out, sample=sample).problems
        assert found.startswith(f"{name}: ")

    def test_a_changed_value_that_nothing_else_contradicts(self, out: Path) -> None:
        for name, key in (("config.json", "rope_theta"), (INDEX_FILE, "metadata")):
            data = json.loads((out / name).read_text())
            (out / name).write_text(json.dumps({**data, key: {"total_size": 1}}).ljust((out / name).stat().st_size))
        for problem in look(out).problems:
            assert "bytes instead of" in problem or DIGEST in problem
        assert len(look(out).problems) == 2

    def test_a_file_that_is_cut_or_gone(self, out: Path) -> None:
        path = out / "tokenizer.json"
        size = path.stat().st_size
        path.write_bytes(path.read_bytes()[:-1])
        assert look(out).problems == [f"tokenizer.json: {size - 1} bytes instead of {size}"]
        path.unlink()
        assert look(out).problems == ["tokenizer.json: missing"]

    @pytest.mark.parametrize("name", ["config.json", INDEX_FILE])
    def test_one_that_is_no_json_any_more_is_told_with_all_else(self, out: Path, plan: Plan, name: str) -> None:
        (out / name).write_text("{")
        flip(out, plan, names_of(plan)[0])
        problems = look(out).problems
        assert any(problem.startswith(f"{name}: the file is not valid JSON") for problem in problems)
        assert any("XXH3-128" in problem for problem in problems)

    @pytest.mark.parametrize("text", ["---\nlicense: mit\n---\nmine", None])
    def test_an_edited_card_is_told_and_no_problem(self, out: Path, text: str | None) -> None:
        path = out / "README.md"
        if text is None:
            path.unlink()
        else:
            path.write_text(text)
        found = look(out)
        assert found.problems == []
        [note] = found.notes
        assert note.startswith("README.md: ")
        assert note.endswith("a model card may be edited")

    def test_an_edited_manifest_is_found(self, out: Path) -> None:
        edit(out / MANIFEST_FILE, lambda found: found["recipe"].update(merge_method="ties"))
        assert look(out, sample=0).problems == [
            f"{MANIFEST_FILE}: changed after it was written (its own digest differs)"
        ]

    def test_its_form_does_not_count(self, out: Path) -> None:
        data = json.loads((out / MANIFEST_FILE).read_text())
        (out / MANIFEST_FILE).write_text(json.dumps(dict(reversed(data.items())), ensure_ascii=True))
        assert look(out).problems == []

    def test_lone_surrogates_in_it(self, out: Path) -> None:
        edit(out / MANIFEST_FILE, lambda found: found["recipe"].update(merge_method="\ud800"))
        with pytest.raises(CheckpointError, match="not valid Unicode"):
            look(out)

    def test_a_manifest_of_an_earlier_version(self, out: Path) -> None:
        make_old(out)
        found = look(out)
        assert (found.problems, found.num_files) == ([], 0)
        [note] = found.notes
        assert "of an earlier version" in note
        edit(out / "config.json", lambda config: config.update(rope_theta=1.0))
        assert look(out).problems == []
        (out / "tokenizer.json").unlink()
        assert look(out).problems == ["tokenizer.json: missing"]

    @pytest.mark.parametrize("files", ['["x"]', '{"x": 3}', "3", '{"x": {"sha256": "0"}}'])
    def test_a_list_of_files_that_is_none(self, out: Path, files: str) -> None:
        edit_manifest(out, lambda found: found.update(files=json.loads(files)))
        with pytest.raises(CheckpointError, match="lists its files in another form"):
            look(out)


class TestStrays:
    @pytest.mark.parametrize(
        "name",
        [
            *("model.safetensors", "consolidated.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json"),
            *("consolidated.00.pth", "model.pt", "tf_model.h5", "flax_model.msgpack", "PYTORCH_MODEL.BIN"),
            *("model.safetensors.index.fp16.json", "adapter_config.json", "adapter_model.bin"),
            *("modeling_llama.py", "tokenization.py", "custom_generate/generate.py", "handler.py"),
            *("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
            *(
                "vocab.json",
                "vocab.txt",
                "merges.txt",
                "tokenizer.model",
                "tokenizer.model.v3",
                "source.spm",
                "tekken.json",
                "qwen.tiktoken",
                "params.json",
            ),
            *("chat_template.jinja", "additional_chat_templates/tools.jinja", "modules.json", "config.4.0.0.json"),
            *("quantize_config.json", "quantization_config.json", "hf_quant_config.json", "preprocessor_config.json"),
        ],
    )
    def test_what_readers_would_load_or_run(self, out: Path, name: str) -> None:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("{}")
        [problem] = look(out, sample=0).problems
        assert problem.startswith(f"{name}: not part of this model, and readers ")

    @pytest.mark.parametrize("name", ["LICENSE", "notes.md", "eval_results.json", "model-q4.gguf", "training_args.bin"])
    def test_what_they_would_not(self, out: Path, name: str) -> None:
        (out / name).write_text("{}")
        assert look(out, sample=0).problems == []

    @pytest.mark.parametrize("name", ["model.safetensors", "config.json", "modeling.py", "adapter_config.json"])
    @pytest.mark.parametrize("folder", ["other", "deep/er", ".mergekit-ray", ".git"])
    def test_other_models_below_are_none(self, out: Path, folder: str, name: str) -> None:
        (out / folder).mkdir(parents=True)
        (out / folder / name).write_text("{}")
        assert look(out, sample=0).problems == []

    def test_those_of_earlier_versions_know_what_they_copied(self, out: Path) -> None:
        make_old(out)
        assert look(out).problems == []
        (out / "generation_config.json").write_text('{"auto_map": {}}')
        [problem] = look(out).problems
        assert problem.startswith("generation_config.json: not part of this model")


def test_work_on_a_successor_is_no_stray(out: Path, plan: Plan) -> None:
    staged = out / ".mergekit-ray" / "digest" / "staged"
    staged.mkdir(parents=True)
    shutil.copy(out / plan.shards[0].file, staged / "model.safetensors")
    assert look(out).problems == []


def test_the_command(out: Path, plan: Plan) -> None:
    from typer.testing import CliRunner

    from mergekit_ray.cli import app

    done = CliRunner().invoke(app, ["verify", str(out), "--sample", "2", "--seed", "3", "--finite", "--json"])
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["num_tensors"] == 2
    (out / "README.md").write_text("mine")
    done = CliRunner().invoke(app, ["verify", str(out)])
    assert done.exit_code == 0
    assert done.stderr.startswith("note: README.md: ")
    assert done.stdout.endswith("3 other files: all as written\n")
    done = CliRunner().invoke(app, ["verify", str(out), "--sample", "0"])
    assert done.stdout.endswith("3 other files: all as written (but no tensor was read)\n")
    flip(out, plan, names_of(plan)[0])
    done = CliRunner().invoke(app, ["verify", str(out), "--json"])
    assert done.exit_code == 3
    assert json.loads(done.stdout)["ok"] is False
