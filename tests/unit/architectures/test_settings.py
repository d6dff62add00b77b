"""What configs say: read alike whichever version of transformers wrote it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from mergekit_ray.architectures.settings import MODEL_TYPE, NUANCES, STRUCTURE, UNSTATED, parts

LOCAL, GLOBAL = "sliding_attention", "full_attention"


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[str]:
    """Settings that two configs state, and not alike."""
    others = parts(theirs)
    for part, config in parts(ours).items():
        for setting in (MODEL_TYPE, *STRUCTURE, *NUANCES):
            values = [setting.value(config), setting.value(others.get(part, {}))]
            if UNSTATED not in values and values[0] != values[1]:
                yield f"{part}.{setting.name}: {values}"


def of_transformers_4(config: Any) -> Any:
    """A config with the keys for rotary embeddings that transformers 4 had."""
    if not isinstance(config, dict):
        return config
    found = {key: of_transformers_4(value) for key, value in config.items()}
    rope = found.pop("rope_parameters", None)
    if rope is None:
        return found
    if any(isinstance(value, dict) for value in rope.values()):
        local, rope = rope.get(LOCAL) or {}, rope.get(GLOBAL) or {}
        found |= {"rope_local_base_freq": local["rope_theta"]} if "rope_theta" in local else {}
    moved = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    scaling = {key: value for key, value in rope.items() if key not in moved}
    return {**found, **moved, "rope_scaling": None if scaling == {"rope_type": "default"} else scaling}


@pytest.mark.slow
def test_versions_of_transformers_write_the_same_of_every_family() -> None:
    """All keys or only those that are no defaults, rotary parameters in one place or in several."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    found, tried = [], 0
    for name in CONFIG_MAPPING_NAMES:
        try:
            config = CONFIG_MAPPING[name]()
        except (ValueError, TypeError, StrictDataclassError):
            continue  # it has no defaults
        full, short = (json.loads(json.dumps(each, default=str)) for each in (config.to_dict(), config.to_diff_dict()))
        tried += 1
        for other in (short, of_transformers_4(full), of_transformers_4(short)):
            found += [f"{name}: {each}" for pair in ((full, other), (other, full)) for each in differences(*pair)]
    assert not found
    assert tried > 500


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"num_hidden_layers": 1}, {"": {"num_hidden_layers": 1}}),
        (
            {"thinker_config": {"text_config": {"num_layers": 2}, "audio_config": {"d_model": 1}}},
            {"": {"num_layers": 2}, "audio_config": {"d_model": 1}},
        ),
        (
            {"n_layer": 1, "attn_config": {"kv_n_heads": 1}, "quantization_config": {"n_heads": 1}, "x_config": None},
            {"": None, "attn_config": {"kv_n_heads": 1}},
        ),
    ],
)
def test_parts(config: dict[str, Any], found: dict[str, Any]) -> None:
    assert parts(config) == {part: config if said is None else said for part, said in found.items()}


def test_a_setting_is_called_as_the_config_calls_it() -> None:
    heads = next(setting for setting in STRUCTURE if setting.name == "num_attention_heads")
    assert heads.spelling([{}, {"n_head": 1}, {"num_heads": 1}]) == "n_head"
    assert heads.spelling([{}]) == "num_attention_heads"


def test_no_key_stands_for_two_settings() -> None:
    spellings = [key for setting in (*STRUCTURE, *NUANCES) for key in setting.spellings]
    assert sorted(spellings) == sorted(set(spellings))
