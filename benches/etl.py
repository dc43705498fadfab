"""Times `bireme preprocess` and benches/peers/etl_{polars,pandas}.py on the same events, by turns.

    python benches/etl.py EVENTS.csv --bireme target/release/bireme [--python PYTHON] [--peers polars pandas] [--runs 3]

The Python must have polars, pandas and pyarrow. Prints every run and the medians: wall and CPU
seconds, rows per second of the file, the peak of the process's resident memory as the kernel counts
it, mapped file pages included, and the most of it that was its own, seen by looking every 20 ms.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def timed(command):
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    pid, own = 0, 0
    while pid == 0:
        own = max(own, own_kib(process.pid))
        time.sleep(0.02)
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
    seconds = time.perf_counter() - began
    if os.waitstatus_to_exitcode(status) != 0:
        sys.exit(f"failed: {' '.join(command)}")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20, own / 2**20


def own_kib(pid):
    """Resident memory of a process that is no file's."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(
        (int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon:")), 0
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("events", type=Path)
    parser.add_argument("--bireme", default="target/release/bireme")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--peers", nargs="*", choices=["polars", "pandas"], default=["polars", "pandas"]
    )
    options = parser.parse_args()

    with options.events.open("rb") as file:
        n_rows = sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 24), b"")) - 1
    scratch = Path(tempfile.mkdtemp(dir=options.events.parent))
    out = scratch / "out"
    peers = Path(__file__).parent / "peers"
    commands = {
        "bireme": [options.bireme, "preprocess", "--events", str(options.events), "--out", str(out)]
    }
    for peer in options.peers:
        commands[peer] = [
            options.python,
            str(peers / f"etl_{peer}.py"),
            str(options.events),
            str(out),
        ]
    runs = {name: [] for name in commands}
    print(f"{n_rows} rows, {os.cpu_count()} cores")
    print(f"{'':8} {'wall s':>8} {'cpu s':>8} {'rows/s':>10} {'peak GiB':>9} {'own GiB':>9}")

    def line(name, wall, cpu, peak, own):
        print(
            f"{name:8} {wall:8.2f} {cpu:8.2f} {n_rows / wall:10.0f} {peak:9.2f} {own:9.2f}",
            flush=True,
        )

    try:
        for _ in range(options.runs):
            for name, command in commands.items():
                runs[name].append(timed(command))
                line(name, *runs[name][-1])
                shutil.rmtree(out)
    finally:
        shutil.rmtree(scratch)
    print("medians")
    for name, measured in runs.items():
        line(name, *(statistics.median(column) for column in zip(*measured)))


if __name__ == "__main__":
    main()
