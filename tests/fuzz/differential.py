#!/usr/bin/env python3
"""Holds what `bireme preprocess` reads against independent readers, on hostile files from a seed.

    python tests/fuzz/differential.py --bireme target/debug/bireme --seconds 60 --seed 1

CSV: a reader of the dialect of docs/data.md, character by character, and Python's csv module where
all quotes are in order. Parquet: pyarrow, and files with bytes changed, which must be refused in
one line or read. Needs pyarrow. A file that is read differently is kept in --keep and ends the run
with exit code 1.
"""

import argparse
import csv
import datetime
import decimal
import gzip
import io
import pathlib
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq

HEADER = "event_time,event_type,product_id,category_id,category_code,brand,price,user_id,user_session".split(
    ","
)
N = len(HEADER)
TIME, TYPE, PRODUCT, CATEGORY, CODE, BRAND, PRICE, USER, SESSION = range(N)
INTS = (PRODUCT, CATEGORY, USER)


# The dialect, without regard to speed.


def scan(data, at):
    """The fields of the record at `at` and where the next begins; None if its quotes are wrong."""
    fields = []
    while True:
        field = bytearray()
        if data[at : at + 1] == b'"':
            at += 1
            while True:
                if at >= len(data):
                    return None
                if data[at : at + 2] == b'""':
                    field += b'"'
                    at += 2
                elif data[at : at + 1] == b'"':
                    at += 1
                    break
                else:
                    field += data[at : at + 1]
                    at += 1
            rest = data[at : at + 2]
            if not (rest[:1] in (b",", b"\n", b"") or rest == b"\r\n" or data[at:] == b"\r"):
                return None
            if rest[:1] == b"\r":
                at += 1
        else:
            while at < len(data) and data[at : at + 1] not in (b",", b"\n"):
                field += data[at : at + 1]
                at += 1
            is_end = at >= len(data) or data[at : at + 1] == b"\n"
            if is_end and field.endswith(b"\r"):
                del field[-1]
        fields.append(bytes(field))
        if data[at : at + 1] == b",":
            at += 1
            continue
        return fields, min(at + 1, len(data))


def is_time(text):
    # `strptime` also takes other white space for a space.
    if not re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC", text, re.ASCII):
        return False
    try:
        datetime.datetime.strptime(text, "%Y-%m-%d %H:%M:%S UTC")
        return True
    except ValueError:
        return False


def is_int(text):
    digits = text[1:] if text[:1] in ("-", "+") else text
    return digits.isascii() and digits.isdigit() and -(2**63) <= int(text) < 2**63


def is_price(text):
    try:
        return text == text.strip() and "_" not in text and 0 <= float(text) < 3.4e38
    except ValueError:
        return False


def row(fields, names, checked=False):
    """The cells by column, None without a session, False for a bad row."""
    if len(fields) != len(names):
        return False
    cells = {name: field for name, field in zip(names, fields) if name in HEADER}
    # The other cells of a row without a session are not looked at.
    if not cells["user_session"] and not checked:
        return None
    try:
        cells = {name: cell.decode() for name, cell in cells.items()}
    except UnicodeDecodeError:
        return False
    good = is_time(cells["event_time"]) and is_price(cells["price"]) and is_int(cells["product_id"])
    for name in ("category_id", "user_id"):
        good = good and (not cells.get(name) or is_int(cells[name]))
    return cells if good else False


def open_field(line):
    """The commas before and after the quote that a line opens and does not close, or None."""
    field, at = 0, 0
    while True:
        if line[at : at + 1] == b'"':
            start = at + 1
            at = start
            while True:
                at = line.find(b'"', at)
                if at < 0:
                    return field, line[start:].count(b",")
                if line[at : at + 2] != b'""':
                    break
                at += 2
            at += 1
        else:
            at = line.find(b",", at)
        if at < 0 or at >= len(line):
            return None
        at += 1
        field += 1


def is_swallowing(data, at, end, names):
    record = data[at:end]
    record = record.removesuffix(b"\n")
    breaks = [i for i, byte in enumerate(record) if byte == 10]
    if not breaks:
        return False
    opened = open_field(record[: breaks[0]])
    if opened is None:
        return False
    for i in breaks:
        found = scan(data, at + i + 1)
        if found is None:
            continue
        if i == breaks[-1]:
            if sum(opened) + 1 == len(names) and len(found[0]) == len(names):
                return True
        elif row(found[0], names, checked=True):
            return True
    return False


