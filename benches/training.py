"""Sessions a second of training beside PyTorch, on the same data and cores, by turns.

    bireme synth --events 3000000 --items 10000 --days 2 --seed 1 --out events.csv      # likewise 100000, 390000
    bireme preprocess --events events.csv --out 10k
    python benches/training.py 10k 100k 390k [--models gru xlnet xlnet-side] [--runs 3] [--steps 20] [--device cuda]

Trains the tutorial's models for so many steps on day 1, in one process with all cores or on one GPU, and prints a table of
Markdown: the median step's sessions a second, the least and largest of the runs' medians in brackets, GiB at most: of the
process, or of the GPU, which nobody else may use meanwhile. The Python must have what benches/peers/requirements.txt names.
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

HERE = Path(__file__).parent
CONFIGS = {"gru": "gru", "xlnet": "xlnet", "xlnet-side": "xlnet-side-info"}
WARM_UP = 3


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
            mib = subprocess.run(query, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[0]
            self.peak = max(self.peak, int(mib) / 1024)

    def __exit__(self, *_):
        self.done.set()
        self.watcher.join()


def bireme(options, data, model):
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        steps = WARM_UP + options.steps
        sets = ["data.last_day=2", "train.epochs_per_day=1", f"train.max_steps_per_day={steps}", "train.log_every_steps=1", "evaluate.scores_mib=64"]
        sets += [f"train.global_batch={options.batch}", f"train.micro_batch={min(options.batch, 512)}"] if options.batch != 256 else []
        sets += [f"run.device={options.device}"] + ["run.precision=tf32"] * options.tf32 + options.set
        command = [options.bireme, "train", "--config", HERE.parent / "configs" / f"{CONFIGS[model]}.toml", "--data", data, "--run-dir", run]
        process = subprocess.Popen([*command, *(word for key in sets for word in ("--set", key))], stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        if status != 0:
            sys.exit(f"failed: {command}")
        records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        rates = [record["sessions_per_s"] for record in records if record["kind"] == "step"]
        return statistics.median(rates[WARM_UP:]), usage.ru_maxrss / 2**20


def peer(options, data, model, *arguments):
    command = [sys.executable, HERE / "peers" / "training.py", data, "--model", model, "--steps", str(options.steps), *arguments]
    command += ["--batch", str(options.batch), "--device", options.device] + ["--tf32"] * options.tf32
    figures = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return figures["sessions_per_s"], figures["peak_gib"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="+")
    parser.add_argument("--models", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--tf32", action="store_true", help="on a GPU")
    parser.add_argument("--variants", nargs="+", help="these contestants only, besides bireme")
    parser.add_argument("--set", action="append", default=[], help="of `bireme train`")
    parser.add_argument("--bireme", default="target/release/bireme")
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, {options.device}, {options.batch} sessions a step" + ", tf32" * options.tf32)
    print("| | | sessions/s | GiB | bireme's, times |\n| --- | --- | ---: | ---: | ---: |")
    for model in options.models:
        for data in options.data:
            contestants = {"bireme": lambda: bireme(options, data, model)}
            contestants["PyTorch"] = lambda: peer(options, data, model)
            if not options.no_compile:
                contestants["PyTorch, compiled"] = lambda: peer(options, data, model, "--compile")
            if model != "gru":
                contestants["PyTorch, last layer where read"] = lambda: peer(options, data, model, "--variant", "lean")
            contestants = {name: run for name, run in contestants.items() if name in (options.variants or contestants) or name == "bireme"}
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
                times = "" if name == "bireme" else f"{ours / rate:.1f}"
                print(f"| {model}, {data.name} | {name} | {rate:,.0f} ({min(rates):,.0f} to {max(rates):,.0f}) | {peak:.2f} | {times} |", flush=True)


if __name__ == "__main__":
    main()
