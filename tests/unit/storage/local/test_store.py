from __future__ import annotations

import errno
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from mergekit_ray.core.errors import CheckpointError, ConfigError, ModelError, StorageError
from mergekit_ray.storage import open_sink, open_source
from mergekit_ray.storage.local import store as local_module
from mergekit_ray.storage.local import upload as local_upload
from mergekit_ray.storage.local.store import LocalStore
from mergekit_ray.storage.protocols import Sink
from support.store_conformance import StoreConformance, fetch


class TestLocalStore(StoreConformance):
    @pytest.fixture
    def store(self, tmp_path: Path) -> LocalStore:
        return LocalStore(tmp_path / "out put")

    def leftovers(self, store: Sink) -> list[str]:
        stored = {file.name for file in store.list()}
        root = Path(store.uri)
        there = [str(path.relative_to(root)) for path in root.rglob("*")]
        return [
            name for name in there if name not in stored and not any(file.startswith(f"{name}/") for file in stored)
        ]


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP], indirect=True)
class TestLocalStoreWithoutHardLinks(TestLocalStore):
    """As on vfat, exFAT and some FUSE mounts."""

    prepares_moves = False

    @pytest.fixture(autouse=True)
    def number(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        def unsupported(*args: object, **options: object) -> None:
            raise OSError(request.param, os.strerror(request.param))

        monkeypatch.setattr(os, "link", unsupported)

    def test_of_racers_who_take_each_other_for_dead_one_wins(
        self, store: LocalStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Another removes what the first has prepared, at the worst moment."""
        create = local_upload._create

        def with_another(path: Path, data: bytes) -> bool:
            monkeypatch.setattr(local_upload, "_create", create)
            for temporary in local_upload.temporaries_of([path]):
                temporary.unlink()
            return create(path, data)

        monkeypatch.setattr(local_upload, "_create", with_another)
        assert store.put_if_absent("lease", b"mine") is True
        assert store.read("lease", max_bytes=9) == b"mine"

    def test_a_disk_that_fills_up_leaves_no_part_of_a_file(
        self, store: LocalStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fsync, synced = os.fsync, []

        def full(fd: int) -> None:
            synced.append(fd)
            if len(synced) == 2:  # that of the file itself, after its temporary one
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(fd)

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="no space left"):
            store.put_if_absent("lease", b"mine")
        assert store.list() == []
        assert self.leftovers(store) == []
        assert store.put_if_absent("lease", b"mine") is True


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


def test_a_file_changed_in_place_is_noticed(store: LocalStore, tmp_path: Path) -> None:
    stat = store.put("a", b"0123456789")
    assert fetch(store, "a", [(0, 4)], stat.version) == [b"0123"]
    with (tmp_path / "a").open("r+b") as file:
        file.write(b"x")
    os.utime(tmp_path / "a", ns=(1, 1))
    with pytest.raises(CheckpointError, match="changed"):
        fetch(store, "a", [(0, 4)], stat.version)


def test_a_file_changed_during_a_read_is_noticed(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("a", b"0123456789")
    preadv = os.preadv

    def change_then_read(fd: int, buffers: Any, offset: int) -> int:
        os.utime(tmp_path / "a", ns=(1, 1))
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", change_then_read)
    with pytest.raises(CheckpointError, match="changed"):
        fetch(store, "a", [(0, 4)])


def test_copies_with_their_times_kept_have_one_version(store: LocalStore, tmp_path: Path) -> None:
    store.put("a", b"0123456789")
    shutil.copy2(tmp_path / "a", tmp_path / "b")
    first, second = store.stat("a"), store.stat("b")
    assert first is not None
    assert second is not None
    assert first.version == second.version


def test_short_reads_of_the_system_are_continued(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytes(range(256)) * 10
    store.put("a", data)
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:7]], at))
    ranges = [(0, 100), (100, 100), (100, 101), (101, 2000), (2100, 2560)]
    assert fetch(store, "a", ranges) == [data[start:end] for start, end in ranges]


def test_open_files_are_bounded(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_module, "MAX_OPEN_FILES", 3)
    for number in range(20):
        store.put(str(number), b"x")
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for number in range(20):
        fetch(store, str(number), [(0, 1)])
    assert len(os.listdir("/proc/self/fd")) - before == 3  # noqa: PTH208
    store.close()
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_a_full_disk_is_told_with_what_is_needed(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(local_upload, "is_in_memory", lambda fd: False)
    with pytest.raises(StorageError, match=r"no space left: 1000 bytes are needed, \d+ are free") as caught:
        store.open("a", 1000)
    assert "free some space" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["open", "pwrite", "fsync", "replace", "link"])
def test_a_full_disk_is_told_wherever_it_is_noticed(
    call: str, number: int, store: LocalStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(*((Path, call) if call == "replace" else (os, call)), full)
    write = store.put_if_absent if call == "link" else store.put
    with pytest.raises(StorageError, match="no space left: 1 bytes are needed") as caught:
        write("a", b"1")
    assert "free some space or choose another place, and run again to resume" in str(caught.value)
    assert not caught.value.retryable
    assert list(tmp_path.iterdir()) == []


def test_full_memory_is_told_before_anything_is_written(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(local_upload, "is_in_memory", lambda fd: True)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=999))
    with pytest.raises(StorageError, match="no space left: 1000 bytes are needed, 999 are free"):
        store.open("a", 1000)
    assert list(tmp_path.iterdir()) == []
    assert store.put("b", b"12").num_bytes == 2


def test_a_file_system_that_cannot_reserve_space(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*args: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    monkeypatch.setattr(local_upload, "is_in_memory", lambda fd: False)
    assert store.put("a", b"12").num_bytes == 2


def test_what_a_killed_writer_left_is_removed_and_a_living_ones_is_not(store: LocalStore, tmp_path: Path) -> None:
    dead = tmp_path / ".a.0123456789abcdef.tmp"
    dead.write_bytes(b"left by a killed process")
    os.utime(dead, (time.time() - 3600,) * 2)
    alive = store.open("a", 1)
    [temporary] = [path for path in tmp_path.iterdir() if path != dead]
    os.utime(temporary, (time.time() - 3600,) * 2)
    other = store.open("a", 1)
    assert not dead.exists()
    assert temporary.exists()
    alive.write(b"1")
    alive.commit()
    other.abort()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_long_names_leave_room_for_the_temporary_name(store: LocalStore) -> None:
    name = "é" * 127
    store.put(name, b"x")
    assert store.read(name, max_bytes=1) == b"x"


def test_links_to_files_are_read_and_replaced_by_writes(store: LocalStore, tmp_path: Path) -> None:
    target = tmp_path / "blobs" / "blob"
    target.parent.mkdir()
    target.write_bytes(b"blob")
    inside = LocalStore(tmp_path / "snapshots" / "commit")
    inside.put("b", b"")
    (tmp_path / "snapshots" / "commit" / "a").symlink_to(target)
    assert [file.name for file in inside.list()] == ["a", "b"]
    assert inside.read("a", max_bytes=4) == b"blob"
    inside.put("a", b"new")
    assert target.read_bytes() == b"blob"


def test_a_read_only_place(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*args: object, **kwargs: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(StorageError, match="Permission denied") as caught:
        store.put("a", b"")
    assert "permissions" in str(caught.value)


def test_uris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my model").mkdir()
    assert open_source(f"file://{tmp_path}/my%20model").uri == f"{tmp_path}/my model"
    monkeypatch.chdir(tmp_path)
    assert open_source("my model").uri == f"{tmp_path}/my model"
    assert open_sink("new/folder").uri == f"{tmp_path}/new/folder"
    with pytest.raises(ModelError, match="another host"):
        open_source("file://host/path")
    with pytest.raises(ModelError, match="no revision 'main'"):
        open_source("my model", "main")


@pytest.mark.parametrize("place", ["file", "./file/", "file/below/it", "link", "file://{}/file", "/dev/null"])
def test_a_file_is_no_place_to_write_to(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("file")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^\S*(file|link|null): a file, where a folder is needed"):
        open_sink(place.format(tmp_path))
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize("place", ["", "file://host/path"])
def test_a_place_that_is_none(place: str) -> None:
    with pytest.raises(ConfigError, match=r"empty path|another host"):
        open_sink(place)


def test_what_nfs_keeps_of_a_removed_file_is_no_file(store: LocalStore, tmp_path: Path) -> None:
    """A client renames it while a process there has it open, and leaves it if that machine is lost."""
    store.put("work/a", b"1")
    store.put(".mergekit-ray/a", b"1")
    for folder in (tmp_path, tmp_path / ".mergekit-ray"):
        (folder / ".nfs00000000008840e800000023").touch()
    assert [file.name for file in store.list()] == [".mergekit-ray/a", "work/a"]
    assert store.discard_remains() == 2
    assert not list(tmp_path.rglob(".nfs*"))


def test_a_head_is_read_from_the_file_that_is_there_now(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not from one that is kept open, and may have been replaced from another machine; nor is it kept open itself."""
    store.put("a", b"old")
    asked: list[str] = []
    monkeypatch.setattr(local_module, "refresh", lambda root, folder: asked.append(str(folder)))
    num_open = psutil.Process().num_fds()
    assert store.read("a", max_bytes=3) == b"old"
    assert asked == [store.uri]
    assert psutil.Process().num_fds() == num_open
