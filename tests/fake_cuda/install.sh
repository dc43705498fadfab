#!/usr/bin/env bash
# Installs the fake CUDA runtime into `.fake_cuda/`: libtorch's CUDA libraries, CUDA's headers, and
# the libraries of this folder. Run it as often as you like; it does what is missing.
#
# usage: tests/fake_cuda/install.sh
#
#   torch/lib   libtorch's CUDA libraries, and links to its CPU libraries in `.libtorch/`
#   include     CUDA's headers
#   lib         the fakes of NVIDIA's libraries, and the project's kernels on a CPU
#   nvrtc       NVRTC, which compiles the kernels for GPUs
#   DOWNLOAD    the version of torch that was downloaded
#   STAMP       this version, and a digest of the sources of the fakes
#
# Exit codes: 0 all is there; 1 something failed; 2 refused before starting, with the command that
# helps.
set -euo pipefail
cd "$(dirname "$0")/../.."

say() { echo "fake CUDA: $*" >&2; }

TORCH=$(sed -n 's/^TORCH=\([0-9.]*\).*/\1/p' launch/setup.sh)
libtorch=.libtorch/torch/lib
fake=.fake_cuda
here=tests/fake_cuda

digest=$(cat $here/*.c $here/*.h $here/*.py src/kernels/cuda/*.cu $here/install.sh | sha256sum | cut -c 1-16)
stamp="torch $TORCH, sources $digest"
in_place() { [ "$(cat $fake/STAMP 2>/dev/null)" = "$stamp" ] && [ -e $libtorch/libtorch_cpu.so ]; }
! in_place || exit 0

case $(cat .libtorch/VERSION 2>/dev/null) in
    "$TORCH "*) ;;
    *) say "libtorch $TORCH is not in \`.libtorch\`: run launch/setup.sh first"; exit 2 ;;
esac
for tool in cc c++ nm; do
    command -v $tool >/dev/null || { say "\`$tool\` is missing: install g++ and binutils"; exit 2; }
done

mkdir -p $fake
exec 9>$fake/.lock
flock 9
! in_place || exit 0 # another run has done it meanwhile

rm -f $fake/STAMP
if [ "$(cat $fake/DOWNLOAD 2>/dev/null)" != "$TORCH" ]; then
    say "to fetch libtorch $TORCH's CUDA libraries, CUDA's headers and NVRTC: 630 MB to download," \
        "680 MB on disk in \`$fake\`"
    python3 launch/libtorch.py "$TORCH" --fake-cuda $fake
fi
for library in "$libtorch"/*.so*; do
    # Its own CUDA libraries come first.
    link=$fake/torch/lib/$(basename "$library")
    [ -e "$link" ] && [ ! -L "$link" ] || ln -sfn "$(realpath -s "$library")" "$link"
done
log=$fake/build.log
build() {
    python3 -B $here/build.py $fake/torch/lib $fake/include $fake/lib &&
        python3 -B $here/emulate.py src/kernels/cuda $fake/lib
}
build >$log 2>&1 || {
    cat $log >&2
    say "the libraries do not build"
    exit 1
}
echo "$stamp" >$fake/STAMP
say "the fake CUDA runtime for torch $TORCH is in \`$fake\`"
