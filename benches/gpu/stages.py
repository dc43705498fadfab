"""The stages of benches/gpu.sh that train, with `bireme` and with the PyTorch peer.

    python benches/gpu/stages.py stack|data|parity|graph|steps|compile|phases|ncu|sanitize
        --root ROOT --work WORK --out OUT [--bireme FILE] [--mpirun FILE] [--tests FILE]
        [--rehearse]

    stack     driver, versions and `bireme doctor`
    data      sessions over 10k and 100k items in WORK/data, and the same sessions with catalogues
              of 390k and 1M items
    parity    the tests of CUDA and NCCL in the test binary `--tests`
    graph     losses and final weights of the captured step beside those of the eager step, on one
              and on two ranks of one GPU, and of the eager step beside itself
    steps     milliseconds of a step: bireme eager, bireme as a CUDA graph and eager PyTorch, by
              turns; means over `Sizes.log_every` steps, and the median of these
    compile   the same of PyTorch with torch.compile, for 4,096 sessions and 100k items
    phases    the phases of an eager step
    ncu       times, bytes and rates of kernels by Nsight Compute, if it may read the counters
    sanitize  compute-sanitizer over the project's kernels, with small sizes

Appends a line of JSON for each figure to OUT/results.jsonl at once. `--rehearse` trains a few steps
of small sizes, on the fake CUDA runtime, where losses and weights mean nothing. Exit code 1 if a
comparison fails.
"""

import argparse
import csv
import gc
import importlib.util
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kernels import Recorder

from pairs import train_command

HERE = Path(__file__).resolve().parent
PEER = HERE.parent / "peers" / "training.py"


@dataclass(frozen=True)
class Sizes:
    """Sizes of data, batches and runs."""

    n_events: int
    # Name of a catalogue, and items that `bireme synth` gets.
    items: dict
    # Copies of day 1, for enough sessions in an epoch; sessions that are evaluated.
    copies: int
    n_evaluated: int
    # Sessions of a small and of a large step.
    batches: tuple
    log_every: int
    # Records of a run; the first is warm-up.
    n_records: int
    graph_steps: int
    compile_steps: int
    compile_warm_up: int


FULL = Sizes(
    n_events=3_000_000,
    items={"10k": 10_000, "100k": 100_000},
    copies=4,
    n_evaluated=2000,
    batches=(256, 4096),
    log_every=20,
    n_records=6,
    graph_steps=50,
    compile_steps=60,
    compile_warm_up=20,
)
REHEARSAL = Sizes(
    n_events=100_000,
    # The tuned configurations have 4,096 negatives.
    items={"10k": 8000, "100k": 20_000},
    copies=2,
    n_evaluated=100,
    batches=(32, 64),
    log_every=2,
    n_records=3,
    graph_steps=4,
    compile_steps=2,
    compile_warm_up=2,
)

# Items of the catalogues that are made from the 100k by a larger bound in the schema.
LARGE = {"390k": 390_000, "1M": 1_000_000}

# Model, configuration and arguments of the peer, if it has the model.
MODELS = {
    "gru": ("gru", ["--model", "gru"]),
    "xlnet": ("xlnet", ["--model", "xlnet", "--variant", "lean"]),
    "xlnet-side-info": ("xlnet-side-info", ["--model", "xlnet-side", "--variant", "lean"]),
    "tuned/gru": ("tuned/gru", None),
    "tuned/best": ("tuned/best", None),
}
GRAPH_MODELS = [*MODELS, "tuned/xlnet"]

# Limits of the stage `graph`: relative differences of losses and of weights. Where a repetition of
# the eager run differs by more than half of these, twice its difference is the limit.
LOSS_LIMIT, WEIGHT_LIMIT = 1e-6, 1e-5

