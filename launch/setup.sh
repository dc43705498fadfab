#!/usr/bin/env bash
# Installs what the build needs and is missing, and nothing else. Run it as often as you like.
#
# usage: launch/setup.sh [--cuda]
#
#   Open MPI's development files, libclang and a C++ compiler come from apt-get (with sudo when not root).
#   libtorch comes from the `torch` wheel into `.libtorch/`; without an NVIDIA driver only its CPU libraries do.
#   --cuda                 take the CUDA libraries too, as on a login node that builds for nodes with GPUs
#   BIREME_LIBTORCH=/path  use the libtorch in /path (a folder with lib/ and include/) instead
#
# Exit codes: 0 all is there; 1 something failed; 2 refused before starting, with the command that
# helps.
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH=2.11.0 # the release that the `tch` in Cargo.toml binds
CPU_SIZE="544 MB to download, 540 MB on disk" CPU_PEAK_MB=1200
CUDA_SIZE="2.5 GB to download, 3.7 GB on disk" CUDA_PEAK_MB=4800

say() { echo "setup: $*" >&2; }
refuse() { say "$@"; exit 2; }

cuda=no
case "${1:-}" in
    "") ;;
    --cuda) cuda=yes ;;
    -h | --help) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0"; exit 0 ;;
    *) refuse "unknown argument \`$1\` (see \`launch/setup.sh --help\`)" ;;
esac

# --- What is missing? Nothing is changed up to "What will be done". ---

[ "$(uname -sm)" = "Linux x86_64" ] || refuse "libtorch $TORCH is fetched for x86-64 Linux, and this is $(uname -sm)"

wanted_rust=$(sed -n 's/^rust-version *= *"\(.*\)"/\1/p' Cargo.toml)
rust_hint="hint: \`rustup update stable\`, or install Rust with rustup; then make sure that \`cargo\` is on the PATH"
rust=$(rustc --version 2>/dev/null | cut -d' ' -f2) || true
if [ -z "$rust" ] || ! command -v cargo >/dev/null; then
    refuse "\`cargo\` is missing: Rust $wanted_rust or newer is needed
$rust_hint"
fi
[ "$(printf '%s\n' "$wanted_rust" "$rust" | sort -V | head -n 1)" = "$wanted_rust" ] ||
    refuse "Rust $rust is too old: $wanted_rust or newer is needed
$rust_hint"

has_driver() {
    [ -e /proc/driver/nvidia/version ] || command -v nvidia-smi >/dev/null ||
        PATH="$PATH:/sbin" ldconfig -p 2>/dev/null | grep -q 'libcuda\.so\.1'
}

# bindgen wants the library and, beside it, the compiler's own headers (stddef.h).
has_libclang() {
    local dir
    for dir in "${LIBCLANG_PATH:-}" /usr/lib/llvm-*/lib /usr/lib64 /usr/lib/x86_64-linux-gnu /usr/local/lib; do
        compgen -G "$dir/libclang*.so*" >/dev/null && compgen -G "$dir/clang/*/include/stddef.h" >/dev/null && return
    done
    return 1
}

version_of() { # the version of the libtorch in folder $1
    local header
    for header in "$1"/include/torch/headeronly/version.h "$1"/include/torch/csrc/api/include/torch/version.h; do
        [ -e "$header" ] || continue
        sed -n 's/^#define TORCH_VERSION_\(MAJOR\|MINOR\|PATCH\) \([0-9]*\)$/\2/p' "$header" | paste -sd.
        return
    done
}

in_place() { # does .libtorch hold what stamp $1 says?
    [ "$(cat .libtorch/VERSION 2>/dev/null)" = "$1" ] && [ -e .libtorch/torch/lib/libtorch_cpu.so ]
}

libtorch=nothing # to be done: nothing, link, cpu or cuda
if [ -n "${BIREME_LIBTORCH:-}" ]; then
    [ -d "$BIREME_LIBTORCH" ] || refuse "BIREME_LIBTORCH: there is no folder \`$BIREME_LIBTORCH\`"
    given=$(realpath "$BIREME_LIBTORCH")
    for part in lib/libtorch_cpu.so include/torch; do
        [ -e "$given/$part" ] || refuse "BIREME_LIBTORCH: \`$given\` is no libtorch: it has no \`$part\`"
    done
    found=$(version_of "$given")
    [ "$found" = "$TORCH" ] ||
        refuse "BIREME_LIBTORCH: \`$given\` holds libtorch ${found:-of an unknown version}, and $TORCH is needed"
    if ! in_place "$TORCH linked" || [ "$(realpath .libtorch/torch)" != "$given" ]; then
        libtorch="link"
    fi
