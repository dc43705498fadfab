#!/usr/bin/env python3
"""Asks a server of the KServe v2 protocol what Triton's own client can ask, and checks the answers.

usage: client.py HTTP GRPC CASES [KEY]

KEY is the API key of a server that wants one. CASES is a JSON file: `models`, the ensembles to be
asked; `preprocessing`, a model that preprocesses; `configs`, the paths of all `config.pbtxt`;
`events`, columns of event rows; and what is expected of them: `sessions`, and `item_ids` and
`item_scores` by model. Prints a line for each check; exit code 1 if one fails.
"""

import hashlib
import json
import random
import sys
import threading
import time

import numpy as np
import tritonclient.grpc
import tritonclient.http
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import InferenceServerException

TYPES = {
    "event_time": "BYTES",
    "event_type": "BYTES",
    "product_id": "INT64",
    "category_id": "INT64",
    "category_code": "BYTES",
    "brand": "BYTES",
    "price": "FP64",
    "user_session": "BYTES",
}
NUMPY = {"BYTES": object, "INT64": np.int64, "FP64": np.float64, "INT32": np.int32, "BOOL": bool}


def tensor(module, name, datatype, values, shape=None):
    """An input of a request."""
    array = np.array(values, dtype=NUMPY[datatype]).reshape(shape or (len(values), 1))
    made = module.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array)
    return made


def inputs(module, events, top_k=None):
    """The inputs of a request."""
    made = [tensor(module, name, datatype, events[name]) for name, datatype in TYPES.items()]
    if top_k is not None:
        made.append(tensor(module, "top_k", "INT32", [top_k], (1,)))
    return made


def rows(events, chosen):
    """Some rows of the events."""
    return {name: [values[row] for row in chosen] for name, values in events.items()}


class Key(tritonclient.http.InferenceServerClientPlugin):
    """Shows an API key with every call."""

    def __init__(self, key):
        self.key = key

    def __call__(self, request):
        request.headers["authorization"] = f"Bearer {self.key}"


def connected(module, address, key, **more):
    """A client."""
    client = module.InferenceServerClient(address, **more)
    if key:
        client.register_plugin(Key(key))
    return client


def check_keys(http, grpc, key):
    """Who has no key, or another, gets no answer."""
    for module, address, code in [
        (tritonclient.http, http, "401"),
        (tritonclient.grpc, grpc, "UNAUTHENTICATED"),
    ]:
        for wrong in [None, key + "x"]:
            client = connected(module, address, wrong)
            assert client.is_server_live() and client.is_server_ready()
            try:
                client.get_server_metadata()
            except InferenceServerException as error:
                assert code in (error.status() or ""), error
                assert "API keys" in str(error), error
            else:
                raise AssertionError(f"{module.__name__}: nobody asked for the key")
            client.close()
    print("keys: ok", flush=True)