# Ranks of different host names may share a GPU.
NAME_HOST = 'NCCL_HOSTID="rank-$OMPI_COMM_WORLD_RANK" exec "$0" "$@"'
RANKS_ON_ONE_GPU = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "NCCL_ALGO": "Ring",
    "NCCL_PROTO": "Simple",
    "NCCL_IB_DISABLE": "1",
    "NCCL_NVLS_ENABLE": "0",
    "NCCL_MNNVL_ENABLE": "0",
}


def output(command, limit=60, env=None):
    """Exit code and joined output of a command; 127 if the program is missing, 124 if it ran
    longer than `limit` seconds."""
    try:
        process = subprocess.Popen(
            list(map(str, command)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=env,
        )
    except OSError as error:
        return 127, str(error)
    try:
        text, _ = process.communicate(timeout=limit)
        return process.returncode, text
    except subprocess.TimeoutExpired:
        pass
    # SIGTERM first, with which `mpirun` ends its ranks.
    for end in (process.terminate, process.kill):
        end()
        try:
            return 124, process.communicate(timeout=5)[0]
        except subprocess.TimeoutExpired:
            continue
    return 124, f"no end after {limit} s"


def problem_in(text):
    """The line of an output that names the problem."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(\w*[Ee]rror|\[?rank \d+)", line)]
    return ((errors or lines or ["no output"])[-1])[:300]


# --- Training runs ---


@dataclass
class Run:
    """A finished training run."""

    folder: Path
    exit: int
    problem: str
    seconds: float

    def records(self, kind):
        file = self.folder / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [record for record in map(json.loads, lines) if record["kind"] == kind]

    def weights(self):
        """Tensors of the newest checkpoint, by name."""
        folder = max((self.folder / "checkpoints").glob("day-*[0-9]"))
        content = (folder / "weights.safetensors").read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        header.pop("__metadata__", None)
        kinds = {"F32": "<f4", "F64": "<f8", "I64": "<i8", "I32": "<i4", "U8": "u1", "BOOL": "u1"}
        return {
            name: numpy.frombuffer(
                content[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]],
                kinds[entry["dtype"]],
            )
            for name, entry in header.items()
        }

    def step_ms(self, batch):
        """Milliseconds of a step in each window after the first."""
        return [1000 * batch / record["sessions_per_s"] for record in self.records("step")[1:]]

    def remove(self):
        shutil.rmtree(self.folder, ignore_errors=True)


def train(options, name, config, items, settings, ranks=1, threads=None):
    """Trains on day 1 of a catalogue."""
    folder = options.work / "runs" / name.replace("/", "-").replace(" ", "-")
    shutil.rmtree(folder, ignore_errors=True)
    config = options.root / "configs" / f"{config}.toml"
    settings = ["run.device=cuda", "data.last_day=2", "train.epochs_per_day=4", *settings]
    if threads:
        settings.append(f"run.threads_per_rank={threads}")
    data = options.work / "data" / items
    command = train_command(options.bireme, config, data, folder, settings)
    environment = dict(os.environ)
    if ranks > 1:
        launch = [options.mpirun, "--oversubscribe", "--bind-to", "none", "-np", ranks]
        command = [*launch, "sh", "-c", NAME_HOST, *command]
        environment |= RANKS_ON_ONE_GPU
    began = time.perf_counter()
    code, text = output(command, options.run_limit, environment)
    problem = "" if code == 0 else problem_in(text)
    return Run(folder, code, problem, time.perf_counter() - began)


def knows_graphs(options):
    """Whether `bireme` has the key `run.cuda_graph`, by how it refuses missing data."""
    config = options.root / "configs" / "gru.toml"
    missing, folder = options.work / "missing", options.work / "runs" / "key"
    command = train_command(options.bireme, config, missing, folder, ["run.cuda_graph=off"])
    _, text = output(command)
    return "unknown key" not in text


def wait_for_data(options, items, seconds=120):
    """Waits until the stage `data`, which runs beside others, has written a catalogue."""
    deadline = time.monotonic() + seconds
    while not (options.work / "data" / items / "READY").exists():
        if time.monotonic() > deadline:
            sys.exit(f"there are no sessions over {items} items after {seconds} s")
        time.sleep(0.2)


# --- Stages ---


def stack(options, record):
    """Records GPU, driver, versions and the report of `bireme doctor`."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,power.limit,clocks.max.sm"]
    code, text = output([*query, "--format=csv,noheader"], 10)
    record(kind="gpu", exit=code, text=text.strip())
    for program in ("nvcc", "ncu", "compute-sanitizer"):
        code, text = output([program, "--version"], 10)
        found = [line for line in text.splitlines() if re.search(r"\d+\.\d+", line)]
        record(kind="program", name=program, exit=code, version=(found or [text])[0].strip())
    record(kind="python", version=sys.version.split()[0], cores=os.cpu_count())
    try:
        import torch

        record(
            kind="torch",
            version=torch.__version__,
            device=torch.cuda.get_device_name(),
            cudnn=torch.backends.cudnn.version(),
            nccl=torch.cuda.nccl.version(),
        )
    except (ImportError, RuntimeError, OSError) as error:
        record(kind="torch", problem=problem_in(str(error)))
    file = options.work / "doctor.json"
    command = [options.bireme, "doctor", "--device", "cuda", "--dir", options.work, "--json", file]
    code, text = output(command)
    found = json.loads(file.read_text()) if file.exists() else {"output": text}
    record(kind="doctor", exit=code, **found)
    record(kind="graphs", known=knows_graphs(options))
    return int(code != 0)


