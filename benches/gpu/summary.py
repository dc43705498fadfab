"""Prints the results of benches/gpu.sh as a table of at most 40 lines.

    python benches/gpu/summary.py RESULTS.jsonl

Milliseconds of a step are medians. `predicted` is the estimate of the captured step from before
its first measurement. `before` is the time of an eager step of an earlier build and of PyTorch on
an H200 (benches/runs/2026-11-26-nvidia-h200.md).
"""

import json
import sys
from pathlib import Path

LINES = 40

# Milliseconds of a captured step on an H200. 256 sessions and 10k items: the larger figure with the
# launches of the eager step, the smaller with fewer. Others: the body, and the head as below.
PREDICTED_STEP = {
    ("gru", 256, "10k"): "0.42-0.75",
    ("xlnet", 256, "10k"): "0.65-1.0",
    ("gru", 256, "100k"): "2.4",
    ("xlnet", 256, "100k"): "1.4",
    ("gru", 256, "390k"): "8.4",
    ("gru", 256, "1M"): "21",
    ("gru", 4096, "100k"): "34",
    ("xlnet", 4096, "100k"): "27",
}

# Milliseconds of an eager step of an earlier build, and of PyTorch, on an H200.
MEASURED_BEFORE = {
    ("gru", 256, "10k"): "5.3-6.8 / 3.3",
    ("xlnet", 256, "10k"): "13-14.5 / 12.1",
    ("gru", 4096, "100k"): "43 / 57",
    ("xlnet", 4096, "100k"): "27 / 33",
}

# Milliseconds of the head, forward and backward, on an H200 by items and targets: with the
# operations of the program in f32, with flash attention in bf16, and three products at 790 TFLOP/s.
PREDICTED_HEAD = {
    ("100k", 1100): (2.0, 0.57, 0.05),
    ("390k", 1100): (8.0, 2.2, 0.21),
    ("1M", 1100): (21, 5.7, 0.54),
    ("100k", 18_000): (32, 9.2, 0.87),
    ("390k", 18_000): (127, 36, 3.4),
    ("1M", 18_000): (335, 92, 8.7),
}

# Milliseconds of AdamW over a table of 64 columns on an H200.
PREDICTED_ADAMW = {"100k": 0.05, "390k": 0.19, "1M": 0.48}

# Rates of large products of random numbers in bf16, TFLOP/s, and of a copy, TB/s, on an H200.
PREDICTED_CEILINGS = {"product bf16": 790, "copy": 4.3}


def is_number(value):
    return isinstance(value, (int, float))


def number(value, width=8):
    """A number with three digits, a word, or a dash."""
    if not is_number(value):
        return f"{value or '-':>{width}}"
    text = f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    return f"{text:>{width}}"


def ratio(above, below):
    return f"{above / below:.1f}x" if is_number(above) and is_number(below) else "-"


def small(value):
    return f"{value:.0e}" if is_number(value) else "-"


def first(records, **wanted):
    """The first record with these fields, or an empty one."""
    matches = (record for record in records if all(record.get(k) == v for k, v in wanted.items()))
    return next(matches, {})


def stack_lines(records):
    gpu, torch = first(records, kind="gpu"), first(records, kind="torch")
    ends = [r for r in records if r.get("kind") == "stage"]
    states = [f"{r['stage']} {r['state']} {r['seconds']} s" for r in ends]
    smi = gpu.get("text", "") if gpu.get("exit") == 0 else "no nvidia-smi"
    yield f"{torch.get('device', 'no GPU')} | {smi[:70]} | torch {torch.get('version', '-')}"
    yield "stages: " + "; ".join(states)
    reasons = [f"{r['stage']}: {r['why']}" for r in records if r.get("kind") == "skipped"]
    yield "skipped: " + ("; ".join(dict.fromkeys(reasons)) or "nothing")


def parity_lines(records):
    tests = [r for r in records if r.get("kind") == "test"]
    failed = [r["name"] for r in tests if r["result"] != "ok"]
    skipped = sum(r["stage"] == "parity" and r.get("kind") == "skipped" for r in records)
    unfinished = first(records, kind="tests").get("unfinished", ["the end is not recorded"])
    yield (
        f"tests: {len(tests) - len(failed)} passed, {len(failed)} failed, {skipped} skipped"
        f" {' '.join(failed)}" + f"; unfinished: {' '.join(unfinished)}" * bool(unfinished)
    )


def graph_lines(records):
    """Differences of losses and weights, and of an eager repetition in brackets."""
    for ranks in (1, 2):
        cases = []
        for r in records:
            if r.get("kind") == "graph" and r.get("ranks") == ranks:
                apart = f"{small(r.get('loss'))}/{small(r.get('weights'))}"
                noise = f"({small(r.get('eager_loss'))}/{small(r.get('eager_weights'))})"
                state = "ok" if r["passed"] else "FAILED"
                if r.get("refused") and r["passed"]:
                    state = "refused"
                cases.append(f"{r['model']} {state} {apart} {noise}")
        yield f"graph, {ranks} rank{'s' * (ranks > 1)}: " + ("; ".join(cases) or "-")


