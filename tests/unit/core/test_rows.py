"""Rows in another order: what they are read from, what they need, what is refused."""

from __future__ import annotations

import json
import pickle

import pytest

from mergekit_ray.core.declaration import Access
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.expressions import (
    ZEROS,
    Cast,
    Concat,
    Constant,
    Expression,
    Gather,
    Load,
    LowRank,
    Merge,
    Noise,
    Rows,
    Runs,
    Scale,
    Stored,
    from_json,
    gathered,
    is_copy,
    loads,
    rows,
    stored,
    to_json,
)
from mergekit_ray.core.plan import OutputTensor, Shard
from mergekit_ray.core.tensors import Location, TensorSpec
from support.references.rows import mapping, runs_of

WIDTH = 3


def load(model: str, *shape: int, dtype: DType = DType.BF16, start: int = 10) -> Load:
    spec = TensorSpec(f"of {model}", dtype, shape or (8, WIDTH))
    return Load(model, spec, Location(f"{model}.safetensors", start, start + spec.num_bytes))


def spec_of(*shape: int, dtype: DType = DType.BF16) -> TensorSpec:
    return TensorSpec("new", dtype, shape)


class TestRuns:
    def test_neighbours_are_one_and_empty_ones_none(self) -> None:
        found = Runs.of([(0, 4, 1), (0, 5, 2), (1, 7, 1), (1, 0, 0), (1, 8, 1), (-1, 9, 1), (-1, 4, 2), (0, 7, 1)])
        assert list(found) == [(0, 4, 3), (1, 7, 2), (ZEROS, 0, 3), (0, 7, 1)]
        assert found == Runs.of_rows([0, 0, 0, 1, 1, -1, -1, -1, 0], [4, 5, 6, 7, 8, 3, 2, 1, 7])
        assert list(Runs.of([])) == []
        assert Runs.of([]).num_rows == 0

    @pytest.mark.parametrize("seed", range(5))
    def test_any_run_of_rows_is_found(self, seed: int) -> None:
        wanted = mapping(seed, [9, 0, 30], 101)
        runs = runs_of(wanted)
        assert runs.num_rows == 101
        for start in range(0, 101, 7):
            for stop in (start, min(start + 1, 101), min(start + 5, 101), 101):
                part, row = runs.rows(start, stop)
                row[part == ZEROS] = 0
                assert list(zip(part.tolist(), row.tolist(), strict=True)) == wanted[start:stop]
                assert sum(count for _, _, count in runs.within(start, stop).tolist()) == stop - start
                for index, (first, last) in runs.spans(start, stop).items():
                    of_part = [row for part, row in wanted[start:stop] if part == index]
                    assert (first, last) == (min(of_part), max(of_part) + 1)

    def test_a_number_that_is_none_is_refused(self) -> None:
        for wrong in [(0, -1, 1), (-2, 0, 1), (0, 0, -1), (0, 1 << 31, 1)]:
            with pytest.raises(ValueError, match="a run is a part, its first row and a number of rows"):
                Runs.of([wrong])

    def test_parts_out_of_order(self) -> None:
        assert Runs.of([(0, 0, 5), (1, 3, 1), (0, 6, 1), (1, 4, 1)]).turns == {}
        assert Runs.of([(0, 5, 1), (1, 3, 1), (0, 5, 1), (1, 3, 2)]).turns == {}, "the same row again"
        assert Runs.of([(0, 0, 5), (1, 3, 1), (0, 6, 1), (1, 2, 1)]).turns == {1: 1}
        assert Runs.of([(-1, 0, 5), (1, 3, 1), (-1, 0, 1)]).turns == {}

    def test_a_pickle_is_as_small_as_the_data(self) -> None:
        runs = Runs.of_rows([0] * 20_000, [(row * 7919) % 20_000 for row in range(20_000)])
        assert runs.num_rows == len(runs) == 20_000
        packed = pickle.dumps(runs)
        assert len(packed) < 12 * 20_000 + 200
        assert pickle.loads(packed) == runs


