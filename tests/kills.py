#!/usr/bin/env python3
"""Kills a training at random, again and again, and looks whether it ends as the unbroken one.

    . launch/env.sh oversubscribe
    python tests/kills.py [--kills 20] [--seed 1] [--bireme target/release/bireme]

One training of an XLNet with side information and dropout, in the reproducible mode, with a
checkpoint after every other step. SIGKILL hits a random rank at a random moment, every third time
while a checkpoint is being written; the next start has a random number of ranks from 1 to 4. At the
end the SHA-256 of weights, optimizer, metrics, outcomes, results and of every exported file must be
those of the unbroken training.

Exit code 1 if they are not, or if a start ended otherwise than by the kill.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONFIG = """
[run]
device = "cpu"
reduction = "reproducible"
threads_per_rank = 1
[data]
first_day = 1
last_day = 3
features = ["category_code-list_seq", "brand-list_seq", "price_log_norm-list_seq"]
[model]
kind = "xlnet"
width = 32
n_heads = 4
dropout = 0.2
input = { item_width = 32, feature_width = 8 }
[train]
epochs_per_day = 120
learning_rate = 0.002
log_every_steps = 1
[checkpoint]
every_steps = 2
"""


def ranks_of(launcher, world_size):
    """The processes that a launcher has started; itself where it is the only rank."""
    if world_size == 1:
        return [launcher.pid]
    pids = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, rest = stat.read_text().rsplit(")", 1)
        except OSError:
            continue
        if int(rest.split()[1]) == launcher.pid and name.endswith("(bireme"):
            pids.append(int(stat.parent.name))
    return sorted(pids)


def partial(run):
    """Whether a checkpoint is being written, or was when the writer was killed."""
    return any((run / "checkpoints").glob("*.partial"))


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def outcome(run, bireme):
    """What a run has come to, by the name of each part."""
    newest = max((run / "checkpoints").iterdir())
    parts = {file.name: sha256(file) for file in newest.glob("*.safetensors")}
    parts |= {file.name: sha256(file) for file in (run / "evaluations").iterdir()}
    parts["results.txt"] = sha256(run / "results.txt")
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    times = {"seconds", "sessions_per_s"}
    kept = [
        {key: value for key, value in record.items() if key not in times}
        for record in records
        if record["kind"] in ("step", "eval")
    ]
    parts["metrics"] = hashlib.sha256(json.dumps(kept).encode()).hexdigest()
    repository = run.with_suffix(".repository")
    subprocess.run(
        [bireme, "export", "--run-dir", run, "--out", repository],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    for file in sorted(repository.rglob("*")):
        # A manifest says when and from where.
        if file.is_file() and file.name != "manifest.json":
            parts[str(file.relative_to(repository))] = sha256(file)
    return parts


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--bireme", type=Path, default=Path("target/release/bireme"))
    options = parser.parse_args()
    bireme, chance = options.bireme.resolve(), random.Random(options.seed)
    os.environ |= {"OMPI_MCA_mpi_yield_when_idle": "1", "OMP_NUM_THREADS": "1"}

    folder = Path(tempfile.mkdtemp())
    (folder / "config.toml").write_text(CONFIG)
    quiet = {
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.DEVNULL,
        "check": True,
        "cwd": folder,
    }
    subprocess.run(
        [bireme, *"synth --events 60000 --items 2000 --days 3 --seed 7 --out events.csv".split()],
        **quiet,
    )
    subprocess.run([bireme, *"preprocess --events events.csv --out data".split()], **quiet)
    train = [bireme, *"train --config config.toml --data data --run-dir".split()]
    begun = time.monotonic()
    subprocess.run([*train, "unbroken"], **quiet)
    unbroken_seconds = time.monotonic() - begun
    print(f"unbroken: {unbroken_seconds:.1f} s on 1 rank", flush=True)

    run = folder / "killed"
    for kill in range(1, options.kills + 1):
        world_size = chance.randint(1, 4)
        command = (
            [*train, "killed"]
            if world_size == 1
            else ["mpirun", "--bind-to", "none", "-np", str(world_size), *train, "killed"]
        )
        with (folder / "stderr").open("wb") as stderr:
            started = subprocess.Popen(
                command, cwd=folder, stdout=subprocess.DEVNULL, stderr=stderr
            )
            begun = time.monotonic()
            # A start takes about a second. The kills together interrupt only a part of the
            # training.
            moment = 1 + chance.uniform(0, 0.6 * unbroken_seconds / options.kills)
            while started.poll() is None and time.monotonic() - begun < moment:
                time.sleep(0.001)
            pids, rank = ranks_of(started, world_size), chance.randrange(world_size)
            if kill % 3 == 0:
                # Rank 0 writes the checkpoints.
                rank = 0
                while started.poll() is None and not partial(run):
                    time.sleep(0.0001)
            if started.poll() is not None or len(pids) != world_size:
                sys.exit(
                    f"kill {kill}: the start ended by itself: {(folder / 'stderr').read_text()[-2000:]}"
                )
            os.kill(pids[rank], signal.SIGKILL)
            code = started.wait(60)
        message = (folder / "stderr").read_text()
        begun_at = [line for line in message.splitlines() if line.startswith("resuming from")]
        position = begun_at[0].split("checkpoints/")[1] if begun_at else "the beginning"
        while_writing = ", while a checkpoint was written" if partial(run) else ""
        print(
            f"kill {kill:2}: rank {rank} of {world_size} after {moment:.1f} s{while_writing}; exit code {code}; it had begun at {position}",
            flush=True,
        )
    world_size = chance.randint(1, 4)
    subprocess.run(
        ["mpirun", "--bind-to", "none", "-np", str(world_size), *train, "killed"], **quiet
    )
    print(f"end on {world_size} ranks", flush=True)

    expected, found = outcome(folder / "unbroken", bireme), outcome(run, bireme)
    for part in sorted(expected.keys() | found.keys()):
        is_same = expected.get(part) == found.get(part)
        print(f"{'same' if is_same else 'DIFFERS'}  {found.get(part, 'missing')}  {part}")
    shutil.rmtree(folder)
    sys.exit(expected != found)


if __name__ == "__main__":
    main()
