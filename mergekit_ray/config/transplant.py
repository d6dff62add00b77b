"""How rows are made for tokens that a model lacks: the options of a transplant, and ``approximate`` in a recipe."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, TypeAlias

from pydantic import PlainSerializer, PlainValidator, ValidationError, WithJsonSchema

from mergekit_ray.config.fields import DEFAULT_MAX_SHARD_BYTES, raise_findings
from mergekit_ray.config.findings import Finding, found, unknown_key
from mergekit_ray.core.approximation import APPROXIMATIONS
from mergekit_ray.core.errors import PlanError
from mergekit_ray.core.spelling import nearest

SUBWORD: Final = "subword"
"""The method that needs no rows of the donor: it is made of the model's own, by its tokenizer."""

SCHEMES: Final = ("mean", "sum", "weighted_mean", "first_last")
"""How rows of pieces become one."""

PLACES: Final = ("no", "embed", "lm_head", "yes")
"""For which tensors tokens are matched in other ways: for none, the embedding, the head with its biases, or both."""


def methods() -> list[str]:
    """All ways to make rows for missing tokens, sorted."""
    return sorted([*APPROXIMATIONS.names(), SUBWORD])


@dataclass(frozen=True, slots=True)
class TransplantOptions:
    """How rows of tokens are made that the model does not have.

    Attributes:
        method: one of `methods`.
        k: shared tokens that a row is made of, or neighbours; None for the method's default.
        metric: what is near, of ``common_interpolation``; None for its default.
        weights: of neighbours, of ``common_interpolation``; None for its default.
        subword: how ``subword`` puts pieces together, one of `SCHEMES`.
        prefix_match: where a missing token gets the row of the longest token that it begins with; one of `PLACES`.
        byte_match: where tokens of the same single byte match, however they are written.
        magikarp: leave out shared tokens that were hardly trained.
        scale: of approximated rows.
        noise: standard deviation of normal noise that is added to approximated rows.
        seed: of all randomness.
        max_shard_size: of an output file, in bytes.
    """

    method: str = "omp"
    k: int | None = None
    metric: str | None = None
    weights: str | None = None
    subword: str = "mean"
    prefix_match: str = "no"
    byte_match: str = "no"
    magikarp: bool = False
    scale: float = 1.0
    noise: float = 0.0
    seed: int = 0
    max_shard_size: int = DEFAULT_MAX_SHARD_BYTES

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            PlanError: an unknown name, a number out of range, or an option that the method does not have.
        """
        for name, value, accepted in (
            ("method", self.method, methods()),
            ("subword", self.subword, SCHEMES),
            ("prefix_match", self.prefix_match, PLACES),
            ("byte_match", self.byte_match, PLACES),
        ):
            if value not in accepted:
                raise PlanError(
                    f"{name} cannot be {value!r}{nearest(value, accepted)}", remedy=f"accepted: {', '.join(accepted)}"
                )
        if not math.isfinite(self.scale):
            raise PlanError(f"scale must be finite, not {self.scale}", remedy="1 leaves approximated rows as they are")
        if not 0 <= self.noise < math.inf:
            raise PlanError(
                f"noise must be finite and not negative, not {self.noise}",
                remedy="it is a standard deviation; 0 adds none",
            )
        if self.max_shard_size < 1:
            raise PlanError(f"a shard has at least one byte, not {self.max_shard_size}")
        self._check_parameters()

    @property
    def parameters(self) -> dict[str, Any]:
        """Those of the method, as far as they are given."""
        given = {"k": self.k, "metric": self.metric, "weights": self.weights}
        return {name: value for name, value in given.items() if value is not None}

    def matches(self, way: str, *, is_head: bool) -> bool:
        """Whether tokens are matched in a way (one of `PLACES`) for a tensor."""
        return way in ("yes", "lm_head" if is_head else "embed")

    def to_data(self) -> dict[str, Any]:
        """What decides the result, as plain data."""
        own = {"method": self.method, **self.parameters}
        if self.method == SUBWORD:
            own["subword"] = self.subword
        ways = {"prefix_match": self.prefix_match, "byte_match": self.byte_match}
        numbers = {"scale": self.scale, "noise": self.noise}
        return {
            **own,
            **{name: value for name, value in ways.items() if value != "no"},
            **({"magikarp": True} if self.magikarp else {}),
            **{name: value for name, value in numbers.items() if value != (1.0 if name == "scale" else 0.0)},
        }

    def _check_parameters(self) -> None:
        fields = {} if self.method == SUBWORD else dict(APPROXIMATIONS.get(self.method).parameters.model_fields)
        unknown = [name for name in self.parameters if name not in fields]
        if unknown:
            raise PlanError(
                f"{self.method} has no {unknown[0]}",
                remedy=f"it takes {', '.join(fields)}" if fields else f"leave out {unknown[0]}",
            )
        if fields:
            try:
                APPROXIMATIONS.get(self.method).parameters.model_validate(self.parameters)
            except ValidationError as error:
                first = error.errors()[0]
                raise PlanError(f"{first['loc'][0]} of {self.method}: {first['msg']}, not {first['input']!r}") from None


_IN_RECIPES: Final[Mapping[str, tuple[type, ...]]] = {
    "method": (str,),
    "k": (int,),
    "metric": (str,),
    "weights": (str,),
    "subword": (str,),
    "prefix_match": (str, bool),
    "byte_match": (str, bool),
    "scale": (float, int),
    "noise": (float, int),
}
"""What a recipe may say, with the types of the values. ``yes`` and ``no`` are booleans in YAML."""


def _parse(value: object) -> TransplantOptions | None:
    if value is None or isinstance(value, TransplantOptions):
        return value
    given = {"method": value} if isinstance(value, str) else value
    if not isinstance(given, Mapping):
        raise ValueError(f"expected the name of a method, or a mapping, not {found(value)}\nwrite `approximate: omp`")
    raise_findings([unknown_key((key,), list(_IN_RECIPES)) for key in given if key not in _IN_RECIPES])
    stated = {key: entry for key, entry in given.items() if entry is not None}
    raise_findings(
        [
            Finding((key,), f"expected {'text' if str in types else 'a number'}, not {found(entry)}")
            for key, entry in stated.items()
            if not isinstance(entry, types := _IN_RECIPES[key]) or (isinstance(entry, bool) and bool not in types)
        ]
    )
    words = {key: {True: "yes", False: "no"}[entry] for key, entry in stated.items() if isinstance(entry, bool)}
    try:
        return TransplantOptions(**{**stated, **words})
    except PlanError as error:
        raise ValueError("\n".join(filter(None, (error.what, error.remedy)))) from None


def _dump(options: TransplantOptions | None) -> Any:
    return None if options is None else options.to_data()


Approximation: TypeAlias = Annotated[
    TransplantOptions | None,
    PlainValidator(_parse),
    PlainSerializer(_dump),
    WithJsonSchema({"type": ["string", "object", "null"]}),
]
"""``approximate`` in a recipe: a method's name, or a mapping with options."""
