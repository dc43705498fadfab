#!/usr/bin/env bash
# Fuzzes a target, or keeps the inputs that fuzzing found.
#
# usage: tests/fuzz/run.sh TARGET SECONDS   fuzz `request`, `schema`, `workflow` or `events`
#        tests/fuzz/run.sh TARGET keep      replace the seeds in git by at most 15 that cover as much
#
# corpus.tar.gz holds the seeds of all targets: as files they would be a tenth of the repository's.
# Needs `cargo install cargo-fuzz`. Found inputs wait in tests/fuzz/target/found/TARGET for `keep`,
# and an input that fails is in tests/fuzz/artifacts/TARGET.
# Exit codes: 0 nothing failed; 2 wrong arguments; else that of `cargo fuzz`.
set -euo pipefail
cd "$(dirname "$0")"

if [ $# -ne 2 ] || [ ! -f "bin/$1.rs" ]; then
    echo "usage: tests/fuzz/run.sh request|schema|workflow|events SECONDS|keep" >&2
    exit 2
fi
target=$1 found=target/found/$1 seeds=target/corpus/$1
mkdir -p "$found"
rm -rf target/corpus
tar -C target -xzf corpus.tar.gz

# The targets are safe Rust, in which a sanitizer finds nothing.
fuzz() { # fuzz COMMAND ARGUMENTS...
    local command=$1
    shift
    cargo fuzz "$command" --fuzz-dir . --sanitizer none "$target" "$@"
}

if [ "$2" != keep ]; then
    fuzz run "$found" "$seeds" -- -max_len=4096 -max_total_time="$2"
    exit
fi
find "$found" -type f -exec cp -t "$seeds" {} +
fuzz cmin "$seeds" -- -set_cover_merge=1
# Short inputs say more to a reader.
find "$seeds" -type f -printf '%s %p\n' | sort -n | tail -n +16 | cut -d' ' -f2- | xargs -r rm
# The same seeds make the same bytes.
tar -C target --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner -c corpus | gzip -n9 > corpus.tar.gz
echo "$(find "$seeds" -type f | wc -l) seeds of $target in tests/fuzz/corpus.tar.gz"
