from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub.constants
import pytest

from mergekit_ray.core.errors import CheckpointError, ConfigError, MergekitRayError, ModelError, PlanError
from mergekit_ray.storage import open_sink, open_source
from mergekit_ray.storage.hub.cache import HubCache
from mergekit_ray.storage.protocols import MappableSource
from mergekit_ray.storage.schemes import SCHEMES
from mergekit_ray.storage.single_file import SingleFile
from support.store_conformance import fetch

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub cache that holds one commit of ``org/name``, as huggingface_hub lays it out."""
    cache = tmp_path / "hub"
    repository = cache / "models--org--name"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "blobs" / "b10b").write_text(json.dumps({"a": 1}))
    (snapshot / "config.json").symlink_to("../../blobs/b10b")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return repository


@pytest.mark.parametrize("reference", ["org/name", "hf://org/name", "hf://org/name@main", f"hf://org/name@{COMMIT}"])
def test_a_cached_repository(hub: Path, reference: str) -> None:
    source = open_source(reference)
    assert source.uri == f"hf://org/name@{COMMIT}"
    [stat] = source.list()
    assert (stat.name, stat.num_bytes, stat.version) == ("config.json", 8, "b10b-8")
    assert fetch(source, "config.json", [(0, 4)], stat.version) == [b'{"a"']
    assert open_source(source.uri).uri == source.uri


def test_a_revision_apart(hub: Path) -> None:
    assert open_source("org/name", "main").uri == f"hf://org/name@{COMMIT}"
    assert open_source("org/name", COMMIT).uri == f"hf://org/name@{COMMIT}"
    with pytest.raises(ModelError, match="two revisions"):
        open_source("hf://org/name@main", "other")


@pytest.mark.parametrize(
    ("reference", "revision", "command"),
    [
        ("org/other", None, "hf download org/other"),
        ("gpt2", None, "hf download gpt2"),
        ("org/name", "v2", "hf download org/name --revision v2"),
    ],
)
def test_what_is_not_cached_is_told_with_the_command_that_fetches_it(
    hub: Path, reference: str, revision: str | None, command: str
) -> None:
    with pytest.raises(ModelError) as caught:
        open_source(reference, revision)
    or_folder = "" if "/" in reference else f"; for a folder, write ./{reference}"
    assert caught.value.remedy == f"fetch it first: {command}{or_folder}"


def test_a_folder_goes_before_the_hub(hub: Path, tmp_path: Path) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert open_source("org/name").uri == f"{tmp_path}/org/name"


def test_a_scheme_that_is_only_read(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_source("org/name")  # the schemes are known by now
    monkeypatch.setitem(SCHEMES._entries, "ro", lambda uri, revision: HubCache("org/name", hub / "snapshots" / COMMIT))
    assert open_source("ro://anything").uri == f"hf://org/name@{COMMIT}"
    with pytest.raises(ConfigError, match="can only be read"):
        open_sink("ro://anything")


@pytest.mark.parametrize("reference", ["{}/Lama-7b", "./Lama-7b", "Lama-7b", "{}/lama-7B/"])
def test_a_misspelt_folder(hub: Path, tmp_path: Path, reference: str) -> None:
    (tmp_path / "Llama-7b").mkdir()
    with pytest.raises(ModelError, match=r"did you mean .*Llama-7b"):
        open_source(reference.format(tmp_path))


def test_a_path_without_neighbours(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder") as caught:
        open_source(f"{tmp_path}/there/is/nothing")
    assert caught.value.remedy == "give the folder that holds config.json and the safetensors files"


def test_a_file_of_another_kind_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"")
    with pytest.raises(ModelError, match=r"a model is a folder or a file that ends in \.safetensors") as caught:
        open_source(f"{tmp_path}/model.gguf")
    assert caught.value.remedy == f"name {tmp_path} instead"


class TestSingleFile:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        for name in ("unet.safetensors", "vae.safetensors"):
            (tmp_path / name).write_bytes(name.encode())
        return tmp_path

    @pytest.mark.parametrize("scheme", ["", "file://"])
    def test_is_a_store_of_its_own(self, folder: Path, scheme: str) -> None:
        source = open_source(f"{scheme}{folder}/unet.safetensors")
        assert source.uri == f"{folder}/unet.safetensors"
        assert [(file.name, file.num_bytes) for file in source.list()] == [("unet.safetensors", 16)]
        assert source.list() == [source.stat("unet.safetensors")] == [source.read_head("unet.safetensors", 1)[1]]
        assert source.read("unet.safetensors", max_bytes=100) == b"unet.safetensors"
        assert source.stat("vae.safetensors") is None
        with pytest.raises(CheckpointError):
            source.read("vae.safetensors", max_bytes=100)

    def test_is_mapped_where_its_folder_is(self, folder: Path) -> None:
        source = open_source(f"{folder}/unet.safetensors")
        assert isinstance(source, MappableSource)
        assert bytes(source.map_range("unet.safetensors", 0, 4).data) == b"unet"

    def test_keeps_its_name_behind_a_link(self, folder: Path) -> None:
        kept = folder / "kept" / "0123"
        kept.parent.mkdir()
        (folder / "unet.safetensors").rename(kept)
        (folder / "unet.safetensors").symlink_to(kept)
        source = open_source(f"{folder}/unet.safetensors")
        assert source.uri == f"{folder}/unet.safetensors"
        assert source.read("unet.safetensors", max_bytes=100) == b"unet.safetensors"

    def test_is_a_folder_if_there_is_one(self, tmp_path: Path) -> None:
        (tmp_path / "a.safetensors").mkdir()
        assert not isinstance(open_source(f"{tmp_path}/a.safetensors"), SingleFile)

    def test_that_is_not_there(self, folder: Path) -> None:
        with pytest.raises(ModelError, match=r"there is no such file; did you mean 'unet\.safetensors'"):
            open_source(f"{folder}/unett.safetensors")

    def test_of_a_repository(self, hub: Path) -> None:
        folder = hub / "snapshots" / COMMIT / "vae"
        folder.mkdir()
        (folder / "vae.safetensors").write_bytes(b"vae")
        for reference, revision in (("org/name/vae/vae.safetensors", None), ("org/name/vae/vae.safetensors", COMMIT)):
            source = open_source(reference, revision)
            assert source.uri == f"hf://org/name/vae/vae.safetensors@{COMMIT}"
            assert open_source(source.uri).uri == source.uri
            assert source.read("vae.safetensors", max_bytes=100) == b"vae"

    def test_of_a_bucket(self) -> None:
        source = open_source("s3://bucket/some/unet.safetensors")
        assert (source.uri, type(source)) == ("s3://bucket/some/unet.safetensors", SingleFile)
        assert not isinstance(open_source("s3://unet.safetensors"), SingleFile)

    def test_is_no_output(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="an output is a folder") as caught:
            open_sink(f"{tmp_path}/unet.safetensors")
        assert caught.value.remedy is not None
        assert caught.value.remedy.startswith(f"write {tmp_path}/unet;")


def test_an_unknown_scheme_lists_what_there_is() -> None:
    with pytest.raises(ConfigError, match="unknown storage scheme 's33'; did you mean 's3'") as caught:
        open_source("s33://bucket/prefix")
    assert caught.value.remedy == f"accepted: {', '.join(SCHEMES.names())}"
    assert set(SCHEMES.names()) >= {"file", "hf", "s3"}


@pytest.mark.parametrize(
    ("reference", "meant"),
    [
        ("hf:me/x", "hf://me/x"),
        ("S3:bucket/x", "S3://bucket/x"),
        ("s3:/bucket/x", "s3://bucket/x"),
        ("file:/models/x", "file:///models/x"),
    ],
)
def test_a_uri_without_its_slashes_is_no_folder(reference: str, meant: str) -> None:
    for open_place in (open_source, open_sink):
        with pytest.raises(ConfigError, match="two slashes") as caught:
            open_place(reference)
        assert caught.value.remedy == f"write {meant}, or ./{reference} for a folder of this name"


def test_a_folder_may_have_a_colon(tmp_path: Path) -> None:
    for name in ("run:3", "hf:x"):
        (tmp_path / name).mkdir()
        assert open_source(f"{tmp_path}/{name}").uri == f"{tmp_path}/{name}"


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("s3://", "no bucket"),
        ("s3:///prefix", "no bucket"),
        ("s3://key:secret@bucket/x", "must not hold a credential"),
        ("s3://bucket:9000/x", "holds a bucket and a prefix"),
    ],
)
def test_bad_s3_uris_quote_no_credential(uri: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        open_source(uri)
    assert "secret" not in str(caught.value).replace("AWS_SECRET_ACCESS_KEY", "")


def test_an_s3_uri_has_no_revision() -> None:
    with pytest.raises(ModelError, match="has no revision"):
        open_source("s3://bucket/prefix", "main")
    assert open_source("s3://bucket/a b/c/").uri == "s3://bucket/a b/c"
    assert open_source("s3://bucket").uri == "s3://bucket"


def test_libraries_of_other_schemes_are_not_loaded(tmp_path: Path) -> None:
    code = (
        "import sys; from mergekit_ray.storage import open_source, open_sink; "
        "open_source(sys.argv[1]); open_sink('s3://bucket/prefix'); "
        "print(*({'boto3', 'botocore', 'huggingface_hub', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == ""


def test_many_threads_may_open_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(lambda _: open_source(str(tmp_path)).uri, range(64))) == {str(tmp_path)}


@pytest.mark.parametrize(
    "place", ["/tmp/a\ud800", "b\udcff", "/tmp/a\0b", "file:///tmp/%00", "file:///tmp/%ED%A0%80", "s3://b/\ud800"]
)
@pytest.mark.parametrize(("opened", "kind"), [(open_source, ModelError), (open_sink, ConfigError)])
def test_names_that_no_manifest_could_tell_are_refused(
    opened: Callable[[str], object], kind: type[MergekitRayError], place: str
) -> None:
    with pytest.raises(kind, match="not valid Unicode, or with a null character") as caught:
        opened(place)
    str(caught.value).encode()


@pytest.mark.parametrize("place", ["a" * 300, "/tmp/" + "a" * 300, "/tmp/" + "a/" * 3000, "~nobody-of-this-name/x"])
def test_names_that_no_folder_can_have(hub: Path, place: str) -> None:
    with pytest.raises(ModelError):
        open_source(place)


@pytest.mark.parametrize("folder", ["a" * 300, "a/" * 3000])
def test_a_place_with_too_long_a_name_cannot_be_written_to(tmp_path: Path, folder: str) -> None:
    sink = open_sink(str(tmp_path / folder))
    assert sink.list() == []
    with pytest.raises(PlanError, match="longer than the file system takes"):
        sink.put("file", b"")


def test_a_file_with_too_long_a_name_is_not_there(tmp_path: Path) -> None:
    sink = open_sink(str(tmp_path))
    assert sink.stat("a" * 300) is None
    with pytest.raises(CheckpointError, match="no such file"):
        sink.read_head("a" * 300, 1)
    with pytest.raises(PlanError, match="longer than the file system takes"):
        sink.put("a" * 300, b"")
