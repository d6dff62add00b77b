"""Rows of whatever a view of a model gives are those of the whole tensor."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mergekit_ray.core.declaration import Access
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.expressions import (
    Expression,
    loads,
    rows,
)
from mergekit_ray.core.tensors import TensorSpec
from mergekit_ray.evaluation.scratch import TORCH_DTYPES
from mergekit_ray.planning.lora import LoraWeights
from mergekit_ray.planning.quantised import weights_of
from mergekit_ray.planning.weights import StoredWeights, Weights
from support.adapter_headers import adapter_of
from support.fake_checkpoints import checkpoint, llama, llama_shapes
from support.memory_inputs import Inputs, evaluate
from support.references.rows import mapping, runs_of, taken

ELEMENTWISE, REDUCE = Access.ELEMENTWISE, Access.REDUCE
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROWS, WIDTH, NEW_ROWS = 10, 4, 37
FACTORS = {"model.embed_tokens.lora_embedding_A": (2, ROWS), "model.embed_tokens.lora_embedding_B": (WIDTH, 2)}
HEAD_FACTORS = {"lm_head.lora_A.weight": (2, WIDTH), "lm_head.lora_B.weight": (ROWS, 2)}


def adapted(shapes: dict[str, tuple[int, ...]], **settings: object) -> LoraWeights:
    base = llama("/base")
    return LoraWeights(StoredWeights("m0", base), base.config, "a0", adapter_of(shapes, **settings))


def quantised() -> Weights:
    shapes = dict(llama_shapes(1))
    shapes[HEAD] = (DType.F8_E4M3, (ROWS, WIDTH))
    shapes[f"{HEAD}_scale_inv"] = (DType.F32, (3, 2))
    settings = {"quant_method": "fp8", "weight_block_size": [4, 2]}
    config = {"num_hidden_layers": 1, "tie_word_embeddings": False, "quantization_config": settings}
    return weights_of("m0", checkpoint("/codes", shapes, config), "model /codes")


CASES: dict[str, tuple[Callable[[], Weights], str, Access]] = {
    "stored": (lambda: StoredWeights("m0", llama("/base")), EMBEDDING, ELEMENTWISE),
    "LoRA of an embedding": (lambda: adapted(FACTORS), EMBEDDING, ELEMENTWISE),
    "LoRA of a head": (lambda: adapted(HEAD_FACTORS), HEAD, ELEMENTWISE),
    "DoRA": (
        lambda: adapted(HEAD_FACTORS | {"lm_head.lora_magnitude_vector.weight": (ROWS,)}, use_dora=True),
        HEAD,
        ELEMENTWISE,
    ),
    "DoRA of an embedding": (
        lambda: adapted(FACTORS | {"model.embed_tokens.lora_magnitude_vector.weight": (WIDTH,)}, use_dora=True),
        EMBEDDING,
        REDUCE,
    ),
    "whole module": (
        lambda: adapted({"model.embed_tokens.weight": (ROWS, WIDTH)}, modules_to_save=["embed_tokens"]),
        EMBEDDING,
        ELEMENTWISE,
    ),
    "single rows": (
        lambda: adapted(
            {"model.embed_tokens.token_adapter.trainable_tokens_delta": (3, WIDTH)}, trainable_token_indices=[3, 8, 4]
        ),
        EMBEDDING,
        ELEMENTWISE,
    ),
    "8-bit floats in blocks": (quantised, HEAD, REDUCE),
}


def filled(expression: Expression) -> Inputs:
    """Random values in everything that is read."""
    inputs, generator = Inputs(), torch.Generator().manual_seed(0)
    for load in loads(expression):
        size, dtype = load.spec.num_elements, TORCH_DTYPES[load.spec.dtype]
        if load.spec.dtype.itemsize == 1:
            inputs.data[load] = torch.randint(0, 0x78, (size,), generator=generator, dtype=torch.uint8).view(dtype)
        else:
            inputs.data[load] = torch.randn(size, generator=generator).to(dtype)
    return inputs


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("in_order", [False, True])
def test_rows_of_a_view(case: str, in_order: bool) -> None:
    make, name, access = CASES[case]
    whole = make().expression(name)
    wanted = mapping(4, [ROWS], NEW_ROWS)
    if in_order:
        wanted = sorted(wanted)
    tree = rows([whole], TensorSpec(name, whole.spec.dtype, (NEW_ROWS, WIDTH)), runs_of(wanted))
    assert in_order or tree.access is access
    inputs = filled(whole)
    expected = taken([evaluate(whole, inputs)], wanted, tree.spec.shape)
    assert expected.std() > 0
    assert torch.equal(evaluate(tree, inputs), expected)
    if tree.access is ELEMENTWISE:
        assert torch.equal(evaluate(tree, inputs, window=3 * WIDTH), expected)
    assert torch.equal(evaluate(tree, inputs, chunk_elements=5, num_threads=2), expected)