class Checks:
    """The checks of one client."""

    def __init__(self, module, client, cases):
        self.module, self.client, self.cases = module, client, cases
        self.events = cases["events"]

    def infer(self, model, events, top_k=None, **more):
        """What a model answers."""
        return self.client.infer(model, inputs(self.module, events, top_k), **more)

    def same(self, answer, model):
        """Compares an answer with what is expected: items may change places where their scores are
        as good as equal."""
        expected = self.cases["expected"][model]
        sessions = [session.decode() for session in answer.as_numpy("session").reshape(-1)]
        assert sessions == self.cases["sessions"], sessions[:3]
        scores, wanted = (
            answer.as_numpy("item_scores"),
            np.array(expected["item_scores"], np.float32),
        )
        assert np.abs(scores - wanted).max() < 1e-5, np.abs(scores - wanted).max()
        ids = answer.as_numpy("item_ids")
        for row, place in np.argwhere(ids != np.array(expected["item_ids"])):
            near = np.abs(wanted[row] - wanted[row, place]) < 1e-5
            assert near.sum() > 1 or place == ids.shape[1] - 1, (row, place)
        assert not answer.as_numpy("fallback").any()

    def refused(self, message, ask):
        """Checks that a request is refused with a message."""
        try:
            ask()
        except InferenceServerException as error:
            status = error.status() or ""
            assert "400" in status or "INVALID_ARGUMENT" in status, (status, str(error))
            assert message in str(error), str(error)
        else:
            raise AssertionError(f"not refused: {message}")

    def check_health(self):
        """Health, index, metadata, configuration."""
        assert self.client.is_server_live() and self.client.is_server_ready()
        for model in self.cases["models"]:
            assert self.client.is_model_ready(model)
            self.client.get_model_metadata(model)
            self.client.get_model_config(model)
        self.client.get_model_repository_index()
        about = self.client.get_server_metadata()
        assert about["name"] if isinstance(about, dict) else about.name

    def check_statistics(self):
        """What was counted, once more after a request."""
        model = self.cases["models"][0]

        def count():
            """Successful requests."""
            said = self.client.get_inference_statistics(model)
            if isinstance(said, dict):
                return int(said["model_stats"][0]["inference_stats"]["success"]["count"])
            return said.model_stats[0].inference_stats.success.count

        before = count()
        self.infer(model, self.events)
        # Triton counts after it has answered.
        deadline = time.monotonic() + 10
        while count() != before + 1:
            assert time.monotonic() < deadline, (count(), before)
            time.sleep(0.05)

    def check_parameters(self):
        """Parameters of every kind reach the preprocessing, and one of a wrong kind is told."""
        model, one = self.cases["models"][0], rows(self.events, [0])
        self.infer(model, one, parameters={"of_site": "text", "number": 7, "flag": False})
        for wrong in ["yes", 1]:
            self.refused(
                "exclude_seen",
                lambda wrong=wrong: self.infer(model, one, parameters={"exclude_seen": wrong}),
            )

    def check_answers(self):
        """The answers to the events."""
        for model in self.cases["models"]:
            self.same(self.infer(model, self.events, 10), model)

    def check_scores(self):
        """The scores of the whole catalogue."""
        for model in self.cases["models"]:
            answer = self.infer(f"{model}_scores", self.events)
            output = answer.as_numpy("output")
            best = np.sort(output[:, 2:], axis=1)[:, ::-1][:, :10]
            wanted = np.array(self.cases["expected"][model]["item_scores"], np.float32)
            assert np.abs(best - wanted).max() < 1e-5

    def check_one_event(self):
        """A single event, and one about which nothing is known."""
        model = self.cases["models"][0]
        answer = self.infer(model, rows(self.events, [0]))
        assert answer.as_numpy("item_ids").shape == (1, 20)
        unknown = {name: ["never"] if TYPES[name] == "BYTES" else [-7] for name in TYPES}
        unknown |= {"event_time": ["2031-01-01 00:00:00 UTC"], "price": [3.5]}
        answer = self.infer(model, unknown)
        assert np.isfinite(answer.as_numpy("item_scores")).all()
        assert answer.as_numpy("fallback").all()

    def check_compression(self):
        """Requests and answers in the compressions that the client has."""
        model = self.cases["models"][0]
        for algorithm in ["gzip", "deflate"]:
            if self.module is tritonclient.http:
                more = {
                    "request_compression_algorithm": algorithm,
                    "response_compression_algorithm": algorithm,
                }
            else:
                more = {"compression_algorithm": algorithm}
            self.same(self.infer(model, self.events, 10, **more), model)

    def check_top_k(self):
        """As a parameter, and as both."""
        for model in self.cases["models"]:
            answer = self.infer(model, self.events, parameters={"top_k": 3})
            assert answer.as_numpy("item_ids").shape[1] == 3
            assert (answer.as_numpy("n_items") == 3).all()
            self.refused(
                "`top_k` is 4 as an input",
                lambda: self.infer(model, self.events, 4, parameters={"top_k": 3}),
            )
            self.refused(
                "`top_k` must be a whole",
                lambda: self.infer(model, self.events, parameters={"top_k": "3"}),
            )
        self.infer(model, self.events, timeout=0)

    def check_exclusion(self):
        """Items of the session are left out if asked."""
        model = self.cases["models"][0]
        answer = self.infer(model, self.events, 50, parameters={"exclude_seen": True})
        ids = answer.as_numpy("item_ids")
        for row, session in enumerate(answer.as_numpy("session").reshape(-1)):
            of_session = [
                place
                for place, name in enumerate(self.events["user_session"])
                if name == session.decode()
            ]
            seen = {self.events["product_id"][place] for place in of_session}
            assert seen.isdisjoint(ids[row].tolist())

    def check_many_rows(self):
        """Ten thousand rows."""
        model = self.cases["models"][0]
        n = len(self.events["product_id"])
        many = rows(self.events, [row % n for row in range(10_000)])
        many["user_session"] = [
            f"{name}/{row // n}" for row, name in enumerate(many["user_session"])
        ]
        answer = self.infer(model, many, 1)
        assert len(answer.as_numpy("item_ids")) == len(set(many["user_session"]))
        best = dict(zip(self.cases["sessions"], self.cases["expected"][model]["item_scores"]))
        for session, scores in zip(
            answer.as_numpy("session").reshape(-1), answer.as_numpy("item_scores")
        ):
            name, number = session.decode().rsplit("/", 1)
            # The last of them may have lost events.
            assert int(number) == 10_000 // n or abs(scores[0] - best[name][0]) < 1e-5, (
                session,
                scores,
            )

    def check_faults(self):
        """Requests that make no sense."""
        model, module = self.cases["models"][0], self.module
        one = rows(self.events, [0])
        self.refused("has a session", lambda: self.infer(model, rows(self.events, [])))
        self.refused(
            "NaN is not a price", lambda: self.infer(model, one | {"price": [float("nan")]})
        )
        self.refused("`top_k` is 101", lambda: self.infer(model, one, 101))
        self.refused(
            "column `event_time`", lambda: self.infer(model, one | {"event_time": ["noon"]})
        )

        def with_price(price):
            """A request with another price tensor."""
            made = [given for given in inputs(module, one) if given.name() != "price"]
            return self.client.infer(model, made + price)

        # What is missing, Triton says in words of its own.
        self.refused("", lambda: with_price([]))
        self.refused("price", lambda: with_price([tensor(module, "price", "INT64", [1])]))
        self.refused("price", lambda: with_price([tensor(module, "price", "FP64", [1, 2])]))

    def check_reload(self):
        """Unloading and loading, again and again."""
        model = self.cases["models"][-1]
        for _ in range(5):
            self.client.unload_model(model)
            assert not self.client.is_model_ready(model)
            self.client.load_model(model)
            self.same(self.infer(model, self.events, 10), model)

    def run(self):
        """All checks."""
        for name in sorted(name for name in dir(self) if name.startswith("check_")):
            getattr(self, name)()
            print(f"{self.module.__name__} {name.removeprefix('check_')}: ok", flush=True)


