"""Models of different tokens: brought to common ones, or refused; what transformers makes of the result."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

import mergekit_ray
from mergekit_ray.core.errors import ConfigError, ModelError, PlanError
from mergekit_ray.operations.verify import verify
from mergekit_ray.storage.opening import open_source
from support.models import config_of, contents, load, logits, tensors_of
from support.tokenizers.models import BYTES, EMBEDDING, HEAD, byte_level, ids_of, rows_of, save_model

START, END, PAD = "<|im_start|>", "<|im_end|>", "<|pad|>"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Fine-tunes of a base that added tokens, and a model whose tokens stand in another order."""
    root = tmp_path_factory.mktemp("vocabularies")
    other = byte_level(["<|x|>"], [("l", "l"), ("h", "e"), ("w", "o")], list(reversed(BYTES)))
    tokenizers = {
        "base": byte_level(),
        "chat": byte_level([START, END]),
        "tools": byte_level([END, PAD]),
        "other": other,
    }
    made = {name: save_model(root / name, each, seed) for seed, (name, each) in enumerate(tokenizers.items())}
    made["padded"] = save_model(root / "padded", byte_level(), 9, padding=5)
    return made


def recipe(folders: dict[str, Path], *models: str, method: str = "linear", **rest: Any) -> dict[str, Any]:
    named = {key: str(folders[value]) if value in folders else value for key, value in rest.items() if value != ""}
    listed = [{"model": str(folders[name]), "parameters": {"weight": 1.0}} for name in models]
    return {"merge_method": method, "models": listed, "dtype": "float32", **named}


def expected(folders: dict[str, Path], models: tuple[str, ...], base: str | None, name: str) -> dict[str, torch.Tensor]:
    """The rows of a linear merge with equal weights: what stands in docs/tokenizers.md, said once more."""
    rows = {model: rows_of(folders[model], name) for model in models}
    found = {}
    for token in {token for of_model in rows.values() for token in of_model}:
        having = [model for model in models if token in rows[model]]
        sources = [base] if base in having else having
        filled = torch.stack([rows[model][token] for model in sources]).mean(0)
        found[token] = torch.stack([rows[model].get(token, filled) for model in models]).mean(0)
    return found


@pytest.mark.parametrize("base", ["base", None])
@pytest.mark.parametrize("models", [("base", "chat", "tools"), ("base", "chat", "other"), ("base", "padded", "chat")])
def test_union(folders: dict[str, Path], models: tuple[str, ...], base: str | None, tmp_path: Path) -> None:
    given = recipe(folders, *models, tokenizer_source="union", base_model=base or "")
    mergekit_ray.merge(given, tmp_path / "out")
    for name in (EMBEDDING, HEAD):
        ours, wanted = rows_of(tmp_path / "out", name), expected(folders, models, base, name)
        assert ours.keys() == wanted.keys()
        for token, row in wanted.items():
            torch.testing.assert_close(ours[token], row, rtol=0, atol=1e-7)
    ids = ids_of(tmp_path / "out")
    assert {token: ids[token] for token in ids_of(folders["base"])} == ids_of(folders["base"])
    assert sorted(ids.values()) == list(range(len(ids)))
    assert config_of(tmp_path / "out")["vocab_size"] == len(ids)
    assert torch.isfinite(logits(load(tmp_path / "out"))).all()
    assert verify(open_source(str(tmp_path / "out"))).problems == []


METHODS = ("ties", "task_arithmetic", "dare_ties", "slerp", "model_stock", "sce", "arcee_fusion")


