#!/usr/bin/env python3
"""Compares what `bireme preprocess` reads of hostile CSV and parquet files with independent readers.

usage: tests/fuzz/csv_differential.py BIREME [--seconds N] [--seed N] [--keep DIR]

Each file follows from a seed. CSV files are read a second time by a scanner in this file, which follows the dialect
of docs/data.md byte by byte, and those without faults in their quotes by Python's `csv` as well. Parquet files are
written by pyarrow (`pip install pyarrow`; without it only CSV is tried), whose values are known. Held against each
other: rows read, left out and without a session, events, sessions, distinct values, and the line of the first bad
row where rows are refused. Prints a line for each kind and the seeds that differ; exit code 1 if any does.
"""

import argparse
import collections
import csv
import gzip
import io
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import zipfile

try:
    import pyarrow
    import pyarrow.parquet
except ImportError:
    pyarrow = None

COLUMNS = "event_time event_type product_id category_id category_code brand price user_id user_session".split()
OPTIONAL = {"category_code", "brand", "user_id"}
QUOTED = 1 << 20


# The dialect, byte by byte.


def field(text, at):
    """A field that begins at `at`: (value, position behind it), or None if its quotes are wrong."""
    if text[at : at + 1] != b'"':
        end = at
        while end < len(text) and text[end] not in b",\n":
            end += 1
        value = text[at:end]
        if (end == len(text) or text[end : end + 1] == b"\n") and value.endswith(b"\r"):
            value = value[:-1]
        return value, end
    value, at = bytearray(), at + 1
    while at < len(text):
        if text[at] != ord('"'):
            value.append(text[at])
            at += 1
        elif text[at + 1 : at + 2] == b'"':
            value.append(ord('"'))
            at += 2
        else:
            end = at + 1
            if text[end : end + 1] == b"\r" and text[end + 1 : end + 2] in (b"", b"\n"):
                end += 1
            return (bytes(value), end) if text[end : end + 1] in (b"", b",", b"\n") else None
        if len(value) > QUOTED:
            return None
    return None


def record(text, at):
    """The record at `at`: (fields, position behind it), or None if its quotes are wrong."""
    fields = []
    while True:
        read = field(text, at)
        if read is None:
            return None
        value, at = read
        fields.append(value)
        if text[at : at + 1] != b",":
            return fields, min(at + 1, len(text))
        at += 1


def integer(cell):
    return re.fullmatch(rb"[+-]?\d+", cell) is not None and -(2**63) <= int(cell) < 2**63


def is_good(header, fields, checks_session=False):
    """Whether the cells of a row can be read. A row without a session is not looked at, unless it is asked for."""
    if len(fields) != len(header):
        return False
    row = dict(zip(header, fields))
    session = row["user_session"]
    try:
        used = {name: cell.decode() for name, cell in row.items() if name in COLUMNS and name != "user_session"}
        session.decode()
    except UnicodeDecodeError:
        # A row without a session is left out before its cells are read.
        return not session and not checks_session
    if not session and not checks_session:
        return True
    time_fits = re.fullmatch(r"2019-10-0[1-7] [012]\d:[0-5]\d:[0-5]\d UTC", used["event_time"])
    try:
        price = float(used["price"])
    except ValueError:
        return False
    ids = [integer(row[name]) or (not row[name] and name != "product_id") for name in ("product_id", "category_id", "user_id") if name in row]
    return bool(time_fits) and 0 <= price < 3e38 and all(ids)


def swallows(header, text, fields_end, start):
    """Whether a record over several lines holds a whole line that is a good row."""
    at = text.find(b"\n", start, fields_end)
    while at != -1:
        at += 1
        end = text.find(b"\n", at, fields_end)
        line = text[at : end if end != -1 else fields_end]
        for candidate in (line,):
            read = record(candidate, 0)
            if read and read[1] == len(candidate) and is_good(header, read[0], True):
                return True
        at = text.find(b"\n", at, fields_end)
    return False


def rows_of(text):
    """(header, [(line, fields or None)]): None stands for a line whose quotes are wrong."""
    if text.startswith(b"\xef\xbb\xbf"):
        text = text[3:]
    at, line, header, rows = 0, 1, None, []
    while at < len(text):
        end = text.find(b"\n", at)
        end = len(text) if end == -1 else end
        if not text[at:end].strip(b" \t\r"):
            at, line = end + 1, line + 1
            continue
        read = record(text, at)
        if header is not None and (read is None or (read[1] > end + 1 and swallows(header, text, read[1], at))):
            rows.append((line, None))
            at, line = end + 1, line + 1
            continue
        fields, behind = read
        if header is None:
            header = [name.decode() for name in fields]
        else:
            rows.append((line, fields))
        line += text.count(b"\n", at, behind)
        at = behind
    return header, rows


