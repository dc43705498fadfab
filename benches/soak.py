"""Thirty minutes of `bireme serve` under load, with clients that disconnect, are slow, or send too
much or malformed data.

    python benches/soak.py REPOSITORY NAME EVENTS.csv --rate RATE --oha oha [--minutes 30]

RATE is 80 % of the highest rate that benches/serve.py found. An open loop of well-formed requests
(sessions of 5 to 20 events) runs all the while; beside it, at `--wrong` a second: requests with
mutated bodies over HTTP, in JSON and in binary, and over gRPC; clients that leave in the middle of
a request or before they have read the answer; clients that send a byte at a time; bodies that are
too long. The memory of the server is printed every half minute.

Exit code 1 if the server ended, a well-formed request was not answered, a malformed one got no
proper answer, or memory grew: by more than 5 % from the median of the second sixth of the time to
that of the last.

The Python must have grpcio (tests/serving/install.sh makes one in `.triton`).
"""

import argparse
import json
import random
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import grpc
from serve import CONNECTIONS, free_port, load_command, sessions, triton_body
from tritonclient.grpc import service_pb2

# What a server says to a request that it did not crash over.
PROPER = {200, 400, 404, 405, 408, 411, 413, 414, 415, 431, 501, 503, 504}
METHOD = "/inference.GRPCInferenceService/ModelInfer"


def mutated(generator, data):
    """Bytes with a few of them changed, cut, doubled or moved."""
    data = bytearray(data)
    for _ in range(generator.choice([1, 1, 2, 5, 20])):
        place = generator.randrange(len(data) + 1)
        length = generator.choice([1, 1, 4, 30])
        match generator.randrange(6):
            case 0:
                data[place : place + length] = generator.randbytes(length)
            case 1:
                del data[place : place + length]
            case 2:
                data[place:place] = data[place : place + length] * generator.choice([1, 1, 50])
            case 3:
                del data[place:]
            case 4:
                data[place:place] = generator.choice(
                    [b"[", b"{", b'"', b"-", b"9" * 30, b"1e999", b"null", b"\\ud800", b"\0"]
                )
            case 5:
                other = generator.randrange(len(data) + 1)
                data[place : place + length] = data[other : other + length]
        if not data:
            break
    return bytes(data)


def binary_body(body):
    """The same request with its tensors in binary, and the length of its JSON."""
    inputs, tensors = [], b""
    for tensor in body["inputs"]:
        match tensor["datatype"]:
            case "BYTES":
                cells = [text.encode() for text in tensor["data"]]
                data = b"".join(struct.pack("<I", len(cell)) + cell for cell in cells)
            case "INT64":
                data = struct.pack(f"<{len(tensor['data'])}q", *tensor["data"])
            case "FP64":
                data = struct.pack(f"<{len(tensor['data'])}d", *tensor["data"])
        inputs.append(
            {name: tensor[name] for name in ("name", "datatype", "shape")}
            | {"parameters": {"binary_data_size": len(data)}}
        )
        tensors += data
    head = json.dumps(body | {"inputs": inputs}).encode()
    return head + tensors, len(head)


def grpc_message(name, body):
    """The same request for gRPC."""
    message = service_pb2.ModelInferRequest(model_name=name)
    for tensor in body["inputs"]:
        given = message.inputs.add(
            name=tensor["name"], datatype=tensor["datatype"], shape=tensor["shape"]
        )
        match tensor["datatype"]:
            case "BYTES":
                given.contents.bytes_contents.extend(text.encode() for text in tensor["data"])
            case "INT64":
                given.contents.int64_contents.extend(tensor["data"])
            case "FP64":
                given.contents.fp64_contents.extend(tensor["data"])
    return message.SerializeToString()


