"""The named chat templates: the formats as the makers of the models document them, and transformers' rendering."""

from __future__ import annotations

from typing import Any

import jinja2
import pytest

from mergekit_ray.tokenizers.chat.sandbox import environment, render
from mergekit_ray.tokenizers.chat.templates import NAMED

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
Conversation = list[tuple[str, str]]


def messages(conversation: Conversation) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in conversation]


def rendered(name: str, conversation: Conversation, *, wants_reply: bool = False, **variables: Any) -> str:
    known = {"messages": messages(conversation), "add_generation_prompt": wants_reply, **variables}
    return render(environment().from_string(NAMED[name].read_text()), known)


def test_the_names() -> None:
    assert list(NAMED) == ["alpaca", "chatml", "exaone", "gemma", "llama3", "mistral"]


def test_chatml() -> None:
    """https://github.com/openai/openai-python/blob/release-v0.28.0/chatml.md"""
    turns = [(SYSTEM, "You are ChatGPT."), (USER, "How are you"), (ASSISTANT, "I am doing well!"), (USER, "And now?")]
    text = (
        "<|im_start|>system\nYou are ChatGPT.<|im_end|>\n"
        "<|im_start|>user\nHow are you<|im_end|>\n"
        "<|im_start|>assistant\nI am doing well!<|im_end|>\n"
        "<|im_start|>user\nAnd now?<|im_end|>\n"
    )
    assert rendered("chatml", turns, bos_token="<s>", eos_token="</s>") == text
    assert rendered("chatml", turns, wants_reply=True) == text + "<|im_start|>assistant\n"
    assert rendered("chatml", turns[1:2]) == "<|im_start|>user\nHow are you<|im_end|>\n"
    assert rendered("chatml", [("tool", " 7 ")]) == "<|im_start|>tool\n 7 <|im_end|>\n"


def test_llama3() -> None:
    """https://www.llama.com/docs/model-cards-and-prompt-formats/meta-llama-3/"""
    turns = [
        (SYSTEM, "You are a helpful AI assistant for travel tips and recommendations"),
        (USER, "What is France's capital?"),
        (ASSISTANT, "Bonjour! The capital of France is Paris!"),
        (USER, "What can I do there?\n"),
    ]
    text = (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "You are a helpful AI assistant for travel tips and recommendations<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhat is France's capital?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nBonjour! The capital of France is Paris!<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhat can I do there?<|eot_id|>"
    )
    bos = "<|begin_of_text|>"
    assert rendered("llama3", turns, bos_token=bos) == text
    reply = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert rendered("llama3", turns, wants_reply=True, bos_token=bos) == text + reply
    assert rendered("llama3", turns) == text.removeprefix(bos), "a tokenizer may have no bos_token"


def test_mistral() -> None:
    """https://docs.mistral.ai/cookbook/concept-deep-dive-tokenization-templates (V3)"""
    turns = [
        (USER, "Hello, how are you?"),
        (ASSISTANT, "Fine, and you?"),
        (USER, "I'm doing great!"),
        (ASSISTANT, "Glad to hear!"),
    ]
    text = "<s>[INST] Hello, how are you?[/INST] Fine, and you?</s>[INST] I'm doing great![/INST] Glad to hear!</s>"
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    assert rendered("mistral", turns, **tokens) == text
    assert rendered("mistral", turns, wants_reply=True, **tokens) == text
    # "the system prompt is prepended to the last user message by default"
    told = text.replace("[INST] I'm", "[INST] Be brief.\n\nI'm")
    assert rendered("mistral", [(SYSTEM, "Be brief."), *turns], **tokens) == told
    assert rendered("mistral", [(SYSTEM, "Be brief."), turns[0]], **tokens) == (
        "<s>[INST] Be brief.\n\nHello, how are you?[/INST]"
    )
    assert rendered("mistral", turns[:2]) == "[INST] Hello, how are you?[/INST] Fine, and you?"


