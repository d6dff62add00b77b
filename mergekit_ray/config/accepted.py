"""What recipes built in Python accept: the same as the YAML, as types for callers.

Fields are typed as what they hold once validated. So the models declare their constructors with these types, for type
checkers only: at run time pydantic makes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, TypeAlias

from mergekit_ray.config.reference import ModelReference
from mergekit_ray.config.settings import Conditional
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.expressions import Scalar

ModelLike: TypeAlias = ModelReference | str | PurePath | Mapping[str, Any]
"""A model: ``path-or-repo[@revision][+lora]``, a path, or the mapping form."""

SettingLike: TypeAlias = Scalar | Sequence[float] | Conditional | Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""A parameter: a scalar, a gradient over the layers, or ``{filter, value}`` and lists of these."""

ParametersLike: TypeAlias = Mapping[str, SettingLike]
DTypeLike: TypeAlias = DType | str
