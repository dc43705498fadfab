"""The transforms of `bireme preprocess` as one would write them in pandas: CSV in, parquet by day
out.

    pip install pandas pyarrow
    python etl_pandas.py events.csv OUT

Sessions are split 80/10/10 by pandas' hash of the session id (other members than in Bireme, the
same work).
"""

import json
import sys
import time
from math import tau
from pathlib import Path

import numpy as np
import pandas as pd

CATEGORICAL = [
    "product_id",
    "category_id",
    "category_code",
    "brand",
    "event_type",
    "user_id",
    "user_session",
]
LISTS = [
    "product_id",
    "category_code",
    "event_type",
    "brand",
    "category_id",
    "et_dayofweek_sin",
    "et_dayofweek_cos",
    "price_log_norm",
    "relative_price_to_avg_categ_id",
    "product_recency_days_log_norm",
]
DAY, MAX_LENGTH, MIN_LENGTH = 86400, 20, 2


def read(path):
    """Events with a session, sorted by (session, time) in file order, without repeats."""
    events = pd.read_csv(
        path, dtype={"category_code": "str", "brand": "str", "user_session": "str"}
    )
    events = events[events["user_session"].notna()]
    times = pd.to_datetime(events.pop("event_time"), format="%Y-%m-%d %H:%M:%S UTC")
    events["ts"] = times.astype("datetime64[s]").astype("int64")
    events = events.sort_values(["user_session", "ts"], kind="stable", ignore_index=True)
    session, product = events["user_session"], events["product_id"]
    return events[~((session == session.shift()) & (product == product.shift()))].reset_index(
        drop=True
    )


def main(path, out):
    out = Path(out)
    workflow = out / "workflow"
    workflow.mkdir(parents=True)
    events = read(path)

    # Fit.
    codes = {}
    for column in CATEGORICAL:
        counts = (
            events.groupby(column, sort=True).size().sort_values(ascending=False, kind="stable")
        )
        counts.rename("count").reset_index().to_parquet(workflow / f"{column}.parquet")
        codes[column] = pd.Series(np.arange(2, len(counts) + 2), index=counts.index)
    first_seen = events.groupby("product_id")["ts"].min()
    mean_price = events.groupby("category_id")["price"].mean()
    first_seen.reset_index().to_parquet(workflow / "products.parquet")
    mean_price.reset_index().to_parquet(workflow / "categories.parquet")

    # Apply.
    start = events["ts"].min()
    weekday = tau * ((events["ts"] // DAY + 3) % 7 + 1 + 1e-6) / 7
    events["et_dayofweek_sin"] = np.sin(weekday).astype("float32")
    events["et_dayofweek_cos"] = np.cos(weekday).astype("float32")
    average = events["category_id"].map(mean_price)
    events["relative_price_to_avg_categ_id"] = (
        (events["price"] - average) / (average + 1e-5)
    ).astype("float32")
    age = (events["ts"] - events["product_id"].map(first_seen)) / DAY
    moments = {}
    for name, of in [("price_log_norm", events["price"]), ("product_recency_days_log_norm", age)]:
        log = np.log1p(of.astype("float32"))
        wide = log.astype("float64")
        mean, std = moments[name] = (float(wide.mean()), float(wide.std()))
        events[name] = ((log - mean) / std if std > 0 else log - mean).astype("float32")
    (workflow / "statistics.json").write_text(json.dumps(moments))
    day = (events.groupby("user_session", sort=False)["ts"].first() - start) // DAY + 1
    part = pd.util.hash_array(day.index.to_numpy(dtype=object)) % 10
    for column in CATEGORICAL[:-1]:
        if column != "user_id":
            events[column] = events[column].map(codes[column]).fillna(1).astype("int64")

    sessions = events.groupby("user_session", sort=False)
    lists = (
        events[sessions.cumcount() < MAX_LENGTH]
        .groupby("user_session", sort=False)[LISTS]
        .agg(list)
    )
    lists.columns = [f"{column}-list_seq" for column in LISTS]
    lists["product_id-count"] = sessions.size()
    lists["day_index"], lists["part"] = day, part
    lists = lists[lists["product_id-count"] >= MIN_LENGTH].reset_index()
    lists["user_session"] = lists["user_session"].map(codes["user_session"])
    for index, table in lists.groupby("day_index"):
        folder = out / "sessions_by_day" / str(index)
        folder.mkdir(parents=True)
        for split, of in [
            ("train", table["part"] < 8),
            ("valid", table["part"] == 8),
            ("test", table["part"] == 9),
        ]:
            table[of].drop(columns=["part", "day_index"]).to_parquet(
                folder / f"{split}.parquet", compression="zstd"
            )
    return lists


if __name__ == "__main__":
    began = time.perf_counter()
    n_sessions = len(main(*sys.argv[1:]))
    print(f"{n_sessions} sessions in {time.perf_counter() - began:.2f} s")
