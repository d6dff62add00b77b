"""The tree of errors: drawn, numbered, pickled, worded."""

from __future__ import annotations

import pickle
import re

import pytest

from mergekit_ray.core import errors
from mergekit_ray.core.errors import ConfigError, InternalError, MergekitRayError, Problem, StorageError


def all_errors() -> list[type[MergekitRayError]]:
    found = [MergekitRayError]
    for kind in found:
        found += kind.__subclasses__()
    return [kind for kind in found if kind.__module__ == errors.__name__]


def test_drawn_tree_is_the_classes_with_their_exit_codes() -> None:
    assert errors.__doc__ is not None
    drawn = {name: int(code) for name, code in re.findall(r"[├└]── (\w+) +(\d+) ", errors.__doc__)}
    assert drawn == {kind.__name__: kind.exit_code for kind in all_errors() if kind is not MergekitRayError}


def test_exit_codes_are_those_of_the_design() -> None:
    codes = {kind.__name__: kind.exit_code for kind in all_errors()}
    assert codes == {
        "MergekitRayError": 1,
        "ConfigError": 2,
        "PlanError": 2,
        "ModelError": 3,
        "CheckpointError": 3,
        "MergeError": 3,
        "StorageError": 4,
        "Interrupted": 130,
        "InternalError": 1,
    }


def test_only_a_failing_store_is_worth_another_try_and_only_if_it_says_so() -> None:
    assert [kind for kind in all_errors() if kind("x").retryable] == [StorageError]
    refused = StorageError("wrong password", retryable=False)
    assert not refused.retryable
    assert not pickle.loads(pickle.dumps(refused)).retryable


@pytest.mark.parametrize("kind", all_errors())
def test_pickling_keeps_everything(kind: type[MergekitRayError]) -> None:
    before = kind("the thing is wrong", where="a.yml:3", remedy="mend it")
    after = pickle.loads(pickle.dumps(before))
    assert type(after) is kind
    assert (after.what, after.where, after.remedy, after.args) == (
        "the thing is wrong",
        "a.yml:3",
        "mend it",
        before.args,
    )
    assert str(after) == str(before) == "a.yml:3: the thing is wrong\n  mend it"


def test_pickling_keeps_the_problems_of_a_recipe() -> None:
    problems = [Problem("r.yml:2", "models[0].weight", "not a number", "write 0.5"), Problem("", "", "empty")]
    after = pickle.loads(pickle.dumps(ConfigError("2 problems", where="r.yml", problems=problems)))
    assert after.problems == tuple(problems)
    assert str(after).splitlines() == [
        "r.yml: 2 problems",
        "  r.yml:2: models[0].weight: not a number",
        "    write 0.5",
        "  empty",
    ]


def test_an_unexpected_error_keeps_its_traceback_across_processes() -> None:
    def broken_function() -> None:
        raise ZeroDivisionError("by nothing")

    with pytest.raises(ZeroDivisionError) as caught:
        broken_function()
    after = pickle.loads(pickle.dumps(InternalError.wrap(caught.value)))
    assert "in broken_function" in after.traceback
    assert after.traceback.rstrip().endswith("ZeroDivisionError: by nothing")
    assert "ZeroDivisionError: by nothing" in after.what
    assert "--debug" in str(after)
    assert InternalError("plain").traceback == ""


@pytest.mark.parametrize(
    ("where", "remedy", "text"),
    [
        (None, None, "gone"),
        ("s3://b/m", None, "s3://b/m: gone"),
        (None, "look", "gone\n  look"),
        ("x", "look", "x: gone\n  look"),
    ],
)
def test_text_says_where_what_and_what_to_do(where: str | None, remedy: str | None, text: str) -> None:
    assert str(StorageError("gone", where=where, remedy=remedy)) == text
