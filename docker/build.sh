#!/usr/bin/env bash
# Builds the image and says how large it is.
#
#   docker/build.sh [--torch cpu|cuda] [--tag NAME] [--base IMAGE] [--index URL] [--torch-index URL] [--ca FILE] [--wheels FOLDER]
#
#   --index        another index of Python packages than PyPI
#   --torch-index  another index to take torch from
#   --ca           certificate authorities, where connections are inspected on their way
#   --wheels       a folder of wheels, for what an index does not have; their hashes must be the locked ones
#
# What is not given of index, ca and wheels is what pip uses on this machine (`pip config list`).
# The image holds nothing of these options: configuration, certificates and wheels are mounted while pip runs.
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
      sed -n '2,12s/^# \{0,1\}//p' "$0" >&2
      exit 2
      ;;
  esac
done
tag=${tag:-mergekit-ray:$torch}

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
revision=$(git rev-parse HEAD 2>/dev/null || true)
if [[ -n $revision && -n $(git status --porcelain) ]]; then
  revision+=-dirty
fi

if ! "$podman" image exists "$base" && ! "$podman" pull "$base"; then
  echo "$base is neither here nor to be had: docker/base.sh makes Debian's from its packages" >&2
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