class Abuse:
    """Clients that no server wishes for."""

    def __init__(self, options, http, grpc_port, bodies):
        self.http, self.name, self.bodies = http, options.name, bodies
        self.channel = grpc.insecure_channel(f"127.0.0.1:{grpc_port}")
        self.call = self.channel.unary_unary(
            METHOD, request_serializer=None, response_deserializer=None
        )
        self.random = random.Random(options.seed)
        self.counts, self.faults = {}, []
        self.is_over = threading.Event()

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.http), timeout=30)

    def head(self, length, more=""):
        return (
            f"POST /v2/models/{self.name}/infer HTTP/1.1\r\nHost: soak\r\nConnection: close\r\n{more}"
            f"Content-Length: {length}\r\n\r\n"
        ).encode()

    def status(self, request):
        """Sends a request and reads the answer's status; 0 if there is no answer."""
        with self.connect() as stream:
            try:
                stream.sendall(request)
            except (BrokenPipeError, ConnectionResetError):
                # Refused before it was read: the answer may be there all the same.
                pass
            try:
                answer = b""
                while len(answer) < 12 and (read := stream.recv(4096)):
                    answer += read
            except ConnectionResetError:
                pass
        words = answer.split(b" ")
        return int(words[1]) if len(words) > 1 and words[1].isdigit() else 0

    def asks(self, body):
        """A well-formed request; it may find the queue full."""
        data = json.dumps(body).encode()
        return self.status(self.head(len(data)) + data)

    def mutated_json(self, body):
        data = mutated(self.random, json.dumps(body).encode())
        return self.status(self.head(len(data)) + data)

    def mutated_binary(self, body):
        data, length = binary_body(body)
        data, length = (
            mutated(self.random, data),
            length + self.random.choice([0, 0, 0, 1, -1, 10**9, -(10**6)]),
        )
        return self.status(
            self.head(len(data), f"Inference-Header-Content-Length: {length}\r\n") + data
        )

    def mutated_head(self, body):
        data = json.dumps(body).encode()
        request = mutated(self.random, self.head(len(data))) + data

        def send():
            try:
                self.status(request)
            except OSError:
                # A head that makes no sense may be answered with a closed connection, one that
                # lacks its end not at all.
                pass

        threading.Thread(target=send, daemon=True).start()
        return 400

    def mutated_grpc(self, body):
        try:
            self.call(mutated(self.random, grpc_message(self.name, body)), timeout=30)
        except grpc.RpcError as error:
            is_proper = error.code() in (
                grpc.StatusCode.INVALID_ARGUMENT,
                grpc.StatusCode.NOT_FOUND,
                grpc.StatusCode.INTERNAL,
            )
            # INTERNAL is tonic's word for bytes that are no message.
            return 400 if is_proper else 0
        return 200

    def too_long(self, body):
        # Without a word of how long it will be, and half of them without an end.
        chunk = b"%x\r\n" % (1 << 20) + b" " * (1 << 20) + b"\r\n"
        end = self.random.choice([b"", b"0\r\n\r\n"])
        return self.status(
            self.head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
            + chunk * 20
            + end
        )

    def dies(self, body):
        data = json.dumps(body).encode()
        with self.connect() as stream:
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            whole = self.head(len(data)) + data
            # Half of them go before the request is whole, half before the answer is read.
            stream.sendall(
                whole[: self.random.choice([len(whole), self.random.randrange(len(whole))])]
            )
        return 200

    def dawdles(self, body):
        data = json.dumps(body).encode()

        def send():
            try:
                with self.connect() as stream:
                    for byte in self.head(len(data)) + data:
                        stream.sendall(bytes([byte]))
                        time.sleep(0.05)
                        if self.is_over.is_set():
                            return
            except OSError:
                # It is right to close the connection of such a client.
                pass

        threading.Thread(target=send, daemon=True).start()
        return 200

    def run(self, per_second):
        kinds = (
            [self.mutated_json] * 4
            + [self.mutated_binary] * 4
            + [self.mutated_grpc] * 4
            + [self.mutated_head] * 2
        )
        kinds += [self.dies] * 4 + [self.dawdles, self.too_long]
        due = time.monotonic()
        while not self.is_over.is_set():
            kind, body = self.random.choice(kinds), self.random.choice(self.bodies)
            try:
                status = kind(body)
            except Exception as fault:  # noqa: BLE001  reported at the end
                status = repr(fault)
            self.counts[kind.__name__] = self.counts.get(kind.__name__, 0) + 1
            if status not in PROPER:
                self.faults.append((kind.__name__, status))
            due += 1 / per_second
            time.sleep(max(0, due - time.monotonic()))


