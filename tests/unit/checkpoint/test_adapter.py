"""Adapters as PEFT saves them: names, settings, and what is refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mergekit_ray.checkpoint.adapter import Adapter, Change, adapted, open_adapter
from mergekit_ray.checkpoint.adapter_config import parse_adapter_config
from mergekit_ray.checkpoint.layout import encode_header
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import CheckpointError, ModelError
from mergekit_ray.core.tensors import TensorSpec
from mergekit_ray.storage.local.store import LocalStore
from support.fake_checkpoints import llama

MODULE = "model.layers.0.self_attn.q_proj"
A, B = f"base_model.model.{MODULE}.lora_A.weight", f"base_model.model.{MODULE}.lora_B.weight"


class Folder:
    """Writes an adapter's files."""

    def __init__(self, root: Path) -> None:
        self.store = LocalStore(root)
        self.config()

    def config(self, **settings: object) -> None:
        content = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, **settings}
        self.store.put("adapter_config.json", json.dumps(content).encode())

    def weights(self, *names: str, file: str = "adapter_model.safetensors") -> None:
        specs = [TensorSpec(name, DType.F32, (2, 2)) for name in names]
        self.store.put(file, encode_header(specs) + bytes(16 * len(specs)))

    def open(self) -> Adapter:
        return open_adapter(self.store, "org/adapter")


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def config(**settings: object) -> Any:
    return parse_adapter_config(json.dumps({"peft_type": "LORA", **settings}).encode(), "config")


# -- settings ----------------------------------------------------------------------------------------------------------


def test_settings_are_read_as_peft_reads_them() -> None:
    config = parse_adapter_config(b'{"r": 4, "lora_alpha": 8, "lora_dropout": Infinity, "r": 2}', "config")
    assert (config.rank, config.alpha) == (2, 8)
    assert config.warnings == ("r occurs twice in adapter_config.json; its last value is read, as PEFT does",)


def test_defaults_are_those_of_peft() -> None:
    found = parse_adapter_config(b'{"peft_type": "LORA"}', "config")
    assert (found.rank, found.alpha, found.scale_of("x")) == (8, 8, 1.0)
    assert not any([found.rank_stabilised, found.fan_in_fan_out, found.dora, found.saved, found.keeps_ties])


def test_scale_is_alpha_over_rank_or_over_its_root() -> None:
    assert config(r=4, lora_alpha=6).scale_of("x") == 1.5
    assert config(r=4, lora_alpha=6, use_rslora=True).scale_of("x") == 6 / math.sqrt(4)


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("q_proj", True),
        ("self_attn.q_proj", True),
        (MODULE, True),
        (f"^{MODULE}", True),
        (r".*\.0\..*q_proj", True),
        (r"layers\.[0-3]\..*\.(q|k)_proj", True),
        ("proj", False),  # whole components only
        ("layers.1.self_attn.q_proj", False),
        ("self_attn", False),
    ],
)
def test_patterns_match_the_end_of_a_name(pattern: str, matches: bool) -> None:
    found = config(r=4, lora_alpha=8, rank_pattern={pattern: 16}, alpha_pattern={pattern: 8.0})
    assert (found.rank_of(MODULE), found.scale_of(MODULE)) == ((16, 0.5) if matches else (4, 2.0))


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|a)*b", "(a*)*b", ".*.*.*.*.*.*.*b", "(.*a){20}b"])
def test_no_pattern_takes_for_ever(pattern: str) -> None:
    assert config(r=4, rank_pattern={pattern: 16}).rank_of("a" * 5000) == 4


def test_single_tokens_of_one_module_or_of_all() -> None:
    assert config(trainable_token_indices=[3, 1]).tokens_of("model.embed_tokens") == (3, 1)
    by_module = config(trainable_token_indices={"embed_tokens": [3], "lm_head": [1, 2]})
    assert [by_module.tokens_of(m) for m in ("model.embed_tokens", "lm_head", "x")] == [(3,), (1, 2), ()]
    assert config().tokens_of("lm_head") == ()


@pytest.mark.parametrize("value", [7, "x", ["1"], [True], [-1], [1, 1], {"lm_head": 3}, {"lm_head": [1.5]}])
def test_tokens_that_are_none(value: object) -> None:
    with pytest.raises(CheckpointError, match="trainable_token_indices is neither a list of different tokens"):
        config(trainable_token_indices=value)


def test_of_several_patterns_the_first_counts() -> None:
    assert config(rank_pattern={"q_proj": 1, "self_attn.q_proj": 2}).rank_of(MODULE) == 1


def test_rank_and_alpha_have_patterns_of_their_own() -> None:
    found = config(r=4, lora_alpha=8, rank_pattern={"q_proj": 16}, use_rslora=True)
    assert found.scale_of(MODULE) == 8 / math.sqrt(16)


