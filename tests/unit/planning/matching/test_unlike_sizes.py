"""Models of other sizes: no remedy is offered that does not help."""

from __future__ import annotations

import pytest

from mergekit_ray.config.load import load_recipe
from mergekit_ray.config.reference import ModelReference
from mergekit_ray.core.errors import ModelError
from mergekit_ray.planning.make import make_plan
from support.fake_checkpoints import LINEAR, checkpoint, llama_shapes, plan_of


@pytest.mark.parametrize("size", [{"inner": 7}, {"hidden": 5}])
def test_what_cannot_be_merged_anyway_is_not_offered(size: dict[str, int]) -> None:
    config = {"model_type": "llama", "num_hidden_layers": 2}
    a, b = (
        checkpoint("/a", llama_shapes(2), {**config, "hidden_size": 4}),
        checkpoint("/b", llama_shapes(2, **size), {**config, "hidden_size": 5}),
    )
    with pytest.raises(ModelError, match="can describe these models together") as caught:
        plan_of(LINEAR, a, b)
    assert caught.value.remedy == "use models of one architecture and size"
    found = {ModelReference(each.reference): each for each in (a, b)}
    with pytest.raises(ModelError, match="shape"):
        make_plan(load_recipe(LINEAR), found, allow_config_conflicts=True)
