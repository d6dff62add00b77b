"""Plans and methods as tables for a person, and as JSON data."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic_core import PydanticUndefined
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

from mergekit_ray.core.declaration import MethodDeclaration
from mergekit_ray.core.expressions import Expression, Load, Merge
from mergekit_ray.core.plan import Plan
from mergekit_ray.core.registry import METHODS
from mergekit_ray.core.sizes import format_bytes
from mergekit_ray.operations.plan import Explanation
from mergekit_ray.planning.estimate import Cluster, Estimate
from mergekit_ray.planning.windows import FIXED_BYTES, comfortable_memory, largest_window, mapped_models, memory_needed
from mergekit_ray.reporting.reporters import duration

_PIPED_WIDTH = 140
_MAX_ROWS = 40
_MAX_DROPPED = 8

_PAGE_HEAD = """\
# Merge methods

Made from the methods' declarations by `mergekit-ray methods --markdown`; `mergekit-ray methods NAME` prints one.
`b` is the base model's tensor, `x_i` that of model i, `δ_i = x_i − b` its task vector, `w_i` its weight, `λ` the
parameter `lambda`. Parameters *per model* are looked up for each model, those *per tensor* once per output tensor;
both may be numbers, gradients over the layers, and lists of filters.

At the edges every method does the same (`tests/unit/methods/test_edge_cases.py` holds all of them to it):

- Models that are equal give the model, and zeros give zeros. Opposite models, a base of zeros, tensors without
  elements, of one element, and scalars give finite results.
- Norms, products and sums are taken in float32 or float64 and scaled where they must be: float16 tensors whose squares
  overflow, float32 ones up to 1e30, denormals, and values whose squares vanish are merged like any others
  (but by `wudi`, whose steps have a size of their own).
- A result that is too large for the dtype that is stored, and a NaN or an infinity in an input, end the merge with an
  error that names tensor and model; `--allow-non-finite` lets them pass.
- Weights that sum to zero and are to be normalised are an error, told before anything is read. Without `normalize` they
  are weights like any others.
- `density: 0` gives the base (with `epsilon: 0`, where there is one); `density: 1` and `gamma: 0` drop nothing.

