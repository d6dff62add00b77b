"""A model with another one's tokens, made by both programs: each token has the same row.

What differs is in TOLERANCES.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import mergekit_ray
from mergekit_ray import MergeOptions, TransplantOptions
from parity.conftest import Program
from support.models import tensors_of
from support.tokenizers.models import BYTES, EMBEDDING, HEAD, byte_level, rows_of, save_model

pytestmark = pytest.mark.parity

OURS = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "t"), ("i", "n")]
THEIRS = [("h", "e"), ("Ġ", "t"), ("Ġt", "he"), ("o", "n"), ("l", "l"), ("ll", "o"), ("i", "n"), ("in", "g")]
SIZES: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2}
MOST = 1e-5
"""Elements are about 0.02; float32 and float64 solve the same small systems."""

ADDED = "<|im_start|>"


@pytest.fixture(scope="session")
def vocabularies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("transplants")
    donor = byte_level([ADDED], THEIRS, BYTES[::-1])
    wide: dict[str, Any] = {"hidden_size": 24, "num_attention_heads": 2}
    return {
        "model": save_model(root / "model", byte_level(["<|a|>"], OURS), 1, **SIZES),
        "tied": save_model(root / "tied", byte_level([], OURS), 2, tie_word_embeddings=True, **SIZES),
        "padded": save_model(root / "padded", byte_level([], OURS), 3, padding=5, **SIZES),
        "donor": save_model(root / "donor", donor, 4, **wide),
        "donor_tied": save_model(root / "donor_tied", donor, 5, tie_word_embeddings=True, **wide),
        "donor_padded": save_model(root / "donor_padded", donor, 6, padding=3, **wide),
    }


INTERPOLATION = "common_interpolation"
# mergekit 0.1.5 takes `-pm embed` for the head, and `-pm lm_head` for the embedding.
CASES: dict[str, tuple[str, str, dict[str, Any], list[str]]] = {
    "omp": ("model", "donor", {"k": 4}, ["--k", "4"]),
    "omp, one token": ("model", "donor", {"k": 1}, ["--k", "1"]),
    "omp, tied model": ("tied", "donor", {"k": 4}, ["--k", "4"]),
    "omp, tied donor": ("model", "donor_tied", {"k": 4}, ["--k", "4"]),
    "omp, padded model": ("padded", "donor", {"k": 4}, ["--k", "4"]),
    "omp, padded donor": ("model", "donor_padded", {"k": 4}, ["--k", "4"]),
    "scaled": ("model", "donor", {"k": 4, "scale": 0.5}, ["--k", "4", "-nvs", "0.5"]),
    "mean": ("model", "donor", {"method": "mean"}, ["-a", "mean"]),
    "zero": ("model", "donor", {"method": "zero"}, ["-a", "zero"]),
    "prefixes": ("model", "donor", {"method": "zero", "prefix_match": "yes"}, ["-a", "zero", "-pm", "yes"]),
    "prefixes in the head": (
        "model",
        "donor",
        {"method": "zero", "prefix_match": "lm_head"},
        ["-a", "zero", "-pm", "embed"],
    ),
    **{
        f"interpolation, {metric}, {scheme}": (
            "model",
            "donor",
            {"method": INTERPOLATION, "k": 5, "metric": metric, "weights": scheme},
            ["-a", INTERPOLATION, "--k", "5", "-w", scheme, *(["-c"] if metric == "cosine" else [])],
        )
        for metric in ("euclidean", "cosine")
        for scheme in ("distance_proportional", "barycentric", "least_squares")
    },
    **{
        f"subword, {scheme}": (
            "model",
            "donor",
            {"method": "subword", "subword": scheme},
            ["-a", "subword", "-s", scheme],
        )
        for scheme in ("mean", "sum", "weighted_mean", "first_last")
    },
}


@pytest.mark.parametrize("case", CASES)
def test_rows_are_the_same(case: str, vocabularies: dict[str, Path], tokensurgeon: Program, tmp_path: Path) -> None:
    model, donor, wanted, arguments = CASES[case]
    places = vocabularies[model], vocabularies[donor]
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    tokensurgeon.run(*places, theirs, *arguments, log=tmp_path / "theirs.log")
    options = MergeOptions(executor="local", device="cpu")
    mergekit_ray.transplant(*places, ours, TransplantOptions(**wanted), options, progress=False)
    others = tensors_of(theirs)
    for name in (EMBEDDING, HEAD):
        if name not in others:
            assert name not in tensors_of(ours)
            continue
        found, expected = rows_of(ours, name), rows_of(theirs, name)
        assert found.keys() == expected.keys()
        for token, row in expected.items():
            if token == ADDED and case.startswith("prefixes"):
                continue  # mergekit gives it the row of "<"
            torch.testing.assert_close(found[token], row, rtol=0, atol=MOST, msg=lambda text, t=token: f"{t}: {text}")
    for name, tensor in tensors_of(ours).items():
        assert name in (EMBEDDING, HEAD) or torch.equal(tensor, others[name])
