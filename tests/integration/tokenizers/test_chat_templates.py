"""The chat template of a merge: the models', a named one, a file's or the recipe's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

import mergekit_ray
from mergekit_ray.core.errors import ConfigError, PlanError
from support.models import contents
from support.tokenizers.models import byte_level, save_model

CONVERSATION = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hell"}]
OWN = "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
OTHER = "{% for message in messages %}<{{ message.content }}>{% endfor %}"


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    """A base without a template, and three fine-tunes, two of which have the same."""
    made = [save_model(tmp_path / f"model{seed}", byte_level(), seed) for seed in range(4)]
    (made[1] / "chat_template.jinja").write_text(OTHER)
    (made[2] / "chat_template.jinja").write_text(OWN)
    settings = json.loads((made[3] / "tokenizer_config.json").read_text())
    (made[3] / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": OWN}))
    return made


def merged(models: list[Path], out: Path, **rest: Any) -> str | None:
    """What a conversation becomes; None if the result has no template."""
    listed = [{"model": str(model), "parameters": {"weight": 1.0}} for model in models]
    mergekit_ray.merge({"merge_method": "linear", "models": listed, **rest}, out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    if tokenizer.chat_template is None:
        return None
    text = tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    assert isinstance(text, str)
    return text


def test_without_the_key_it_is_the_donors(models: list[Path], tmp_path: Path) -> None:
    assert merged(models, tmp_path / "a") is None
    assert merged(models[1:], tmp_path / "b") == "<hello><hell>"


def test_auto_is_what_most_models_have(models: list[Path], tmp_path: Path) -> None:
    assert merged(models, tmp_path / "out", chat_template="auto") == "[user] hello\n[assistant] hell\n"
    taken, unknown = mergekit_ray.plan(
        {
            "merge_method": "linear",
            "models": [{"model": str(model), "parameters": {"weight": 1.0}} for model in models],
            "chat_template": "auto",
        }
    ).warnings
    assert taken == f"chat_template: auto takes the template of {models[2]} and {models[3]}; {models[1]} has another"
    assert "[user]" in unknown  # which the first model's tokenizer does not have


def test_a_named_one(models: list[Path], tmp_path: Path) -> None:
    text = merged(models[:2], tmp_path / "out", chat_template="chatml")
    assert text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nhell<|im_end|>\n"


@pytest.mark.parametrize("key", [{}, {"tokenizer_source": "union"}])
def test_the_recipes_own_replaces_all_others(key: dict[str, Any], models: list[Path], tmp_path: Path) -> None:
    donor = models[3]
    (donor / "additional_chat_templates").mkdir()
    (donor / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    others = [save_model(tmp_path / "more", byte_level(["<|x|>"]), 9)]
    text = merged([donor, *others], tmp_path / "out", chat_template=OTHER, **key)
    assert text == "<hello><hell>"
    files = contents(tmp_path / "out")
    assert files["chat_template.jinja"] == OTHER.encode()
    assert "chat_template" not in json.loads(files["tokenizer_config.json"])
    assert not any(name.startswith("additional_chat_templates") for name in files)


def test_additional_templates_travel_with_their_tokenizer(models: list[Path], tmp_path: Path) -> None:
    donor, other = models[1], save_model(tmp_path / "more", byte_level(["<|x|>"]), 9)
    (donor / "additional_chat_templates").mkdir()
    (donor / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    for source, is_kept in (("union", True), (str(donor), True), (str(other), False)):
        out = tmp_path / f"out-{is_kept}-{source == 'union'}"
        merged([donor, other], out, tokenizer_source=source)
        assert ("additional_chat_templates/tool.jinja" in contents(out)) is is_kept


def test_a_file(models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.jinja").write_text(OTHER)
    assert merged(models[:1], tmp_path / "out", chat_template="mine.jinja") == "<hello><hell>"
    manifest = json.loads((tmp_path / "out" / "mergekit-ray.json").read_text())
    assert manifest["recipe"]["chat_template"] == OTHER  # the file may be gone when somebody reproduces it


@pytest.mark.parametrize(
    ("template", "error", "told"),
    [
        ("chatlm", ConfigError, "did you mean 'chatml'?"),
        ("nothere.jinja", ConfigError, "'nothere.jinja' cannot be read: No such file or directory"),
        ("{{ messages[0].content }", PlanError, "line 1"),
        ("{% for m in messages %}{% endfor %}", PlanError, ""),
        ("{% for i in range(10**9) %}{{ messages }}{% endfor %}", PlanError, ""),
    ],
)
def test_a_broken_one(template: str, error: type[Exception], told: str, models: list[Path], tmp_path: Path) -> None:
    with pytest.raises(error) as caught:
        merged(models[:1], tmp_path / "out", chat_template=template)
    assert told in str(caught.value)
    assert "chat_template" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_tokens_that_it_needs_are_told(models: list[Path]) -> None:
    listed = [{"model": str(models[0]), "parameters": {"weight": 1.0}}]
    recipe = {"merge_method": "linear", "models": listed, "chat_template": "chatml"}
    [warning] = mergekit_ray.plan(recipe).warnings
    assert "<|im_start|>" in warning
    assert "<|im_end|>" in warning
    tokens = {
        token: {"source": {"kind": "model_token", "model": str(models[0]), "token": "</s>"}}
        for token in ("<|im_start|>", "<|im_end|>")
    }
    assert mergekit_ray.plan({**recipe, "tokenizer": {"source": "union", "tokens": tokens}}).warnings == ()
