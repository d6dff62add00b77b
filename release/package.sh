#!/usr/bin/env bash
# Builds the wheel and the sdist into dist/, and tries each in an environment that holds nothing else. Beside them it
# leaves an SBOM: what installing the wheel has installed, in CycloneDX.
#
#   release/package.sh [OPTION OF pip install]...
#
# Needs build, twine and mypy in the `python` that is first on PATH. PIP_CONSTRAINT, an absolute path, applies to what builds
# the package and to what is installed with it.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# Not at the head of PATH any more once an environment is tried.
python=$(command -v python)
unset PYTHONPATH

rm -rf dist
python -m build --quiet
python -m twine check --strict dist/*
wheel=$(echo "$PWD"/dist/*.whl)
sdist=$(echo "$PWD"/dist/*.tar.gz)
version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' mergekit_ray/core/version.py)

# Data files travel like modules: what the package's folder holds is what the wheel holds.
diff <(find mergekit_ray -type f -not -path '*/__pycache__/*' | LC_ALL=C sort) \
  <(python -c 'import sys, zipfile; print(*zipfile.ZipFile(sys.argv[1]).namelist(), sep="\n")' "$wheel" |
    grep -v '\.dist-info/' | LC_ALL=C sort)
# The sdist is the repository: tests, documents and chart included.
if [[ -e .git ]]; then
  missing=$(LC_ALL=C comm -23 <(git ls-files | LC_ALL=C sort) <(tar -tf "$sdist" | cut -d/ -f2- | LC_ALL=C sort))
  [[ -z $missing ]] || { printf 'not in the sdist:\n%s\n' "$missing" >&2 && exit 1; }
fi

install() {
  "$python" -m pip --disable-pip-version-check --python "$1/bin/python" install --quiet --no-compile "${@:2}"
}

# Merges with the command line and with the library of an environment, away from the source tree, which must not be what is
# imported.
try_out() (
  mkdir "$work/$1"
  cp release/caller.py "$work/$1"
  cd "$work/$1"
  export PATH=$work/venv/bin:$PATH
  "$python" -m mypy --strict --config-file= --cache-dir="$work/mypy" --python-executable="$work/venv/bin/python" caller.py
  [[ $(mergekit-ray --version) == "mergekit-ray $version" ]]
  merge --help >/dev/null
  mergekit-ray methods >/dev/null
  "$work/venv/bin/python" caller.py "$PWD"
  merge recipe.yml merged
  mergekit-ray verify merged
)

for archive in "$sdist" "$wheel"; do
  # Without pip, which is no part of what the package needs.
  python -m venv --clear --without-pip "$work/venv"
  install "$work/venv" "$@" "$archive"
  try_out "${archive##*.}"
  echo "$(basename "$archive"): installed and tried"
done

python -m venv --without-pip "$work/sbom"
# Versions of its own, which development's need not agree with.
PIP_CONSTRAINT='' install "$work/sbom" --requirement release/requirements-sbom.txt
"$work/sbom/bin/cyclonedx-py" environment --pyproject pyproject.toml --mc-type library --output-reproducible \
  --output-file "$work/sbom.json" "$work/venv/bin/python"
# pyproject.toml has no version: it is in the package.
python - "$work/sbom.json" "$version" >dist/mergekit_ray.cdx.json <<'END'
import json, pathlib, sys

document = json.loads(pathlib.Path(sys.argv[1]).read_text())
document["metadata"]["component"]["version"] = sys.argv[2]
print(json.dumps(document, indent=2))
END
