"""What routing takes from transformers: the base model's tokenizer, and its modules without their weights.

transformers is an optional dependency. No remote code is run.
"""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

from mergekit_ray.architectures.anatomy import is_buffer, place_of
from mergekit_ray.architectures.moe.registry import FAMILIES
from mergekit_ray.architectures.quantisation import quantisation
from mergekit_ray.architectures.quantisation_config import without_quantisation
from mergekit_ray.checkpoint.opening import Checkpoint
from mergekit_ray.checkpoint.side_files import CONFIG_NAME, is_vocabulary_file
from mergekit_ray.core.errors import ModelError, PlanError
from mergekit_ray.routing.batches import depends_on_batch_length
from mergekit_ray.tokenizers.converting import loaded_by_transformers, what_transformers_said
from mergekit_ray.tokenizers.files import tokenizer_files

_DTYPE_KEYS = ("dtype", "torch_dtype")
_MAX_NAMED = 5
_OTHER_MODES = "choose `gate_mode: cheap_embed`, which only needs the embeddings, or `gate_mode: random`"
_ONLY_KNOWN = (
    f"routers from hidden states need a family that transformers knows without the model's own code; {_OTHER_MODES}"
)


def import_transformers() -> Any:
    """The library, imported when it is needed.

    Raises:
        PlanError: it is not installed.
    """
    try:
        import transformers  # noqa: PLC0415 - optional, and slow to import
    except ImportError as error:
        raise PlanError(
            f"routers made from prompts need transformers, which cannot be imported ({error})",
            remedy="pip install 'mergekit-ray[moe]', or choose `gate_mode: random`",
        ) from error
    return transformers


@contextlib.contextmanager
def _folder_of(checkpoint: Checkpoint) -> Iterator[Path]:
    """The config in a temporary folder as transformers wants it."""
    with tempfile.TemporaryDirectory(prefix="mergekit-ray-") as name:
        folder = Path(name)
        config = _without_dtype(without_quantisation(checkpoint.config))
        config.pop("auto_map", None)  # code that comes with the model is not run
        (folder / CONFIG_NAME).write_text(json.dumps(config))
        yield folder