@pytest.mark.parametrize("method", METHODS)
def test_every_kind_of_method_merges_the_rows_of_a_token(method: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """As it would merge models whose rows had been brought into that order before."""
    models = ("chat", "tools") if method not in ("slerp", "arcee_fusion") else ("base", "chat")
    own = {} if method in ("slerp", "arcee_fusion", "model_stock", "sce") else {"weight": 0.6}
    body: dict[str, Any] = {"merge_method": method, "base_model": str(folders["base"]), "dtype": "float32"}
    body |= {"parameters": {"t": 0.3}} if method == "slerp" else {}
    body |= {"parameters": {"density": 0.5}} if method in ("ties", "dare_ties") else {}

    def merged(listed: dict[str, Path], out: Path, **rest: Any) -> dict[str, torch.Tensor]:
        named = [{"model": str(listed[name]), "parameters": own} for name in models]
        mergekit_ray.merge({**body, "base_model": str(listed["base"]), "models": named, **rest}, out)
        return tensors_of(out)

    ours = merged(folders, tmp_path / "out", tokenizer_source="union")
    ids = ids_of(tmp_path / "out")
    brought = {name: tmp_path / "brought" / name for name in ("base", *models)}
    participants = tuple(dict.fromkeys(("base", *models)))
    for name, folder in brought.items():
        model = load(folders[name])
        model.resize_token_embeddings(len(ids), mean_resizing=False)
        for tensor, parameter in ((EMBEDDING, model.model.embed_tokens), (HEAD, model.lm_head)):
            rows = {each: rows_of(folders[each], tensor) for each in participants}
            for token, number in ids.items():
                having = [of_model[token] for of_model in rows.values() if token in of_model]
                filled = rows["base"].get(token, torch.stack(having).mean(0))
                parameter.weight.data[number] = rows[name].get(token, filled)
        model.save_pretrained(folder)
    theirs = merged(brought, tmp_path / "theirs")
    for tensor in (EMBEDDING, HEAD):
        if method == "dare_ties":  # whose random numbers depend on the models' paths
            assert ours[tensor].shape == theirs[tensor].shape
        else:
            torch.testing.assert_close(ours[tensor], theirs[tensor], rtol=0, atol=1e-6)


def test_base_and_a_models_tokenizer(folders: dict[str, Path], tmp_path: Path) -> None:
    models = ("base", "tools", "other")
    mergekit_ray.merge(recipe(folders, *models, tokenizer_source="base", base_model="base"), tmp_path / "base")
    assert ids_of(tmp_path / "base") == ids_of(folders["base"])
    assert contents(tmp_path / "base")["tokenizer.json"] == contents(folders["base"])["tokenizer.json"]
    mergekit_ray.merge(recipe(folders, *models, tokenizer_source="chat", base_model="base"), tmp_path / "chat")
    assert ids_of(tmp_path / "chat") == ids_of(folders["chat"])
    wanted = expected(folders, models, "base", EMBEDDING)
    ours = rows_of(tmp_path / "chat")
    for token in ids_of(folders["chat"]):
        row = rows_of(folders["chat"])[token] if token == START else wanted[token]  # no merged model has that token
        torch.testing.assert_close(ours[token], row, rtol=0, atol=1e-7)


def test_nothing_is_rebuilt_that_is_there(folders: dict[str, Path], tmp_path: Path) -> None:
    given = recipe(folders, "base", "base")
    plans = [mergekit_ray.plan(each) for each in (given, {**given, "tokenizer_source": "union"})]
    assert plans[0].shards == plans[1].shards
    assert plans[0].side_files == plans[1].side_files
    assert plans[1].generated_files == {}


def test_single_tokens_and_padding(folders: dict[str, Path], tmp_path: Path) -> None:
    entries = {
        END: {"source": str(folders["tools"]), "force": True},
        "<|new|>": {"source": {"kind": "model_token", "model": str(folders["chat"]), "token": "he"}},
        "<|also|>": {"source": {"kind": "model_token", "model": str(folders["other"]), "token_id": 3}},
        PAD: {"source": {"kind": "zero"}},
    }
    tokenizer = {"source": "union", "tokens": entries, "pad_to_multiple_of": 16}
    given = recipe(folders, "base", "chat", "tools", base_model="base") | {"tokenizer": tokenizer}
    mergekit_ray.merge(given, tmp_path / "out")
    for name in (EMBEDDING, HEAD):
        ours = rows_of(tmp_path / "out", name)
        chat, tools, other = (rows_of(folders[each], name) for each in ("chat", "tools", "other"))
        for token, row in {
            END: tools[END],
            "<|new|>": chat["he"],
            "<|also|>": other[{v: k for k, v in ids_of(folders["other"]).items()}[3]],
            PAD: tools[PAD] / 3,  # two models lack it
        }.items():
            torch.testing.assert_close(ours[token], row, rtol=0, atol=1e-7)
        assert tensors_of(tmp_path / "out")[name].shape[0] == 272
        assert not tensors_of(tmp_path / "out")[name][266:].any()


@pytest.mark.parametrize(
    ("tokenizer", "error", "told"),
    [
        ({"tokens": {"<|nope|>": {"source": "chat"}}}, PlanError, "'<|nope|>' is no token of the tokenizer"),
        (
            {"tokens": {"<|n|>": {"source": {"kind": "model_token", "model": "chat", "token_id": 999}}}},
            PlanError,
            "token_id 999 is beyond the 263 rows of",
        ),
        (
            {"tokens": {"he": {"source": {"kind": "model_token", "model": "chat", "token": "eh"}}}},
            PlanError,
            "has no token 'eh'",
        ),
    ],
)
def test_a_token_that_is_not_there(
    tokenizer: dict[str, Any], error: type[Exception], told: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    text = json.dumps(tokenizer).replace('"chat"', json.dumps(str(folders["chat"])))
    given = recipe(folders, "base", "chat") | {"tokenizer": json.loads(text)}
    with pytest.raises(error, match=r".*") as caught:
        mergekit_ray.merge(given, tmp_path / "out")
    assert told in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_tokens_without_a_row_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    wide = save_model(tmp_path / "wide", byte_level([START]), 5, hidden_size=16)
    given = recipe(folders, "base", "padded") | {"tokenizer_source": str(wide)}
    with pytest.raises(PlanError, match="no model has a row for 1 token of the tokenizer of"):
        mergekit_ray.merge(given, tmp_path / "out")


def test_a_model_without_a_tokenizer(folders: dict[str, Path], tmp_path: Path) -> None:
    bare = save_model(tmp_path / "bare", byte_level(), 5)
    for file in [*bare.glob("tokenizer*"), *bare.glob("special*")]:
        file.unlink()
    given = recipe(folders, "base", tokenizer_source="union")
    given["models"].append({"model": str(bare), "parameters": {"weight": 1.0}})
    with pytest.raises(ModelError, match="there is no tokenizer beside the model"):
        mergekit_ray.merge(given, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "rows", "told"),
    [
        ("model.embed_tokens_per_layer.weight", 200, "model.embed_tokens_per_layer.weight has a row for each token"),
        (HEAD, 260, "embedding and head have 261 and 260 rows"),
    ],
)
def test_tables_with_other_rows_than_the_embedding_are_refused(
    name: str, rows: int, told: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    odd = shutil.copytree(folders["base"], tmp_path / "odd")
    save_file({**tensors_of(odd), name: torch.ones(rows, 8)}, odd / "model.safetensors")
    with pytest.raises(ModelError) as caught:
        mergekit_ray.plan(recipe({**folders, "odd": odd}, "odd", "chat", tokenizer_source="union"))
    assert told in str(caught.value)


class TestWithoutAKey:
    """Rows of different tokens are not merged in silence."""

    def test_other_tokens_are_refused(self, folders: dict[str, Path], tmp_path: Path) -> None:
        other = save_model(tmp_path / "other", byte_level(["<|x|>"]), 7)
        clash = save_model(tmp_path / "clash", byte_level(["<|y|>"]), 8)
        given = {
            "merge_method": "linear",
            "models": [{"model": str(each), "parameters": {"weight": 1.0}} for each in (other, clash)],
        }
        with pytest.raises(PlanError) as caught:
            mergekit_ray.merge(given, tmp_path / "out")
        assert f"1 id means another token than in {other}: 261 is '<|x|>' and '<|y|>'" in str(caught.value)
        assert "tokenizer: {source: union}" in str(caught.value)
        assert "`options=MergeOptions(unsafe_ignore_tokenizers=True)`" in str(caught.value)
        plan = mergekit_ray.plan(given, options=mergekit_ray.MergeOptions(unsafe_ignore_tokenizers=True))
        assert any("1 id means another token" in warning for warning in plan.warnings)

    def test_models_are_compared_with_each_other_too(self, folders: dict[str, Path]) -> None:
        """The base only lends its tokenizer, which has neither of the two tokens."""
        given = recipe(folders, "chat", "tools", base_model="base")
        with pytest.raises(
            PlanError, match=rf"2 ids mean other tokens than in {folders['chat']}: 261 is '<\|im_start\|>'"
        ):
            mergekit_ray.plan(given)
        own = {**given, "merge_method": "task_arithmetic"}
        assert mergekit_ray.plan(own).config["vocab_size"] == 261  # their rows are cut

    def test_tokens_in_the_padding_of_another_are_told(self, folders: dict[str, Path]) -> None:
        [warning] = mergekit_ray.plan(recipe(folders, "padded", "chat")).warnings[:1]
        assert f"{folders['chat']} has 2 tokens, the first '{START}', where {folders['padded']} has padding" in warning

    def test_a_damaged_tokenizer_is_told(self, folders: dict[str, Path], tmp_path: Path) -> None:
        odd = shutil.copytree(folders["base"], tmp_path / "odd")
        (odd / "tokenizer.json").write_text("{}")
        warnings = mergekit_ray.plan(recipe({**folders, "odd": odd}, "base", "odd", "base")).warnings
        assert len([w for w in warnings if f"the tokenizer of {odd} cannot be compared with others" in w]) == 1

    def test_nothing_is_converted_to_compare_it(self, folders: dict[str, Path], tmp_path: Path) -> None:
        """transformers takes longer to import than a small merge."""
        odd = shutil.copytree(folders["chat"], tmp_path / "odd")
        data = json.loads((odd / "tokenizer.json").read_text())
        (odd / "tokenizer.json").unlink()
        (odd / "vocab.json").write_text(json.dumps(data["model"]["vocab"]))
        (odd / "merges.txt").write_text("\n".join(" ".join(merge) for merge in data["model"]["merges"]))
        [warning] = [
            each
            for each in mergekit_ray.plan(recipe({**folders, "odd": odd}, "base", "odd")).warnings
            if "compared" in each
        ]
        assert warning.endswith("it has no tokenizer.json")

    def test_tokens_at_the_end_are_cut_or_kept_as_before(self, folders: dict[str, Path]) -> None:
        assert mergekit_ray.plan(recipe(folders, "base", "chat")).config["vocab_size"] == 261

    def test_only_models_whose_rows_are_used_count(self, folders: dict[str, Path]) -> None:
        slices = [
            {"sources": [{"model": str(folders[name]), "layer_range": [0, 1]}]} for name in ("base", "other", "base")
        ]
        mergekit_ray.plan({"merge_method": "passthrough", "slices": slices})
        slices.append({"sources": [{"model": str(folders["other"]), "layer_range": [0, 1]}]})
        with pytest.raises(PlanError, match=r"ids? means? (an)?other tokens?"):
            mergekit_ray.plan({"merge_method": "passthrough", "slices": slices})

    def test_experts_count_as_well(self, folders: dict[str, Path]) -> None:
        experts = [{"source_model": str(folders[name])} for name in ("base", "other")]
        given = {"base_model": str(folders["base"]), "gate_mode": "random", "experts": experts}
        with pytest.raises(PlanError, match=r"ids? means? (an)?other tokens?"):
            mergekit_ray.plan(given)


@pytest.mark.parametrize("tied", [True, False])
def test_slices_get_head_and_embedding_of_their_models(tied: bool, tmp_path: Path) -> None:
    first = save_model(tmp_path / "first", byte_level([START]), 1, tie_word_embeddings=tied)
    last = save_model(tmp_path / "last", byte_level([END]), 2, tie_word_embeddings=tied)
    slices = [{"sources": [{"model": str(each), "layer_range": [0, 1]}]} for each in (first, last)]
    mergekit_ray.merge({"merge_method": "passthrough", "slices": slices, "tokenizer_source": "union"}, tmp_path / "out")
    embedding, head = (rows_of(tmp_path / "out", name) for name in (EMBEDDING, HEAD))
    of_first, of_last = rows_of(first), rows_of(last, EMBEDDING if tied else HEAD)
    assert torch.equal(embedding["he"], of_first["he"])
    assert torch.equal(head["he"], of_last["he"])
    assert torch.equal(embedding[END], rows_of(last)[END])
    assert torch.equal(head[START], rows_of(first, EMBEDDING if tied else HEAD)[START])


def test_a_tied_model_with_an_untied_one(tmp_path: Path) -> None:
    tied = save_model(tmp_path / "tied", byte_level([START]), 1, tie_word_embeddings=True)
    untied = save_model(tmp_path / "untied", byte_level([END]), 2)
    listed = [{"model": str(each), "parameters": {"weight": 1.0}} for each in (tied, untied)]
    mergekit_ray.merge({"merge_method": "linear", "models": listed, "tokenizer_source": "union"}, tmp_path / "out")
    head = rows_of(tmp_path / "out", HEAD)
    assert torch.equal(head[END], rows_of(untied, HEAD)[END])
    assert torch.equal(head[START], rows_of(tied)[START])
    torch.testing.assert_close(head["he"], (rows_of(tied)["he"] + rows_of(untied, HEAD)["he"]) / 2)


def test_a_backbone_gets_common_tokens(folders: dict[str, Path], tmp_path: Path) -> None:
    backbone = recipe(folders, "base", "chat", tokenizer_source="union")
    experts = [{"source_model": str(folders[name])} for name in ("base", "chat")]
    given = {"base_model": str(folders["base"]), "gate_mode": "random", "experts": experts, "backbone": backbone}
    mergekit_ray.merge(given, tmp_path / "out")
    assert config_of(tmp_path / "out")["vocab_size"] == 263
    torch.testing.assert_close(rows_of(tmp_path / "out")[START], rows_of(folders["chat"])[START])
    assert torch.isfinite(logits(load(tmp_path / "out"))).all()


def test_a_mixture_gets_the_experts_tokens(folders: dict[str, Path], tmp_path: Path) -> None:
    experts = [{"source_model": str(folders[name])} for name in ("chat", "tools")]
    given = {"base_model": str(folders["base"]), "gate_mode": "random", "experts": experts, "tokenizer_source": "union"}
    mergekit_ray.merge(given, tmp_path / "out")
    for name in (EMBEDDING, HEAD):
        rows, own = rows_of(tmp_path / "out", name), rows_of(folders["base"], name)
        chat, tools = (rows_of(folders[each], name) for each in ("chat", "tools"))
        assert torch.equal(rows["he"], own["he"])
        assert torch.equal(rows[PAD], tools[PAD])
        torch.testing.assert_close(rows[END], (chat[END] + tools[END]) / 2)
    assert torch.isfinite(logits(load(tmp_path / "out"))).all()
    with pytest.raises(ConfigError, match="`tokenizer_source` here and in the backbone"):
        mergekit_ray.plan({**given, "backbone": recipe(folders, "base", "chat", tokenizer_source="union")})


def test_ids_follow_their_tokens(folders: dict[str, Path], tmp_path: Path) -> None:
    mergekit_ray.merge(recipe(folders, "base", "other", tokenizer_source="other"), tmp_path / "out")
    ids = ids_of(folders["other"])
    for file in ("config.json", "generation_config.json"):
        config = json.loads((tmp_path / "out" / file).read_text())
        assert (config["bos_token_id"], config["eos_token_id"]) == (ids["<s>"], ids["</s>"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer("hello world")["input_ids"]) == "hello world"


@pytest.mark.parametrize("approximate", [False, True])
def test_files_beside_the_weights_are_the_bases(approximate: bool, folders: dict[str, Path], tmp_path: Path) -> None:
    """Also of a kind that other models whose rows are read have."""
    places = {name: shutil.copytree(folders[name], tmp_path / name) for name in ("base", "chat")}
    for name, place in places.items():
        (place / "LICENSE").write_text(name)
    (places["chat"] / "modeling_chat.py").write_text("raise SystemExit")
    tokenizer = {"source": str(places["chat"]), "approximate": "mean"} if approximate else {"source": "union"}
    mergekit_ray.merge({**recipe(places, "base", "chat"), "tokenizer": tokenizer}, tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE").read_text() == "base"
    assert not (tmp_path / "out" / "modeling_chat.py").exists()


def test_a_text_ends_where_the_tokenizers_own_model_says(folders: dict[str, Path], tmp_path: Path) -> None:
    """In its configs, which may name several tokens, as its tokenizer cannot."""
    base, chat = (shutil.copytree(folders[name], tmp_path / name) for name in ("base", "chat"))
    ids = ids_of(chat)
    ends = [ids["</s>"], ids[END]]
    for place, numbers in ((base, 1), (chat, ends)):
        (place / "generation_config.json").write_text(
            json.dumps({"eos_token_id": numbers, "suppress_tokens": [ids_of(place)["hell"]]})
        )
    mergekit_ray.merge(recipe({"base": base, "chat": chat}, "base", "chat", tokenizer_source="chat"), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written["eos_token_id"] == ends
    assert written["suppress_tokens"] == [ids_of(tmp_path / "out")["hell"]]
    assert config_of(tmp_path / "out")["eos_token_id"] == ids["</s>"]
