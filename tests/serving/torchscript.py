#!/usr/bin/env python3
"""Runs exported modules in PyTorch and compares what they give.

usage: torchscript.py CASES

CASES is a JSON file, a list of modules: `path`, `inputs` (`type`, `shape` and `data` of each, in
order), and what is expected, `item_ids` and `item_scores`. Prints a line for each; exit code 1 if
one differs.
"""

import json
import sys

import torch


def main():
    """Arguments in, an exit code out."""
    with open(sys.argv[1], encoding="utf-8") as file:
        cases = json.load(file)
    for case in cases:
        module = torch.jit.load(case["path"])
        inputs = [
            torch.tensor(of["data"], dtype=getattr(torch, of["type"])).reshape(of["shape"])
            for of in case["inputs"]
        ]
        with torch.inference_mode():
            output, ids, scores, fallback = module(*inputs)
        wanted = torch.tensor(case["item_scores"])
        assert output.shape[0] == ids.shape[0] == fallback.shape[0] == wanted.shape[0]
        assert (scores - wanted).abs().max() < 1e-5, (scores - wanted).abs().max()
        # Items may change places where their scores are as good as equal.
        differs = ids != torch.tensor(case["item_ids"])
        near = (wanted[:, 1:] - wanted[:, :-1]).abs() < 1e-5
        edge = torch.zeros(len(wanted), 1, dtype=torch.bool)
        assert not (differs & ~(torch.cat([edge, near], 1) | torch.cat([near, ~edge], 1))).any()
        print(f"torch {torch.__version__} {case['path']}: {len(ids)} sessions alike")


if __name__ == "__main__":
    main()
