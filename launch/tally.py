#!/usr/bin/env python3
"""Reads what `cargo test -- --show-output` prints, passes it on, and counts.

usage: cargo test -- --show-output | tally.py

A test that cannot run here prints a line that begins with `skipped:` and returns; Rust's test
harness counts it as passed. This counts it as skipped and lists it with its reason. What passed
tests print is otherwise left out. A test binary that ends before its result line (an abort, a
signal) counts as one failure. The last line is `N passed, N failed, N skipped`.
"""

import re
import sys

STARTED = re.compile(r"running \d+ tests?")
RESULT = re.compile(r"test result: \w+\. (\d+) passed; (\d+) failed; (\d+) ignored;")
OUTPUT_OF = re.compile(r"---- (.+) stdout ----")


def main():
    """Standard input to standard output, line by line, so that a long run shows how far it is."""
    passed = failed = ignored = 0
    skipped = {}  # the first reason of each test, by (number of the test binary, name of the test)
    n_binaries = n_broken_off = 0
    running = False
    among_passed, test = False, ""
    for line in sys.stdin:
        text = line.rstrip("\n")
        if text in ("successes:", "failures:"):
            among_passed = text == "successes:"
        elif not among_passed and STARTED.fullmatch(text):
            n_broken_off += running
            running = True
        elif result := RESULT.match(text):
            running = among_passed = False
            n_binaries += 1
            passed, failed, ignored = (
                total + int(count)
                for total, count in zip((passed, failed, ignored), result.groups(), strict=True)
            )
        elif among_passed and (found := OUTPUT_OF.fullmatch(text)):
            test = found[1]
        elif among_passed and text.startswith("skipped:"):
            skipped.setdefault((n_binaries, test), text.removeprefix("skipped:").strip())
        if not among_passed:
            sys.stdout.write(line)
            sys.stdout.flush()
    n_broken_off += running
    print()
    if n_broken_off:
        print(f"failed: {n_broken_off} test binaries ended before they could count their tests")
    for (_, name), reason in skipped.items():
        print(f"skipped: {name}: {reason}")
    if ignored:
        print(f"skipped: {ignored} marked #[ignore]")
    print(
        f"{passed - len(skipped)} passed, {failed + n_broken_off} failed, {len(skipped) + ignored} skipped"
    )


if __name__ == "__main__":
    main()