def read_csv(data):
    """The good rows, the lines of bad ones, and how many rows have no session."""
    if data.startswith(b"\xef\xbb\xbf"):
        data = data[3:]
    rows, bad, without, line, at, names = [], [], 0, 1, 0, None
    while at < len(data):
        end = data.find(b"\n", at)
        end = len(data) if end < 0 else end
        first = data[at:end]
        if not first.strip(b" \t\r"):
            at, line = end + 1, line + 1
            continue
        found = scan(data, at)
        if found is not None and names is not None and is_swallowing(data, at, found[1], names):
            found = None
        if found is None:
            bad.append(line)
            at, line = end + 1, line + 1
            continue
        fields, after = found
        if names is None:
            names = [name.decode() for name in fields]
        else:
            cells = row(fields, names)
            if cells is None:
                without += 1
            elif cells is False:
                bad.append(line)
            else:
                rows.append(cells)
        line += data.count(b"\n", at, after - 1) + 1 if after > at else 1
        at = after
    return rows, bad, without


# Hostile files.

TEXTS = [
    "",
    "acme",
    "a b",
    "größer",
    '24" tv',
    "x\u2028y",
    "a\rb",
    " ",
    "'",
    "\\",
    "\\N",
    "NULL",
    "\x00",
    "0" * 50,
]
QUOTED = [
    '"a,b"',
    '"two\nlines"',
    '"a""b"',
    '""',
    '"\n\n"',
    '"""',
    '"a\r\nb"',
    '"a,b,c\n,,,,,,,,\nd"',
]
WRONG = ['"24 inch', '"LG" 24"', '"', '"a" ', '"a"b', '"""x"" y', '"a,b', "x,y", '"\n']


def csv_file(rng, next_product):
    lines = []
    names = HEADER + (["extra"] if rng.random() < 0.3 else [])
    if rng.random() < 0.3:
        rng.shuffle(names)
    quote_all = rng.random() < 0.1
    hostile = rng.choice([0.0, 0.05, 0.3])
    for _ in range(rng.choice([1, 3, 10, 200])):
        cells = {
            "event_time": f"2020-01-{rng.randint(1, 28):02} {rng.randint(0, 23):02}:00:{rng.randint(0, 59):02} UTC",
            "event_type": rng.choice(["view", "cart"]),
            "product_id": str(next_product()),
            "category_id": rng.choice(["", "10", "-5"]),
            "category_code": rng.choice(["", "a.b"]),
            "brand": rng.choice(TEXTS),
            "price": rng.choice(["1.5", "0", "1e3", ".5"]),
            "user_id": rng.choice(["", "7", "+8"]),
            "user_session": rng.choice(["s1", "s2", "s3", ""]),
            "extra": "e",
        }
        if rng.random() < hostile:
            cells[rng.choice(names)] = rng.choice(QUOTED + WRONG + TEXTS)
        if rng.random() < hostile:
            name = rng.choice(["brand", "category_code", "extra"])
            cells[name] = rng.choice(QUOTED + WRONG)
        if rng.random() < hostile / 3:
            cells[rng.choice(names)] = rng.choice(["9" * 19, "12.0", "-1", "nan", "x", "9" * 400])
        if quote_all:
            text = ",".join('"' + cells[name].replace('"', '""') + '"' for name in names)
        else:
            text = ",".join(cells[name] for name in names)
        lines.append(text)
        if rng.random() < hostile / 4:
            lines.append(rng.choice(["", " ", "\t", "\r", "x", ",,,", '"']))
    end = rng.choice(["\n", "\r\n"])
    text = end.join([",".join(names)] + lines) + rng.choice(["", end, end + end])
    data = text.encode()
    if rng.random() < hostile / 2:
        data = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(",".join(names)) + 1, len(data) + 1)
            data[at : at + rng.randint(0, 1)] = rng.choice(
                [b'"', b",", b"\n", b"\r", b"\xff", b"", b"\x00"]
            )
        data = bytes(data)
    return rng.choice([b"", b"\xef\xbb\xbf"]) + data


def packed(rng, data):
    """The same in another container."""
    kind = rng.choice(["plain"] * 4 + ["gzip", "members", "zip"])
    if kind == "gzip":
        return gzip.compress(data) + bytes(rng.choice([0, 0, 100]))
    if kind == "members":
        at = rng.randint(0, len(data))
        return gzip.compress(data[:at]) + gzip.compress(data[at:])
    if kind == "zip":
        out = io.BytesIO()
        with zipfile.ZipFile(
            out, "w", rng.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])
        ) as archive:
            archive.writestr("events.csv", data)
        return out.getvalue()
    return data


