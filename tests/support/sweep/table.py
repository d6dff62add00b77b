"""The table of families as a page of the documentation."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version

from support.sweep.columns import COLUMNS, Outcome, Status

Result = Mapping[str, Outcome] | str
"""What came of a family: the outcome of each column, or why there is no small model of it."""

_INTRO = """\
<!-- Written by `make families-page`. -->

# Families

No family needs a definition file: mergekit-ray reads off a model's tensors and config where its layers, embedding and
head are. This table says how far that goes. It covers every causal and multimodal family of transformers
{transformers}: {tried} of {all} can be built as small models with random weights.

- **linear**: the mean of two models. transformers loads it, with no weight missing and none left over. Every weight is
  the mean, in the files and in the loaded model.
- **slices**: a frankenmerge of two models: layers 0 to 2 of the first, 1 to 3 of the second, and the first's from 3 on.
  transformers loads it. Every layer has the weights of the layer it comes from and is of the same kind. It reads a
  text, and its output is finite.
- **LoRA**: an adapter made by PEFT {peft} on the modules that PEFT chooses, applied on the way. transformers loads the
  result, and every weight is what PEFT's `merge_and_unload` makes.

A refused merge ends with a message before any weight is read; the notes quote it. `make families` repeats all of this.
It fails if the results differ from this page, or if anything is WRONG.
"""


def page(results: Mapping[str, Result]) -> str:
    """The page, in Markdown.

    Args:
        results: by family.
    """
    notes: dict[str, int] = {}
    tried = {family: result for family, result in results.items() if not isinstance(result, str)}
    lines = [f"| family | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
    lines += [
        f"| `{family}` | {' | '.join(_cell(outcomes[column], notes) for column in COLUMNS)} |"
        for family, outcomes in tried.items()
    ]
    intro = _INTRO.format(
        transformers=version("transformers"), peft=version("peft"), tried=len(tried), all=len(results)
    )
    parts = [intro, *lines, "", "## Notes", "", *(f"{number}. {_plain(note)}" for note, number in notes.items())]
    if len(tried) < len(results):
        parts += ["", "## Not tried", ""]
        parts += [f"- `{family}`: {_plain(why)}" for family, why in results.items() if isinstance(why, str)]
    return "\n".join(parts) + "\n"


def wrong(results: Mapping[str, Result]) -> list[str]:
    """All that is wrong, a line each."""
    return [
        f"{family}, {column}: {outcome.note}"
        for family, result in results.items()
        if not isinstance(result, str)
        for column, outcome in result.items()
        if outcome.status is Status.WRONG
    ]


def _cell(outcome: Outcome, notes: dict[str, int]) -> str:
    if not outcome.note:
        return outcome.status.value
    return f"{outcome.status.value} ({notes.setdefault(outcome.note, len(notes) + 1)})"


def _plain(text: str) -> str:
    """Text in which Markdown sees no markup."""
    return text.replace("<", "&lt;").replace("*", r"\*").replace("_", r"\_").replace("[", r"\[").replace("`", "'")
