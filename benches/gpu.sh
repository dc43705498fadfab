#!/usr/bin/env bash
# Checks whether training on a GPU is right, and times it, on a host with one GPU and PyTorch.
#
# usage: benches/gpu.sh pack FOLDER       on the build host: packs all that the GPU host lacks
#        FOLDER/gpu.sh OUT                on the GPU host: runs the pack
#        benches/gpu.sh OUT               on a GPU host where this checkout is built
#        benches/gpu.sh --rehearse OUT    without a GPU: all stages with small sizes on the fake
#                                         CUDA runtime; numbers mean nothing
#
#   BIREME_BIN=FILE          this binary, instead of target/release/bireme or target/debug/bireme
#   BIREME_TESTS=FILE        this test binary, instead of the newest `it` beside the binary
#   BIREME_PYTORCH=FILE      a Python with PyTorch, NumPy and pyarrow (default: python3)
#   BIREME_GPU_SECONDS=N     time for all stages (default: 570)
#   FAKE_CUDA=FOLDER         the fake CUDA runtime of tests/fake_cuda/install.sh (default:
#                            .fake_cuda)
#
# Stages, in this order; from data to sanitize at the same time:
#
#   stack              driver, versions, `bireme doctor`
#   data               sessions over 10k, 100k, 390k and 1M items
#   parity             the tests of CUDA and NCCL
#   graph              losses and weights of the captured step beside the eager step
#   kernels, sanitize  the project's kernels against f64; compute-sanitizer
#   steps              times of steps beside eager PyTorch
#   compile            PyTorch with torch.compile
#   speed, head        the project's kernels and the head alone; ceilings
#   ncu                counters of kernels
#   phases             phases of eager steps
#
# OUT/results.jsonl has a line for each figure, written at once; OUT/summary.txt is the table that
# is printed last; OUT/log.txt is the output of all stages. A stage that fails or exceeds its time
# stops no other. Exit codes: 0 all stages ended well or were skipped; 1 a stage failed; 2 refused
# before starting.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
total=${BIREME_GPU_SECONDS:-570}

usage() {
    sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2
    exit 2
}
refuse() {
    echo "gpu.sh: $*" >&2
    exit 2
}

action=run
case ${1:-} in
    pack) action=pack; shift ;;
    --rehearse) action=rehearse; shift ;;
esac
out=${1:-}
case $out in
    "" | -*) usage ;;
