"""What every store must do, whatever its scheme: a backend's tests subclass `StoreConformance`."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import pytest

from mergekit_ray.core.errors import CheckpointError, StorageError
from mergekit_ray.storage.protocols import FileStat, GuardedSink, MovingSink, PublishingSink, RemainsSink, Sink, Source

DATA = random.Random(0).randbytes(300_000)


def store_bytes(sink: Sink, name: str, data: bytes) -> FileStat:
    """Write a file through `Sink.open`."""
    upload = sink.open(name, len(data))
    upload.write(data)
    return upload.commit()


def fetch(source: Source, name: str, ranges: list[tuple[int, int]], version: str | None = None) -> list[bytes]:
    """Read ranges into fresh buffers."""
    buffers = [bytearray(end - start) for start, end in ranges]
    asked = source.read_ranges(name, ranges, [memoryview(buffer) for buffer in buffers], version=version)
    assert asked >= len({byte for start, end in ranges for byte in range(start, end)})
    return [bytes(buffer) for buffer in buffers]


class StoreConformance:
    """Subclasses provide the fixture ``store`` (an empty one) and `leftovers`.

    Attributes:
        prepares_moves: a file that is moved is prepared, so that discarding it prevents that.
    """

    prepares_moves = True

    def leftovers(self, store: Sink) -> list[str]:
        """Whatever unfinished uploads have left behind, in words."""
        raise NotImplementedError

    @pytest.fixture
    def store(self) -> Sink:
        raise NotImplementedError

    def test_implements_the_protocol(self, store: Sink) -> None:
        assert isinstance(store, Sink)

    def test_a_place_that_does_not_exist_is_empty(self, store: Sink) -> None:
        assert store.list() == []
        assert store.stat("nothing") is None

    def test_a_file_comes_back_as_it_was_written(self, store: Sink) -> None:
        written = store_bytes(store, "a.bin", DATA)
        assert written == store.stat("a.bin")
        assert written.num_bytes == len(DATA)
        assert store.read("a.bin", max_bytes=len(DATA)) == DATA
        assert fetch(store, "a.bin", [(0, len(DATA))], written.version) == [DATA]

    def test_an_upload_may_come_in_pieces_from_a_reused_buffer(self, store: Sink) -> None:
        upload = store.open("a.bin", len(DATA))
        buffer = bytearray(7_001)
        for start in range(0, len(DATA), len(buffer)):
            piece = DATA[start : start + len(buffer)]
            buffer[: len(piece)] = piece
            upload.write(memoryview(buffer)[: len(piece)])
            buffer[:] = b"\xff" * len(buffer)
        upload.commit()
        assert store.read("a.bin", max_bytes=len(DATA)) == DATA

    @pytest.mark.parametrize("seed", range(5))
    def test_ranges_in_any_order_with_gaps_overlaps_and_repeats(self, store: Sink, seed: int) -> None:
        stat = store_bytes(store, "a.bin", DATA)
        draw = random.Random(seed)
        cuts = [sorted(draw.choices(range(len(DATA) + 1), k=2)) for _ in range(20)]
        ranges = [(start, end) for start, end in cuts]
        ranges += [ranges[0], (5, 5), (0, 1), (1, 2), (len(DATA) - 1, len(DATA)), (len(DATA), len(DATA))]
        assert fetch(store, "a.bin", ranges, stat.version) == [DATA[start:end] for start, end in ranges]

    def test_thousands_of_small_ranges(self, store: Sink) -> None:
        store_bytes(store, "a.bin", DATA)
        ranges = [(start, start + 16) for start in range(0, len(DATA) - 16, 100)]
        assert fetch(store, "a.bin", ranges) == [DATA[start:end] for start, end in ranges]

    def test_head_comes_with_size_and_version(self, store: Sink) -> None:
        stat = store_bytes(store, "a.bin", DATA)
        assert store.read_head("a.bin", 10) == (DATA[:10], stat)
        assert store.read_head("a.bin", len(DATA) + 10) == (DATA, stat)
        assert store.read_head("a.bin", 0) == (b"", stat)

    def test_empty_files(self, store: Sink) -> None:
        stat = store_bytes(store, "empty", b"")
        assert stat.num_bytes == 0
        assert store.read_head("empty", 8) == (b"", stat)
        assert store.read("empty", max_bytes=0) == b""
        assert fetch(store, "empty", [(0, 0)], stat.version) == [b""]
        assert store.list() == [stat]

    def test_a_small_read_is_bounded(self, store: Sink) -> None:
        store.put("a", b"12345")
        assert store.read("a", max_bytes=5) == b"12345"
        with pytest.raises(CheckpointError, match="5 bytes, more than the 4"):
            store.read("a", max_bytes=4)

    def test_a_file_that_is_not_there(self, store: Sink) -> None:
        store.put("other", b"")
        with pytest.raises(CheckpointError, match="no such file"):
            store.read("a", max_bytes=1)
        with pytest.raises(CheckpointError, match="no such file"):
            store.read_head("a", 1)
        with pytest.raises(CheckpointError, match="no such file"):
            fetch(store, "a", [(0, 1)])

    @pytest.mark.parametrize("span", [(8, 12), (10, 11), (500, 600)])
    def test_a_range_beyond_the_end(self, store: Sink, span: tuple[int, int]) -> None:
        store.put("a", b"0123456789")
        with pytest.raises(CheckpointError, match=f"byte {span[1] - 1}"):
            fetch(store, "a", [span])

    def test_a_replaced_file_is_not_read_as_the_one_that_was_planned(self, store: Sink) -> None:
        old = store.put("a", b"old content")
        fetch(store, "a", [(0, 3)], old.version)
        new = store.put("a", b"new content")
        assert new.version != old.version
        with pytest.raises(CheckpointError, match="changed while it was being read"):
            fetch(store, "a", [(0, 3)], old.version)
        assert fetch(store, "a", [(0, 3)], new.version) == [b"new"]
        assert fetch(store, "a", [(0, 3)]) == [b"new"]

    def test_a_deleted_file_is_not_read_as_the_one_that_was_planned(self, store: Sink) -> None:
        old = store.put("a", b"old content")
        fetch(store, "a", [(0, 3)], old.version)
        store.delete(["a"])
        with pytest.raises(CheckpointError, match="no such file"):
            fetch(store, "a", [(0, 3)], old.version)

    def test_a_buffer_must_be_as_long_as_its_range(self, store: Sink) -> None:
        store.put("a", b"0123456789")
        with pytest.raises(ValueError, match="a buffer of 3 bytes"):
            store.read_ranges("a", [(0, 4)], [memoryview(bytearray(3))])

    def test_nothing_is_seen_before_commit(self, store: Sink) -> None:
        store.put("a", b"before")
        upload = store.open("a", 5)
        upload.write(b"after")
        assert store.read("a", max_bytes=10) == b"before"
        assert [file.name for file in store.list()] == ["a"]
        upload.commit()
        assert store.read("a", max_bytes=10) == b"after"
        assert self.leftovers(store) == []

    def test_abort_leaves_nothing(self, store: Sink) -> None:
        upload = store.open("folder/a", len(DATA))
        upload.write(DATA[:100_000])
        upload.abort()
        upload.abort()
        assert store.list() == []
        assert self.leftovers(store) == []

    def test_abort_after_commit_does_nothing(self, store: Sink) -> None:
        upload = store.open("a", 1)
        upload.write(b"x")
        upload.commit()
        upload.abort()
        assert store.read("a", max_bytes=1) == b"x"

    def test_too_few_bytes_are_not_committed(self, store: Sink) -> None:
        upload = store.open("a", 10)
        upload.write(b"12345")
        with pytest.raises(StorageError, match="5 bytes were written where 10 were announced"):
            upload.commit()
        upload.abort()
        assert store.list() == []
        assert self.leftovers(store) == []

    def test_too_many_bytes_are_refused(self, store: Sink) -> None:
        upload = store.open("a", 4)
        upload.write(b"123")
        with pytest.raises(StorageError, match="5 bytes were written where 4 were announced"):
            upload.write(b"45")
        upload.abort()
        assert store.list() == []

    def test_put_replaces(self, store: Sink) -> None:
        store.put("a", b"1")
        stat = store.put("a", b"22")
        assert store.read("a", max_bytes=2) == b"22"
        assert stat == store.stat("a")

    def test_put_if_absent(self, store: Sink) -> None:
        assert store.put_if_absent("folder/a", b"first") is True
        assert store.put_if_absent("folder/a", b"second") is False
        assert store.read("folder/a", max_bytes=10) == b"first"
        store.delete(["folder/a"])
        assert store.put_if_absent("folder/a", b"third") is True
        assert self.leftovers(store) == []

    def test_of_racers_exactly_one_wins(self, store: Sink) -> None:
        start = threading.Barrier(16)

        def race(number: int) -> bool:
            start.wait()
            return store.put_if_absent("lease", f"racer {number}".encode())

        with ThreadPoolExecutor(16) as pool:
            won = list(pool.map(race, range(16)))
        assert won.count(True) == 1
        assert store.read("lease", max_bytes=20) == f"racer {won.index(True)}".encode()

    @pytest.mark.parametrize(
        "name", ["with space.txt", "ünïcödé/文件.json", "a+b=c&d%20#?.txt", "x/.hidden/y", "-dash"]
    )
    def test_names(self, store: Sink, name: str) -> None:
        stat = store.put(name, name.encode())
        assert store.list() == [stat]
        assert stat.name == name
        assert store.read(name, max_bytes=100) == name.encode()
        assert fetch(store, name, [(0, 2)], stat.version) == [name.encode()[:2]]
        store.delete([name])
        assert store.list() == []

    @pytest.mark.parametrize("name", ["", "/etc/passwd", "../outside", "a/../../outside", "a//b", "./a", "a/", "a\0b"])
    def test_names_stay_inside(self, store: Sink, name: str) -> None:
        actions = (
            lambda: store.stat(name),
            lambda: store.read(name, max_bytes=1),
            lambda: store.read_head(name, 1),
            lambda: fetch(store, name, [(0, 1)]),
            lambda: store.put(name, b""),
            lambda: store.put_if_absent(name, b""),
            lambda: store.open(name, 0),
            lambda: store.delete([name]),
        )
        for action in actions:
            with pytest.raises(CheckpointError, match="not the name of a file inside it"):
                action()

    def test_the_list_is_sorted_and_complete(self, store: Sink) -> None:
        names = (
            ["b", "a/b", "a-b", "a", "é", "z/y/x", "B"]
            if not isinstance_local(store)
            else ["b", "a/b", "a-b", "é", "B"]
        )
        stats = {store.put(name, name.encode()) for name in names}
        assert store.list() == sorted(stats, key=lambda stat: stat.name)

    def test_delete_ignores_what_is_not_there(self, store: Sink) -> None:
        for name in ("x/y/a", "x/b", "c"):
            store.put(name, b"")
        store.delete(["x/y/a", "nothing", "x/nothing/at/all"])
        assert [file.name for file in store.list()] == ["c", "x/b"]
        store.delete([])
        store.delete(["x/b", "c"])
        assert store.list() == []

    def test_readers_and_writers_at_once(self, store: Sink) -> None:
        stat = store_bytes(store, "shared", DATA)

        def work(number: int) -> bool:
            name = f"own/{number}"
            store_bytes(store, name, DATA[number:])
            return (
                fetch(store, "shared", [(number * 100, number * 1000)], stat.version)[0]
                == DATA[number * 100 : number * 1000]
                and store.read(name, max_bytes=len(DATA)) == DATA[number:]
            )

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(work, range(24)))

    def test_a_closed_store_opens_again(self, store: Sink) -> None:
        store.put("a", b"1")
        with contextlib.suppress(AttributeError):
            store.close()
        assert fetch(store, "a", [(0, 1)]) == [b"1"]

    def test_a_change_that_is_refused_changes_nothing(self, store: Sink) -> None:
        """And leaves nothing. Whoever refuses it is asked when it is prepared."""
        for name in ("old", "kept"):
            store_bytes(store, name, b"1")
        before = store.list()

        def refuse() -> None:
            asked.append(store.list())
            raise StorageError("no longer ours")

        for change in _changes(store):
            asked: list[list[FileStat]] = []
            if not isinstance(store, GuardedSink):
                pytest.skip("it has no guard")
            with pytest.raises(StorageError, match="no longer ours"):
                change(store.guarded(refuse))
            assert asked == [before]
            assert store.list() == before
        assert self.leftovers(store) == []

    def test_what_was_prepared_and_then_discarded_is_not_committed(self, store: Sink) -> None:
        """Though its guard was satisfied before: that is what takes the place of a lock."""
        for name in ("old", "kept"):
            store_bytes(store, name, b"1")
        if not isinstance(store, GuardedSink) or not isinstance(store, RemainsSink):
            pytest.skip("it cannot be prepared, or not be discarded")

        def discard() -> None:
            assert store.discard_remains() == 1

        for change in _changes(store, with_delete=isinstance_local(store), with_move=self.prepares_moves):
            with pytest.raises(StorageError, match="removed it while it was being written"):
                change(store.guarded(discard))
            assert [store.read(stat.name, max_bytes=9) for stat in store.list()] == [b"1", b"1"]
        assert self.leftovers(store) == []

    def test_with_a_guard_that_allows_it_all_is_as_without(self, store: Sink) -> None:
        if not isinstance(store, GuardedSink):
            pytest.skip("it has no guard")
        asked: list[None] = []
        guarded = store.guarded(lambda: asked.append(None))
        store_bytes(guarded, "a", DATA)
        guarded.put("b", b"")
        guarded.put("b", b"2")
        if isinstance(guarded, MovingSink):
            guarded.move({"a": "c", "b": "a"})
        else:
            store_bytes(guarded, "c", DATA)
            guarded.put("a", b"2")
            guarded.delete(["b"])
        guarded.delete(["nothing"])
        assert [stat.name for stat in store.list()] == ["a", "c"]
        assert store.read("c", max_bytes=len(DATA)) == DATA
        assert store.read("a", max_bytes=9) == b"2"
        guarded.delete(["a", "c", "nothing"])
        assert store.list() == []
        assert asked
        assert self.leftovers(store) == []


def _changes(store: Sink, *, with_delete: bool = True, with_move: bool = True) -> list[Callable[[Sink], object]]:
    """Every way to change a store with the files ``old`` and ``kept``."""
    found: list[Callable[[Sink], object]] = [
        lambda sink: sink.put(".mergekit-ray/x/new", b"new"),
        lambda sink: _stored(sink, "old", DATA),
    ]
    if not isinstance(store, PublishingSink):  # which may keep it to itself for a while
        found.append(lambda sink: sink.put("old", b"new"))
    if with_delete:
        found.append(lambda sink: sink.delete(["old", "nothing"]))
    if with_move and isinstance(store, MovingSink):
        found.append(lambda sink: cast(MovingSink, sink).move({"kept": "old"}))
    return found


def _stored(sink: Sink, name: str, data: bytes) -> None:
    upload = sink.open(name, len(data))
    try:
        upload.write(data)
        upload.commit()
    finally:
        upload.abort()


def isinstance_local(store: Sink) -> bool:
    """Whether a file and a folder cannot have one name there."""
    return Path(store.uri).is_absolute()
