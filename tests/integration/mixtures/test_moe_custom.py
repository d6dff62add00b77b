"""Mixtures of Experts of families that transformers has no MoE of: loaded with the code that travels along."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import mergekit_ray
from mergekit_ray.core.errors import ModelError
from mergekit_ray.operations.options import MergeOptions
from support.custom_moe import code_kept_in, load_custom, reference
from support.merging import run_command
from support.models import ModelLibrary, build, config_of, load, logits, tensors_of
from support.moe_cases import assert_close, expert, merge


@dataclass(frozen=True)
class Case:
    """A dense family.

    Attributes:
        model_type: of its models.
        stack: what its files call the layers.
        last: the linear layer of its feed-forward module that writes to the residual stream.
    """

    model_type: str
    stack: str = "model.layers"
    last: str = "down_proj"


CASES = {
    "phi": Case("phi", last="fc2"),
    "gemma2": Case("gemma2"),
    "gpt_neox": Case("gpt_neox", "gpt_neox.layers", "dense_4h_to_h"),
    "stablelm": Case("stablelm"),
    "gemma3": Case("gemma3_text"),
    "olmo2": Case("olmo2"),
    "gpt2": Case("gpt2", "transformer.h", "c_proj"),
}
NUM_LAYERS = 2


@pytest.fixture(scope="module", autouse=True)
def code_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A folder for the code that transformers copies."""
    with code_kept_in(tmp_path_factory.mktemp("code")):
        yield


def sources(models: ModelLibrary, name: str, count: int = 4) -> list[Path]:
    if name == "gpt2":
        return [small_gpt2(models, variant) for variant in range(count)]
    return [models.get(name, variant, num_layers=NUM_LAYERS) for variant in range(count)]


def small_gpt2(models: ModelLibrary, variant: int) -> Path:
    """GPT-2 counts its layers under another name, and would be told of both."""
    folder = models.get("phi", variant).parent / f"gpt2-{variant}"
    if not folder.exists():
        build("gpt2", variant, vocab_size=128).save_pretrained(folder)
    return folder


def recipe_of(base: Path, *experts: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"base_model": str(base), "experts": list(experts), "gate_mode": "random", "experts_per_token": 2, **more}


def merged(recipe: dict[str, Any], out: Path) -> Any:
    return merge(recipe, out, load_custom)