@pytest.mark.parametrize("kind", ["IA3", "LOHA", "LOKR", "ADALORA", "VERA", "OFT", "LN_TUNING", 7])
def test_other_methods_are_refused_by_name(kind: object) -> None:
    with pytest.raises(ModelError, match=f"kind {kind!r}; only LoRA") as caught:
        config(peft_type=kind)
    assert "merge_and_unload" in str(caught.value.remedy)


@pytest.mark.parametrize("kind", ["XLORA", "PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"])
def test_methods_that_change_no_weights_have_a_remedy_of_their_own(kind: str) -> None:
    with pytest.raises(ModelError, match=f"kind {kind!r}; only LoRA") as caught:
        config(peft_type=kind)
    assert "use it as an adapter" in str(caught.value.remedy)
    assert "merge_and_unload" not in str(caught.value.remedy)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layer_replication", [[0, 2]]),
        ("alora_invocation_tokens", [5]),
        ("arrow_config", {"top_k": 2}),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("kasa_config", {"beta": 1}),
        ("velora_config", {"x": 1}),
        ("monteclora_config", {"x": 1}),
        ("megatron_config", {"x": 1}),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
    ],
)
def test_variants_that_cannot_be_applied_are_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(ModelError, match=key) as caught:
        config(**{key: value})
    assert caught.value.remedy
    config(**{key: None})


@pytest.mark.parametrize("value", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_initialisations_that_leave_the_base_alone_are_fine(value: object) -> None:
    config(init_lora_weights=value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r is 0, not a positive whole number"),
        ({"r": True}, "r is True"),
        ({"r": "8"}, "r is '8'"),
        ({"lora_alpha": None}, "lora_alpha is None, not a number"),
        ({"rank_pattern": [1]}, "rank_pattern does not map"),
        ({"rank_pattern": {"q": 1.5}}, "rank_pattern does not map"),
        ({"alpha_pattern": {"q": "x"}}, "alpha_pattern does not map"),
        ({"rank_pattern": {"(": 1}}, r"rank_pattern holds '\(', which is not a regular expression"),
        ({"rank_pattern": {"x" * 200 + "(": 1}}, "rank_pattern holds 'x{100}…', which is not a regular expression"),
        ({"rank_pattern": {"(?i)q": 1}}, "which is not a regular expression: global flags"),
        ({"alpha_pattern": {"(?!k)._proj": 1}}, "cannot be matched in bounded time: error: look-around"),
        ({"alpha_pattern": {r"(q|k)_\1": 1}}, "cannot be matched in bounded time: error: backreferences"),
        ({"alpha_pattern": {"((a{1000}){1000}){1000}": 1}}, "in bounded time: .*exceeds size limit"),
        ({"alpha_pattern": {"(" * 9999 + ")" * 9999: 1}}, "alpha_pattern holds"),
        ({"alpha_pattern": {"[a-z--q]_proj": 1}}, "with operations on sets, possessive repeats"),
        ({"alpha_pattern": {".*+_proj": 1}}, "with operations on sets, possessive repeats"),
        ({"use_rslora": 1}, "use_rslora is 1, neither true nor false"),
        ({"modules_to_save": "head"}, "modules_to_save is not a list of names"),
    ],
)
def test_malformed_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        config(**settings)


def test_a_setting_nobody_knows_is_a_warning(folder: Folder) -> None:
    folder.config(use_tomorrow=True, nothing_new=None)
    folder.weights(A, B)
    assert folder.open().checkpoint.warnings == [
        "org/adapter: use_tomorrow in adapter_config.json is not known, and has no effect"
    ]


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (A, B),
        (A.removeprefix("base_model.model."), B.removeprefix("base_model.model.")),
        (A.replace("lora_A", "lora_A.default"), B.replace("lora_B", "lora_B.default")),
    ],
)
def test_spellings_of_factors(folder: Folder, a: str, b: str) -> None:
    folder.weights(a, b)
    adapter = folder.open()
    assert adapter.changes == {MODULE: Change(a=a, b=b)}
    assert adapter.replaced == {}
    assert adapter.spec(a) == TensorSpec(a, DType.F32, (2, 2))
    assert adapter.checkpoint.files.keys() == {"adapter_model.safetensors"}


def test_all_that_a_module_can_have(folder: Folder) -> None:
    at = "base_model.model.model.embed_tokens"
    names = [f"{at}.lora_embedding_A", f"{at}.lora_embedding_B.default", f"{at}.lora_magnitude_vector"]
    folder.weights(A, B, f"base_model.model.{MODULE}.lora_B.bias", *names, f"{at}.base_layer.weight")
    adapter = folder.open()
    assert adapter.changes[MODULE] == Change(a=A, b=B, bias=f"base_model.model.{MODULE}.lora_B.bias")
    assert adapter.changes["model.embed_tokens"] == Change(*names[:2], magnitude=names[2], is_embedding=True)
    assert adapter.replaced == {"model.embed_tokens.weight": f"{at}.base_layer.weight"}


