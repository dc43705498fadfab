"""Latency and throughput of `bireme serve`, of Triton and of a FastAPI service
(benches/peers/fastapi_service.py).

    python benches/serve.py REPOSITORY NAME EVENTS.csv --oha oha --peer PYTHON [--triton .triton] [--runs 3]

Each request is a session of 5 to 20 events, the answer its top 20. The servers are measured one
after the other, `--runs` times by turns, alone on the machine with the load generator
(https://crates.io/crates/oha):

- closed loop: a number of clients, each of which sends the next request after the response;
- highest rate: the highest of an open loop that a server sustains, which means that at least 99 %
  of the requests are sent and answered, and 99 % within `--p99` milliseconds of the moment at which
  they were due;
- open loop at 50 % and 90 % of that rate: p50, p95 and p99, from when a request was due.

Prints every measurement and the medians as a table of Markdown. PYTHON must have what the peer
needs. `--triton` is the folder of tests/serving/install.sh, whose server lacks the PyTorch backend:
the stand-in of the tests takes its place, and both backends are looked for beside `--bireme`.
"""

import argparse
import csv
import http.client
import itertools
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

N_BODIES = 2000
CONNECTIONS = 256


def sessions(path):
    """The events of sessions of 5 to 20 events, in the order of the file."""
    found = {}
    with path.open(newline="") as file:
        # Enough of the file: its sessions are not long.
        for row in itertools.islice(csv.DictReader(file), 100 * N_BODIES):
            found.setdefault(row["user_session"], []).append(row)
    chosen = [events for events in found.values() if 5 <= len(events) <= 20]
    if len(chosen) < N_BODIES:
        sys.exit(f"{path} has {len(chosen)} sessions of 5 to 20 events: {N_BODIES} are needed")
    return chosen[:N_BODIES]


def tensor(name, datatype, values):
    return {"name": name, "datatype": datatype, "shape": [len(values), 1], "data": values}


def triton_body(events):
    def column(name, datatype, read):
        return tensor(name, datatype, [read(event[name]) for event in events])

    texts = [
        column(name, "BYTES", str)
        for name in ("event_time", "event_type", "category_code", "brand", "user_session")
    ]
    numbers = [column(name, "INT64", int) for name in ("product_id", "category_id")]
    inputs = [*texts, *numbers, column("price", "FP64", float)]
    return {"inputs": inputs, "outputs": [{"name": "item_ids"}, {"name": "item_scores"}]}


def peer_body(events):
    def event(row):
        row = {name: value for name, value in row.items() if value and name != "user_id"}
        time = row["event_time"].replace(" UTC", "Z")
        return row | {
            "event_time": time,
            "product_id": int(row["product_id"]),
            "category_id": int(row["category_id"]),
            "price": float(row["price"]),
        }

    return {"events": [event(row) for row in events], "top_k": 20}


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Server:
    """A server that runs while it is measured."""

    def __init__(self, name, command, env, port, ready, infer, bodies, log):
        self.name, self.port, self.ready, self.bodies = name, port, ready, bodies
        self.url = f"http://127.0.0.1:{port}{infer}"
        self.command, self.env, self.log = command, os.environ | env, log

    def __enter__(self):
        log = self.log.open("ab")
        self.process = subprocess.Popen(
            self.command, env=self.env, stdout=log, stderr=log, start_new_session=True
        )
        deadline = time.monotonic() + 120
        while not self.is_ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"{self.name} does not start: see {self.log}")
            time.sleep(0.1)
        return self

    def is_ready(self):
        try:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=1)
            connection.request("GET", self.ready)
            return connection.getresponse().status == 200
        except OSError:
            return False

    def __exit__(self, *_):
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class Load:
    """What a load generator saw."""

    def __init__(self, said, seconds):
        seen = json.loads(said)
        codes, percentiles = seen["statusCodeDistribution"], seen["latencyPercentiles"]
        # The last requests are cut off by the clock.
        errors = {
            text: n
            for text, n in seen["errorDistribution"].items()
            if text != "aborted due to deadline"
        }
        self.n_failed = sum(n for code, n in codes.items() if code != "200") + sum(errors.values())
        self.rate = codes.get("200", 0) / seconds
        self.ms = [1e3 * (percentiles[name] or float("inf")) for name in ("p50", "p95", "p99")]

    def __str__(self):
        p50, p95, p99 = self.ms
        failed = f"  {self.n_failed} failed" if self.n_failed else ""
        return f"{self.rate:8.0f}/s  p50 {p50:7.2f}  p95 {p95:7.2f}  p99 {p99:7.2f} ms{failed}"


def load_command(oha, seconds, connections, bodies, rate=None):
    """oha's command without the URL: requests with the lines of `bodies`, in an open loop of `rate`
    requests per second, or in a closed loop."""
    command = [oha, "--no-tui", "--output-format", "json", "-z", f"{seconds}s"]
    command += ["-c", str(connections), "-m", "POST", "-T", "application/json", "-Z", str(bodies)]
    return command + (["-q", str(rate), "--latency-correction"] if rate else [])


