"""What methods say of themselves, and the errors they raise."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from pydantic import ValidationError

from mergekit_ray.core.declaration import Access, BaseUse
from mergekit_ray.core.errors import MergeError
from mergekit_ray.core.registry import METHODS
from support.operands import merge
from support.waiting import DEADLINE_SECONDS

PARAMETERS = {
    "linear": {"weight": "model", "normalize": "global"},
    "slerp": {"t": "global"},
    "passthrough": {"scale": "model"},
    "task_arithmetic": {"weight": "model", "normalize": "global", "lambda": "global"},
    "ties": {
        "weight": "model",
        "density": "model",
        "normalize": "global",
        "lambda": "global",
        "rescale": "global",
        "int8_mask": "global",
    },
    "dare_linear": {
        "weight": "model",
        "density": "model",
        "normalize": "global",
        "rescale": "global",
        "lambda": "global",
    },
}
PARAMETERS["dare_ties"] = PARAMETERS["dare_linear"]

DEFAULTS = {
    "linear": {"normalize": True},
    "task_arithmetic": {"normalize": False, "lambda": 1.0},
    "ties": {"normalize": True, "lambda": 1.0, "rescale": False, "int8_mask": False},
    "dare_linear": {"normalize": False, "rescale": True, "lambda": 1.0},
    "dare_ties": {"normalize": False, "rescale": True, "lambda": 1.0},
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_names(name: str) -> None:
    assert METHODS.get(name).parameter_names() == PARAMETERS[name]


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults(name: str) -> None:
    assert METHODS.get(name).global_parameters().model_dump(by_alias=True) == DEFAULTS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_method_and_parameter_is_described(name: str) -> None:
    declaration = METHODS.get(name)
    assert declaration.name == name
    assert declaration.summary.endswith(".")
    assert declaration.formula
    for model in (declaration.model_parameters, declaration.global_parameters):
        assert all(field.description for field in model.model_fields.values())


def test_bases_and_numbers_of_models() -> None:
    declared = {name: METHODS.get(name) for name in PARAMETERS}
    assert {name for name, d in declared.items() if d.base is BaseUse.FORBIDDEN} == {"linear", "passthrough"}
    assert all(d.base is not BaseUse.OPTIONAL for d in declared.values())
    assert {name for name, d in declared.items() if d.max_models == 1} == {"slerp", "passthrough"}
    assert {name for name, d in declared.items() if d.base_is_input} == {"slerp"}
    assert {name for name, d in declared.items() if d.access is Access.REDUCE} == {
        "slerp",
        "ties",
        "dare_linear",
        "dare_ties",
    }


@pytest.mark.parametrize("value", [1, 1.0, True])
def test_numbers_serve_as_booleans(value: float) -> None:
    ties = METHODS.get("ties").global_parameters
    assert ties.model_validate({"int8_mask": value, "normalize": 0.0}).model_dump() == {
        "int8_mask": True,
        "normalize": False,
        "lambda_": 1.0,
        "rescale": False,
    }


def test_required_parameters() -> None:
    for name in ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties"):
        with pytest.raises(ValidationError, match="weight"):
            METHODS.get(name).model_parameters()
    with pytest.raises(ValidationError, match="t\n"):
        METHODS.get("slerp").global_parameters()


@pytest.mark.parametrize("density", [-0.1, 1.1, float("nan")])
def test_density_is_a_part(density: float) -> None:
    with pytest.raises(ValidationError, match="density"):
        METHODS.get("ties").model_parameters(weight=1.0, density=density)


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_weights_are_finite(weight: float) -> None:
    with pytest.raises(ValidationError, match="weight"):
        METHODS.get("linear").model_parameters(weight=weight)


@pytest.mark.parametrize("weights", [(0.0, 0.0), (1.0, -1.0), (0.1, 0.2, -0.3)])
@pytest.mark.parametrize("name", ["linear", "task_arithmetic", "dare_linear"])
def test_weights_that_cancel_cannot_be_normalised(name: str, weights: tuple[float, ...]) -> None:
    xs = [torch.ones(3)] * len(weights)
    with pytest.raises(MergeError, match="sum to 0") as caught:
        merge(
            name,
            xs,
            None if name == "linear" else torch.ones(3),
            parameters={"normalize": True},
            input_parameters=[{"weight": weight} for weight in weights],
        )
    assert "normalize: false" in str(caught.value)


def test_small_weights_can_be_normalised() -> None:
    merged = merge("linear", [torch.ones(3), 3 * torch.ones(3)], input_parameters=[{"weight": 1e-15}] * 2)
    assert torch.equal(merged, torch.full((3,), 2.0))


def test_passthrough_without_scale_is_the_input() -> None:
    x = torch.tensor([1.0, -0.0, 1e-45])
    assert torch.equal(merge("passthrough", [x]).view(torch.int32), x.view(torch.int32))


PROPAGATING = {"linear", "passthrough", "slerp", "task_arithmetic"}


@pytest.mark.parametrize("name", PARAMETERS)
def test_only_methods_that_drop_nothing_promise_to_show_non_finite_inputs(name: str) -> None:
    assert METHODS.get(name).propagates_non_finite is (name in PROPAGATING)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", sorted(PROPAGATING))
def test_non_finite_inputs_show_in_the_result(name: str, factor: float, bad: float) -> None:
    """Whichever tensor is damaged, and though its weight, scale or place on the arc be 0."""
    num_models = METHODS.get(name).max_models or 2
    has_base = METHODS.get(name).base is BaseUse.REQUIRED
    parameters = {"slerp": {"t": factor}, "linear": {"normalize": False}}.get(name, {})
    per_model = {"slerp": {}, "passthrough": {"scale": factor}}.get(name, {"weight": factor})
    for damaged in range(num_models + has_base):
        tensors = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([-1.0, 2.0, 1.0]), torch.tensor([0.0, 5.0, 2.0])]
        tensors[damaged][1] = bad
        xs, base = tensors[:num_models], tensors[num_models] if has_base else None
        merged = merge(name, xs, base, parameters=parameters, input_parameters=[per_model] * num_models)
        assert not torch.isfinite(merged).all()


def test_declarations_are_read_without_torch() -> None:
    script = (
        "import sys; from mergekit_ray.core.registry import METHODS; "
        "assert len(METHODS.names()) >= 7; "
        "METHODS.get('ties').global_parameters.model_validate({'lambda': 0.5}); "
        "assert not {'torch', 'numpy'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=DEADLINE_SECONDS)


def test_no_method_has_a_parameter_of_text() -> None:
    """The JSON Schema of recipes takes none."""
    for method in map(METHODS.get, METHODS.names()):
        for declared in (method.model_parameters, method.global_parameters):
            for name, field in declared.model_fields.items():
                assert field.annotation in (float, int, bool, float | None), (method.name, name)