def enlarge_day(options, data):
    """Repeats the sessions of day 1 and keeps few of day 2 for the evaluation."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        return
    sizes = options.sizes
    days = data / "sessions_by_day"
    file = days / "1" / "train.parquet"
    table = parquet.read_table(file)
    parquet.write_table(pyarrow.concat_tables([table] * sizes.copies), file, row_group_size=65_536)
    for split in ("valid", "test"):
        file = days / "2" / f"{split}.parquet"
        parquet.write_table(parquet.read_table(file).slice(0, sizes.n_evaluated), file)


def make_data(options, record, name):
    """Makes the sessions over a catalogue."""
    began = time.perf_counter()
    data, events = options.work / "data" / name, options.work / f"{name}.csv"
    sizes = ["--events", options.sizes.n_events, "--items", options.sizes.items[name]]
    synth = [options.bireme, "synth", *sizes, "--days", 2, "--seed", 1, "--out", events]
    for command in (synth, [options.bireme, "preprocess", "--events", events, "--out", data]):
        code, text = output(command)
        if code != 0:
            record(kind="data", items=name, problem=problem_in(text))
            return code
    events.unlink()
    enlarge_day(options, data)
    schema = (data / "schema.pbtxt").read_text()
    if name == "100k":
        for large, n_items in LARGE.items():
            folder = options.work / "data" / large
            folder.mkdir(parents=True)
            (folder / "sessions_by_day").symlink_to(data / "sessions_by_day")
            n_items = n_items if options.sizes is FULL else n_items // 10
            start = schema.index("int_domain", schema.index('name: "product_id-list_seq"'))
            text = re.sub(r"max: \d+", f"max: {n_items - 1}", schema[start:], count=1)
            (folder / "schema.pbtxt").write_text(schema[:start] + text)
            (folder / "READY").touch()
    (data / "READY").touch()
    record(kind="data", items=name, seconds=time.perf_counter() - began)
    return 0


def data(options, record):
    """Makes all catalogues, the smaller first."""
    return max(make_data(options, record, name) for name in options.sizes.items)


def parity(options, record):
    """Runs the tests of CUDA and NCCL."""
    # Tests of the fake runtime start programs on it, which needs this checkout.
    filters = ["cuda::", "cuda_kernels::", "collective::nccl", "--skip", "fake_cuda"]
    if not options.tests:
        record(kind="skipped", why="the test binary is missing")
        return 0
    _, text = output([options.tests, "--list", *filters])
    missing = set(re.findall(r"^(\S+): test$", text, re.MULTILINE))
    environment = dict(os.environ)
    if options.rehearse:
        # What is read back is what the emulated kernels wrote.
        environment["FAKE_CUDA_READS"] = "memory"
    else:
        environment |= {"REQUIRE_GPU": "1", "REQUIRE_MPI": "1"}
    process = subprocess.Popen(
        [options.tests, *filters, "--test-threads", "4", "--nocapture"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
    )
    # Output of the tests may precede a result on the same line.
    for line in process.stdout:
        print(line, end="", flush=True)
        if match := re.search(r"test (\S+) \.\.\. .*?(ok|FAILED|ignored)$", line.rstrip()):
            missing.discard(match[1])
            record(kind="test", name=match[1], result=match[2])
        elif line.startswith("skipped:"):
            record(kind="skipped", why=line.removeprefix("skipped:").strip())
    code = process.wait()
    record(kind="tests", exit=code, unfinished=sorted(missing))
    return code


def relative_difference(found, expected):
    """Largest difference over the largest number; infinite if only one of them is finite."""
    found, expected = (numpy.asarray(x, numpy.float64) for x in (found, expected))
    if found.shape != expected.shape:
        return float("inf")
    finite = numpy.isfinite(expected)
    if (finite != numpy.isfinite(found)).any():
        return float("inf")
    if not finite.any():
        return 0.0
    largest = max(numpy.abs(expected[finite]).max(), 1e-30)
    return float(numpy.abs(found[finite] - expected[finite]).max() / largest)


def compare_runs(found, expected):
    """Largest relative differences of the losses of all steps and of the final weights."""
    losses = [
        [float("nan") if record["loss"] is None else record["loss"] for record in run]
        for run in (found.records("step"), expected.records("step"))
    ]
    if len(losses[0]) != len(losses[1]):
        return float("inf"), float("inf")
    loss = max(
        (relative_difference([a], [b]) for a, b in zip(*losses)),
        default=float("inf"),
    )
    weights = [run.weights() for run in (found, expected)]
    if weights[0].keys() != weights[1].keys():
        return loss, float("inf")
    return loss, max(relative_difference(weights[0][name], weights[1][name]) for name in weights[1])


def captured(run):
    """Whether the step was captured, and the reason if it was not, by the last such record."""
    graphs = run.records("graph")
    return (graphs[-1].get("captured"), graphs[-1].get("why")) if graphs else (None, None)


def is_refusal(problem):
    """Whether `bireme` refused to capture the step because of a key of the configuration."""
    return bool(re.search(r"`run\.cuda_graph` is `require`, but `[a-z]+\.", problem))


def compare_graph(options, record, has_graphs, config, ranks):
    """Three runs of a model, and the differences of two from the first."""
    steps = options.sizes.graph_steps
    settings = [f"train.max_steps_per_day={steps}", "train.log_every_steps=1"]
    settings += ["train.global_batch=256", "train.micro_batch=32"] if not options.rehearse else []
    modes = {"eager": ["run.cuda_graph=off"], "again": ["run.cuda_graph=off"]}
    modes["graph"] = ["run.cuda_graph=require"]
    if not has_graphs:
        modes = {"eager": [], "again": []}
    runs = {
        mode: train(
            options,
            f"graph {config} {ranks} {mode}",
            config,
            "10k",
            settings + more,
            ranks,
            threads=1 if options.rehearse else 2,
        )
        for mode, more in modes.items()
    }
    fields = {"kind": "graph", "model": config, "ranks": ranks}
    has_graphs = has_graphs and not is_refusal(runs["graph"].problem)
    if "graph" in runs and not has_graphs:
        fields["refused"] = runs.pop("graph").problem
    failed = {mode: run.problem for mode, run in runs.items() if run.exit != 0}
    if failed:
        record(**fields, passed=False, problem=failed)
        return 1
    n_finite = sum(step["loss"] is not None for step in runs["eager"].records("step"))
    noise = compare_runs(runs["again"], runs["eager"])
    fields |= {"n_finite": n_finite, "eager_loss": noise[0], "eager_weights": noise[1]}
    passed = n_finite == steps or options.rehearse
    if has_graphs:
        loss, weights = compare_runs(runs["graph"], runs["eager"])
        limits = [max(LOSS_LIMIT, 2 * noise[0]), max(WEIGHT_LIMIT, 2 * noise[1])]
        is_captured, why = captured(runs["graph"])
        passed = passed and is_captured and loss <= limits[0] and weights <= limits[1]
        fields |= {"loss": loss, "weights": weights, "captured": is_captured, "why": why}
    record(**fields, passed=bool(passed))
    for run in runs.values():
        run.remove()
    return int(not passed)


def graph(options, record):
    """Compares all models on one and on two ranks, some at the same time."""
    has_graphs = knows_graphs(options)
    if not has_graphs:
        record(kind="skipped", why="bireme has no key `run.cuda_graph`")
    wait_for_data(options, "10k")
    cases = [(config, ranks) for ranks in (1, 2) for config in GRAPH_MODELS]
    with ThreadPoolExecutor(2 if options.rehearse else 6) as pool:
        compare = lambda case: compare_graph(options, record, has_graphs, *case)
        return max(pool.map(compare, cases))


def import_peer():
    """The module of the PyTorch peer, or the reason why it cannot run."""
    spec = importlib.util.spec_from_file_location("peer", PEER)
    peer = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(peer)
    except (ImportError, OSError) as error:
        return None, problem_in(str(error))
    return peer, ""


def time_bireme(options, record, model, config, batch, items, variant, mode):
    """Records the time of a step of one run of bireme."""
    sizes = options.sizes
    settings = [
        f"train.max_steps_per_day={sizes.log_every * sizes.n_records}",
        f"train.log_every_steps={sizes.log_every}",
        f"train.global_batch={batch}",
        f"train.micro_batch={32 if batch < 1024 else 512}",
        *([f"run.cuda_graph={mode}"] if mode else []),
    ]
    run = train(options, f"steps {model}", config, items, settings)
    windows = run.step_ms(batch)
    fields = {"kind": "step", "model": model, "sessions": batch, "items": items}
    fields |= {"variant": variant, "ms": statistics.median(windows) if windows else None}
    if mode == "require":
        fields["captured"], fields["why"] = captured(run)
    if run.exit != 0:
        fields |= {"exit": run.exit, "problem": run.problem, "refused": is_refusal(run.problem)}
    record(**fields, windows=windows, seconds=run.seconds)
    run.remove()


def peer_options(options, peer, batch, items, arguments, steps, warm_up, log_every):
    more = ["--steps", steps, "--warm-up", warm_up, "--log-every", log_every, "--batch", batch]
    data = options.work / "data" / items
    return peer.parser().parse_args(
        [str(word) for word in (data, *arguments, *more, "--device", "cuda")]
    )


def time_peer(options, record, peer, model, batch, items):
    """Records the time of a step of eager PyTorch, in this process."""
    sizes, fields = options.sizes, {"kind": "step", "model": model, "sessions": batch}
    fields |= {"items": items, "variant": "PyTorch"}
    steps = sizes.log_every * (sizes.n_records - 1)
    chosen = peer_options(
        options, peer, batch, items, MODELS[model][1], steps, sizes.log_every, sizes.log_every
    )
    began = time.perf_counter()
    try:
        figures = peer.train(chosen)
        record(**fields, ms=figures["step_ms"], seconds=time.perf_counter() - began)
    except RuntimeError as error:
        record(**fields, ms=None, problem=problem_in(str(error)))
    gc.collect()
    peer.torch.cuda.empty_cache()


def step_cases(sizes):
    """Cases to time: model, sessions of a step and items, the most informative first."""
    small, large = sizes.batches
    tutorial = ["gru", "xlnet"]
    cases = [(model, *size) for size in [(small, "10k"), (large, "100k")] for model in tutorial]
    cases += [("tuned/gru", small, "100k"), ("xlnet-side-info", small, "10k")]
    cases += [(model, *size) for size in [(small, "100k"), (large, "10k")] for model in tutorial]
    cases += [("gru", small, "390k"), ("gru", small, "1M")]
    for model in ("tuned/gru", "xlnet-side-info", "tuned/best"):
        for batch in sizes.batches:
            cases += [(model, batch, items) for items in ("100k", "10k")]
    return list(dict.fromkeys(cases))


def steps(options, record):
    """Times all cases, each way by turns."""
    has_graphs = knows_graphs(options)
    if not has_graphs:
        record(kind="skipped", why="bireme has no key `run.cuda_graph`: no times of graphs")
    peer, problem = import_peer()
    if peer is None:
        record(kind="skipped", why=f"no PyTorch peer: {problem}")
    for model, batch, items in step_cases(options.sizes):
        wait_for_data(options, items)
        config, arguments = MODELS[model]
        case = (options, record, model, config, batch, items)
        time_bireme(*case, "bireme eager", "off" if has_graphs else None)
        if has_graphs:
            time_bireme(*case, "bireme graph", "require")
        if peer and arguments:
            time_peer(options, record, peer, model, batch, items)
    return 0


def compile(options, record):
    """Times torch.compile in a process of its own for each model and mode."""
    if importlib.util.find_spec("torch") is None:
        record(kind="skipped", why="there is no PyTorch")
        return 0
    sizes, batch = options.sizes, options.sizes.batches[1]
    wait_for_data(options, "100k")
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(options.work / "inductor")}
    worst = 0
    for mode in ("default", "max-autotune-no-cudagraphs"):
        for model in ("gru", "xlnet"):
            counts = ["--steps", sizes.compile_steps, "--warm-up", sizes.compile_warm_up]
            counts += ["--log-every", sizes.log_every, "--batch", batch, "--device", "cuda"]
            command = [sys.executable, PEER, options.work / "data" / "100k", *MODELS[model][1]]
            command += ["--compile", mode, *counts]
            # Inductor needs Triton, which needs a GPU.
            command += ["--backend", "aot_eager"] if options.rehearse else []
            began = time.perf_counter()
            code, text = output(command, options.run_limit, environment)
            fields = {"kind": "step", "model": model, "sessions": batch, "items": "100k"}
            fields |= {"variant": f"compiled, {mode}", "seconds": time.perf_counter() - began}
            figures = [line for line in text.splitlines() if line.startswith('{"sessions_per_s"')]
            if code == 0 and figures:
                record(**fields, ms=json.loads(figures[-1])["step_ms"])
            else:
                record(**fields, ms=None, exit=code, problem=problem_in(text))
                worst = 1
    return worst


def phases(options, record):
    """Records the phases of eager steps, median over the records after the first."""
    sizes = options.sizes
    more = ["run.cuda_graph=off"] if knows_graphs(options) else []
    wait_for_data(options, "100k")
    worst = 0
    for batch in sizes.batches:
        for model in ("gru", "xlnet"):
            settings = [
                "train.time_phases=true",
                f"train.max_steps_per_day={sizes.log_every * sizes.n_records}",
                f"train.log_every_steps={sizes.log_every}",
                f"train.global_batch={batch}",
                f"train.micro_batch={32 if batch < 1024 else 512}",
                *more,
            ]
            run = train(options, f"phases {model}", MODELS[model][0], "100k", settings)
            records = run.records("phases")[1:]
            names = [name for name in (records or [{}])[0] if name not in ("kind", "day", "step")]
            medians = {
                name: 1000 * statistics.median(record[name] for record in records) for name in names
            }
            fields = {"kind": "phases", "model": model, "sessions": batch, "items": "100k"}
            record(**fields, ms=medians, exit=run.exit, problem=run.problem)
            worst = max(worst, int(run.exit != 0))
            run.remove()
    return worst


METRICS = {
    "gpu__time_duration.sum": "ns",
    "dram__bytes.sum": "bytes",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "sm_percent",
}


def ncu(options, record):
    """Profiles launches of the project's kernels and one pass over the head."""
    if shutil.which("ncu") is None:
        record(kind="skipped", why="there is no `ncu`")
        return 0
    script = [sys.executable, HERE / "kernels.py", "--root", options.root]
    profile = ["ncu", "--clock-control", "none", "--csv", "--page", "raw", "--print-units", "base"]
    profile += ["--metrics", ",".join(METRICS)]
    names = "regex:adamw|sum_rows|dropout"
    for which, command in {
        "kernels": [*profile, "--kernel-name", names, *script, "launch"],
        "head": [*profile, "--profile-from-start", "off", *script, "launch-head"],
    }.items():
        code, text = output(command, limit=options.run_limit)
        lines = text.splitlines()
        start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
        if start is None:
            record(kind="skipped", why=f"ncu, {which}: exit code {code}: {problem_in(text)}")
            continue
        for row in csv.DictReader(lines[start:]):
            # The second line has the units.
            if row.get("ID") and row.get("Kernel Name"):
                figures = {
                    to: float(row[name].replace(",", ""))
                    for name, to in METRICS.items()
                    if row.get(name)
                }
                record(kind="ncu", of=which, kernel=row["Kernel Name"][:80], **figures)
    return 0


