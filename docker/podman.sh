#!/usr/bin/env bash
# podman, with the settings that it needs where no systemd runs (containers.conf beside this file).
set -euo pipefail
if [[ ! -d /run/systemd/system ]]; then
  export CONTAINERS_CONF=${CONTAINERS_CONF:-$(cd "$(dirname "$0")" && pwd)/containers.conf}
fi
exec podman "$@"