class Bench:
    def __init__(self, options):
        self.options = options

    def load(self, server, seconds, connections, rate=None):
        command = load_command(self.options.oha, seconds, connections, server.bodies, rate)
        done = subprocess.run([*command, server.url], capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"{' '.join(command)}: {done.stderr}")
        return Load(done.stdout, seconds)

    def sustains(self, server, rate):
        load = self.load(server, self.options.probe_seconds, CONNECTIONS, rate)
        holds = load.n_failed == 0 and load.rate >= 0.99 * rate and load.ms[2] <= self.options.p99
        print(
            f"  {server.name:8} {rate:6} asked  {load}  {'holds' if holds else 'too much'}",
            flush=True,
        )
        return holds

    def highest_rate(self, server, near):
        """By bisection, to 3 %."""
        low, high = 0, int(1.3 * near)
        while high - low > max(5, 0.03 * high):
            # The rate of the closed loop is the first upper bound.
            middle = int(low + (0.6 if low == 0 else 0.5) * (high - low))
            low, high = (middle, high) if self.sustains(server, middle) else (low, middle)
        return low

    def measure(self, server):
        seconds = self.options.seconds
        self.load(server, 5, 32)
        closed = {}
        for connections in (1, 16, 64):
            closed[connections] = self.load(server, seconds, connections)
            print(f"  {server.name:8} {connections:6} clients {closed[connections]}", flush=True)
        highest = self.highest_rate(server, max(load.rate for load in closed.values()))
        figures = {"highest": highest}
        for connections, load in closed.items():
            figures |= {
                f"closed {connections} rate": load.rate,
                f"closed {connections} p50": load.ms[0],
                f"closed {connections} p99": load.ms[2],
            }
        for share in (50, 90):
            load = self.load(server, seconds, CONNECTIONS, max(1, highest * share // 100))
            print(f"  {server.name:8} {share:5} %        {load}", flush=True)
            figures |= {
                f"{share} p50": load.ms[0],
                f"{share} p95": load.ms[1],
                f"{share} p99": load.ms[2],
            }
        return figures


def servers(options, scratch):
    chosen = sessions(options.events)
    bodies = {}
    for kind, body in (("triton", triton_body), ("peer", peer_body)):
        bodies[kind] = scratch / f"{kind}.jsonl"
        bodies[kind].write_text("".join(json.dumps(body(events)) + "\n" for events in chosen))
    repository, name = str(options.repository), options.name
    infer = f"/v2/models/{name}/infer"

    def log(of):
        return scratch / f"{of}.log"

    port, other = free_port(), free_port()
    command = [
        options.bireme,
        "serve",
        "--repository",
        repository,
        "--load",
        name,
        "--device",
        "cpu",
    ]
    command += ["--http", f"127.0.0.1:{port}", "--grpc", f"127.0.0.1:{other}"]
    yield Server(
        "bireme", command, {}, port, "/v2/health/ready", infer, bodies["triton"], log("bireme")
    )
    if options.triton:
        backends = scratch / "backends"
        (backends / "pytorch").mkdir(parents=True)
        shutil.copy(Path(options.bireme).with_name("libtriton_pytorch.so"), backends / "pytorch")
        port, other = free_port(), free_port()
        command = [
            str(options.triton / "server/bin/tritonserver"),
            f"--model-repository={repository}",
        ]
        command += [
            f"--backend-directory={backends}",
            "--http-address=127.0.0.1",
            "--grpc-address=127.0.0.1",
        ]
        command += [f"--http-port={port}", f"--grpc-port={other}", "--allow-metrics=false"]
        command += [
            "--model-control-mode=explicit",
            f"--load-model={name}",
            "--exit-timeout-secs=5",
        ]
        yield Server(
            "triton",
            command,
            {},
            port,
            f"/v2/models/{name}/ready",
            infer,
            bodies["triton"],
            log("triton"),
        )
    port, cores = free_port(), os.cpu_count()
    command = [
        options.peer,
        "-m",
        "uvicorn",
        "--app-dir",
        str(Path(__file__).parent / "peers"),
        "fastapi_service:app",
    ]
    command += [
        "--port",
        str(port),
        "--workers",
        str(cores),
        "--no-access-log",
        "--log-level",
        "warning",
    ]
    env = {"REPOSITORY": repository, "NAME": name, "TORCH_THREADS": "1"}
    yield Server(
        "fastapi", command, env, port, "/ready", "/recommend", bodies["peer"], log("fastapi")
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("repository", type=Path)
    parser.add_argument("name")
    parser.add_argument("events", type=Path)
    parser.add_argument("--bireme", default="target/release/bireme")
    parser.add_argument("--oha", default="oha")
    parser.add_argument("--peer", default=sys.executable)
    parser.add_argument("--triton", type=Path)
    parser.add_argument("--p99", type=float, default=50.0)
    parser.add_argument("--seconds", type=int, default=10)
    parser.add_argument("--probe-seconds", type=int, default=8)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()

    scratch = Path(tempfile.mkdtemp())
    bench, measured = Bench(options), {}
    print(f"{os.cpu_count()} cores; logs in {scratch}")
    all_servers = list(servers(options, scratch))
    for run in range(options.runs):
        print(f"run {run + 1}")
        for server in all_servers:
            with server:
                measured.setdefault(server.name, []).append(bench.measure(server))
    medians = {
        name: {figure: statistics.median(run[figure] for run in runs) for figure in runs[0]}
        for name, runs in measured.items()
    }
    print("\n| | " + " | ".join(medians) + " |\n| --- |" + " ---: |" * len(medians))
    for figure in next(iter(medians.values())):
        cells = (
            f"{of[figure]:,.0f}" if of[figure] >= 100 else f"{of[figure]:.2f}"
            for of in medians.values()
        )
        print(f"| {figure} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
