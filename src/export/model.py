"""The events of a request to the inputs of a model, as a model of Triton's Python backend.

`bireme export --python-backend` puts a copy of this file into the version folder of the preprocessing model, beside
the files of `Preprocessor::save_for_numpy` that it reads. It does what `Preprocessor::apply` does in
src/etl/serving.rs, with the same results but for the last digit of the two columns that are logarithms.

Needs numpy; the Python backend up to Triton 24.10 needs one below 2.
"""

import json
import math
import re
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

DAY = 86_400
UNKNOWN = 1
FIRST = 2
NEVER_SEEN = np.iinfo(np.int64).max

# The columns of the events, in the order in which they are looked at.
REQUIRED = ("event_time", "event_type", "product_id", "category_id", "price", "user_session")
COLUMNS = (*REQUIRED[:4], "category_code", "brand", "price", "user_id", "user_session")

# Digits of a fraction beyond the ninth must be zeros.
TIME = re.compile(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(?:\.(\d{0,9})0*)?(?: UTC|Z|\+00:00)?", re.ASCII)


class Refused(Exception):
    """Says in one line what is wrong with a request."""


class Table:
    """Integers in ascending order, and what is known of each."""

    def __init__(self, path, unknown):
        """Reads `[1 + known, n]` numbers of 8 bytes; behind the last column comes what is said of all others."""
        rows = np.fromfile(path, "<i8").reshape(1 + len(unknown), -1)
        self.values = rows[0]
        self.known = [np.append(row.view(type), other) for row, (type, other) in zip(rows[1:], unknown)]

    def find(self, values):
        """What is known of each value."""
        places = np.searchsorted(self.values, values)
        found = places < len(self.values)
        found[found] = self.values[places[found]] == values[found]
        places[~found] = -1
        return [known[places] for known in self.known]


class Preprocessor:
    """A fitted workflow in service."""

    def __init__(self, folder):
        """Reads what `Preprocessor::save_for_numpy` wrote."""
        self.settings = json.loads((folder / "serving.json").read_text("utf-8"))
        workflow = json.loads((folder / "workflow.json").read_text("utf-8"))
        self.normals = {name: (workflow[name]["mean"], workflow[name]["std"]) for name in ("price_log", "recency_log")}
        self.texts = {
            column: {text: id for id, text in enumerate(texts, FIRST)}
            for column, texts in workflow["vocabularies"].items()
        }
        self.products = Table(folder / "products.bin", [("<i8", UNKNOWN), ("<i8", NEVER_SEEN)])
        self.categories = Table(folder / "categories.bin", [("<i8", UNKNOWN), ("<f8", math.nan)])
        # 1 January 1970 was a Thursday, and weeks begin on Monday.
        angles = [math.tau * ((day + 3) % 7 + 1 + 1e-6) / 7.0 for day in range(7)]
        self.weekday_sin = np.array([math.sin(angle) for angle in angles], np.float32)
        self.weekday_cos = np.array([math.cos(angle) for angle in angles], np.float32)

    def apply(self, inputs, parameters):
        """Arrays by name, a row for each session in the order in which these appear.

        `inputs` are arrays by name, texts as bytes; `parameters` are those of the request.
        """
        max_length, max_sessions = self.settings["max_length"], self.settings["max_sessions"]
        top_k = self.top_k(inputs.get("top_k"), parameters)
        exclude_seen = self.exclude_seen(inputs.get("exclude_seen"), parameters)
        events, n_rows = read(inputs)
        if not len(events["user_session"]):
            raise Refused(f"none of the {n_rows} rows of the request has a session")

        # Sessions are numbered as they appear; of events of the same time the order stays.
        numbers = {}
        session = np.array([numbers.setdefault(id, len(numbers)) for id in events["user_session"]])
        if len(numbers) > max_sessions:
            raise Refused(
                f"the request holds {len(numbers)} sessions, and at most {max_sessions} are served at once"
            )
        order = np.lexsort((events["nanos"], events["event_time"], session))
        product, session = events["product_id"][order], session[order]
        repeats = (session[1:] == session[:-1]) & (product[1:] == product[:-1])
        stays = np.append(True, ~repeats)
        order, session = order[stays], session[stays]

        # The last events of each session, moved to the start of its row.
        counts = np.bincount(session)
        lengths = np.minimum(counts, max_length)
        column = np.arange(len(session)) - (np.cumsum(counts) - lengths)[session]
        last = column >= 0
        shape = (len(numbers), max_length)
        cells = (session[last], column[last])

        outputs = {"session": np.array([[id.encode()] for id in numbers], np.object_)}
        item, first_seen = self.products.find(events["product_id"][order])
        events = {name: values[order[last]] for name, values in events.items()}
        events["item"], events["first_seen"] = item[last], first_seen[last]
        events["category"], events["mean_price"] = self.categories.find(events["category_id"])
        for wanted in self.settings["columns"]:
            rows = np.zeros(shape, np.int64 if wanted["is_categorical"] else np.float32)
            rows[cells] = self.encoded(wanted["column"], events)
            outputs[wanted["input"]] = rows
        outputs["length"] = lengths.reshape(-1, 1).astype(np.int64)
        outputs["hidden"] = distinct(session, item, max_length) if exclude_seen else np.zeros(shape, np.int64)
        outputs["places"] = np.tile(np.arange(top_k, dtype=np.int64), (len(numbers), 1))
        return outputs

    def top_k(self, wanted, parameters):
        """How many recommendations a session gets: what is asked for, or as many as there are items."""
        if wanted is not None:
            if wanted.size != 1:
                raise Refused(f"`top_k` must be one number, not {wanted.size}")
            wanted = wanted.item()
        parameter = parameters.get("top_k")
        if parameter is not None and (not isinstance(parameter, int) or isinstance(parameter, bool)):
            raise Refused(f"parameter `top_k` must be a whole number, not {told(parameter)}")
        wanted = one_of("top_k", wanted, parameter, self.settings["top_k"])
        if not 1 <= wanted <= self.settings["max_top_k"]:
            raise Refused(f"`top_k` is {wanted}, and must be from 1 to {self.settings['max_top_k']}")
        return min(wanted, self.settings["n_recommendable"])

    def exclude_seen(self, wanted, parameters):
        """Whether items of the session are left out."""
        if wanted is not None:
            if wanted.size != 1:
                raise Refused(f"`exclude_seen` must be one truth value, not {wanted.size}")
            wanted = bool(wanted.item())
        parameter = parameters.get("exclude_seen")
        if parameter is not None and not isinstance(parameter, bool):
            raise Refused(f"parameter `exclude_seen` must be true or false, not {told(parameter)}")
        return one_of("exclude_seen", wanted, parameter, False)

    def encoded(self, name, events):
        """A column as a model reads it, a value for each event."""
        match name.removesuffix("-list_seq"):
            case "product_id":
                return events["item"]
            case "category_id":
                return events["category"]
            case "category_code" | "event_type" | "brand" as column:
                # A column that is not there holds nulls.
                texts, ids = events.get(column), self.texts[column]
                return UNKNOWN if texts is None else [ids.get(text, UNKNOWN) for text in texts]
            case "et_dayofweek_sin":
                return self.weekday_sin[events["event_time"] // DAY % 7]
            case "et_dayofweek_cos":
                return self.weekday_cos[events["event_time"] // DAY % 7]
            case "price_log_norm":
                return normal_log(events["price"], *self.normals["price_log"])
            case "relative_price_to_avg_categ_id":
                is_known = events["mean_price"] > 0
                mean = np.where(is_known, events["mean_price"], 1.0)
                return np.where(is_known, (events["price"] - mean) / (mean + 1e-5), 0.0)
            case "product_recency_days_log_norm":
                age = events["event_time"] - events["first_seen"]
                age = np.where(events["event_time"] > events["first_seen"], age, 0)
                return normal_log(age / DAY, *self.normals["recency_log"])
        raise Refused(f"the workflow makes no `{name}`")


def one_of(name, wanted, parameter, otherwise):
    """What may be given as an input or as a parameter, or as both if they agree."""
    if wanted is None or parameter is None or wanted == parameter:
        given = [value for value in (wanted, parameter) if value is not None]
        return given[0] if given else otherwise
    wanted, parameter = (json.dumps(value) for value in (wanted, parameter))
    raise Refused(f"`{name}` is {wanted} as an input and {parameter} as a parameter: give one of them")


def told(value):
    """The value of a parameter in a message."""
    return f"the text `{value[:60]}`" if isinstance(value, str) else json.dumps(value)[:60]


def read(inputs):
    """The events that have a session, column by column, and how many rows there are with the others."""
    columns, first = {}, None
    for name in COLUMNS:
        values = inputs.get(name)
        if values is None:
            if name in REQUIRED:
                raise Refused(f"input `{name}` is missing")
            continue
        first = first or (name, len(values))
        if len(values) != first[1]:
            raise Refused(f"input `{name}` has {len(values)} rows, input `{first[0]}` {first[1]}")
        values = values.reshape(-1)
        columns[name] = decoded(name, values) if values.dtype == np.object_ else values
    rows = np.flatnonzero(columns["user_session"] != "")
    columns = {name: values[rows] for name, values in columns.items()}

    times, prices = [time_parts(text) for text in columns["event_time"]], columns["price"]
    with np.errstate(over="ignore"):
        # The logarithm is taken in float32.
        is_price = (prices >= 0) & np.isfinite(prices.astype(np.float32))
    is_wrong = np.array([time is None for time in times], bool)
    for row in np.flatnonzero(~is_price | is_wrong)[:1]:
        is_time = times[row] is not None
        column, problem = ("price", price_fault(prices[row])) if is_time else ("event_time", time_fault(columns["event_time"][row]))
        raise Refused(f"`events`, row {rows[row] + 1}, column `{column}`: {problem}")
    columns["event_time"], columns["nanos"] = np.array(times, np.int64).reshape(-1, 2).T
    return columns, first[1]


def decoded(name, values):
    """Texts of bytes."""
    texts = np.empty(len(values), np.object_)
    for element, value in enumerate(values):
        try:
            texts[element] = value.decode()
        except UnicodeDecodeError:
            raise Refused(f"input `{name}`, element {element}: not UTF-8") from None
    return texts


def time_parts(text):
    """Seconds since 1970 and nanoseconds of `2019-10-01 00:00:00.5 UTC` and the like, `None` of what is no time."""
    match = TIME.fullmatch(text)
    try:
        seconds = np.datetime64(text[:19], "s").astype(np.int64).item() if match else None
    except ValueError:
        return None
    return match and (seconds, int((match[1] or "").ljust(9, "0")))


def time_fault(text):
    """What is wrong with a time."""
    return f"`{text}` is no time like `2019-10-01 00:00:00 UTC`" if text else "the cell is empty"


def price_fault(price):
    """What is wrong with a price."""
    text = "NaN" if math.isnan(price) else np.format_float_positional(price, trim="-")
    fault = "not finite" if not math.isfinite(price) else "too large for float32" if price >= 0 else "below zero"
    return f"{text} is no price: it is {fault}"


def normal_log(values, mean, std):
    """ln(x + 1), where x + 1 is rounded to float32 and so is its logarithm, centred and scaled."""
    sums = values.astype(np.float32) + np.float32(1)
    # numpy's own logarithm of float32 is up to four units in the last place off.
    centred = np.log(sums.astype(np.float64)).astype(np.float32) - np.float64(mean)
    return centred / std if std > 0 else centred


def distinct(session, item, width):
    """The distinct items of each session in ascending order, and zeros behind them."""
    pairs = np.unique(session << 32 | item)
    session, item = pairs >> 32, pairs & 0xFFFF_FFFF
    counts = np.bincount(session)
    rows = np.zeros((len(counts), max(width, counts.max())), np.int64)
    rows[session, np.arange(len(pairs)) - (np.cumsum(counts) - counts)[session]] = item
    return rows


class TritonPythonModel:
    """What Triton's Python backend looks for."""

    def initialize(self, args):
        """Loads the files beside this one."""
        self.preprocessor = Preprocessor(Path(args["model_repository"]) / args["model_version"])

    def execute(self, requests):
        """A response for each request."""
        return [self.respond(request) for request in requests]

    def respond(self, request):
        """The inputs of the model, or what is wrong with the request."""
        inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        try:
            outputs = self.preprocessor.apply(inputs, json.loads(request.parameters() or "{}"))
        except Refused as problem:
            error = pb_utils.TritonError(str(problem), pb_utils.TritonError.INVALID_ARG)
            return pb_utils.InferenceResponse(output_tensors=[], error=error)
        return pb_utils.InferenceResponse([pb_utils.Tensor(*output) for output in outputs.items()])
