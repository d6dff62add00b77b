"""A model gets another one's tokenizer: files and rows of what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import mergekit_ray
from mergekit_ray import MergeOptions, TransplantOptions
from mergekit_ray.core.errors import ConfigError, ModelError, PlanError
from support.models import tensors_of
from support.references.approximations import approximate, pursuit
from support.tokenizers.models import BYTES, EMBEDDING, HEAD, byte_level, ids_of, save_model, unigram

OURS = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "t")]
THEIRS = [("h", "e"), ("Ġ", "t"), ("Ġt", "he"), ("o", "n"), ("l", "l"), ("ll", "o")]
NEW = ["Ġthe", "on", "llo", "<|im_start|>"]
LOCAL = MergeOptions(executor="local", device="cpu")


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """A model and a donor that is wider, and has its tokens in another order."""
    model = save_model(tmp_path / "model", byte_level(["<|a|>"], OURS), 1)
    donor = save_model(
        tmp_path / "donor",
        byte_level(["<|im_start|>"], THEIRS, BYTES[::-1]),
        2,
        hidden_size=12,
        num_attention_heads=3,
    )
    return model, donor


def transplanted(models: tuple[Path, Path], **wanted: Any) -> Path:
    out = models[0].parent / f"out{len(list(models[0].parent.iterdir()))}"
    mergekit_ray.transplant(*models, out, TransplantOptions(**wanted), LOCAL, progress=False)
    return out


def rows_of(folder: Path, tokens: list[str], name: str = EMBEDDING) -> torch.Tensor:
    ids = ids_of(folder)
    return tensors_of(folder)[name][[ids[token] for token in tokens]]


def shared_of(models: tuple[Path, Path]) -> list[str]:
    """Tokens that both have, in the order of the model's ids, as they are handed to methods."""
    ours, theirs = map(ids_of, models)
    return sorted(ours.keys() & theirs.keys(), key=ours.__getitem__)


def test_shared_rows_are_carried_over_and_the_rest_is_copied(models: tuple[Path, Path]) -> None:
    out, shared = transplanted(models), shared_of(models)
    assert ids_of(out) == ids_of(models[1])
    found, own = tensors_of(out), tensors_of(models[0])
    for name in (EMBEDDING, HEAD):
        assert found[name].shape == (len(ids_of(models[1])), 8)
        assert torch.equal(rows_of(out, shared, name), rows_of(models[0], shared, name))
    assert all(torch.equal(found[name], own[name]) for name in own if name not in (EMBEDDING, HEAD))


@pytest.mark.parametrize("name", [EMBEDDING, HEAD])
def test_missing_rows_are_pursued_in_the_donors_own_matrix(models: tuple[Path, Path], name: str) -> None:
    out, shared = transplanted(models, k=5), shared_of(models)
    atoms = rows_of(models[1], shared, name).double().numpy()
    for token in NEW:
        chosen, coefficients = pursuit(rows_of(models[1], [token], name)[0].double().numpy(), atoms, 5)
        expected = coefficients @ rows_of(models[0], shared, name).double().numpy()[chosen]
        np.testing.assert_allclose(rows_of(out, [token], name)[0], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("common_interpolation", {"k": 3, "metric": "cosine", "weights": "barycentric"}),
        ("landmark_pca", {}),
        ("mean", {}),
        ("zero", {}),
    ],
)
def test_other_methods(models: tuple[Path, Path], method: str, parameters: dict[str, Any]) -> None:
    out, shared = transplanted(models, method=method, **parameters), shared_of(models)
    if method in ("mean", "zero"):
        expected = approximate(method, tensors_of(models[0])[EMBEDDING], rows=len(NEW))
    else:
        ours, theirs, missing = (
            rows_of(f, t) for f, t in zip((*models, models[1]), (shared, shared, NEW), strict=True)
        )
        expected = approximate(method, ours, theirs, missing, **parameters)
    torch.testing.assert_close(rows_of(out, NEW), expected, rtol=0, atol=1e-6)


def test_random_rows_are_the_seeds(models: tuple[Path, Path]) -> None:
    for method in ("randn", "john_hewitt"):
        one, again, other = (transplanted(models, method=method, seed=seed) for seed in (3, 3, 4))
        assert torch.equal(rows_of(one, NEW), rows_of(again, NEW))
        assert not torch.equal(rows_of(one, NEW), rows_of(other, NEW))
        assert not torch.equal(rows_of(one, NEW), rows_of(one, NEW, HEAD))


