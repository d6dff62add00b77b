#!/usr/bin/env bash
# Builds the wheel and the sdist into dist/, and tries the wheel in an environment that holds nothing else.
#
#   release/package.sh [OPTION OF pip install]...
#
# Needs build, twine and mypy in the `python` that is first on PATH. pip's own PIP_CONSTRAINT, an absolute path, holds for what
# builds the package and for what is installed with it.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

rm -rf dist
python -m build --quiet
python -m twine check --strict dist/*
wheel=$(echo dist/*.whl)

# Data files travel like modules: what the package's folder holds is what the wheel holds.
diff <(find mergekit_ray -type f -not -path '*/__pycache__/*' | LC_ALL=C sort) \
  <(python -c 'import sys, zipfile; print(*zipfile.ZipFile(sys.argv[1]).namelist(), sep="\n")' "$wheel" |
    grep -v '\.dist-info/' | LC_ALL=C sort)
# The sdist is the repository: tests, documents and chart included.
if [[ -e .git ]]; then
  missing=$(LC_ALL=C comm -23 <(git ls-files | LC_ALL=C sort) <(tar -tf dist/*.tar.gz | cut -d/ -f2- | LC_ALL=C sort))
  [[ -z $missing ]] || { printf 'not in the sdist:\n%s\n' "$missing" >&2 && exit 1; }
fi

python -m venv "$work/venv"
"$work/venv/bin/python" -m pip --disable-pip-version-check install --quiet --no-compile "$@" "$wheel"
python=$(command -v python)
export PATH=$work/venv/bin:$PATH
unset PYTHONPATH
# Away from the source tree, which must not be what is imported.
cp release/caller.py "$work"
cd "$work"
"$python" -m mypy --strict --config-file= --cache-dir="$work/mypy" --python-executable="$work/venv/bin/python" caller.py
mergekit-ray --help >/dev/null
merge --help >/dev/null
mergekit-ray methods >/dev/null
"$work/venv/bin/python" caller.py "$work"
merge recipe.yml merged
mergekit-ray verify merged
