"""What `run.reduction = "reproducible"` costs beside `fast`.

    . launch/env.sh oversubscribe
    python benches/reduction.py DATA CONFIG... [--ranks 1 2] [--runs 3] [--steps 60]

Trains on day 1 of DATA for so many steps, by turns in both modes, a thread for each rank, and prints sessions a second as a
table of Markdown: medians, their ratio, and the smallest and largest ratio of a pair.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
from pathlib import Path


def sessions_per_s(options, config, ranks, reduction):
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        sets = [f"run.reduction={reduction}", "run.threads_per_rank=1", "data.last_day=2", f"train.max_steps_per_day={options.steps}"]
        command = ["mpirun", "--bind-to", "none", "-np", str(ranks), options.bireme, "train", "--config", config]
        command += ["--data", options.data, "--run-dir", run, *(word for assignment in sets for word in ("--set", assignment))]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        return next(record["sessions_per_s"] for record in records if record["kind"] == "day")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("configs", type=Path, nargs="+")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--bireme", default="target/release/bireme")
    options = parser.parse_args()
    print("| | ranks | fast | reproducible | of it |\n| --- | ---: | ---: | ---: | ---: |")
    for config in options.configs:
        for ranks in options.ranks:
            pairs = [
                [sessions_per_s(options, config, ranks, reduction) for reduction in ("fast", "reproducible")]
                for _ in range(options.runs)
            ]
            fast, exact = (statistics.median(rates) for rates in zip(*pairs))
            shares = sorted(exact / fast for fast, exact in pairs)
            print(f"| {config.parent.name}/{config.stem} | {ranks} | {fast:,.0f} | {exact:,.0f} | {exact / fast:.0%} ({shares[0]:.0%} to {shares[-1]:.0%}) |", flush=True)


if __name__ == "__main__":
    main()
