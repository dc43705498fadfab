"""The transforms of `bireme preprocess` as one would write them in polars-python: CSV in, parquet
by day out.

    pip install polars
    python etl_polars.py events.csv OUT

The whole input is one lazy query as far as it goes; what several later steps need is collected
once. Sessions are split 80/10/10 by polars' seeded hash of the session id (other members than in
Bireme, the same work).
"""

import json
import sys
import time
from math import tau
from pathlib import Path

import polars as pl

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
MAX_LENGTH, MIN_LENGTH, SEED = 20, 2, 42


def read(path):
    """Events with a session, sorted by (session, time) in file order, without repeats."""
    events = (
        pl.scan_csv(
            path,
            schema_overrides={
                "product_id": pl.Int64,
                "category_id": pl.Int64,
                "price": pl.Float64,
                "user_session": pl.String,
            },
        )
        .filter(pl.col("user_session").is_not_null())
        .with_columns(
            ts=pl.col("event_time")
            .str.strptime(pl.Datetime("us"), "%Y-%m-%d %H:%M:%S UTC")
            .dt.epoch("s")
        )
        .drop("event_time")
        .sort("user_session", "ts", maintain_order=True)
    )
    same = (pl.col("user_session") == pl.col("user_session").shift()) & (
        pl.col("product_id") == pl.col("product_id").shift()
    )
    return events.filter(~same.fill_null(False)).collect(engine="streaming")


def normal(column, std_mean):
    mean, std = std_mean
    return ((pl.col(column) - mean) / std if std and std > 0 else pl.col(column) - mean).cast(
        pl.Float32
    )


def main(path, out):
    out = Path(out)
    workflow = out / "workflow"
    workflow.mkdir(parents=True)
    events = read(path)

    # Fit.
    vocabularies = {}
    for column in CATEGORICAL:
        vocabularies[column] = (
            events.lazy()
            .filter(pl.col(column).is_not_null())
            .group_by(column)
            .len("count")
            .sort("count", column, descending=[True, False])
            .with_row_index("id", offset=2)
            .with_columns(pl.col("id").cast(pl.Int64))
            .collect(engine="streaming")
        )
        vocabularies[column].write_parquet(workflow / f"{column}.parquet")
    first_seen = events.lazy().group_by("product_id").agg(first=pl.col("ts").min())
    mean_price = events.lazy().group_by("category_id").agg(avg=pl.col("price").mean())
    first_seen.sink_parquet(workflow / "products.parquet")
    mean_price.sink_parquet(workflow / "categories.parquet")

    # Apply.
    weekday = tau * (pl.col("ts").floordiv(86400).add(3).mod(7) + 1 + 1e-6) / 7
    events = (
        events.lazy()
        .join(first_seen, on="product_id", how="left", maintain_order="left")
        .join(mean_price, on="category_id", how="left", maintain_order="left")
        .with_columns(
            price_log=pl.col("price").cast(pl.Float32).log1p(),
            recency_log=((pl.col("ts") - pl.col("first")) / 86400).cast(pl.Float32).log1p(),
            et_dayofweek_sin=weekday.sin().cast(pl.Float32),
            et_dayofweek_cos=weekday.cos().cast(pl.Float32),
            relative_price_to_avg_categ_id=(pl.col("price") - pl.col("avg"))
            / (pl.col("avg") + 1e-5),
        )
        .collect(engine="streaming")
    )
    moments = {
        column: (events[column].cast(pl.Float64).mean(), events[column].cast(pl.Float64).std())
        for column in ["price_log", "recency_log"]
    }
    (workflow / "statistics.json").write_text(json.dumps(moments))
    start = events["ts"].min()

    encoded = events.lazy().with_columns(
        price_log_norm=normal("price_log", moments["price_log"]),
        product_recency_days_log_norm=normal("recency_log", moments["recency_log"]),
        session=pl.col("user_session"),
    )
    for column in CATEGORICAL:
        if column == "user_id":
            continue
        ids = vocabularies[column].lazy().select(column, pl.col("id").alias(f"{column}_id"))
        encoded = (
            encoded.join(ids, on=column, how="left", maintain_order="left")
            .with_columns(pl.col(f"{column}_id").fill_null(1).alias(column))
            .drop(f"{column}_id")
        )
    sessions = (
        encoded.group_by("user_session", maintain_order=True)
        .agg(
            pl.col("session").first(),
            pl.len().cast(pl.Int64).alias("product_id-count"),
            (pl.col("ts").first() - start).floordiv(86400).add(1).alias("day_index"),
            *[pl.col(c).head(MAX_LENGTH).alias(f"{c}-list_seq") for c in LISTS],
        )
        .filter(pl.col("product_id-count") >= MIN_LENGTH)
        .with_columns(r=pl.col("session").hash(SEED) % 10)
        .drop("session")
        .sort("user_session")
        .collect(engine="streaming")
    )
    for (day,), table in sessions.partition_by("day_index", as_dict=True).items():
        folder = out / "sessions_by_day" / str(day)
        folder.mkdir(parents=True)
        for split, part in [
            ("train", pl.col("r") < 8),
            ("valid", pl.col("r") == 8),
            ("test", pl.col("r") == 9),
        ]:
            part = table.filter(part).drop("r", "day_index")
            part.write_parquet(
                folder / f"{split}.parquet",
                compression="zstd",
                row_group_size=min(max(-(-len(part) // 64), 256), 8192),
            )
    return sessions


if __name__ == "__main__":
    began = time.perf_counter()
    sessions = main(*sys.argv[1:])
    print(f"{sessions.height} sessions in {time.perf_counter() - began:.2f} s")
