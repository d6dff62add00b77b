"""What a LoRA extracted from a fine-tuned model is made of: which tensors it covers, how, and under which names.

Pure: no weight is read. Source of the names and settings: https://huggingface.co/docs/peft/developer_guides/checkpoint.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mergekit_ray.architectures.anatomy import is_buffer, place_of
from mergekit_ray.architectures.loaded_names import is_taken_for_expert, loaded_name
from mergekit_ray.checkpoint.adapter import KEY_PREFIX
from mergekit_ray.core.arguments import check_fields
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import ModelError
from mergekit_ray.core.expressions import Expression, Merge
from mergekit_ray.core.spelling import nearest
from mergekit_ray.core.tensors import TensorSpec
from mergekit_ray.planning.lora_fit import is_conv1d
from mergekit_ray.planning.lowering import Model

_WEIGHT = ".weight"
_EMBEDDING = re.compile(r"(^|\.)(\w*embed\w*|wte|wpe|shared|relative_attention_bias)$")
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})
"""Layers of experts' routers: what PEFT can wrap of them depends on the version of transformers."""

_UNPREFIXED = {"gpt2": "transformer.", "bloom": "transformer."}
"""What PEFT's names begin with where published files leave it out, by the model's type."""

_TASKS = (("ForCausalLM", "CAUSAL_LM"), ("LMHeadModel", "CAUSAL_LM"), ("ForSequenceClassification", "SEQ_CLS"))


@dataclass(frozen=True, slots=True)
class Coverage:
    """Which differences the adapter should hold.

    Attributes:
        embeddings: also factorise the embeddings and the head.
        saved: modules to store whole, by the end of their names (``lm_head``, ``norm``).
        excluded: modules to leave alone, in the same way.

    Raises:
        ConfigError: a value that none of them can have, such as one name in place of a tuple of names.
    """

    embeddings: bool = False
    saved: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        checks = {"embeddings": (isinstance(self.embeddings, bool), "True or False")}
        for key in ("saved", "excluded"):
            names = getattr(self, key)
            is_tuple = isinstance(names, tuple) and all(isinstance(name, str) for name in names)
            checks[key] = (
                is_tuple,
                f"a tuple of names: ({names!r},)" if isinstance(names, str) else "a tuple of names",
            )
        check_fields(self, checks)


@dataclass(frozen=True, slots=True)
class Target:
    """A matrix whose difference is factorised.

    Attributes:
        name: of the tensor.
        is_embedding: PEFT treats it as an embedding.
        transposed: the factors are those of the transpose.
    """

    name: str
    is_embedding: bool
    transposed: bool

    @property
    def module(self) -> str:
        """The layer it is the weight of."""
        return self.name.removesuffix(_WEIGHT)


@dataclass
class Extraction:
    """What is to be done with every tensor of two models.

    Attributes:
        tuned, base: the models.
        targets: factorised.
        saved: stored whole.
        uncovered: in both and alike, and not covered by the adapter: their differences are measured and reported.
        unmatched: in one model only, or of different shapes: with the reason.
    """

    tuned: Model
    base: Model
    targets: list[Target] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)
    uncovered: list[str] = field(default_factory=list)
    unmatched: dict[str, str] = field(default_factory=dict)

    def difference(self, name: str) -> Expression:
        """``tuned − base``, in float32."""
        spec = self.base.weights.specs[name]
        return Merge(
            method="linear",
            spec=TensorSpec(name, DType.F32, spec.shape),
            inputs=(self.tuned.weights.expression(name), self.base.weights.expression(name)),
            base=None,
            parameters={"normalize": False},
            input_parameters=({"weight": 1.0}, {"weight": -1.0}),
            keys=("", ""),
        )

    def short_side(self, target: Target) -> int:
        """The most that the rank of a target can be."""
        return min(self.base.weights.specs[target.name].shape)

    def key(self, name: str) -> str:
        """What PEFT calls a tensor of the base, or a module."""
        prefix = _UNPREFIXED.get(str(self.base.checkpoint.config.get("model_type")), "")
        is_bare = self.base.anatomy.main == "h" and not f"{name}.".startswith("lm_head.")
        return KEY_PREFIX + (prefix if is_bare else "") + loaded_name(self.base.checkpoint.config, name)


def extraction(tuned: Model, base: Model, coverage: Coverage) -> Extraction:
    """Sort the tensors of two models.

    Raises:
        ModelError: they have no matrix in common, or a module to store whole is not there.
    """
    found = Extraction(tuned, base)
    for name in tuned.weights.specs:
        if not is_buffer(name) and name not in tuned.anatomy.redundant:
            _sort(found, name, coverage)
    for name in base.weights.specs:
        if name not in tuned.weights.specs and not is_buffer(name) and name not in base.anatomy.redundant:
            found.unmatched[name] = "only in the base"
    where = f"model {tuned.reference}"
    named = [("`saved=`", ending, found.saved) for ending in coverage.saved]
    named += [("`excluded=`", ending, [*tuned.weights.specs]) for ending in coverage.excluded]
    for option, ending, names in named:
        if not any(_ends_with(name.rpartition(".")[0], (ending,)) for name in names):
            known = {name.split(".")[-2] for name in tuned.weights.specs if "." in name}
            raise ModelError(
                f"no module's name ends with {ending!r}{nearest(ending, known)}",
                where=where,
                remedy=f"give {option} the name of a module, or the last components of one",
            )
    if not found.targets:
        raise ModelError(
            "no matrix is in both models, so there is nothing to factorise",
            where=where,
            remedy="give the model it was fine-tuned from as base" + (", or exclude less" if coverage.excluded else ""),
        )
    return found