def parquet_file(rng, next_product, path):
    n = rng.choice([1, 5, 100, 3000])
    ints = rng.choice(
        [pa.int64(), pa.int32(), pa.uint32(), pa.uint64(), pa.decimal128(20, 0), pa.string()]
    )
    small = rng.choice([pa.int8(), pa.uint8(), pa.int16(), pa.uint16(), pa.int64()])
    stamp = rng.choice(
        [pa.timestamp("ms"), pa.timestamp("us", "UTC"), pa.timestamp("ns"), pa.string()]
    )
    price = rng.choice(
        [
            pa.float64(),
            pa.float32(),
            pa.decimal128(9, 2),
            pa.decimal256(50, 4),
            pa.int32(),
            pa.string(),
        ]
    )
    text = rng.choice(
        [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.binary()]
    )
    maybe = lambda value: value if rng.random() < 0.8 else None
    start = datetime.datetime(2020, 1, 1)
    times = [start + datetime.timedelta(seconds=rng.randint(0, 10**6)) for _ in range(n)]
    if stamp == pa.string():
        times = [f"{t:%Y-%m-%d %H:%M:%S} UTC" for t in times]
    prices = [rng.randint(0, 1000) for _ in range(n)]
    if pa.types.is_decimal(price):
        prices = [decimal.Decimal(p) / 4 for p in prices]
    encode = (lambda t: t.encode()) if text == pa.binary() else (lambda t: t)
    number = (
        (lambda i: str(i))
        if ints == pa.string()
        else (lambda i: decimal.Decimal(i))
        if pa.types.is_decimal(ints)
        else (lambda i: i)
    )
    columns = {
        "event_time": pa.array(times, stamp),
        "event_type": pa.array(
            [encode(rng.choice(["view", "cart"])) for _ in range(n)],
            text if text == pa.binary() else pa.string(),
        ),
        "product_id": pa.array([number(next_product()) for _ in range(n)], ints),
        "category_id": pa.array([maybe(rng.randint(0, 100)) for _ in range(n)], small),
        "brand": pa.array(
            [None if (b := maybe(rng.choice(TEXTS))) is None else encode(b) for _ in range(n)],
            pa.string() if pa.types.is_dictionary(text) else text,
        ),
        "price": pa.array([str(p) for p in prices] if price == pa.string() else prices, price),
        "user_session": pa.array(
            [maybe(f"s{rng.randint(0, n // 3)}") for _ in range(n)], pa.string()
        ),
        "beside": pa.array(
            [rng.choice([[decimal.Decimal(1)], None, []]) for _ in range(n)],
            pa.list_(pa.decimal128(9, 2)),
        ),
    }
    if pa.types.is_dictionary(text):
        columns["brand"] = columns["brand"].dictionary_encode()
    table = pa.table(columns)
    pq.write_table(
        table,
        path,
        compression=rng.choice(["none", "snappy", "gzip", "zstd", "brotli", "lz4"]),
        version=rng.choice(["1.0", "2.6"]),
        data_page_version=rng.choice(["1.0", "2.0"]),
        use_dictionary=rng.choice([True, False]),
        data_page_size=rng.choice([64, 1 << 20]),
        row_group_size=rng.choice([1, 7, 1 << 20]) if n < 1000 else 1000,
        store_schema=rng.choice([True, False]),
    )
    back = pq.read_table(path).to_pylist()
    text_of = lambda v: v.decode() if isinstance(v, bytes) else v
    rows = []
    for cells in back:
        if cells["user_session"]:
            rows.append(
                {
                    name: str(text_of(cells[name])) if cells.get(name) is not None else ""
                    for name in HEADER
                    if name in cells
                }
            )
    return rows, len(back) - len(rows)


# The comparison.


class Different(Exception):
    pass