@pytest.mark.parametrize(
    ("scheme", "embedding", "head"),
    [
        ("mean", [0.5, 0.5], [0.5, 0.5]),
        ("sum", [1.0, 1.0], [1.0, 1.0]),
        ("weighted_mean", [2 / 3, 1 / 3], [1 / 3, 2 / 3]),
        ("first_last", [0.0, 1.0], [1.0, 0.0]),
    ],
)
def test_pieces(models: tuple[Path, Path], scheme: str, embedding: list[float], head: list[float]) -> None:
    """`` the`` is `` t`` and ``he`` in the model, ``llo`` is ``ll`` and ``o``."""
    out = transplanted(models, method="subword", subword=scheme)
    for name, weights in ((EMBEDDING, embedding), (HEAD, head)):
        for token, pieces in (("Ġthe", ["Ġt", "he"]), ("llo", ["ll", "o"])):
            expected = (torch.tensor(weights)[:, None] * rows_of(models[0], pieces, name)).sum(dim=0)
            torch.testing.assert_close(rows_of(out, [token], name)[0], expected)


def test_scale_and_noise_are_of_new_rows_only(models: tuple[Path, Path]) -> None:
    plain, shared = transplanted(models, k=4), shared_of(models)
    scaled, noisy = transplanted(models, k=4, scale=0.5), transplanted(models, k=4, noise=0.1)
    torch.testing.assert_close(rows_of(scaled, NEW), 0.5 * rows_of(plain, NEW))
    change = rows_of(noisy, NEW) - rows_of(plain, NEW)
    assert 0.04 < float(change.std()) < 0.2
    for out in (scaled, noisy):
        assert torch.equal(rows_of(out, shared), rows_of(models[0], shared))


def test_prefixes_for_one_tensor(models: tuple[Path, Path]) -> None:
    out = transplanted(models, method="zero", prefix_match="embed")
    assert torch.equal(rows_of(out, ["Ġthe", "llo", "on"]), rows_of(models[0], ["Ġt", "ll", "o"]))
    assert (rows_of(out, ["<|im_start|>"]) == 0).all()
    assert (rows_of(out, NEW, HEAD) == 0).all()


def test_a_tied_model_stays_tied_and_a_tied_donor_has_one_matrix(tmp_path: Path, models: tuple[Path, Path]) -> None:
    tied = save_model(tmp_path / "tied", byte_level([], OURS), 5, tie_word_embeddings=True)
    out = transplanted((tied, models[1]), k=3)
    assert HEAD not in tensors_of(out)
    assert transformers.AutoModelForCausalLM.from_pretrained(out).config.tie_word_embeddings
    giver = save_model(tmp_path / "giver", byte_level([], THEIRS), 6, tie_word_embeddings=True)
    both = transplanted((models[0], giver), k=3)
    shared = shared_of((models[0], giver))
    chosen, coefficients = pursuit(
        rows_of(giver, ["on"])[0].double().numpy(), rows_of(giver, shared).double().numpy(), 3
    )
    expected = coefficients @ rows_of(models[0], shared, HEAD).double().numpy()[chosen]
    np.testing.assert_allclose(rows_of(both, ["on"], HEAD)[0], expected, atol=1e-5)


def test_padding_of_the_donor_is_kept(tmp_path: Path, models: tuple[Path, Path]) -> None:
    padded = save_model(
        tmp_path / "padded", byte_level([], THEIRS), 7, padding=6, hidden_size=12, num_attention_heads=3
    )
    out = transplanted((models[0], padded), k=2)
    assert tensors_of(out)[EMBEDDING].shape[0] == len(ids_of(padded)) + 6
    assert json.loads((out / "config.json").read_text())["vocab_size"] == len(ids_of(padded)) + 6


def test_files_and_ids_are_the_donors(models: tuple[Path, Path]) -> None:
    (models[0] / "LICENSE").write_text("ours")
    (models[1] / "LICENSE").write_text("theirs")
    (models[1] / "chat_template.jinja").write_text("{{ messages }}")
    (models[0] / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 999], "top_p": 0.5}))
    out = transplanted(models)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (models[1] / name).read_bytes()
    assert (out / "LICENSE").read_text() == "ours"
    config, theirs = (json.loads((folder / "config.json").read_text()) for folder in (out, models[1]))
    assert config["hidden_size"] == 8
    assert all(config[key] == theirs[key] for key in ("vocab_size", "bos_token_id", "eos_token_id"))
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["top_p"] == 0.5
    assert generation["eos_token_id"] == theirs["eos_token_id"]


def test_it_loads_and_answers_in_the_donors_tokens(models: tuple[Path, Path]) -> None:
    out = transplanted(models)
    tokenizer, theirs = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (out, models[1]))
    text = "hello on the <|im_start|>"
    assert tokenizer(text).input_ids == theirs(text).input_ids
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        logits = model(**tokenizer(text, return_tensors="pt")).logits
    assert logits.shape[-1] == len(tokenizer)
    assert torch.isfinite(logits).all()


