"""Publishing and verifying: the order, the card, the manifest, and every way a published model can be wrong."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from mergekit_ray import __version__
from mergekit_ray.core.errors import CheckpointError, StorageError
from mergekit_ray.core.plan import InputModel, Plan
from mergekit_ray.core.record import ShardRecord
from mergekit_ray.operations.verify import Verification, verify
from mergekit_ray.output.card import licence_of, model_card
from mergekit_ray.output.destination import INDEX_FILE, MANIFEST_FILE, RECORD_ROOT, Destination, clear_notes, inspect
from mergekit_ray.output.manifest import manifest
from mergekit_ray.output.publish import check_records, publish
from mergekit_ray.planning.windows import FIXED_BYTES
from mergekit_ray.storage.local.store import LocalSource, LocalStore
from mergekit_ray.storage.local.upload import LocalUpload
from mergekit_ray.storage.opening import open_sources
from mergekit_ray.worker.resources import Resources, WorkerOptions
from mergekit_ray.worker.worker import Worker


class Recording(LocalStore):
    """Remembers every file that was written (`put` opens it too) or removed, in order."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.log: list[str] = []

    def open(self, name: str, num_bytes: int) -> LocalUpload:
        self.log.append(name)
        return super().open(name, num_bytes)

    def delete(self, names: Any) -> None:
        self.log += [f"-{name}" for name in names]
        super().delete(names)


class Published:
    def __init__(self, plan: Plan, root: Path) -> None:
        self.plan, self.root = plan, root
        self.sink = Recording(root)
        sources = open_sources(plan.inputs)
        self.destination: Destination = inspect(self.sink, plan, overwrite=False)
        resources = Resources(plan.inputs, sources, WorkerOptions(FIXED_BYTES + (1 << 20)))
        worker = Worker(resources, self.sink, self.destination.record_folder)
        self.records: dict[str, ShardRecord] = {shard.file: worker.run(shard) for shard in plan.shards}
        worker.close()
        check_records(plan, self.destination, self.records)
        publish(plan, self.destination, self.records, sources)
        clear_notes(self.destination.sink)

    def read(self, name: str) -> Any:
        return json.loads((self.root / name).read_text())

    def verify(self) -> Verification:
        return verify(LocalSource(self.root))


@pytest.fixture
def published(plan: Plan, tmp_path: Path) -> Published:
    return Published(plan, tmp_path / "out")


def test_the_index_comes_last_and_records_go_after_it(published: Published) -> None:
    log = [name for name in published.sink.log if not name.startswith(("-", RECORD_ROOT))]
    shards = [shard.file for shard in published.plan.shards]
    assert log[-1] == INDEX_FILE
    assert set(log[:-1]) == {*shards, "config.json", "tokenizer.json", "README.md", MANIFEST_FILE}
    gone = [name for name in published.sink.log if name.startswith("-")]
    assert published.sink.log.index(INDEX_FILE) < published.sink.log.index(gone[0])
    left = {stat.name for stat in published.sink.list()}
    assert left == {*log}, "what is left is the model"


def test_config_index_and_side_files(published: Published, models: list[Path]) -> None:
    assert published.read("config.json") == dict(published.plan.config)
    assert published.read(INDEX_FILE) == published.plan.index
    assert (published.root / "tokenizer.json").read_text() == (models[0] / "tokenizer.json").read_text()
    assert not (published.root / "training_args.bin").exists()


def test_the_card_is_one_the_hub_can_read(published: Published) -> None:
    text = (published.root / "README.md").read_text()
    _, front, body = re.split(r"^---\n", text, maxsplit=2, flags=re.MULTILINE)
    parsed = yaml.safe_load(front)
    assert parsed["library_name"] == "transformers"
    assert "merge" in parsed["tags"]
    assert "base_model" not in parsed  # folders are no models of the Hub
    recipe = re.search(r"```yaml\n(.*?)```", body, flags=re.DOTALL)
    assert recipe is not None
    assert yaml.safe_load(recipe[1]) | {"output": None} == published.plan.recipe | {"output": None}
    assert "`linear`" in body
    assert f"{published.plan.num_parameters:,} parameters" in body


