# shellcheck shell=bash
# The environment that Open MPI needs on a plain machine. Source it: `. launch/env.sh [oversubscribe]`
#
# With `oversubscribe` there may be more ranks than cores. Open MPI 4 reads OMPI_MCA_*, Open MPI 5
# PRTE_MCA_*.

if [ "$(id -u)" = 0 ]; then # as in containers, where Open MPI asks twice for permission
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi
if [ "${1:-}" = oversubscribe ]; then
    export OMPI_MCA_rmaps_base_oversubscribe=1 PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe
fi