def random_events(random, events):
    """Rows of events, some of which are as no shop should write them."""
    n = random.choice([1, 2, 3, 10, 60])
    chosen = rows(events, [random.randrange(len(events["price"])) for _ in range(n)])
    cells = {
        "event_time": [
            "2019-10-01 00:00:00 UTC",
            "2019-10-01T00:00:00Z",
            "2019-10-01 00:00:00.999 UTC",
            "1970-01-01 00:00:00 UTC",
            "2199-12-31 23:59:59 UTC",
            "1969-12-31 23:59:59 UTC",
            "2019-10-01",
            "2019-02-29 00:00:00 UTC",
            "2019-10-01 24:00:00 UTC",
            "",
        ],
        "event_type": ["", "view", "VIEW", "никогда", "a" * 300],
        "product_id": [0, -1, 2**63 - 1, -(2**63), 1],
        "category_id": [0, -1, 2**63 - 1, -(2**63)],
        "category_code": ["", "electronics", "None", "\u0000", "é.è"],
        "brand": ["", "samsung ", "Samsung", "null"],
        "price": [0.0, 1e-300, 1e30, 4e38, -0.0, -1.0, float("nan"), float("inf")],
        "user_session": ["", "a", "b", " a", "7", "007", "\n"],
    }
    # Most requests are about sessions of a few ids, in any order; a few have one bad cell or more.
    chosen["user_session"] = [random.choice("abc") for _ in range(n)]
    for _ in range(random.choice([0, 0, 1, 3, n])):
        name = random.choice(list(cells))
        chosen[name][random.randrange(n)] = random.choice(cells[name])
    return chosen