def _without_dtype(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config that says nothing of dtypes, so that modules are made in float32."""
    return {
        key: _without_dtype(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in _DTYPE_KEYS
    }


def transformers_tokenizer(checkpoint: Checkpoint) -> Any:
    """The tokenizer beside a model, wherever that is; only its own (small) files are fetched.

    Raises:
        ModelError: there is none.
        PlanError: transformers is not installed.
        ValueError, or a panic of Rust's: transformers cannot load it.
    """
    import_transformers()
    if not any(map(is_vocabulary_file, tokenizer_files(checkpoint))):
        raise ModelError(
            "there is no tokenizer beside the model, and routers made from prompts need one",
            where=checkpoint.reference,
            remedy="copy the tokenizer's files (tokenizer.json, tokenizer_config.json) beside the base model's weights",
        )
    return loaded_by_transformers(checkpoint)


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a module's tensor is stored.

    Attributes:
        names: of the tensors that it is made of, end to end. More than one where transformers has the experts of a
            layer in one tensor and files have them apart.
        shape: in the module.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A language model's modules below its head, with constants but without weights.

    Attributes:
        base: all of it; parameters are on the meta device.
        layers: the decoder layers, in order.
        embedding: the module of the input embeddings.
        outer: stored name of each parameter outside the layers, by its name in ``base``; not of the input embeddings.
        embedding_weight: stored name of the input embeddings.
        per_layer: for each layer, where each tensor is stored, by its name in the layer.
        max_tokens: of one prompt; None if the config says nothing.
    """

    base: torch.nn.Module
    layers: Sequence[torch.nn.Module]
    embedding: torch.nn.Module
    outer: Mapping[str, str]
    embedding_weight: str
    per_layer: Sequence[Mapping[str, Stored]]
    max_tokens: int | None


def build_skeleton(checkpoint: Checkpoint) -> Skeleton:
    """Make the modules of a model from its config, and find where the tensors that they need are stored.

    Raises:
        ModelError: transformers does not know the family without remote code, its modules are not a plain stack of
            decoder layers, or the stored tensors are not those that the modules need.
        PlanError: transformers is not installed.
    """
    transformers = import_transformers()
    specs = {name: spec for name, (spec, _) in checkpoint.tensors.items()}
    found = quantisation(specs, checkpoint.config, checkpoint.reference)
    if found is not None and found.weights:
        raise ModelError(
            "the weights are quantized, so transformers' own layers cannot compute with them as they are stored",
            where=checkpoint.reference,
            remedy=f"name the unquantized model as base_model, or {_OTHER_MODES}",
        )
    kind = checkpoint.config.get("model_type")
    if kind not in transformers.CONFIG_MAPPING:
        raise ModelError(
            f"transformers {transformers.__version__} has no class of its own for model_type {kind!r}, and code that "
            "comes with a model is not run",
            where=checkpoint.reference,
            remedy=_ONLY_KNOWN,
        )
    with _folder_of(checkpoint) as folder:
        try:
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            # Fused attention leaves the soft cap of the scores out.
            capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
            options = {"attn_implementation": "eager"} if capped else {}
            with _parameters_on_meta():
                model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False, **options)
        except Exception as error:  # whatever a config that does not fit its class makes it raise
            raise ModelError(
                f"transformers {transformers.__version__} cannot make this model from its config: "
                f"{what_transformers_said(error, folder, checkpoint)}",
                where=checkpoint.reference,
                remedy=_ONLY_KNOWN,
            ) from error
    return _match(checkpoint, model.eval(), config.get_text_config())


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters of modules made by this thread take no memory; buffers, which hold computed constants, are real."""
    thread = threading.get_ident()

    def move(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter) -> torch.nn.Parameter | None:
        del module, name
        # An existing one may be shared by two modules, and must stay the same object.
        if parameter.is_meta or threading.get_ident() != thread:
            return None
        return torch.nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

    hook: Any = move  # torch's annotation lets it return nothing, its documentation a parameter
    handle = register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _match(checkpoint: Checkpoint, model: torch.nn.Module, config: Any) -> Skeleton:
    """Find layers and embeddings among a model's modules, and their tensors in the checkpoint."""
    base: Any = getattr(model, "base_model", model)
    base_name = next(name for name, module in model.named_modules() if module is base)
    layers_name, layers = _find_layers(checkpoint, base, config.num_hidden_layers)
    embedding = base.get_input_embeddings()
    embedding_name = next(name for name, module in base.named_modules() if module is embedding)
    # A checkpoint saved from the model without its head lacks the name of what the head is added to.
    prefix = f"{base_name}." if base_name else ""
    if not any(name.startswith(f"{prefix}{layers_name}.") for name in checkpoint.tensors):
        prefix = ""
    stack = f"{layers_name}."
    parameters = dict(base.named_parameters())
    needed = {name: _stored(checkpoint, prefix + name, parameter) for name, parameter in parameters.items()}
    _check_stored(checkpoint, {prefix + name: stored for name, stored in needed.items()}, type(model).__name__)
    persistent = {prefix + name for name in base.state_dict()} | {n for stored in needed.values() for n in stored.names}
    _check_known(checkpoint, f"{prefix}{stack}", len(layers), persistent, type(model).__name__)
    per_layer: list[Mapping[str, Stored]] = []
    for number, layer in enumerate(layers):
        own = layer.state_dict()
        found = {name: _stored(checkpoint, f"{prefix}{stack}{number}.{name}", own[name]) for name in own}
        per_layer.append({name: stored for name, stored in found.items() if stored.names[0] in checkpoint.tensors})
    outer = {name: prefix + name for name in parameters if not name.startswith(stack)}
    embedding_weight = outer.pop(f"{embedding_name}.weight")
    # Scaling by length is for prompts beyond that limit.
    limit = None if depends_on_batch_length(checkpoint.config) else getattr(config, "max_position_embeddings", None)
    return Skeleton(
        base=base,
        layers=layers,
        embedding=embedding,
        outer=outer,
        embedding_weight=embedding_weight,
        per_layer=per_layer,
        max_tokens=limit if isinstance(limit, int) else None,
    )


