#!/usr/bin/env bash
# A bare Debian in a folder, as a host with libtorch's own needs and nothing else: no Open MPI.
# Needs root and debootstrap.
#
# usage: tests/bare_root.sh install  installs debootstrap where it is missing
#        tests/bare_root.sh FOLDER   makes the folder
#
# Exit codes: 0 done; 1 something failed; 2 debootstrap is missing, or this is not root.
set -euo pipefail

if [ "${1:-}" = install ]; then
    command -v debootstrap >/dev/null && exit 0
    apt-get update -q >/dev/null || true
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends debootstrap >/dev/null </dev/null
    exit 0
fi
[ "$(id -u)" = 0 ] || { echo "bare_root.sh: debootstrap needs root" >&2; exit 2; }
command -v debootstrap >/dev/null || { echo "bare_root.sh: there is no \`debootstrap\`" >&2; exit 2; }
# The release of this machine, so that the C library is as old as the build needs.
. /etc/os-release
mirror=$(sed -n 's/^\(deb\|URIs:\) *\(\[[^]]*\] *\)\?\(http[^ ]*\).*/\3/p' /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null | head -n 1 || true)
debootstrap --variant=minbase --include=libstdc++6 "$VERSION_CODENAME" "$1" ${mirror:+"$mirror"} >"$1.log" 2>&1 || {
    tail -n 20 "$1.log" >&2
    exit 1
}
