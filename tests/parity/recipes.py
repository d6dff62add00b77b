"""The recipes that both programs merge; ``{base}``, ``{a}``, ``{b}``, ``{c}`` stand for folders of checkpoints."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """One recipe.

    Attributes:
        name: what it shows.
        method: row of the tolerance table.
        text: YAML without ``dtype``.
        family: whose checkpoints are merged.
    """

    name: str
    method: str
    text: str
    family: str = "llama"


def _models(*lines: str) -> str:
    return "models:\n" + "".join(f"  - {line}\n" for line in lines)


def _weighted(name: str, parameters: str) -> str:
    return f"{{model: '{{{name}}}', parameters: {{{parameters}}}}}"


LINEAR = "merge_method: linear\n" + _models(_weighted("a", "weight: 0.6"), _weighted("b", "weight: 0.4"))
SLERP = "merge_method: slerp\nbase_model: '{base}'\n" + _models("model: '{base}'", "model: '{a}'")
TASK = "merge_method: task_arithmetic\nbase_model: '{base}'\n"
TWO = _models(_weighted("a", "weight: 0.5"), _weighted("b", "weight: 0.4"))
TIES = "merge_method: ties\nbase_model: '{base}'\n"
NUSLERP = "merge_method: nuslerp\n" + _models(_weighted("a", "weight: 0.3"), _weighted("b", "weight: [0.2, 0.9]"))
MULTISLERP = "merge_method: multislerp\n" + _models(
    _weighted("a", "weight: 0.5"), _weighted("b", "weight: [0.3, 0.8]"), _weighted("c", "weight: 0.2")
)
KARCHER = "merge_method: karcher\n" + _models("model: '{a}'", "model: '{b}'", "model: '{c}'")
STOCK = "merge_method: model_stock\nbase_model: '{base}'\n" + _models("model: '{a}'", "model: '{b}'", "model: '{c}'")

RECIPES = (
    Recipe("linear", "linear", LINEAR),
    Recipe(
        "linear of three, weights that do not sum to one",
        "linear",
        "merge_method: linear\n"
        + _models(_weighted("a", "weight: 0.7"), _weighted("b", "weight: 0.6"), _weighted("c", "weight: 0.5")),
    ),
    Recipe("linear, not normalised", "linear", LINEAR + "parameters: {normalize: false}\n"),
    Recipe(
        "linear, gradient",
        "linear",
        "merge_method: linear\n"
        + _models(_weighted("a", "weight: [0.1, 0.3, 1.0]"), _weighted("b", "weight: [1.0, 0.2]")),
    ),
    Recipe(
        "linear, filters over gradients",
        "linear",
        """merge_method: linear
models:
  - model: '{a}'
    parameters:
      weight:
        - {filter: self_attn, value: [0.2, 0.9, 0.3]}
        - {filter: mlp, value: 0.8}
        - value: 0.5
  - {model: '{b}', parameters: {weight: 0.5}}
""",
    ),
    Recipe(
        "linear, parameters of model before those of the top level",
        "linear",
        "merge_method: linear\n"
        + _models(_weighted("a", "weight: 0.9"), "model: '{b}'")
        + "parameters: {weight: 0.3, normalize: true}\n",
    ),
    Recipe(
        "linear, slices with a setting at every level",
        "linear",
        """merge_method: linear
slices:
  - sources:
      - {model: '{a}', layer_range: [0, 2], parameters: {weight: 0.9}}
      - {model: '{b}', layer_range: [0, 2]}
    parameters: {weight: [0.2, 0.7]}
  - sources:
      - {model: '{a}', layer_range: [2, 4]}
      - {model: '{b}', layer_range: [2, 4], parameters: {weight: [0.1, 0.6]}}
parameters: {weight: 0.4}
""",
    ),
    Recipe(
        "linear of different layers",
        "linear",
        """merge_method: linear
slices:
  - sources:
      - {model: '{a}', layer_range: [0, 3], parameters: {weight: 0.7}}
      - {model: '{b}', layer_range: [1, 4], parameters: {weight: 0.3}}
