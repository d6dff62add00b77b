"""What may be imported without paying for torch, ray and the clients of the stores."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mergekit_ray
from support.memory_inputs import random_llama, write_model

HEAVY = ("torch", "ray", "transformers", "boto3", "botocore", "huggingface_hub", "numba", "numpy", "safetensors")

MODULES = [
    "mergekit_ray",
    "mergekit_ray.cli",
    "mergekit_ray.config",
    "mergekit_ray.core.plan",
    "mergekit_ray.architectures.anatomy",
    "mergekit_ray.checkpoint.opening",
    "mergekit_ray.checkpoint.writer",
    "mergekit_ray.planning.make",
    "mergekit_ray.planning.windows",
    "mergekit_ray.storage",
    "mergekit_ray.storage.opening",
    "mergekit_ray.operations.merge",
    "mergekit_ray.operations.plan",
    "mergekit_ray.operations.run_plan",
    "mergekit_ray.reporting.reporters",
    "mergekit_ray.tokenizers.chat.rendering",
    "mergekit_ray.tokenizers.chat.sandbox",
    "mergekit_ray.cli.tables",
    "mergekit_ray.operations.verify",
    "mergekit_ray.operations.inspect",
    "mergekit_ray.operations.tensors",
    "mergekit_ray.errors",
]


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def heavy_after(code: str) -> list[str]:
    found = python(f"import sys\n{code}\nprint(*[name for name in {HEAVY!r} if name in sys.modules])")
    return found.split()


def test_no_module_drags_in_what_it_does_not_use() -> None:
    """All in one process; which one is to blame is found by the next test's list if this fails."""
    assert heavy_after("\n".join(f"import {module}" for module in MODULES)) == []


def test_declarations_of_all_methods_are_read_without_torch() -> None:
    code = "from mergekit_ray.core.registry import METHODS\nassert 'ties' in METHODS.names()\nMETHODS.get('dare_ties')"
    assert heavy_after(code) == []


def test_a_recipe_is_loaded_without_torch() -> None:
    code = (
        "import mergekit_ray\nmergekit_ray.load_recipe("
        "'merge_method: linear\\nmodels: [{model: a/b, parameters: {weight: [0, 1]}}]\\n')"
    )
    assert heavy_after(code) == []


def test_a_checkpoint_is_planned_without_torch() -> None:
    code = (
        "from benchmarks.plan_405b import headers, recipe\n"
        "from mergekit_ray.planning.make import make_plan, referenced_models\n"
        "dense = recipe('ties')\n"
        "assert make_plan(dense, {ref: headers(str(ref), 1) for ref in referenced_models(dense)}).digest"
    )
    assert heavy_after(code) == []


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("from mergekit_ray.cli import app_main; app_main()", "Merge LLM checkpoints of any size"),
        ("from mergekit_ray.cli import merge_main; merge_main()", "Merge models as RECIPE says"),
    ],
)
def test_help_imports_nothing_heavy(code: str, line: str) -> None:
    script = (
        "import os, sys\nsys.argv = ['command', '--help']\nleave = os._exit\n"
        f"def tell(code):\n    print('heavy:', *[name for name in {HEAVY!r} if name in sys.modules], flush=True)\n"
        f"    leave(code)\nos._exit = tell\n{code}"
    )
    text = python(script)
    assert line in " ".join(text.replace("│", " ").split())
    assert text.rstrip().endswith("heavy:")


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("linear", []),
        ("passthrough", []),
        ("slerp", []),
        ("dare_linear", ["numba"]),
        ("ties", ["numba", "torch"]),
    ],
)
def test_a_local_merge_loads_what_it_uses(method: str, expected: list[str], tmp_path: Path) -> None:
    """No cluster, no clients of stores that are not asked; torch and a compiler where they compute."""
    for seed, name in enumerate("abc"):
        write_model(tmp_path / name, random_llama(seed), {"model_type": "llama", "num_hidden_layers": 2})
    base, *others = (str(tmp_path / name) for name in "abc")
    recipes: dict[str, dict[str, Any]] = {
        "linear": {"models": [{"model": model, "parameters": {"weight": 0.5}} for model in others]},
        "passthrough": {"models": [{"model": base}]},
        "slerp": {"base_model": base, "models": [{"model": others[0]}], "parameters": {"t": 0.5}},
        "dare_linear": {
            "base_model": base,
            "models": [{"model": model, "parameters": {"weight": 0.5, "density": 0.5}} for model in others],
        },
    }
    recipes["ties"] = recipes["dare_linear"]
    recipe = {"merge_method": method, **recipes[method]}
    code = f"import mergekit_ray\nmergekit_ray.merge({recipe!r}, {str(tmp_path / 'out')!r})"
    names = ("ray", "transformers", "boto3", "botocore", "huggingface_hub", "numba", "scipy", "torch")
    loaded = python(f"import sys\n{code}\nprint(*[name for name in {names!r} if name in sys.modules])").split()
    assert loaded == expected


def test_the_public_names() -> None:
    """All are there and listed, and are what a type checker is told that they are."""
    code = "import mergekit_ray\nprint(*[getattr(mergekit_ray, name) is not None for name in mergekit_ray.__all__])"
    assert set(python(code).split()) == {"True"}
    assert dir(mergekit_ray) == sorted(mergekit_ray.__all__)
    told = {"__version__"}
    for node in ast.walk(ast.parse(Path(mergekit_ray.__file__).read_text())):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for each in node.body:
                assert isinstance(each, ast.ImportFrom)
                for alias in each.names:
                    told.add(alias.name)
                    value = getattr(mergekit_ray, alias.name)
                    assert value is getattr(importlib.import_module(str(each.module)), alias.name)
    assert told == {*mergekit_ray.__all__}
    with pytest.raises(subprocess.CalledProcessError) as caught:
        python("import mergekit_ray\nmergekit_ray.merj")
    assert "module 'mergekit_ray' has no attribute 'merj'" in caught.value.stderr
