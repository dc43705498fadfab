#!/usr/bin/env python3
"""Estimates the time of a training step on an H200 from counts and from the rates of the device.

usage: estimate.py [BUDGETS]

BUDGETS is tests/fake_cuda/budgets.toml unless given. Prints a table in Markdown: milliseconds of a
step before (operation by operation, as of version 0.1) and now (operation by operation, and as one
CUDA graph). These are estimates: nothing is measured. Needs Python 3.11.

The model of a step is the longer of two times, that of the host and that of the GPU:

- host: launches times the time of a launch, which follows from the measured 5.3 to 6.8 ms of 225
  launches of the GRU and 13 to 14.5 ms of 390 launches of the XLNet; 25 us for a graph
- GPU: launches times the time of a small kernel that waits for the one before; products of the head
  at the rate of f32; passes over its logits, and reads and writes of the optimizer, at the rate of
  the memory
"""

import sys
import tomllib
from pathlib import Path

# Seconds.
LAUNCH = {"gru": 27e-6, "xlnet": 35e-6}
GRAPH_LAUNCH = 25e-6
SMALL_KERNEL = 1.85e-6
# Per second.
FLOPS_F32 = 45e12
BYTES = 4.3e12

WIDTH = 64
LOGITS_BYTES = 1 << 30
# Targets of a batch of 256 sessions with the lengths of the REES46 shop.
TARGETS = {"gru": 1117, "xlnet": 402}
# Launches of a step at 256 sessions, with those inside cuDNN, passes over the logits, and bytes of
# the optimizer for each parameter.
BEFORE = {"launches": {"gru": 225, "xlnet": 390}, "passes": 10, "optimizer_bytes": 40}
NOW = {"passes": 9, "optimizer_bytes": 32}
# Kernels inside cuDNN's persistent recurrence, forward and back.
INSIDE_CUDNN = {"gru": 6, "xlnet": 0}
# Launches of a part of the targets in the head.
PART_LAUNCHES = {"before": 41, "now": 11}


def n_parts(n_targets, n_items):
    """Parts in which the logits of all targets fit into their memory."""
    fitting = max(1, LOGITS_BYTES // 4 // n_items)
    return -(-n_targets // fitting)


def device_seconds(n_launches, n_targets, n_items, passes, optimizer_bytes):
    """Time of the GPU for one step."""
    logits = n_targets * n_items
    products = 6 * logits * WIDTH / FLOPS_F32
    over_logits = passes * 4 * logits / BYTES
    # Each part reads the table twice, and reads and writes its gradient.
    over_table = n_parts(n_targets, n_items) * 4 * 4 * n_items * WIDTH / BYTES
    optimizer = optimizer_bytes * n_items * WIDTH / BYTES
    return n_launches * SMALL_KERNEL + products + over_logits + over_table + optimizer


def main():
    """Prints the table."""
    default = Path(__file__).parents[2] / "tests/fake_cuda/budgets.toml"
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else default
    budgets = tomllib.loads(path.read_text())
    print("| model | sessions | items | before, ms | now, single operations | now, one graph |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for model in ("gru", "xlnet"):
        launches = budgets[model]["1"]["launches"]
        for n_sessions in (256, 4096):
            for n_items in (10_000, 100_000, 390_000, 1_000_000):
                n_targets = TARGETS[model] * n_sessions // 256
                more_parts = n_parts(n_targets, n_items) - 1
                before = BEFORE["launches"][model] + more_parts * PART_LAUNCHES["before"]
                eager = launches["eager"] + more_parts * PART_LAUNCHES["now"]
                nodes = launches["captured"] + more_parts * PART_LAUNCHES["now"]
                inside = INSIDE_CUDNN[model]
                sizes = (n_targets, n_items)
                old = device_seconds(before, *sizes, BEFORE["passes"], BEFORE["optimizer_bytes"])
                new = device_seconds(nodes + inside, *sizes, NOW["passes"], NOW["optimizer_bytes"])
                times = [
                    max(before * LAUNCH[model], old),
                    max((eager + inside) * LAUNCH[model], new),
                    max(GRAPH_LAUNCH, new),
                ]
                cells = " | ".join(f"{1e3 * time:.2f}" for time in times)
                print(f"| {model} | {n_sessions:,} | {n_items:,} | {cells} |")


if __name__ == "__main__":
    main()