def sanitize(options, record):
    """Runs the project's kernels under two tools of compute-sanitizer."""
    if shutil.which("compute-sanitizer") is None:
        record(kind="skipped", why="there is no `compute-sanitizer`")
        return 0
    worst = 0
    for tool in ("memcheck", "racecheck"):
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", 9, sys.executable]
        command += [HERE / "kernels.py", "check", "--small", "--root", options.root]
        code, text = output(command, limit=options.run_limit)
        summary = [line for line in text.splitlines() if "SUMMARY" in line]
        passed = code == 0 and bool(summary)
        record(
            kind="sanitizer",
            tool=tool,
            exit=code,
            passed=passed,
            summary=summary[-1].strip("= ") if summary else problem_in(text),
        )
        worst = max(worst, int(not passed))
    return worst


STAGES = {
    stage.__name__: stage
    for stage in (stack, data, parity, graph, steps, compile, phases, ncu, sanitize)
}


def end_session():
    """Ends all other processes of this session: tests put theirs into process groups of their own,
    which would outlive them and take the GPU's time."""
    own = os.getsid(0)
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == own and int(folder.name) != os.getpid():
                os.kill(int(folder.name), signal.SIGKILL)
        except (OSError, IndexError):
            continue


def stop(*_):
    """Ends the stage at its time limit."""
    end_session()
    os._exit(124)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bireme", default="target/release/bireme")
    parser.add_argument("--mpirun", default="mpirun")
    parser.add_argument("--tests", help="the test binary `it`")
    parser.add_argument("--record-as", help="name of the stage in the records")
    parser.add_argument("--run-limit", type=float, default=90, help="seconds of one run")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    for name in ("root", "work", "out"):
        setattr(options, name, getattr(options, name).resolve())
    options.sizes = REHEARSAL if options.rehearse else FULL
    (options.work / "runs").mkdir(parents=True, exist_ok=True)
    (options.work / "data").mkdir(parents=True, exist_ok=True)
    record = Recorder(options.out, options.record_as or options.stage)
    try:
        os.setsid()
    except PermissionError:
        return STAGES[options.stage](options, record)
    signal.signal(signal.SIGTERM, stop)
    code = STAGES[options.stage](options, record)
    end_session()
    return code


if __name__ == "__main__":
    sys.exit(main())