@pytest.mark.parametrize(
    "spelling", ["lm_head.weight", "lm_head.modules_to_save.weight", "lm_head.modules_to_save.x.weight"]
)
def test_spellings_of_whole_tensors(folder: Folder, spelling: str) -> None:
    folder.weights(f"base_model.model.{spelling}", "base_model.model.lm_head.original_module.weight")
    assert folder.open().replaced == {"lm_head.weight": f"base_model.model.{spelling}"}


def test_of_a_module_stored_twice_the_tensor_that_peft_loads(folder: Folder) -> None:
    names = [f"base_model.model.lm_head{middle}.weight" for middle in (".modules_to_save", "", ".original_module")]
    folder.weights(*names)
    assert folder.open().replaced == {"lm_head.weight": names[1]}
    specs = [TensorSpec(name, DType.F32, (2, 2 + index)) for index, name in enumerate(names)]
    folder.store.put("adapter_model.safetensors", encode_header(specs) + bytes(sum(spec.num_bytes for spec in specs)))
    with pytest.raises(CheckpointError, match="the same tensor under two names"):
        folder.open()


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (
            ["x.modules_to_save.weight", "x.modules_to_save.one.weight"],
            CheckpointError,
            "the same tensor under two names",
        ),
        ([A, A.removeprefix("base_model.model.")], CheckpointError, "the same tensor under two names"),
        (["x.weight", "base_model.model.x.weight"], CheckpointError, "the same tensor under two names"),
        (
            [A.replace("lora_A", "lora_A.one"), B.replace("lora_B", "lora_B.two")],
            ModelError,
            "several adapters: one, two",
        ),
        (
            ["m.token_adapter.trainable_tokens_original"],
            ModelError,
            "'m.token_adapter.trainable_tokens_original' is of an unknown kind",
        ),
        (
            [f"m.token_adapter.trainable_tokens_delta{end}" for end in ("", ".default")],
            CheckpointError,
            "the same tensor under two names",
        ),
        (["m.lora_diagonal"], ModelError, "'m.lora_diagonal' is of an unknown kind"),
        (["m.lora_A.bias"], ModelError, "'m.lora_A.bias' does not belong to a LoRA"),
        (["m.lora_A.one.two"], ModelError, "'m.lora_A.one.two' does not belong to a LoRA"),
    ],
)
def test_names_that_make_no_sense(folder: Folder, names: list[str], error: type[Exception], message: str) -> None:
    folder.weights(*names)
    with pytest.raises(error, match=message):
        folder.open()


# -- files -------------------------------------------------------------------------------------------------------------


def test_several_files_with_an_index(folder: Folder) -> None:
    folder.weights(A, "left over", file="adapter_model-1.safetensors")
    folder.weights(B, file="adapter_model-2.safetensors")
    weight_map = {A: "adapter_model-1.safetensors", B: "adapter_model-2.safetensors"}
    folder.store.put("adapter_model.safetensors.index.json", json.dumps({"weight_map": weight_map}).encode())
    adapter = folder.open()
    assert {name: place.file for name, (_, place) in adapter.checkpoint.tensors.items()} == weight_map
    assert adapter.checkpoint.files.keys() == set(weight_map.values())
    folder.weights("other", file="adapter_model-2.safetensors")
    with pytest.raises(CheckpointError, match=r"lora_B\.weight is not in the file that the index names"):
        folder.open()
    folder.store.delete(["adapter_model-2.safetensors"])
    with pytest.raises(CheckpointError, match=r"1 weight file of 2 missing: adapter_model-2"):
        folder.open()


def test_what_is_no_adapter(folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there are no files"):
        open_adapter(LocalStore(tmp_path / "nothing"), "org/adapter")
    with pytest.raises(CheckpointError, match=r"there is no adapter_model\.safetensors"):
        folder.open()
    folder.store.put("adapter_model.bin", b"\x80")
    with pytest.raises(CheckpointError, match=r"adapter_model.bin: the file is in the format of torch before 1.6"):
        folder.open()
    folder.weights()
    with pytest.raises(CheckpointError, match="there are no tensors"):
        folder.open()
    folder.store.delete(["adapter_config.json"])
    with pytest.raises(ModelError, match=r"there is no adapter_config.json"):
        folder.open()
    folder.store.put("config.json", b"{}")
    with pytest.raises(ModelError, match="this is a model, not a LoRA adapter"):
        folder.open()


def test_an_adapted_checkpoint_is_the_base_with_the_adapter_beside_it(folder: Folder) -> None:
    folder.config(unheard_of=1)
    folder.weights(A, B)
    base, adapter = llama("/base"), folder.open()
    both = adapted(base, adapter)
    assert (both.tensors, both.config, both.reference) == (base.tensors, base.config, "/base")
    assert both.adapter is adapter
    assert both.warnings == [*base.warnings, *adapter.checkpoint.warnings]
