#!/usr/bin/env bash
# Packs what a host needs that has libtorch and nothing else: a stripped `bireme`, the Open MPI of
# this machine, and the launch scripts. The folder can be moved and copied.
#
# usage: launch/bundle.sh FOLDER
#
#   BIREME_BIN=FILE  this binary instead of target/release/bireme
#
# There, FOLDER/bireme is `bireme` and FOLDER/mpirun is `mpirun`; both find libtorch in
# FOLDER/libtorch, or in the folder that BIREME_LIBTORCH names (with lib/ in it).
# FOLDER/launch/local.sh and slurm.sbatch start the bundle's own.
# Exit codes: 0 done; 1 something failed; 2 refused before starting.
set -euo pipefail

out=${1:-}
case $out in
    "" | -*) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0" >&2; exit 2 ;;
esac
out=${out%/}
root=$(cd "$(dirname "$0")/.." && pwd)
bin=${BIREME_BIN:-$root/target/release/bireme}
[ -x "$bin" ] || { echo "bundle.sh: there is no \`$bin\`: run \`launch/setup.sh && cargo build --release\`" >&2; exit 2; }
[ ! -e "$out" ] || { echo "bundle.sh: \`$out\` exists: choose another folder" >&2; exit 2; }
for program in mpirun ompi_info orted strip; do
    command -v $program >/dev/null || { echo "bundle.sh: there is no \`$program\` in PATH" >&2; exit 2; }
done

# Packed aside, so that a folder of that name is whole.
aside=$out.partial
rm -rf "$aside"
mkdir -p "$aside"/{bin,launch,mpi/{bin,lib,plugins,share,etc}}

path_of() { # path_of KIND: where this Open MPI has it
    ompi_info --path "$1" --parsable | sed 's/.*://'
}
for program in mpirun orted; do
    cp "$(readlink -f "$(command -v $program)")" "$aside/mpi/bin/$program"
done
cp "$(path_of pkglibdir)"/*.so "$aside/mpi/plugins/"
cp -r "$(path_of pkgdatadir)"/. "$aside/mpi/share/"
cp -rL "$(path_of sysconfdir)"/. "$aside/mpi/etc/"
# The texts of PMIx, where it is a library of its own.
pmix=$(ldd "$aside"/mpi/plugins/*.so 2>/dev/null | awk '/libpmix\.so/ && !seen++ { print $3 }')
mkdir "$aside/mpi/pmix"
[ -z "$pmix" ] || find "$(dirname "$pmix")" -maxdepth 4 -path '*pmix*' -name 'help-*.txt' -exec cp {} "$aside/mpi/pmix/" \;

cp "$bin" "$aside/bin/bireme"
cp "$(dirname "$bin")/libtriton_bireme.so" "$aside/bin/" ||
    echo "bundle.sh: \`libtriton_bireme.so\` is missing: the bundle exports with \`--backend-library\` only" >&2
strip --strip-unneeded "$aside"/bin/*

# Libraries of all of these, but for libtorch's and for those that every host with libtorch has.
ldd "$aside"/bin/bireme "$aside"/mpi/bin/* "$aside"/mpi/plugins/*.so 2>/dev/null |
    awk '$2 == "=>" && $3 ~ /^\// { print $3 }' | sort -u |
    grep -vE '/(libc|libm|libdl|librt|libpthread|libresolv|libutil|libstdc\+\+|libgcc_s|ld-linux[^/]*)\.so' |
    grep -vE '/(libtorch|libc10|libgomp|libshm|libmkl|libiomp|libcu|libnv|libnccl)[^/]*$' |
    while read -r library; do
        cp -L "$library" "$aside/mpi/lib/"
    done

cat >"$aside/env.sh" <<'ENV'
# shellcheck shell=bash
# The environment of the bundle. Source it: `. FOLDER/env.sh`
bundle=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
libtorch=${BIREME_LIBTORCH:-$bundle/libtorch}
if [ ! -e "$libtorch/lib/libtorch_cpu.so" ]; then
    echo "bireme: there is no libtorch in \`$libtorch\`: set BIREME_LIBTORCH to a folder with lib/libtorch_cpu.so" >&2
    exit 2
fi
export OPAL_PREFIX=$bundle/mpi OPAL_BINDIR=$bundle/mpi/bin OPAL_LIBDIR=$bundle/mpi/lib
export OPAL_PKGLIBDIR=$bundle/mpi/plugins OPAL_PKGDATADIR=$bundle/mpi/share OPAL_SYSCONFDIR=$bundle/mpi/etc
export PMIX_PKGDATADIR=$bundle/mpi/pmix PMIX_MCA_pcompress_base_silence_warning=1
export LD_LIBRARY_PATH=$bundle/mpi/lib:$libtorch/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export PATH=$bundle:$bundle/mpi/bin:$PATH BIREME_BIN=${BIREME_BIN:-$bundle/bin/bireme}
# Ranks on other hosts are started with the same environment.
export OMPI_MCA_mca_base_env_list="OPAL_PREFIX;OPAL_LIBDIR;OPAL_PKGLIBDIR;OPAL_PKGDATADIR;OPAL_SYSCONFDIR;PMIX_PKGDATADIR;LD_LIBRARY_PATH"
# Open MPI wants a way to other hosts, even where there are none.
command -v ssh >/dev/null || command -v rsh >/dev/null || export OMPI_MCA_plm_rsh_agent=false
if [ "$(id -u)" = 0 ]; then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi
ENV
for program in bireme mpirun; do
    folder=bin
    [ $program = bireme ] || folder=mpi/bin
    cat >"$aside/$program" <<RUN
#!/usr/bin/env bash
. "\$(dirname "\$(readlink -f "\$0")")/env.sh"
exec "\$bundle/$folder/$program" "\$@"
RUN
    chmod +x "$aside/$program"
done
cp "$root"/launch/{env.sh,local.sh,slurm.sbatch,ask.py} "$aside/launch/"
# What the launch scripts source finds the bundle.
printf '\n. "$(dirname "${BASH_SOURCE[0]}")/../env.sh"\n' >>"$aside/launch/env.sh"
cp "$root"/LICENSE* "$aside/" 2>/dev/null || true

mv "$aside" "$out"
echo "bundle.sh: $(du -sh "$out" | cut -f1) in \`$out\`; copy a libtorch to \`$out/libtorch\`, or set BIREME_LIBTORCH" >&2
