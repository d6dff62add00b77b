"""The model card: README.md as the Hugging Face Hub expects it. Source: https://huggingface.co/docs/hub/model-cards."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from typing import Any, Final

import yaml

from mergekit_ray.checkpoint.diffusers import is_of_diffusers
from mergekit_ray.core.errors import CheckpointError
from mergekit_ray.core.plan import Plan
from mergekit_ray.core.sizes import format_bytes
from mergekit_ray.core.version import __version__
from mergekit_ray.output.destination import CARD_FILE, MANIFEST_FILE
from mergekit_ray.storage.names import repository_of
from mergekit_ray.storage.protocols import Source

_MAX_CARD_BYTES: Final = 4 << 20
_IS_SEED: Final = re.compile(r"(stages\[\d+\]\.|backbone\.)*seed: ")


def model_card(plan: Plan, licences: Mapping[str, str | None]) -> str:
    """Front matter, how the model came about, the recipe.

    Args:
        plan: what was carried out.
        licences: of the inputs, by key, as far as their own cards say them; see `licence_of`.
    """
    models = list(plan.inputs.values())
    # By where they were found, not by how they look: "runs/merged" may be a folder.
    on_hub = [repository_of(m.uri) for m in models if m.uri.startswith("hf://")]
    front: dict[str, Any] = {"base_model": on_hub, "base_model_relation": "merge"} if on_hub else {}
    if plan.config:
        front |= {"library_name": "diffusers" if is_of_diffusers(plan.config) else "transformers"}
    front |= _front_of(licences)
    front |= {"tags": ["merge", "mergekit", "mergekit-ray"]}
    method = plan.recipe.get("merge_method") or next(iter(plan.recipe), "merge")
    said = {key: f" ({licence})" if (licence := licences.get(key)) else "" for key in plan.inputs}
    listed = "\n".join(f"- {model.reference}{said[model.key]}" for model in models)
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n"
        f"# Merged model\n\n"
        f"Made with mergekit-ray {__version__} by `{method}` from\n\n{listed}\n\n"
        f"{plan.num_parameters:,} parameters, {format_bytes(plan.num_bytes)}. Digests of every tensor and the exact "
        f"versions of the inputs are in `{MANIFEST_FILE}`.\n\n"
        f"## Recipe\n\n{_recipe(plan)}\n"
        f"{_how_to_reproduce(plan)}"
    )


def _recipe(plan: Plan) -> str:
    """As its author wrote it, and what was changed since."""
    text = plan.recipe_text
    if text is None:
        return _fenced(yaml.safe_dump(dict(plan.recipe), sort_keys=False, allow_unicode=True), "yaml")
    shown = _fenced(text, "yaml")
    if plan.stage is not None:
        shown += f"\nThis model is its stage `{plan.stage}`.\n"
    if plan.recipe_changes:
        shown += f"\nMerged with {', '.join(f'`{change}`' for change in plan.recipe_changes)} instead.\n"
    return shown


def _how_to_reproduce(plan: Plan) -> str:
    lines = [
        f"pip install mergekit-ray=={__version__}",
        f"mergekit-ray reproduce {MANIFEST_FILE} ./again  # from the same versions of the inputs; compares the digests",
    ]
    if "transplant" not in plan.recipe and plan.stage is None:
        seeds = [change for change in plan.recipe_changes if _IS_SEED.match(change)]
        if seeds == list(plan.recipe_changes):
            command = (
                "# the recipe above, with the inputs as they are now\nmergekit-ray merge recipe.yml ./again --seed SEED"
            )
            lines.append(command.replace("SEED", str(plan.seed)) if seeds else command.rpartition(" --")[0])
    return "## Reproduce\n\n" + _fenced("\n".join(lines), "sh")


def _fenced(text: str, language: str) -> str:
    """A code block whose fence the text does not hold."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}\n"


def _front_of(licences: Mapping[str, str | None]) -> dict[str, str]:
    """One licence that all inputs have, or all of theirs by name: what that means together is for a person to say."""
    known = sorted({licence for licence in licences.values() if licence})
    if not known:
        return {}
    if len(known) == 1 and all(licences.values()):
        return {"license": known[0]}
    return {"license": "other", "license_name": ", ".join(known)}


def licence_of(source: Source) -> str | None:
    """The licence that a model's own card states; None if it has no card, or one that does not say.

    Raises:
        StorageError: the store failed.
    """
    with contextlib.suppress(CheckpointError, yaml.YAMLError):
        text = source.read(CARD_FILE, max_bytes=_MAX_CARD_BYTES).decode("utf-8", "replace")
        parts = text.split("---\n", 2)
        front = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
        found = front.get("license") if isinstance(front, dict) else None
        return found if isinstance(found, str) else None
    return None
