"""Settings that no table names: a difference between configs is told if it may change what a model computes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from support.fake_checkpoints import LINEAR, llama, plan_of

CUT = """
merge_method: passthrough
slices:
- sources: [{model: /a, layer_range: [0, 2]}]
- sources: [{model: /b, layer_range: [0, 2]}]
"""


def warnings(ours: dict[str, Any], theirs: dict[str, Any], text: str = LINEAR) -> list[str]:
    a, b = (llama(path, 2) for path in ("/a", "/b"))
    configs = {**a.config, **ours}, {**b.config, **theirs}
    return list(plan_of(text, *(replace(each, config=c) for each, c in zip((a, b), configs, strict=True))).warnings)


@pytest.mark.parametrize("text", [LINEAR, CUT])
@pytest.mark.parametrize(
    ("key", "ours", "theirs"),
    [
        ("moe_k", 2, 4),
        ("local_attention", 128, 256),
        ("swiglu_limit", 7.0, 10.0),
        ("moe_router_logit_softcapping", 30.0, 0.0),
        ("mup_enabled", True, False),
        ("apply_residual_connection_post_layernorm", False, True),
        ("is_decoder", True, False),
        ("use_long_context", False, True),
        ("ffn_kind", "gated", "plain"),
    ],
)
def test_what_may_matter_is_told(key: str, ours: object, theirs: object, text: str) -> None:
    [line] = warnings({key: ours}, {key: theirs}, text)
    assert line.startswith(f"the models' configs differ: {key}: {ours!r} in /a, {theirs!r} in /b; ")


def test_in_parts_too() -> None:
    [line] = warnings({"attn_config": {"alibi_bias_max": 8}}, {"attn_config": {"alibi_bias_max": 16}})
    assert "attn_config.alibi_bias_max: 8 in /a, 16 in /b" in line


@pytest.mark.parametrize(
    ("key", "ours", "theirs"),
    [
        ("_name_or_path", "a", "b"),
        ("attention_dropout", 0.0, 0.1),
        ("resid_pdrop", 0.0, 0.1),
        ("initializer_range", 0.02, 0.006),
        ("router_aux_loss_coef", 0.1, 0.2),
        ("use_cache", True, False),
        ("torch_dtype", "float16", "bfloat16"),
        ("transformers_version", "4.40.0", "5.1.0"),
        ("bos_token_id", 1, 2),
        ("max_length", 20, 100),
        ("temperature", 1.0, 0.6),
        ("pretraining_tp", 1, 2),
        ("finetuning_task", "mnli", "sst2"),
    ],
)
def test_training_running_and_names_are_not(key: str, ours: object, theirs: object) -> None:
    assert warnings({key: ours}, {key: theirs}) == []


def test_silence_and_null_say_nothing() -> None:
    assert warnings({"swiglu_limit": 7.0}, {}) == []
    assert warnings({"swiglu_limit": 7.0}, {"swiglu_limit": None}) == []