def run(bireme, path, *flags):
    """Runs the command with bounded memory and time."""
    with tempfile.TemporaryDirectory() as out:
        limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
        command = [
            bireme,
            "preprocess",
            "--events",
            str(path),
            "--out",
            out + "/o",
            "--min-length",
            "1",
            *flags,
        ]
        done = subprocess.run(
            command, capture_output=True, timeout=60, preexec_fn=limit, check=False
        )
    error = done.stderr.decode(errors="replace")
    if done.returncode not in (0, 2) or "panicked" in error:
        raise Different(f"exit code {done.returncode}: {error[-500:]}")
    if any(ord(c) < 32 and c != "\n" for c in error):
        raise Different(f"control characters: {error!r}")
    report = {}
    for line in done.stdout.decode().splitlines():
        words = line.rsplit(None, 1)
        if len(words) == 2 and words[1].isdigit():
            report[words[0].strip()] = int(words[1])
    return done.returncode, error, report


def expect(what, found, expected):
    if found != expected:
        raise Different(f"{what}: {found} instead of {expected}")


def distinct(rows, name):
    values = {row.get(name, "") for row in rows} - {""}
    if name in ("product_id", "category_id", "user_id"):
        values = {int(value) for value in values}
    return len(values)


def compare(bireme, path, rows, bad, without):
    code, error, _ = run(bireme, path)
    if bad:
        expect("exit code", code, 2)
        if f"line {bad[0]}," not in error:
            raise Different(f"line {bad[0]} is not named: {error[-300:]}")
    else:
        expect("exit code", code, 0 if rows else 2)
    code, error, report = run(bireme, path, "--skip-bad-rows")
    expect("exit code", code, 0 if rows else 2)
    if not rows:
        return
    expect("rows read", report["rows read"], len(rows) + len(bad) + without)
    expect("bad rows", report["unreadable, left out"], len(bad))
    expect("rows without a session", report["without a session"], without)
    for name in HEADER:
        if f"distinct {name}" in report:
            expect(f"distinct {name}", report[f"distinct {name}"], distinct(rows, name))


def check_csv_module(data, rows, bad, without):
    """Python's csv module counts the same records where every quote is in order."""
    text = data.decode("utf-8-sig")
    records = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    records = [r for r in records if "".join(r).strip(" \t\r") or len(r) > 1]
    expect("records of Python's csv module", len(records) - 1, len(rows) + len(bad) + without)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bireme", default="target/debug/bireme")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--format", choices=["csv", "parquet"], help="only files of this format")
    parser.add_argument("--keep", type=pathlib.Path, default=pathlib.Path("differences"))
    options = parser.parse_args()
    began, seed, counts = (
        time.monotonic(),
        options.seed,
        {"csv": 0, "parquet": 0, "broken": 0, "python": 0},
    )
    n_different = 0
    kinds = {
        "csv": ["csv"],
        "parquet": ["parquet", "broken"],
        None: ["csv", "csv", "parquet", "broken"],
    }
    while time.monotonic() - began < options.seconds and n_different < 10:
        seed += 1
        rng = random.Random(seed)
        number = iter(range(1, 10**9))
        next_product = lambda: next(number)
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "events"
            kind = rng.choice(kinds[options.format])
            try:
                if kind == "csv":
                    data = csv_file(rng, next_product)
                    rows, bad, without = read_csv(data)
                    path.write_bytes(packed(rng, data))
                    compare(options.bireme, path, rows, bad, without)
                    if not bad and b"\r" not in data.replace(b"\r\n", b""):
                        check_csv_module(data, rows, bad, without)
                        counts["python"] += 1
                else:
                    rows, without = parquet_file(rng, next_product, path)
                    if kind == "parquet":
                        compare(options.bireme, path, rows, [], without)
                    else:
                        data = bytearray(path.read_bytes())
                        if rng.random() < 0.2:
                            del data[rng.randrange(4, len(data)) :]
                        for _ in range(rng.randint(1, 4)):
                            # Mostly the footer and page headers, which hold sizes.
                            at = (
                                rng.randrange(len(data))
                                if rng.random() < 0.5
                                else -1 - rng.randrange(min(len(data), 2000))
                            )
                            data[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
                        path.write_bytes(data)
                        run(options.bireme, path, "--skip-bad-rows")
                counts[kind] += 1
            except (Different, subprocess.TimeoutExpired) as problem:
                n_different += 1
                options.keep.mkdir(exist_ok=True)
                shutil.copy(path, options.keep / f"{kind}-{seed}")
                print(f"seed {seed}, {kind}: {problem}", flush=True)
    print(f"{counts} files alike, {n_different} different, seeds {options.seed + 1} to {seed}")
    sys.exit(1 if n_different else 0)


if __name__ == "__main__":
    main()