""",
    ),
    Recipe("slerp", "slerp", SLERP + "parameters: {t: 0.3}\n"),
    Recipe(
        "slerp, the usual gradients",
        "slerp",
        SLERP
        + """parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - value: 0.5
""",
    ),
    Recipe(
        "slerp of slices",
        "slerp",
        """merge_method: slerp
base_model: '{a}'
slices:
  - sources:
      - {model: '{a}', layer_range: [0, 4]}
      - {model: '{b}', layer_range: [0, 4]}
parameters: {t: [0.2, 0.8]}
""",
    ),
    Recipe(
        "task arithmetic",
        "task_arithmetic",
        TASK + _models(_weighted("a", "weight: 0.5"), _weighted("b", "weight: 0.4"), _weighted("c", "weight: -0.3")),
    ),
    Recipe(
        "task arithmetic, lambda",
        "task_arithmetic",
        TASK + TWO + "parameters: {lambda: 0.8}\n",
    ),
    Recipe(
        "task arithmetic, normalised",
        "task_arithmetic",
        TASK + TWO + "parameters: {normalize: true}\n",
    ),
    Recipe(
        "ties",
        "ties",
        TIES + _models(_weighted("a", "weight: 0.5, density: 0.5"), _weighted("b", "weight: 0.3, density: 0.7")),
    ),
    Recipe(
        "ties of three, gradients",
        "ties",
        TIES
        + _models(
            _weighted("a", "weight: 0.5, density: [1, 0.7, 0.1]"),
            _weighted("b", "weight: [0, 0.3, 0.7, 1], density: 0.5"),
            _weighted("c", "weight: 0.4, density: 0.3"),
        ),
    ),
    Recipe(
        "ties, not normalised, lambda",
        "ties",
        TIES
        + _models(_weighted("a", "weight: 0.5, density: 0.4"), _weighted("b", "weight: 0.6, density: 0.6"))
        + "parameters: {normalize: false, lambda: 0.7}\n",
    ),
    Recipe(
        "dare_linear that drops nothing",
        "dare_linear",
        "merge_method: dare_linear\nbase_model: '{base}'\n"
        + _models(_weighted("a", "weight: 0.5, density: 1.0"), _weighted("b", "weight: 0.4")),
    ),
    Recipe(
        "dare_ties that drops nothing",
        "dare_ties",
        "merge_method: dare_ties\nbase_model: '{base}'\n"
        + _models(_weighted("a", "weight: 0.5, density: 1.0"), _weighted("b", "weight: 0.4, density: 1.0")),
    ),
    Recipe("passthrough", "passthrough", "merge_method: passthrough\n" + _models("model: '{a}'")),
    Recipe(
        "passthrough, scaled by filter",
        "passthrough",
        """merge_method: passthrough
slices:
  - sources:
      - model: '{a}'
        layer_range: [0, 4]
        parameters:
          scale:
            - {filter: o_proj, value: 0.7}
            - {filter: down_proj, value: [0.3, 1.1]}
            - value: 1.0
""",
    ),
    Recipe(
        "frankenmerge",
        "passthrough",
        """merge_method: passthrough
slices:
  - sources: [{model: '{a}', layer_range: [0, 3]}]
  - sources: [{model: '{b}', layer_range: [1, 4]}]
  - sources: [{model: '{a}', layer_range: [3, 4]}]
