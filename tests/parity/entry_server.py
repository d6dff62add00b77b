"""Runs a console script many times from one warm interpreter: `python entry_server.py SCRIPT [MODULE...]`.

SCRIPT is the name of an installed console script, or ``module:function``. Torch and each MODULE are imported first.
Each line of stdin is a JSON object with ``args`` and ``log``; the script runs in a forked child with these arguments,
its output going to the file ``log``; its exit code is printed as one line. A run starts in milliseconds instead of the
seconds that importing takes, and shares nothing with the run before it. mergekit's interpreter runs this file as well
as ours, so it imports nothing of the project.
"""

import importlib
import importlib.metadata
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path


def load(script: str) -> Callable[[], object]:
    """The function behind a console script."""
    if ":" in script:
        module, name = script.split(":")
        function: Callable[[], object] = getattr(importlib.import_module(module), name)
        return function
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name=script)
    loaded: Callable[[], object] = entry.load()
    return loaded


def run(function: Callable[[], object], script: str, args: Sequence[str], log: str) -> int:
    """Runs ``function`` in a forked child as the command ``script args``; returns its exit code."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        with Path(log).open("wb") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        sys.argv = [script, *args]
        function()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:  # noqa: BLE001 - the child must end here, whatever happened
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """Serves until stdin ends."""
    script, *modules = sys.argv[1:]
    for module in ("torch", *modules):
        importlib.import_module(module)
    function = load(script)
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    replies.write("ready\n")
    for line in sys.stdin:
        request = json.loads(line)
        replies.write(f"{run(function, script, request['args'], request['log'])}\n")


if __name__ == "__main__":
    main()
