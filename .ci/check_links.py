#!/usr/bin/env python3
"""Checks that the links of the Markdown files lead somewhere: files and headings, nothing on the
network.

usage: check_links.py [FILE...]   (default: every Markdown file that git tracks)

Prints `FILE:LINE: what is wrong` for each broken link. Exit codes: 0 none; 1 some.
"""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from urllib.parse import unquote

LINK = re.compile(
    r"""\]\(<?([^\s)>]+)>?(?:\s+["'][^)]*)?\)|^\s*\[[^\]]+\]:\s+<?([^\s>]+)|(?:href|src)="([^"]+)\""""
)
HEADING = re.compile(r"^#{1,6}\s+(.*?)\s*#*\s*$")
EXPLICIT_ANCHOR = re.compile(r"""<a\s+(?:id|name)="([^"]+)\"""")


def prose(path):
    """The lines outside fenced code, numbered from 1."""
    fence = None
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        mark = re.match(r"\s*(```+|~~~+)", line)
        if fence is None and mark:
            fence = mark[1]
        elif fence is not None:
            if mark and mark[1].startswith(fence) and line.strip() == mark[1]:
                fence = None
        else:
            yield number, line


@cache
def anchors(path):
    """The names that `#...` can point to, made as GitHub makes them."""
    names, seen = set(), {}
    for _, line in prose(path):
        names.update(EXPLICIT_ANCHOR.findall(line))
        if heading := HEADING.match(line):
            text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1])
            name = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            count = seen.get(name, 0)
            seen[name] = count + 1
            names.add(f"{name}-{count}" if count else name)
    return names


def broken(path, top):
    """Yields (line, what is wrong) for each broken link in one file."""
    for number, line in prose(path):
        for found in LINK.finditer(re.sub(r"`[^`]*`", "``", line)):
            link = next(filter(None, found.groups()))
            if re.match(r"[a-z][a-z0-9+.-]*:", link, re.IGNORECASE):
                continue
            file, _, anchor = unquote(link).partition("#")
            base = top if file.startswith("/") else path.parent
            target = (base / file.lstrip("/")).resolve() if file else path.resolve()
            if not target.exists():
                yield number, f"`{link}`: there is no such file"
            elif anchor and target.suffix == ".md" and anchor.lower() not in anchors(target):
                yield number, f"`{link}`: there is no such heading"


def main():
    """Files in, exit code out."""
    top = Path(__file__).resolve().parent.parent
    if names := sys.argv[1:]:
        files = [Path(name) for name in names]
    else:
        # A clone may belong to another user than the one who runs the checks.
        list_files = ["git", "-c", f"safe.directory={top}", "ls-files", "-z", "*.md"]
        listed = subprocess.run(list_files, cwd=top, check=True, capture_output=True, text=True)
        files = [top / name for name in listed.stdout.split("\0") if name]
    n_broken = 0
    for file in files:
        for number, what in broken(file, top):
            print(f"{file}:{number}: {what}")
            n_broken += 1
    print(f"{len(files)} Markdown files, {n_broken} broken links")
    return 1 if n_broken else 0


if __name__ == "__main__":
    sys.exit(main())
