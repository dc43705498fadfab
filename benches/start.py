"""How long `bireme` takes to start.

    python benches/start.py DATA CONFIG... [--runs 5]

Prints milliseconds as a table of Markdown, medians and in brackets the least and the most: of
`bireme --help`, and from launch until the first step of training is written down, of every CONFIG.
"""

import argparse
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from pairs import train_command


def help_ms(options):
    began = time.perf_counter()
    subprocess.run([options.bireme, "--help"], check=True, stdout=subprocess.DEVNULL)
    return (time.perf_counter() - began) * 1000


def first_step_ms(options, config):
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        sets = ["data.last_day=2", "train.max_steps_per_day=2", "train.log_every_steps=1"]
        command = train_command(options.bireme, config, options.data, run, sets)
        began = time.perf_counter()
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        records = run / "metrics.jsonl"
        while not (records.exists() and '"kind":"step"' in records.read_text()):
            if process.poll():
                raise SystemExit(f"failed: {command}")
            time.sleep(0.005)
        took = (time.perf_counter() - began) * 1000
        process.wait()
        return took


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("configs", type=Path, nargs="+")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--bireme", default="target/release/bireme")
    options = parser.parse_args()
    ways = {"--help": lambda: help_ms(options)}
    ways |= {
        config.stem: lambda config=config: first_step_ms(options, config)
        for config in options.configs
    }
    print("| | ms |\n| --- | ---: |")
    for name, way in ways.items():
        took = sorted(way() for _ in range(options.runs))
        print(
            f"| {name} | {statistics.median(took):,.0f} ({took[0]:,.0f} to {took[-1]:,.0f}) |",
            flush=True,
        )


if __name__ == "__main__":
    main()
