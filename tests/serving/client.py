#!/usr/bin/env python3
"""Asks a server of the KServe v2 protocol what Triton's own client can ask, and checks the answers.

usage: client.py HTTP GRPC CASES

CASES is a JSON file: `models`, the ensembles to be asked; `events`, columns of event rows; and what is expected of them:
`sessions`, `item_ids` and `item_scores` by model. Prints a line for each check; exit code 1 if one fails.
"""

import json
import sys
import threading

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


class Checks:
    """The checks of one client."""

    def __init__(self, module, client, cases):
        self.module, self.client, self.cases = module, client, cases
        self.events = cases["events"]

    def infer(self, model, events, top_k=None, **more):
        """What a model answers."""
        return self.client.infer(model, inputs(self.module, events, top_k), **more)

    def same(self, answer, model):
        """Compares an answer with what is expected: items may change places where their scores are as good as equal."""
        expected = self.cases["expected"][model]
        sessions = [session.decode() for session in answer.as_numpy("session").reshape(-1)]
        assert sessions == self.cases["sessions"], sessions[:3]
        scores, wanted = answer.as_numpy("item_scores"), np.array(expected["item_scores"], np.float32)
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

    def check_exclusion(self):
        """Items of the session are left out if asked."""
        model = self.cases["models"][0]
        answer = self.infer(model, self.events, 50, parameters={"exclude_seen": True})
        ids = answer.as_numpy("item_ids")
        for row, session in enumerate(answer.as_numpy("session").reshape(-1)):
            of_session = [place for place, name in enumerate(self.events["user_session"]) if name == session.decode()]
            seen = {self.events["product_id"][place] for place in of_session}
            assert seen.isdisjoint(ids[row].tolist())

    def check_many_rows(self):
        """Ten thousand rows."""
        model = self.cases["models"][0]
        n = len(self.events["product_id"])
        many = rows(self.events, [row % n for row in range(10_000)])
        many["user_session"] = [f"{name}/{row // n}" for row, name in enumerate(many["user_session"])]
        answer = self.infer(model, many, 1)
        assert len(answer.as_numpy("item_ids")) == len(set(many["user_session"]))

    def check_faults(self):
        """Requests that make no sense."""
        model, module = self.cases["models"][0], self.module
        one = rows(self.events, [0])
        self.refused("has a session", lambda: self.infer(model, rows(self.events, [])))
        self.refused("NaN is no price", lambda: self.infer(model, one | {"price": [float("nan")]}))
        self.refused("`top_k` is 101", lambda: self.infer(model, one, 101))
        self.refused("column `event_time`", lambda: self.infer(model, one | {"event_time": ["noon"]}))

        def with_price(price):
            """A request with another price tensor."""
            made = [given for given in inputs(module, one) if given.name() != "price"]
            return self.client.infer(model, made + price)

        # What is missing, Triton says in words of its own.
        self.refused("", lambda: with_price([]))
        self.refused("price", lambda: with_price([tensor(module, "price", "INT64", [1])]))
        self.refused("price", lambda: with_price([tensor(module, "price", "FP64", [1, 2])]))

    def check_reload(self):
        """Unloading and loading."""
        model = self.cases["models"][-1]
        self.client.unload_model(model)
        self.client.load_model(model)
        self.same(self.infer(model, self.events, 10), model)

    def run(self):
        """All checks."""
        for name in sorted(name for name in dir(self) if name.startswith("check_")):
            getattr(self, name)()
            print(f"{self.module.__name__} {name.removeprefix('check_')}: ok", flush=True)


def check_concurrent(address, cases):
    """Many clients at once, each with sessions of its own lengths."""
    faults = []

    def ask():
        client = tritonclient.grpc.InferenceServerClient(address)
        checks = Checks(tritonclient.grpc, client, cases)
        try:
            for _ in range(10):
                checks.check_answers()
        except Exception as fault:  # noqa: BLE001: told below
            faults.append(fault)
        client.close()

    clients = [threading.Thread(target=ask) for _ in range(8)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert not faults, faults[0]
    print("concurrent clients: ok", flush=True)


def main():
    """Arguments in, an exit code out."""
    http, grpc, path = sys.argv[1:]
    cases = json.loads(open(path, encoding="utf-8").read())
    for config in cases["configs"]:
        parsed = text_format.Parse(open(config, encoding="utf-8").read(), model_config_pb2.ModelConfig())
        assert parsed.name in config
    print("configurations: ok", flush=True)
    of_http = tritonclient.http.InferenceServerClient(http, concurrency=1)
    of_grpc = tritonclient.grpc.InferenceServerClient(grpc)
    for model in cases["models"]:
        of_http.load_model(model)
        of_grpc.load_model(f"{model}_scores")
    try:
        Checks(tritonclient.http, of_http, cases).run()
        Checks(tritonclient.grpc, of_grpc, cases).run()
        check_concurrent(grpc, cases)
    finally:
        # A server that is told to stop waits for connections that are kept.
        of_http.close()
        of_grpc.close()


if __name__ == "__main__":
    main()
