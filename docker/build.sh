#!/usr/bin/env bash
# Builds the image under the name that the chart pulls, with podman, and prints its size.
#
#   docker/build.sh [--torch cpu|cuda] [--tag NAME] [--base IMAGE] [--index URL] [--torch-index URL] [--ca FILE] [--wheels FOLDER]
#
#   --torch        cpu (the default), or cuda, which adds the CUDA libraries and "-cuda" to the tag
#   --tag          another name than ghcr.io/mergekit-ray/mergekit-ray with the package's version as its tag
#   --base         another base image than Debian 12
#   --index        another index of Python packages than PyPI
#   --torch-index  another index for torch
#   --ca           file of certificate authorities to trust while fetching packages
#   --wheels       folder of wheels that the index lacks; they must have the locked hashes
#
# Index, CA and wheels default to what pip uses on this machine (`pip config list`).
# pip's configuration, certificates and wheels are mounted during the build. None of them ends up in the image.
set -euo pipefail
torch=cpu tag='' base=docker.io/library/debian:bookworm-slim index='' torch_index='' ca='' wheels=''
while (($#)); do
  case $1 in
    --torch | --tag | --base | --index | --torch-index | --ca | --wheels)
      name=${1#--}
      printf -v "${name//-/_}" '%s' "${2:?$1 wants a value}"
      shift 2
      ;;
    *)
      sed -n '2,15s/^# \{0,1\}//p' "$0" >&2
      exit 2
      ;;
  esac
done

# A setting of pip's here; nothing if it has none, or there is no pip.
pip_setting() {
  local scope
  for scope in :env: site user global; do
    if pip config get "$scope.$1" 2>/dev/null; then
      return
    fi
  done
}
index=${index:-$(pip_setting index-url)}
ca=${ca:-$(pip_setting cert)}
if [[ -z $wheels ]]; then
  found=$(pip_setting find-links)
  if [[ -d $found ]]; then
    wheels=$found
  fi
fi

here=$(cd "$(dirname "$0")" && pwd)
podman=$here/podman.sh
cd "$here/.."
locked=$(sed -n 's/^torch==\([^ ]*\).*/\1/p' "docker/requirements-$torch.txt")
if [[ -z $torch_index && -n $wheels ]] && compgen -G "$wheels/torch-$locked-*.whl" >/dev/null; then
  torch_index=${index:-https://pypi.org/simple}
fi
version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' mergekit_ray/core/version.py)
if [[ -z $tag ]]; then
  tag=$(sed -n 's/^  repository: //p' helm/mergekit-ray/values.yaml):$version
  [[ $torch == cpu ]] || tag+=-$torch
fi
revision=$(git rev-parse HEAD 2>/dev/null || true)
if [[ -n $revision && -n $(git status --porcelain) ]]; then
  revision+=-dirty
fi

if ! "$podman" image exists "$base" && ! "$podman" pull "$base"; then
  echo "$base is not on this machine and cannot be pulled. docker/base.sh makes Debian's from its packages" >&2
  exit 1
fi

config=$(mktemp)
trap 'rm -f "$config"' EXIT
{
  echo '[global]'
  [[ -z $index ]] || echo "index-url = $index"
  [[ -z $ca ]] || echo 'cert = /run/secrets/ca.crt'
  [[ -z $wheels ]] || echo 'find-links = /mnt'
} >"$config"

options=(--build-arg "BASE=$base" --build-arg "TORCH=$torch")
options+=(--build-arg "VERSION=$version" --build-arg "REVISION=$revision")
options+=(--build-arg "CREATED=$(date --utc +%Y-%m-%dT%H:%M:%SZ)" --secret "id=pip,src=$config")
[[ -z $torch_index ]] || options+=(--build-arg "TORCH_INDEX=$torch_index")
[[ -z $ca ]] || options+=(--secret "id=ca,src=$(realpath "$ca")")
[[ -z $wheels ]] || options+=(--volume "$(realpath "$wheels"):/mnt:ro")

# The host's network: rootless and nested podman may have no other.
"$podman" build --network=host --layers --tag "$tag" "${options[@]}" .
bytes=$("$podman" image inspect --format '{{.Size}}' "$tag")
echo "$tag: $((bytes / 1000000)) MB"