def test_alpaca() -> None:
    """https://github.com/tatsu-lab/stanford_alpaca#data-release, whose training ends each output with the EOS token."""
    single = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nGive three tips.\n\n### Response:"
    )
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    turns = [(USER, "Give three tips."), (ASSISTANT, "1. Eat."), (USER, "More."), (ASSISTANT, "4. Rest.")]
    assert rendered("alpaca", turns[:1], wants_reply=True, **tokens) == f"<s>{single}\n"
    text = f"<s>{single}\n1. Eat.</s>\n\n### Instruction:\nMore.\n\n### Response:\n4. Rest.</s>"
    assert rendered("alpaca", turns, **tokens) == text
    told = [(SYSTEM, "Answer in French."), *turns[:1]]
    assert rendered("alpaca", told, **tokens) == "<s>Answer in French.\n\n### Instruction:\nGive three tips."
    assert rendered("alpaca", turns[:2]) == f"{single}\n1. Eat."


def test_exaone() -> None:
    """https://huggingface.co/LGAI-EXAONE/EXAONE-3.0-7.8B-Instruct/discussions/15"""
    turns = [
        (SYSTEM, "You are EXAONE model from LG AI Research, a helpful assistant."),
        (USER, "Hello."),
        (ASSISTANT, "Hello! I'm EXAONE 3.0, an advanced language model developed by LG AI Research."),
        (USER, "Who are you?"),
    ]
    text = (
        "[|system|]You are EXAONE model from LG AI Research, a helpful assistant.[|endofturn|]\n"
        "[|user|]Hello.\n"
        "[|assistant|]Hello! I'm EXAONE 3.0, an advanced language model developed by LG AI Research.[|endofturn|]\n"
        "[|user|]Who are you?\n"
    )
    assert rendered("exaone", turns, bos_token="[BOS]") == text
    assert rendered("exaone", turns, wants_reply=True) == f"{text}[|assistant|]"
    assert rendered("exaone", turns[1:2]) == "[|system|][|endofturn|]\n[|user|]Hello.\n"


def test_gemma() -> None:
    """https://ai.google.dev/gemma/docs/core/prompt-structure"""
    turns = [(USER, "knock knock"), (ASSISTANT, "who is there"), (USER, "Gemma"), (ASSISTANT, "Gemma who?")]
    text = (
        "<bos><start_of_turn>user\nknock knock<end_of_turn>\n"
        "<start_of_turn>model\nwho is there<end_of_turn>\n"
        "<start_of_turn>user\nGemma<end_of_turn>\n"
        "<start_of_turn>model\nGemma who?<end_of_turn>\n"
    )
    assert rendered("gemma", turns, bos_token="<bos>") == text
    asked = [(SYSTEM, "Only reply like a pirate."), (USER, "What is the answer?"), (ASSISTANT, " 42 "), (USER, "Why?")]
    assert rendered("gemma", asked, wants_reply=True, bos_token="<bos>") == (
        "<bos><start_of_turn>user\nOnly reply like a pirate.\n\nWhat is the answer?<end_of_turn>\n"
        "<start_of_turn>model\n42<end_of_turn>\n"
        "<start_of_turn>user\nWhy?<end_of_turn>\n"
        "<start_of_turn>model\n"
    )


@pytest.mark.parametrize("name", ["mistral", "alpaca", "gemma"])
def test_a_format_without_a_role_says_which_it_has(name: str) -> None:
    with pytest.raises(jinja2.TemplateError, match=r"roles are .*user and assistant, not tool"):
        rendered(name, [(USER, "x"), ("tool", "y")])


CONVERSATIONS: list[Conversation] = [
    [(SYSTEM, " Be brief.\n"), (USER, " Hi \n"), (ASSISTANT, "Hello\n\n"), (USER, "2 < 3 & 'x' {{ y }}")],
    [(USER, "Привет 🙂"), (ASSISTANT, "")],
    [(ASSISTANT, "first"), (USER, "then"), (USER, "again")],
]


@pytest.mark.parametrize("name", NAMED)
def test_white_space_does_not_depend_on_the_renderers_settings(name: str) -> None:
    plain = jinja2.Environment().from_string(NAMED[name].read_text())
    for conversation in CONVERSATIONS:
        tokens = {"bos_token": "<s>", "eos_token": "</s>"}
        known = {"messages": messages(conversation), "add_generation_prompt": True, **tokens}
        assert plain.render(known) == rendered(name, conversation, wants_reply=True, **tokens)


