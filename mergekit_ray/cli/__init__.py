"""The command line: ``merge`` and ``mergekit-ray``."""

try:
    from mergekit_ray.cli.app import app
    from mergekit_ray.cli.commands import app_main, merge_main
    from mergekit_ray.cli.merging import merge
except KeyboardInterrupt:  # nothing has begun
    raise SystemExit(130) from None

__all__ = ["app", "app_main", "merge", "merge_main"]