def check_random(client, cases):
    """Preprocessing answers random events, or refuses them as invalid. The digest of all answers
    is printed, so that servers can be compared."""
    generator = random.Random(7)
    digest = hashlib.sha256()
    answered = refused = 0
    for number in range(400):
        events = random_events(generator, cases["events"])
        asked = inputs(tritonclient.grpc, events, generator.choice([None, 1, 20]))
        if generator.random() < 0.3:
            asked = [given for given in asked if given.name() not in ("category_code", "brand")]
        exclude = {"exclude_seen": generator.random() < 0.5}
        try:
            answer = client.infer(cases["preprocessing"], asked, parameters=exclude)
        except InferenceServerException as error:
            assert "INVALID_ARGUMENT" in error.status(), (number, events, error)
            refused += 1
            digest.update(b"refused")
            continue
        answered += 1
        for name in sorted(output.name for output in answer.get_response().outputs):
            values = answer.as_numpy(name)
            assert values.dtype != np.float32 or np.isfinite(values).all(), (
                number,
                name,
                values,
                events,
            )
            digest.update(repr((name, values.shape, values.tolist())).encode())
    assert answered > 100 and refused > 20, (answered, refused)
    print(
        f"random events: {answered} answered, {refused} refused, {digest.hexdigest()}", flush=True
    )


def check_concurrent(address, cases, key):
    """Many clients at once, and among them some whose requests make no sense."""
    faults = []

    def ask(check):
        """A client that goes on asking the same."""
        client = connected(tritonclient.grpc, address, key)
        try:
            for _ in range(10):
                check(Checks(tritonclient.grpc, client, cases))
        except Exception as fault:  # noqa: BLE001: told below
            faults.append(fault)
        client.close()

    # Faults of others are nobody's own.
    checks = [Checks.check_answers] * 8 + [Checks.check_faults] * 2
    clients = [threading.Thread(target=ask, args=[check]) for check in checks]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert not faults, faults[0]
    print("concurrent clients: ok", flush=True)


def main():
    """Arguments in, an exit code out."""
    http, grpc, path, *key = sys.argv[1:]
    key = key[0] if key else None
    cases = json.loads(open(path, encoding="utf-8").read())
    for config in cases["configs"]:
        parsed = text_format.Parse(
            open(config, encoding="utf-8").read(), model_config_pb2.ModelConfig()
        )
        assert parsed.name in config
    print("configurations: ok", flush=True)
    if key:
        check_keys(http, grpc, key)
    of_http = connected(tritonclient.http, http, key, concurrency=1)
    of_grpc = connected(tritonclient.grpc, grpc, key)
    for model in cases["models"]:
        of_http.load_model(model)
        of_grpc.load_model(f"{model}_scores")
    try:
        Checks(tritonclient.http, of_http, cases).run()
        Checks(tritonclient.grpc, of_grpc, cases).run()
        of_grpc.load_model(cases["preprocessing"])
        check_random(of_grpc, cases)
        check_concurrent(grpc, cases, key)
    finally:
        # A server that is told to stop waits for connections that are kept.
        of_http.close()
        of_grpc.close()


if __name__ == "__main__":
    main()