TRICKY = {
    "white space": "\n  {% for m in messages %}\n\t{# said #}\n  {{ m.content }}\n\n  {%- endfor %}\n{{ '\n' }}\n\n",
    "nested macros": (
        "{% macro outer(m) %}{% macro inner(x) %}<{{ x }}|{{ caller is defined }}>{% endmacro %}"
        "{{ inner(m.role) }}{{ m.content | upper }}{% endmacro %}{% for m in messages %}{{ outer(m) }}{% endfor %}"
    ),
    "calls": (
        "{% macro wrap(n) %}{% for i in range(n) %}({{ caller(i) }}){% endfor %}{% endmacro %}"
        "{% call(i) wrap(2) %}{{ messages[i].role }}{% endcall %}"
    ),
    "namespace": (
        "{% set n = namespace(count=0, self='me') %}{% for m in messages %}{% set n.count = n.count + 1 %}{% endfor %}"
        "{{ n.count }}{{ n.self }}"
    ),
    "generation": (
        "{% set x = 1 %}{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{% set x = 2 %}"
        "{{ m.content }}{{ x }}{{ eos_token }}\n{% endgeneration %}\n{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{{ x }}"
    ),
    "loop controls": "{% for m in messages %}{% if loop.index == 3 %}{% break %}{% endif %}{% continue %}{% endfor %}.",
    "tools": "{% if tools %}{% for t in tools %}{{ t | tojson }}\n{{ t | tojson(indent=2) }}{% endfor %}{% endif %}",
    "sorted tools": "{{ tools | tojson(sort_keys=true, ensure_ascii=true, separators=(',', ':')) }}",
    "no documents": "{{ documents is none }}{{ documents is defined }}{{ nothing is defined }}{{ nothing }}",
    "time": "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% endif %}",
    "strings": "{{ messages[0].content.strip().split()[-1] }}{{ messages[-1]['content'][:2] }}{{ [1, true, none] }}",
    "filters": (
        "{{ messages | map(attribute='role') | join(',') }}"
        "{{ messages | selectattr('role', 'equalto', 'user') | list }}"
    ),
    "dicts": "{% for k, v in dict(a=1, b='x').items() %}{{ k }}{{ v }}{% endfor %}{{ messages[0] | items | list }}",
    "escapes": "{{ '<b>' + messages[-1].content }}{{ '&' | e }}",
    "special tokens": "{{ bos_token }}{{ eos_token }}{{ unk_token }}",
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Wie ist das Wetter <hier>? ☀",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
        },
    }
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=vocabulary, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("name", [*NAMED, *TRICKY])
def test_the_text_is_that_of_transformers(name: str, tokenizer: Any) -> None:
    text = TRICKY[name] if name in TRICKY else NAMED[name].read_text()
    ours = environment().from_string(text)
    for conversation in CONVERSATIONS:
        for wants_reply in (False, True):
            for tools in (None, TOOLS):
                known = {"messages": messages(conversation), "tools": tools, "documents": None}
                known |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
                expected = tokenizer.apply_chat_template(
                    messages(conversation),
                    chat_template=text,
                    tools=tools,
                    add_generation_prompt=wants_reply,
                    tokenize=False,
                )
                assert render(ours, {**known, "add_generation_prompt": wants_reply}) == expected


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append({}) }}",
        "{{ raise_exception('no') }}",
        "{% set n = namespace() %}{% set n._hidden = 1 %}",
        "{% set n = namespace(_hidden=1) %}",
        "{% generation %}",
        "{{ messages | shout }}",
        "{% include 'x' %}",
        "{{ nothing + 'x' }}",
        "{{ nothing.attribute }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ 1 / 0 }}",
    ],
)
def test_what_fails_in_transformers_fails_here(text: str, tokenizer: Any) -> None:
    said = messages(CONVERSATIONS[0])
    with pytest.raises(Exception) as theirs:  # noqa: PT011 - of any kind, but ours is to be the same
        tokenizer.apply_chat_template(said, chat_template=text, tokenize=False)
    with pytest.raises(Exception) as ours:  # noqa: PT011
        render(environment().from_string(text), {"messages": said})
    assert isinstance(ours.value, theirs.type)
