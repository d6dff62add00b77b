"""The options of mergekit's commands, as `--help` of mergekit 0.1 prints them, and what each is here.

`compat` takes them, our commands explain them when they are given one, and docs/from-mergekit.md lists them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Option:
    """An option of one of mergekit's commands.

    Attributes:
        names: all spellings; for a switch, those that turn it on.
        here: what it is here, for a table or the end of a message.
        words: of our command that do the same; ``{}`` stands for the value. Empty if nothing needs to be said.
        takes: what its value is, as mergekit calls it; empty for a switch.
        off: the spellings that turn a switch off.
        off_here: what these are here, if they ask for anything other than what happens anyway.
        off_refused: to turn it off is to ask for what is not there.
        required: mergekit insists on it.
        repeats: it may be given several times.
        own: what it becomes depends on the rest of the command line: `translation` deals with it.
    """

    names: tuple[str, ...]
    here: str
    words: tuple[str, ...] = ()
    takes: str = ""
    off: tuple[str, ...] = ()
    off_here: str = ""
    off_refused: bool = False
    required: bool = False
    repeats: bool = False
    own: bool = False

    @property
    def key(self) -> str:
        """Its long name, as a name in Python."""
        return max(self.names, key=len).lstrip("-").replace("-", "_")


def _switch(name: str, here: str, *words: str, off_here: str = "", own: bool = False) -> Option:
    return Option((name,), here, words, off=(f"--no-{name[2:]}",), off_here=off_here, own=own)


_MEMORY: Final = "not needed: memory is bounded by `--memory`"
_OVERLAP: Final = (
    "not needed: reading, arithmetic and writing overlap; `--workers` says how many shards are processed at once"
)
_PICKLES: Final = "not supported: results are safetensors"
_NO_SEED: Final = Option(("--random-seed",), "not needed: nothing is drawn at random", takes="INTEGER")
_ONE_FILE: Final = Option(("--out-shard-size",), "not needed: an adapter is one file", takes="SIZE")
_SEED: Final = Option(("--random-seed",), "`--seed`, or `seed` in the recipe", ("--seed", "{}"), takes="INTEGER")
_SIZE: Final = Option(
    ("--out-shard-size",),
    "`--max-shard-size`, or `output: {max_shard_size: 10GB}` in the recipe: bytes, where mergekit counts parameters",
    takes="SIZE",
    own=True,
)
_COPY: Final = _switch(
    "--copy-tokenizer",
    "always, unless the recipe asks for another tokenizer",
    off_here="not supported: the model gets its tokenizer; remove the tokenizer's files if you do not want them",
)
_CLONE: Final = _switch("--clone-tensors", "not needed: a layer may occur several times")

_FP16: Final = _switch("--fp16", "`dtype: float16` in the recipe, `--dtype float16` of `recipe shuffle`", own=True)

SHARED: Final[tuple[Option, ...]] = (
    _switch(
        "--allow-crimes",
        "`--allow-config-conflicts`, for configs that contradict each other",
        "--allow-config-conflicts",
    ),
    _switch(
        "--unsafe-truncate-embeddings",
        "always: vocabularies of different sizes are cut to their common rows, with a warning",
    ),
    _switch("--trust-remote-code", "never: code of a model is copied, not run"),
    Option(
        ("--transformers-cache",),
        "the environment variable `HF_HUB_CACHE`: files in it are read, others are streamed and not kept",
        takes="TEXT",
        own=True,
    ),
    Option(("--lora-merge-cache",), "not needed: adapters are applied while merging", takes="TEXT"),
    Option(("--lora-merge-dtype",), "not needed: adapters are applied in float32", takes="TEXT"),
    _SEED,
    Option(("-v",), "not needed: progress and warnings are shown; `--debug` shows an error's traceback"),
    _switch("--quiet", "`--quiet`", "--quiet"),
    _switch(
        "--cuda",
        "`--device cuda`; by default a GPU is used if there is one",
        off_here="`--device cpu`",
        own=True,
    ),
    Option(("--device",), "`--device`", takes="TEXT", own=True),
    _switch("--low-cpu-memory", _MEMORY),
    _switch("--lazy-unpickle", _MEMORY),
    _switch("--read-to-gpu", _MEMORY),
    _switch("--multi-gpu", "not needed: workers take all GPUs in turn"),
    Option(("-j", "--num-threads"), _OVERLAP, takes="INTEGER"),
    Option(("--gpu-rich",), "`--device cuda`; nothing else is needed", own=True),
    _switch("--async-write", _OVERLAP),
    Option(("--write-threads",), _OVERLAP, takes="INTEGER"),
    _SIZE,
    _COPY,
    _CLONE,
    _switch("--write-model-card", "always", off_here="not supported: remove `README.md` if you do not want it"),
    Option(("--safe-serialization",), "always", off=("--no-safe-serialization",), off_here=_PICKLES, off_refused=True),
)
"""Those that all but bakllama have."""


def _with(*own: Option) -> tuple[Option, ...]:
    """A command's own options, and the shared ones that are not among them."""
    names = {name for option in own for name in option.names}
    return (*own, *(option for option in SHARED if names.isdisjoint(option.names)))


def _valued(*names: str, ours: str, takes: str, here: str = "", own: bool = False) -> Option:
    return Option(names, here or f"`{ours}`", () if own else (ours, "{}"), takes=takes, own=own)


def _place(name: str, number: str) -> Option:
    arguments = "`mergekit-ray extract-lora FINETUNED BASE OUT`"
    return Option((name,), f"the {number} argument: {arguments}", takes="TEXT", required=True, own=True)


_SHUFFLE: Final = "`mergekit-ray recipe shuffle`"

