"""The documents: links lead somewhere, what is named exists, and figures stand in committed records."""

import ast
import dataclasses
import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

from inductor_ce.bench.head.inputs import SHAPES
from inductor_ce.bench.shared.labels import Labels
from inductor_ce.common.options import Options

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "inductor_ce"
TESTS = ROOT / "tests"
README = ROOT / "README.md"
FOLDERS = [f for f in ROOT.iterdir() if f.is_dir() and not f.name.startswith(".") and f.name != "build"]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in folder.rglob("*.md"))])
MAKE_TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))

every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: str(d.relative_to(ROOT)))


# What is in a document

FENCED = re.compile(r"^( *)```.*?^\1```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^    .*$", re.MULTILINE)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^()\s]+)\)")


def prose(document: Path) -> str:
    """The text but for blocks of code."""
    return INDENTED.sub("", FENCED.sub("", document.read_text()))


def spans(document: Path) -> list[str]:
    """What stands between backticks in a line."""
    return SPAN.findall(prose(document))


def code(document: Path) -> list[str]:
    """All that is written as code; the whole of what is no Markdown."""
    text = document.read_text()
    if document.suffix != ".md":
        return [text]
    blocks = [match[0] for match in FENCED.finditer(text)] + INDENTED.findall(FENCED.sub("", text))
    return spans(document) + blocks


def links(document: Path) -> list[str]:
    return LINK.findall(SPAN.sub("", prose(document)))


def anchors(document: Path) -> set[str]:
    """What GitHub calls the headings."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", document.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def tables(document: Path) -> Iterator[tuple[str, list[list[str]]]]:
    """Each table, its heading first, as cells, with the paragraph before it."""
    paragraphs = prose(document).split("\n\n")
    for before, paragraph in zip(["", *paragraphs], paragraphs, strict=False):
        if paragraph.lstrip("\n").startswith("|"):
            heading, _, *rows = paragraph.strip().splitlines()
            yield before, [[cell.strip() for cell in row.strip("|").split(" |")] for row in (heading, *rows)]


# Links and names


def test_there_are_documents():
    found = {str(document.relative_to(ROOT)) for document in DOCUMENTS}
    assert {"README.md", "CONTRIBUTING.md", "docs/traps.md", "patterns/README.md", "tests/README.md"} <= found


@every_document
def test_links_lead_somewhere(document: Path):
    broken = []
    for link in links(document):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_the_readme_leads_to_every_document_of_docs():
    linked = {link.partition("#")[0] for link in links(README)}
    assert {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} <= linked


FILE = re.compile(r"[\w./*-]+\.(?:py|md|toml|txt|json|png|jinja)")
PATH = re.compile(r"\.?[\w*-]+(?:/[\w.*-]*)+")


def is_there(name: str, document: Path) -> bool:
    """From the folder of the document, the root, or the package."""
    return any(next(base.glob(name), None) for base in (document.parent, ROOT, PACKAGE))


def is_ours(name: str, document: Path) -> bool:
    """Whether a path begins with one of our folders."""
    return is_there(name.split("/")[0], document)


@every_document
def test_files_that_are_named_exist(document: Path):
    """A file's name alone between backticks, and a path into our folders in any code."""
    files = {span for span in spans(document) if FILE.fullmatch(span)}
    words = {word.partition("::")[0] for piece in code(document) for word in piece.split()}
    paths = {word for word in words if PATH.fullmatch(word) and is_ours(word, document)}
    assert [name for name in sorted(files | paths) if not is_there(name.rstrip("/"), document)] == []


def defined_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")}


TESTS_BY_FILE = {path.name: defined_in(path) for path in TESTS.glob("test_*.py")}


@every_document
def test_tests_that_are_named_exist(document: Path):
    """As `test_it`, `test_it_*`, or `test_file.py::test_it`."""
    missing = []
    for span in spans(document):
        named = re.fullmatch(r"(?:(test_\w+\.py)::)?(test_\w+)(\*?)", span)
        if named is None or f"{span}.py" in TESTS_BY_FILE:
            continue
        file, test, more = named.groups()
        known = TESTS_BY_FILE.get(file, set()) if file else set().union(*TESTS_BY_FILE.values())
        if not (any(name.startswith(test) for name in known) if more else test in known):
            missing.append(span)
    assert missing == []


def test_every_trap_has_tests_and_every_test_of_a_trap_is_listed():
    ((_, (_, *rows)),) = tables(ROOT / "docs/traps.md")
    assert [row[0] for row in rows] == [str(n) for n in range(1, 29)]
    listed = {int(row[0]): set(SPAN.findall(row[3])) for row in rows}
    assert all(listed.values())
    for file, names in TESTS_BY_FILE.items():
        for name in names:
            numbered = re.match(r"test_trap_(\d+)_", name)
            assert numbered is None or f"{file}::{name}" in listed[int(numbered[1])]