def _stored(checkpoint: Checkpoint, name: str, tensor: torch.Tensor) -> Stored:
    """Where a module's tensor is stored: under its name, or apart as its family's files have it."""
    place, shape = place_of(name), tuple(tensor.shape)
    kind = checkpoint.config.get("model_type")
    if name in checkpoint.tensors or place is None or kind not in FAMILIES.names():
        return Stored((name,), shape)
    table = FAMILIES.get(str(kind)).table
    rests: tuple[str, ...] = (place.rest,)
    if place.rest in (table.packed or {}):
        parts = (table.packed or {})[place.rest]
        rests = tuple(table.experts[part].format(expert=expert) for expert in range(shape[0]) for part in parts)
    elif place.rest == table.packed_router:
        rests = (table.router,)
    return Stored(tuple(f"{place.stack}.{place.layer}.{rest}" for rest in rests), shape)


def _find_layers(checkpoint: Checkpoint, base: Any, num_layers: int) -> tuple[str, list[torch.nn.Module]]:
    found = {
        name: list(module)
        for name, module in base.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == num_layers
    }
    outermost = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    if len(outermost) != 1:
        raise ModelError(
            f"{type(base).__name__} has {len(outermost)} stacks of {num_layers} layers, and routers need exactly one",
            where=checkpoint.reference,
            remedy=_OTHER_MODES,
        )
    return outermost[0], found[outermost[0]]


def _check_stored(checkpoint: Checkpoint, needed: Mapping[str, Stored], kind: str) -> None:
    """Raise unless all parameters are stored, in their shapes and as floating-point numbers."""
    wrong = []
    for name, stored in needed.items():
        absent = [part for part in stored.names if part not in checkpoint.tensors]
        if absent:
            wrong.append(f"{absent[0]} is not there")
            continue
        specs = [checkpoint.tensors[part][0] for part in stored.names]
        if len(specs) == 1 and specs[0].shape != stored.shape:
            wrong.append(f"{name} has shape {list(specs[0].shape)} instead of {list(stored.shape)}")
        elif sum(spec.num_elements for spec in specs) != math.prod(stored.shape) or len({s.dtype for s in specs}) > 1:
            wrong.append(f"{stored.names[0]} and others are not {name} of shape {list(stored.shape)}")
        elif not specs[0].dtype.is_floating:
            wrong.append(f"{name} holds {specs[0].dtype.value}")
    if wrong:
        more = f" and {len(wrong) - _MAX_NAMED} more" if len(wrong) > _MAX_NAMED else ""
        raise ModelError(
            f"the stored tensors are not those of {kind}: {', '.join(wrong[:_MAX_NAMED])}{more}",
            where=checkpoint.reference,
            remedy="load the model with transformers and save it with save_pretrained() under the names of that class, "
            f"or {_OTHER_MODES}",
        )


def _check_known(checkpoint: Checkpoint, stack: str, num_layers: int, known: set[str], kind: str) -> None:
    """Raise if a layer has stored weights that its class would not use."""
    unknown = [
        name
        for name in checkpoint.tensors
        if name.startswith(stack)
        and name not in known
        and not is_buffer(name)
        and int(name.removeprefix(stack).split(".")[0]) < num_layers
    ]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise ModelError(
            f"the layers hold tensors that {kind} would leave out: {unknown[0]}{more}",
            where=checkpoint.reference,
            remedy=f"config.json does not describe these weights (biases, norms?): correct it, or {_OTHER_MODES}",
        )