def test_models_of_the_hub_are_named_as_base_models() -> None:
    places = {
        "org/base@v1": "hf://org/base@0123abc",
        "org/tune": "hf://org/tune@4567def",
        "runs/merged": "/home/me/runs/merged",
        "s3://bucket/model": "s3://bucket/model",
    }
    inputs = {name: InputModel(name, name, uri, {}) for name, uri in places.items()}
    front = yaml.safe_load(model_card(Plan(inputs, (), {}, (), {"merge_method": "ties"}, 0), {}).split("---\n")[1])
    assert front["base_model"] == ["org/base", "org/tune"]
    assert front["base_model_relation"] == "merge"


@pytest.mark.parametrize(
    ("cards", "expected"),
    [
        ({"a": "apache-2.0", "b": "apache-2.0"}, {"license": "apache-2.0"}),
        ({"a": "apache-2.0", "b": "llama3.1"}, {"license": "other", "license_name": "apache-2.0, llama3.1"}),
        ({"a": "apache-2.0", "b": None}, {"license": "other", "license_name": "apache-2.0"}),
        ({"a": None, "b": None}, {}),
    ],
)
def test_licences_are_those_of_the_models_own_cards(
    cards: dict[str, str | None], expected: dict[str, str], tmp_path: Path
) -> None:
    inputs, licences = {}, {}
    for name, licence in cards.items():
        place = tmp_path / name
        place.mkdir()
        if licence is not None:
            (place / "README.md").write_text(f"---\nlicense: {licence}\ntags: [x]\n---\n# A model\n---\nmore\n")
        inputs[name] = InputModel(name, f"org/{name}", str(place), {})
        licences[name] = licence_of(LocalSource(place))
    text = model_card(Plan(inputs, (), {}, (), {"merge_method": "ties"}, 0), licences)
    front = yaml.safe_load(text.split("---\n")[1])
    assert {key: value for key, value in front.items() if key.startswith("license")} == expected
    assert all(f"- org/{name} ({licence})\n" in text for name, licence in cards.items() if licence)


@pytest.mark.parametrize("front", ["", "---\n", "---\n: [\n---\n", "---\n- a\n---\n", "---\nlicense: [a]\n---\n"])
def test_a_card_that_says_no_licence(front: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"{front}# A model\n")
    assert licence_of(LocalSource(tmp_path)) is None


