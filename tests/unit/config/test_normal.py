from __future__ import annotations

from mergekit_ray.config.load import load_recipe
from mergekit_ray.config.normal import NormalModule, NormalSlice, normalise
from mergekit_ray.config.recipe import DenseRecipe
from support.declared_methods import Methods


def modules(text: str, methods: Methods) -> tuple[NormalModule, ...]:
    recipe = load_recipe(text, methods=methods)
    assert isinstance(recipe, DenseRecipe)
    return normalise(recipe, methods)


def only_slice(text: str, methods: Methods) -> NormalSlice:
    ((piece,),) = [module.slices for module in modules(text, methods)]
    return piece


def names(piece: NormalSlice) -> list[str]:
    return [str(source.model) for source in piece.inputs]


def test_models_are_one_slice_over_all_layers_in_the_recipes_order(methods: Methods) -> None:
    text = "merge_method: linear\nmodels:\n" + "".join(
        f"  - {{model: {m}, parameters: {{weight: {w}}}}}\n" for m, w in (("z", 1), ("a", 2), ("z", 3))
    )
    (module,) = modules(text + "parameters: {normalize: false}\n", methods)
    assert module.name is None
    (piece,) = module.slices
    assert names(piece) == ["z", "a", "z"]
    assert [source.levels[0]["weight"] for source in piece.inputs] == [1, 2, 3]
    assert [source.path for source in piece.inputs] == [("models", 0), ("models", 1), ("models", 2)]
    assert all(source.levels[1] == {"normalize": False} for source in piece.inputs)
    assert (piece.num_layers, piece.base, piece.base_layer_range, piece.path) == (None, None, None, ("models",))
    assert {source.layer_range for source in piece.inputs} == {None}


def test_levels_stand_in_mergekits_order(methods: Methods) -> None:
    text = """\
merge_method: linear
modules:
  m:
    parameters: {weight: 3}
    slices:
      - parameters: {weight: 2}
        sources:
          - {model: a, layer_range: [0, 4], parameters: {weight: 1}}
          - {model: b, layer_range: [4, 8]}
parameters: {weight: 4}
"""
    (module,) = modules(text, methods)
    assert module.name == "m"
    (piece,) = module.slices
    assert [[level["weight"] for level in source.levels] for source in piece.inputs] == [[1, 2, 3, 4], [2, 3, 4]]
    assert [level["weight"] for level in piece.levels] == [2, 3, 4]
    assert piece.inputs[1].path == ("modules", "m", "slices", 0, "sources", 1)
    assert piece.num_layers == 4


def test_slices_keep_order_repeats_and_ranges(methods: Methods) -> None:
    text = "merge_method: passthrough\nslices:\n" + "".join(
        f"  - sources: [{{model: {m}, layer_range: [{a}, {b}]}}]\n"
        for m, a, b in (("a", 4, 8), ("b", 0, 2), ("a", 4, 8))
    )
    (module,) = modules(text, methods)
    found = [(names(piece)[0], piece.inputs[0].layer_range, piece.num_layers) for piece in module.slices]
    assert found == [("a", (4, 8), 4), ("b", (0, 2), 2), ("a", (4, 8), 4)]


def test_a_base_among_the_sources_keeps_its_own_layers(methods: Methods) -> None:
    text = """\
merge_method: ties
base_model: base
parameters: {weight: 1}
slices:
  - sources:
      - {model: a, layer_range: [0, 4]}
      - {model: base, layer_range: [8, 12]}
"""
    piece = only_slice(text, methods)
    assert names(piece) == ["a"]
    assert (str(piece.base), piece.base_layer_range, piece.num_layers) == ("base", (8, 12), 4)


def test_a_base_beside_the_sources_takes_the_layers_they_share(methods: Methods) -> None:
    text = """\
merge_method: ties
base_model: base
parameters: {weight: 1}
slices:
  - sources: [{model: a, layer_range: [2, 4]}, {model: b, layer_range: [2, 4]}]
  - sources: [{model: a, layer_range: [0, 1]}]
    base_model: other
"""
    ((first, second),) = [module.slices for module in modules(text, methods)]
    assert (str(first.base), first.base_layer_range) == ("base", (2, 4))
    assert (str(second.base), second.base_layer_range) == ("other", (0, 1))


def test_slerp_of_a_model_with_other_layers_of_itself(methods: Methods) -> None:
    text = """\
merge_method: slerp
base_model: a
parameters: {t: 0.5}
slices:
  - sources: [{model: a, layer_range: [0, 4]}, {model: a, layer_range: [4, 8]}]
"""
    piece = only_slice(text, methods)
    assert (names(piece), piece.inputs[0].layer_range) == (["a"], (4, 8))
    assert (str(piece.base), piece.base_layer_range) == ("a", (0, 4))


def test_a_base_may_be_the_second_of_two(methods: Methods) -> None:
    text = "merge_method: slerp\nbase_model: b\nmodels: [{model: a}, {model: b}]\nparameters: {t: 0.5}\n"
    piece = only_slice(text, methods)
    assert (names(piece), str(piece.base), piece.base_layer_range) == (["a"], "b", None)


def test_without_a_base_in_the_arithmetic_base_model_is_the_donor(methods: Methods) -> None:
    text = "merge_method: linear\nbase_model: b\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n"
    recipe = load_recipe(text, methods=methods)
    assert isinstance(recipe, DenseRecipe)
    piece = only_slice(text, methods)
    assert (names(piece), piece.base) == (["a", "b"], None)
    assert str(recipe.donor) == "b"
    recipe = load_recipe(text.replace("base_model: b\n", ""), methods=methods)
    assert str(recipe.donor) == "a"


def test_an_optional_base_leaves_the_inputs(methods: Methods) -> None:
    text = "merge_method: nuslerp\n%smodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n"
    assert only_slice(text % "", methods).base is None
    assert str(only_slice(text % "base_model: c\n", methods).base) == "c"
