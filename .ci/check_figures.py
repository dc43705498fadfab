#!/usr/bin/env python3
"""Checks that every figure in the README's section "Figures" is one of benches/RESULTS.md.

usage: python3 .ci/check_figures.py

Exit code 1 if one is not: a figure that was measured again is changed in both places.
"""

import pathlib
import re
import sys

root = pathlib.Path(__file__).resolve().parent.parent
readme = (root / "README.md").read_text()
results = (root / "benches/RESULTS.md").read_text()

section = re.search(r"^## Figures\n(.*?)(?=^## |\Z)", readme, re.S | re.M)
if not section:
    sys.exit("README.md has no section `## Figures`")
NUMBER = r"(?<![\w.,])(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?![\w]|[.,]\d)"
known = set(re.findall(NUMBER, results))
figures = re.findall(NUMBER, section[1])
unknown = [figure for figure in figures if figure not in known]
for figure in unknown:
    print(f"README.md: the figure {figure} is not in benches/RESULTS.md")
print(f"{len(figures)} figures, {len(unknown)} not in benches/RESULTS.md")
sys.exit(1 if unknown or not figures else 0)
