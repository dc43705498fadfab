"""Events from encoded sessions: a CSV that `bireme preprocess` turns back into the same sessions.

    python benches/events_of_sessions.py SESSIONS_BY_DAY EVENTS.csv

For sessions of which only the ids are at hand, as the public days of the REES46 shop: ids stand for
products, categories and brands, a session's events follow each other by a second, and its day is
kept. All ids are given anew, and sessions are dealt anew to train, valid and test.
"""

import csv
import datetime
import math
import pathlib
import sys

import pyarrow.parquet

EVENT_TYPES = ["view", "cart", "purchase"]
FIRST_DAY = datetime.datetime(2019, 10, 1)

sessions, out = pathlib.Path(sys.argv[1]), sys.argv[2]
with open(out, "w", newline="") as file:
    events = csv.writer(file)
    events.writerow(
        "event_time,event_type,product_id,category_id,category_code,brand,price,user_id,user_session".split(
            ","
        )
    )
    for day in sorted(int(folder.name) for folder in sessions.iterdir() if folder.is_dir()):
        rows = [
            row
            for part in ("train", "valid", "test")
            for row in pyarrow.parquet.read_table(
                sessions / str(day) / f"{part}.parquet"
            ).to_pylist()
        ]
        rows.sort(key=lambda row: row["user_session"])
        for i, row in enumerate(rows):
            start = FIRST_DAY + datetime.timedelta(days=day - 1, seconds=i * 86000 // len(rows))
            for j, item in enumerate(row["product_id-list_seq"]):
                events.writerow(
                    [
                        f"{start + datetime.timedelta(seconds=j)} UTC",
                        EVENT_TYPES[row["event_type-list_seq"][j] % 3],
                        item,
                        row["category_id-list_seq"][j],
                        row["category_code-list_seq"][j],
                        row["brand-list_seq"][j],
                        round(math.exp(4 + row["price_log_norm-list_seq"][j]), 2),
                        row["user_session"],
                        row["user_session"],
                    ]
                )
