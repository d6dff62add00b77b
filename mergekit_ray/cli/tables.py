"""Plans and methods as tables for a person, and as JSON data.

A terminal gets them wrapped to its width. A pipe gets a line for each row, however long, so that ``grep`` finds it.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic_core import PydanticUndefined
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from mergekit_ray.core.declaration import MethodDeclaration
from mergekit_ray.core.expressions import Expression, Gather, Load, Merge, Rows
from mergekit_ray.core.plan import Plan
from mergekit_ray.core.registry import METHODS
from mergekit_ray.core.sizes import counted, format_bytes
from mergekit_ray.operations.plan import Explanation
from mergekit_ray.planning.beforehand.stages import check_fits, least_memory
from mergekit_ray.planning.estimate import Cluster, Estimate
from mergekit_ray.planning.windows import FIXED_BYTES, comfortable_memory, largest_window, mapped_models, memory_needed
from mergekit_ray.reporting.reporters import duration
from mergekit_ray.reporting.text import INDENT, hanging, terminal_width

_PIPED_WIDTH = 10_000
_LEAST_WIDTH = 80
_MAX_ROWS = 40
_MAX_DROPPED = 8
_BOUNDS = {"link, reading": "reading over the links", "link, writing": "writing over the links", "store": "the store"}

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


def print_plan(plan: Plan, memory_bytes: int | None = None) -> None:
    """Inputs, shards with what they read, write and hold, and the sums.

    Args:
        plan: the plan.
        memory_bytes: budget of a worker, if one is given.

    Raises:
        PlanError: the budget is too small.
    """
    before = [] if memory_bytes is None else check_fits(plan, memory_bytes)[:-1]
    console = _console()
    models = list(plan.inputs.values())
    is_elsewhere = any(model.uri != model.reference for model in models)
    inputs = _table("model", *(["read from"] if is_elsewhere else []), numbers=["files"])
    for model in models:
        where = [escape(model.uri)] if is_elsewhere else []
        inputs.add_row(escape(model.reference), *where, str(len(model.files)))
    _show(console, inputs)
    console.print()

    mapped = mapped_models(plan.inputs)
    shards = _table("shard", numbers=["tensors", "parameters", "read", "write", "memory"])
    for shard in plan.shards[:_MAX_ROWS]:
        largest = largest_window(shard.tensors, mapped)
        held = FIXED_BYTES + (0 if largest is None else largest.memory_bytes)
        shards.add_row(
            shard.file,
            f"{len(shard.tensors):,}",
            f"{shard.num_parameters:,}",
            format_bytes(shard.read_bytes),
            format_bytes(shard.num_bytes),
            format_bytes(held),
        )
    if len(plan.shards) > _MAX_ROWS:
        shards.add_row(f"... and {len(plan.shards) - _MAX_ROWS:,} more", "", "", "", "", "")
    shards.add_section()
    shards.add_row(
        f"all {len(plan.shards):,}" if len(plan.shards) > 1 else "all",
        f"{sum(len(shard.tensors) for shard in plan.shards):,}",
        f"{plan.num_parameters:,}",
        format_bytes(plan.read_bytes),
        format_bytes(plan.num_bytes),
        format_bytes(memory_needed(plan)),
    )
    _show(console, shards)
    console.print()
    _say(console, _memory_line(plan) if memory_bytes is None else _budget_line(before, memory_bytes))
    for warning in plan.warnings:
        _say(console, f"warning: {warning}")
    for title, named in (("Not used", plan.dropped), ("Shared", plan.aliased)):
        for i, (name, reason) in enumerate(named.items()):
            if i == _MAX_DROPPED:
                _say(console, f"{title}: ... and {len(named) - i:,} more (--json lists all)")
                break
            _say(console, f"{title}: {name} ({reason})")


def _memory_line(plan: Plan) -> str:
    least, needed = least_memory(plan), memory_needed(plan)
    told = format_bytes(needed)
    first = f" ({told} unless earlier stages are computed first)" if told != format_bytes(least) else ""
    return (
        f"A worker needs at least {format_bytes(least)} of memory{first}, and gets "
        f"{format_bytes(comfortable_memory(plan))} unless `merge --memory` says otherwise."
    )


def _budget_line(before: Sequence[Plan], memory_bytes: int) -> str:
    if not before:
        return f"Everything fits into {format_bytes(memory_bytes)} of memory for each worker."
    tensors = counted(sum(len(shard.tensors) for plan in before for shard in plan.shards), "tensor")
    return (
        f"With {format_bytes(memory_bytes)} of memory for each worker, {tensors} of earlier stages "
        f"({format_bytes(sum(plan.num_bytes for plan in before))}) are computed first and kept beside the output until "
        "it is complete."
    )


def print_estimate(cluster: Cluster, expected: Estimate) -> None:
    """How long it takes there, and what is the limit."""
    store = "" if cluster.store_bytes is None else f" and a store of {format_bytes(cluster.store_bytes)}/s"
    idle = cluster.num_nodes - expected.num_busy
    least = f"at least {duration(expected.seconds)}" if expected.seconds >= 1 else "less than 1 s"
    spread = ""
    if idle:
        spread = (
            f"; too few shards: {idle:,} of {counted(cluster.num_nodes, 'node')} {'is' if idle == 1 else 'are'} idle"
        )
    elif expected.balance < 0.995:
        spread = f"; the average node has {100 * expected.balance:.0f} % of the busiest node's work"
    _say(
        _console(),
        f"On {counted(cluster.num_nodes, 'node')} with links of {format_bytes(cluster.link_bytes)}/s{store}: {least}, "
        f"without start-up and arithmetic ({_BOUNDS[expected.bound]} is the limit{spread}).",
    )


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
    for child in expression.parts if isinstance(expression, Gather) else expression.children():
        _grow(branch, child, plan)


def _label(expression: Expression, plan: Plan) -> str:
    """An expression without its children, in a line."""
    dtype = expression.spec.dtype.config_name
    if isinstance(expression, Load):
        place = expression.location
        where = f"{plan.inputs[expression.model].reference}/{place.file}"
        return f"load {dtype} from {where}, bytes {place.start} to {place.end}"
    if isinstance(expression, Gather | Rows):
        return f"{expression.kind} -> {dtype}, {counted(len(expression.runs), 'run')} of rows"
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
    console = _console()
    table = _table("method", "base model", "what it does")
    for method in describe_methods():
        table.add_row(method["name"], method["base"], escape(method["summary"]))
    _show(console, table)
    if console.is_terminal:
        console.print()
        _say(console, "`mergekit-ray methods NAME` shows the formula and the parameters of one.")


def print_method(name: str) -> None:
    """One method with its formula, source and parameters."""
    console = _console()
    [method] = describe_methods(name)
    head = Text(hanging(f"{name}  {method['summary']}", console.width, len(name) + 2))
    head.stylize("bold", 0, len(name))
    console.print(head, soft_wrap=True)
    console.print()
    facts = Table.grid(padding=(0, 2, 0, 0))
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    for label, value in (
        ("result", method["formula"]),
        ("source", method["reference"]),
        ("base model", method["base"]),
        ("models", method["models"]),
    ):
        if value:
            facts.add_row(f"  {label}", escape(value))
    _show(console, facts)
    for paragraph in method["notes"].replace("``", "`").split("\n\n"):
        console.print()
        _say(console, _reflowed(paragraph), by=0)
    console.print()
    if not method["parameters"]:
        console.print("It has no parameters.")
        return
    table = _table("parameter", "looked up", "default", "meaning")
    for parameter in method["parameters"]:
        table.add_row(parameter["name"], _scope(parameter), _default(parameter), escape(parameter["description"]))
    _show(console, table)


def _reflowed(paragraph: str) -> str:
    """A paragraph of a docstring in one line, but for the points of a list."""
    return re.sub(r"\n(?!\s*[-*] )\s*", " ", paragraph)


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
    """As wide as the terminal, which wraps a table that it is too narrow for; else wide enough for every column."""
    if not sys.stdout.isatty():
        return Console(width=_PIPED_WIDTH, highlight=False)
    console = Console(highlight=False)
    console.width = max(console.width, _LEAST_WIDTH)
    return console


def _table(*texts: str, numbers: Sequence[str] = ()) -> Table:
    """A table without vertical lines: 80 columns hold a row of a plan, and a terminal's selection copies a column."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name in texts:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _show(console: Console, table: Table) -> None:
    """Print a table without the spaces that fill its last column."""
    with console.capture() as captured:
        console.print(table)
    console.file.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))


def _say(console: Console, text: str, by: int = INDENT) -> None:
    line = Text(hanging(text, terminal_width(sys.stdout) or console.width, by))
    if text.startswith("warning: "):
        line.stylize("bold yellow", 0, len("warning:"))
    console.print(line, soft_wrap=True)


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
