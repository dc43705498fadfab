"""Two builds of bireme beside each other, by turns, on the same data and cores.

    . launch/env.sh oversubscribe
    python benches/builds.py BIREME OTHER EVENTS.csv CONFIG... [--runs 5] [--steps 60] [--seconds 6]

Measures with each build the seconds of `bireme preprocess`, the milliseconds of a session of the
median training step of each configuration on day 1, and the milliseconds of a request to
`bireme serve` with two clients in a closed loop, for a model of the first configuration. Prints a
table of Markdown: medians of the runs, and the median, the smallest and the largest of the ratios
of pairs. EVENTS.csv is also read compressed if EVENTS.csv.gz is beside it.
"""

import argparse
import http.client
import json
import statistics
import subprocess
import tempfile
import threading
import time
from pathlib import Path

from pairs import sessions_per_s, train_command
from serve import sessions, triton_body

N_CLIENTS = 2


def run(*command):
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - began


def preprocess_seconds(bireme, events):
    with tempfile.TemporaryDirectory() as folder:
        return run(bireme, "preprocess", "--events", events, "--out", Path(folder) / "data")


def session_milliseconds(bireme, config, data, steps):
    options = argparse.Namespace(bireme=bireme, data=data, steps=steps)
    return 1000 / sessions_per_s(options, config, "1")


def request_milliseconds(bireme, repository, bodies, seconds):
    command = [bireme, "serve", "--repository", repository]
    command += ["--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    address = server.stdout.readline().split()[1]
    counts, end = [0] * N_CLIENTS, time.perf_counter() + seconds

    def ask(client):
        connection = http.client.HTTPConnection(address)
        while time.perf_counter() < end:
            body = bodies[(counts[client] * N_CLIENTS + client) % len(bodies)]
            connection.request("POST", "/v2/models/model/infer", body)
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 200, answer.status
            counts[client] += 1

    clients = [threading.Thread(target=ask, args=(client,)) for client in range(N_CLIENTS)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    server.terminate()
    server.wait()
    return 1000 * seconds / sum(counts)


def compare(name, builds, runs, measure):
    """Prints a row. The builds take turns, and so does the one that goes first."""
    pairs = []
    for number in range(runs):
        order = (0, 1) if number % 2 == 0 else (1, 0)
        pair = {which: measure(builds[which], which) for which in order}
        pairs.append((pair[0], pair[1]))
    first, second = (statistics.median(values) for values in zip(*pairs))
    ratios = sorted(one / other for one, other in pairs)
    spread = f"{statistics.median(ratios):.0%} ({ratios[0]:.0%} to {ratios[-1]:.0%})"
    print(f"| {name} | {first:.3f} | {second:.3f} | {spread} |", flush=True)


def export(bireme, config, events, folder):
    """A repository of a model that was trained for a few steps, and the data that it was trained
    on."""
    data, trained, repository, library = (
        folder / name for name in ("data", "run", "repository", "libtriton_bireme.so")
    )
    folder.mkdir()
    # A placeholder: `bireme export` checks its head and a name in it, and `bireme serve` does not
    # load the library that preprocesses in Triton.
    library.write_bytes(b"\x7fELF TRITONBACKEND_ModelInstanceExecute")
    sets = ["data.last_day=2", "train.epochs_per_day=1", "train.max_steps_per_day=5"]
    run(bireme, "preprocess", "--events", events, "--out", data)
    run(*train_command(bireme, config, data, trained, sets))
    names = ["--name", "model", "--backend-library", library]
    run(bireme, "export", "--run-dir", trained, "--out", repository, *names)
    return data, repository


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bireme")
    parser.add_argument("other")
    parser.add_argument("events", type=Path)
    parser.add_argument("configs", type=Path, nargs="+")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=6)
    options = parser.parse_args()
    builds = [options.bireme, options.other]
    bodies = [json.dumps(triton_body(events)) for events in sessions(options.events)]
    print("| | first | second | first / second |\n| --- | ---: | ---: | ---: |")
    compressed = options.events.with_name(options.events.name + ".gz")
    for events in [options.events, *([compressed] if compressed.exists() else [])]:
        compare(
            f"preprocess `{events.name}`, s",
            builds,
            options.runs,
            lambda bireme, _: preprocess_seconds(bireme, events),
        )
    with tempfile.TemporaryDirectory() as folder:
        exported = [
            export(bireme, options.configs[0], options.events, Path(folder) / str(which))
            for which, bireme in enumerate(builds)
        ]
        for config in options.configs:
            name = f"train `{config.stem}`, ms a session"
            compare(
                name,
                builds,
                options.runs,
                lambda bireme, which: session_milliseconds(
                    bireme, config, exported[which][0], options.steps
                ),
            )
        compare(
            "serve, ms a request",
            builds,
            options.runs,
            lambda bireme, which: request_milliseconds(
                bireme, exported[which][1], bodies, options.seconds
            ),
        )


if __name__ == "__main__":
    main()
