"""What an extraction found: how much of each change the adapter holds, and what it does not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mergekit_ray.checkpoint.opening import Checkpoint
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.expressions import NUM_NORMS
from mergekit_ray.core.shown import table
from mergekit_ray.core.sizes import counted
from mergekit_ray.core.version import __version__
from mergekit_ray.planning.extraction import Extraction

BASE_SUFFIX = " (base)"
"""After the name of a tensor whose own norms were taken, beside those of its difference."""

_NUM_READERS = 16


@dataclass(frozen=True, slots=True)
class Factorised:
    """One matrix in the adapter.

    Attributes:
        name: of the tensor.
        rank: of its factors; 0 if the models do not differ, and nothing is stored.
        norm: of the change, which is the difference of the two models (Frobenius).
        error: the loss: norm of what the factors leave of it, over ``norm``; 0 if that is 0.
    """

    name: str
    rank: int
    norm: float
    error: float


@dataclass(frozen=True, slots=True)
class Uncovered:
    """One tensor that differs and is not in the adapter.

    Attributes:
        name: of the tensor.
        norm: of the change.
        relative: ``norm`` over the norm of the base's tensor; None if that is zero.
    """

    name: str
    norm: float
    relative: float | None


@dataclass(frozen=True, slots=True)
class ExtractResult:
    """What was extracted.

    Attributes:
        uri: where the adapter is.
        factorised: every matrix.
        uncovered: what differs and is lost, the largest change first.
        unmatched: tensors that are in one model only or of another shape, with the reason: lost as well.
        saved: tensors stored whole.
        error: the total loss: norm of all that is lost of the changes, over the norm of all changes (of tensors that
            both models have and that are not stored whole); 0 if they do not differ.
    """

    uri: str
    factorised: Sequence[Factorised]
    uncovered: Sequence[Uncovered]
    unmatched: Mapping[str, str]
    saved: Sequence[str]
    error: float

    def __repr__(self) -> str:
        matrices = counted(sum(each.rank > 0 for each in self.factorised), "matrix", "matrices")
        return f"<ExtractResult {self.uri}: {matrices}, total loss {self.error:.3g}>"

    def _repr_html_(self) -> str:
        ranks = [each.rank for each in self.factorised if each.rank]
        rows = {
            "where": self.uri,
            "matrices": f"{len(ranks):,}",
            "ranks": _ranks(ranks).partition(" ")[2] if ranks else "none",
            "stored whole": f"{len(self.saved):,}",
            "not covered": f"{len(self.uncovered) + len(self.unmatched):,}",
            "total loss": f"{self.error:.3g}",
        }
        return table("Extracted LoRA", rows)


def read_small(work: Checkpoint, names: Sequence[str], last_bytes: int | None = None) -> dict[str, bytes]:
    """Small tensors, or their ends, read side by side."""

    def read_one(name: str) -> bytes:
        _, place = work.tensors[name]
        start = place.start if last_bytes is None else place.end - last_bytes
        buffer = bytearray(place.end - start)
        version = work.files[place.file].version
        work.source.read_ranges(place.file, [(start, place.end)], [memoryview(buffer)], version=version)
        return bytes(buffer)

    with ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="norms") as pool:
        return dict(zip(names, pool.map(read_one, names), strict=True))


def report_of(uri: str, found: Extraction, work: Checkpoint) -> ExtractResult:
    """What the norms beside the factors say."""
    names = [*(t.name for t in found.targets), *found.uncovered, *(n + BASE_SUFFIX for n in found.uncovered)]
    read = read_small(work, names, NUM_NORMS * DType.F32.itemsize)
    norms = {name: [float(norm) for norm in np.frombuffer(data, np.float32)] for name, data in read.items()}
    factorised = []
    for target in found.targets:
        left, norm = norms[target.name]
        (length,) = work.tensors[target.name][0].shape
        rank = (length - NUM_NORMS) // sum(found.base.weights.specs[target.name].shape) if norm else 0
        factorised.append(Factorised(target.name, rank, norm, left / norm if norm else 0.0))
    uncovered = []
    for name in found.uncovered:
        norm, of_base = norms[name][1], norms[name + BASE_SUFFIX][1]
        if norm:
            uncovered.append(Uncovered(name, norm, norm / of_base if of_base else None))
    uncovered.sort(key=lambda each: (-each.norm, each.name))
    return ExtractResult(uri, factorised, uncovered, found.unmatched, found.saved, _loss(factorised, uncovered))


def _loss(factorised: Sequence[Factorised], uncovered: Sequence[Uncovered] = ()) -> float:
    """Norm of what is lost over the norm of all that changed."""
    lost = math.fsum([(f.norm * f.error) ** 2 for f in factorised] + [u.norm**2 for u in uncovered])
    whole = math.fsum([f.norm**2 for f in factorised] + [u.norm**2 for u in uncovered])
    return math.sqrt(lost / whole) if whole else 0.0


def to_data(report: ExtractResult) -> dict[str, Any]:
    """As plain JSON data, but for where the adapter is."""
    data = asdict(report)
    del data["uri"]
    return data


def from_data(uri: str, data: Mapping[str, Any]) -> ExtractResult:
    """Inverse of `to_data`."""
    return ExtractResult(
        uri=uri,
        factorised=[Factorised(**each) for each in data["factorised"]],
        uncovered=[Uncovered(**each) for each in data["uncovered"]],
        unmatched=data["unmatched"],
        saved=data["saved"],
        error=data["error"],
    )


def card(found: Extraction, report: ExtractResult) -> str:
    """A README.md as the Hugging Face Hub expects it."""
    kept = [each for each in report.factorised if each.rank]
    return (
        "---\nlibrary_name: peft\ntags:\n- mergekit-ray\n- lora\n---\n\n# Extracted LoRA\n\n"
        f"The difference of `{found.tuned.reference}` and its base `{found.base.reference}`, as low-rank factors of "
        f"{counted(len(kept), 'matrix', 'matrices')} ({_ranks([each.rank for each in kept])}), made with "
        f"mergekit-ray {__version__}. The total loss is {report.error:.3g} of the norm of all changes; "
        f"`mergekit-ray.json` says where.\n"
    )


def _ranks(ranks: Sequence[int]) -> str:
    least, most = min(ranks), max(ranks)
    return f"rank {least}" if least == most else f"ranks {least} to {most}"


def lines(report: ExtractResult) -> list[str]:
    """For a person: each matrix, all that is lost, and the sum of it."""
    told = [f"{'rank':>6}  {'change':>9}  {'loss':>9}  tensor"]
    told += [f"{e.rank:6}  {e.norm:9.3g}  {e.error:9.3g}  {e.name}" for e in report.factorised]
    if report.saved:
        told += ["", "stored whole:", *(f"  {name}" for name in report.saved)]
    if report.uncovered:
        told += ["", "changes that the adapter leaves out:"]
        told += [f"  {'change':>9}  {'relative':>9}  tensor"]
        for each in report.uncovered:
            relative = "base is 0" if each.relative is None else f"{each.relative:9.3g}"
            told.append(f"  {each.norm:9.3g}  {relative}  {each.name}")
    if report.unmatched:
        told += ["", "tensors that only one model has, or that differ in shape, are left out:"]
        told += [f"  {name}: {reason}" for name, reason in report.unmatched.items()]
    return [
        *told,
        "",
        "change: Frobenius norm of the difference; loss: the share of it that the factors leave out; "
        "relative: change over the norm of the base's tensor",
        "",
        f"total loss: {report.error:.3g}"
        + (f" ({_loss(report.factorised):.3g} for the factorised matrices alone)" if report.uncovered else ""),
        report.uri,
    ]
