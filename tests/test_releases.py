"""The tests on other releases of torch: environments, the table of the documents, the weekly job."""

import os
import re
import runpy
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from inductor_ce.common.errors import AFTER_LAST_TORCH, FIRST_TORCH

ROOT = Path(__file__).parent.parent
MAKEFILE = (ROOT / "Makefile").read_text()
releases = SimpleNamespace(**runpy.run_path(str(ROOT / "tools/releases.py")))
private_names = SimpleNamespace(**runpy.run_path(str(ROOT / "tools/private_names.py")))

REPORT = '<testsuites><testsuite tests="9" failures="2" errors="1" skipped="3" time="61.7"/></testsuites>'

EMPTY = '<testsuites><testsuite tests="0" failures="0" errors="0" skipped="0" time="0"/></testsuites>'


def dry(*arguments: str) -> str:
    """What make would do; a make that runs these tests must not hand down what it was asked for."""
    asked = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "TORCH", "RELEASES"}
    run = subprocess.run(
        ["make", "--no-print-directory", "-n", "-B", *arguments],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name not in asked},
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout


def test_every_minor_release_that_is_supported_is_run():
    minors = [(2, minor) for minor in range(FIRST_TORCH[1], AFTER_LAST_TORCH[1])]
    (named,) = re.findall(r"^RELEASES \?= (.*)$", MAKEFILE, re.MULTILINE)
    assert [tuple(map(int, release.split(".")[:2])) for release in named.split()] == minors
    assert dry("test-all").endswith(f" tools/releases.py {named}\n")


def test_a_release_has_an_environment_of_its_own():
    lines = dry("test", "TORCH=2.15.0")
    assert "s/^torch==.*/torch==2.15.0/" in lines
    assert set(re.findall(r"\.venv[\w.-]*", lines)) == {".venv-2.15.0"}
    assert set(re.findall(r"\.venv[\w.-]*", dry("test"))) == {".venv"}


def test_continuous_integration_stays_with_the_pinned_release():
    assert "TORCH" not in (ROOT / ".ci/run").read_text()


def row(release: str, **cells: str) -> Any:
    values = {
        "passed": "7",
        "failed": "0",
        "skipped": "1",
        "seconds": "9",
        "date": "2026-01-02",
        "commit": "abc",
    }
    return releases.Row(release, **values | cells)


def test_rows_are_read_as_they_are_written():
    text = f"# A\n\n{releases.BEGIN}\n{releases.END}\n\nB\n"
    rows = {"2.15.0": row("2.15.0"), "2.9.1": row("2.9.1", failed="3")}
    written = releases.with_rows(text, rows)
    assert releases.rows_of(written) == rows
    assert list(releases.rows_of(written)) == ["2.9.1", "2.15.0"]
    assert releases.with_rows(written, releases.rows_of(written)) == written
    assert (written.startswith("# A\n\n"), written.endswith("\n\nB\n")) == (True, True)


def test_a_text_without_markers_is_refused():
    with pytest.raises(ValueError, match="no place for the table"):
        releases.with_rows(releases.BEGIN, {})


def test_the_document_has_a_place_for_the_table():
    text = releases.TABLE.read_text()
    assert releases.with_rows(text, releases.rows_of(text)) == text


def test_errors_count_as_failures():
    assert releases.counted(REPORT) == (3, 3, 3, 62)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A table with one row, in place of the document's."""
    path = tmp_path / "table.md"
    path.write_text(releases.with_rows(f"{releases.BEGIN}\n{releases.END}\n", {"2.11.0": row("2.11.0")}))
    monkeypatch.setitem(releases.main.__globals__, "TABLE", path)
    return path


def test_rows_of_releases_that_are_not_run_are_kept(table: Path, monkeypatch: pytest.MonkeyPatch):
    """Also that of a release whose run came to nothing, which is one that did not pass."""
    results = {"2.12.1": row("2.12.1"), "2.14.1": row("2.14.1", failed="2"), "2.11.0": None}
    monkeypatch.setitem(releases.main.__globals__, "tested", results.__getitem__)
    assert releases.main(list(results)) == 2
    kept = {"2.11.0": row("2.11.0"), "2.12.1": results["2.12.1"], "2.14.1": results["2.14.1"]}
    assert releases.rows_of(table.read_text()) == kept


@pytest.mark.parametrize(("status", "report"), [(2, ""), (0, REPORT), (2, EMPTY)])
def test_a_run_that_does_not_end_has_no_row(status: int, report: str, monkeypatch: pytest.MonkeyPatch):
    def make(command: list[str], **_: Any) -> Any:
        if report:
            Path(command[-1].partition("=--junitxml=")[2]).write_text(report)
        return SimpleNamespace(returncode=status)

    monkeypatch.setattr(subprocess, "run", make)
    assert releases.tested("2.14.1") is None


def test_every_private_name_is_in_the_torch_that_runs():
    names = sorted(set(private_names.imported()))
    described = {names_: private_names.described(*names_) for names_ in names}
    assert ("torch._inductor.lowering", "register_lowering") in described
    assert [name for name, text in described.items() if text == "not there"] == []
    assert private_names.described("torch._inductor.lowering", "no_such_name") == "not there"
    assert max(map(len, described.values())) < 1000
    assert private_names.described("torch._inductor.lowering", "register_lowering").startswith("aten_fn, ")


def test_the_weekly_job_is_a_script_that_bash_reads():
    script = ROOT / "tools/newest.sh"
    assert os.access(script, os.X_OK)
    assert "set -euo pipefail" in script.read_text()
    subprocess.run(["bash", "-n", script], check=True)
