"""``validate --models`` refuses what `merge` refuses before anything is computed, with the same words."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergekit_ray import merge
from mergekit_ray.core.errors import MergekitRayError
from mergekit_ray.operations.before import parts_of, prepare_parts
from mergekit_ray.operations.recipes import load_recipe

FIRST = "name: x\nmerge_method: passthrough\nmodels: [{model: '{a}'}]\n"
LAST = "merge_method: passthrough\nmodels: [{model: x}]\n"
BAD = {
    "an output in an input": (
        "merge_method: passthrough\nmodels: [{model: '{a}'}]\noutput: '{a}/merged'\n",
        "inside one",
    ),
    "an output that is an input": (
        "merge_method: passthrough\nmodels: [{model: '{a}'}]\noutput: '{a}'\n",
        "is one of the",
    ),
    "an unknown scheme": (
        "merge_method: passthrough\nmodels: [{model: '{a}'}]\noutput: s33://b/x\n",
        "unknown storage",
    ),
    "no slashes": ("merge_method: passthrough\nmodels: [{model: '{a}'}]\noutput: hf:me/x\n", "two slashes"),
    "one output for two stages": (
        f"{FIRST}output: '{{out}}/x'\n---\n{LAST}output: '{{out}}/x'\n",
        "two stages have the same output",
    ),
    "a stage in another's input": (f"{FIRST}output: '{{a}}/x'\n---\n{LAST}output: '{{out}}/y'\n", "inside one"),
}


@pytest.mark.parametrize("case", BAD)
def test_both_refuse_it_alike(case: str, models: list[Path], tmp_path: Path) -> None:
    text, words = BAD[case]
    recipe = load_recipe(text.replace("{a}", str(models[0])).replace("{out}", str(tmp_path / "out")))
    with pytest.raises(MergekitRayError, match=words) as validated:
        prepare_parts(parts_of(recipe, None))
    with pytest.raises(MergekitRayError) as merged:
        merge(recipe, progress=False)
    assert (str(validated.value), type(validated.value)) == (str(merged.value), type(merged.value))
    assert not (tmp_path / "out").exists()
