"""Hidden states of a model that need not fit in memory: one decoder layer at a time, all prompts through each.

Masks, rotary embeddings and whatever else a family hands to its layers come from transformers: the model's own forward
runs once for each batch with layers that pass the state on unchanged and note what they were called with. Then the
layers run for real, one after another, with those arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mergekit_ray.checkpoint.opening import Checkpoint
from mergekit_ray.checkpoint.reader import ByteRange, read_into
from mergekit_ray.core.errors import MergeError, ModelError
from mergekit_ray.evaluation.scratch import TORCH_DTYPES
from mergekit_ray.routing.batches import Batch
from mergekit_ray.routing.embeddings import embedding_rows
from mergekit_ray.routing.layouts import as_transformers_has_it
from mergekit_ray.routing.skeleton import Skeleton, Stored, build_skeleton

_KEY = "model"


@dataclass(slots=True)
class _Call:
    """What a layer is called with, the hidden state left out."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    positional: bool

    def run(self, layer: torch.nn.Module, tensors: Mapping[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
        """The state that leaves the layer."""
        args = (hidden, *self.args) if self.positional else self.args
        kwargs = self.kwargs if self.positional else {"hidden_states": hidden, **self.kwargs}
        output: Any = torch.func.functional_call(layer, dict(tensors), args, kwargs)
        state: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return state


@dataclass(slots=True)
class _Passage:
    """A batch on its way: its state entering the next layer, and how each layer is called."""

    batch: Batch
    hidden: torch.Tensor
    calls: list[_Call]


def prompt_states(
    checkpoint: Checkpoint, batches: Sequence[Batch], *, average: bool, device: str = "cpu"
) -> np.ndarray:
    """Hidden states of prompts, entering each decoder layer of a model.

    Weights are read layer by layer, once each, and computed with in float32 whatever they are stored in. At any time
    memory holds one layer in float32, the stored bytes of two, and the states of all prompts. A batch's states depend
    on that batch alone, so batches may be shared out in any way.

    Args:
        checkpoint: of a family that transformers knows.
        batches: of prompts.
        average: the mean over a prompt's tokens instead of its last token.
        device: where layers compute.

    Returns:
        Float32 [num_layers, num_prompts, hidden]; prompts in the order of the batches.

    Raises:
        ModelError: see `build_skeleton`; or a prompt is too long, or has a token without an embedding.
        MergeError: a state is not finite.
        CheckpointError, StorageError: the weights could not be read.
        PlanError: transformers is not installed.
    """
    checkpoint = as_transformers_has_it(checkpoint)
    skeleton = build_skeleton(checkpoint)
    check_lengths(checkpoint, skeleton, batches)
    with torch.inference_mode():
        _fill_outer(checkpoint, skeleton, batches, device)
        passages = [_begin(checkpoint, skeleton, batch, device) for batch in batches]
        num_prompts = sum(len(batch.tokens) for batch in batches)
        states = np.empty((len(skeleton.layers), num_prompts, passages[0].hidden.shape[-1]), np.float32)
        # What leaves the last layer enters none.
        weights = _stream_layers(checkpoint, skeleton.per_layer[:-1])
        for number, layer in enumerate(skeleton.layers):
            states[number] = np.concatenate([_pick(passage, average=average) for passage in passages])
            _check_finite(checkpoint, states[number], number)
            stored = next(weights, None)
            if stored is not None:
                tensors = {**_buffers(layer, device), **_take(stored, device)}
                for passage in passages:
                    passage.hidden = passage.calls[number].run(layer, tensors, passage.hidden)
    return states


def embeddings(checkpoint: Checkpoint, name: str, tokens: Sequence[int]) -> torch.Tensor:
    """Rows of an embedding matrix, in its stored dtype: [len(tokens), hidden]. See `embedding_rows`."""
    spec, _ = checkpoint.tensors[name]
    return torch.from_numpy(embedding_rows(checkpoint, name, tokens)).view(TORCH_DTYPES[spec.dtype])


def check_lengths(checkpoint: Checkpoint, skeleton: Skeleton, batches: Sequence[Batch]) -> None:
    """Check that a model takes prompts as long as these.

    Raises:
        ModelError: it does not.
    """
    longest = max(length for batch in batches for length in batch.lengths)
    if skeleton.max_tokens is not None and longest > skeleton.max_tokens:
        raise ModelError(
            f"a prompt has {longest} tokens, and the model takes {skeleton.max_tokens} (max_position_embeddings)",
            where=checkpoint.reference,
            remedy="shorten the prompt",
        )


def _check_finite(checkpoint: Checkpoint, states: np.ndarray, number: int) -> None:
    if not np.isfinite(states).all():
        raise MergeError(
            f"hidden states entering layer {number} are not finite, so no router can be made from them",
            where=checkpoint.reference,
            remedy="the base model's weights are damaged, or overflow float32; check that it generates text",
        )


def _fill_outer(checkpoint: Checkpoint, skeleton: Skeleton, batches: Sequence[Batch], device: str) -> None:
    """Give the modules outside the layers their weights; of the embeddings, the rows that the prompts need."""
    for name, tensor in _take(read_tensors(checkpoint, skeleton.outer), device).items():
        owner, _, leaf = name.rpartition(".")
        setattr(skeleton.base.get_submodule(owner), leaf, torch.nn.Parameter(tensor, requires_grad=False))
    inside = {id(module) for layer in skeleton.layers for module in layer.modules()}
    for module in skeleton.base.modules():
        if id(module) not in inside:
            for leaf, buffer in module.named_buffers(recurse=False):
                setattr(module, leaf, buffer.to(device))
    tokens = sorted({token for batch in batches for prompt in batch.tokens for token in prompt})
    rows = embeddings(checkpoint, skeleton.embedding_weight, tokens).to(device, torch.float32)
    embedding: Any = skeleton.embedding
    embedding.weight = torch.nn.Parameter(rows, requires_grad=False)
    embedding.padding_idx = None  # a row of the whole matrix; it matters in training only
    known = torch.tensor(tokens, device=device)
    # The model sees the true tokens, and its embeddings see the rows that were read.
    embedding.register_forward_pre_hook(lambda _, args: (torch.searchsorted(known, args[0]), *args[1:]))


def _begin(checkpoint: Checkpoint, skeleton: Skeleton, batch: Batch, device: str) -> _Passage:
    """Run all of a model but its layers on a batch."""
    longest = max(batch.lengths)
    # Padded on the right, where no token of a causal model looks, with a token of the prompt.
    ids = torch.tensor([[*prompt, *[prompt[0]] * (longest - len(prompt))] for prompt in batch.tokens], device=device)
    mask = (torch.arange(longest) < torch.tensor(batch.lengths)[:, None]).to(device, torch.int64)
    # Layers return a tensor, or a tuple that begins with it in older versions of transformers.
    for as_tuple in (False, True):
        try:
            hidden, calls = _record(skeleton, ids, mask, as_tuple=as_tuple)
        except _StateChangedError:
            continue
        if len(calls) == len(skeleton.layers):
            return _Passage(batch, hidden, calls)
    raise ModelError(
        f"{type(skeleton.base).__name__} does more than hand a state from each decoder layer to the next, so its "
        "layers cannot be run one by one",
        where=checkpoint.reference,
        remedy="choose `gate_mode: cheap_embed` or `gate_mode: random`",
    )


class _StateChangedError(Exception):
    """A layer was not given the very state that the layer before it returned."""


def _record(
    skeleton: Skeleton, ids: torch.Tensor, mask: torch.Tensor, *, as_tuple: bool
) -> tuple[torch.Tensor, list[_Call]]:
    """The state entering the first layer, and what each layer is called with beside it, in order.

    Raises:
        _StateChangedError: something happens to the state between layers, or they do not run in order, once each.
    """
    entered: list[torch.Tensor] = []
    calls: list[_Call] = []

    def forward_of(number: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs.pop("hidden_states")
            if number != len(calls) or (entered and hidden is not entered[0]):
                raise _StateChangedError
            entered.append(hidden)
            calls.append(_Call(args[1:], kwargs, positional=bool(args)))
            return (hidden,) if as_tuple else hidden

        return forward

    layers: Sequence[Any] = skeleton.layers
    for number, layer in enumerate(layers):
        layer.forward = forward_of(number)
    try:
        skeleton.base(input_ids=ids, attention_mask=mask, use_cache=False)
    finally:
        for layer in layers:
            del layer.forward
    return entered[0], calls


def _stream_layers(
    checkpoint: Checkpoint, per_layer: Sequence[Mapping[str, Stored]]
) -> Iterator[dict[str, torch.Tensor]]:
    """The stored tensors of each layer; the next layer is read while one is computed."""
    with ThreadPoolExecutor(1, thread_name_prefix="layers") as executor:
        following = executor.submit(read_tensors, checkpoint, per_layer[0]) if per_layer else None
        for names in [*per_layer[1:], None]:
            if following is None:
                return
            stored = following.result()
            following = None if names is None else executor.submit(read_tensors, checkpoint, names)
            yield stored


def read_tensors(checkpoint: Checkpoint, names: Mapping[str, str | Stored]) -> dict[str, torch.Tensor]:
    """Tensors in their stored dtypes, by the keys of ``names``."""
    tensors, requests = {}, []
    for name, wanted in names.items():
        stored = Stored((wanted,), checkpoint.tensors[wanted][0].shape) if isinstance(wanted, str) else wanted
        parts = [checkpoint.tensors[part] for part in stored.names]
        tensors[name] = torch.empty(stored.shape, dtype=TORCH_DTYPES[parts[0][0].dtype])
        buffer, filled = _bytes_of(tensors[name]), 0
        for spec, location in parts:
            version = checkpoint.files[location.file].version
            target = buffer[filled : filled + spec.num_bytes]
            requests.append(ByteRange(_KEY, location.file, location.start, location.end, version, target))
            filled += spec.num_bytes
    read_into({_KEY: checkpoint.source}, requests)
    return tensors


def _take(stored: dict[str, torch.Tensor], device: str) -> dict[str, torch.Tensor]:
    """Tensors in float32 (integers as they are) on the device. Empties ``stored``, so that each is freed in turn."""
    taken = {}
    for name in list(stored):
        tensor = stored.pop(name).to(device)
        taken[name] = tensor.float() if tensor.is_floating_point() else tensor
    return taken


def _buffers(layer: torch.nn.Module, device: str) -> dict[str, torch.Tensor]:
    """Constants that a layer computed for itself when it was made."""
    return {name: buffer.to(device) for name, buffer in layer.named_buffers()}


def _pick(passage: _Passage, *, average: bool) -> np.ndarray:
    """One state for each prompt of a batch: float32 [num_prompts, hidden]."""
    lengths = passage.batch.lengths
    if average:
        rows = [passage.hidden[row, :length].double().mean(0) for row, length in enumerate(lengths)]
    else:
        rows = [passage.hidden[row, length - 1] for row, length in enumerate(lengths)]
    picked: np.ndarray = torch.stack(rows).float().cpu().numpy()
    return picked


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)