class TestGather:
    def test_json_round_trip(self) -> None:
        tree = Gather((load("a"), load("b")), spec_of(4, WIDTH), Runs.of([(1, 6, 2), (ZEROS, 0, 1), (0, 0, 1)]))
        assert from_json(json.loads(json.dumps(to_json(tree)))) == tree
        assert hash(from_json(to_json(tree))) == hash(tree)
        assert pickle.loads(pickle.dumps(tree)) == tree

    def test_is_a_leaf_that_is_copied(self) -> None:
        tree = gathered([load("a"), load("b")], spec_of(3, WIDTH), Runs.of([(1, 6, 2), (0, 0, 1)]))
        assert isinstance(tree, Gather)
        assert is_copy(tree)
        assert list(tree.needs(2, 5)) == [(tree, 2, 5)]
        assert list(stored(tree)) == [tree]
        assert list(loads(tree)) == [load("a"), load("b")]
        assert tree.access is Access.ELEMENTWISE
        assert tree.held(2, 4) == (0, 6)
        assert tree.held(3, 3) == (3, 3)

    def test_its_bytes_are_those_of_the_rows_it_reads(self) -> None:
        wanted = mapping(3, [8, 8], 50, zeros=0.4)
        tree = gathered([load("a"), load("b")], spec_of(50, WIDTH), runs_of(wanted))
        is_read = [part != ZEROS for part, _ in wanted for _ in range(WIDTH)]
        for start in range(0, 150, 11):
            for stop in range(start, 151, 13):
                assert tree.read_bytes(start, stop) == 2 * sum(is_read[start:stop])
        merge = Merge("linear", spec_of(50, WIDTH), (tree, tree), None, {}, ({}, {}), ("", ""))
        shard = Shard("f", b"", (OutputTensor(merge.spec, merge, 0, 300), OutputTensor(tree.spec, tree, 300, 600)))
        assert shard.read_bytes == 2 * 2 * sum(is_read), "once for each tensor that uses them"

    def test_what_is_read_once_counts_once_and_another_selection_for_itself(self) -> None:
        first, second = (gathered([load("a")], spec_of(2, WIDTH), Runs.of_rows([0, 0], [row, 0])) for row in (4, 5))
        merge = Merge("linear", spec_of(2, WIDTH), (first, second, first), None, {}, ({},) * 3, ("",) * 3)
        assert list(stored(merge)) == [first, second]
        assert list(loads(merge)) == [load("a")]

    def test_an_element_is_traced_to_its_file(self) -> None:
        tree = gathered([load("a"), load("b")], spec_of(4, WIDTH), Runs.of([(1, 6, 2), (ZEROS, 0, 1), (0, 2, 1)]))
        assert tree.origin(4) == (load("b"), 7 * WIDTH + 1)
        assert tree.origin(11) == (load("a"), 2 * WIDTH + 2)
        with pytest.raises(ValueError, match="row 2 of 'new' is zeros"):
            tree.origin(6)

    def test_rows_in_one_place_are_a_load(self) -> None:
        whole = gathered([load("a"), load("b")], spec_of(8, WIDTH), Runs.of([(1, 0, 5), (1, 5, 3)]))
        assert whole == load("b")
        some = gathered([load("a", start=20)], spec_of(2, WIDTH), Runs.of([(0, 3, 2)]))
        place = Location("a.safetensors", 20 + 3 * WIDTH * 2, 20 + 5 * WIDTH * 2)
        assert some == Load("a", TensorSpec("of a", DType.BF16, (2, WIDTH)), place)

    def test_parts_that_are_not_used_are_left_out(self) -> None:
        tree = gathered(
            [load(name) for name in "abc"], spec_of(3, WIDTH), Runs.of([(2, 1, 1), (ZEROS, 0, 1), (1, 1, 1)])
        )
        assert isinstance(tree, Gather)
        assert [part.model for part in tree.parts] == ["b", "c"]
        assert list(tree.runs) == [(1, 1, 1), (ZEROS, 0, 1), (0, 1, 1)]

    @pytest.mark.parametrize("shape", [(5,), (1, 5), (5, 1)])
    @pytest.mark.parametrize("part", [(8,), (1, 8), (8, 1)])
    def test_a_bias_has_rows_of_one_element(self, shape: tuple[int, ...], part: tuple[int, ...]) -> None:
        tree = gathered([load("a", *part)], spec_of(*shape), Runs.of_rows([0] * 5, [7, 1, 2, 0, 0]))
        assert isinstance(tree, Gather)
        assert tree.row_elements == 1
        assert tree.origin(0) == (load("a", *part), 7)

    def test_may_be_of_nothing(self) -> None:
        nothing = gathered([load("a")], spec_of(0, WIDTH), Runs.of([]))
        assert nothing.read_bytes(0, 0) == 0
        assert list(loads(nothing)) == []
        zeros = gathered([load("a")], spec_of(2, WIDTH), Runs.of([(ZEROS, 0, 2)]))
        assert zeros.read_bytes(0, 6) == 0

    @pytest.mark.parametrize(
        ("parts", "spec", "runs", "message"),
        [
            ([load("a")], spec_of(4, WIDTH), [(0, 0, 3)], r"'new' is \[4, 3\], and its runs have 3 rows"),
            ([load("a")], spec_of(2, WIDTH), [(0, 7, 2)], "'new' takes row 8 of 'of a', which has 8"),
            ([load("a")], spec_of(1, WIDTH), [(1, 0, 1)], "'new' has runs that are none of its 1 parts"),
            ([load("a", 8, 2)], spec_of(1, WIDTH), [(0, 0, 1)], r"rows of 3 elements, and its part is \[8, 2\]"),
            ([load("a", 4, 6)], spec_of(2, WIDTH), [(0, 0, 2)], r"rows of 3 elements, and its part is \[4, 6\]"),
            ([load("a", 24)], spec_of(2, WIDTH), [(0, 0, 2)], r"rows of 3 elements, and its part is \[24\]"),
            ([load("a", dtype=DType.F16)], spec_of(1, WIDTH), [(0, 0, 1)], "'new' is BF16, and its part 'of a' F16"),
        ],
    )
    def test_what_makes_no_tensor_is_refused(
        self, parts: list[Load], spec: TensorSpec, runs: list[tuple[int, int, int]], message: str
    ) -> None:
        for make in (gathered, rows, Gather, Rows):
            with pytest.raises(ValueError, match=message):
                make(tuple(parts), spec, Runs.of(runs))  # type: ignore[operator] # either constructor

    def test_json_that_lies_is_refused(self) -> None:
        data = to_json(Gather((load("a"),), spec_of(2, WIDTH), Runs.of_rows([0, 0], [1, 0])))
        for place, wrong in [
            (3, "AAAA"),
            (3, "not base64!"),
            (3, Runs(b"\0" * 12).to_json()),
            (3, Runs(b"\xff" * 24).to_json()),
            (1, [to_json(Constant(spec_of(8, WIDTH), 0.0))]),
        ]:
            lie = list(data)
            lie[place] = wrong
            with pytest.raises(ValueError, match="not an expression: \\['gather'\\]"):
                from_json(lie)


