"""What is wrong with a command line, in our words: values that an option does not take, and options of mergekit."""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import StrEnum
from typing import Any, Final, TypeVar

import typer

from mergekit_ray.core.errors import ConfigError
from mergekit_ray.core.spelling import nearest

E = TypeVar("E", bound=StrEnum)

MERGEKIT_FLAGS: Final[dict[tuple[str, ...], str]] = {
    ("--cuda",): "`--device cuda`; by default a GPU is used if there is one",
    ("--gpu-rich",): "`--device cuda`; nothing else is needed",
    ("--multi-gpu",): "not needed: workers take all GPUs in turn",
    (
        "--low-cpu-memory",
        "--lazy-unpickle",
        "--read-to-gpu",
    ): "not needed: memory is bounded by `--memory`",
    (
        "--async-write",
        "--write-threads",
        "--num-threads",
        "-j",
    ): "not needed: reading, arithmetic and writing overlap; `--workers` says how many shards are processed at once",
    ("--out-shard-size",): "in the recipe: `output: {path: ./out, max_shard_size: 5GB}`",
    ("--random-seed",): "`--seed`, or `seed` in the recipe",
    ("--copy-tokenizer",): "always, unless the recipe asks for another tokenizer",
    ("--clone-tensors",): "not needed",
    ("--write-model-card", "--safe-serialization"): "always",
    ("--trust-remote-code",): "never: code of a model is copied, not run",
    ("--allow-crimes",): "`--allow-config-conflicts`, for configs that contradict each other",
    ("--unsafe-truncate-embeddings",): "always: vocabularies of different sizes are cut to their common rows, with a "
    "warning",
    (
        "--lora-merge-cache",
        "--transformers-cache",
    ): "not needed: adapters are applied while merging; models stream from the Hub. `HF_HOME` names the cache that is "
    "read",
    ("--lora-merge-dtype",): "not needed: adapters are applied in float32",
    ("-v",): "not needed: progress and warnings are shown; `--debug` shows an error's traceback",
    ("--load-in-4bit", "--load-in-8bit"): "not needed: hidden states are computed one layer at a time",
    ("--i-understand-this-is-not-useful-without-training",): "not needed",
    (
        "--model",
        "--base-model",
        "--out-path",
    ): "arguments: `mergekit-ray extract-lora FINETUNED BASE OUT`",
    ("--max-rank",): "`--rank`",
    ("--sv-epsilon",): "`--energy`, the share of each change's squared norm that is kept",
    ("--distribute-scale",): "always",
    ("--embed-lora",): "`--embeddings`",
    ("--save-module",): "`--modules-to-save`",
    ("--exclude-regex", "-e"): "`--exclude`, with the end of a module's name",
    ("--include-regex", "-i"): "not supported: `--exclude` the others",
    ("--skip-undecomposable",): "always: what is left out is reported",
}
"""Options of mergekit's commands that ours lack, and what does the same here; docs/from-mergekit.md has them all."""

_OF_EXTRACT_LORA: Final = frozenset(
    {
        *("--model", "--base-model", "--out-path", "--max-rank", "--sv-epsilon", "--distribute-scale", "--embed-lora"),
        *("--save-module", "--exclude-regex", "-e", "--include-regex", "-i", "--skip-undecomposable"),
    }
)
"""Of these, the options of mergekit-extract-lora: what they are here is no answer in another command."""

_SHORT: Final = {"--verbose": "-v"}


def whole(least: int | None = None) -> Callable[[str], int]:
    """A parser of whole numbers.

    Args:
        least: the smallest that is taken.
    """

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise typer.BadParameter(f"expected a whole number, found {text!r}") from None
        if least is not None and value < least:
            raise typer.BadParameter(f"expected at least {least}, found {value}")
        return value

    return parse


def number(text: str) -> float:
    """A parser of numbers."""
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"expected a number, found {text!r}") from None


def one_of(kind: type[E]) -> Callable[[str], E]:
    """A parser of the words of an enumeration."""

    def parse(text: str) -> E:
        words = [each.value for each in kind]
        if text not in words:
            wanted = f"{', '.join(words[:-1])} or {words[-1]}"
            raise typer.BadParameter(f"expected {wanted}, found {text!r}{nearest(text, words)}")
        return kind(text)

    return parse


def wrong_arguments(error: Any, command: str) -> ConfigError:
    """What click says of arguments, in our words.

    Args:
        error: its `UsageError`.
        command: as the user calls it.
    """
    remedy = f"see `{command} --help`"
    option = getattr(error, "option_name", None)
    if type(error).__name__ == "NoSuchOption" and option:
        here = _of_mergekit(option, command)
        if here is not None:
            return ConfigError(f"{option} is an option of mergekit", remedy=f"here: {here}")
        return ConfigError(f"no such option: {option}{nearest(option, error.possibilities or ())}", remedy=remedy)
    parameter = getattr(error, "param", None)
    said = getattr(error, "message", None)
    if parameter is not None and said:
        name = max(parameter.opts, key=len) if parameter.param_type_name == "option" else parameter.human_readable_name
        return ConfigError(f"{name}: {said}", remedy=remedy)
    message = re.sub(r"^Got unexpected extra .* \((.*)\)$", r"too many arguments: \1", str(error.format_message()))
    message = message.removesuffix(".").replace(". Did you mean", "; did you mean")
    return ConfigError(message[:1].lower() + message[1:], remedy=remedy)


def _of_mergekit(option: str, command: str) -> str | None:
    name = re.sub("^--no-", "--", option)
    name = _SHORT.get(name, name)
    if name in _OF_EXTRACT_LORA and not command.endswith(" extract-lora"):
        return None
    return next((here for flags, here in MERGEKIT_FLAGS.items() if name in flags), None)
