"""Any other dense decoder: its own layers, with their feed-forward module as experts behind a router.

No class of transformers fits, so a small modelling file travels with the checkpoint: the dense model's class with its
feed-forward modules replaced by a sparse block (``modeling/modeling_custom_moe.py``, filled in for the dense model).
"""

from __future__ import annotations

import copy
import importlib.resources
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final

from mergekit_ray.architectures.anatomy import language_config
from mergekit_ray.architectures.moe.family import DenseModel, MoeFamily, MoeNames, Wanted
from mergekit_ray.architectures.moe.registry import FAMILIES
from mergekit_ray.core.errors import ModelError

MODULE: Final = "modeling_custom_moe"
"""The file that travels with the checkpoint, without its ending."""

_PREFIX: Final = "custom_moe_"
"""Of the result's ``model_type``, before that of the dense model."""

_BLOCKS = ("mlp", "feed_forward", "ffn", "ff", "feedforward")
"""What a decoder layer may call its feed-forward module."""

_LAST = frozenset(
    {
        "c_proj",
        "dense_4h_to_h",
        "down_proj",
        "fc2",
        "fc_out",
        "linear_2",
        "out_proj",
        "output_linear",
        "proj_out",
        "w2",
        "wo",
    }
)
"""What the last linear layer of a feed-forward module may be called: the one that writes to the residual stream."""

_OTHER_CALLS: Mapping[str, str] = {
    "bloom": "hands the residual to its feed-forward module, which adds it itself",
    "mpt": "hands the residual to its feed-forward module, which adds it itself",
}
"""Families whose feed-forward module is not called with the state alone."""

_DENSE_LINES = (
    'DENSE_TYPE = "phi"\n',
    'STACK = "model.layers"\n',
    'BLOCK = "mlp"\n',
    "DenseForCausalLM: Any = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[DENSE_TYPE]]\n",
)
"""The lines of the modelling file that are written anew for each dense model."""

_OWN_CODE = re.compile(r"([A-Za-z_]\w*)\.([A-Za-z_]\w*)")
"""``module.Class`` of a file beside the model."""


@FAMILIES.register("custom")
class Custom(MoeFamily):
    """See the module."""

    name = "custom"
    aliases = ("custom_moe",)
    class_name = "CustomMoeForCausalLM"
    dense_types: ClassVar[Sequence[str]] = ("any other dense decoder",)
    rank = 100
    table = MoeNames(experts={}, residual=frozenset(), router="")  # each dense model has names of its own
    layer_names = frozenset()

    def holds(self, model: DenseModel) -> bool:
        """See `MoeFamily.holds`."""
        return model.model_type.startswith(_PREFIX)

    def dense_types_of(self, model_type: str) -> Sequence[str]:
        """See `MoeFamily.dense_types_of`."""
        return [model_type.removeprefix(_PREFIX)]

    def mixture_names(self, mixture: DenseModel) -> MoeNames:
        """See `MoeFamily.mixture_names`: the first expert's names are the dense module's."""
        block = _block(mixture)
        if block is None:
            raise ModelError("the layers have no feed-forward module", where=f"model {mixture.reference}")
        return _names(mixture, block, f"{block}.experts.0")

    def names(self, base: DenseModel) -> MoeNames:
        """See `MoeFamily.names`: the dense module's own names below each expert.

        Raises:
            ModelError: the layers have no feed-forward module.
        """
        block = _block(base)
        if block is None:
            raise ModelError("the layers have no feed-forward module", where=f"model {base.reference}")
        return _names(base, block, block)

    def objections(self, base: DenseModel, wanted: Wanted) -> list[str]:
        """See `MoeFamily.objections`."""
        if not base.model_type:
            return ["needs a model_type in config.json, found none"]
        if base.model_type in _OTHER_CALLS:
            return [f"cannot hold {base.model_type}, which {_OTHER_CALLS[base.model_type]}"]
        if language_config(base.config) is not base.config:
            return ["takes models of text alone, found the config of a language model inside that of another"]
        if len(base.anatomy.stacks) != 1:
            found = ", ".join(sorted(base.anatomy.stacks)) or "none"
            return [f"takes models with one stack of layers, found {found}"]
        if _block(base) is None:
            tops = sorted({rest.split(".")[0] for rest in base.layer_names()})
            return [f"needs a feed-forward module in each layer ({', '.join(_BLOCKS)}), found {', '.join(tops)}"]
        return self._odd_blocks(base, wanted)

    def _odd_blocks(self, base: DenseModel, wanted: Wanted) -> list[str]:
        """What is wrong with the feed-forward modules found."""
        names, counts, found = self.names(base), base.layer_names(), []
        if any(part.isdigit() or part == "experts" for rest in names.experts for part in rest.split(".")):
            return ["takes dense models, found experts in the feed-forward modules"]
        partial = sorted(rest for rest in names.experts if counts[rest] != base.anatomy.num_layers)
        if partial:
            found.append(f"needs layers that are alike, found in some only {', '.join(partial)}")
        elif not names.residual:
            found.append(f"cannot tell which of {', '.join(sorted(names.experts))} writes to the residual stream")
        hidden, width = base.config.get("hidden_size"), _width(base)
        if width is None or (hidden is not None and hidden != width):
            found.append(f"needs embeddings as wide as the hidden size, found {width} and {hidden}")
        if wanted.packed:
            found.append("has no packed layout of its experts")
        code = _remote_class(base)
        if code is not None and not _OWN_CODE.fullmatch(code):
            # transformers locks the import of such code, so one such file cannot fetch another.
            found.append(f"needs the dense model's code beside its weights, and its auto_map says {code!r}")
        return found

    def caveats(self, wanted: Wanted) -> list[str]:
        """See `MoeFamily.caveats`."""
        del wanted
        return [
            f"custom: transformers loads the result with the code in {MODULE}.py beside it (trust_remote_code=True); "
            "programs that do not run it cannot load the result"
        ]

    def config(self, base: DenseModel, wanted: Wanted) -> dict[str, Any]:
        """See `MoeFamily.config`: the dense model's, which its own class goes on reading."""
        config = copy.deepcopy(dict(base.config))
        kept = {key: value for key, value in _auto_map(config).items() if not key.startswith("AutoModel")}
        return {
            **config,
            "architectures": [self.class_name],
            "model_type": _PREFIX + base.model_type,
            "auto_map": {
                **kept,
                "AutoConfig": f"{MODULE}.CustomMoeConfig",
                "AutoModelForCausalLM": f"{MODULE}.{self.class_name}",
            },
            "num_experts": wanted.num_experts,
            "num_experts_per_tok": wanted.experts_per_token,
            "norm_topk_prob": True,
            "num_shared_experts": int(wanted.has_shared),
        }

    def files(self, base: DenseModel) -> dict[str, str]:
        """See `MoeFamily.files`: the modelling file."""
        text = (importlib.resources.files(__package__) / "modeling" / f"{MODULE}.py").read_text("utf-8")
        # Names come from files of strangers: as literals they are text, whatever they hold.
        literals = [json.dumps(value) for value in (base.model_type, base.anatomy.main, _block(base))]
        lines = [old.split("=")[0] + f"= {new}\n" for old, new in zip(_DENSE_LINES, literals, strict=False)]
        for old, new in zip(_DENSE_LINES, [*lines, _dense_class(base)], strict=True):
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        return {f"{MODULE}.py": text}