def expected(header, rows):
    """The counts that `preprocess --skip-bad-rows` prints, and the line of the first bad row."""
    bad = [line for line, fields in rows if fields is None or not is_good(header, fields)]
    wrong = set(bad)
    events, without = [], 0
    for number, (line, fields) in enumerate(rows):
        if line in wrong:
            continue
        row = dict(zip(header, fields))
        if not row["user_session"]:
            without += 1
            continue
        events.append((row["user_session"], row["event_time"], number, row))
    return summary(len(rows), len(bad), without, events), bad[:1]


def summary(n_rows, n_bad, n_without, events):
    sessions = collections.defaultdict(list)
    for session, at, number, row in sorted(events, key=lambda event: event[:3]):
        sessions[session].append(row)
    repeats, kept = 0, []
    for rows in sessions.values():
        before = None
        for row in rows:
            if before is not None and int(row["product_id"]) == int(before["product_id"]):
                repeats += 1
            else:
                kept.append(row)
            before = row
    return {
        "rows read": n_rows,
        "unreadable, left out": n_bad,
        "without a session": n_without,
        "repeats": repeats,
        "events": len(kept),
        "sessions": len(sessions),
        "distinct product_id": len({int(row["product_id"]) for row in kept}),
        "distinct brand": len({row["brand"] for row in kept if row.get("brand")}),
    }


# Files.


def quoted(rng, value):
    if any(c in value for c in b',"\n\r') or rng.random() < 0.2:
        return b'"' + value.replace(b'"', b'""') + b'"'
    return value