@pytest.mark.parametrize("name", CASES)
class TestEveryFamily:
    def test_identical_experts_are_the_dense_model(self, name: str, models: ModelLibrary, tmp_path: Path) -> None:
        (source,) = sources(models, name, 1)
        # Olmo2 has an MoE of its own, which would be inferred.
        model = merged(recipe_of(source, *[expert(source)] * 3, architecture="custom"), tmp_path / "out")
        assert type(model).__name__ == "CustomMoeForCausalLM"
        dense = load(source)
        assert isinstance(model, type(dense))
        config = config_of(tmp_path / "out")
        assert config["model_type"] == f"custom_moe_{CASES[name].model_type}"
        assert type(model.config).__mro__[1] is type(dense.config)
        assert_close(logits(model), logits(dense))

    def test_different_experts_are_the_reference(self, name: str, models: ModelLibrary, tmp_path: Path) -> None:
        case = CASES[name]
        base, *others = sources(models, name)
        scales = [1.0, 0.5, -2.0]
        listed = [expert(s, residual_scale=scale) for s, scale in zip(others, scales, strict=True)]
        recipe = recipe_of(base, *listed, architecture="custom")
        model = merged(recipe, tmp_path / "out")
        tensors = tensors_of(tmp_path / "out")
        routers = [tensors[f"{case.stack}.{layer}.mlp.gate.weight"] for layer in range(NUM_LAYERS)]
        expected = logits(reference(base, others, routers, stack=case.stack, last=case.last, scales=scales))
        assert_close(logits(model), expected)
        assert float((expected - logits(load(base))).abs().max()) > 0.01  # the experts are seen to matter
        self.check_use(model, tmp_path)

    @staticmethod
    def check_use(model: Any, tmp_path: Path) -> None:
        """Saved and loaded again it is the same, and it writes text."""
        model.save_pretrained(tmp_path / "saved")
        again = load_custom(tmp_path / "saved")
        ours, theirs = model.state_dict(), again.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        assert_close(logits(again), logits(model))
        assert tensors_of(tmp_path / "saved").keys() == tensors_of(tmp_path / "out").keys()
        tokens = torch.arange(3, 9).reshape(1, -1)
        written = model.generate(tokens, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert written.shape == (1, 9)


def test_a_shared_expert_is_added_for_every_token(models: ModelLibrary, tmp_path: Path) -> None:
    base, *others = sources(models, "phi")
    shared = [{"source_model": str(base), "residual_scale": 1.0}]
    model = merged(recipe_of(base, *map(expert, others), shared_experts=shared), tmp_path / "out")
    assert config_of(tmp_path / "out")["num_shared_experts"] == 1
    tensors = tensors_of(tmp_path / "out")
    routers = [tensors[f"model.layers.{layer}.mlp.gate.weight"] for layer in range(NUM_LAYERS)]
    expected = reference(base, others, routers, stack="model.layers", last="fc2", shared=base)
    assert_close(logits(model), logits(expected))


def test_weights_of_the_chosen_may_be_those_of_a_softmax_over_all(models: ModelLibrary, tmp_path: Path) -> None:
    """``norm_topk_prob: false``: with all experts chosen there is no difference, with one there is."""
    (source,) = sources(models, "phi", 1)
    merged(recipe_of(source, *[expert(source)] * 3, experts_per_token=3), tmp_path / "out")
    said = {}
    for num_active in (3, 1):
        for normalised in (True, False):
            model = load_custom(tmp_path / "out")
            for layer in model.model.layers:
                layer.mlp.num_active, layer.mlp.norm_topk_prob = num_active, normalised
            said[num_active, normalised] = logits(model)
    assert_close(said[3, False], said[3, True])
    assert float((said[1, False] - said[1, True]).abs().max()) > 1e-3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_16_bits_identical_experts_are_the_dense_model(dtype: str, models: ModelLibrary, tmp_path: Path) -> None:
    (source,) = sources(models, "phi", 1)
    model = merged(recipe_of(source, expert(source), expert(source), dtype=dtype), tmp_path / "out")
    assert model.dtype == getattr(torch, dtype)
    expected = logits(load(source).to(getattr(torch, dtype)))
    step = torch.finfo(getattr(torch, dtype)).eps * float(expected.abs().max())
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=8 * step)


def test_without_trust_the_code_is_not_run_and_the_dense_class_is_not_taken(
    models: ModelLibrary, tmp_path: Path
) -> None:
    (source,) = sources(models, "phi", 1)
    mergekit_ray.merge(recipe_of(source, expert(source), expert(source)), tmp_path / "out")
    with pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", trust_remote_code=False, local_files_only=True
        )


def test_the_dense_models_stay_what_they_are(models: ModelLibrary, tmp_path: Path) -> None:
    """Loading ours must not change what transformers makes of a dense model afterwards."""
    (source,) = sources(models, "phi", 1)
    merged(recipe_of(source, expert(source), expert(source)), tmp_path / "out")
    assert type(load(source)) is transformers.PhiForCausalLM


