"""``python -m mergekit_ray``: the command ``mergekit-ray``."""

from mergekit_ray.cli import app_main

if __name__ == "__main__":
    app_main()
