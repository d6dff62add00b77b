"""The `custom` family: what it finds in a dense model it has never heard of, and the code it writes for it."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from mergekit_ray.architectures.anatomy import anatomy
from mergekit_ray.architectures.moe.custom import Custom
from mergekit_ray.architectures.moe.family import DenseModel, Wanted
from mergekit_ray.architectures.moe.registry import FAMILIES, choose, family_of
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import ModelError
from mergekit_ray.core.tensors import TensorSpec

HIDDEN, INNER = 8, 20
PHI = {"mlp.fc1.weight": (INNER, HIDDEN), "mlp.fc1.bias": (INNER,), "mlp.fc2.weight": (HIDDEN, INNER)}
PHI |= {"mlp.fc2.bias": (HIDDEN,)}
TWO = Wanted(num_experts=2, experts_per_token=2)

Shapes = Mapping[str, tuple[int, ...]]


def dense(
    layer: Shapes = PHI,
    config: Mapping[str, Any] | None = None,
    *,
    stack: str = "model.layers",
    embedding: str = "model.embed_tokens.weight",
    num_layers: int = 2,
    more: Shapes | None = None,
) -> DenseModel:
    shapes: dict[str, tuple[int, ...]] = {embedding: (10, HIDDEN)}
    shapes |= {f"{stack}.{i}.norm.weight": (HIDDEN,) for i in range(num_layers)}
    shapes |= {f"{stack}.{i}.attention.out.weight": (HIDDEN, HIDDEN) for i in range(num_layers)}
    shapes |= {f"{stack}.{i}.{rest}": shape for i in range(num_layers) for rest, shape in layer.items()}
    specs = {name: TensorSpec(name, DType.BF16, shape) for name, shape in {**shapes, **(more or {})}.items()}
    given = {"model_type": "phi", "num_hidden_layers": num_layers, "hidden_size": HIDDEN, **(config or {})}
    return DenseModel("/base", given, specs, anatomy(specs, given, "/base"))


class TestNames:
    def test_are_the_dense_modules_own_below_each_expert(self) -> None:
        names = Custom().names(dense())
        assert names.experts == {rest: rest.replace("mlp.", "mlp.experts.{expert}.") for rest in PHI}
        assert names.router == "mlp.gate.weight"
        assert names.shared == {rest: rest.replace("mlp.", "mlp.shared_expert.") for rest in PHI}
        assert names.residual == {"mlp.fc2.weight", "mlp.fc2.bias"}
        assert names.shared_gate is None

    @pytest.mark.parametrize(
        ("module", "first", "last"),
        [
            ("mlp", ("gate_proj", "up_proj"), "down_proj"),
            ("mlp", ("gate_up_proj",), "down_proj"),
            ("mlp", ("dense_h_to_4h",), "dense_4h_to_h"),
            ("mlp", ("c_fc",), "c_proj"),
            ("mlp", ("fc_in",), "fc_out"),
            ("feed_forward", ("w1", "w3"), "w2"),
            ("ffn", ("up",), "shrink"),  # a name never heard: by its shape
        ],
    )
    def test_what_writes_to_the_residual_stream(self, module: str, first: Sequence[str], last: str) -> None:
        layer: dict[str, tuple[int, ...]] = {f"{module}.{name}.weight": (INNER, HIDDEN) for name in first}
        layer |= {f"{module}.{last}.weight": (HIDDEN, INNER), f"{module}.{last}.bias": (HIDDEN,)}
        base = dense(layer)
        assert Custom().objections(base, TWO) == []
        names = Custom().names(base)
        assert names.residual == {f"{module}.{last}.weight", f"{module}.{last}.bias"}
        assert names.router == f"{module}.gate.weight"

    def test_of_a_mixture_are_found_from_its_first_expert(self) -> None:
        layer = {rest.replace("mlp.", f"mlp.experts.{i}."): shape for rest, shape in PHI.items() for i in range(3)}
        grown = dense({**layer, "mlp.gate.weight": (3, HIDDEN)}, {"model_type": "custom_moe_phi"})
        assert family_of(grown) is not None
        assert Custom().mixture_names(grown) == Custom().names(dense())
        assert Custom().dense_types_of("custom_moe_phi") == ["phi"]

    def test_a_model_without_a_module(self) -> None:
        for ask in (Custom().names, Custom().mixture_names):
            with pytest.raises(ModelError, match="no feed-forward module"):
                ask(dense({"fc1.weight": (INNER, HIDDEN)}))


class TestObjections:
    def objections(self, base: DenseModel, wanted: Wanted = TWO) -> list[str]:
        return Custom().objections(base, wanted)

    def test_none_to_any_name_of_the_stack_with_or_without_shared_experts(self) -> None:
        base = dense(stack="gpt_neox.layers", embedding="gpt_neox.embed_in.weight")
        assert self.objections(base) == []
        assert self.objections(base, Wanted(2, 1, has_shared=True)) == []
        assert choose(base, TWO).name == "custom"

    def test_packed_experts(self) -> None:
        assert self.objections(dense(), Wanted(2, 2, packed=True)) == ["has no packed layout of its experts"]

    @pytest.mark.parametrize(
        ("config", "said"),
        [
            ({"model_type": None}, "needs a model_type"),
            ({"model_type": "bloom"}, "hands the residual to its feed-forward module"),
            ({"hidden_size": 16}, "needs embeddings as wide as the hidden size, found 8 and 16"),
            ({"auto_map": {"AutoModelForCausalLM": "a/b--modeling_x.X"}}, "needs the dense model's code beside"),
            ({"auto_map": {"AutoModelForCausalLM": "x; import os"}}, "needs the dense model's code beside"),
        ],
    )
    def test_configs(self, config: dict[str, Any], said: str) -> None:
        (found,) = self.objections(dense(config=config))
        assert said in found

    def test_a_language_model_inside_another(self) -> None:
        base = dense(config={"num_hidden_layers": 2})
        config = {"model_type": "gemma3", "text_config": {"num_hidden_layers": 2, "hidden_size": HIDDEN}}
        (found,) = self.objections(DenseModel("/base", config, base.specs, base.anatomy))
        assert "takes models of text alone" in found

    def test_two_stacks(self) -> None:
        base = dense(more={"encoder.block.0.norm.weight": (HIDDEN,)})
        (found,) = self.objections(base)
        assert found == "takes models with one stack of layers, found encoder.block, model.layers"

    def test_linear_layers_that_stand_in_the_decoder_layer_itself(self) -> None:
        base = dense({"fc1.weight": (INNER, HIDDEN), "fc2.weight": (HIDDEN, INNER)})
        (found,) = self.objections(base)
        assert found.startswith("needs a feed-forward module in each layer (mlp, ")
        assert found.endswith("found attention, fc1, fc2, norm")

    @pytest.mark.parametrize("expert", ["mlp.experts.0.fc1.weight", "mlp.experts.gate_up_proj", "mlp.1.weight"])
    def test_experts_already(self, expert: str) -> None:
        (found,) = self.objections(dense({**PHI, expert: (INNER, HIDDEN)}))
        assert found == "takes dense models, found experts in the feed-forward modules"

    def test_layers_that_are_not_alike(self) -> None:
        base = dense(more={"model.layers.1.mlp.norm.weight": (HIDDEN,)})
        assert self.objections(base) == ["needs layers that are alike, found in some only mlp.norm.weight"]

    def test_no_telling_what_writes_to_the_residual_stream(self) -> None:
        base = dense({"mlp.one.weight": (HIDDEN, HIDDEN), "mlp.two.weight": (HIDDEN, HIDDEN)})
        (found,) = self.objections(base)
        assert found == "cannot tell which of mlp.one.weight, mlp.two.weight writes to the residual stream"


class TestConfig:
    def test_is_the_dense_models_with_the_experts(self) -> None:
        given = {"rope_theta": 7.0, "auto_map": {"AutoTokenizer": ["t.T", None], "AutoModel": "m.M"}}
        base = dense(config=given)
        config = Custom().config(base, Wanted(5, 3, has_shared=True))
        assert config == {
            "architectures": ["CustomMoeForCausalLM"],
            "auto_map": {
                "AutoConfig": "modeling_custom_moe.CustomMoeConfig",
                "AutoModelForCausalLM": "modeling_custom_moe.CustomMoeForCausalLM",
                "AutoTokenizer": ["t.T", None],
            },
            "hidden_size": HIDDEN,
            "model_type": "custom_moe_phi",
            "norm_topk_prob": True,
            "num_experts": 5,
            "num_experts_per_tok": 3,
            "num_hidden_layers": 2,
            "num_shared_experts": 1,
            "rope_theta": 7.0,
        }
        assert base.config["auto_map"] == given["auto_map"]  # the input is left as it was

    def test_how_to_load_it_is_said(self) -> None:
        (said,) = Custom().caveats(TWO)
        assert "trust_remote_code=True" in said


def constants(text: str) -> dict[str, Any]:
    """Simple assignments at the top of a module."""
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = ast.literal_eval(node.value)
    return found


class TestFile:
    def text(self, base: DenseModel) -> str:
        ((name, text),) = Custom().files(base).items()
        assert name == "modeling_custom_moe.py"
        return text

    def test_is_filled_in_for_the_dense_model(self) -> None:
        layer = {rest.replace("mlp", "ffn"): shape for rest, shape in PHI.items()}
        base = dense(layer, {"model_type": "own"}, stack="transformer.h", embedding="transformer.wte.weight")
        text = self.text(base)
        assert constants(text) == {"DENSE_TYPE": "own", "STACK": "transformer.h", "BLOCK": "ffn"}
        assert "MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[DENSE_TYPE]]" in text

    def test_takes_the_class_from_code_beside_the_model(self) -> None:
        base = dense(config={"auto_map": {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}})
        text = self.text(base)
        ast.parse(text)
        assert "\nfrom .modeling_own import OwnForCausalLM as DenseForCausalLM\n" in text
        assert "CONFIG_MAPPING[DENSE_TYPE]]" not in text

    @pytest.mark.parametrize("name", ['"\nimport os\n"', "a\\", '\u2028 é \'"""'])
    def test_what_a_config_says_is_text_and_never_code(self, name: str) -> None:
        base = dense(config={"model_type": name})
        assert Custom().objections(base, TWO) == []
        text = self.text(base)
        assert constants(text)["DENSE_TYPE"] == name
        before, after = (len(ast.parse(each).body) for each in (self.text(dense()), text))
        assert before == after

    def test_of_other_families_there_is_none(self) -> None:
        for name in set(FAMILIES.names()) - {"custom"}:
            assert FAMILIES.get(name)().files(dense()) == {}
