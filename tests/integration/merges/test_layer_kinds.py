"""Frankenmerges of every family whose layers differ by their index, loaded by transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

import mergekit_ray
from mergekit_ray.architectures.layer_kinds import RULES
from mergekit_ray.core.errors import PlanError
from support.models import config_of, load, logits

CUTS = ((0, 8), (3, 5), (4, 9))
"""Of nine layers: no period of up to six goes on, the leading layers lead, the last is the last."""

SIZES: dict[str, Any] = {
    "num_hidden_layers": 9,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "head_dim": 8,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "sliding_window": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "n_groups", "num_kv_shared_layers"), 1),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "index_head_dim", "global_head_dim"), 8),
    "index_n_heads": 2,
    "index_topk": 4,
    "block_size": 16,
    "attention_chunk_size": 8,
    "lru_width": 32,
    **dict.fromkeys(("linear_num_key_heads", "n_mamba_heads"), 2),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_heads", "mamba_num_heads", "mamba_dt_rank"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "mamba_d_state"), 8),
    "mamba_n_heads": 8,
    "mamba_d_head": "auto",
    "ssm_state_size": 8,
    "attention_window_size": 8,
    # Tensors outside the layers have tests of their own.
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 64,
    "laurel_rank": 4,
}

CHANGES: dict[str, dict[str, Any]] = {
    "ernie4_5_moe": {"moe_layer_interval": 1, "moe_layer_start_index": 2},
    "dots3_note_text": {
        "num_key_value_heads": 4,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "gemma3n_text": {"hidden_size_per_layer_input": 8},
    "gemma3_text": {"sliding_window_pattern": 4},
    "gpt_neo": {"num_layers": 9, "attention_types": [[["global", "local"], 4], [["global"], 1]]},
    "jamba": {"attn_layer_period": 4, "attn_layer_offset": 2},
    "lfm2": {"full_attn_idxs": [2, 5, 6]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"] * 3},
    "llama4_text": {"interleave_moe_layer_step": 2, "intermediate_size_mlp": 32},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 5},
    "qwen2_moe": {"decoder_sparse_step": 2, "use_sliding_window": True, "max_window_layers": 5},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 5},
    "qwen3_moe": {"decoder_sparse_step": 2, "mlp_only_layers": [3]},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_compress_ratio": 2,
        "indexer_budget": 8,
    },
    "zamba2": {"layers_block_type": ["mamba", "mamba", "hybrid"] * 3},
}

ONLY_LISTED = {"lfm2_moe", "zamba2"}
"""Families whose list of kinds has to be in the file."""

REFUSED = {
    "gemma3n_text": "outside the layers",
    "inkling2_text": "n_layers_per_attn_res_block|outside the layers",
    "jamba": "attn_layer_period",
    "zamba2": "num_mem_blocks",
}
"""Families whose config cannot tell the order of `CUTS`, and the key that the refusal names."""

BY_DEPTH = {"layer_idx", "layer_id", "num_hidden_layers", "attn_residual_add_idx", "mlp_residual_add_idx"}
BY_DEPTH |= {"store_full_length_kv"}
"""What modules know of their place that is not a kind: numbers, and whether they are the last before shared layers."""

MULTIMODAL = {"dots3_note"}
"""Families whose configs have a text model inside, which is in the sweep by itself."""

RULED = {family for rule in RULES for family in rule.families} | {"lfm2", "qwen3_moe", "zamba2"}
FAMILIES = sorted(family for family in RULED - MULTIMODAL if family in CAUSAL)


def make(family: str, folder: Path, **more: Any) -> None:
    """Save a small model, with a config that says no more of its layers than those on the Hub."""
    config_class = CONFIG_MAPPING[family]
    changes = {**CHANGES.get(family, {}), **more}
    accepted = {*config_class.__dataclass_fields__, *changes, "global_head_dim"}
    config = config_class(**{key: value for key, value in {**SIZES, **changes}.items() if key in accepted})
    torch.manual_seed(0)
    getattr(transformers, CAUSAL[family])(config).save_pretrained(folder)
    if family not in ONLY_LISTED:
        lists = {rule.key for rule in RULES} | {"layer_types", "attention_layers"}
        told = {k: v for k, v in config_of(folder).items() if k not in lists or k in changes or isinstance(v, int)}
        (folder / "config.json").write_text(json.dumps(told))


def nature(layer: Any) -> list[Any]:
    """What a layer is made of: its modules, with all that they say of themselves."""
    return [
        (name, type(module).__name__, {key: value for key, value in vars(module).items() if _is_kind(key, value)})
        for name, module in layer.named_modules()
    ]


def _is_kind(key: str, value: Any) -> bool:
    return key not in BY_DEPTH and not key.startswith("_") and isinstance(value, int | float | str | None)


def layers_of(model: Any) -> Any:
    stacks = [stack for name, stack in model.named_modules() if name.endswith((".layers", ".h"))]
    return max(stacks, key=len)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_each_layer_stays_what_it_was(family: str, tmp_path: Path) -> None:
    make(family, tmp_path / "model")
    model = str(tmp_path / "model")
    slices = [{"sources": [{"model": model, "layer_range": list(cut)}]} for cut in CUTS]
    recipe = {"merge_method": "passthrough", "slices": slices}
    if family in REFUSED:
        with pytest.raises(PlanError, match=REFUSED[family]):
            mergekit_ray.merge(recipe, tmp_path / "out")
        return
    mergekit_ray.merge(recipe, tmp_path / "out")
    before, after = layers_of(load(tmp_path / "model")), layers_of(load(tmp_path / "out"))
    order = [layer for first, last in CUTS for layer in range(first, last)]
    assert len(after) == len(order)
    for place, layer in enumerate(order):
        assert nature(after[place]) == nature(before[layer]), (place, layer)


@pytest.mark.parametrize("wide", [0, 8])
def test_tensors_outside_the_layers_with_a_part_for_each(wide: int, tmp_path: Path) -> None:
    """Gemma 4 may do without them, and is cut then."""
    if "gemma4_text" not in CONFIG_MAPPING:
        pytest.skip("this transformers does not know gemma4_text")
    make("gemma4_text", tmp_path / "model", hidden_size_per_layer_input=wide)
    source = {"model": str(tmp_path / "model")}

    def merge(*cuts: tuple[int, int]) -> None:
        slices = [{"sources": [{**source, "layer_range": list(cut)}]} for cut in cuts]
        mergekit_ray.merge({"merge_method": "passthrough", "slices": slices}, tmp_path / "out")

    if wide:
        with pytest.raises(PlanError, match=r"something for each layer outside the layers: '[\w.]+per_layer[\w.]+'"):
            merge((0, 9), (5, 9))
        merge((0, 5), (5, 9))
        assert len(layers_of(load(tmp_path / "out"))) == 9
    else:
        merge((0, 8), (5, 9))
        assert len(layers_of(load(tmp_path / "out"))) == 12


@pytest.mark.parametrize("family", ["qwen2", "smollm3"])
def test_layers_with_a_window_in_a_model_without(family: str, tmp_path: Path) -> None:
    """The donor's config has no window to attend to, and layers of the other model need one."""
    make(family, tmp_path / "plain", use_sliding_window=False)
    make(family, tmp_path / "windowed", use_sliding_window=True)
    taken = [("plain", 0, 3), ("windowed", 2, 9)]
    slices = [{"sources": [{"model": str(tmp_path / name), "layer_range": [*cut]}]} for name, *cut in taken]
    mergekit_ray.merge({"merge_method": "passthrough", "slices": slices}, tmp_path / "out")
    out, natures = load(tmp_path / "out"), []
    for name, first, last in taken:
        natures += [nature(layer) for layer in layers_of(load(tmp_path / name))[first:last]]
    assert [nature(layer) for layer in layers_of(out)] == natures
    assert out.config.sliding_window == SIZES["sliding_window"]
    assert logits(out).isfinite().all()


def test_layers_of_different_kinds_made_one_are_named(tmp_path: Path) -> None:
    """Every other layer of Gemma 2 has a window, which configs on the Hub leave to the family."""
    make("gemma2", tmp_path / "model")
    model = str(tmp_path / "model")

    def warnings(first: int) -> list[str]:
        both = [{"model": model, "layer_range": [start, start + 4]} for start in (0, first)]
        sources = [{**each, "parameters": {"weight": 0.5}} for each in both]
        plan = mergekit_ray.plan({"merge_method": "linear", "slices": [{"sources": sources}]})
        return [warning for warning in plan.warnings if "different kinds" in warning]

    assert warnings(2) == []
    (said,) = warnings(1)
    assert f"layer_types is 'sliding_attention' in layer 0 of {model}, 'full_attention' in layer 1 of {model}" in said
