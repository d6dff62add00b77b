"""Renders conversations with a chat template as transformers does, in a process with limits.

``python -m mergekit_ray.tokenizers.chat.sandbox`` reads a `Request` as JSON from standard input and writes an `Answer`.
Jinja's sandbox keeps a template from Python's internals, but bounds neither time nor memory: ``{{ 'x' * 10**12 }}`` is
one expression, and Jinja evaluates constants while it compiles. The limits of the process bound both.
"""

from __future__ import annotations

import json
import resource
import sys
import traceback
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final, TypedDict

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_MEMORY_BYTES: Final = 1 << 30
MAX_RENDERED: Final = 1 << 20
"""Characters of one rendered conversation, whose messages have a few dozen."""

USER_TEXTS: Final = ("What does the fox say?", "And the owl?")
_SYSTEM: Final = {"role": "system", "content": "Answer in one sentence."}
_TURNS: Final = (
    {"role": "user", "content": USER_TEXTS[0]},
    {"role": "assistant", "content": "It barks."},
    {"role": "user", "content": USER_TEXTS[1]},
)
_TOOLS: Final = (
    {
        "type": "function",
        "function": {
            "name": "look",
            "description": "Look for an animal.",
            "parameters": {"type": "object", "properties": {"animal": {"type": "string"}}, "required": ["animal"]},
        },
    },
)


class Request(TypedDict):
    """What is to be rendered.

    Attributes:
        template: its text.
        variables: such as ``bos_token``, where the tokenizer has it.
        cpu_seconds: of processor time, after which the process is ended.
    """

    template: str
    variables: dict[str, str]
    cpu_seconds: int


class Answer(TypedDict, total=False):
    """What became of a template.

    Attributes:
        rendered: the conversation without and with ``add_generation_prompt``; given if all went well.
        error: otherwise, what went wrong.
        line: of the template, from 1, if the error has one.
    """

    rendered: list[str]
    error: str
    line: int | None


class Refusal(jinja2.TemplateError):
    """A template called ``raise_exception``."""


class _Generation(Extension):
    """``{% generation %} ... {% endgeneration %}``, which marks what the model writes and changes no text."""

    tags = {"generation"}  # noqa: RUF012 - declared by Jinja

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_unchanged"), [], [], body).set_lineno(line)

    def _unchanged(self, caller: Any) -> str:
        return str(caller())


class _Namespace(Namespace):
    """transformers refuses names that begin with an underscore."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _check_attribute(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        Namespace.__setitem__(self, name, value)


def _check_attribute(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"transformers allows no namespace attribute {name!r}; rename it")


def environment() -> jinja2.Environment:
    """Jinja as transformers sets it up for chat templates."""
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    made.filters["tojson"] = _to_json
    made.globals |= {"raise_exception": _refuse, "strftime_now": _now, "namespace": _Namespace}
    return made


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: object) -> None:
    raise Refusal(str(message))


def _now(form: str) -> str:
    return datetime.now().strftime(form)  # noqa: DTZ005 - the local time without its zone, as transformers gives it


def render(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
    """What a template writes.

    Raises:
        ValueError: it writes more than `MAX_RENDERED` characters.
    """
    written: list[str] = []
    left = MAX_RENDERED
    for piece in template.generate(variables):
        left -= len(piece)
        if left < 0:
            raise ValueError(f"it writes more than {MAX_RENDERED:,} characters for four short messages")
        written.append(piece)
    return "".join(written)


def check(text: str, variables: Mapping[str, Any]) -> Answer:
    """Render a conversation of a system message, two of the user and one of the assistant.

    A template that itself refuses it gets one without the system message. Contents are text, and there are no tools; if
    that does not work, contents are lists of parts, as templates of multimodal models read them, or there is a tool.

    Args:
        text: the template.
        variables: see `Request`.
    """
    try:
        template = environment().from_string(text)
    except Exception as error:  # noqa: BLE001 - Python compiles what Jinja makes of it, and may refuse it in many ways
        return _failure(error)
    first: Answer | None = None
    for has_parts, tools in ((False, None), (True, None), (False, _TOOLS)):
        try:
            rendered = _rendered(template, {**variables, "tools": tools, "documents": None}, has_parts=has_parts)
        except Exception as error:  # noqa: BLE001 - a template may raise anything
            first = first or _failure(error)
        else:
            if all(any(said in each for said in USER_TEXTS) for each in rendered):
                return {"rendered": rendered}
            first = first or {"error": "it writes nothing of what the user says", "line": None}
    assert first is not None
    return first


def _rendered(template: jinja2.Template, variables: Mapping[str, Any], *, has_parts: bool) -> list[str]:
    try:
        return _both(template, variables, [_SYSTEM, *_TURNS], has_parts=has_parts)
    except Refusal:
        return _both(template, variables, [*_TURNS], has_parts=has_parts)


def _both(
    template: jinja2.Template, variables: Mapping[str, Any], said: list[dict[str, str]], *, has_parts: bool
) -> list[str]:
    def message(of: dict[str, str]) -> dict[str, Any]:
        return {**of, "content": [{"type": "text", "text": of["content"]}] if has_parts else of["content"]}

    return [
        render(template, {**variables, "messages": [*map(message, said)], "add_generation_prompt": wants_reply})
        for wants_reply in (False, True)
    ]


def _failure(error: Exception) -> Answer:
    line = error.lineno if isinstance(error, jinja2.TemplateSyntaxError) else _line_of(error)
    if isinstance(error, jinja2.TemplateSyntaxError):
        what = error.message or "a syntax error"
    elif isinstance(error, SyntaxError):
        what = error.msg
    elif isinstance(error, Refusal):
        what = f"it refuses turns of user, assistant and user, with a system message and without one: {error}"
    elif isinstance(error, RecursionError):
        what = "it is nested too deeply, or calls itself without an end"
    elif isinstance(error, MemoryError):
        what = f"it needs more than {MAX_MEMORY_BYTES >> 20} MiB of memory for four short messages"
    else:
        what = str(error) or type(error).__name__
    return {"error": what, "line": line}


def _line_of(error: Exception) -> int | None:
    """The line of a template that an error comes from; Jinja puts it into the traceback."""
    frames = traceback.walk_tb(error.__traceback__)
    lines = [line for frame, line in frames if frame.f_code.co_filename == "<template>"]
    return lines[-1] if lines else None


def _limit(kind: int, most: int) -> None:
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def main() -> None:
    """See the module."""
    request: Request = json.load(sys.stdin)
    used = resource.getrusage(resource.RUSAGE_SELF)
    _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 1 + request["cpu_seconds"])
    _limit(resource.RLIMIT_AS, MAX_MEMORY_BYTES)
    _limit(resource.RLIMIT_CORE, 0)
    json.dump(check(request["template"], request["variables"]), sys.stdout)


if __name__ == "__main__":
    main()