esac
[ $# -eq 1 ] || usage

# --- On the GPU host: unpack and start the script in there ---

if [ -e "$here/bireme-gpu.tar.xz" ]; then
    [ $action != pack ] || refuse "\`$here\` is packed already"
    unpacked=$(mktemp -d "${TMPDIR:-/tmp}/bireme-gpu.XXXXXX")
    trap 'rm -rf "$unpacked"' EXIT
    if command -v xz >/dev/null; then
        tar -C "$unpacked" -xJf "$here/bireme-gpu.tar.xz"
    else
        python3 -m tarfile -e "$here/bireme-gpu.tar.xz" "$unpacked"
    fi
    arguments=("$out")
    [ $action = run ] || arguments=(--rehearse "$out")
    code=0
    BIREME_GPU_SECONDS=$((total - SECONDS)) "$unpacked/benches/gpu.sh" "${arguments[@]}" || code=$?
    exit $code
fi

root=$(dirname "$here")
bundle=$root/bundle

if [ ! -e "$bundle" ]; then
    bin=${BIREME_BIN:-$root/target/release/bireme}
    [ -n "${BIREME_BIN:-}" ] || [ -x "$bin" ] || bin=$root/target/debug/bireme
    [ -x "$bin" ] || refuse "there is no \`$bin\`: run \`launch/setup.sh && cargo build --release\`"
    tests=${BIREME_TESTS:-}
    if [ -z "$tests" ]; then
        for file in "$(dirname "$bin")"/deps/it-*; do
            [ -x "$file" ] || continue
            [ -n "$tests" ] && [ "$file" -ot "$tests" ] || tests=$file
        done
    fi
fi

# --- On the build host: pack ---

pack() {
    [ ! -e "$bundle" ] || refuse "this is a pack already"
    [ ! -e "$out" ] || refuse "\`$out\` exists: choose another folder"
    local scratch
    scratch=$(mktemp -d "${TMPDIR:-/tmp}/bireme-gpu.XXXXXX")
    # shellcheck disable=SC2064
    trap "rm -rf '$scratch'" EXIT
    mkdir -p "$scratch"/{alone,pack/src/kernels,pack/tests}
    # A copy without the backend for Triton beside it, which is not needed.
    cp "$bin" "$scratch/alone/bireme"
    BIREME_BIN=$scratch/alone/bireme "$root/launch/bundle.sh" "$scratch/pack/bundle" 2>/dev/null
    if [ -n "$tests" ]; then
        strip --strip-unneeded -o "$scratch/pack/bundle/bin/it" "$tests"
        # The tests start the binary of the profile that they were built in.
        echo "$root/target/$(basename "$(dirname "$(dirname "$tests")")")/bireme" \
            >"$scratch/pack/tests/program"
    else
        echo "gpu.sh: the test binary is missing: run \`cargo test --no-run\` to pack it" >&2
    fi
    cp -r "$root/configs" "$root/benches" "$scratch/pack/"
    cp -r "$root/src/kernels/cuda" "$scratch/pack/src/kernels/"
    cp -r "$root/tests/fake_cuda" "$scratch/pack/tests/"
    rm -rf "$scratch/pack/benches/runs"
    find "$scratch/pack" -name __pycache__ -prune -exec rm -rf {} +
    mkdir -p "$out"
    # Both binaries fit into the dictionary, so that the code they share is packed once.
    tar -C "$scratch/pack" --sort=name -cf - . |
        xz --threads=1 --x86 --lzma2=preset=6,dict=160MiB >"$out/bireme-gpu.tar.xz"
    cp "$here/gpu.sh" "$out/"
    echo "gpu.sh: $(du -sh "$scratch/pack" | cut -f1) packed into" \
        "$(du -sh "$out" | cut -f1) in \`$out\`; start \`$out/gpu.sh OUT\` on the GPU host" >&2
    [ "$(du -sm "$out" | cut -f1)" -le 64 ] || echo "gpu.sh: that is more than 64 MiB" >&2
}
if [ $action = pack ]; then
    pack
    exit
fi

# --- Run ---

python=${BIREME_PYTORCH:-python3}
"$python" -c 'import numpy' 2>/dev/null ||
    refuse "\`$python\` has no NumPy:" \
        "set BIREME_PYTORCH to a Python with PyTorch, NumPy and pyarrow"
torch=$("$python" -c 'import importlib.util as util
found = util.find_spec("torch")
print(found.submodule_search_locations[0] if found else "")')

mkdir -p "$out"
out=$(cd "$out" && pwd)
results=$out/results.jsonl
log=$out/log.txt
: >"$results"
: >"$log"
work=$(mktemp -d "${TMPDIR:-/tmp}/bireme-gpu-work.XXXXXX")
linked=
# The link is removed only if this script made it.
trap 'rm -rf "$work"; [ -z "$linked" ] || rm -f "$linked"' EXIT
export PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1

runner=() small=() rehearse=()
if [ $action = rehearse ]; then
    installed=${FAKE_CUDA:-$root/.fake_cuda}
    [ -e "$installed/STAMP" ] || refuse "the fake CUDA runtime is not in \`$installed\`:" \
        "run tests/fake_cuda/install.sh, or set FAKE_CUDA"
    export FAKE_CUDA=$work/fake
    mkdir -p "$FAKE_CUDA/torch"
    cp "$installed/STAMP" "$FAKE_CUDA/"
    if [ -n "$torch" ]; then
        # PyTorch needs functions that libtorch alone does not.
        ln -s "$torch/lib" "$FAKE_CUDA/torch/lib"
        "$python" "$root/tests/fake_cuda/build.py" "$torch/lib" "$installed/include" \
            "$FAKE_CUDA/lib" >>"$log"
    else
        ln -s "$(realpath "$installed/torch/lib")" "$FAKE_CUDA/torch/lib"
        cp -r "$installed/lib" "$FAKE_CUDA/lib"
    fi
    "$python" "$root/tests/fake_cuda/emulate.py" "$root/src/kernels/cuda" "$FAKE_CUDA/lib" >>"$log"
    runner=("$root/tests/fake_cuda/run.sh") small=(--small) rehearse=(--rehearse)
fi

libtorch=${BIREME_LIBTORCH:-$torch}
if [ -e "$bundle" ]; then
    [ -e "$libtorch/lib/libtorch_cpu.so" ] || refuse "there is no PyTorch in \`$python\`:" \
        "set BIREME_PYTORCH, or BIREME_LIBTORCH to a folder with lib/libtorch_cpu.so"
    export BIREME_LIBTORCH=$libtorch
    bireme=$bundle/bireme mpirun=$bundle/mpirun tests=
    if [ -x "$bundle/bin/it" ]; then
        tests=$work/it
        printf '#!/usr/bin/env bash\n. "%s/env.sh"\nexec "%s/bin/it" "$@"\n' "$bundle" "$bundle" \
            >"$tests"
        chmod +x "$tests"
        program=$(cat "$root/tests/program")
        if [ ! -e "$program" ] && mkdir -p "$(dirname "$program")"; then
            linked=$program
            ln -sfn "$bundle/bin/bireme" "$program"
        fi
    fi
else
    # shellcheck source-path=SCRIPTDIR source=../launch/env.sh
    . "$root/launch/env.sh" oversubscribe
    bireme=$bin mpirun=mpirun
    # The build's own libtorch may lack CUDA's libraries.
    [ $action != rehearse ] || [ -z "$torch" ] || export LD_LIBRARY_PATH=$torch/lib
fi

note() { # note STAGE STATE SECONDS
    printf '{"stage": "%s", "kind": "stage", "state": "%s", "seconds": %d}\n' "$@" >>"$results"
    echo "gpu.sh: $1: $2, $3 s" >&2
}
failed=$work/failed
run_stage() { # run_stage NAME LIMIT COMMAND...: at most LIMIT seconds of what is left
    local name=$1 limit=$2 left=$((total - SECONDS - 5)) start=$SECONDS code=0 state=ok
    shift 2
    if [ $left -lt 8 ]; then
        note "$name" "skipped: no time is left" 0
        return
    fi
    [ "$limit" -le $left ] || limit=$left
    echo "=== $name: at most $limit s" >>"$log"
    timeout -k 10 "$limit" ${runner[@]+"${runner[@]}"} "$@" >>"$log" 2>&1 </dev/null || code=$?
    if [ $code -eq 124 ] || [ $code -eq 137 ]; then
        state="stopped at its limit"
    elif [ $code -ne 0 ]; then
        state="failed ($code)"
    fi
    [ $code -eq 0 ] || echo "$name" >>"$failed"
    note "$name" "$state" $((SECONDS - start))
}
train() { # train STAGE LIMIT
    run_stage "$1" "$2" "$python" "$root/benches/gpu/stages.py" "$1" --root "$root" --work "$work" \
        --out "$out" --bireme "$bireme" --mpirun "$mpirun" ${tests:+--tests "$tests"} \
        ${rehearse[@]+"${rehearse[@]}"}
}
kernels() { # kernels STAGE COMMAND LIMIT
    run_stage "$1" "$3" "$python" "$root/benches/gpu/kernels.py" "$2" --root "$root" --out "$out" \
        --stage "$1" ${small[@]+"${small[@]}"}
}
with_torch() { # with_torch STAGE COMMAND...
    if [ -n "$torch" ]; then
        "${@:2}"
    else
        note "$1" "skipped: there is no PyTorch" 0
    fi
}

train stack 40
# Stages without timing run side by side.
train data 100 &
train parity 130 &
train graph 120 &
{ kernels kernels check 50; train sanitize 80; } &
wait
train steps 200
with_torch compile train compile 110
kernels speed speed 25
with_torch head kernels head head 50
with_torch ncu train ncu 45
train phases 40

"$python" "$root/benches/gpu/summary.py" "$results" | tee "$out/summary.txt"
[ ! -e "$failed" ]
