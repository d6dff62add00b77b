"""What every family of Mixtures of Experts must do: subclass `MoeConformance` and give it cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from mergekit_ray.architectures.moe.registry import FAMILIES
from support.models import ModelLibrary, config_of, load, logits, tensors_of
from support.moe_cases import Case, assert_close, expert, merge
from support.references.moe import assemble


def reference(
    case: Case, out: Path, base: Path, sources: Sequence[Path], residual_scales: Sequence[float] | None = None
) -> Any:
    """The model that a merge to ``out`` must be, put together by hand with the routers that are there."""
    gate = FAMILIES.get(case.model_type).table.shared_gate
    return assemble(
        base,
        sources,
        case.routers(out),
        2,
        shared=base if case.shared else None,
        shared_gates=case.routers(out, name=gate) if case.shared and gate else None,
        residual_scales=residual_scales,
        shared_scale=0.5,
    )


class MoeConformance:
    """transformers finds all weights of a merge, no others, and calculates what a reference does."""

    CASES: ClassVar[Mapping[str, Case]]
    """By what they are called in the tests' names."""

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        metafunc.parametrize("case", self.CASES.values(), ids=self.CASES.keys())

    def test_identical_experts_are_the_dense_model(self, case: Case, models: ModelLibrary, tmp_path: Path) -> None:
        source = models.get(case.dense)
        recipe = case.recipe(source, *[expert(source)] * 3, experts_per_token=2)
        recipe["shared_experts"] = None
        if case.shared:
            recipe["architecture"] = case.model_type
        model = merge(recipe, tmp_path / "out")
        assert type(model).__name__ == case.class_name
        assert config_of(tmp_path / "out")["model_type"] == case.model_type
        assert_close(logits(model), logits(load(source)))

    def test_different_experts_are_the_reference(self, case: Case, models: ModelLibrary, tmp_path: Path) -> None:
        base, *sources = (models.get(case.dense, variant) for variant in range(4))
        scales = [1.0, 0.5, -2.0]
        listed = [expert(s, residual_scale=scale) for s, scale in zip(sources, scales, strict=True)]
        model = merge(case.recipe(base, *listed, experts_per_token=2), tmp_path / "out")
        expected = logits(reference(case, tmp_path / "out", base, sources, scales))
        assert_close(logits(model), expected)
        assert float((expected - logits(load(base))).abs().max()) > 0.01  # the experts are seen to matter
        self.check_use(model, tmp_path)

    @staticmethod
    def check_use(model: Any, tmp_path: Path) -> None:
        """Saved and loaded again it is the same, and it writes text."""
        said = logits(model)
        model.save_pretrained(tmp_path / "saved")
        torch.testing.assert_close(logits(load(tmp_path / "saved")), said, rtol=0, atol=0)
        written = model.generate(torch.arange(3, 9).reshape(1, -1), max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert written.shape == (1, 9)

    def test_packed_experts_are_the_same_model(self, case: Case, models: ModelLibrary, tmp_path: Path) -> None:
        if FAMILIES.get(case.model_type).table.packed is None:
            pytest.skip("has no packed layout")
        base, *sources = (models.get(case.dense, variant) for variant in range(3))
        listed = [expert(sources[0], noise_scale=0.05), expert(sources[1], noise_scale=0.05, residual_scale=0.5)]
        both = {}
        for layout in ("separate", "packed"):
            recipe = case.recipe(base, *listed, *listed, expert_layout=layout)
            both[layout] = merge(recipe, tmp_path / layout)
        packed = tensors_of(tmp_path / "packed")
        assert packed["model.layers.3.mlp.experts.gate_up_proj"].shape == (4, 128, 32)
        assert packed["model.layers.3.mlp.experts.down_proj"].shape == (4, 32, 64)
        assert not any(".experts.0." in each for each in packed)
        ours, theirs = (both[layout].state_dict() for layout in ("packed", "separate"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[each], theirs[each]) for each in ours)

    def test_one_more_expert(self, case: Case, models: ModelLibrary, tmp_path: Path) -> None:
        """Added to a mixture, it routes and calculates as if it had been there from the start."""
        base, *sources = (models.get(case.dense, variant) for variant in range(4))
        merge(case.recipe(base, *map(expert, sources[:2])), tmp_path / "two")
        recipe = {"base_model": str(tmp_path / "two"), "add_to_base": True, "experts": [expert(sources[2])]}
        model = merge(recipe | {"gate_mode": "random"}, tmp_path / "three")
        assert_close(logits(model), logits(reference(case, tmp_path / "three", base, sources)))