def test_the_manifest_pins_inputs_and_digests(published: Published, models: list[Path]) -> None:
    found = published.read(MANIFEST_FILE)
    assert found["plan_digest"] == published.plan.digest
    assert found["seed"] == 0
    assert found["software"]["mergekit-ray"] == __version__
    assert found["recipe"] == published.plan.recipe
    for path in models:
        stat = LocalSource(path).stat("model.safetensors")
        assert stat is not None
        data = (path / "model.safetensors").read_bytes()
        header = data[: 8 + int.from_bytes(data[:8], "little")]
        assert found["inputs"][str(path)]["files"] == {
            "model.safetensors": {
                "num_bytes": stat.num_bytes,
                "version": stat.version,
                "header_sha256": hashlib.sha256(header).hexdigest(),
            }
        }
    shards = {shard["file"] for shard in found["shards"]}
    assert found["files"] == {
        path.name: {
            "num_bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in published.root.iterdir()
        if path.name not in {*shards, MANIFEST_FILE}
    }
    rest = {key: value for key, value in found.items() if key != "manifest_sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert found["manifest_sha256"] == hashlib.sha256(text.encode()).hexdigest()
    for shard in found["shards"]:
        data = (published.root / shard["file"]).read_bytes()
        assert (shard["num_bytes"], shard["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
        assert "version" not in shard


def test_the_manifest_is_the_same_wherever_and_whenever_it_is_made(published: Published, tmp_path: Path) -> None:
    again = Published(published.plan, tmp_path / "again")
    for name in {stat.name for stat in published.sink.list()}:
        assert (again.root / name).read_bytes() == (published.root / name).read_bytes(), name


def test_the_manifest_holds_no_secret(published: Published, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    secrets = {"AWS_SECRET_ACCESS_KEY": "sesame-open", "HF_TOKEN": "hf_sesame", "AWS_SESSION_TOKEN": "session-sesame"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    text = json.dumps(manifest(published.plan, published.records, {}, {})) + model_card(published.plan, {})
    assert not any(value in text for value in secrets.values())
    assert text == json.dumps(manifest(published.plan, published.records, {}, {})) + model_card(published.plan, {})


def test_a_side_file_that_changed_is_refused_before_the_index(plan: Plan, models: list[Path], tmp_path: Path) -> None:
    (models[0] / "tokenizer.json").write_text("another, longer tokenizer")
    with pytest.raises(CheckpointError, match="replaced after the merge was planned"):
        Published(plan, tmp_path / "out")
    assert not (tmp_path / "out" / INDEX_FILE).exists()


@pytest.mark.parametrize("harm", ["missing", "resized", "replaced", "no record"])
def test_shards_are_checked_before_publishing(published: Published, harm: str) -> None:
    file = published.plan.shards[1].file
    path = published.root / file
    records = dict(published.records)
    if harm == "missing":
        path.unlink()
    elif harm == "resized":
        path.write_bytes(path.read_bytes() + b"x")
    elif harm == "replaced":
        path.write_bytes(path.read_bytes())
    else:
        del records[file]
    with pytest.raises(StorageError, match="the shard is not as it was written") as caught:
        check_records(published.plan, published.destination, records)
    assert caught.value.where is not None
    assert caught.value.where.endswith(file)


def test_verify_reads_everything(published: Published) -> None:
    read: list[int] = []
    found = verify(LocalSource(published.root), on_bytes=read.append)
    assert found.problems == []
    assert found.num_shards == len(published.plan.shards)
    assert found.num_tensors == sum(len(shard.tensors) for shard in published.plan.shards)
    assert found.num_bytes == published.plan.num_bytes
    assert sum(read) == 2 * published.plan.num_parameters


def test_verify_names_the_tensor_whose_bit_flipped(published: Published) -> None:
    shard = published.plan.shards[0]
    tensor = shard.tensors[0]
    path = published.root / shard.file
    data = bytearray(path.read_bytes())
    data[len(shard.header) + tensor.start + 1] ^= 1
    path.write_bytes(data)
    assert published.verify().problems == [
        f"{shard.file}: tensor {tensor.spec.name!r} is not what was written (XXH3-128 differs)",
        f"{shard.file}: the file is not what was written (SHA-256 differs)",
    ]


def test_verify_sees_a_changed_header(published: Published) -> None:
    shard = published.plan.shards[0]
    path = published.root / shard.file
    path.write_bytes(path.read_bytes().replace(b'"format":"pt"', b'"format":"np"'))
    assert published.verify().problems == [f"{shard.file}: the file is not what was written (SHA-256 differs)"]


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        ("delete", "missing"),
        ("truncate", r"\d+ bytes instead of \d+"),
        ("rename a tensor", "its header names other tensors than the manifest"),
        ("garble", "the header "),
        ("drop the index", "missing, so readers do not see a model"),
        ("change the index", "does not belong to this run, first at tensor"),
        ("add weights", "not part of this model, and readers may load it instead"),
    ],
)
def test_verify_names_what_is_wrong(published: Published, harm: str, problem: str) -> None:
    shard = published.plan.shards[0]
    path = published.root / shard.file
    data = path.read_bytes()
    name = shard.tensors[0].spec.name.encode()
    index = published.root / INDEX_FILE
    match harm:
        case "delete":
            path.unlink()
        case "truncate":
            path.write_bytes(data[:-1])
        case "rename a tensor":
            path.write_bytes(data.replace(name, name[:-1] + b"X", 1))
        case "garble":
            path.write_bytes(data[:8] + b"x" + data[9:])
        case "drop the index":
            index.unlink()
        case "change the index":
            index.write_text(index.read_text().replace(shard.file, published.plan.shards[1].file, 1))
        case "add weights":
            (published.root / "model.safetensors").write_bytes(data)
    [found] = published.verify().problems
    assert re.search(problem, found)


def test_verify_without_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a published model"):
        verify(LocalSource(tmp_path))
