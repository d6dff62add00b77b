"""The check of a chat template: what it accepts, what it warns of, and templates that mean harm."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from mergekit_ray.core.errors import PlanError
from mergekit_ray.tokenizers.chat import rendering
from mergekit_ray.tokenizers.chat.rendering import check_template
from mergekit_ray.tokenizers.chat.templates import NAMED

WHERE = "recipe.yml:7: chat_template"
REMEDY = "correct the template, or set chat_template to one of alpaca, chatml, exaone, gemma, llama3, mistral"
SAID = "{% for m in messages %}{{ m.content }}{% endfor %}"


def warnings(template: str, tokens: Any = None, bos: str | None = "<s>", eos: str | None = "</s>") -> list[str]:
    return check_template(template, tokens, bos=bos, eos=eos, where=WHERE)


def refusal(template: str, **given: Any) -> str:
    with pytest.raises(PlanError) as caught:
        warnings(template, **given)
    assert caught.value.where == WHERE
    assert caught.value.remedy == REMEDY
    return caught.value.what


TOKENS = {
    "alpaca": {"<s>", "</s>"},
    "chatml": {"<|im_start|>", "<|im_end|>"},
    "exaone": {"[|system|]", "[|user|]", "[|assistant|]", "[|endofturn|]"},
    "gemma": {"<s>", "<start_of_turn>", "<end_of_turn>"},
    "llama3": {"<s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"},
    "mistral": {"<s>", "</s>", "[INST]", "[/INST]"},
}


@pytest.mark.parametrize("name", NAMED)
def test_a_named_template_works_and_says_which_tokens_it_needs(name: str) -> None:
    text = NAMED[name].read_text()
    assert warnings(text, TOKENS[name]) == []
    lacking = min(TOKENS[name])
    (warning,) = warnings(text, TOKENS[name] - {lacking})
    assert f": {json.dumps(lacking)}; to add them, write `tokenizer: " in warning


def test_a_warning_gives_the_lines_that_a_recipe_needs() -> None:
    (warning,) = warnings(NAMED["chatml"].read_text(), {"hello", "<|endoftext|>"})
    assert warning.startswith(
        "these tokens of the chat template are not in the vocabulary, and are encoded as ordinary"
    )
    added = {token: {"source": "MODEL"} for token in ("<|im_start|>", "<|im_end|>")}
    assert yaml.safe_load(warning.split("`")[1]) == {"tokenizer": {"tokens": added}}


def test_tokens_are_found_in_many_shapes() -> None:
    """In what is written, so that a template may put them together; never twice, and not in what merely looks alike."""
    written = ["<|im_end|>", "<｜User｜>", "<｜begin▁of▁sentence｜>", "[|endofturn|]", "[INST]", "[/INST]", "[gMASK]"]
    written += ["<bos>", "</s>", "<start_of_turn>", "<extra_id_0>", "<|turn>", "<turn|>"]
    plain = "a < b > c <= d, x[0], [1, 2], <<SYS>>-[ INST ] | <3 | [] | <> | <||>"
    template = f"{SAID}{{{{ {' '.join(written)!r} }}}}{{{{ '<|im' + '_end|>' }}}}{plain}"
    (warning,) = warnings(template, {"<SYS>"})
    shown = [json.dumps(token, ensure_ascii=False) for token in written]
    assert f"{', '.join(shown[:10])} and 3 more; to add" in warning
    assert warnings(template, {*written, "<SYS>"}) == []


def test_markup_is_no_token() -> None:
    """Templates give instructions in it; what models mark their thoughts with are tokens of many."""
    (warning,) = warnings(f"{SAID}<tools><user_name></tools><tools/><function-name><think></think><s></s>", set())
    assert ': "<user_name>", "<think>", "</think>", "<s>", "</s>"; to add' in warning


def test_nothing_is_said_of_tokens_where_the_vocabulary_is_not_known() -> None:
    assert warnings(NAMED["chatml"].read_text(), None) == []


@pytest.mark.parametrize(
    "template",
    [
        SAID,
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + SAID,
        # As multimodal models read messages.
        "{% for m in messages %}{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] }}"
        "{% endfor %}{% endfor %}",
        "{% for m in messages %}{{ m.content[0].text.strip() }}{% endfor %}",
        "{% for m in messages %}{% if m.role == 'system' or m.content is string %}{{ raise_exception('no') }}"
        "{% endif %}{{ m.content[0].text }}{% endfor %}",
        "{% for t in tools %}{{ t.function.parameters.properties.items() | list }}{% endfor %}" + SAID,
        # What a tokenizer lacks is undefined, and writes nothing.
        "{{ bos_token }}{{ pad_token }}" + SAID,
        "{% generation %}" + SAID + "{% endgeneration %}{{ strftime_now('%d %b %Y') }}{{ tools | tojson }}",
        "{{ messages[-1].content | trim }}{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",
    ],
)
def test_templates_of_many_kinds_work(template: str) -> None:
    assert warnings(template, bos=None, eos=None) == []


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("a\n{% for m in messages %}\n{{ m.content }", "line 3: unexpected '}'"),
        ("\n{% for m in messages %}", "line 2: Unexpected end of template. "),
        ("{{ messages | shout }}", "line 1: No filter named 'shout'."),
        ("{% generate %}", "line 1: Encountered unknown tag 'generate'."),
        (SAID + "\n\n{{ 1 + mesages[0] }}", "line 3: 'mesages' is undefined"),
        (SAID + "\n{{ 1 / 0 }}", "line 2: division by zero"),
        (SAID + "\n{{ eos_token + '\n' }}", "line 2: 'eos_token' is undefined"),
        (SAID + "{% include 'x' %}", "line 1: no loader for this environment specified"),
        (
            "{% for m in messages %}\n{% if m.role != 'x' %}\n{{ raise_exception('only x') }}{% endif %}{% endfor %}",
            "line 3: it refuses turns of user, assistant and user, with a system message and without one: only x",
        ),
        (
            "{% if add_generation_prompt %}\n{{ raise_exception('no') }}{% endif %}" + SAID,
            "line 2: it refuses turns of",
        ),
        ("{% if messages[0].role == 'system' %}{{ 1 / 0 }}{% endif %}" + SAID, "line 1: division by zero"),
    ],
)
def test_a_broken_template_is_refused_by_its_line(template: str, what: str) -> None:
    assert refusal(template, eos=None).startswith(f"the chat template does not work, {what}")


@pytest.mark.parametrize(
    "template",
    [
        "",
        "chatml",
        "{{ bos_token }}{% for m in messages %}{{ m.role }}{% endfor %}",
        "{% for m in messages if m.role == 'assistant' %}{{ m.content }}{% endfor %}",
        "{% if add_generation_prompt %}" + SAID + "{% endif %}",
    ],
)
def test_a_template_without_the_users_words_is_refused(template: str) -> None:
    assert refusal(template) == "the chat template does not work: it writes nothing of what the user says"


MEMORY = "it needs more than 1024 MiB of memory for four short messages"
NESTED = "it is nested too deeply, or calls itself without an end"


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big. The sandbox blocks ranges"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe."),
        (
            "{{ raise_exception.__globals__['os'] }}",
            "access to attribute '__globals__' of 'function' object is unsafe.",
        ),
        ("{{ messages.clear() }}", "access to attribute 'clear' of 'list' object is unsafe."),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", NESTED),
        ("{{ " + "(" * 100_000, NESTED),
        ("{% if x %}" * 10_000, NESTED),
        ("{% for m in messages %}" * 25 + "{% endfor %}" * 25, "too many statically nested blocks"),
        ("{{ 'x' * 10**12 }}", MEMORY),
        ("{{ 'x' | center(10**10) }}", MEMORY),
        ("{{ '%10000000000d' % 1 }}", MEMORY),
        ("{% set n = namespace(a='x') %}{% for i in range(99) %}{% set n.a = n.a + n.a %}{% endfor %}", MEMORY),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}endless {% endfor %}{% endfor %}",
            "it writes more than 1,048,576 characters for four short messages",
        ),
        ("x" * 10_000_000, "it writes more than 1,048,576 characters for four short messages"),
    ],
)
def test_a_hostile_template_is_refused(template: str, what: str) -> None:
    found = refusal(template)
    assert found.startswith("the chat template does not work")
    assert f": {what}" in found


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ lipsum(n=10**9) }}",
        "{{ 9 ** (9 ** 9) }}",
    ],
)
def test_a_template_that_does_not_end_is_ended(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "CPU_SECONDS", 1)
    expected = "the chat template takes more than 1 s to render four short messages: it may never end"
    assert refusal(template) == expected


def test_the_sandbox_finds_the_package_where_this_process_did(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Not by the environment, and not in the working folder, where a file may have the name of a module."""
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong json')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    assert warnings(SAID) == []


def test_a_sandbox_that_dies_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "_SANDBOX", "mergekit_ray.no_such_module")
    assert "the process that renders the chat template failed: " in refusal(SAID)
    assert "No module named mergekit_ray.no_such_module" in refusal(SAID)
