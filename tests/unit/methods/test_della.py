"""DELLA against its formula: what is kept, what becomes of it, and that it never depends on how it is cut."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from mergekit_ray.config.load import load_recipe
from mergekit_ray.config.settings import Resolver
from mergekit_ray.core.declaration import Access, BaseUse
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import ConfigError, MergeError
from mergekit_ray.core.expressions import Merge
from mergekit_ray.core.registry import METHODS
from mergekit_ray.core.tensors import TensorSpec
from mergekit_ray.methods.shared import packed_mask, rank_sampling
from support.memory_inputs import Inputs, evaluate
from support.operands import MemoryOperands, merge
from support.references import merge as reference
from support.references import trimming

NAMES = ["della", "della_linear"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(), (1,), (0,), (0, 5), (5, 0), (7,), (40, 33), (3, 5, 7), (9, 1)]
SETTINGS: list[tuple[dict[str, Any], list[dict[str, float]]]] = [
    ({}, [{"weight": 0.5, "density": 0.5}, {"weight": 0.3, "density": 0.7, "epsilon": 0.2}, {"weight": 0.7}]),
    ({"normalize": False, "lambda": 0.7, "rescale": False}, [{"weight": 0.5, "density": 0.3}] * 2),
    ({"normalize": True}, [{"weight": 1.0, "density": 0.4, "epsilon": 0.35}, {"weight": 0.4, "density": 0.0}]),
    ({}, [{"weight": 1.0, "density": 0.6, "epsilon": 0.0}]),
]


def tensors(count: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[list[torch.Tensor], Any]:
    generator = torch.Generator().manual_seed(6)
    base = torch.randn(shape, generator=generator)
    xs = [(base + 0.5 * torch.randn(shape, generator=generator)).to(dtype) for _ in range(count)]
    return xs, base.to(dtype)


def expected(
    name: str, xs: list[torch.Tensor], base: torch.Tensor, parameters: dict[str, Any], each: list[dict[str, float]]
) -> reference.Expected:
    b = base.double().numpy()
    trimmed = []
    for index, (x, own) in enumerate(zip(xs, each, strict=True)):
        ranked = (x.float() - base.float()).abs().numpy()
        density, epsilon = own.get("density", 1.0), own.get("epsilon", 0.15)
        mask = trimming.keep_sampled(f"model {index}", ranked, density, epsilon)
        trimmed.append(reference.rescaled(x.double().numpy() - b, mask, rescale=parameters.get("rescale", True)))
    total = reference.elected if name == "della" else reference.added_to_base
    weights = [own["weight"] for own in each]
    normalize = parameters.get("normalize", name == "della")
    return total(b, trimmed, weights, normalize=normalize, scale=parameters.get("lambda", 1.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("parameters", "each"), SETTINGS)
@pytest.mark.parametrize("name", NAMES)
def test_formula(name: str, parameters: dict[str, Any], each: list[dict[str, float]], dtype: torch.dtype) -> None:
    for shape in SHAPES:
        xs, base = tensors(len(each), shape, dtype)
        result = merge(name, xs, base, parameters=parameters, input_parameters=each)
        assert (result.dtype, result.shape) == (dtype, shape)
        expected(name, xs, base, parameters, each).check(result, roundings=12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(2011,), (67, 29)])
@pytest.mark.parametrize("name", NAMES)
def test_any_chunk_size_in_any_compute_dtype(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    parameters, each = SETTINGS[2]
    xs, base = tensors(2, shape, dtype)
    options: dict[str, Any] = {"parameters": parameters, "input_parameters": each, "compute_dtype": dtype}
    whole = merge(name, xs, base, **options)
    assert torch.isfinite(whole).all()
    for chunk_elements in (7, 64, 1000):
        assert torch.equal(merge(name, xs, base, chunk_elements=chunk_elements, **options), whole)


@pytest.mark.parametrize("shape", [(801, 701), (3, 200_003), (600_000,)])
@pytest.mark.parametrize("name", NAMES)
def test_any_cut_and_any_number_of_threads(name: str, shape: tuple[int, ...]) -> None:
    """Rows that end within blocks, rows of about a block, and one that is longer than two."""
    parameters, each = SETTINGS[0]
    xs, base = tensors(3, shape, torch.bfloat16)
    inputs = Inputs()
    tree = Merge(
        name,
        TensorSpec("out", DType.F32, shape),
        tuple(inputs.load(f"m{i}", x) for i, x in enumerate(xs)),
        inputs.load("base", base),
        parameters,
        tuple(each),
        ("model 0", "model 1", "model 2"),
    )
    whole = evaluate(tree, inputs)
    for num_threads, chunk_elements in ((2, 1 << 16), (3, 9973)):
        found = evaluate(tree, inputs, num_threads=num_threads, chunk_elements=chunk_elements)
        assert torch.equal(found.view(torch.int32), whole.view(torch.int32))
    in_memory = merge(
        name, xs, base, parameters=parameters, input_parameters=each, out_dtype=torch.float32, chunk_elements=100_000
    )
    assert torch.equal(in_memory.view(torch.int32), whole.view(torch.int32))


def test_rows_across_blocks_are_ranked_whole() -> None:
    """Elements of equal size in a row: which are kept follows from the words alone, block borders or not."""
    length, num_rows = 131_075, 5
    base = torch.zeros(num_rows, length)
    x = torch.ones(num_rows, length)
    each = [{"weight": 1.0, "density": 0.5, "epsilon": 0.49}]
    kept = merge("della_linear", [x], base, parameters={"rescale": False}, input_parameters=each) != 0
    # The lowest indices rank as the largest: kept with probability 0.99, the highest with 0.01.
    shares = kept.double().view(num_rows, 5, -1).mean(dim=2)
    assert torch.allclose(shares, torch.tensor([0.892, 0.696, 0.5, 0.304, 0.108], dtype=torch.float64), atol=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_by_torch_the_result_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters, each = SETTINGS[0]
    xs, base = tensors(3, (301, 200), torch.bfloat16)
    compiled = merge(name, xs, base, parameters=parameters, input_parameters=each, out_dtype=torch.float32)
    for module in (rank_sampling, packed_mask):
        monkeypatch.setattr(module, "is_compiled_for", lambda _: False)
    by_torch = merge(name, xs, base, parameters=parameters, input_parameters=each, out_dtype=torch.float32)
    assert torch.equal(by_torch, compiled)


def test_density_1_keeps_all_and_density_0_nothing() -> None:
    xs, base = tensors(1, (50, 20))
    for density, target in ((1.0, xs[0]), (0.0, base)):
        each = [{"weight": 1.0, "density": density}]
        assert torch.allclose(merge("della_linear", xs, base, input_parameters=each), target, atol=1e-6)


def test_nothing_is_read_where_nothing_is_random() -> None:
    declared = METHODS.get("della")
    operands = MemoryOperands(
        [torch.ones(9)] * 2,
        torch.zeros(9),
        parameters=declared.global_parameters(),
        input_parameters=[declared.model_parameters(weight=1.0, density=d) for d in (0.0, 1.0)],
    )
    declared().statistics(operands)  # type: ignore[attr-defined] # a ReduceMethod
    assert operands.blocks_read == 0


def test_linear_and_elected_drop_the_same_elements_and_dare_others() -> None:
    xs, base = tensors(1, (40, 500))
    each = [{"weight": 1.0, "density": 0.5}]
    results = [merge(name, xs, base, input_parameters=each, keys=["k"]) for name in (*NAMES, "dare_linear")]
    della, linear, dare = (result != base for result in results)
    assert torch.equal(della, linear)
    assert not torch.equal(della, dare)


def test_rescaling_restores_the_l1_norm() -> None:
    xs, base = tensors(1, (40, 500), torch.float64)
    for rescale in (False, True):
        merged = merge(
            "della_linear",
            xs,
            base,
            parameters={"rescale": rescale},
            input_parameters=[{"weight": 1.0, "density": 0.3}],
            compute_dtype=torch.float64,
        )
        part = float((merged - base).abs().sum() / (xs[0] - base).abs().sum())
        # Large ones are kept more often, so that what is kept is more than 0.3 of the norm.
        assert part == pytest.approx(1.0, rel=1e-9) if rescale else 0.32 < part < 0.45


@pytest.mark.parametrize("name", NAMES)
def test_models_equal_to_the_base_leave_it_bit_for_bit(name: str) -> None:
    _, base = tensors(0, (1000,))
    each = [{"weight": 0.5, "density": 0.5}, {"weight": -0.4, "density": 0.2}]
    assert torch.equal(merge(name, [base, base], base, input_parameters=each), base)


def test_probabilities_beyond_0_and_1_are_an_error_that_names_the_parameters() -> None:
    for name in NAMES:
        with pytest.raises(MergeError, match=r"density 0\.9 ± epsilon 0\.15"):
            merge(name, [torch.ones(5)], torch.zeros(5), input_parameters=[{"weight": 1.0, "density": 0.9}])


def test_cancelling_weights() -> None:
    each = [{"weight": 1.0}, {"weight": -1.0}]
    with pytest.raises(MergeError, match="sum to 0"):
        merge(
            "della_linear", [torch.ones(3)] * 2, torch.zeros(3), parameters={"normalize": True}, input_parameters=each
        )
    # Both changes cancel; zero counts as positive, so the first is left, over its own weight.
    assert merge("della", [torch.ones(3)] * 2, torch.zeros(3), input_parameters=each).tolist() == [1.0] * 3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", NAMES)
def test_damaged_inputs_are_named(name: str, bad: float) -> None:
    """They pass through the statistics, whose numbers they spoil, to the check that names the model."""
    xs, base = tensors(1, (30, 20))
    xs[0][7, 3] = bad
    inputs = Inputs()
    loads, spec = (inputs.load("damaged", xs[0]),), TensorSpec("out", DType.F32, (30, 20))
    tree = Merge(name, spec, loads, inputs.load("base", base), {}, ({"weight": 1.0, "density": 0.5},), ("key",))
    with pytest.raises(MergeError, match="damaged"):
        evaluate(tree, inputs)


@pytest.mark.parametrize("name", NAMES)
def test_declaration(name: str) -> None:
    declared = METHODS.get(name)
    assert declared.parameter_names() == {
        "weight": "model",
        "density": "model",
        "epsilon": "model",
        "normalize": "global",
        "rescale": "global",
        "lambda": "global",
    }
    assert declared.model_parameters(weight=1.0).model_dump() == {"weight": 1.0, "density": 1.0, "epsilon": 0.15}
    defaults = {"normalize": name == "della", "rescale": True, "lambda_": 1.0}
    assert declared.global_parameters().model_dump() == defaults
    assert (declared.base, declared.access, declared.min_models) == (BaseUse.REQUIRED, Access.REDUCE, 1)
    assert not declared.propagates_non_finite
    for epsilon in (-0.1, float("nan")):
        with pytest.raises(ValidationError, match="epsilon"):
            declared.model_parameters(weight=1.0, epsilon=epsilon)


@pytest.mark.parametrize("name", NAMES)
def test_probabilities_beyond_0_and_1_are_found_before_anything_is_read(name: str) -> None:
    source = {"model": "org/a", "parameters": {"weight": 1.0, "density": 0.9}}
    raw = {"merge_method": name, "base_model": "org/base", "models": [source], "dtype": "bfloat16"}
    with pytest.raises(ConfigError, match=r"models\[0\].*: org/a: density 0.9 ± epsilon 0.15 is not within"):
        load_recipe(raw)
    source["parameters"] = {"weight": 1.0, "density": [0.5, 0.9]}
    load_recipe(raw)  # which tensors there are is not known yet
    declared = METHODS.get(name).model_parameters
    (level,) = (dict(model.parameters or {}) for model in load_recipe(raw).models)
    resolver = Resolver(declared, [level], "model org/a")
    assert resolver.at("a.weight", 0.0)["density"] == 0.5
    with pytest.raises(ConfigError, match=r"model org/a, tensor z\.weight: density 0\.9 ± epsilon 0.15"):
        resolver.at("z.weight", 1.0)