def _sort(found: Extraction, name: str, coverage: Coverage) -> None:
    """Put one of the fine-tuned model's tensors where it belongs."""
    spec, known = found.tuned.weights.specs[name], found.base.weights.specs.get(name)
    module = name.rpartition(".")[0]
    if _ends_with(module, coverage.saved):
        found.saved.append(name)
    elif known is None:
        found.unmatched[name] = "only in the fine-tuned model"
    elif spec.shape != known.shape:
        found.unmatched[name] = f"{list(spec.shape)}, in the base {list(known.shape)}"
    elif spec.dtype.is_floating and known.dtype.is_floating:
        target = None if _ends_with(module, coverage.excluded) else _target(found.base, name, coverage)
        if target is None:
            found.uncovered.append(name)
        else:
            found.targets.append(target)


def _ends_with(module: str, endings: Sequence[str]) -> bool:
    return any(module == ending or module.endswith(f".{ending}") for ending in endings)


def _target(base: Model, name: str, coverage: Coverage) -> Target | None:
    """How a tensor is factorised; None if it is not."""
    spec, module = base.weights.specs[name], name.removesuffix(_WEIGHT)
    if len(spec.shape) != 2 or 0 in spec.shape or not name.endswith(_WEIGHT):
        return None
    leaf = module.rpartition(".")[2]
    is_head = name == base.anatomy.head
    is_embedding = not is_head and (name in base.anatomy.vocabulary or _EMBEDDING.search(module) is not None)
    if is_head or (is_embedding and place_of(name) is None):
        return Target(name, is_embedding, transposed=is_embedding) if coverage.embeddings else None
    if is_embedding or place_of(name) is None or leaf in _ROUTERS:
        return None
    return Target(name, is_embedding=False, transposed=bool(is_conv1d(base.checkpoint.config, module)))


def adapter_config(found: Extraction, ranks: Mapping[str, int]) -> dict[str, Any]:
    """``adapter_config.json`` of the result.

    Args:
        found: the models.
        ranks: of the factorised tensors that the adapter holds, by name.

    Returns:
        Settings with which every product is scaled by 1.
    """
    kept = [target for target in found.targets if target.name in ranks]
    counts = Counter(ranks[target.name] for target in kept)
    rank = min(counts, key=lambda each: (-counts[each], each))
    # By full names: a pattern, or the end of a name, could mean another module as well.
    pattern = {_peft_name(found, t.module): ranks[t.name] for t in kept if ranks[t.name] != rank}
    saved = sorted({_peft_name(found, name.rpartition(".")[0]) for name in found.saved})
    is_parameter = {t.name: is_taken_for_expert(found.base.checkpoint.config, t.module) for t in kept}
    parameters = sorted(_peft_name(found, t.name) for t in kept if is_parameter[t.name])
    # PEFT looks a parameter's rank up by the name of the parameter.
    pattern |= {name: pattern[module] for name in parameters if (module := name.removesuffix(_WEIGHT)) in pattern}
    architecture = next(iter(found.base.checkpoint.config.get("architectures") or ()), "")
    reference = found.base.reference
    return {
        "peft_type": "LORA",
        "task_type": next((task for ending, task in _TASKS if str(architecture).endswith(ending)), None),
        "base_model_name_or_path": reference.path,
        "revision": reference.revision,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "target_modules": _target_modules(found, [target for target in kept if not is_parameter[target.name]]),
        "target_parameters": parameters or None,
        "modules_to_save": saved or None,
        "fan_in_fan_out": any(target.transposed and not target.is_embedding for target in kept),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _peft_name(found: Extraction, module: str) -> str:
    return found.key(module).removeprefix(KEY_PREFIX)


def _target_modules(found: Extraction, targets: Sequence[Target]) -> list[str]:
    """Last components (``q_proj``) where all such modules are targets, full names where only some are.

    PEFT adapts every module whose name ends with a target, also those that hold others (the ``0`` of ``layers.0``).
    """
    wanted = {_peft_name(found, target.module) for target in targets}
    others: set[str] = set()
    for name in found.base.weights.specs:
        parts = _peft_name(found, name).split(".")[:-1]
        others.update(".".join(parts[:count]) for count in range(1, len(parts) + 1))
    taken = {ending for module in others - wanted for ending in _endings(module)}
    return sorted({next(e for e in _endings(module) if e not in taken or e == module) for module in wanted})


def _endings(module: str) -> list[str]:
    """What a module can be called by, the shortest first: its last component, its place among experts, its name."""
    leaf, (_, experts, expert) = module.rpartition(".")[2], module.rpartition(".experts.")
    # A number is what every list of modules has.
    return [*([] if leaf.isdecimal() else [leaf]), *([f"experts.{expert}"] if experts else []), module]
