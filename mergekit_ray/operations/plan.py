"""`plan`: what a merge would read, write and need, and how each tensor would be computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from mergekit_ray.core.arguments import options_or
from mergekit_ray.core.errors import PlanError
from mergekit_ray.core.expressions import loads, to_json
from mergekit_ray.core.plan import OutputTensor, Plan
from mergekit_ray.core.spelling import nearest
from mergekit_ray.evaluation.device.names import CPU, resolve
from mergekit_ray.operations.options import MergeOptions
from mergekit_ray.operations.prepare import RecipeLike, prepare


def plan(
    recipe: RecipeLike,
    *,
    seed: int | None = None,
    routing: bool = True,
    options: MergeOptions | None = None,
) -> Plan:
    """Plan a merge: everything that would be written, from headers alone.

    Args:
        recipe: a recipe, or whatever `mergekit_ray.load_recipe` takes.
        seed: overrides the recipe's.
        routing: make the routers of a Mixture of Experts from its prompts, which reads the base model. Without it they
            are zero in the plan: enough to see what would be written, not to write it.
        options: those of the merge: what is allowed, and where routers are computed (here on the CPU if None).

    Raises:
        MergekitRayError: the recipe is wrong, or the models are not there or do not fit together.
    """
    chosen = options_or(MergeOptions(executor="local", device=CPU), options)
    chosen.check()
    prepared = prepare(
        recipe,
        seed=seed,
        allow_config_conflicts=chosen.allow_config_conflicts,
        unsafe_ignore_tokenizers=chosen.unsafe_ignore_tokenizers,
    )
    return prepared.routed(chosen) if routing else prepared.plan


@dataclass(frozen=True, slots=True)
class Explanation:
    """How one output tensor is computed.

    Attributes:
        tensor: the tensor, with its expression.
        models: that it is made of, as the recipe names them, by their keys in the expression.
        file: the shard it is written to.
        strategy: `evaluation.strategy.Strategy`, by its value.
        why: that one, in words.
    """

    tensor: OutputTensor
    models: Mapping[str, str]
    file: str
    strategy: str
    why: str

    def to_json(self) -> dict[str, Any]:
        """As plain JSON data."""
        return {
            "tensor": self.tensor.spec.name,
            "file": self.file,
            "strategy": self.strategy,
            "why": self.why,
            "models": dict(self.models),
            "expression": to_json(self.tensor.expression),
        }


def explained(planned: Plan, pattern: str, *, device: str = CPU, allow_non_finite: bool = False) -> list[Explanation]:
    """How tensors are computed.

    Args:
        planned: the plan that they are of.
        pattern: a tensor's name, or a shell's pattern for several, such as ``*.mlp.*``.
        device: see `evaluation.device.names.check_device`.
        allow_non_finite: as in `MergeOptions`.

    Raises:
        PlanError: no tensor matches; says which name is nearest.
        ConfigError: the device is not there.
    """
    from mergekit_ray.evaluation.strategy import choose  # noqa: PLC0415 - imports numpy

    place = resolve(device)
    found = []
    for shard in planned.shards:
        for tensor in shard.tensors:
            if fnmatchcase(tensor.spec.name, pattern):
                choice = choose(tensor.expression, place, allow_non_finite=allow_non_finite)
                keys = dict.fromkeys(load.model for load in loads(tensor.expression))
                models = {key: planned.inputs[key].reference for key in keys}
                found.append(Explanation(tensor, models, shard.file, choice.strategy.value, choice.why))
    if not found:
        names = [tensor.spec.name for shard in planned.shards for tensor in shard.tensors]
        raise PlanError(
            f"no tensor of the result is called {pattern!r}{nearest(pattern, names)}",
            remedy="give a tensor's name, or a pattern such as '*.mlp.*'",
        )
    return found
