"""Run the tests on releases of torch, one after another, and write the table of docs/torch_versions.md.

    python tools/releases.py 2.11.0 2.15.0

`make test` gives each an environment of its own. A release that is not run keeps the row that it has, and
so does one whose environment or run came to nothing. The exit status is the number of those that did not
pass.
"""

from __future__ import annotations

import datetime
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs/torch_versions.md"
BEGIN, END = "<!-- table of tools/releases.py -->", "<!-- end of the table -->"
HEADING = ("torch", "passed", "failed", "skipped", "seconds", "date", "commit")


class Row(NamedTuple):
    torch: str
    passed: str
    failed: str
    skipped: str
    seconds: str
    date: str
    commit: str


def rows_of(text: str) -> dict[str, Row]:
    """What stands between the markers, by release."""
    lines = text.partition(BEGIN)[2].partition(END)[0].strip().splitlines()[2:]
    rows = (Row(*(cell.strip() for cell in line.strip("|").split("|"))) for line in lines)
    return {row.torch: row for row in rows}


def with_rows(text: str, rows: dict[str, Row]) -> str:
    """The text with these rows between the markers, the oldest release first."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{TABLE.name} has no place for the table: {BEGIN} and {END}")
    ordered = sorted(rows.values(), key=lambda row: [int(part) for part in row.torch.split(".")])
    lines = [HEADING, ["---"] * len(HEADING), *ordered]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{before}{begin}\n\n{table}\n\n{end}{after}"


def counted(report: str) -> tuple[int, int, int, int]:
    """(passed, failed, skipped, seconds) of a report in JUnit's format; an error is a failure."""
    suites = list(ElementTree.fromstring(report).iter("testsuite"))
    tests, failures, errors, skipped = (
        sum(int(suite.get(name, 0)) for suite in suites)
        for name in ("tests", "failures", "errors", "skipped")
    )
    seconds = sum(float(suite.get("time", 0)) for suite in suites)
    failed = failures + errors
    return tests - failed - skipped, failed, skipped, round(seconds)


def commit() -> str:
    """The commit of the tree, and whether anything but the table differs from it."""
    head = _git("rev-parse", "--short", "HEAD")
    changed = _git("status", "--porcelain", "--", ".", f":!{TABLE.relative_to(ROOT)}")
    return f"{head}, changed" if changed else head


def _git(*arguments: str) -> str:
    run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return run.stdout.strip()


def tested(release: str) -> Row | None:
    """Run all tests on a release; None where there was no run to its end."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = ["make", "test", f"TORCH={release}", f"ARGS=--junitxml={report}"]
        status = subprocess.run(command, cwd=ROOT).returncode
        if not report.exists():
            return None
        passed, failed, skipped, seconds = counted(report.read_text())
    if passed == 0 or (status != 0) != (failed > 0):
        return None
    today = datetime.date.today().isoformat()
    return Row(release, *map(str, (passed, failed, skipped, seconds)), today, commit())


def main(releases: list[str]) -> int:
    bad = []
    for release in releases:
        row = tested(release)
        if row is None or row.failed != "0":
            bad.append(release)
        if row is None:
            print(f"torch {release}: no result, its row is left as it was", file=sys.stderr)
            continue
        text = TABLE.read_text()
        TABLE.write_text(with_rows(text, rows_of(text) | {release: row}))
        print(f"torch {release}: {row.passed} passed, {row.failed} failed, {row.skipped} skipped", flush=True)
    return len(bad)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
