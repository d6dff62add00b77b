"""The errors a user may see, and the exit code each one means.

    MergekitRayError            what went wrong, where, what to do
    ├── ConfigError       2     the recipe or the command is wrong; carries every problem found
    ├── PlanError         2     the request is well-formed but cannot be planned
    ├── ModelError        3     a model cannot be found, or its config does not fit the others
    ├── CheckpointError   3     a checkpoint's files are malformed, incomplete or changed
    ├── MergeError        3     the values themselves are wrong (non-finite input, ...)
    ├── StorageError      4     a store or the cluster failed; running again may succeed
    ├── Interrupted     130     stopped by the user; running again resumes
    └── InternalError     1     a fault of mergekit-ray itself, to be reported; carries the traceback

Every error says what happened (``what``), where (``where``: a file and line, a model, a tensor) and what to do
(``remedy``), without credentials. It names options as Python has them, in backticks: `rank=16`, and
`options=MergeOptions(overwrite=True)`. The command line names its own instead. A traceback is only for ``--debug``.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from mergekit_ray.core.secrets import redact


class MergekitRayError(Exception):
    """Base of all errors that are shown to a user as one paragraph.

    Args:
        what: what is wrong, naming the thing.
        where: the file and line, model, tensor or URI it concerns.
        remedy: what the user can do about it.
    """

    exit_code: ClassVar[int] = 1
    retryable: bool = False

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None) -> None:
        self.what = redact(what)
        self.where = None if where is None else redact(where)
        self.remedy = None if remedy is None else redact(remedy)
        super().__init__(self.what)

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}\n  {self.remedy}" if self.remedy else text

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions with keyword-only arguments do not survive pickling by default; errors cross process borders here.
        return _rebuild, (type(self), self.__dict__)


def _rebuild(kind: type[MergekitRayError], state: dict[str, object]) -> MergekitRayError:
    error = kind.__new__(kind)
    Exception.__init__(error, state.get("what"))
    error.__dict__.update(state)
    return error


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a recipe.

    Attributes:
        where: ``file:line`` (or just the file or ``<text>``), empty if unknown.
        path: the YAML path, e.g. ``models[1].parameters.weight``; empty for the document.
        what: what was found and what is accepted.
        hint: the nearest accepted spelling or another remedy, empty if there is none.
    """

    where: str
    path: str
    what: str
    hint: str = ""

    def __post_init__(self) -> None:
        """Hide credentials."""
        for name in self.__slots__:
            object.__setattr__(self, name, redact(getattr(self, name)))

    def __str__(self) -> str:
        head = ": ".join(part for part in (self.where, self.path, self.what) if part)
        return f"{head}\n    {self.hint}" if self.hint else head


class ConfigError(MergekitRayError):
    """A recipe or command line that is wrong. ``problems`` lists all that were found, in file order."""

    exit_code = 2

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        remedy: str | None = None,
        problems: Sequence[Problem] = (),
    ) -> None:
        super().__init__(what, where=where, remedy=remedy)
        self.problems = tuple(problems)

    def __str__(self) -> str:
        return "\n".join([super().__str__(), *(f"  {problem}" for problem in self.problems)])


class PlanError(MergekitRayError):
    """A well-formed request that cannot be carried out: shapes, layer ranges, memory, output place."""

    exit_code = 2


class ModelError(MergekitRayError):
    """A model that cannot be found or read, or whose config does not fit the others."""

    exit_code = 3


class CheckpointError(MergekitRayError):
    """A checkpoint whose files are malformed, incomplete, or changed since they were first seen."""

    exit_code = 3


class MergeError(MergekitRayError):
    """Values that cannot be merged, such as a NaN in an input tensor."""

    exit_code = 3


class StorageError(MergekitRayError):
    """A store, network or cluster that failed. Running the same command again resumes.

    Args:
        what: what failed, after which retries.
        where: the URI or the cluster.
        remedy: what the user can do about it.
        retryable: whether it may pass by itself, so that retrying the shard makes sense. A refused password does not.
    """

    exit_code = 4

    def __init__(
        self, what: str, *, where: str | None = None, remedy: str | None = None, retryable: bool = True
    ) -> None:
        super().__init__(what, where=where, remedy=remedy)
        self.retryable = retryable


class Interrupted(MergekitRayError):  # noqa: N818 - the word a user reads; it is a request, not a fault
    """The user stopped it. Running the same command again resumes."""

    exit_code = 130


class InternalError(MergekitRayError):
    """A fault of mergekit-ray itself: something that no input should be able to cause."""

    exit_code = 1

    @classmethod
    def wrap(cls, error: BaseException) -> InternalError:
        """Keep an unexpected exception, with its traceback, so that it can cross a process border."""
        wrapped = cls(
            f"unexpected {type(error).__name__}: {error}",
            remedy="please report this with its traceback: `error.traceback`, or the command's output with --debug",
        )
        wrapped.traceback = redact("".join(traceback.format_exception(error)))
        return wrapped

    traceback: str = ""