def _dense_class(base: DenseModel) -> str:
    """The line of the modelling file that finds the dense model's class."""
    code = _remote_class(base)
    if code is None:
        return _DENSE_LINES[-1]
    own = _OWN_CODE.fullmatch(code)
    assert own is not None  # or the family has objected
    return f"from .{own[1]} import {own[2]} as DenseForCausalLM\n"


def _block(base: DenseModel) -> str | None:
    """What the layers call their feed-forward module, None if they have none."""
    tops = {rest.split(".")[0] for rest in base.layer_names() if "." in rest}
    return next((name for name in _BLOCKS if name in tops), None)


def _names(model: DenseModel, block: str, module: str) -> MoeNames:
    """Names made of those of one feed-forward module: the dense layer's, or an expert's."""
    inner = [rest.removeprefix(f"{module}.") for rest in model.layer_names() if rest.startswith(f"{module}.")]
    last = _last_layer(model, module, inner)
    return MoeNames(
        experts={f"{block}.{rest}": f"{block}.experts.{{expert}}.{rest}" for rest in inner},
        residual=frozenset(f"{block}.{rest}" for rest in inner if rest.rpartition(".")[0] == last),
        router=f"{block}.gate.weight",
        shared={f"{block}.{rest}": f"{block}.shared_expert.{rest}" for rest in inner},
    )


def _last_layer(model: DenseModel, module: str, inner: Sequence[str]) -> str | None:
    """The linear layer of a feed-forward module that writes to the residual stream: by its name, else by its shape."""
    parts = dict.fromkeys(rest.rpartition(".")[0] for rest in inner)
    named = [part for part in parts if part.split(".")[-1] in _LAST]
    if len(named) == 1:
        return named[0]
    hidden, narrowing = _width(model), []
    for part in parts:
        spec = model.specs.get(f"{model.anatomy.main}.0.{module}.{part}.weight")
        if spec is not None and len(spec.shape) == 2 and spec.shape[0] == hidden != spec.shape[1]:
            narrowing.append(part)
    return narrowing[0] if len(narrowing) == 1 else None


def _width(base: DenseModel) -> int | None:
    """Of the input embeddings."""
    return None if base.anatomy.embedding is None else base.specs[base.anatomy.embedding].shape[1]


def _auto_map(config: Mapping[str, Any]) -> Mapping[str, Any]:
    found = config.get("auto_map")
    return found if isinstance(found, Mapping) else {}


def _remote_class(base: DenseModel) -> str | None:
    """``module.Class`` where the dense model brings its own code."""
    found = _auto_map(base.config).get("AutoModelForCausalLM")
    return None if found is None else str(found)