| method | base model | models | what it does |
|---|---|---|---|
"""


def print_plan(plan: Plan) -> None:
    """Inputs, shards with what they read, write and hold, and the sums."""
    console = _console()
    inputs = Table(title="Inputs", title_justify="left")
    for column in ("model", "where", "files read"):
        inputs.add_column(column, overflow="fold")
    for model in plan.inputs.values():
        inputs.add_row(escape(model.reference), escape(model.uri), str(len(model.files)))
    console.print(inputs)

    mapped = mapped_models(plan.inputs)
    shards = Table(title="Shards", title_justify="left")
    shards.add_column("file", overflow="fold")
    for column in ("tensors", "parameters", "to read", "to write", "peak\nmemory"):
        shards.add_column(column, justify="right", no_wrap=True)
    for shard in plan.shards[:_MAX_ROWS]:
        largest = largest_window(shard.tensors, mapped)
        held = FIXED_BYTES + (0 if largest is None else largest.memory_bytes)
        shards.add_row(
            shard.file,
            str(len(shard.tensors)),
            f"{shard.num_parameters:,}",
            format_bytes(shard.read_bytes),
            format_bytes(shard.num_bytes),
            format_bytes(held),
        )
    if len(plan.shards) > _MAX_ROWS:
        shards.add_row(f"... and {len(plan.shards) - _MAX_ROWS} more", "", "", "", "", "")
    shards.add_section()
    shards.add_row(
        f"all {len(plan.shards)}",
        str(sum(len(shard.tensors) for shard in plan.shards)),
        f"{plan.num_parameters:,}",
        format_bytes(plan.read_bytes),
        format_bytes(plan.num_bytes),
        format_bytes(memory_needed(plan)),
    )
    console.print(shards)
    console.print(
        f"Memory of a worker: at least {format_bytes(memory_needed(plan))}; "
        f"{format_bytes(comfortable_memory(plan))} if --memory is not given."
    )
    for warning in plan.warnings:
        console.print(f"[yellow]warning:[/yellow] {escape(warning)}", highlight=False)
    for title, named in (("Not used", plan.dropped), ("Shared", plan.aliased)):
        for i, (name, reason) in enumerate(named.items()):
            if i == _MAX_DROPPED:
                console.print(f"{title}: ... and {len(named) - i} more (all with --json)")
                break
            console.print(f"{title}: {name} ({reason})", highlight=False, markup=False)


def print_estimate(cluster: Cluster, expected: Estimate) -> None:
    """How long it takes there, and what is the limit."""
    store = "" if cluster.store_bytes is None else f", a store of {format_bytes(cluster.store_bytes)}/s"
    idle = cluster.num_nodes - expected.num_busy
    fewer = f"; {idle} of them have nothing to do: there are fewer shards" if idle else ""
    text = (
        f"On {cluster.num_nodes} nodes with links of {format_bytes(cluster.link_bytes)}/s{store}: at least "
        f"{duration(expected.seconds)} ({expected.bound}; work spread to {100 * expected.balance:.0f} %{fewer}). "
        "Start-up and arithmetic are not in it."
    )
    _console().print(text, highlight=False, markup=False)


def print_explanations(plan: Plan, found: Sequence[Explanation]) -> None:
    """How each tensor is computed, and the tree of what it is made of."""
    console = _console()
    for each in found:
        spec = each.tensor.spec
        tree = Tree(f"[bold]{escape(spec.name)}[/bold] {spec.dtype.config_name} {escape(str(list(spec.shape)))}")
        tree.add(f"[bold]{each.strategy}[/bold]: {escape(each.why)}")
        _grow(tree, each.tensor.expression, plan)
        console.print(tree)


def _grow(tree: Tree, expression: Expression, plan: Plan) -> None:
    branch = tree.add(escape(_label(expression, plan)))
    for child in expression.children():
        _grow(branch, child, plan)


def _label(expression: Expression, plan: Plan) -> str:
    """An expression without its children, in a line."""
    dtype = expression.spec.dtype.config_name
    if isinstance(expression, Load):
        place = expression.location
        where = f"{plan.inputs[expression.model].reference}/{place.file}"
        return f"load {dtype} from {where}, bytes {place.start} to {place.end}"
    if isinstance(expression, Merge):
        shared = _assigned(expression.parameters)
        each = [_assigned(parameters) for parameters in expression.input_parameters]
        models = "; ".join(each) if any(each) else ""
        return f"{expression.method} in {expression.compute_dtype.config_name}" + "".join(
            f" ({text})" for text in (shared, models) if text
        )
    return f"{expression.kind} -> {dtype}"


def _assigned(parameters: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in parameters.items())


def describe_methods(name: str | None = None) -> list[dict[str, Any]]:
    """Declarations of all methods, or of one, as plain data.

    Raises:
        ConfigError: no method of this name.
    """
    return [_describe(METHODS.get(each)) for each in ([name] if name is not None else METHODS.names())]


def print_methods() -> None:
    """One row per method."""
    table = Table()
    table.add_column("method", no_wrap=True)
    for column in ("base model", "models", "parameters", "what it does"):
        table.add_column(column, overflow="fold")
    for method in describe_methods():
        parameters = ", ".join(p["name"] for p in method["parameters"])
        table.add_row(method["name"], method["base"], method["models"], parameters, method["summary"])
    _console().print(table)


def print_method(name: str) -> None:
    """One method with its formula, source and parameters."""
    console = _console()
    [method] = describe_methods(name)
    console.print(f"[bold]{method['name']}[/bold]  {method['summary']}\n", highlight=False)
    console.print(f"  result      {method['formula']}", highlight=False, markup=False)
    if method["reference"]:
        console.print(f"  source      {method['reference']}", highlight=False, markup=False)
    console.print(f"  base model  {method['base']}", highlight=False)
    console.print(f"  models      {method['models']}\n", highlight=False)
    console.print(method["notes"] + "\n", highlight=False, markup=False)
    if not method["parameters"]:
        console.print("It has no parameters.")
        return
    table = Table()
    for column in ("parameter", "looked up", "default", "meaning"):
        table.add_column(column, overflow="fold")
    for parameter in method["parameters"]:
        table.add_row(parameter["name"], _scope(parameter), _default(parameter), parameter["description"])
    console.print(table)


def methods_markdown() -> str:
    """The reference page of all methods."""
    lines = _PAGE_HEAD.splitlines()
    methods = describe_methods()
    lines += [
        f"| [`{each['name']}`](#{each['name']}) | {each['base']} | {each['models']} | {each['summary']} |"
        for each in methods
    ]
    for each in methods:
        lines += ["", f"## {each['name']}", "", each["summary"], "", f"    {each['formula']}", "", each["notes"], ""]
        if each["reference"]:
            lines += [f"Source: <{each['reference']}>", ""]
        lines.append(f"Base model: {each['base']}. Models: {each['models']}.")
        if each["parameters"]:
            lines += ["", "| parameter | looked up | default | meaning |", "|---|---|---|---|"]
            lines += [
                f"| `{p['name']}` | {_scope(p)} | {_default(p)} | {p['description']} |" for p in each["parameters"]
            ]
    return "\n".join(lines) + "\n"


def _scope(parameter: dict[str, Any]) -> str:
    return "per model" if parameter["scope"] == "model" else "per tensor"


def _default(parameter: dict[str, Any]) -> str:
    return "required" if parameter["required"] else str(parameter["default"])


def _console() -> Console:
    """As wide as the terminal; wide enough for every column where there is none."""
    return Console() if sys.stdout.isatty() else Console(width=_PIPED_WIDTH)


def _describe(method: type[MethodDeclaration]) -> dict[str, Any]:
    parameters = []
    for scope, declared in (("model", method.model_parameters), ("global", method.global_parameters)):
        for name, info in declared.model_fields.items():
            required = info.default is PydanticUndefined and info.default_factory is None
            parameters.append(
                {
                    "name": info.alias or name,
                    "scope": scope,
                    "required": required,
                    "default": None if required else info.get_default(call_default_factory=True),
                    "description": info.description or "",
                }
            )
    return {
        "name": method.name,
        "summary": method.summary,
        "formula": method.formula,
        "notes": inspect.getdoc(method) or "",
        "reference": method.reference,
        "base": method.base.value,
        "models": _models(method),
        "parameters": parameters,
    }


def _models(method: type[MethodDeclaration]) -> str:
    if method.base_is_input:
        return "2, one of them the base"
    if method.max_models == method.min_models:
        return str(method.min_models)
    return f"{method.min_models} or more" if method.max_models is None else f"{method.min_models}-{method.max_models}"
