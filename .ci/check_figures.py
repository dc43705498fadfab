#!/usr/bin/env python3
"""Checks that the figures of the README come from benches/RESULTS.md, and those from benches/runs.

usage: python3 .ci/check_figures.py

Every figure in the README's section "Results" must be in benches/RESULTS.md. Every figure in a
section of benches/RESULTS.md must be in one of the runs that the section links to. Commands are not
compared. Exit code 1 if a figure is missing: one that was measured again is changed in all places.
"""

import pathlib
import re
import sys

NUMBER = re.compile(r"(?<![\w.,])(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?![\w]|[.,]\d)")
LINK = re.compile(r"\]\(([^)#]+)[^)]*\)")
root = pathlib.Path(__file__).resolve().parent.parent
results_path = root / "benches/RESULTS.md"


def numbers(text):
    """The figures of a text, without those in links' targets and indented commands."""
    text = re.sub(r"^    .*$", "", LINK.sub("]", text), flags=re.M)
    return NUMBER.findall(text)


def sections(text):
    """Title and text of each `##` section."""
    parts = re.split(r"^## (.*)$", text, flags=re.M)
    return list(zip(parts[1::2], parts[2::2]))


def main():
    """Files in, exit code out."""
    readme = dict(sections((root / "README.md").read_text()))
    results = results_path.read_text()
    if "Results" not in readme:
        sys.exit("README.md has no section `## Results`")
    n_figures, unknown = 0, []
    checks = [("README.md", "Results", readme["Results"], [results_path])]
    for title, text in sections(results):
        linked = [results_path.parent / link for link in LINK.findall(text)]
        checks.append(("benches/RESULTS.md", title, text, linked))
    for file, title, text, sources in checks:
        known = {figure for source in sources for figure in NUMBER.findall(source.read_text())}
        figures = numbers(text)
        n_figures += len(figures)
        names = " or ".join(str(source.relative_to(root)) for source in dict.fromkeys(sources))
        unknown += [
            f"{file}, section `{title}`: the figure {figure} is not in {names or 'a linked run'}"
            for figure in figures
            if figure not in known
        ]
    print(*unknown, sep="\n", end="\n" if unknown else "")
    print(f"{n_figures} figures, {len(unknown)} without a source")
    return 1 if unknown or not n_figures else 0


if __name__ == "__main__":
    sys.exit(main())