OPTIONS: Final[Mapping[str, tuple[Option, ...]]] = {
    "yaml": SHARED,
    "moe": _with(
        Option(("--load-in-4bit",), "not needed: hidden states are computed one layer at a time"),
        Option(("--load-in-8bit",), "not needed: hidden states are computed one layer at a time"),
        Option(("--i-understand-this-is-not-useful-without-training",), "not needed"),
    ),
    "multi": _with(
        Option(("--out-path",), "the argument after the recipe: `merge RECIPE OUT`", takes="PATH", own=True),
        Option(
            ("-I", "--intermediate-dir"),
            "not needed: stages are merged in one pass; one with an `output` of its own is written there",
            takes="PATH",
            required=True,
        ),
        _switch(
            "--lazy",
            "always: what is finished is kept",
            off_here="not needed: a finished result is kept only if recipe and models are the same",
        ),
    ),
    "pytorch": _with(
        Option(("-i", "--tensor-intersection"), "`tensors: intersection` in the recipe", own=True),
        Option(("-u", "--tensor-union"), "`tensors: union` in the recipe", own=True),
    ),
    "extract-lora": _with(
        _place("--model", "first"),
        _place("--base-model", "second"),
        _place("--out-path", "third"),
        _valued("--max-rank", ours="--rank", takes="INTEGER", own=True),
        _switch("--distribute-scale", "always", off_here="not needed: the factors' product is the same"),
        _switch("--embed-lora", "`--embeddings`", own=True),
        Option(("--save-module",), "`--modules-to-save`", takes="TEXT", repeats=True, own=True),
        Option(
            ("-e", "--exclude-regex"),
            "`--exclude`, with the end of a module's name",
            takes="TEXT",
            repeats=True,
            own=True,
        ),
        Option(("-i", "--include-regex"), "`--exclude` the others", takes="TEXT", repeats=True, own=True),
        Option(
            ("--sv-epsilon",),
            "`--energy`, the share of each change's squared norm that is kept",
            takes="FLOAT",
            own=True,
        ),
        Option(("--skip-undecomposable",), "always: what is left out is reported"),
        _NO_SEED,
        _ONE_FILE,
    ),
    "tokensurgeon": _with(
        _valued("-k", "--k", ours="--k", takes="INTEGER", own=True),
        Option(("-c", "--cosine-similarity"), "`--metric cosine`", off=("-nc", "--no-cosine-similarity"), own=True),
        _valued(
            *("-a", "--approximation-method"),
            ours="--method",
            takes="TEXT",
            here="`--method`, which has no `stb` and no `mp_rope`",
            own=True,
        ),
        _valued("-w", "--weight-scheme", ours="--weights", takes="TEXT", own=True),
        _valued("-s", "--subword-method", ours="--subword", takes="TEXT", own=True),
        Option(("--batch-size",), _MEMORY, takes="INTEGER"),
        _valued("-pm", "--prefix-match", ours="--prefix-match", takes="TEXT"),
        _valued("-bm", "--byte-match", ours="--byte-match", takes="TEXT"),
        _switch("--magikarp", "`--magikarp`", "--magikarp"),
        _valued("-nvn", "--new-vocab-noise", ours="--new-vocab-noise", takes="FLOAT"),
        _valued("-nvs", "--new-vocab-scale", ours="--new-vocab-scale", takes="FLOAT"),
    ),
    "layershuffle": _with(
        Option(("-m", "--model"), f"`--model` of {_SHUFFLE}", takes="TEXT", repeats=True, own=True),
        Option(("-w", "--weight"), f"`--weight` of {_SHUFFLE}", takes="FLOAT", repeats=True, own=True),
        _switch("--print-yaml", f"{_SHUFFLE} prints it", own=True),
        Option(("--write-yaml",), "`mergekit-ray recipe shuffle` with `> FILE`", takes="PATH", own=True),
        Option(("--dry-run",), f"{_SHUFFLE} merges nothing", own=True),
        _FP16,
        _switch("--full-random", f"`--full-random` of {_SHUFFLE}", own=True),
        Option(("--random-seed",), f"`--seed` of {_SHUFFLE}", takes="INTEGER", own=True),
    ),
    "bakllama": (_CLONE, _FP16),
}
"""By command, without the `mergekit-` before its name."""

ARGUMENTS: Final[Mapping[str, tuple[str, ...]]] = {
    **dict.fromkeys(("yaml", "moe", "pytorch", "bakllama"), ("CONFIG", "OUT")),
    "multi": ("CONFIG",),
    "extract-lora": (),
    "tokensurgeon": ("MODEL", "DONOR", "OUT"),
    "layershuffle": ("OUT",),
}
"""What each command takes beside options."""

COMMANDS: Final[Mapping[str, str]] = {name: name if name == "bakllama" else f"mergekit-{name}" for name in OPTIONS}
"""What mergekit calls each."""

_LIKE: Final = {"extract-lora": ("extract-lora",), "transplant": ("tokensurgeon",), "shuffle": ("layershuffle",)}
_MERGES: Final = ("yaml", "moe", "multi", "pytorch", "layershuffle", "bakllama")
_SHORT: Final = {"--verbose": "-v"}


def here(option: str, command: str) -> str | None:
    """What an option of mergekit is here; None if mergekit has none of that name for what a command does.

    Args:
        option: as it was given.
        command: ours, such as ``mergekit-ray merge``.
    """
    asked = _SHORT.get(option, option)
    for name in _LIKE.get(command.rsplit(maxsplit=1)[-1], _MERGES):
        for each in OPTIONS[name]:
            if asked in each.names:
                return each.here
            if asked in each.off or asked == re.sub("^--", "--no-", each.names[-1]):
                return each.off_here or each.here
    return None
