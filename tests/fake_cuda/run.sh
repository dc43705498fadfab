#!/usr/bin/env bash
# Runs a program on the fake CUDA runtime that install.sh has put into `.fake_cuda/`.
#
# usage: tests/fake_cuda/run.sh PROGRAM [ARGUMENT]...
#        mpirun -np 2 tests/fake_cuda/run.sh PROGRAM [ARGUMENT]...
#
#   FAKE_CUDA=FOLDER                 use the installation in FOLDER
#   FAKE_CUDA_LOG=FILE               write a line per event to FILE, under a launcher to FILE.RANK;
#                                    the columns are described in cudart.c
#   FAKE_CUDA_GPUS=N                 GPUs of the host (default 1); see also CUDA_VISIBLE_DEVICES
#   FAKE_CUDA_READS=memory|made-up   which numbers the host reads, see cudart_memory.c
#   FAKE_CUDA_KERNELS=FILE           the library of emulated kernels, see cuda.c; empty: none
#   FAKE_CUDA_DRIVER_VERSION=N, FAKE_NCCL_VERSION=N
#   FAKE_NCCL_FAULT=FAULT:RANK[:N]   a fault of NCCL, see nccl.c
set -euo pipefail
[ $# -gt 0 ] || { sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0" >&2; exit 2; }

fake=$(realpath "${FAKE_CUDA:-$(dirname "$0")/../../.fake_cuda}")
[ -e "$fake/STAMP" ] || { echo "fake CUDA: run tests/fake_cuda/install.sh first" >&2; exit 2; }
rank=${OMPI_COMM_WORLD_RANK:-${PMIX_RANK:-${SLURM_PROCID:-}}}
if [ -n "${FAKE_CUDA_LOG:-}" ]; then
    export FAKE_CUDA_LOG=$FAKE_CUDA_LOG${rank:+.$rank}
    : >"$FAKE_CUDA_LOG"
fi
# Preloaded libraries come before those that the rpath of libtorch's libraries leads to.
preload=$(printf '%s:' "$fake"/lib/lib*.so.*)
export LD_PRELOAD=${preload%:}
export LD_LIBRARY_PATH=$fake/torch/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
exec "$@"
