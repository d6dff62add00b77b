"""What is said of the files beside merged weights."""

from __future__ import annotations

from typing import Any

import pytest

from mergekit_ray.checkpoint.side_files import MAX_SIDE_FILE_BYTES
from mergekit_ray.core.errors import PlanError
from mergekit_ray.storage.protocols import FileStat
from support.fake_checkpoints import LINEAR, checkpoint, llama, llama_shapes, plan_of


def model(*names: str, num_bytes: int = 1, left_behind: Any = (), **config: Any) -> Any:
    files = [FileStat(name, num_bytes, "1") for name in names]
    base = {"num_hidden_layers": 2, "tie_word_embeddings": False, **config}
    return checkpoint("/a", llama_shapes(2), base, side_files=files, left_behind=left_behind)


def warnings(donor: Any) -> tuple[str, ...]:
    return plan_of(LINEAR, donor, llama("/b")).warnings


def test_further_modules_are_the_donors() -> None:
    (said,) = warnings(model("modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors"))
    assert said.startswith("2_Dense/model.safetensors is that of /a")


def test_pickled_modules_are_named() -> None:
    (said,) = warnings(model("modules.json", left_behind=["2_Dense/pytorch_model.bin"]))
    assert said.startswith("2_Dense/pytorch_model.bin of /a is pickled and not copied")


def test_code_is_named_with_where_it_comes_from() -> None:
    auto_map = {"AutoConfig": "configuration_x.XConfig", "AutoTokenizer": [None, "tokenization_x.XTokenizer"]}
    (said,) = warnings(model("configuration_x.py", "tokenization_x.py", auto_map=auto_map))
    assert "(configuration_x.py, tokenization_x.py)" in said
    assert "trust_remote_code=True" in said
    assert "/a" in said


def test_code_that_is_not_there_is_named() -> None:
    auto_map = {"AutoConfig": "org/other--configuration_x.XConfig", "AutoModel": "modeling_x.XModel"}
    asks, missing = warnings(model(auto_map=auto_map))
    assert "org/other--configuration_x.py" in asks
    assert missing.startswith("modeling_x.py: config.json names it")


@pytest.mark.parametrize("auto_map", [None, {}, "x", {"AutoModel": 3}])
def test_no_code_no_warning(auto_map: Any) -> None:
    assert warnings(model("handler.py", auto_map=auto_map)) == ()


def test_files_too_large_to_copy_are_refused_before_anything_is_merged() -> None:
    with pytest.raises(PlanError, match=r"tokenizer\.json has .* are copied beside") as caught:
        warnings(model("tokenizer.json", num_bytes=MAX_SIDE_FILE_BYTES + 1))
    assert caught.value.where == "model /a"
