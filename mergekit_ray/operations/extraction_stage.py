"""A stage of an extraction, as its user sees it: tensors, not the shards and folders that exist only while it runs."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any, Final

from mergekit_ray.core.errors import MergekitRayError
from mergekit_ray.core.plan import Plan
from mergekit_ray.core.sizes import counted
from mergekit_ray.reporting.progress import Progress
from mergekit_ray.reporting.reporters import Reporter

_UNTOLD: Final = frozenset(
    {"planned", "shard_done", "checking", "publishing", "published", "already_done", "replacing"}
)
"""Events of a merge that say nothing of the adapter."""


class Stage:
    """The reporter of a plan that is a stage.

    Args:
        tell: told of it.
        plan: of the stage: a shard for each tensor.
        folder: where it is carried out, below the output.
    """

    def __init__(self, tell: Reporter, plan: Plan, folder: str) -> None:
        self._tell = tell
        self._folder = folder
        self._tensors = {shard.file: shard.tensors[0].spec.name for shard in plan.shards}
        self._file = re.compile(r"[a-z]+-\d+-of-\d+\.safetensors")

    def begin(self, plan: Plan) -> None:
        """See `Reporter.begin`."""
        self._tell.begin(plan)

    def event(self, kind: str, message: str, **fields: Any) -> None:
        """See `Reporter.event`."""
        if kind == "resumed":
            message = f"{fields['num_done']:,} of {counted(fields['num_shards'], 'tensor')} done by an earlier run"
        if kind not in _UNTOLD:
            told = {name: self._own(value) if isinstance(value, str) else value for name, value in fields.items()}
            self._tell.event(kind, self._own(message), **told)

    def progress(self, progress: Progress, num_done: int, num_shards: int) -> None:
        """See `Reporter.progress`."""
        self._tell.progress(progress, num_done, num_shards)

    @contextlib.contextmanager
    def errors_told(self) -> Iterator[None]:
        """Within, errors name tensors and the output."""
        try:
            yield
        except MergekitRayError as error:
            error.what = self._own(error.what)
            error.where = None if error.where is None else self._own(error.where)
            raise

    def _own(self, text: str) -> str:
        text = text.replace(f"/{self._folder}", "")
        return self._file.sub(lambda match: self._tensors.get(match[0], match[0]), text)
