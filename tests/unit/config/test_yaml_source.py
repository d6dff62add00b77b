from __future__ import annotations

import math
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mergekit_ray.config.yaml_source import MAX_TEXT_BYTES, format_path, parse_plain, read_yaml
from mergekit_ray.core.errors import ConfigError


def failure(text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        read_yaml(text, "r.yml")
    (problem,) = caught.value.problems
    assert problem.what in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        (".5e1", 5.0),
        ("1E5", 1e5),
        ("1.", 1.0),
        ("-2.5", -2.5),
        ("1_000", 1000),
        ("0x1F", 31),
        ("yes", True),
        ("Off", False),
        ("~", None),
        ("", None),
        (".inf", math.inf),
        ("010", "010"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("'1e-3'", "1e-3"),
        ("'yes'", "yes"),
        ("e3", "e3"),
        ("1e", "1e"),
        (".", "."),
        ("!!str 5", "5"),
        ("!!float 5", 5.0),
        ("9" * 500, "9" * 500),
    ],
)
def test_scalars(text: str, value: object) -> None:
    found = read_yaml(f"x: {text}\n").data["x"]
    assert found == value
    assert type(found) is type(value)


def test_every_key_and_item_knows_its_line() -> None:
    document = read_yaml("a:\n  b: 1\n  c:\n    - x\n    - {d: 2,\n       e: 3}\n")
    lines = {format_path(path): position[0] for path, position in document.positions.items()}
    assert lines == {"": 1, "a": 1, "a.b": 2, "a.c": 3, "a.c[0]": 4, "a.c[1]": 5, "a.c[1].d": 5, "a.c[1].e": 6}
    assert document.position(("a", "c", 1, "missing", "deeper")) == (5, 7)


def test_anchors_and_merge_keys() -> None:
    text = """\
one: &one {a: 1, b: 1}
two: &two
  b: 2
  c: 2
both: {<<: [*one, *two], c: 3}
again: *two
chained:
  <<: &three {<<: *one, d: 4}
"""
    data = read_yaml(text).data
    assert data["both"] == {"a": 1, "b": 1, "c": 3}
    assert data["again"] == {"b": 2, "c": 2}
    assert data["chained"] == {"a": 1, "b": 1, "d": 4}
    assert data == yaml.safe_load(text)
    assert read_yaml(text).positions["again", "c"] == (4, 3)
    assert read_yaml('{"<<": 1}').data == {"<<": 1}


def test_duplicate_keys_are_reported_with_both_lines() -> None:
    document = read_yaml("a: 1\nm: {b: 1}\na: 2\nl:\n  - x: 1\n    x: 2\n")
    assert [(format_path(path), position[0]) for path, position, _, _ in document.problems] == [("a", 3), ("l[0].x", 6)]
    assert "first at line 1" in next(what for path, _, what, _ in document.problems if path == ("a",))


@pytest.mark.parametrize(
    ("text", "line", "words", "hint"),
    [
        ("a: [1, 2", 1, "not valid YAML", "brackets"),
        ("a: 1\nb:\n\tc: 2\n", 3, "not valid YAML", "spaces"),
        ("a: 1\nb: 'x\nc: 3", 3, "that began at line 2", ""),
        ("a: 1\nb: *nothing\n", 2, "*nothing refers to no anchor", "&nothing"),
        ("a: &a\n  b: *a\n", 2, "never ends", ""),
        ("a: 1\nb: !!python/object/apply:os.system [x]\n", 2, "means nothing", "remove the tag"),
        ("a: !mine 3\n", 1, "'!mine'", "remove the tag"),
        ("a: !!int x\n", 1, "is not what its tag", ""),
        ("a: !!set {x}\n", 1, "!!set", ""),
        ("a: 1\n? [x, y]\n: 1\n", 2, "where a key should", ""),
        ("a:\n  <<: 3\n", 2, "<< merges mappings", ""),
        ("a: 1\nb: \x07\n", 2, "'\\x07' is not allowed", "UTF-8"),
    ],
)
def test_what_cannot_be_read_names_the_line(text: str, line: int, words: str, hint: str) -> None:
    error = failure(text)
    assert error.problems[0].where == f"r.yml:{line}"
    assert words in error.problems[0].what
    assert hint in error.problems[0].hint


