"""Sessions a second of training beside PyTorch, on the same data and cores, by turns.

    # The same for 100000 and 390000 items.
    bireme synth --events 3000000 --items 10000 --days 2 --seed 1 --out events.csv
    bireme preprocess --events events.csv --out 10k
    python benches/training.py 10k 100k 390k [--models gru xlnet xlnet-side] [--runs 3]
        [--steps 20] [--device cuda | --ranks 2]

Trains the tutorial's models for `--steps` steps on day 1: in one process on all cores or on one
GPU, or data-parallel in `--ranks` processes that share the cores (bireme with `mpirun`, PyTorch's
DistributedDataParallel over gloo). Prints a table of Markdown: sessions per second of the median
step, in brackets the smallest and largest median of the runs, and the peak memory in GiB of a
process, or of the GPU, which no other process may use meanwhile. `limit` is bireme's rate relative
to the rate of the matrix products alone, computed from the speed that `bireme doctor` measures:
forward, and twice that backward, over the weights of the body for each event and over the item
table for each target. The Python needs the packages of benches/peers/requirements.txt.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from pairs import train_command

HERE = Path(__file__).parent
CONFIGS = {"gru": "gru", "xlnet": "xlnet", "xlnet-side": "xlnet-side-info"}
WARM_UP = 3

# Numbers in the matrices that every event passes.
BODY = {
    "gru": 64 * 128 + 6 * 128**2 + 128 * 64,
    "xlnet": 64 * 192 + 2 * (4 * 192**2 + 2 * 192 * 768) + 192 * 64,
    "xlnet-side": 197 * 192 + 192**2 + 2 * (4 * 192**2 + 2 * 192 * 768) + 192 * 64,
}
WIDTH = 64


class Gpu:
    """GiB in use on the GPU at most, while the context lasts."""

    def __enter__(self):
        self.peak, self.done = 0, threading.Event()
        self.watcher = threading.Thread(target=self.watch)
        self.watcher.start()
        return self

    def watch(self):
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while not self.done.wait(0.2):
            mib = subprocess.run(
                query, check=True, stdout=subprocess.PIPE, text=True
            ).stdout.split()[0]
            self.peak = max(self.peak, int(mib) / 1024)

    def __exit__(self, *_):
        self.done.set()
        self.watcher.join()


def bireme(options, data, model):
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        steps = WARM_UP + options.steps
        sets = [
            "data.last_day=2",
            "train.epochs_per_day=1",
            f"train.max_steps_per_day={steps}",
            "train.log_every_steps=1",
        ]
        sets += (
            [f"train.global_batch={options.batch}", f"train.micro_batch={min(options.batch, 512)}"]
            if options.batch != 256
            else []
        )
        sets += (
            [f"run.device={options.device}"] + ["run.precision=tf32"] * options.tf32 + options.set
        )
        launch = (
            ["mpirun", "--bind-to", "none", "-np", str(options.ranks)] if options.ranks > 1 else []
        )
        config = HERE.parent / "configs" / f"{CONFIGS[model]}.toml"
        command = [*launch, *train_command(options.bireme, config, data, run, sets)]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        if status != 0:
            sys.exit(f"failed: {command}")
        records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        records = [record for record in records if record["kind"] == "step"]
        options.targets = (
            statistics.median(record["n_targets"] for record in records) / options.batch
        )
        return statistics.median(
            record["sessions_per_s"] for record in records[WARM_UP:]
        ), usage.ru_maxrss / 2**20


def multiply_rate(options):
    """FLOP/s of products of matrices, f32."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        command = [
            options.bireme,
            "doctor",
            "--dir",
            folder,
            "--device",
            options.device,
            "--json",
            found,
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return json.loads(found.read_text())["multiply_rates"][0]


def limit(options, data, model):
    """Sessions a second that products of matrices allow."""
    import pyarrow.parquet as parquet

    lengths = parquet.read_table(
        data / "sessions_by_day/1/train.parquet", columns=["product_id-count"]
    )["product_id-count"]
    events = statistics.fmean(min(length, 20) for length in lengths.to_pylist())
    schema = (data / "schema.pbtxt").read_text().split('name: "product_id-list_seq"', 1)[1]
    items = int(schema.split("int_domain", 1)[1].split("max:", 1)[1].split()[0]) + 1
    return options.rate / (6 * (events * BODY[model] + options.targets * items * WIDTH))


def peer(options, data, model, *arguments):
    launch = (
        ["-m", "torch.distributed.run", "--nproc-per-node", str(options.ranks)]
        if options.ranks > 1
        else []
    )
    command = [
        sys.executable,
        *launch,
        HERE / "peers" / "training.py",
        data,
        "--model",
        model,
        "--steps",
        str(options.steps),
        *arguments,
    ]
    command += ["--batch", str(options.batch), "--device", options.device] + [
        "--tf32"
    ] * options.tf32
    figures = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return figures["sessions_per_s"], figures["peak_gib"]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, nargs="+")
    parser.add_argument("--models", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--ranks", type=int, default=1, help="processes, on CPUs")
    parser.add_argument("--tf32", action="store_true", help="on a GPU")
    parser.add_argument("--variants", nargs="+", help="these contestants only, besides bireme")
    parser.add_argument("--set", action="append", default=[], help="of `bireme train`")
    parser.add_argument("--bireme", default="target/release/bireme")
    options = parser.parse_args()
    print(
        f"{os.cpu_count()} cores, {options.device}, {options.batch} sessions a step"
        + ", tf32" * options.tf32
        + f", {options.ranks} processes" * (options.ranks > 1)
    )
    options.rate = multiply_rate(options)
    print(f"products of matrices: {options.rate / 1e9:.0f} GFLOP/s, f32")
    print("| | | sessions/s | GiB | speedup | limit |\n| --- | --- | ---: | ---: | ---: | ---: |")
    for model in options.models:
        for data in options.data:
            contestants = {"bireme": lambda: bireme(options, data, model)}
            contestants["PyTorch"] = lambda: peer(options, data, model)
            if not options.no_compile:
                contestants["PyTorch, compiled"] = lambda: peer(options, data, model, "--compile")
            if model != "gru":
                contestants["PyTorch, last layer where read"] = lambda: peer(
                    options, data, model, "--variant", "lean"
                )
            contestants = {
                name: run
                for name, run in contestants.items()
                if name in (options.variants or contestants) or name == "bireme"
            }
            runs = {name: [] for name in contestants}
            for _ in range(options.runs):
                for name, run in contestants.items():
                    if options.device == "cpu":
                        runs[name].append(run())
                        continue
                    with Gpu() as gpu:
                        rate, _ = run()
                    runs[name].append((rate, gpu.peak))
            ours = statistics.median(rate for rate, _ in runs["bireme"])
            for name, of in runs.items():
                rates = [rate for rate, _ in of]
                rate, peak = statistics.median(rates), max(peak for _, peak in of)
                times, share = (
                    ("", f"{ours / limit(options, data, model):.0%}")
                    if name == "bireme"
                    else (f"{ours / rate:.1f}", "")
                )
                spread = f"{min(rates):,.0f} to {max(rates):,.0f}"
                print(
                    f"| {model}, {data.name} | {name} | {rate:,.0f} ({spread}) | {peak:.2f} | {times} | {share} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
