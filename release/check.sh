#!/usr/bin/env bash
# Builds all that a release consists of in a clean clone, and installs and tries each part.
#
#   release/check.sh TAG [OPTION OF pip install]...
#
# TAG is a tag, or HEAD for the last commit. Leaves wheel, sdist, chart, SBOM and their checksums in dist/ and the
# documentation in site/. All steps run even if one fails. Needs, on PATH, what `make setup` installs; PIP_CONSTRAINT as in
# release/package.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
tag=$1
shift
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

commit=$(git rev-parse --verify --quiet "$tag^{commit}") || { echo "there is no tag $tag here" >&2 && exit 2; }
[[ $tag != HEAD || -z $(git status --porcelain) ]] || echo 'Changes that are not committed are not checked.'
git clone --quiet --no-checkout . "$work/source"
cd "$work/source"
git checkout --quiet --detach "$commit"
export PYTHONPATH=$PWD:$PWD/tests
version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' mergekit_ray/core/version.py)
image=$(sed -n 's/^  repository: //p' helm/mergekit-ray/values.yaml):$version

names() {
  if [[ $tag != HEAD ]]; then
    [[ $tag == "v$version" ]] || { echo "the tag $tag is not that of the version, v$version" >&2 && return 1; }
    grep -q "^## $version - " CHANGELOG.md || { echo "CHANGELOG.md has no section for $version" >&2 && return 1; }
  fi
  python -m pytest --quiet tests/helm/test_names.py tests/helm/test_deploy.py
}

package() {
  release/package.sh "$@"
}

chart() {
  local archive values
  mkdir -p dist
  archive=$(python helm/package_chart.py dist) || return
  for values in helm/ci/*.yaml; do
    helm lint --strict --quiet "$archive" --values "$values" || return
    helm template check "$archive" --values "$values" >/dev/null || return
  done
}

site() {
  # With this environment: what makes the pages comes from the clone all the same, by PYTHONPATH.
  make --no-print-directory site READY= BIN="$(dirname "$(command -v python)")" && test -s site/index.html
}

image() {
  docker/build.sh || return
  [[ $(docker/podman.sh run --rm "$image" mergekit-ray --version) == "mergekit-ray $version" ]] || return
  # Merges two tiny models, as the chart's test does.
  docker/podman.sh run --rm --interactive "$image" python - <helm/mergekit-ray/files/tiny_merge.py
}

declare -a summary=()
failed=0

step() {
  local name=$1 start=$SECONDS outcome=ok
  shift
  printf '\n==> %s\n' "$name"
  if ! "$@"; then
    outcome=FAILED
    failed=1
  fi
  summary+=("$(printf '%-18s %-7s %4d s' "$name" "$outcome" "$((SECONDS - start))")")
}

step 'names and versions' names
step 'wheel and sdist' package "$@"
step 'schema of recipes' python docs/recipe_schema.py --check
step 'chart' chart
step 'site' site
base=$(sed -n 's/^ARG BASE=\(.\+\)/\1/p' Dockerfile)
if ! command -v podman >/dev/null; then
  summary+=("$(printf '%-18s %s' image 'not checked: podman is not installed')")
elif ! docker/podman.sh image exists "$base" && ! docker/podman.sh pull --quiet "$base"; then
  summary+=("$(printf '%-18s %s' image "not checked: $base cannot be pulled (docker/base.sh makes it)")")
else
  step 'image' image
fi

if [[ -d dist ]]; then
  (cd dist && sha256sum -- * >SHA256SUMS)
  rm -rf "$root/dist" && cp -R dist "$root/dist"
fi
if [[ -d site ]]; then
  rm -rf "$root/site" && cp -R site "$root/site"
fi

printf '\n%s, version %s, commit %s:\n' "$tag" "$version" "$commit"
printf '%s\n' "${summary[@]}"
[[ ! -d dist ]] || (cd dist && ls -s --block-size=K)
exit "$failed"
