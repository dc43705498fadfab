#!/usr/bin/env bash
# Runs `bireme` on this machine: one rank for each GPU, or for each core where there is none.
#
# usage: launch/local.sh train --config configs/gru.toml --data DIR --run-dir RUN [--set key=value]...
#
#   BIREME_RANKS=N   this many ranks instead
#   BIREME_BIN=FILE  this binary instead of the newest under target/
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
. "$root/launch/env.sh" oversubscribe

bin=${BIREME_BIN:-$root/target/release/bireme}
if [ -z "${BIREME_BIN:-}" ] && [ "$root/target/debug/bireme" -nt "$bin" ]; then
    bin=$root/target/debug/bireme
fi
if [ ! -x "$bin" ]; then
    echo "local.sh: there is no \`bireme\` yet: run \`launch/setup.sh && cargo build --release\`" >&2
    exit 2
fi

ranks=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ') || ranks=$(nproc)
# Not bound to single cores: a rank's loader and its math libraries have threads of their own.
exec mpirun -np "${BIREME_RANKS:-$ranks}" --bind-to none "$bin" "$@"