def constant(num_rows: int = 4) -> Constant:
    return Constant(spec_of(num_rows, WIDTH), 1.0)


def cast(model: str) -> Expression:
    return Cast(load(model, dtype=DType.F32), DType.BF16)


def noisy(model: str) -> Expression:
    """Each of its rows is made of its place."""
    return Noise(load(model), "normal", 1.0, "key", DType.BF16)


class TestRows:
    def test_json_round_trip(self) -> None:
        tree = rows([load("a"), noisy("b")], spec_of(3, WIDTH), Runs.of([(1, 6, 2), (0, 0, 1)]))
        assert isinstance(tree, Rows)
        assert from_json(json.loads(json.dumps(to_json(tree)))) == tree
        assert not is_copy(tree)

    def test_stored_parts_alone_are_a_gather(self) -> None:
        inner = gathered([load("a"), load("b")], spec_of(4, WIDTH), Runs.of([(1, 6, 2), (ZEROS, 0, 1), (0, 3, 1)]))
        wanted = Runs.of_rows([1, 0, 1, 1, ZEROS, 1], [3, 7, 2, 0, 0, 1])
        tree = rows([load("c"), inner], spec_of(6, WIDTH), wanted)
        assert isinstance(tree, Gather)
        named = [None if part == ZEROS else (tree.parts[part].model, first, count) for part, first, count in tree.runs]
        assert named == [("a", 3, 1), ("c", 7, 1), None, ("b", 6, 1), None, ("b", 7, 1)]

    def test_all_of_one_part_is_the_part(self) -> None:
        assert rows([cast("a"), cast("b")], spec_of(8, WIDTH), Runs.of([(1, 0, 8)])) == cast("b")

    def test_what_is_stored_is_read_in_the_order_in_which_it_is_used(self) -> None:
        wanted = Runs.of_rows([0, 2, 0, 1, ZEROS, 2, 1], [5, 0, 2, 7, 0, 1, 3])
        tree = rows([load("a"), load("b"), noisy("c")], spec_of(7, WIDTH), wanted)
        assert isinstance(tree, Rows)
        below, computed = tree.parts
        assert isinstance(below, Gather)
        assert [below.origin(row * WIDTH) for row in range(4)] == [
            (load("a"), 5 * WIDTH),
            (load("a"), 2 * WIDTH),
            (load("b"), 7 * WIDTH),
            (load("b"), 3 * WIDTH),
        ]
        assert computed == noisy("c")
        assert list(tree.runs) == [(0, 0, 1), (1, 0, 1), (0, 1, 2), (ZEROS, 0, 1), (1, 1, 1), (0, 3, 1)]
        assert tree.access is Access.ELEMENTWISE
        assert list(tree.needs(WIDTH, 3 * WIDTH)) == [(below, WIDTH, 2 * WIDTH), (load("c"), 0, WIDTH)]

    def test_rows_of_a_computed_part_out_of_order_are_made_at_one_go(self) -> None:
        tree = rows([noisy("a")], spec_of(3, WIDTH), Runs.of_rows([0] * 3, [4, 2, 3]))
        assert tree.access is Access.REDUCE
        [need] = tree.needs(0, 3 * WIDTH)
        assert need == (load("a"), 2 * WIDTH, 5 * WIDTH)
        assert rows([constant()], spec_of(3, WIDTH), Runs.of_rows([0] * 3, [3, 2, 3])).access is Access.ELEMENTWISE

    def test_parts_that_share_an_input_are_made_at_one_go(self) -> None:
        scaled = Scale(noisy("a"), 0.5, DType.BF16)
        assert rows([noisy("a"), scaled], spec_of(2, WIDTH), Runs.of_rows([0, 1], [0, 1])).access is Access.REDUCE
        ends = [
            Noise(Concat((load(name), noisy("a")), spec_of(16, WIDTH)), "normal", 1.0, name, DType.BF16)
            for name in "bc"
        ]
        assert rows(ends, spec_of(2, WIDTH), Runs.of_rows([0, 1], [0, 9])).access is Access.REDUCE

    def test_parts_may_share_what_is_read_as_a_whole_anyhow(self) -> None:
        a = load("a", 2, WIDTH)
        low, high = (LowRank(load(x), a, load(f"b of {x}", 8, 2), 1.0, dtype=DType.BF16) for x in "xy")
        tree = rows([low, high], spec_of(4, WIDTH), Runs.of_rows([0, 1, 0, 1], [5, 5, 0, 0]))
        assert isinstance(tree, Rows)
        assert tree.access is Access.ELEMENTWISE
        assert len(list(tree.needs(0, 12))) == 6

    def test_a_part_that_is_seen_as_a_whole_is_read_as_a_whole(self) -> None:
        pair = (load("b"), load("c"))
        part = Merge("slerp", spec_of(8, WIDTH), pair, None, {"t": 0.5}, ({}, {}), ("", ""))
        tree = rows([load("a"), part], spec_of(2, WIDTH), Runs.of_rows([0, 1], [0, 1]))
        assert tree.access is Access.REDUCE
        assert [(leaf.read_from[0].model, first, last) for leaf, first, last in tree.needs(0, 6)] == [
            ("a", 0, 3),
            ("b", 0, 24),
            ("c", 0, 24),
        ]

    def test_scratch_and_units_are_those_of_the_parts(self) -> None:
        norms = load("m", WIDTH)
        low = LowRank(load("x"), load("a", 2, 8), load("b", WIDTH, 2), 1.0, True, DType.BF16, norms)
        tree = rows([low, load("y")], spec_of(3, WIDTH), Runs.of_rows([0, 1, 0], [1, 4, 2]))
        assert tree.scratch_bytes == low.scratch_bytes > 0
        assert tree.chunk_bytes == low.chunk_bytes + 3 * 8
        assert tree.unit == WIDTH

    def test_where_a_row_is_made_of_the_same_rows_only_these_are_read(self) -> None:
        wanted = Runs.of_rows([0] * 3, [6, 2, 4])

        def selected(part: Load, *shape: int) -> Stored:
            return gathered([part], TensorSpec(part.spec.name, part.spec.dtype, (3, *shape)), wanted)

        x, a, b, m = load("x"), load("a", 2, WIDTH), load("b", 8, 2), load("m", 8)
        low = LowRank(x, a, b, 1.0, dtype=DType.BF16, magnitude=m)
        tree = rows([Scale(low, 0.5, DType.BF16)], spec_of(3, WIDTH), wanted)
        inner = LowRank(selected(x, WIDTH), a, selected(b, 2), 1.0, dtype=DType.BF16, magnitude=selected(m))
        assert tree == Scale(inner, 0.5, DType.BF16)
        assert tree.access is Access.ELEMENTWISE

    def test_of_a_transposed_lora_columns_are_selected(self) -> None:
        x, a, b = load("x"), load("a", 2, 9), load("b", WIDTH, 2)
        low = LowRank(x, a, b, 1.0, True, DType.BF16)
        tree = rows([low], spec_of(3, WIDTH), Runs.of_rows([0] * 3, [6, 2, 4]))
        matrix = gathered([x], TensorSpec("of x", DType.BF16, (3, WIDTH)), Runs.of_rows([0] * 3, [6, 2, 4]))
        assert tree == LowRank(matrix, a, b, 1.0, True, DType.BF16, None, Runs.of_rows([0] * 3, [6, 2, 4]))
        assert tree.access is Access.ELEMENTWISE
        assert tree.scratch_bytes == low.scratch_bytes + 2 * 3 * 8
        assert from_json(json.loads(json.dumps(to_json(tree)))) == tree
        again = rows([tree], spec_of(2, WIDTH), Runs.of_rows([0] * 2, [2, 0]))
        assert isinstance(again, LowRank)
        assert again.selected == Runs.of_rows([0] * 2, [4, 6])
        with_norms = LowRank(x, a, b, 1.0, True, DType.BF16, load("m", WIDTH))
        whole = rows([with_norms], spec_of(3, WIDTH), Runs.of_rows([0] * 3, [6, 2, 4]))
        assert whole == Rows((with_norms,), spec_of(3, WIDTH), Runs.of_rows([0] * 3, [6, 2, 4]))

    @pytest.mark.parametrize("selected", [[9], [0, 1]])
    def test_columns_that_are_not_there_are_refused(self, selected: list[int]) -> None:
        parts = load("x", 1, WIDTH), load("a", 2, 9), load("b", WIDTH, 2)
        with pytest.raises(ValueError, match=r"takes row 9|its runs have 2 rows"):
            LowRank(*parts, 1.0, True, DType.BF16, None, Runs.of_rows([0] * len(selected), selected))
        with pytest.raises(ValueError, match="transposed factors that have no magnitude"):
            LowRank(*parts, 1.0, False, DType.BF16, None, Runs.of_rows([0], [0]))
        with pytest.raises(ValueError, match="transposed factors that have no magnitude"):
            LowRank(*parts, 1.0, True, DType.BF16, None, Runs.of_rows([ZEROS], [0]))

    def test_parts_end_to_end_are_looked_into(self) -> None:
        inner = Concat((load("a", 2, WIDTH), noisy("b"), load("c", 1, WIDTH)), spec_of(11, WIDTH))
        tree = rows([inner], spec_of(4, WIDTH), Runs.of_rows([0] * 4, [10, 5, 1, 4]))
        assert isinstance(tree, Rows)
        below, computed = tree.parts
        assert [below.origin(row * WIDTH)[0].model for row in range(2)] == ["c", "a"]  # type: ignore[attr-defined] # a Gather
        assert computed == noisy("b")
        assert list(tree.runs) == [(0, 0, 1), (1, 3, 1), (0, 1, 1), (1, 2, 1)]
        nested = rows([tree, load("d")], spec_of(2, WIDTH), Runs.of_rows([0, 1], [3, 0]))
        assert list(loads(nested)) == [load("d", 1, WIDTH), load("b")]