def test_documents_are_stages_with_lines_of_their_own() -> None:
    document = read_yaml("---\na: &x 1\n---\nb:\n  - c: 2\n---\n", "r.yml")
    assert document.data == {"stages": [{"a": 1}, {"b": [{"c": 2}]}]}
    assert document.position(("stages", 1, "b", 0, "c")) == (5, 5)
    with pytest.raises(ConfigError, match="refers to no anchor"):
        read_yaml("a: &x 1\n---\nb: *x\n", "r.yml")


@pytest.mark.parametrize("text", ["a: 1\n---\n", "---\na: 1\n---\n...\n", "---\n# nothing\n---\na: 1\n"])
def test_documents_that_say_nothing_are_no_stages(text: str) -> None:
    assert read_yaml(text, "r.yml").data == {"a": 1}


@pytest.mark.parametrize("text", ["", "   \n# only a comment\n"])
def test_an_empty_text_says_what_to_write(text: str) -> None:
    assert "merge_method" in failure(text).problems[0].hint


@pytest.mark.parametrize(
    "text",
    [
        "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)),
        "a0: &a0 {k: 1}\n" + "".join(f"a{i}: &a{i} {{x: *a{i - 1}, y: *a{i - 1}}}\n" for i in range(1, 40)),
        "a0: &a0 {" + ", ".join(f"k{i}: 1" for i in range(500)) + "}\nb: {<<: [" + ", ".join(["*a0"] * 5000) + "]}\n",
    ],
    ids=["lists", "mappings", "merge keys"],
)
def test_alias_bombs_are_refused_before_they_grow(text: str) -> None:
    assert "once its aliases are expanded" in failure(text).problems[0].what


def test_depth_is_bounded_before_and_after_aliases() -> None:
    assert "deep" in failure("[" * 100_000).problems[0].what
    chain = "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 100))
    assert "deep" in failure(chain).problems[0].what
    merges = "a0: &a0 {k: 1}\n" + "".join(f"a{i}: &a{i} {{<<: *a{i - 1}}}\n" for i in range(1, 3000))
    assert read_yaml(merges).data["a2999"] == {"k": 1}


def test_size_is_bounded() -> None:
    assert "4 MiB" in failure("a" * (MAX_TEXT_BYTES + 1)).problems[0].what


def test_paths_are_printed_as_in_yaml() -> None:
    assert format_path(("models", 1, "parameters", "weight")) == "models[1].parameters.weight"
    assert format_path(("modules", "a.b c", "slices", 0)) == 'modules["a.b c"].slices[0]'


# PyYAML writes a next-line character bare and itself reads it back as a space.
CHARACTERS = st.characters(codec="utf-8", exclude_characters="\x85")
# PyYAML writes words such as 1e5 without quotes, because to it they are no numbers.
WORDS = st.text(CHARACTERS, max_size=8).filter(lambda word: not isinstance(parse_plain(word), float))
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False) | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(CHARACTERS, max_size=6), inner, max_size=4),
    max_leaves=20,
)


@given(PLAIN, st.booleans())
def test_what_yaml_writes_is_read_back(data: Any, flow: bool) -> None:
    text = yaml.safe_dump({"root": data}, default_flow_style=flow, allow_unicode=flow)
    assert read_yaml(text).data == {"root": data}


@given(st.text(max_size=200) | st.text(st.sampled_from("a: -[]{}&*!<'\"\n\t|>?#%@,1e.~"), max_size=80))
def test_arbitrary_text_is_read_or_refused(text: str) -> None:
    try:
        document = read_yaml(text)
    except ConfigError as error:
        num_problems = len(error.problems)
    else:
        assert () in document.positions
        num_problems = 1
    assert num_problems == 1
