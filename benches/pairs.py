"""Two ways to train beside each other, on the same data and cores, by turns.

    . launch/env.sh oversubscribe
    python benches/pairs.py DATA CONFIG... --first RANKS [KEY=VALUE...]
        --second RANKS [KEY=VALUE...] [--runs 3] [--steps 60]

Trains on day 1 of DATA for `--steps` steps, with RANKS ranks and the settings KEY=VALUE. Prints
sessions per second of the median step as a table of Markdown: medians of the runs, their ratio, and
the smallest and largest ratio of a pair.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
from pathlib import Path

WARM_UP = 3


def train_command(bireme, config, data, run_dir, settings):
    """The command of a training with these settings, each `section.key=value`."""
    command = [bireme, "train", "--config", config, "--data", data, "--run-dir", run_dir]
    return command + [word for setting in settings for word in ("--set", setting)]


def sessions_per_s(options, config, ranks, *settings):
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        sets = [
            "data.last_day=2",
            "train.epochs_per_day=1",
            f"train.max_steps_per_day={WARM_UP + options.steps}",
        ]
        sets += ["train.log_every_steps=1", *settings]
        launch = ["mpirun", "--bind-to", "none", "-np", ranks] if ranks != "1" else []
        command = [*launch, *train_command(options.bireme, config, options.data, run, sets)]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        rates = [record["sessions_per_s"] for record in records if record["kind"] == "step"]
        return statistics.median(rates[WARM_UP:])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("configs", type=Path, nargs="+")
    parser.add_argument("--first", nargs="+", required=True, metavar=("RANKS", "KEY=VALUE"))
    parser.add_argument("--second", nargs="+", required=True, metavar=("RANKS", "KEY=VALUE"))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--bireme", default="target/release/bireme")
    options = parser.parse_args()
    print(
        f"| {options.data.name} | {' '.join(options.first)} | {' '.join(options.second)} | share |\n| --- | ---: | ---: | ---: |"
    )
    for config in options.configs:
        pairs = [
            [sessions_per_s(options, config, *way) for way in (options.first, options.second)]
            for _ in range(options.runs)
        ]
        first, second = (statistics.median(rates) for rates in zip(*pairs))
        shares = sorted(second / first for first, second in pairs)
        spread = f"{second / first:.0%} ({shares[0]:.0%} to {shares[-1]:.0%})"
        print(
            f"| {config.parent.name}/{config.stem} | {first:,.0f} | {second:,.0f} | {spread} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
