"""Does a chat template work, and does a tokenizer have the tokens that it writes?"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Final, cast

from mergekit_ray.core.errors import PlanError
from mergekit_ray.tokenizers.chat.templates import NAMED

if TYPE_CHECKING:
    from mergekit_ray.tokenizers.chat.sandbox import Answer, Request

CPU_SECONDS: Final = 3
"""To compile a template and to render some short conversations with it. Templates take milliseconds."""

_SANDBOX = "mergekit_ray.tokenizers.chat.sandbox"
_MAX_NAMED = 10
_TOKENS = re.compile(
    r"""
    <[|｜][^\s<>|｜]+[|｜]>  | <\|[^\s<>|]+> | <[^\s<>|]+\|>    # <|im_end|>, DeepSeek's wide bars; <|turn> and <turn|>
    | \[\|[^\s\[\]|]+\|\]                                    # [|endofturn|]
    | \[/?[A-Za-z_]{2,}\]                                    # [INST], [/INST], [gMASK]
    | </?[A-Za-z][\w.]*>                                     # <bos>, </s>, <start_of_turn>
    """,
    re.VERBOSE,
)
"""What looks like a token of its own. The messages of the rendered conversation hold nothing like it."""
_TOKENS_IN_PAIRS = ("s", "think")
"""Other names that are written as ``<name>`` and as ``</name>`` are markup in a template's instructions."""


def check_template(
    template: str, tokens: Collection[str] | None, *, bos: str | None, eos: str | None, where: str
) -> list[str]:
    """Render a conversation with a template, with and without ``add_generation_prompt``, as transformers would.

    Args:
        template: the Jinja text.
        tokens: what the tokenizer encodes as one token each; None if that is not known.
        bos: its ``bos_token``, if it has one.
        eos: its ``eos_token``, if it has one.
        where: the recipe's line, or the file that holds the template.

    Returns:
        Warnings: which tokens it writes that ``tokens`` lacks.

    Raises:
        PlanError: it is not Jinja, it fails, it does not end, or it leaves out what the user says.
    """
    known = {"bos_token": bos, "eos_token": eos}
    answer = _answer(template, {name: token for name, token in known.items() if token is not None}, where)
    if "error" in answer:
        line = answer.get("line")
        raise _error(
            f"the chat template does not work{'' if line is None else f', line {line}'}: {answer['error']}", where
        )
    if tokens is None:
        return []
    written = dict.fromkeys(token for text in answer["rendered"] for token in _TOKENS.findall(text))
    lacking = [token for token in written if token not in tokens and not _is_markup(token, written)]
    return [_lacks(lacking)] if lacking else []


def _is_markup(token: str, written: Collection[str]) -> bool:
    name = token.strip("</>")
    return f"<{name}>" in written and f"</{name}>" in written and name not in _TOKENS_IN_PAIRS


def _answer(template: str, variables: dict[str, str], where: str) -> Answer:
    """What the sandbox says, which is a process of its own so that no template can hold or fill this one."""
    request: Request = {"template": template, "variables": variables, "cpu_seconds": CPU_SECONDS}
    done = subprocess.run(  # noqa: S603 - our own module, by the same Python
        [sys.executable, "-P", "-m", _SANDBOX],
        input=json.dumps(request),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},  # noqa: PTH109
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == -signal.SIGXCPU:
        what = f"the chat template takes more than {CPU_SECONDS} s to render four short messages: it may never end"
        raise _error(what, where)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise _error(f"the process that renders the chat template failed: {reason}", where)
    return cast("Answer", json.loads(done.stdout))


def _error(what: str, where: str) -> PlanError:
    names = ", ".join(NAMED)
    return PlanError(what, where=where, remedy=f"correct the template, or set chat_template to one of {names}")


def _lacks(tokens: Sequence[str]) -> str:
    named = [json.dumps(token, ensure_ascii=False) for token in tokens[:_MAX_NAMED]]
    more = f" and {len(tokens) - _MAX_NAMED} more" if len(tokens) > _MAX_NAMED else ""
    entries = ", ".join(f"{token}: {{source: MODEL}}" for token in named)
    return (
        f"these tokens of the chat template are not in the vocabulary, and are encoded as ordinary text: "
        f"{', '.join(named)}{more}; to add them, write `tokenizer: {{tokens: {{{entries}}}}}`, where MODEL is a model "
        "that has them, or {kind: zero}"
    )
