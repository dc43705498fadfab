#!/usr/bin/env python3
"""Asks a server of an exported model, Triton or `bireme serve`, what it recommends to the first
sessions of a file.

usage: ask.py REPOSITORY NAME EVENTS.csv [--http HOST:PORT] [--sessions N] [--top K]

An example for clients: the rows of the file go to the server as they are, and the answer's product
ids get their names from the workflow that lies in the repository. Needs `pip install
'tritonclient[http]' pyarrow`.
"""

import argparse
import csv
import itertools
from pathlib import Path

import numpy as np
import pyarrow.parquet
import tritonclient.http as client

TYPES = {
    "event_time": ("BYTES", str),
    "event_type": ("BYTES", str),
    "product_id": ("INT64", int),
    "category_id": ("INT64", int),
    "category_code": ("BYTES", str),
    "brand": ("BYTES", str),
    "price": ("FP64", float),
    "user_session": ("BYTES", str),
}


def tensor(name, datatype, values):
    """An input of a request, a row for each value."""
    values = np.array(values, np.object_ if datatype == "BYTES" else None).reshape(-1, 1)
    made = client.InferInput(name, values.shape, datatype)
    made.set_data_from_numpy(values)
    return made


def names(repository, name):
    """Brand, category and price of each product, as its latest event had them."""
    newest = max((repository / f"{name}_etl").glob("[0-9]*"), key=lambda version: int(version.name))
    table = pyarrow.parquet.read_table(newest / "workflow/products.parquet")
    return {
        row["product_id"]: (row["brand"] or "-", row["category_code"] or "-", row["price"])
        for row in table.to_pylist()
    }


def main():
    """Arguments in, lines out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("repository", type=Path)
    parser.add_argument("name")
    parser.add_argument("events", type=Path)
    parser.add_argument("--http", default="127.0.0.1:8000")
    parser.add_argument("--sessions", type=int, default=2)
    parser.add_argument("--top", type=int, default=5)
    options = parser.parse_args()

    sessions = {}
    with options.events.open(newline="") as file:
        for row in itertools.islice(csv.DictReader(file), 10_000):
            sessions.setdefault(row["user_session"], []).append(row)
    sessions = [events for events in sessions.values() if len(events) > 1][: options.sessions]
    events = [event for session in sessions for event in session]
    inputs = [
        tensor(name, datatype, [read(event[name]) for event in events])
        for name, (datatype, read) in TYPES.items()
    ]
    top_k = client.InferInput("top_k", [1], "INT32")
    top_k.set_data_from_numpy(np.array([options.top], np.int32))

    server = client.InferenceServerClient(options.http)
    answer = server.infer(options.name, [*inputs, top_k])
    server.close()
    known = names(options.repository, options.name)
    ids, scores, n_items = (
        answer.as_numpy(name) for name in ("item_ids", "item_scores", "n_items")
    )
    for row, session in enumerate(answer.as_numpy("session").reshape(-1)):
        print(f"session {session.decode()}")
        for event in sessions[row]:
            print(
                f"  {event['event_type']:12} {event['product_id']:>9}  {event['brand'] or '-':12} {event['category_code'] or '-'}"
            )
        # What follows the first `n_items` has no meaning.
        for id, score in list(zip(ids[row], scores[row]))[: n_items[row].item()]:
            brand, category, price = known[id]
            print(f"  next {score:7.2f} {id:>9}  {brand:12} {category}  {price:.2f}")


if __name__ == "__main__":
    main()
