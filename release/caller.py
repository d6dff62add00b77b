"""What a user of the package writes: a merge method, two small models, their plan and their merge.

`release/package.sh` runs it against the installed wheel, and has mypy check it as the user's would.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, assert_type

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file

import mergekit_ray
from mergekit_ray.core.declaration import Parameters
from mergekit_ray.core.registry import METHODS
from mergekit_ray.methods.shared.protocol import Chunk, ElementwiseMethod, Operands

RECIPE = """\
merge_method: {method}
models:
  - {{model: {folder}/a, parameters: {{weight: 1}}}}
  - {{model: {folder}/b, parameters: {{weight: 2}}}}
dtype: float32
"""


class LoudestModelParameters(Parameters):
    """Per-model parameters of `Loudest`."""

    weight: float = Field(description="factor of the model's magnitude", ge=0, allow_inf_nan=False)


@METHODS.register("loudest")
class Loudest(ElementwiseMethod):
    """Of two models, the element whose weighted magnitude is larger."""

    name = "loudest"
    summary = "Of two models, the element whose weighted magnitude is larger."
    formula = "x_i with the largest w_i·|x_i|"
    model_parameters = LoudestModelParameters

    def combine(self, chunk: Chunk, operands: Operands, statistics: Any) -> torch.Tensor:
        """See `ElementwiseMethod.combine`."""
        del statistics
        (a, b), (of_a, of_b) = chunk.inputs, operands.input_parameters
        return torch.where(a.abs() * of_a.weight >= b.abs() * of_b.weight, a, b)


def write_model(folder: Path, sign: int) -> torch.Tensor:
    """A model of one tensor, which is returned."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 1, "tie_word_embeddings": false}')
    weight = torch.arange(12, dtype=torch.float32).reshape(3, 4) * sign - 3
    save_file({"model.layers.0.mlp.up_proj.weight": weight}, folder / "model.safetensors", metadata={"format": "pt"})
    return weight


def main(folder: Path) -> None:
    """Merge ``folder/a`` and ``folder/b`` into ``folder/loudest``; leave a recipe for the command line there."""
    a, b = write_model(folder / "a", 1), write_model(folder / "b", -1)
    (folder / "recipe.yml").write_text(RECIPE.format(method="linear", folder=folder))
    recipe = mergekit_ray.load_recipe(RECIPE.format(method="loudest", folder=folder))
    [shard] = mergekit_ray.plan(recipe).shards
    result = mergekit_ray.merge(recipe, folder / "loudest")
    uri, file = assert_type(result.uri, str), assert_type(shard.file, str)  # as declared, and not Any
    [merged] = load_file(Path(uri) / file).values()
    assert torch.equal(merged, torch.where(a.abs() >= 2 * b.abs(), a, b))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
