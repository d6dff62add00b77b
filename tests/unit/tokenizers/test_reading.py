"""Reading tokenizers: the ids are those of transformers, and what is wrong with a file is said."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from mergekit_ray.checkpoint.adapter import AdaptedCheckpoint
from mergekit_ray.checkpoint.opening import Checkpoint
from mergekit_ray.checkpoint.side_files import MAX_SIDE_FILE_BYTES
from mergekit_ray.core.errors import MergekitRayError, ModelError, PlanError
from mergekit_ray.tokenizers.reading import read_tokenizer
from mergekit_ray.tokenizers.uniting import united, with_tokens
from mergekit_ray.tokenizers.writing import files_of
from support.failures.hostile_values import changed
from support.tokenizers.texts import TEXTS
from support.tokenizers.tiny import KINDS, byte_level, data_of, opened, read, save, unigram, with_added

FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def token(content: str, *, special: bool = True) -> dict[str, Any]:
    return {"content": content, **FLAGS, "special": special}


MODEL = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}
SMALL: dict[str, Any] = {"added_tokens": [{"id": 3, **token("X")}], "model": MODEL}

SETTINGS: list[dict[str, Any]] = [
    {},
    {"tokenizer_config": {"pad_token": "P", "bos_token": "Q", "additional_special_tokens": ["E"]}},
    {"tokenizer_config": {"eos_token": {**token("S"), "__type": "AddedToken"}, "extra_special_tokens": ["E"]}},
    {"tokenizer_config": {"image_token": "I", "extra_special_tokens": {"audio_token": "U"}}},
    {"tokenizer_config": {"pad_token": "P", "added_tokens_decoder": {"4": token("Y"), "3": token("X")}}},
    {
        "tokenizer_config": {"pad_token": "P", "added_tokens_decoder": {"3": token("X")}},
        "special_tokens_map": {"eos_token": "S"},
        "added_tokens": {"Z": 9},
    },
    {"special_tokens_map": {"eos_token": "S", "pad_token": token("X")}, "added_tokens": {"Z": 4, "X": 3}},
    {"tokenizer_config": {"pad_token": None, "eos_token": "a"}, "special_tokens_map": {"eos_token": "b"}},
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_read_as_transformers_reads_it(kind: str, tmp_path: Path) -> None:
    checkpoint = save(
        tmp_path, with_added(KINDS[kind](), "<|a|>", "<|b|>"), {"eos_token": "<|b|>", "pad_token": "<pad>"}
    )
    found, loaded = read(checkpoint), AutoTokenizer.from_pretrained(tmp_path)
    assert found.ids == loaded.get_vocab()
    assert found.special == {"eos_token_id": loaded.eos_token_id, "pad_token_id": loaded.pad_token_id}
    assert found.names() == {number: text for text, number in found.ids.items()}
    assert found.reference == checkpoint.reference


@pytest.mark.parametrize("said", SETTINGS)
def test_tokens_that_only_settings_name_get_transformers_ids(said: dict[str, Any], tmp_path: Path) -> None:
    config = {"tokenizer_class": "TokenizersBackend", **said.get("tokenizer_config", {})}
    found = read(save(tmp_path, json.dumps(SMALL), **{**said, "tokenizer_config": config}))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert found.ids == loaded.get_vocab()
    assert found.special == {
        f"{key}_id": loaded.convert_tokens_to_ids(text) for key, text in loaded.special_tokens_map.items()
    }
    flags = {text: {"special": each["special"], "normalized": each["normalized"]} for text, each in found.added.items()}
    assert flags == {
        each.content: {"special": each.special, "normalized": each.normalized}
        for each in loaded.added_tokens_decoder.values()
    }


def test_none_without_a_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "generation_config.json").write_text("{}")
    assert read_tokenizer(opened(tmp_path)) is None


def test_old_files_do_not_name_their_kind(tmp_path: Path) -> None:
    for kind, make in KINDS.items():
        data = data_of(make())
        said = data["model"].pop("type")
        assert read(save(tmp_path / kind, json.dumps(data))).kind == said


def test_an_adapter_that_brings_a_tokenizer_has_it(tmp_path: Path) -> None:
    base = save(tmp_path / "base", byte_level())
    brought = save(tmp_path / "adapter", with_added(byte_level(), "<|a|>"))

    class Adapter:
        checkpoint = brought

    attributes = {each.name: getattr(base, each.name) for each in fields(Checkpoint)}
    adapted = AdaptedCheckpoint(**{**attributes, "side_files": []}, adapter=Adapter())  # type: ignore[arg-type] # fields by name
    assert "<|a|>" in read(adapted).ids


def test_a_vocabulary_and_merges_are_converted(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.model.save(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|e|>"})
    )
    found, own = read(opened(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    assert found.kind == "BPE"
    assert found.ids == own.get_vocab()
    assert found.special == {
        f"{key}_id": own.convert_tokens_to_ids(text) for key, text in own.special_tokens_map.items()
    }
    assert found.special["bos_token_id"] == own.bos_token_id  # which only the class names
    (tmp_path / "new").mkdir()
    for name, text in files_of(found).items():
        (tmp_path / "new" / name).write_text(text)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "new")
    for text in TEXTS:
        assert loaded.encode(text) == tokenizer.encode(text).ids


@pytest.mark.parametrize("name", ["tokenizer.model", "spiece.model", "vocab.txt", "qwen.tiktoken"])
def test_what_transformers_cannot_convert_is_refused_by_name(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x0a\xff no model")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ModelError, match=f"no tokenizer.json, and transformers cannot make one of {name}") as caught:
        read_tokenizer(opened(tmp_path))
    assert str(tmp_path) not in str(caught.value)
    assert "save_pretrained" in str(caught.value)


def test_without_transformers_the_remedy_is_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(PlanError, match=r"only tokenizer\.model, which transformers converts") as caught:
        read_tokenizer(opened(tmp_path))
    assert "pip install 'mergekit-ray[moe]'" in str(caught.value)


def test_no_library_is_needed_where_there_is_a_tokenizer_json(tmp_path: Path) -> None:
    save(tmp_path, json.dumps(SMALL))
    code = """