""",
    ),
    Recipe("linear, Mistral", "linear", LINEAR, "mistral"),
    Recipe("slerp, Qwen2", "slerp", SLERP + "parameters: {t: 0.6}\n", "qwen2"),
    Recipe(
        "ties, Qwen2",
        "ties",
        TIES + _models(_weighted("a", "weight: 0.5, density: 0.5"), _weighted("b", "weight: 0.5, density: 0.5")),
        "qwen2",
    ),
    Recipe("linear, Qwen3", "linear", LINEAR, "qwen3"),
    Recipe("linear, tied embeddings", "linear", LINEAR, "llama-tied"),
    Recipe(
        "task arithmetic, tied embeddings",
        "task_arithmetic",
        TASK + TWO,
        "llama-tied",
    ),
    Recipe("nuslerp", "nuslerp", NUSLERP),
    Recipe("nuslerp of task vectors", "nuslerp", NUSLERP + "base_model: '{base}'\n"),
    Recipe("nuslerp of rows", "nuslerp", NUSLERP + "parameters: {nuslerp_flatten: false}\n"),
    Recipe(
        "nuslerp of columns of task vectors, Qwen2",
        "nuslerp",
        NUSLERP + "base_model: '{base}'\nparameters: {nuslerp_flatten: false, nuslerp_row_wise: true}\n",
        "qwen2",
    ),
    Recipe("multislerp", "multislerp", MULTISLERP),
    Recipe(
        "multislerp of task vectors, not normalised",
        "multislerp",
        MULTISLERP + "base_model: '{base}'\nparameters: {normalize_weights: false}\n",
    ),
    Recipe("karcher", "karcher", KARCHER),
    Recipe("karcher, two steps", "karcher", KARCHER + "parameters: {max_iter: 2, tol: 1.0e-9}\n"),
    Recipe("model stock", "model_stock", STOCK),
    Recipe("model stock of filters, Qwen2", "model_stock", STOCK + "parameters: {filter_wise: true}\n", "qwen2"),
    Recipe("nearswap", "nearswap", SLERP.replace("slerp", "nearswap") + "parameters: {t: [0.0, 0.01, 0.03]}\n"),
    Recipe("Arcee fusion", "arcee_fusion", SLERP.replace("slerp", "arcee_fusion")),
    *(
        Recipe(
            f"{method}, a gradient",
            method,
            f"merge_method: {method}\nbase_model: '{{base}}'\n"
            + _models(
                _weighted("a", "weight: 0.5, density: 0.5, gamma: 0.1"),
                _weighted("b", "weight: 0.4, density: [0.9, 0.2]"),
            ),
        )
        for method in ("breadcrumbs", "breadcrumbs_ties")
    ),
    *(
        Recipe(
            f"{method}, normalised and rescaled",
            method,
            f"merge_method: {method}\nbase_model: '{{base}}'\n"
            + _models(
                _weighted("a", "weight: 0.5, density: 0.6, gamma: 0.5"),
                _weighted("c", "weight: 0.6, density: 0.3, gamma: 0"),
            )
            + "parameters: {normalize: true, rescale: true, lambda: 0.8}\n",
        )
        for method in ("breadcrumbs", "breadcrumbs_ties")
    ),
    *(
        Recipe(
            f"{method} that drops nothing",
            method,
            f"merge_method: {method}\nbase_model: '{{base}}'\n"
            + _models(_weighted("a", "weight: 0.5, density: 1.0"), _weighted("b", "weight: 0.4, epsilon: 0.1")),
        )
        for method in ("della", "della_linear")
    ),
    *(
        Recipe(
            f"sce, {part} selected",
            "sce",
            "merge_method: sce\nbase_model: '{base}'\n"
            + _models("model: '{a}'", "model: '{b}'", "model: '{c}'")
            + f"parameters: {{select_topk: {part}}}\n",
        )
        for part in (0.15, 0.7, 1.0)
    ),
    Recipe(
        "ram",
        "ram",
        "merge_method: ram\nbase_model: '{base}'\n"
        + _models("model: '{a}'", "model: '{b}'", "model: '{c}'")
        + "parameters: {epsilon: 0.03}\n",
    ),
    Recipe(
        "ramplus_tl, not clipped",
        "ramplus_tl",
        "merge_method: ramplus_tl\nbase_model: '{base}'\n"
        + _models("model: '{a}'", "model: '{b}'", "model: '{c}'")
        + "parameters: {epsilon: 0.05, r: 0.3, alpha: 10}\n",
    ),
    Recipe(
        "ramplus_tl, clipped",
        "ramplus_tl",
        "merge_method: ramplus_tl\nbase_model: '{base}'\n" + _models("model: '{a}'", "model: '{b}'"),
    ),
)
