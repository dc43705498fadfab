"""Quality against time of the losses for large catalogues, beside the softmax over all of it.

    python benches/losses.py DATA CONFIG [--runs 1] [--set train.epochs_per_day=3]

Trains CONFIG on the first day of DATA with each loss, on all cores, evaluates it on the next day's
valid sessions, and prints a table of Markdown: seconds of training, sessions a second, Recall@20
and NDCG@20 over the whole catalogue. Medians, where there are several runs; they go by turns, each
with a seed of its own.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from pairs import train_command

LOSSES = {
    "softmax over all": ['train.loss={ kind = "softmax" }'],
    "softmax over all, bf16": ['train.loss={ kind = "softmax" }', "run.precision=bf16"],
    "sampled softmax, 512 items": [
        'train.loss={ kind = "sampled", n_negatives = 512, power = 1.0 }'
    ],
    "sampled softmax, 4096 items": [
        'train.loss={ kind = "sampled", n_negatives = 4096, power = 1.0 }'
    ],
    "gBCE, 512 items": ['train.loss={ kind = "gbce", n_negatives = 512 }'],
    "gBCE, 4096 items": ['train.loss={ kind = "gbce", n_negatives = 4096 }'],
}


def train(options, loss, seed):
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        sets = ["data.last_day=2", f"run.seed={seed}", *loss, *options.set]
        subprocess.run(
            train_command(options.bireme, options.config, options.data, run, sets),
            check=True,
            stderr=subprocess.DEVNULL,
        )
        records = {
            record["kind"]: record
            for record in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        }
        day, evaluated = records["day"], records["eval"]
        return (
            day["seconds"],
            day["sessions_per_s"],
            evaluated["recall_at_20"],
            evaluated["ndcg_at_20"],
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("config", type=Path)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], help="of `bireme train`")
    parser.add_argument("--bireme", default="target/release/bireme")
    options = parser.parse_args()
    runs = {name: [] for name in LOSSES}
    for seed in range(1, options.runs + 1):
        for name, loss in LOSSES.items():
            runs[name].append(train(options, loss, seed))
            print(seed, name, *runs[name][-1], file=sys.stderr, flush=True)
    print("| | s | sessions/s | Recall@20 | NDCG@20 |\n| --- | ---: | ---: | ---: | ---: |")
    for name, of in runs.items():
        seconds, rate, recall, ndcg = (statistics.median(figures) for figures in zip(*of))
        print(f"| {name} | {seconds:.0f} | {rate:,.0f} | {recall:.4f} | {ndcg:.4f} |")


if __name__ == "__main__":
    main()