elif ! in_place "$TORCH cuda" && ! in_place "$TORCH linked"; then
    if [ $cuda = yes ] || has_driver; then
        libtorch=cuda
    elif ! in_place "$TORCH cpu"; then
        libtorch=cpu
    fi
fi

packages=()
command -v mpicc >/dev/null && command -v mpirun >/dev/null || packages+=(libopenmpi-dev openmpi-bin)
has_libclang || packages+=(libclang-dev)
command -v c++ >/dev/null && command -v cc >/dev/null || packages+=(g++)
command -v python3 >/dev/null || packages+=(python3)
if [ $libtorch = cpu ] || [ $libtorch = cuda ]; then
    python3 -m pip --version >/dev/null 2>&1 || packages+=(python3-pip)
    peak=$CPU_PEAK_MB
    [ $libtorch = cpu ] || peak=$CUDA_PEAK_MB
    free=$(df -Pm "$(realpath -e .libtorch 2>/dev/null || pwd)" | awk 'NR == 2 { print $4 }')
    [ "$free" -ge "$peak" ] || refuse "unpacking libtorch needs $peak MB in \`$PWD/.libtorch\`, and $free MB are free there"
fi

if [ ${#packages[@]} -gt 0 ]; then
    command -v apt-get >/dev/null || refuse "missing: the equivalent of Debian's packages ${packages[*]}; \
there is no apt-get here: install them with this system's package manager, or load the cluster's modules"
    install=(apt-get install -y --no-install-recommends "${packages[@]}")
    as_root=()
    if [ "$(id -u)" != 0 ]; then
        as_root=(sudo)
        sudo -n true 2>/dev/null || refuse "packages are missing, and installing them needs a password; run this, then start again:
  sudo apt-get update && sudo ${install[*]}"
    fi
fi

if [ ${#packages[@]} -eq 0 ] && [ $libtorch = nothing ]; then
    say "all is there: libtorch $(cat .libtorch/VERSION), $(mpirun --version 2>/dev/null | head -n 1)"
    exit 0
fi

# --- What will be done, how big it is, then the doing. ---

if [ ${#packages[@]} -gt 0 ]; then
    say "refreshing apt's package lists"
    "${as_root[@]}" apt-get update -q >/dev/null || say "\`apt-get update\` failed; trying with the lists that are there"
    size=$("${as_root[@]}" env LC_ALL=C apt-get install --assume-no --no-install-recommends "${packages[@]}" 2>/dev/null |
        grep -E '^(Need to|After)' || true)
    say "to install with apt-get: ${packages[*]}. ${size//$'\n'/ }"
fi
case $libtorch in
    link) say "to use the libtorch in \`$given\`" ;;
    cpu) say "to fetch libtorch $TORCH, CPU libraries only because no NVIDIA driver is here: $CPU_SIZE" ;;
    cuda) say "to fetch libtorch $TORCH with its CUDA libraries: $CUDA_SIZE" ;;
esac

if [ ${#packages[@]} -gt 0 ]; then
    log=$(mktemp)
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive "${install[@]}" >"$log" 2>&1 </dev/null || {
        tail -n 20 "$log" >&2
        say "apt-get failed; the whole of what it said is in $log"
        exit 1
    }
    rm "$log"
    say "installed: ${packages[*]}"
fi

[ $libtorch != nothing ] || exit 0
mkdir -p .libtorch
exec 9>.libtorch/.lock
flock -n 9 || refuse "another setup is at work in this folder"

# Prepared aside, then moved into place; the stamp comes last, so that the next run repairs what an
# interrupted one left.
new=.libtorch/new
rm -rf $new
mkdir -p $new/nvidia
if [ $libtorch = link ]; then
    ln -s "$given" $new/torch
else
    arguments=("$TORCH" "$new")
    [ $libtorch = cpu ] || arguments+=(--cuda)
    python3 launch/libtorch.py "${arguments[@]}" || { rm -rf $new; exit 1; }
fi
rm -rf .libtorch/VERSION .libtorch/torch .libtorch/nvidia
mv $new/torch $new/nvidia .libtorch/
rmdir $new
[ $libtorch != link ] || libtorch=linked
echo "$TORCH $libtorch" >.libtorch/VERSION
say "libtorch $TORCH ($libtorch) is in \`.libtorch\`"