def make_csv(rng):
    header = [name for name in COLUMNS if name not in OPTIONAL or rng.random() < 0.8]
    header += [f"extra{i}" for i in range(rng.randrange(3))]
    rng.shuffle(header)
    newline = rng.choice([b"\n", b"\r\n"])
    texts = [b"", b"acme", b'24" tv', b"a,b", b"two\nlines", b"cr\r\nlf", "größe".encode(), b'"', b"  spaced "]
    out = [b"\xef\xbb\xbf" if rng.random() < 0.2 else b"", b",".join(name.encode() for name in header), newline]
    hostility = rng.choice([0, 0, 0.03, 0.2])
    second = 0
    for _ in range(rng.randrange(2, 60)):
        second += rng.randrange(1, 100)
        cells = {
            "event_time": b"2019-10-0%d %02d:%02d:%02d UTC" % (1 + second // 86400, second // 3600 % 24, second // 60 % 60, second % 60),
            "event_type": b"view",
            "product_id": b"%d" % rng.choice([rng.randrange(1, 9), -1, 2**63 - 1]),
            "category_id": rng.choice([b"7", b"", b"-3"]),
            "category_code": rng.choice(texts),
            "brand": rng.choice(texts),
            "price": rng.choice([b"1.5", b"0", b"2e3", b".5"]),
            "user_id": rng.choice([b"1", b""]),
            "user_session": rng.choice([b"s%d" % rng.randrange(4)] * 9 + [b""]),
        }
        if rng.random() < hostility:
            name = rng.choice([name for name in header if name in COLUMNS])
            cells[name] = rng.choice([b"", b"x", b"12.0", b"9223372036854775808", b"-1", b"nan", b"1e999", b"\xff", b"\0"])
        fields = [quoted(rng, cells.get(name, rng.choice(texts))) for name in header]
        if rng.random() < hostility:
            i = rng.randrange(len(fields))
            fields[i] = rng.choice([b'"LG" 24"', b'"open', b'open"', b'a"b', b'""x', b'"x"y"', b'"', b'"""'])
        if rng.random() < hostility:
            if rng.random() < 0.5:
                fields.pop()
            else:
                fields.append(b"more")
        out += [b",".join(fields), newline]
        if rng.random() < hostility:
            out += [rng.choice([b"", b"  ", b"\t"]), newline]
    if rng.random() < 0.3:
        out.pop()
    return b"".join(out)


def wrap(rng, text):
    """The file as it is, or compressed."""
    kind = rng.choice(["plain", "plain", "gzip", "members", "padded", "zip"])
    if kind == "gzip":
        return kind, gzip.compress(text)
    if kind == "members":
        half = len(text) // 2
        return kind, gzip.compress(text[:half]) + gzip.compress(text[half:])
    if kind == "padded":
        return kind, gzip.compress(text) + bytes(512)
    if kind == "zip":
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("events.csv", text)
        return kind, buffer.getvalue()
    return kind, text


def make_parquet(rng, path):
    """Writes a file and returns what is in it, as `expected` does."""
    n = rng.randrange(2, 80)
    ints = [pyarrow.int8(), pyarrow.int16(), pyarrow.int32(), pyarrow.int64(), pyarrow.uint8(), pyarrow.uint16(), pyarrow.uint32(), pyarrow.uint64()]
    units = ["s", "ms", "us", "ns"]
    seconds = [1569888000 + i * rng.randrange(1, 100) for i in range(n)]
    scale = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
    unit = rng.choice(units)
    items = [rng.randrange(1, 100) for _ in range(n)]
    sessions = [f"s{rng.randrange(5)}" for _ in range(n)]
    brands = [rng.choice([None, "acme", "größe"]) for _ in range(n)]
    prices = rng.choice([pyarrow.float16(), pyarrow.float32(), pyarrow.float64(), pyarrow.decimal128(10, 2), pyarrow.decimal128(30, 4), pyarrow.int32()])
    price = lambda _: __import__("decimal").Decimal("12.00") if pyarrow.types.is_decimal(prices) else (__import__("numpy").float16(12) if prices == pyarrow.float16() else 12)
    columns = {
        "event_time": pyarrow.array([second * scale[unit] for second in seconds]).cast(pyarrow.timestamp(unit, rng.choice([None, "UTC"]))),
        "event_type": pyarrow.array(["view"] * n),
        "product_id": pyarrow.array(items, rng.choice(ints)),
        "category_id": pyarrow.array([7] * n, rng.choice(ints)),
        "brand": rng.choice([lambda a: a, lambda a: a.dictionary_encode()])(pyarrow.array(brands)),
        "price": pyarrow.array([price(0)] * n, prices),
        "user_session": pyarrow.array(sessions, rng.choice([pyarrow.string(), pyarrow.large_string()])),
        "beside": rng.choice([
            pyarrow.array([[1, 2]] * n), pyarrow.array([{"a": 1}] * n), pyarrow.array([b"\xff"] * n),
            pyarrow.array([[1.0, 2.0]] * n, pyarrow.list_(pyarrow.float32(), 2)), pyarrow.array([price(0)] * n, prices),
        ]),
    }
    names = list(columns)
    rng.shuffle(names)
    table = pyarrow.table({name: columns[name] for name in names})
    pyarrow.parquet.write_table(
        table, path, row_group_size=rng.choice([1, 7, 1000]), compression=rng.choice(["none", "snappy", "gzip", "zstd", "lz4", "brotli"]),
        use_dictionary=rng.random() < 0.5, version=rng.choice(["1.0", "2.4", "2.6"]), data_page_version=rng.choice(["1.0", "2.0"]),
    )
    rows = zip(sessions, seconds, range(n), ({"product_id": item, "brand": brand} for item, brand in zip(items, brands)))
    return summary(n, 0, 0, list(rows)), []


# Runs.


def run(program, path, out, *flags):
    done = subprocess.run([program, "preprocess", "--events", path, "--out", out, "--min-length", "1", *flags], capture_output=True)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def differences(program, kind, seed, dir):
    rng = random.Random(f"{kind} {seed}")
    path = os.path.join(dir, "events")
    if kind == "parquet":
        want, bad = make_parquet(rng, path)
    else:
        text = make_csv(rng)
        header, rows = rows_of(text)
        want, bad = expected(header, rows)
        if all(fields is not None for _, fields in rows):
            known = list(csv.reader(io.StringIO(text.decode("latin-1").removeprefix("\xef\xbb\xbf"), newline="")))
            by_csv = [row for row in known[1:] if not (len(row) <= 1 and not "".join(row).strip())]
            ours = [[cell.decode("latin-1") for cell in fields] for _, fields in rows]
            if by_csv != ours:
                yield "the scanner of this file and Python's csv differ"
        with open(path, "wb") as file:
            file.write(wrap(rng, text)[1])
    code, out, err = run(program, path, os.path.join(dir, "skipped"), "--skip-bad-rows")
    if want["events"] == 0:
        if code != 2:
            yield f"no event is left, and the exit code is {code}: {err}"
        return
    if code != 0:
        yield f"--skip-bad-rows ends with {code}: {err}"
        return
    for name, value in want.items():
        found = re.search(rf"^{name} +(\d+)$", out, re.M)
        if not found or int(found[1]) != value:
            yield f"{name}: {value} expected, {found and found[1]} found"
    code, out, err = run(program, path, os.path.join(dir, "refused"))
    if bad and not (code == 2 and re.search(rf"line {bad[0]}\b", err)):
        yield f"line {bad[0]} is bad, and the exit code is {code}: {err}"
    if not bad and code != 0:
        yield f"no row is bad, and the exit code is {code}: {err}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", help="folder for the files that differ")
    args = parser.parse_args()
    kinds = ["csv"] + (["parquet"] if pyarrow else [])
    counts, n_different, seed, end = collections.Counter(), 0, args.seed, time.monotonic() + args.seconds
    while time.monotonic() < end:
        for kind in kinds:
            with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as dir:
                found = list(differences(args.program, kind, seed, dir))
                counts[kind] += 1
                if found:
                    n_different += 1
                    print(f"{kind} {seed}: " + "; ".join(line.strip() for line in found), flush=True)
                    if args.keep:
                        os.makedirs(args.keep, exist_ok=True)
                        os.replace(os.path.join(dir, "events"), os.path.join(args.keep, f"{kind}-{seed}"))
        seed += 1
    for kind in kinds:
        print(f"{counts[kind]} {kind} files")
    print(f"{n_different} differ")
    sys.exit(1 if n_different else 0)


if __name__ == "__main__":
    main()
