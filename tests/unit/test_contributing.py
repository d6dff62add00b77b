"""The worked example of CONTRIBUTING.md is run as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

CHECK = """
import torch
from mergekit_ray.core.registry import METHODS
from support.operands import merge

names = METHODS.names()
exec(compile(open(sys.argv[1]).read(), "example", "exec"))
assert METHODS.names() == sorted([*names, "geometric"])
x, y = torch.tensor([4.0, -9.0, 1.0]), torch.tensor([16.0, 4.0, -1.0])
merged = merge("geometric", [x, y], None, input_parameters=[{"weight": 1.0}, {"weight": 3.0}])
expected = x.sign() * x.abs().pow(0.25) * y.abs().pow(0.75)
torch.testing.assert_close(merged, expected)
"""


def test_the_example_method_works(tmp_path: Path) -> None:
    [example] = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    (tmp_path / "example.py").write_text(example)
    program = "import sys\n" + CHECK
    # In a process of its own, so that the method does not stay registered.
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "example.py")],
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
