"""Tensor names of well-known families, as their checkpoints have them on the Hugging Face Hub, and what they mean.

A table: shapes by tensor name, ``config.json``, expected attributes of the `Anatomy`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from support.fake_checkpoints import llama_shapes

V, H = 50, 8


def stack(prefix: str, num_layers: int, *rests: str, shape: Sequence[int] = (H, H)) -> dict[str, Sequence[int]]:
    return {f"{prefix}.{i}.{rest}": shape for i in range(num_layers) for rest in rests}


FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "llama": (
        llama_shapes(3),
        {"num_hidden_layers": 3, "tie_word_embeddings": False},
        {
            "main": "model.layers",
            "num_layers": 3,
            "before": ("model.embed_tokens.weight",),
            "after": ("lm_head.weight", "model.norm.weight"),
            "embedding": "model.embed_tokens.weight",
            "head": "lm_head.weight",
            "tied": False,
        },
    ),
    "llama, tied, with a stored copy": (
        llama_shapes(3),
        {"num_hidden_layers": 3, "tie_word_embeddings": True},
        {
            "num_layers": 3,
            "head": None,
            "tied": True,
            "redundant": {"lm_head.weight"},
            "vocabulary": {"model.embed_tokens.weight", "lm_head.weight"},
        },
    ),
    "gemma: tied by its class, the config says nothing": (
        llama_shapes(2, head=False),
        {"num_hidden_layers": 2},
        {"num_layers": 2, "head": None, "tied": True, "redundant": set()},
    ),
    "mixtral": (
        {
            "model.embed_tokens.weight": (V, H),
            **stack(
                "model.layers",
                2,
                "block_sparse_moe.gate.weight",
                *(f"block_sparse_moe.experts.{e}.w{j}.weight" for e in range(8) for j in (1, 2, 3)),
            ),
            "model.norm.weight": (H,),
            "lm_head.weight": (V, H),
        },
        {"num_hidden_layers": 2, "num_local_experts": 8, "tie_word_embeddings": False},
        {"stacks": {"model.layers": 2}, "main": "model.layers", "num_layers": 2, "head": "lm_head.weight"},
    ),
    "gpt2, bare": (
        {
            "wte.weight": (V, H),
            "wpe.weight": (20, H),
            **stack("h", 2, "attn.c_attn.weight", "attn.bias", "mlp.c_fc.weight"),
            "ln_f.weight": (H,),
        },
        {"n_layer": 2},
        {
            "main": "h",
            "num_layers": 2,
            "before": ("wpe.weight", "wte.weight"),
            "after": ("ln_f.weight",),
            "embedding": "wte.weight",
            "tied": True,
        },
    ),
    "gpt2, prefixed": (
        {
            "transformer.wte.weight": (V, H),
            "transformer.wpe.weight": (20, H),
            **stack("transformer.h", 2, "attn.c_attn.weight", "attn.c_attn.bias"),
            "transformer.ln_f.weight": (H,),
        },
        {"n_layer": 2, "tie_word_embeddings": True},
        {"main": "transformer.h", "embedding": "transformer.wte.weight", "tied": True, "redundant": set()},
    ),
    "gpt-neox": (
        {
            "gpt_neox.embed_in.weight": (V, H),
            **stack(
                "gpt_neox.layers",
                2,
                "attention.bias",
                "attention.masked_bias",
                "attention.rotary_emb.inv_freq",
                "attention.query_key_value.weight",
            ),
            "gpt_neox.final_layer_norm.weight": (H,),
            "embed_out.weight": (V, H),
        },
        {"num_hidden_layers": 2, "tie_word_embeddings": False},
        {
            "main": "gpt_neox.layers",
            "before": ("gpt_neox.embed_in.weight",),
            "after": ("embed_out.weight", "gpt_neox.final_layer_norm.weight"),
            "head": "embed_out.weight",
            "tied": False,
            "vocabulary": {"gpt_neox.embed_in.weight", "embed_out.weight"},
        },
    ),
    "phi-2": (
        {
            "model.embed_tokens.weight": (V, H),
            **stack("model.layers", 2, "self_attn.dense.bias", "mlp.fc1.weight"),
            "model.final_layernorm.weight": (H,),
            "model.final_layernorm.bias": (H,),
            "lm_head.weight": (V, H),
            "lm_head.bias": (V,),
        },
        {"num_hidden_layers": 2, "tie_word_embeddings": False},
        {
            "head": "lm_head.weight",
            "after": ("lm_head.bias", "lm_head.weight", "model.final_layernorm.bias", "model.final_layernorm.weight"),
            "vocabulary": {"model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"},
            "tied": False,
        },
    ),
    "bloom": (
        {
            "word_embeddings.weight": (V, H),
            "word_embeddings_layernorm.weight": (H,),
            "word_embeddings_layernorm.bias": (H,),
            **stack("h", 2, "self_attention.query_key_value.weight", "self_attention.dense.bias"),
            "ln_f.weight": (H,),
            "ln_f.bias": (H,),
        },
        {"n_layer": 2},
        {
            "main": "h",
            "before": (
                "word_embeddings.weight",
                "word_embeddings_layernorm.bias",
                "word_embeddings_layernorm.weight",
            ),
            "after": ("ln_f.bias", "ln_f.weight"),
            "embedding": "word_embeddings.weight",
            "tied": True,
            "vocabulary": {"word_embeddings.weight"},
        },
    ),
    "opt-350m": (
        {
            "model.decoder.embed_tokens.weight": (V, H),
            "model.decoder.embed_positions.weight": (20, 2 * H),
            "model.decoder.project_in.weight": (2 * H, H),
            "model.decoder.project_out.weight": (H, 2 * H),
            **stack("model.decoder.layers", 2, "self_attn.k_proj.weight", "fc1.weight"),
        },
        {"num_hidden_layers": 2},
        {
            "main": "model.decoder.layers",
            "before": (
                "model.decoder.embed_positions.weight",
                "model.decoder.embed_tokens.weight",
                "model.decoder.project_in.weight",
            ),
            "after": ("model.decoder.project_out.weight",),
            "embedding": "model.decoder.embed_tokens.weight",
            "tied": True,
        },
    ),
    "t5": (
        {
            "shared.weight": (V, H),
            "encoder.embed_tokens.weight": (V, H),
            "decoder.embed_tokens.weight": (V, H),
            **stack("encoder.block", 2, "layer.0.SelfAttention.q.weight", "layer.1.DenseReluDense.wi.weight"),
            **stack("decoder.block", 3, "layer.0.SelfAttention.q.weight", "layer.1.EncDecAttention.q.weight"),
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 4),
            "encoder.final_layer_norm.weight": (H,),
            "decoder.final_layer_norm.weight": (H,),
        },
        {"num_layers": 2, "num_decoder_layers": 3, "tie_word_embeddings": True},
        {
            "stacks": {"encoder.block": 2, "decoder.block": 3},
            "main": "encoder.block",
            "num_layers": 2,
            "before": ("decoder.embed_tokens.weight", "encoder.embed_tokens.weight", "shared.weight"),
            "after": ("decoder.final_layer_norm.weight", "encoder.final_layer_norm.weight"),
            "embedding": "shared.weight",
            "tied": True,
            "vocabulary": {"decoder.embed_tokens.weight", "encoder.embed_tokens.weight", "shared.weight"},
        },
    ),
    "qwen2-vl": (
        {
            "visual.patch_embed.proj.weight": (H, 3, 2, 14, 14),
            **stack("visual.blocks", 4, "attn.qkv.weight"),
            "visual.merger.ln_q.weight": (H,),
            "visual.merger.mlp.0.weight": (H, H),
            "visual.merger.mlp.2.weight": (H, H),
            "model.embed_tokens.weight": (V, H),
            **stack("model.layers", 2, "self_attn.q_proj.weight", "mlp.up_proj.weight", shape=(4 * H, H)),
            "model.norm.weight": (H,),
        },
        {"num_hidden_layers": 2, "vision_config": {"depth": 4}, "tie_word_embeddings": True},
        {
            "stacks": {"visual.blocks": 4, "visual.merger.mlp": 3, "model.layers": 2},
            "main": "model.layers",
            "num_layers": 2,
            "before": ("model.embed_tokens.weight", "visual.patch_embed.proj.weight"),
            "after": ("model.norm.weight", "visual.merger.ln_q.weight"),
            "embedding": "model.embed_tokens.weight",
            "tied": True,
        },
    ),
    "llava, whose text config counts no layers": (
        {
            "vision_tower.vision_model.embeddings.class_embedding": (H,),
            "vision_tower.vision_model.embeddings.position_embedding.weight": (577, H),
            **stack("vision_tower.vision_model.encoder.layers", 4, "self_attn.q_proj.weight"),
            "multi_modal_projector.linear_1.weight": (H, H),
            "language_model.model.embed_tokens.weight": (V, H),
            **stack("language_model.model.layers", 3, "self_attn.q_proj.weight", "mlp.up_proj.weight"),
            "language_model.model.norm.weight": (H,),
            "language_model.lm_head.weight": (V, H),
        },
        {"text_config": {"model_type": "llama", "vocab_size": V}, "vision_config": {"num_hidden_layers": 4}},
        {
            "main": "language_model.model.layers",
            "num_layers": 3,
            "embedding": "language_model.model.embed_tokens.weight",
            "head": "language_model.lm_head.weight",
            "tied": False,
        },
    ),
    "qwen2.5-omni: the text config two levels down": (
        {
            **stack("thinker.visual.blocks", 3, "attn.q.weight", "attn.k.weight", "attn.v.weight"),
            **stack("thinker.model.layers", 2, "self_attn.q_proj.weight"),
            "thinker.model.embed_tokens.weight": (V, H),
            "thinker.lm_head.weight": (V, H),
        },
        {"thinker_config": {"text_config": {"num_hidden_layers": 2, "tie_word_embeddings": False}}},
        {"main": "thinker.model.layers", "num_layers": 2, "head": "thinker.lm_head.weight", "tied": False},
    ),
    "deepseek-v3, with a layer that predicts one token more": (
        {
            "model.embed_tokens.weight": (V, H),
            **stack("model.layers", 3, "mlp.experts.0.up_proj.weight", "mlp.shared_experts.up_proj.weight"),
            "model.layers.2.embed_tokens.weight": (V, H),
            "model.layers.2.eh_proj.weight": (H, 2 * H),
            "model.layers.2.shared_head.head.weight": (V, H),
            "model.norm.weight": (H,),
            "lm_head.weight": (V, H),
        },
        {"num_hidden_layers": 2, "num_nextn_predict_layers": 1, "tie_word_embeddings": False},
        {
            "stacks": {"model.layers": 2},
            "num_layers": 2,
            "embedding": "model.embed_tokens.weight",
            "head": "lm_head.weight",
            "before": ("model.embed_tokens.weight",),
            "after": (
                "lm_head.weight",
                "model.layers.2.eh_proj.weight",
                "model.layers.2.embed_tokens.weight",
                "model.layers.2.mlp.experts.0.up_proj.weight",
                "model.layers.2.mlp.shared_experts.up_proj.weight",
                "model.layers.2.shared_head.head.weight",
                "model.norm.weight",
            ),
        },
    ),
    "bert": (
        {
            "bert.embeddings.word_embeddings.weight": (V, H),
            "bert.embeddings.position_embeddings.weight": (20, H),
            "bert.embeddings.token_type_embeddings.weight": (2, H),
            "bert.embeddings.LayerNorm.weight": (H,),
            "bert.embeddings.position_ids": (1, 20),
            **stack("bert.encoder.layer", 2, "attention.self.query.weight", "output.dense.weight"),
            "bert.pooler.dense.weight": (H, H),
            "cls.predictions.bias": (V,),
        },
        {"num_hidden_layers": 2},
        {
            "main": "bert.encoder.layer",
            "num_layers": 2,
            "embedding": "bert.embeddings.word_embeddings.weight",
            "head": None,
            "tied": True,
            "after": ("bert.pooler.dense.weight", "cls.predictions.bias"),
        },
    ),
    "mamba": (
        {
            "backbone.embeddings.weight": (V, H),
            **stack("backbone.layers", 2, "mixer.A_log", "mixer.in_proj.weight", "norm.weight"),
            "backbone.norm_f.weight": (H,),
        },
        {"num_hidden_layers": 2, "n_layer": 2},
        {
            "main": "backbone.layers",
            "num_layers": 2,
            "before": ("backbone.embeddings.weight",),
            "after": ("backbone.norm_f.weight",),
            "embedding": "backbone.embeddings.weight",
            "tied": True,
        },
    ),
    "internlm2, whose head is called output": (
        {
            "model.tok_embeddings.weight": (V, H),
            **stack("model.layers", 2, "attention.wqkv.weight", "feed_forward.w1.weight"),
            "model.norm.weight": (H,),
            "output.weight": (V, H),
        },
        {"num_hidden_layers": 2, "tie_word_embeddings": False},
        {"embedding": "model.tok_embeddings.weight", "head": "output.weight", "tied": False},
    ),
    "chatglm": (
        {
            "transformer.embedding.word_embeddings.weight": (V, H),
            **stack("transformer.encoder.layers", 2, "self_attention.query_key_value.weight"),
            "transformer.encoder.final_layernorm.weight": (H,),
            "transformer.output_layer.weight": (V, H),
            "transformer.rotary_pos_emb.inv_freq": (4,),
        },
        {"num_layers": 2},
        {
            "main": "transformer.encoder.layers",
            "embedding": "transformer.embedding.word_embeddings.weight",
            "head": "transformer.output_layer.weight",
            "tied": False,
        },
    ),
    "a projector's output is no head": (
        {**llama_shapes(2), "projector.output.weight": (H, H)},
        {"num_hidden_layers": 2, "tie_word_embeddings": False},
        {"head": "lm_head.weight", "vocabulary": {"model.embed_tokens.weight", "lm_head.weight"}},
    ),
    "a model without layers": (
        {"embed_tokens.weight": (V, H), "classifier.weight": (2, H)},
        {},
        {"main": None, "num_layers": 0, "before": ("embed_tokens.weight",), "after": ("classifier.weight",)},
    ),
}
