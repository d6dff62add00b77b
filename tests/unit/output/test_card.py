"""The model card's recipe: as its author wrote it, and what was changed since."""

from __future__ import annotations

from pathlib import Path

import yaml

from mergekit_ray import load_recipe, merge
from mergekit_ray.config.fields import OutputOptions
from mergekit_ray.core.dtypes import DType
from mergekit_ray.operations.prepare import prepare
from mergekit_ray.output.card import model_card

WRITTEN = """# Ours: the best of both.
parameters: {weight: 0.5}   # of each
models:
  - model: {a}
  - model: {b}
merge_method: linear
seed: 3
"""


def written_recipe(tmp_path: Path, models: list[Path], text: str = WRITTEN) -> Path:
    for name, model in zip("ab", models, strict=True):
        text = text.replace(f"{{{name}}}", str(model))
    path = tmp_path / "recipe.yml"
    path.write_text(text)
    return path


def test_the_card_has_the_recipe_as_it_was_written(tmp_path: Path, models: list[Path]) -> None:
    path = written_recipe(tmp_path, models)
    card = model_card(prepare(path).plan, {})
    assert f"```yaml\n{path.read_text()}```\n" in card
    assert "instead" not in card
    assert "mergekit-ray merge recipe.yml ./again\n" in card


def test_the_card_says_what_was_changed(tmp_path: Path, models: list[Path]) -> None:
    path = written_recipe(tmp_path, models)
    seeded = model_card(prepare(path, seed=7).plan, {})
    assert path.read_text() in seeded
    assert "Merged with `seed: 7` instead." in seeded
    assert "mergekit-ray merge recipe.yml ./again --seed 7" in seeded
    changed = load_recipe(path).model_copy(update={"dtype": DType.BF16, "output": OutputOptions(path="elsewhere")})
    card = model_card(prepare(changed).plan, {})
    assert 'Merged with `dtype: "bfloat16"` instead.' in card
    assert "mergekit-ray merge" not in card


def test_comments_change_neither_recipe_nor_plan(tmp_path: Path, models: list[Path]) -> None:
    path = written_recipe(tmp_path, models)
    first = load_recipe(path)
    other = load_recipe(f"# another comment\n{path.read_text()}")
    assert first == other
    assert first.to_data() == other.to_data()
    assert prepare(first).plan.digest == prepare(other).plan.digest
    assert prepare(first).plan == prepare(other).plan


def test_a_merge_whose_comments_changed_is_finished(tmp_path: Path, models: list[Path]) -> None:
    path = written_recipe(tmp_path, models)
    assert not merge(path, tmp_path / "out").was_there
    assert WRITTEN.splitlines()[0] in (tmp_path / "out" / "README.md").read_text()
    path.write_text(f"# another comment\n{path.read_text()}")
    assert merge(path, tmp_path / "out").was_there


def test_the_card_of_a_recipe_without_text(tmp_path: Path, models: list[Path]) -> None:
    data = yaml.safe_load(written_recipe(tmp_path, models).read_text())
    plan = prepare(data).plan
    assert plan.recipe_text is None
    assert yaml.safe_load(model_card(plan, {}).split("```yaml\n")[1].split("```")[0]) == plan.recipe


def test_a_card_whose_recipe_holds_a_fence_or_a_secret(tmp_path: Path, models: list[Path]) -> None:
    token = "hf_" + "x" * 34
    path = written_recipe(tmp_path, models, f"# ```yaml {token}\n{WRITTEN}")
    card = model_card(prepare(path).plan, {})
    assert "````yaml\n# ```yaml …\n" in card
    assert card.count("````") == 2
    assert token not in card


def test_the_cards_of_stages_have_the_whole_recipe(tmp_path: Path, models: list[Path]) -> None:
    text = WRITTEN.replace("seed: 3", f"name: half\noutput: {tmp_path}/half")
    text += (
        "---\n# the second step\nmerge_method: linear\nparameters: {weight: 1}\nmodels: [{model: half}, {model: {a}}]\n"
    )
    path = written_recipe(tmp_path, models, text)
    merge(path, tmp_path / "out")
    half, whole = ((tmp_path / name / "README.md").read_text() for name in ("half", "out"))
    assert path.read_text() in half
    assert path.read_text() in whole
    assert "its stage `half`" in half
    assert "its stage" not in whole