def kernel_lines(records):
    checks = [r for r in records if r.get("kind") == "kernel"]
    failed = sorted({r["kernel"] for r in checks if not r["passed"]})
    tools = [
        f"{r['tool']} {'ok' if r['passed'] else 'FAILED'}"
        for r in records
        if r.get("kind") == "sanitizer"
    ]
    passed = sum(r["passed"] for r in checks)
    yield (
        f"kernels: {passed} of {len(checks)} comparisons with f64 passed"
        f" {'FAILED: ' * bool(failed)}{' '.join(failed)}; {', '.join(tools) or 'not sanitized'}"
    )
    speeds = []
    for items, predicted in PREDICTED_ADAMW.items():
        found = first(records, kind="speed", kernel="adamw", items=items)
        if found:
            speeds.append(f"{items} {found['ms']:.3f} ms ({predicted} predicted)")
    yield "adamw: " + ("; ".join(speeds) or "-")


def step_lines(records):
    yield (
        f"{'ms of a step':16}{'sessions':>8}{'items':>6}{'eager':>8}{'graph':>8}{'PyTorch':>8}"
        f"{'compiled':>9}{'PT/eager':>9}{'PT/graph':>9}{'predicted':>11}  before"
    )
    rows = [r for r in records if r.get("kind") == "step"]
    for model, sessions, items in dict.fromkeys(
        (r["model"], r["sessions"], r["items"]) for r in rows
    ):
        ms = {}
        for r in rows:
            if (r["model"], r["sessions"], r["items"]) == (model, sessions, items):
                ms[r["variant"]] = r["ms"] or ("refused" if r.get("refused") else "failed")
        eager, graph, torch = map(ms.get, ("bireme eager", "bireme graph", "PyTorch"))
        compiled = [ms[variant] for variant in ms if variant.startswith("compiled")]
        compiled = min(compiled, key=lambda x: x if is_number(x) else 1e9, default=None)
        key = model, sessions, items
        yield (
            f"{model:16}{sessions:>8}{items:>6}{number(eager)}{number(graph)}{number(torch)}"
            f"{number(compiled, 9)}{ratio(torch, eager):>9}{ratio(torch, graph):>9}"
            f"{PREDICTED_STEP.get(key, '-'):>11}  {MEASURED_BEFORE.get(key, '')}"
        )


def head_lines(records):
    """The head: measured, and predicted in brackets."""
    ceilings = {r["of"]: r for r in records if r.get("kind") == "ceiling"}
    rates = []
    for of, r in ceilings.items():
        rate = f"{r['tflops']:.0f} TFLOP/s" if "tflops" in r else f"{r['tb_per_s']:.2f} TB/s"
        predicted = f" ({PREDICTED_CEILINGS[of]})" if of in PREDICTED_CEILINGS else ""
        rates.append(f"{of} {rate}{predicted}")
    yield "ceilings: " + ("; ".join(rates) or "-")
    bf16 = ceilings.get("product bf16", {}).get("tflops")
    for (items, targets), (program, flash, roof) in PREDICTED_HEAD.items():
        case = {"kind": "head", "items": items, "targets": targets}
        found = {
            variant: first(records, **case, variant=variant)
            for variant in ("program f32", "program tf32", "flash bf16")
        }
        if not any(found.values()):
            continue
        ms = {variant: number(r.get("ms"), 0) for variant, r in found.items()}
        tflops = found["flash bf16"].get("tflops")
        share = f"{tflops / bf16:.0%} of bf16" if tflops and bf16 else "-"
        yield (
            f"head {items} x {targets}: f32 {ms['program f32']} ({program}), "
            f"tf32 {ms['program tf32']}, flash {ms['flash bf16']} ({flash}), roof ({roof}) ms; "
            f"flash {share}"
        )


def phase_lines(records):
    cases = []
    for r in records:
        if r.get("kind") == "phases" and r["ms"]:
            longest = sorted(r["ms"].items(), key=lambda pair: -pair[1])[:4]
            parts = " ".join(f"{name} {value:.2f}" for name, value in longest)
            cases.append(f"{r['model']} {r['sessions']}: {parts}")
    yield "phases, ms: " + ("; ".join(cases) or "-")


def counter_lines(records):
    cases = []
    for r in records:
        if r.get("kind") == "ncu" and r["of"] == "kernels":
            figures = r.get("ns", 0) / 1e6, r.get("dram_percent", 0), r.get("sm_percent", 0)
            cases.append(
                "{} {:.3f} ms, memory {:.0f} %, SMs {:.0f} %".format(r["kernel"], *figures)
            )
    yield "counters: " + ("; ".join(cases) or "-")


def lines(records):
    """All lines, of which the last are left out if there are too many."""
    parts = (stack_lines, parity_lines, graph_lines, kernel_lines, step_lines, head_lines)
    found = [
        line.rstrip() for part in (*parts, phase_lines, counter_lines) for line in part(records)
    ]
    return found[:LINES]


def main():
    records = []
    for line in Path(sys.argv[1]).read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    print("\n".join(lines(records)))


if __name__ == "__main__":
    main()