def resident_mib(process):
    """The memory of a process that is its own, in MiB."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    return 0


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("repository", type=Path)
    parser.add_argument("name")
    parser.add_argument("events", type=Path)
    parser.add_argument("--rate", type=int, required=True)
    parser.add_argument("--bireme", default="target/release/bireme")
    parser.add_argument("--oha", default="oha")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--wrong", type=float, default=12)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()

    scratch = Path(tempfile.mkdtemp())
    bodies = [triton_body(events) for events in sessions(options.events)]
    lines = scratch / "bodies.jsonl"
    lines.write_text("".join(json.dumps(body) + "\n" for body in bodies))
    http, grpc_port = free_port(), free_port()
    command = [
        options.bireme,
        "serve",
        "--repository",
        str(options.repository),
        "--load",
        options.name,
        "--device",
        "cpu",
    ]
    command += [
        "--http",
        f"127.0.0.1:{http}",
        "--grpc",
        f"127.0.0.1:{grpc_port}",
        "--idle-seconds",
        "20",
    ]
    log = (scratch / "server.log").open("wb")
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
    # It prints its addresses when it is ready.
    server.stdout.readline(), server.stdout.readline()
    print(f"server ready, {resident_mib(server):.0f} MiB; log in {scratch}", flush=True)

    abuse = Abuse(options, http, grpc_port, bodies)
    # The allocator keeps what the worst moment took: let that be over before memory is watched.
    crowd = [threading.Thread(target=abuse.too_long, args=[bodies[0]]) for _ in range(16)]
    crowd += [
        threading.Thread(target=abuse.mutated_json, args=[body]) for body in (bodies * 2)[:512]
    ]
    # Batches as large as they come, in every worker.
    crowd += [threading.Thread(target=abuse.asks, args=[body]) for body in (bodies * 2)[:1024]]
    for client in crowd:
        client.start()
    for client in crowd:
        client.join()
    print(f"after a crowd: {resident_mib(server):.0f} MiB", flush=True)
    abuser = threading.Thread(target=abuse.run, args=[options.wrong])
    abuser.start()
    seconds = round(60 * options.minutes)
    load = load_command(options.oha, seconds, CONNECTIONS, lines, options.rate)
    load = subprocess.Popen(
        [*load, f"http://127.0.0.1:{http}/v2/models/{options.name}/infer"], stdout=subprocess.PIPE
    )
    begun, memory = time.monotonic(), []
    # Its answer fits into a pipe.
    while load.poll() is None and server.poll() is None:
        memory.append((time.monotonic() - begun, resident_mib(server)))
        if len(memory) % 6 == 1:
            print(
                f"{memory[-1][0]:6.0f} s  {memory[-1][1]:6.0f} MiB  {sum(abuse.counts.values())} wrong",
                flush=True,
            )
        time.sleep(5)
    abuse.is_over.set()
    abuser.join()
    problems = []
    if server.poll() is not None:
        problems.append(f"the server ended with {server.returncode}")
        load.kill()
    seen = json.loads(load.stdout.read() or "{}")
    server.send_signal(signal.SIGTERM)
    try:
        code = server.wait(60)
    except subprocess.TimeoutExpired:
        server.kill()
        code = "no end within a minute"
    if code != 0:
        problems.append(f"the server's end: {code}")

    codes = seen.get("statusCodeDistribution", {})
    errors = {
        text: n
        for text, n in seen.get("errorDistribution", {}).items()
        if text != "aborted due to deadline"
    }
    if set(codes) != {"200"} or errors:
        problems.append(f"well-formed requests: {codes} {errors}")
    n_wrong = sum(n for kind, n in abuse.counts.items() if kind.startswith("mutated"))
    if abuse.faults:
        problems.append(f"{len(abuse.faults)} without a proper answer, as {abuse.faults[:5]}")

    def median(first, last):
        return statistics.median(
            mib for at, mib in memory if first * seconds <= at < last * seconds
        )

    early, late = median(1 / 6, 1 / 3), median(5 / 6, 1.1)
    if late > 1.05 * early:
        problems.append("memory grew")
    percentiles = seen.get("latencyPercentiles", {})
    ms = ", ".join(
        f"{name} {1e3 * percentiles[name]:.1f} ms"
        for name in ("p50", "p95", "p99")
        if percentiles.get(name)
    )
    print(
        f"well-formed: {codes.get('200', 0)} answered, {codes.get('200', 0) / seconds:.0f}/s; {ms}"
    )
    print(f"mutated: {n_wrong}; of all kinds: {dict(sorted(abuse.counts.items()))}")
    print(
        f"memory: {early:.0f} MiB early, {late:.0f} MiB late, {max(mib for _, mib in memory):.0f} MiB at most"
    )
    print("\n".join(problems) or "all well")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