class TestRecipesAsTheyAreWritten:
    """A Phi-2 as base, a gate mode, a dtype, experts with prompts, and no more: tools without its family trip here."""

    @pytest.fixture
    def recipe(self, models: ModelLibrary) -> dict[str, Any]:
        base, other = (models.get("phi", v, with_tokenizer=True, num_layers=NUM_LAYERS) for v in range(2))
        return {
            "base_model": str(base),
            "gate_mode": "hidden",
            "dtype": "float16",
            "experts": [
                expert(base, positive_prompts=["the capital of France"]),
                expert(other, positive_prompts=["is Paris"], negative_prompts=["of France"]),
            ],
        }

    @pytest.mark.parametrize("method", [None, "moe"])
    def test_from_python(self, recipe: dict[str, Any], method: str | None, tmp_path: Path) -> None:
        named = {} if method is None else {"merge_method": method}
        model = merged({**named, **recipe}, tmp_path / "out")
        assert model.dtype == torch.float16
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
        tokens = tokenizer("the capital of France is", return_tensors="pt")
        written = model.generate(**tokens, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert written.shape[1] == tokens["input_ids"].shape[1] + 4
        routers = [tensor for name, tensor in tensors_of(tmp_path / "out").items() if name.endswith("mlp.gate.weight")]
        assert len(routers) == NUM_LAYERS
        for router in routers:
            torch.testing.assert_close(router.float().norm(dim=1), torch.ones(2), rtol=0, atol=2e-3)

    def test_from_the_command_line(self, recipe: dict[str, Any], tmp_path: Path) -> None:
        file = tmp_path / "phi.yml"
        file.write_text(json.dumps(recipe))
        validated = run_command("mergekit-ray", "validate", "--models", file)
        assert validated.returncode == 0, validated.stderr
        done = run_command("mergekit-ray", "merge", file, tmp_path / "out")
        assert done.returncode == 0, done.stderr
        assert "trust_remote_code=True" in done.stderr  # the user is told how to load it
        ours = merged(recipe, tmp_path / "again")
        assert_close(logits(load_custom(tmp_path / "out")), logits(ours))
        verified = run_command("mergekit-ray", "verify", tmp_path / "out")
        assert verified.returncode == 0, verified.stderr


OWN_CONFIGURATION = """
from transformers import PhiConfig

class OwnConfig(PhiConfig):
    model_type = "own-phi"
"""

OWN_MODEL = """
from transformers import PhiForCausalLM
from .configuration_own import OwnConfig

class OwnForCausalLM(PhiForCausalLM):
    config_class = OwnConfig
"""


def with_own_code(source: Path, folder: Path, code_folder: str = "") -> Path:
    """A copy of a Phi that transformers only knows by the code that it brings along, or says is elsewhere."""
    shutil.copytree(source, folder)
    config = config_of(folder)
    prefix = f"{code_folder}--" if code_folder else ""
    config |= {"model_type": "own-phi", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {
        "AutoConfig": f"{prefix}configuration_own.OwnConfig",
        "AutoModelForCausalLM": f"{prefix}modeling_own.OwnForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config))
    if not code_folder:
        (folder / "configuration_own.py").write_text(OWN_CONFIGURATION)
        (folder / "modeling_own.py").write_text(OWN_MODEL)
    return folder


class TestModelsWithTheirOwnCode:
    def test_beside_them(self, models: ModelLibrary, tmp_path: Path) -> None:
        (source,) = sources(models, "phi", 1)
        base = with_own_code(source, tmp_path / "own")
        model = merged(recipe_of(base, expert(base), expert(base)), tmp_path / "out")
        assert config_of(tmp_path / "out")["model_type"] == "custom_moe_own-phi"
        assert (tmp_path / "out" / "modeling_own.py").read_text() == OWN_MODEL
        assert_close(logits(model), logits(load(source)))
        model.save_pretrained(tmp_path / "saved")
        assert_close(logits(load_custom(tmp_path / "saved")), logits(model))

    def test_elsewhere(self, models: ModelLibrary, tmp_path: Path) -> None:
        (source,) = sources(models, "phi", 1)
        code = with_own_code(source, tmp_path / "code")
        base = with_own_code(source, tmp_path / "own", str(code))
        with pytest.raises(ModelError, match="needs the dense model's code beside its weights"):
            mergekit_ray.merge(recipe_of(base, expert(base), expert(base)), tmp_path / "out")


def test_what_was_written_is_replaced_as_a_whole(models: ModelLibrary, tmp_path: Path) -> None:
    """The modelling file is one of ours: it goes when another model takes the place."""
    (source,) = sources(models, "phi", 1)
    out = tmp_path / "out"
    mergekit_ray.merge(recipe_of(source, expert(source), expert(source)), out)
    assert (out / "modeling_custom_moe.py").exists()
    manifest = json.loads((out / "mergekit-ray.json").read_text())
    assert "modeling_custom_moe.py" in manifest["side_files"]
    dense = {"merge_method": "passthrough", "models": [{"model": str(source)}]}
    mergekit_ray.merge(dense, out, options=MergeOptions(overwrite=True))
    assert not (out / "modeling_custom_moe.py").exists()
    assert_close(logits(load(out)), logits(load(source)), roundings=0)
