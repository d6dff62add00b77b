"""The command line: ``merge`` and ``mergekit-ray``."""

from mergekit_ray.cli.commands import app, app_main, merge, merge_main

__all__ = ["app", "app_main", "merge", "merge_main"]
