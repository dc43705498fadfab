#!/usr/bin/env bash
# Sets up what is missing, then runs every test of the workspace.
#
# usage: launch/test.sh [arguments of `cargo test`]
#
#   launch/test.sh                      all
#   launch/test.sh collective           those with `collective` in their name
#   REQUIRE_MPI=1 launch/test.sh        tests that need several processes fail instead of being skipped
#   REQUIRE_TRITON=1 launch/test.sh     the same for tests that need Triton Inference Server
#   REQUIRE_FAKE_CUDA=1 launch/test.sh  the same for tests of the CUDA path on a fake CUDA runtime
#   REQUIRE_SLURM=1 launch/test.sh      and for those that need Slurm, which is then installed from apt-get; as root
#   REQUIRE_BARE_ROOT=1 launch/test.sh  the same with debootstrap
#
# The last line is `N passed, N failed, N skipped`, after a line with the reason of each skipped
# test.
# Exit codes: those of launch/setup.sh and of `cargo test` (0 all passed).
set -euo pipefail
cd "$(dirname "$0")/.."

launch/setup.sh
. launch/env.sh oversubscribe
if ! tests/serving/install.sh; then
    [ -z "${REQUIRE_TRITON:-}" ] || exit 1
    echo "tests of serving will be skipped" >&2
fi
if ! tests/fake_cuda/install.sh; then
    [ -z "${REQUIRE_FAKE_CUDA:-}" ] || exit 1
    echo "tests of the CUDA path will be skipped" >&2
fi
[ -z "${REQUIRE_SLURM:-}" ] || tests/slurm/cluster.sh install
[ -z "${REQUIRE_BARE_ROOT:-}" ] || tests/bare_root.sh install
# Libraries that a server loads are built by this alone.
cargo build --workspace --quiet

cargo_args=() harness_args=(--show-output)
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    cargo_args+=("$1")
    shift
done
[ $# -eq 0 ] || harness_args+=("${@:2}")

# Under `nohup` and in the background, SIGHUP and SIGINT are ignored, and so they would be by the
# programs whose reaction to them is tested.
signals=()
! env --default-signal=HUP true 2>/dev/null || signals=(env --default-signal=HUP,INT,QUIT)

# `pipefail` makes cargo's exit code that of this script; the counts are printed in any case.
"${signals[@]}" cargo test --workspace --no-fail-fast "${cargo_args[@]}" -- "${harness_args[@]}" </dev/null | python3 launch/tally.py
