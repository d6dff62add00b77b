"""A dense model upcycled into a Mixture of Experts: it starts as the dense model, and it trains."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import mergekit_ray
from support.custom_moe import code_kept_in, load_custom
from support.models import ModelLibrary, load, logits, tensors_of

NUM_EXPERTS = 4


@pytest.fixture(scope="module", autouse=True)
def code_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with code_kept_in(tmp_path_factory.mktemp("code")):
        yield


def upcycled(source: Path, out: Path, noise: float) -> Any:
    recipe = {
        "base_model": str(source),
        "gate_mode": "uniform_random",
        "seed": 1,
        "experts": [{"source_model": str(source), "noise_scale": noise}] * NUM_EXPERTS,
    }
    mergekit_ray.merge(recipe, out)
    return load_custom(out)


@pytest.mark.parametrize("family", ["llama", "phi"])
class TestUpcycling:
    def test_starts_as_the_dense_model_but_for_the_noise(
        self, family: str, models: ModelLibrary, tmp_path: Path
    ) -> None:
        source = models.get(family, num_layers=2)
        dense = logits(load(source))
        off = [float((logits(upcycled(source, tmp_path / str(n), n)) - dense).abs().max()) for n in (0.0, 1e-4, 1e-2)]
        assert off[0] < 1e-5 * float(dense.abs().max())
        assert off[0] < off[1] < off[2] < 0.5 * float(dense.abs().max())

    def test_experts_differ_by_the_noise_that_was_asked_for(
        self, family: str, models: ModelLibrary, tmp_path: Path
    ) -> None:
        upcycled(models.get(family), tmp_path / "out", 0.01)
        weights = {n: t for n, t in tensors_of(tmp_path / "out").items() if ".experts." in n and n.endswith("weight")}
        first = {name: t for name, t in weights.items() if ".experts.0." in name}
        between = [
            weights[name.replace("experts.0", f"experts.{number}")] - tensor
            for name, tensor in first.items()
            for number in range(1, NUM_EXPERTS)
        ]
        # The difference of two independent draws has twice the variance of one.
        assert float(torch.cat([x.flatten() for x in between]).std()) == pytest.approx(0.01 * 2**0.5, rel=0.02)

    def test_trains(self, family: str, models: ModelLibrary, tmp_path: Path) -> None:
        """Routers and the experts that tokens go to learn, and what they learn is saved."""
        source = models.get(family, num_layers=2)
        model = upcycled(source, tmp_path / "out", 1e-3)
        chosen = [name for name, _ in model.named_parameters() if "gate.weight" in name or ".experts." in name]
        tokens = torch.randint(3, 128, (8, 24), generator=torch.Generator().manual_seed(0))
        model.train()
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
        losses: list[float] = []
        reached: set[str] = set()
        for _ in range(8):
            optimiser.zero_grad()
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            got = {name for name in chosen if (grad := model.get_parameter(name).grad) is not None and grad.any()}
            reached |= got
            optimiser.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        assert {name for name in chosen if "gate.weight" in name} <= reached
        moved = {name for name in chosen if not torch.equal(model.get_parameter(name), before[name])}
        assert moved == reached
        experts = {name.split(".experts.")[1].split(".")[0] for name in reached if ".experts." in name}
        assert family == "llama" or len(experts) >= 2  # transformers packs a Mixtral's experts in memory
        model.eval().save_pretrained(tmp_path / "trained")
        torch.testing.assert_close(logits(load_custom(tmp_path / "trained")), logits(model), rtol=0, atol=1e-4)
