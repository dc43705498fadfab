#!/usr/bin/env bash
# From a bare machine to an evaluated model: sets up, builds, makes a small shop, trains on two
# ranks, prints metrics.
#
# usage: launch/quickstart.sh [--events FILE...] [--out DIR]
#
#   --events FILE...  your own events (CSV, .csv.gz or parquet with the REES46 columns) instead of a
#                     synthetic shop
#   --out DIR         output folder (default: runs/quickstart); replaced if a quickstart wrote it
#
# Exit codes: those of launch/setup.sh and of `bireme` (0 done; 1 failed; 2 refused before
# starting).
set -euo pipefail
caller=$PWD
cd "$(dirname "$0")/.."

# The synthetic shop, and how many of its days (or of the given events) are used.
EVENTS=400000 ITEMS=1000 SHOP_DAYS=4 SEED=7
MOST_DAYS=5
RANKS=2

say() { echo "quickstart: $*" >&2; }
refuse() { say "$@"; exit 2; }

events=() out=runs/quickstart
while [ $# -gt 0 ]; do
    case $1 in
        --events)
            shift
            while [ $# -gt 0 ] && [[ $1 != --* ]]; do
                file=$(cd "$caller" && realpath "$1")
                [ -f "$file" ] || refuse "file \`$1\` does not exist"
                events+=("$file")
                shift
            done
            [ ${#events[@]} -gt 0 ] || refuse "\`--events\` needs at least one file"
            ;;
        --out)
            [ $# -ge 2 ] || refuse "\`--out\` needs a folder"
            out=$(cd "$caller" && realpath -m "$2")
            shift 2
            ;;
        -h | --help) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0"; exit 0 ;;
        *) refuse "unknown argument \`$1\` (see \`launch/quickstart.sh --help\`)" ;;
    esac
done
if [ -e "$out" ] && [ ! -e "$out/.quickstart" ] && [ -n "$(ls -A "$out" 2>/dev/null || echo file)" ]; then
    refuse "\`$out\` exists and no quickstart wrote it: choose another folder with \`--out DIR\`"
fi
for file in "${events[@]}"; do
    [[ $file != "$(realpath -m "$out")"/* ]] ||
        refuse "\`$file\` is in \`$out\`, which the quickstart replaces"
done

launch/setup.sh
. launch/env.sh oversubscribe

SECONDS=0
cargo build
build_seconds=$SECONDS

SECONDS=0
bireme=${CARGO_TARGET_DIR:-target}/debug/bireme
rm -rf "$out"
mkdir -p "$out"
touch "$out/.quickstart"

if [ ${#events[@]} -eq 0 ]; then
    say "generating a synthetic shop of $EVENTS events, $ITEMS items, $SHOP_DAYS days"
    events=("$out/events.csv")
    "$bireme" synth --events $EVENTS --items $ITEMS --days $SHOP_DAYS --seed $SEED --out "$out/events.csv"
fi

say "preprocessing events to sessions"
"$bireme" preprocess --events "${events[@]}" --out "$out/data"

first_day=$(find "$out/data/sessions_by_day" -mindepth 1 -maxdepth 1 -printf '%f\n' | sort -n | head -n 1)
last_day=$first_day
while [ $((last_day - first_day + 1)) -lt $MOST_DAYS ] && [ -d "$out/data/sessions_by_day/$((last_day + 1))" ]; do
    last_day=$((last_day + 1))
done
[ "$last_day" -gt "$first_day" ] ||
    refuse "the events have only day $first_day; a run needs a day to train on and a day to evaluate"

models=(quickstart popularity recent markov vsknn loglinear)
for model in "${models[@]}"; do
    say "training configs/$model.toml on $RANKS ranks, days $first_day to $((last_day - 1))"
    mpirun -np $RANKS --bind-to none "$bireme" train --config "configs/$model.toml" \
        --data "$out/data" --run-dir "$out/$model" \
        --set "data.first_day=$first_day" --set "data.last_day=$last_day"
done

"$bireme" report "${models[@]/#/$out/}" --out "$out/report" --overwrite >/dev/null
echo
python3 - "$out" "${models[@]}" <<'PYTHON'
"""Prints the evaluations in each run's metrics.jsonl as one table."""
import json
import sys

out, *models = sys.argv[1:]
columns = [("recall_at_10", "Recall@10"), ("recall_at_20", "Recall@20"), ("ndcg_at_10", "NDCG@10"),
           ("ndcg_at_20", "NDCG@20"), ("mrr_at_20", "MRR@20")]
evaluations = []
for model in models:
    with open(f"{out}/{model}/metrics.jsonl", encoding="utf-8") as lines:
        evaluations += [(model, record) for record in map(json.loads, lines) if record["kind"] == "eval"]
evaluations.sort(key=lambda evaluation: evaluation[1]["eval_day"])
print(f"{'trained to day':>14}  {'evaluated on':>12}  {'sessions':>8}  {'configuration':<13}",
      *(f"{title:>9}" for _, title in columns))
for model, record in evaluations:
    print(f"{record['train_day']:>14}  {'day ' + str(record['eval_day']):>12}  {record['n_sessions']:>8}  {model:<13}",
          *(f"{record[key]:>9.4f}" for key, _ in columns))
PYTHON
cat <<END

sessions by day   $out/data/sessions_by_day
fitted workflow   $out/data/workflow
runs              $out/{$(IFS=,; echo "${models[*]}")}: metrics.jsonl, results.txt, checkpoints
report            $out/report/index.html: tables with intervals, charts, learning curves
build             $build_seconds s
after the build   $SECONDS s
END