def test_every_file_of_the_tests_is_told():
    rows = [row for _, table in tables(TESTS / "README.md") for row in table]
    told = {name for row in rows for name in SPAN.findall(row[0])}
    assert {path.name for path in TESTS.glob("*.py")} <= told


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / ".ci/run"], ids=lambda d: str(d.relative_to(ROOT)))
def test_named_make_targets_exist(document: Path):
    named = set(re.findall(r"\bmake ([a-z]+(?:-[a-z]+)*)\b", "\n".join(code(document))))
    assert named <= MAKE_TARGETS


def test_make_is_named_where_it_must_be():
    for document, target in ((README, "demo"), (README, "test"), (ROOT / ".ci/run", "lint")):
        assert f"make {target}" in "\n".join(code(document))


# The README


def test_the_readme_is_short():
    assert len(README.read_bytes()) <= 9000


def test_the_readme_has_every_option():
    (rows,) = [rows for _, (heading, *rows) in tables(README) if heading[0] == "option"]
    told = [(name.strip("`"), ast.literal_eval(default.strip("`"))) for name, default, _ in rows]
    assert told == [(field.name, field.default) for field in dataclasses.fields(Options)]


def test_the_readme_shows_what_explain_says(capsys: pytest.CaptureFixture[str]):
    runpy.run_path(str(ROOT / "examples/explain.py"), run_name="__main__")
    (shown,) = re.findall(r"^```text\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    assert capsys.readouterr().out == shown


# Figures

# What a column is called, and the system that it is of in a record; what a loss is called, likewise.
SYSTEMS = {
    "eager": "eager",
    "torch.compile": "torch.compile",
    "auto_chunker": "auto_chunker",
    "Liger 0.8.5": "liger_kernel",
    "Liger 0.8.5, over the logits": "liger_kernel",
    "CCE 25.1.1": "cce",
    "CCE, unfiltered": "cce_exact",
    "quack, 2048": "quack@2048",
    "quack, 4096": "quack@4096",
    "quack, scaled exp": "quack_scaled_exp",
    "loss_parallel, compiled": "loss_parallel, compiled",
    "inductor_ce": "inductor_ce",
}
LOSSES = {
    "cross entropy": "plain",
    "+ smoothing 0.1, z-loss 1e-4": "smooth_z",
    "+ soft-cap 30": "smooth_z_cap",
    "log-probabilities, entropy bonus": "entropy",
}
RATIOS = {"of torch.compile", "of loss_parallel"}


def figures(document: Path) -> list[tuple[str, list[str], list[list[str]]]]:
    """The tables with measured figures: the paragraph before, the heading, the rows."""
    found = [(before, heading, rows) for before, (heading, *rows) in tables(document)]
    return [table for table in found if RATIOS & {*table[1]}]


Case = tuple[str, str | None]  # a shape, and which activations it had, if any


def cases(document: Path, paragraph: str) -> dict[Case, list[dict]]:
    """The rows of each case in the records that a paragraph cites."""
    found: dict[Case, list[dict]] = {}
    for link in re.findall(r"\]\((\S+\.json)\)", paragraph):
        record = json.loads((document.parent / link).read_text())
        for case in record.get("shapes", record.get("cases")):
            sizes = " x ".join(str(case[letter]) for letter in "NVDT" if letter in case)
            shape = case.get("model", str(SHAPES.get(case.get("name"), sizes)))
            told = {"mode": case["mode"], "labels": labels_of(case)} if "mode" in case else {}
            told |= {key: case[key] for key in ("divergence", "weight", "gradient") if key in case}
            rows = [{**row, **told} for row in case["rows"]]
            found.setdefault((shape, case.get("activations")), []).extend(rows)
    return found


def labels_of(case: dict) -> str:
    return str(Labels(case["ignored"], case["pattern"]))


def case_of(cells: dict[str, str], paragraph: str) -> Case:
    """Which case a row is of, as it says itself, or else the paragraph before its table."""
    if "model" in cells:
        return cells["model"], None
    shape = (
        cells.get("N x V x D x T")
        or cells.get("N x V x D")
        or cells.get("N x V")
        or re.search(r"\d+ x \d+", paragraph)[0]
    )
    return shape, cells.get("activations") or re.search(r"activations\s(random|trained)|$", paragraph)[1]


def measured(row: dict, column: str) -> str:
    """As a table has it: ms / MB, or what they are of plain compile's; ours in bold."""
    if column in RATIOS:
        keys = ("ratio", "memory_ratio", "peak_ratio")
        return " / ".join(f"{row[key]:.2f}x" for key in keys if row.get(key) is not None)
    if "peak_bytes" in row:
        return f"{row['ms']:.1f} / {row['peak_bytes'] / 2**20:.0f}"
    if "beyond_gradients" in row:
        beyond = row["beyond_gradients"]  # not told of CUDA graphs
        return f"{row['ms']:.1f}" + (f" / {beyond / 2**20:.0f}" if beyond is not None else "")
    memory = f" / {row['extra_bytes'] / 2**20:.0f}" if row["extra_bytes"] else ""  # not told of CUDA graphs
    return f"{row['ms']:.2f}{memory}"


def expected(rows: list[dict], cells: dict[str, str], column: str) -> str:
    wanted = {
        key: cells[key]
        for key in ("task", "mode", "labels", "divergence", "weight", "gradient")
        if key in cells
    }
    wanted |= {"loss": LOSSES[cells["loss"]]} if "loss" in cells else {}
    wanted["system"] = SYSTEMS.get(column, "inductor_ce")
    found = [row for row in rows if wanted.items() <= row.items()]
    text = measured(found[0], column) if found else "none"
    return f"**{text}**" if column == "inductor_ce" else text


@every_document
def test_figures_stand_in_committed_records(document: Path):
    """Each cell is what a record has that the paragraph before its table cites."""
    for before, heading, rows in figures(document):
        known = cases(document, before)
        columns = [column for column in heading if column in {*SYSTEMS, *RATIOS}]
        for row in rows:
            cells = dict(zip(heading, row, strict=True))
            found = known[case_of(cells, before)]
            assert [cells[c] for c in columns] == [expected(found, cells, c) for c in columns]


def in_table(row: dict | None) -> str:
    return "none" if row is None else f"{row['ms']:.3f} / {row['of_copy']:.2f}x"


@every_document
def test_figures_of_row_kernels(document: Path):
    """Each cell is the time, and the multiple of a copy's, that a record has."""
    ways = "copy", "two templates", "quack, one read", "one template"
    found = [(before, table) for before, table in tables(document) if ways[-1] in table[0]]
    for before, (heading, *rows) in found:
        (link,) = re.findall(r"\]\((\S+\.json)\)", before)
        cases = json.loads((document.parent / link).read_text())["cases"]
        known = {(f"{case['N']} x {case['V']}", case["loss"]): case["rows"] for case in cases}
        for row in rows:
            cells = dict(zip(heading, row, strict=True))
            measured = {each["way"]: each for each in known[cells["N x V"], cells["loss"]]}
            copy, two, peer, one = (in_table(measured.get(way)) for way in ways)
            assert [cells[way] for way in ways] == [copy.split()[0], two, peer, f"**{one}**"]
    assert len(found) == (document.name == "benchmarks.md")


HEADS = [
    {
        "N": 2,
        "V": 3,
        "D": 4,
        "activations": "random",
        "mode": mode,
        "ignored": ignored,
        "pattern": pattern,
        "rows": [{"system": "inductor_ce", "ms": ms, "ratio": ms / 16, "beyond_gradients": beyond}],
    }
    for mode, ignored, pattern, ms, beyond in (
        ("default", 0.75, "scattered", 2.5, 3 * 2**20),
        ("default", 0.75, "runs", 2.0, 3 * 2**20),
        ("reduce-overhead", 0.0, "", 8.0, None),
    )
]


def test_figures_of_modes_and_labels(tmp_path: Path):
    (tmp_path / "head.json").write_text(json.dumps({"cases": HEADS}))
    text = "A head ([record](head.json)), activations random.\n\n"
    text += "| N x V x D | labels | mode | inductor_ce | of torch.compile |\n|---|---|---|---|---|\n"
    right = ("| 2 x 3 x 4 | none ignored | reduce-overhead | **8.0** | 0.50x |\n",)
    right += ("| 2 x 3 x 4 | 75 % ignored, runs | default | **2.0 / 3** | 0.12x |\n",)
    document = tmp_path / "figures.md"
    document.write_text(text + "".join(right))
    test_figures_stand_in_committed_records(document)
    document.write_text(text + right[1].replace("runs", "scattered"))
    with pytest.raises(AssertionError):
        test_figures_stand_in_committed_records(document)


def test_there_are_figures_of_each_kind():
    assert [len(rows) for _, _, rows in figures(README)] == [4, 4, 5]
    found = [len(rows) for _, _, rows in figures(ROOT / "docs/benchmarks.md")]
    assert found == [12, 6, 7, 7, 6, 2, 3, 4, 15, 12, 5, 12, 5, 3, 1, 1, 16]