def test_a_text_of_shared_tokens_means_the_same(models: tuple[Path, Path]) -> None:
    """Every logit of a token that both have is the one that it was."""
    out, shared = transplanted(models), shared_of(models)
    text = "he tt ll"
    logits = []
    for folder in (models[0], out):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            last = model(**tokenizer(text, return_tensors="pt")).logits[0, -1]
        logits.append(last[[ids_of(folder)[token] for token in shared]])
    torch.testing.assert_close(*logits)


def test_another_kind_of_tokenizer(tmp_path: Path, models: tuple[Path, Path]) -> None:
    donor = save_model(tmp_path / "pieces", unigram({"▁t": -1.0, "hell": -2.0, "o": -3.0, "▁hello": -3.0}), 8)
    out = transplanted((models[0], donor), method="zero")
    assert torch.equal(rows_of(out, ["▁t", "hell", "o"]), rows_of(models[0], ["Ġt", "hell", "o"]))
    assert (rows_of(out, ["▁hello", "<unk>"]) == 0).all()


def test_hardly_trained_tokens_are_not_shared(models: tuple[Path, Path]) -> None:
    """Of 2 % of the tokens, those next to what bytes have that are in no text."""
    path = models[0] / "model.safetensors"
    tensors, ids = tensors_of(models[0]), ids_of(models[0])
    unused = tensors[EMBEDDING][ids["À"]].clone()  # the byte C0 by its name
    for character in "ÀÁõö÷øùúûüýþÿ":
        tensors[EMBEDDING][ids[character]] = unused
    tensors[EMBEDDING][ids["x"]] = unused + 1e-4
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"})
    out = transplanted(models, method="zero", magikarp=True)
    assert (rows_of(out, ["x", "À", "ÿ"]) == 0).all()
    shared = shared_of(models)
    is_kept = (rows_of(out, shared) != 0).any(dim=1)
    assert int((~is_kept).sum()) <= 13 + 2 * 5, "those bytes, and 2 % of each model"
    assert torch.equal(rows_of(out, shared)[is_kept], rows_of(models[0], shared)[is_kept])


def test_again_nothing_is_done_and_reproduce_repeats_it(models: tuple[Path, Path], tmp_path: Path) -> None:
    wanted = TransplantOptions(method="john_hewitt", noise=0.1, seed=9, prefix_match="embed")
    out = tmp_path / "out"
    mergekit_ray.transplant(*models, out, wanted, LOCAL, progress=False)
    assert mergekit_ray.transplant(*models, out, wanted, LOCAL, progress=False).was_there
    again = mergekit_ray.reproduce(out, tmp_path / "again", LOCAL, progress=False)
    assert again.ok, again.problems
    assert "by `transplant` from" in (out / "README.md").read_text()
    with pytest.raises(PlanError, match="a transplant"):
        mergekit_ray.transplant(*models, out, TransplantOptions(method="mean"), LOCAL, progress=False)


def test_shards_and_threads_change_no_byte(models: tuple[Path, Path]) -> None:
    whole, cut = transplanted(models), transplanted(models, max_shard_size=1000)
    assert len(list(cut.glob("*.safetensors"))) > 3
    assert all(torch.equal(x, tensors_of(cut)[name]) for name, x in tensors_of(whole).items())


def test_refused_unless_the_method_needs_no_common_tokens(tmp_path: Path, models: tuple[Path, Path]) -> None:
    model, donor = models
    with pytest.raises(ModelError, match="the same"):
        mergekit_ray.transplant(model, model, tmp_path / "out", progress=False)
    with pytest.raises(ConfigError, match="name each model"):
        mergekit_ray.transplant("", donor, tmp_path / "out", progress=False)
    few = save_model(tmp_path / "few", unigram({"▁漢": -1.0}), 3)
    tokenizer = json.loads((few / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = []
    tokenizer["model"]["vocab"] = [[f"{piece}字", score] for piece, score in tokenizer["model"]["vocab"]]
    (few / "tokenizer.json").write_text(json.dumps(tokenizer))
    (few / "tokenizer_config.json").unlink()
    with pytest.raises(PlanError, match="no token in common"):
        mergekit_ray.transplant(model, few, tmp_path / "out", progress=False)
    for method in ("zero", "mean", "randn"):
        mergekit_ray.transplant(model, few, tmp_path / method, TransplantOptions(method=method), progress=False)
        assert len(tensors_of(tmp_path / method)[EMBEDDING]) == len(tensors_of(few)[EMBEDDING])
    longer = byte_level([f"<|{i}|>" for i in range(5)], THEIRS)
    transformers.PreTrainedTokenizerFast(tokenizer_object=longer).save_pretrained(donor)
    with pytest.raises(PlanError, match=r"no row for 4 tokens of its own that the model lacks: '<\|1\|>'"):
        mergekit_ray.transplant(model, donor, tmp_path / "out", progress=False)
    (donor / "tokenizer.json").unlink()
    (donor / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError, match="no tokenizer beside the model"):
        mergekit_ray.transplant(model, donor, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
