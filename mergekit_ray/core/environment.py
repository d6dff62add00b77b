"""Settings in the environment."""

from __future__ import annotations

import math
import os

from mergekit_ray.core.errors import ConfigError


def seconds_of(variable: str, default: float) -> float:
    """A number of seconds from the environment.

    Args:
        variable: its name.
        default: if it is not set, or empty.

    Raises:
        ConfigError: it is not a number above 0.
    """
    text = os.environ.get(variable, "").strip()
    if not text:
        return default
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ConfigError(
            f"{text!r} is not a number of seconds above 0",
            where=variable,
            remedy=f"correct it, or unset it: {default:g}",
        )
    return seconds
