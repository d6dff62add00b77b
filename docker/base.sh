#!/usr/bin/env bash
# Makes docker.io/library/debian:bookworm-slim where no registry can be reached, from Debian's packages. Like the image
# that Debian publishes under that name, it has no manuals, translations and documentation. Needs root and debootstrap.
#
#   docker/base.sh [MIRROR]
set -euo pipefail
image=docker.io/library/debian:bookworm-slim
mirror=${1:-http://deb.debian.org/debian}

podman=$(cd "$(dirname "$0")" && pwd)/podman.sh
if "$podman" image exists "$image"; then
  echo "$image is there already" >&2
  exit
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
debootstrap --variant=minbase bookworm "$folder/root" "$mirror" >&2
cd "$folder/root"
cat >etc/apt/sources.list <<END
deb $mirror bookworm main
deb $mirror bookworm-updates main
deb ${mirror%/}-security bookworm-security main
END
find usr/share/doc -type f ! -name copyright -delete
find usr/share/doc -type l -delete
find usr/share/doc -type d -empty -delete
rm -rf usr/share/{groff,info,linda,lintian,locale,man}/* var/lib/apt/lists/* var/cache/apt/* var/log/*
mkdir -p etc/dpkg/dpkg.cfg.d
printf 'path-exclude /usr/share/%s/*\n' groff info linda lintian locale man doc >etc/dpkg/dpkg.cfg.d/slim
echo 'path-include /usr/share/doc/*/copyright' >>etc/dpkg/dpkg.cfg.d/slim
tar --create --numeric-owner --directory "$folder/root" . | "$podman" import --message 'debootstrap minbase bookworm' - "$image"