import sys
from mergekit_ray.checkpoint.opening import Checkpoint
from mergekit_ray.storage.local.store import LocalSource
from mergekit_ray.tokenizers import comparing, reading, uniting, writing

source = LocalSource(sys.argv[1])
checkpoint = Checkpoint(source, "x", {}, {}, {}, source.list())
found = reading.read_tokenizer(checkpoint)
writing.files_of(uniting.united([found, uniting.with_tokens(found, ["new"])]))
assert comparing.same_files(checkpoint, checkpoint) and comparing.difference(found, found) is None
assert not {"transformers", "tokenizers", "torch"} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_code_of_a_model_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    (tmp_path / "tokenization_x.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass X: pass\n")
    said = {"tokenizer_class": "X", "auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    with pytest.raises(ModelError):
        read_tokenizer(opened(tmp_path))
    assert not (tmp_path / "ran").exists()


def with_model(**parts: Any) -> str:
    return json.dumps({**SMALL, "added_tokens": [], "model": {**MODEL, **parts}})


DAMAGED = {
    "tokenizer.json": [
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        ('{"model": {"vocab": {"a": 0, "a": 1}, "merges": []}}', "'a' occurs twice"),
        ("{}", "no `model`"),
        ('{"model": {"type": "Other"}}', "kind 'Other' is not known; known: BPE, WordPiece, Unigram, WordLevel"),
        (with_model(vocab=[]), "not a table"),
        (with_model(vocab={"a": 0, "b": 0, "ab": 1}), "'a' and 'b' have the same id, 0"),
        (with_model(vocab={"a": -1}), "'a' has the id -1"),
        (with_model(vocab={"a": 10**9}), "'a' has the id 1000000000"),
        (with_model(vocab={"a": 1.0}), "id of 'a' is not a whole number"),
        (with_model(vocab={"a": True}), "id of 'a' is not a whole number"),
        (with_model(merges=["a b", ["a", "b"]]), "not two tokens"),
        (with_model(merges=["a b c"]), "not two tokens"),
        (with_model(merges=None), "no list of merges"),
        (with_model(continuing_subword_prefix=7), "`continuing_subword_prefix` is not a text"),
        (with_model(type="Unigram", vocab=[["a", 0.0], ["b", "x"]]), "id 1 is not a text with a score"),
        (with_model(type="Unigram", vocab=[]), "not a list of pieces"),
        (with_model(type="Unigram", vocab=[["a", 0.0]], unk_id=1), "`unk_id` is not the id of a piece"),
        (with_model(type="Unigram", vocab=[["a", 1e31]]), "id 0 is not a text with a score"),
        (json.dumps({**SMALL, "added_tokens": [{"id": 7, **token("X")}]}), "gives the token 'X' the id 7, .* the id 3"),
        (json.dumps({**SMALL, "added_tokens": [{"id": 3, "content": 3}]}), "no `content`"),
        (json.dumps({**SMALL, "added_tokens": [{"id": 3, **token("X"), "special": 1}]}), "`special` .* neither true"),
        (json.dumps({**SMALL, "added_tokens": {}}), "not a list"),
        (
            json.dumps({**SMALL, "model": {**MODEL, "vocab": {"a": 0, "b": 1, "ab": 3}}}),
            "'ab' and 'X' are both loaded with the id 3",
        ),
        (json.dumps({**SMALL, "decoder": json.loads("[" * 150 + "]" * 150)}), "nested too deeply"),
        ("[" * 100_000, "nested too deeply"),
    ],
    "tokenizer_config.json": [
        ("{", "not valid JSON"),
        (json.dumps({"added_tokens_decoder": []}), "not a table"),
        (json.dumps({"added_tokens_decoder": {"x": token("X")}}), "id of 'X' is not a whole number"),
        (json.dumps({"added_tokens_decoder": {"9" * 5000: token("X")}}), "id of 'X' is not a whole number"),
        (json.dumps({"added_tokens_decoder": {"9": token("X")}}), "gives the token 'X' the id 9, .* the id 3"),
        (json.dumps({"added_tokens_decoder": {"9": token("Y")}}), "gives the token 'Y' the id 9, .* the id 4"),
        (json.dumps({"added_tokens_decoder": {"9": "Y"}}), "not an added token"),
    ],
    "added_tokens.json": [
        ('{"X": 1}', "gives the token 'X' the id 1"),
        ('{"Y": 9}', "gives the token 'Y' the id 9"),
        ('{"Y": 4, "Z": 4}', "'Y' and 'Z' have the same id, 4"),
        ('{"Y": null}', "not a whole number"),
    ],
    "special_tokens_map.json": [("[]", "not a JSON object")],
    "generation_config.json": [("\x00", "not valid JSON")],
}


@pytest.mark.parametrize(("name", "text", "said"), [(name, *case) for name in DAMAGED for case in DAMAGED[name]])
def test_a_damaged_file_is_named_with_a_remedy(name: str, text: str, said: str, tmp_path: Path) -> None:
    save(tmp_path, json.dumps(SMALL))
    (tmp_path / name).write_text(text)
    with pytest.raises(ModelError, match=said) as caught:
        read_tokenizer(opened(tmp_path))
    assert f"/{name}: " in str(caught.value)
    assert caught.value.remedy
    assert len(str(caught.value)) < 600


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    save(tmp_path, json.dumps(SMALL))
    os.truncate(tmp_path / "tokenizer.json", MAX_SIDE_FILE_BYTES + 1)
    with pytest.raises(ModelError, match="has 268 MB"):
        read_tokenizer(opened(tmp_path))


def test_a_token_without_end_is_shown_in_part(tmp_path: Path) -> None:
    text = "\x1b[31m" + "x" * 10_000_000
    with pytest.raises(ModelError) as caught:
        read(save(tmp_path, with_model(vocab={text: 1, "b": 1})))
    assert len(str(caught.value)) < 500
    assert "\x1b" not in str(caught.value)


def test_half_of_a_character_is_not_unicode(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not valid Unicode"):
        read(save(tmp_path, with_model(vocab={"\ud83d": 1})))


TRIED: dict[str, Any] = {
    "BPE": SMALL,
    "Unigram": data_of(with_added(unigram(), "<|a|>")),
}


@pytest.mark.parametrize("kind", TRIED)
def test_no_value_of_a_file_is_believed(kind: str, tmp_path: Path) -> None:
    good = read(save(tmp_path / "good", json.dumps(TRIED[kind])))
    config = {"pad_token": "P", "eos_token": token("X"), "added_tokens_decoder": {"3": token("X")}}
    settings = config if kind == "BPE" else {}
    files = {
        "tokenizer": TRIED[kind],
        "tokenizer_config": settings,
        "added_tokens": {"Z": 4},
        "special_tokens_map": settings,
    }
    tried = sound = 0
    for name, content in files.items():
        for what, hostile in changed(content):
            text = json.dumps(hostile)
            (tmp_path / "bad").mkdir(exist_ok=True)
            for file in (tmp_path / "bad").iterdir():
                file.unlink()
            save(tmp_path / "bad", json.dumps(TRIED[kind]))
            (tmp_path / "bad" / f"{name}.json").write_text(text)
            tried += 1
            with contextlib.suppress(MergekitRayError):
                bad = read(opened(tmp_path / "bad"))
                for each in (bad, united([good, bad]), united([bad, good]), with_tokens(bad, ["<new>"])):
                    vocabulary = json.loads(files_of(each)["tokenizer.json"])["model"]["vocab"]
                    assert len(vocabulary) <= 2 * len(good.ids), what
                    assert max(each.ids.values(), default=0) < len(each.ids) + len(good.ids), what
                sound += 1
    assert tried > 500
    assert 0 < sound < tried


def test_a_file_that_went_since_it_was_listed_is_named(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, json.dumps(SMALL))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(MergekitRayError, match=r"tokenizer\.json"):
        read_tokenizer(checkpoint)
