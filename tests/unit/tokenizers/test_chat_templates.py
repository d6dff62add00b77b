"""Where a chat template comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mergekit_ray.checkpoint.adapter import Adapter, adapted
from mergekit_ray.checkpoint.opening import Checkpoint
from mergekit_ray.core.errors import CheckpointError, ConfigError, ModelError
from mergekit_ray.storage.local.store import LocalSource
from mergekit_ray.tokenizers.chat.templates import (
    MAX_TEMPLATE_BYTES,
    NAMED,
    chat_template_of,
    most_common,
    stored_template,
)

WHERE = "recipe.yml:7: chat_template"
LARGE = "{{ x }}" + "x" * 10_000_000


def asked(value: str, files: Mapping[str, str] | None = None) -> str:
    def read_file(path: str) -> str:
        assert files is not None
        if path not in files:
            raise FileNotFoundError(2, "No such file or directory", path)
        return files[path]

    return chat_template_of(value, where=WHERE, read_file=None if files is None else read_file)


def test_a_name_a_text_or_a_file() -> None:
    assert asked("chatml") == asked(" chatml\n") == NAMED["chatml"].read_text()
    assert asked("{% for m in messages %}chatml{% endfor %}") == "{% for m in messages %}chatml{% endfor %}"
    assert asked("{{ x }}.jinja") == "{{ x }}.jinja"
    files = {"own/x.jinja": "{{ x }}\n", "y.TXT": "{{ y }}", "z.jinja2": "{{ z }}"}
    assert [asked(path, files) for path in files] == [*files.values()]


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("chat_ml", "; did you mean 'chatml'?"),
        ("Llama-3", "; did you mean 'llama3'?"),
        ("autos", "; did you mean 'auto'?"),
        ("zzz", ""),
        ("", ""),
        ("template.py", ""),
    ],
)
def test_anything_else_is_refused_with_what_is_accepted(value: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        asked(value, {})
    assert str(caught.value) == (
        f"{WHERE}: {value!r} is not a chat template; accepted: auto, alpaca, chatml, exaone, gemma, llama3, mistral, a "
        f"Jinja template, or a path that ends in .jinja, .jinja2 or .txt{hint}"
    )


def test_a_long_text_without_jinja_is_not_repeated() -> None:
    with pytest.raises(ConfigError) as caught:
        asked("word " * 10_000)
    assert len(str(caught.value)) < 400


def test_a_file_that_cannot_be_read() -> None:
    with pytest.raises(
        ConfigError, match=r"'no\.jinja' cannot be read: No such file or directory\n.*directory you run in"
    ):
        asked("no.jinja", {})
    with pytest.raises(ConfigError, match="the recipe is not, so there is no folder to look in"):
        asked("no.jinja")

    def not_text(path: str) -> str:
        return b"{{ \xff }}".decode()

    with pytest.raises(ConfigError, match=r"'x\.txt' cannot be read: it is not UTF-8 \(byte 3\)"):
        chat_template_of("x.txt", where=WHERE, read_file=not_text)

    def refused(path: str) -> str:
        raise ModelError("no such bucket")

    with pytest.raises(ModelError, match="no such bucket"):
        chat_template_of("x.txt", where=WHERE, read_file=refused)


def test_a_template_has_a_bounded_size_and_is_unicode() -> None:
    for value, files in ((LARGE, None), ("x.jinja", {"x.jinja": LARGE})):
        with pytest.raises(ConfigError, match=r"the chat template has 10\.0 MB, more than the 1\.00 MB allowed"):
            asked(value, files)
    with pytest.raises(ConfigError, match=r"holds '\\ud800', which is not valid Unicode"):
        asked("{{ x }}\ud800")


def model(folder: Path, reference: str = "m", **files: Any) -> Checkpoint:
    """A checkpoint whose folder holds the files, whose names have two underscores for a dot."""
    folder.mkdir(exist_ok=True, parents=True)
    for name, content in files.items():
        data = content if isinstance(content, bytes | str) else json.dumps(content)
        path = folder / name.replace("__", ".")
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    source = LocalSource(str(folder))
    return Checkpoint(source, reference, {}, {}, {}, source.list())


A, B, C = ("{{ messages }} " + letter for letter in "abc")


def test_which_of_a_models_files_counts(tmp_path: Path) -> None:
    """As for transformers."""
    assert stored_template(model(tmp_path, README__md="{{ x }}")) is None
    assert stored_template(model(tmp_path, tokenizer_config__json={"bos_token": "<s>"})) is None
    assert stored_template(model(tmp_path, chat_template__json={"chat_template": C})) == C
    assert stored_template(model(tmp_path, tokenizer_config__json={"chat_template": None})) == C
    assert stored_template(model(tmp_path, tokenizer_config__json={"chat_template": B})) == B
    assert stored_template(model(tmp_path, chat_template__jinja=f"{A} ü\r\n")) == f"{A} ü\r\n"


@pytest.mark.parametrize(
    ("several", "default"),
    [
        ([{"name": "tool_use", "template": B}, {"name": "default", "template": A}], A),
        ({"tool_use": B, "default": A}, A),
        ([{"name": "tool_use", "template": B}], None),
        ([], None),
        ("", ""),
    ],
)
def test_of_several_templates_the_default_counts(several: Any, default: str | None, tmp_path: Path) -> None:
    assert stored_template(model(tmp_path, tokenizer_config__json={"chat_template": several})) == default


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("chat_template__jinja", LARGE, r"has 10\.0 MB, more than the 1\.00 MB allowed"),
        ("chat_template__jinja", b"{{ \xff }}", r"the chat template is not UTF-8 \(byte 3\)"),
        ("tokenizer_config__json", {"chat_template": LARGE}, r"has 10\.0 MB, more than the 1\.00 MB allowed"),
        ("tokenizer_config__json", {"chat_template": 7}, r"`chat_template` is int where transformers has a text"),
        ("tokenizer_config__json", {"chat_template": ["x"]}, r"`chat_template` is list where transformers has a text"),
        ("tokenizer_config__json", {"chat_template": {"default": [A]}}, r"`chat_template` is list where"),
        ("tokenizer_config__json", "{", "is not valid JSON"),
        ("chat_template__json", "[]", "is not a JSON object"),
    ],
)
def test_a_malformed_file_is_named(name: str, content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        stored_template(model(tmp_path, **{name: content}))
    assert name.replace("__", ".") in str(caught.value)


def test_the_largest_template_is_read(tmp_path: Path) -> None:
    most = "x" * MAX_TEMPLATE_BYTES
    assert stored_template(model(tmp_path, chat_template__jinja=most)) == most


def test_a_tokenizer_saved_with_an_adapter_counts(tmp_path: Path) -> None:
    base = model(tmp_path / "base", chat_template__jinja=A, tokenizer_config__json={})
    cases: list[tuple[dict[str, Any], str | None]] = [
        ({}, A),
        ({"chat_template__jinja": B}, B),
        ({"tokenizer_config__json": {"chat_template": C}}, C),
        ({"tokenizer_config__json": {}}, None),
    ]
    for index, (files, expected) in enumerate(cases):
        folder = tmp_path / f"adapter{index}"
        no_config: Any = None
        adapter = Adapter(model(folder, **files), no_config, {}, {}, {})
        assert stored_template(adapted(base, adapter)) == expected


def models(folder: Path, *templates: str | None) -> list[Checkpoint]:
    return [
        model(folder / str(index), f"m{index}", **({} if text is None else {"chat_template__jinja": text}))
        for index, text in enumerate(templates)
    ]


def test_auto_takes_the_most_common_template(tmp_path: Path) -> None:
    assert most_common(models(tmp_path / "one", A)) == (A, [])
    warning = "chat_template: auto takes the template of m1, m3 and m4; m0 and m5 have another"
    assert most_common(models(tmp_path, B, A, None, f"{A}\n", A, C)) == (A, [warning])


def test_of_equally_many_the_first_listed_counts(tmp_path: Path) -> None:
    found = most_common(models(tmp_path, None, B, A, A, B, C))
    assert found == (B, ["chat_template: auto takes the template of m1 and m4; m2, m3 and m5 have another"])
    assert most_common(models(tmp_path / "two", A, B)) == (
        A,
        ["chat_template: auto takes the template of m0; m1 has another"],
    )


def test_line_breaks_make_no_other_template(tmp_path: Path) -> None:
    assert most_common(models(tmp_path, "a\r\nb{{ x }}\r\n", "a\nb{{ x }}")) == ("a\r\nb{{ x }}\r\n", [])


def test_models_without_a_template_have_none_in_common(tmp_path: Path) -> None:
    assert most_common(models(tmp_path, None, None)) is None
    assert most_common([]) is None
