"""Which tensors an extracted adapter covers, and what PEFT will call them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mergekit_ray.config.reference import ModelReference
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import ConfigError, ModelError
from mergekit_ray.core.expressions import Merge, loads
from mergekit_ray.operations.extract_lora import rank_for
from mergekit_ray.planning.agreement import check_pair
from mergekit_ray.planning.extraction import Coverage, Extraction, Target, adapter_config, extraction
from mergekit_ray.planning.make import models_of
from support.fake_checkpoints import checkpoint, llama, llama_shapes

SHAPES: dict[str, Any] = {
    "model.embed_tokens.weight": (10, 4),
    "model.layers.0.self_attn.q_proj.weight": (4, 4),
    "model.layers.0.self_attn.q_proj.bias": (4,),
    "model.layers.0.mlp.gate.weight": (3, 4),
    "model.layers.0.mlp.experts.0.up_proj.weight": (6, 4),
    "model.layers.0.mlp.experts.gate_up": (3, 4, 6),
    "model.layers.0.conv.weight": (4, 4, 3),
    "model.layers.0.relative_attention_bias.weight": (8, 2),
    "model.layers.0.input_layernorm.weight": (4,),
    "model.rotary_emb.inv_freq": (2,),
    "model.norm.weight": (4,),
    "projector.weight": (4, 4),
    "lm_head.weight": (10, 4),
}
CONFIG = {
    "model_type": "new",
    "num_hidden_layers": 1,
    "architectures": ["NewForCausalLM"],
    "tie_word_embeddings": False,
}
IN_LAYERS = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.experts.0.up_proj"]


def extracted(
    tuned: dict[str, Any] | None = None,
    base: dict[str, Any] | None = None,
    *,
    config: dict[str, Any] | None = None,
    **coverage: Any,
) -> Extraction:
    checkpoints = {
        ModelReference("/tuned"): checkpoint("/tuned", SHAPES if tuned is None else tuned, config or CONFIG),
        ModelReference("/base"): checkpoint("/base", SHAPES if base is None else base, config or CONFIG),
    }
    first, second = models_of(checkpoints).values()
    return extraction(first, second, Coverage(**coverage))


def test_matrices_of_the_layers_are_factorised_and_all_else_is_named() -> None:
    found = extracted()
    assert sorted(t.module for t in found.targets) == sorted(IN_LAYERS)
    assert not any(t.transposed or t.is_embedding for t in found.targets)
    left = SHAPES.keys() - {f"{name}.weight" for name in IN_LAYERS} - {"model.rotary_emb.inv_freq"}
    assert set(found.uncovered) == left
    assert (found.saved, found.unmatched) == ([], {})


def test_embeddings_and_head_if_asked_for() -> None:
    found = {t.module: t for t in extracted(embeddings=True).targets}
    assert found.keys() == {*IN_LAYERS, "model.embed_tokens", "lm_head"}
    assert found["model.embed_tokens"] == Target("model.embed_tokens.weight", is_embedding=True, transposed=True)
    assert found["lm_head"] == Target("lm_head.weight", is_embedding=False, transposed=False)


def test_modules_are_saved_and_excluded_by_the_end_of_their_names() -> None:
    found = extracted(saved=("norm", "mlp.gate", "q_proj"), excluded=("up_proj",), embeddings=True)
    assert sorted(found.saved) == [
        "model.layers.0.mlp.gate.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.q_proj.weight",
        "model.norm.weight",
    ]
    assert "model.layers.0.mlp.experts.0.up_proj.weight" in found.uncovered
    assert "model.layers.0.input_layernorm.weight" in found.uncovered  # a whole component, not its letters


def test_what_has_no_counterpart() -> None:
    tuned = {**SHAPES, "lm_head.weight": (12, 4), "model.embed_tokens.weight": (12, 4), "new.weight": (4, 4)}
    base = {**SHAPES, "old.weight": (4, 4)}
    found = extracted(tuned, base, embeddings=True)
    assert found.unmatched == {
        "lm_head.weight": "[12, 4], in the base [10, 4]",
        "model.embed_tokens.weight": "[12, 4], in the base [10, 4]",
        "new.weight": "only in the fine-tuned model",
        "old.weight": "only in the base",
    }
    assert extracted(tuned, base, saved=("lm_head", "embed_tokens", "new")).unmatched == {
        "old.weight": "only in the base"
    }


def test_integers_are_no_weights() -> None:
    shapes = {**SHAPES, "model.layers.0.table.weight": (DType.I64, (4, 4))}
    found = extracted(shapes, shapes)
    assert "model.layers.0.table.weight" not in [*found.uncovered, *(t.name for t in found.targets)]


def test_a_difference_is_what_was_learnt() -> None:
    expression = extracted().difference("model.norm.weight")
    assert isinstance(expression, Merge)
    assert [x.model for x in loads(expression)] == ["m0", "m1"]
    assert [x["weight"] for x in expression.input_parameters] == [1.0, -1.0]
    assert expression.spec.dtype is DType.F32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"saved": ("head",)}, "no module's name ends with 'head'; did you mean 'lm_head'"),
        ({"base": {"other.weight": (4, 4)}, "config": {}}, "no matrix is in both models"),
        ({"excluded": ("q_proj", "up_proj")}, "so there is nothing to factorise"),
        ({"excluded": ("k_prj",)}, "no module's name ends with 'k_prj'"),
    ],
)
def test_what_cannot_be_extracted(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        extracted(**arguments)


# -- what PEFT reads ---------------------------------------------------------------------------------------------------


def test_settings_scale_every_product_by_one() -> None:
    found = extracted(saved=("norm",))
    ranks = {f"{IN_LAYERS[0]}.weight": 4, f"{IN_LAYERS[1]}.weight": 2}
    config = adapter_config(found, ranks)
    assert (config["peft_type"], config["task_type"]) == ("LORA", "CAUSAL_LM")
    assert config["r"] == config["lora_alpha"] == 2
    assert config["rank_pattern"] == config["alpha_pattern"] == {IN_LAYERS[0]: 4}
    assert config["target_modules"] == ["q_proj", "up_proj"]
    assert config["modules_to_save"] == ["model.norm"]
    assert (config["base_model_name_or_path"], config["revision"]) == ("/base", None)


def test_where_only_some_layers_of_a_name_are_there_all_are_named_in_full() -> None:
    checkpoints = {ModelReference(path): llama(path, 3) for path in ("/tuned", "/base")}
    tuned, base = models_of(checkpoints).values()
    found = extraction(tuned, base, Coverage())
    ranks = {t.name: 1 for t in found.targets if "layers.1.mlp" not in t.name}
    modules = adapter_config(found, ranks)["target_modules"]
    assert modules == ["model.layers.0.mlp.up_proj", "model.layers.2.mlp.up_proj", "q_proj"]


GPT2: dict[str, Any] = {"wte.weight": (10, 4), "h.0.attn.c_attn.weight": (4, 12), "ln_f.weight": (4,)}


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_gpt2_is_transposed_and_called_what_transformers_calls_it(prefix: str) -> None:
    shapes = {prefix + name: shape for name, shape in GPT2.items()}
    found = extracted(shapes, shapes, config={"model_type": "gpt2", "n_layer": 1}, embeddings=True, saved=("ln_f",))
    [layer] = [t for t in found.targets if not t.is_embedding]
    assert layer.transposed
    assert found.key(layer.module) == "base_model.model.transformer.h.0.attn.c_attn"
    config = adapter_config(found, {t.name: 1 for t in found.targets})
    assert config["target_modules"] == ["c_attn", "wte"]
    assert config["modules_to_save"] == ["transformer.ln_f"]
    assert config["fan_in_fan_out"] is True


@pytest.mark.parametrize(
    ("values", "energy", "rank"),
    [
        ([2.0, 1.0, 1.0], 0.6, 1),
        ([2.0, 1.0, 1.0], 4 / 6, 1),
        ([2.0, 1.0, 1.0], 0.7, 2),
        ([2.0, 1.0, 1.0], 1.0, 3),
        ([2.0, 1.0, 0.0], 1.0, 2),
        ([0.0, 0.0], 0.5, 0),
        ([1e-200], 0.5, 0),  # its square is zero
    ],
)
def test_the_least_rank_that_holds_the_energy(values: list[float], energy: float, rank: int) -> None:
    assert rank_for(np.array(values), energy) == rank


def test_no_ending_means_another_module() -> None:
    shapes = {
        "visual.blocks.0.attn.proj.weight": (4, 4),
        "visual.merger.mlp.0.weight": (4, 4),
        "visual.merger.mlp.2.weight": (4, 4),
        "model.embed_tokens.weight": (10, 4),
        "model.layers.0.self_attn.q_proj.weight": (4, 4),
        "model.layers.0.mlp.up_proj.weight": (6, 4),
        "model.layers.0.proj.norm.weight": (4,),
        "model.layers.0.mlp.experts.0.down_proj.weight": (4, 6),
        "model.layers.0.mlp.down_proj.weight": (4, 6),
    }
    config = {"model_type": "qwen2_vl", "architectures": ["QwenForConditionalGeneration"], "num_hidden_layers": 1}
    found = extracted(shapes, shapes, config=config, excluded=("layers.0.mlp.down_proj",))
    assert adapter_config(found, dict.fromkeys((t.name for t in found.targets), 1))["target_modules"] == [
        "experts.0.down_proj",  # as another down_proj is no target
        "model.visual.blocks.0.attn.proj",  # for layers.0.proj holds a norm
        "model.visual.merger.mlp.0",  # for blocks.0 is a block
        "model.visual.merger.mlp.2",
        "q_proj",
        "up_proj",
    ]


def test_names_are_those_of_the_loaded_model() -> None:
    shapes = {
        "language_model.model.embed_tokens.weight": (10, 4),
        "language_model.model.layers.0.q_proj.weight": (4, 4),
        "language_model.model.layers.1.q_proj.weight": (4, 4),
        "vision_tower.layers.0.fc.weight": (4, 4),
        "language_model.lm_head.weight": (10, 4),
    }
    inner = {"num_hidden_layers": 2}
    config = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "text_config": inner}
    found = extracted(shapes, shapes, config=config, saved=("lm_head",), excluded=("fc",))
    ranks = {"language_model.model.layers.0.q_proj.weight": 1}
    changed = adapter_config(found, ranks)
    assert changed["target_modules"] == ["model.language_model.layers.0.q_proj"]
    assert changed["modules_to_save"] == ["lm_head"]
    pattern = adapter_config(found, ranks | {"language_model.model.layers.1.q_proj.weight": 2})["rank_pattern"]
    assert pattern == {"model.language_model.layers.1.q_proj": 2}
    assert found.key("vision_tower.layers.0.fc") == "base_model.model.model.vision_tower.layers.0.fc"


def test_what_peft_would_take_for_a_routed_expert_is_named_as_a_parameter() -> None:
    layer = "model.layers.0.mlp"
    modules = (f"{layer}.experts.0.up_proj", f"{layer}.shared_experts.up_proj", f"{layer}.shared_experts.c_proj")
    shapes = {"model.embed_tokens.weight": (10, 4), **{f"{module}.weight": (4, 4) for module in modules}}
    config = {**CONFIG, "model_type": "deepseek_v3"}
    found = extracted(shapes, shapes, config=config)
    changed = adapter_config(found, {f"{modules[0]}.weight": 1, f"{modules[1]}.weight": 2, f"{modules[2]}.weight": 1})
    assert changed["target_modules"] == ["c_proj", "experts.0.up_proj"]
    assert changed["target_parameters"] == [f"{modules[1]}.weight"]
    assert changed["rank_pattern"] == changed["alpha_pattern"] == {modules[1]: 2, f"{modules[1]}.weight": 2}
    assert changed["r"] == 1


@pytest.mark.parametrize("key", ["saved", "excluded"])
def test_one_name_is_no_tuple_of_letters(key: str) -> None:
    given: dict[str, Any] = {key: "lm_head"}
    with pytest.raises(ConfigError, match=rf"Coverage: {key} is 'lm_head'\n  give a tuple of names: \('lm_head',\)"):
        Coverage(**given)


def test_layers_of_an_adapters_models_must_have_the_same_tensors() -> None:
    """A difference without the biases that the base adds is no adapter of it."""
    config = {"model_type": "llama", "num_hidden_layers": 2}
    biases = {f"model.layers.{layer}.self_attn.q_proj.bias": (4,) for layer in range(2)}
    opened = (
        checkpoint("/a", {**llama_shapes(2), **biases}, {"model_type": "qwen2", "num_hidden_layers": 2}),
        checkpoint("/b", llama_shapes(2), config),
    )
    base, tuned = models_of({ModelReference.parse(c.reference): c for c in opened}).values()
    for pair, bias in (((base, tuned), "[4] in /a, absent in /b"), ((tuned, base), "absent in /b, [4] in /a")):
        with pytest.raises(ModelError) as caught:
            check_pair(*pair)
        _, of_type, line = caught.value.what.splitlines()
        assert of_type.startswith("  model_type: ")
        assert line == f"  model.layers.0.self_attn.q_proj.bias: {bias} (and so in 1 more layer)"
        assert len(check_pair(*pair, allow_conflicts=True)) == 2
    head = checkpoint(
        "/c", {**llama_shapes(2), "score.weight": (2, 4)}, config
    )  # is reported, and stored whole if it is asked for
    _, with_head = models_of({ModelReference.parse(c.reference): c for c in (opened[1], head)}).values()
    assert check_pair(tuned, with_head) == []
