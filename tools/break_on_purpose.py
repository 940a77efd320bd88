"""Break the package on purpose, one line at a time, and see that the tests see it.

    python tools/break_on_purpose.py [words of a name ...]

Each break is applied in a temporary copy of the tree, where its tests are run; they must fail. What is
printed is the table of tests/README.md. The exit status is the number of breaks that nobody saw.

A text that is no longer there, or more than once, stops everything: the break is to be written anew.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
NOT_COPIED = shutil.ignore_patterns("*.egg-info", "__pycache__", "results", ".*")


@dataclass(frozen=True)
class Break:
    """One text of one file replaced by another, and the tests that are to see it, as arguments of pytest."""

    name: str
    file: str
    old: str
    new: str
    tests: str


def in_folder(folder: str, breaks: list[tuple[str, str, str, str, str]]) -> list[Break]:
    return [Break(name, folder + file, old, new, tests) for name, file, old, new, tests in breaks]


STATS, GRAD, LAW, BOTH = (f"{name}.py.jinja" for name in ("row_stats", "row_grad", "law", "row_stats_grad"))
TEMPLATES = in_folder(
    "inductor_ce/ops/templates/",
    [
        (
            *("`row_stats` template: no guard for -inf", LAW),
            'return tl.where(m == float("-inf"), 0.0, m)',
            "return m",
            "tests/test_templates.py -k test_one_finite_column",
        ),
        (
            *("`row_stats` template: columns of the last tile counted twice", STATS),
            "fresh = i_tail >= WHOLE",
            "fresh = i_tail >= 0",
            "tests/test_templates.py -k 'test_stats_at_every_vocabulary and (0-257 or 0-1000)'",
        ),
        (
            *("`row_stats` template: the sum not lowered with the maximum", LAW),
            "return s + seen * (inductor_ce_shift(m) - inductor_ce_shift(m_new))",
            "return s",
            "tests/test_templates.py -k 'test_stats_at_every_vocabulary and 4097'",
        ),
        (
            *("`row_stats` template: a label outside picks column 0", STATS),
            "packed = tl.where(named, z_y.to(SUM_TYPE), 0.0)",
            "packed = z_y.to(SUM_TYPE)",
            "tests/test_templates.py -k 'test_stats_at_every_vocabulary and 257'",
        ),
        (
            *("`row_stats_grad` template: who helps publishes what is there already", BOTH),
            "tl.atomic_cas(place, tl.zeros([], tl.int64), word, sem=SEM)",
            "tl.atomic_xchg(place, word, sem=SEM)",
            "tests/test_one_read.py -k 'published_stays'",
        ),
        (
            *("`row_stats_grad` template: columns of the last block counted twice", BOTH),
            "if first + BLOCK > V:",
            "if first > V:",
            "tests/test_one_read.py -k 'every_vocabulary and 257'",
        ),
        (
            *("`row_stats_grad` template: nobody helps", BOTH),
            "    while lost < C:\n",
            "    while lost > C:\n",
            "tests/test_one_read.py -k 'every_vocabulary and 600'",
        ),
        (
            *("`row_stats_grad` template: columns before the last block stored over the gradient", BOTH),
            '"i_col >= i_block * BLOCK" if OVER else',
            '"tl.full([BLOCK], True, tl.int1)" if OVER else',
            "tests/test_one_read.py -k 'over_the_logits and 600'",
        ),
        (
            *("`row_stats_grad` template: what threads have merged as it is", BOTH),
            "moved_d = d * tl.exp(m - {{shift}})",
            "moved_d = d",
            "tests/test_one_read.py -k 'every_vocabulary and 600'",
        ),
        (
            *("`row_stats_grad` template: what pads a row is what a chain makes of it", BOTH),
            'x = tl.where(fresh, x, float("-inf"))',
            "x = x",
            "tests/test_one_read.py -k 'vocabulary_behind_a_chain and shift and 257'",
        ),
        (
            *("`row_stats_grad` template: the chain behind the gradient left out", BOTH),
            'ONE.after("z_wide", "dz")',
            "[]",
            "tests/test_one_read.py -k 'vocabulary_behind_a_chain and 255'",
        ),
        (
            *("`row_stats_grad` template: the label's logit before the chain", BOTH),
            'ONE.before("picked")',
            "[]",
            "tests/test_one_read.py -k 'vocabulary_behind_a_chain and 255'",
        ),
        (
            *("`row_grad` template: the maximum left out", GRAD),
            'gap = z_col.to(ACC_TYPE) - tl.where(m_row == float("-inf"), 0.0, m_row)',
            "gap = z_col.to(ACC_TYPE)",
            "tests/test_templates.py -k 'test_grad_at_every_vocabulary and 257'",
        ),
        (
            *("`row_grad` template: the label one column off", GRAD),
            "tl.where(i_col == y,",
            "tl.where(i_col == y + 1,",
            "tests/test_templates.py -k 'test_grad_at_every_vocabulary and 257'",
        ),
        (
            *("`row_grad` template: labels outside taken for column 0", GRAD),
            "y = tl.where((y >= 0) & (y < V), y, -1)",
            "y = tl.where((y >= 0) & (y < V), y, 0)",
            "tests/test_templates.py -k 'test_grad_at_every_vocabulary and 257'",
        ),
        (
            *("`row_grad` template: only the first block written", GRAD),
            'stored = {{"i_col >= first" if OVER else "tl.full([BLOCK], True, tl.int1)"}}',
            "stored = i_col < BLOCK",
            "tests/test_templates.py -k 'test_grad_at_every_vocabulary and 4097'",
        ),
    ],
)
OPERATORS = in_folder(
    "inductor_ce/ops/",
    [
        (
            *("products on a GPU: both halves of a tile added to the first", "counted_kernels.py"),
            "_add_to(out, two, i_tile * M, j_tile * N + N // 2)",
            "_add_to(out, two, i_tile * M, j_tile * N)",
            "tests/test_counted_kernels.py -k test_product_over_rows",
        ),
        (
            *("tapes: tensors that overlap otherwise are taken for the same", "tapes.py"),
            "if _overlaps([*given, *made]) != self._overlaps:",
            "if False:",
            "tests/test_tapes.py",
        ),
        (
            *("tapes: what a library does is not noticed", "tapes.py"),
            "if others.seen or len(done) < len(launches):",
            "if len(done) < len(launches):",
            "tests/test_tapes.py",
        ),
        (
            *("chunks: a chunk's gradient of the weight in the place of the sum", "chunks.py"),
            "(own[0], piece > 0, False)",
            "(own[0], False, False)",
            "tests/test_chunks.py -k test_it_makes",
        ),
        (
            *("frequent rows: rows that do not count are summed", "sum_kernels.py"),
            "here = here & (tl.load(counted + i, mask=here, other=0) != 0)",
            "here = here & (tl.load(counted + i, mask=here, other=0) >= 0)",
            "tests/test_chunks.py -k test_frequent_rows",
        ),
        (
            *("reference op: gradient written over z", "operators.py"),
            "return dz.to(z.dtype).contiguous()",
            "return z.copy_(dz.to(z.dtype))",
            "tests/test_traps.py -k test_trap_14",
        ),
        (
            *("reference op: label mask of the gradient dropped", "operators.py"),
            "b = torch.where(inside, coefficients[k], 0.0)",
            "b = coefficients[k]",
            "tests/test_ops.py -k 'belongs_to_no_column or gradcheck'",
        ),
        (
            *("combine: a block's sum not lowered to the common maximum", "combine.py"),
            "return block if beside is None else block + beside * rise",
            "return block",
            "tests/test_head.py -k 'test_loss and smoothing and vocab_slabs'",
        ),
        (
            *("head: `product_into` ignores `accumulate`", "gemm.py"),
            "    if accumulate:\n        torch.addmm(out",
            "    if False:\n        torch.addmm(out",
            "tests/test_head.py -k 'test_loss and token_chunks and bias'",
        ),
        (
            *("head: of a float32 gradient one term alone is multiplied", "gemm.py"),
            "rest = torch.where(wide.isfinite(), rest - wide, 0.0)",
            "rest = torch.zeros_like(rest)",
            "tests/test_products.py -k 'terms_add_up or float32_times'",
        ),
        (
            *("head: the columns of the rarest labels taken for the most frequent", "label_products.py"),
            "count.sort(descending=True,",
            "count.sort(descending=False,",
            "tests/test_products.py -k test_most_frequent",
        ),
        (
            *("head: entries at the labels not put back", "label_products.py"),
            "        put_back(dz, label, rows, first + k)",
            "        pass",
            "tests/test_products.py -k test_a_product_without_the_labels",
        ),
        (
            *("head: the frequent rows not completed", "label_products.py"),
            "    out[key[column >= 0]] = often[column[column >= 0]].to(out.dtype)",
            "    pass",
            "tests/test_products.py -k test_what_was_left_out_is_added",
        ),
        (
            *("counted products: the tiles that are divided are the first", "counted_kernels.py"),
            "whole + part % tl.maximum(rest, 1))",
            "part % tl.maximum(rest, 1))",
            "tests/test_counted_kernels.py -k 'test_sums_of_few_tiles_are_divided and 448'",
        ),
        (
            *("counted products: entries of rows that are not computed", "product_kernels.py"),
            "mask=inside & (rows < limit) & (column >= 0)",
            "mask=inside & (column >= 0)",
            "tests/test_products.py -k test_entries_of_rows_that_are_not_computed",
        ),
        (
            *("launches: a number in the place of a pointer is any number", "launch.py"),
            'kind.append("1" if pointer == 1 else pointer % VECTOR == 0)',
            "kind.append(0)",
            "tests/test_launch.py -k test_numbers_that_vary",
        ),
        (
            *("launches: every address is aligned", "launch.py"),
            "address % VECTOR == 0, pointer.get_device()",
            "True, pointer.get_device()",
            "tests/test_launch.py -k test_another_kind_is_not_taken",
        ),
    ],
)
COMPAT = in_folder(
    "inductor_ce/common/compat/",
    [
        (
            *("launches: every tensor's tiles are encoded as the first one's", "launches.py"),
            "encoded += self._encode(i, address) if found is None else found",
            "encoded += self._encode(0, address) if found is None else found",
            "tests/test_launches.py",
        ),
    ],
)
HEADS = in_folder(
    "inductor_ce/heads/",
    [
        (
            *("head: the gradient behind a chain taken for that before it", "chained.py"),
            "_Elements([root, grad]).program(gradients)",
            "_Elements([root, grad]).program([grad])",
            "tests/test_chained.py -k test_it_is_read",
        ),
        (
            *("head: a step read without its alpha", "steps.py"),
            "name is not None and len(args_of(node)) == FUNCTIONS[name].arity and not node.kwargs",
            "name is not None and not node.kwargs",
            "tests/test_chained.py -k less_twice",
        ),
        (
            *("joint pass: chains not tagged", "recompute.py"),
            'link.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE',
            "pass",
            "tests/test_traps.py -k test_trap_28_only_the_raw",
        ),
        (
            *("head: the upstream scalar not applied", "gradients.py"),
            "if scale is None:\n                return x",
            "return x",
            "tests/test_head_programs.py -k 'test_trap_02 and token_chunks'",
        ),
        (
            *("whole logits: the scalar from above not applied", "whole_logits.py"),
            "dz = build(TIMES, dz, scale)",
            "pass",
            "tests/test_whole_logits.py -k 'test_numbers and masked'",
        ),
        (
            *("head: a piece does not wait for the one before it", "pieces.py"),
            "return build(LOGITS, hidden, columns, bias, after, *own",
            "return build(LOGITS, hidden, columns, bias, [], *own",
            "tests/test_head_golden.py",
        ),
        (
            *("head: slabs' labels shifted by the end of a slab", "pieces.py"),
            "return self.build(aten.sub.Tensor, wide, piece.start)",
            "return self.build(aten.sub.Tensor, wide, piece.end)",
            "tests/test_head.py -k 'test_loss and plain and vocab_slabs'",
        ),
        (
            *("head: chunks end one row early", "ranges.py"),
            "Range(start, min(start + step, size), i)",
            "Range(start, min(start + step - 1, size), i)",
            "tests/test_head.py -k 'test_loss and plain'",
        ),
        (
            *("head: the sum over chunks starts anew", "gradients.py"),
            "accumulate=self._out is not None",
            "accumulate=False",
            "tests/test_head.py -k 'test_loss and token_chunks and bias'",
        ),
        (
            *("head: the proof accepts a permutation of rows", "facts.py"),
            "return bool(((self.rows == own) | (self.rows == NO_ROW)).all())",
            "return True",
            "tests/test_rowlocal_facts.py",
        ),
        (
            *("head: the proof lets a row be combined with another", "row_rules.py"),
            "if bool(((merged != rows) & (merged != NO_ROW) & (rows != NO_ROW)).any()):",
            "if False:",
            "tests/test_rowlocal.py -k test_refused",
        ),
        (
            *("plan: the budget not kept to", "plan.py"),
            "next((p for p in plans if p.extra_bytes <= budget)",
            "next((p for p in plans if True)",
            "tests/test_plan.py",
        ),
    ],
)
REWRITING = in_folder(
    "inductor_ce/rewriting/",
    [
        (
            *("rewrite: NaN of an impossible label turned into 0", "statistics.py"),
            "self._known[key] = build(torch.where, known, 1.0, torch.nan)",
            "self._known[key] = build(torch.where, known, 1.0, 0.0)",
            "tests/test_traps.py -k test_trap_26",
        ),
        (
            *("rewrite: the mean over the wrong count", "layouts.py"),
            "return self.build(torch.div, self.total(rows), self.total(counted))",
            "return self.build(torch.mean, rows)",
            "tests/test_numerics.py -k test_arrangement",
        ),
        (
            *("rewrite: ignored rows count", "rewrite.py"),
            "kept = build(torch.where, valid, per_row, 0.0)",
            "kept = per_row",
            "tests/test_recognise.py -k test_cross_entropy_function",
        ),
        (
            *("edits: what is edited without a gradient is a function with one", "edits.py"),
            "and self._keeps_gradient(edit)",
            "and True",
            "tests/test_edits.py -k test_edits_that_others_may_see_stay",
        ),
        (
            *("edits: a view from before an edit keeps what it had", "edits.py"),
            "and self._is_seen_alone(edit)",
            "and True",
            "tests/test_edits.py -k test_edits_that_others_may_see_stay",
        ),
    ],
)
ENTRIES = in_folder(
    "inductor_ce/",
    [
        (
            *("entries: no gradient by the probability", "algebra/entries.py"),
            '_mul(("p", side), derivative(term, ("p", side)))',
            "0.0",
            "tests/test_entries.py -k test_each_function",
        ),
        (
            *("entries: the gradient not projected", "ops/entries.py"),
            "made.append(do.sub(dz, do.mul(p, do.over_classes(of_side[u]))))",
            "made.append(dz)",
            "tests/test_entries.py -k test_each_function",
        ),
        (
            *("entries: no gradient of a number of its row", "ops/divergences.py"),
            "of_rows = [*[None] * n, *numbers,",
            "of_rows = [*[None] * n, *[None] * len(numbers),",
            "tests/test_entries.py -k test_numbers_of_rows",
        ),
        (
            *("entries: bent where the rounding says on which side", "reading/own.py"),
            "if bends and not any(side.detached for side in sides):",
            "if bends:",
            "tests/test_entries.py -k test_what_is_left",
        ),
        (
            *("entries: read where gradients are off as where they are on", "reading/entries.py"),
            "return term if mode is True else self.held(term)",
            "return term",
            "tests/test_entries.py",
        ),
    ],
)
READING = in_folder(
    "inductor_ce/",
    [
        (
            *("reading: what learns beside detached logits is detached with them", "reading/context.py"),
            "if value.detached and self._wants_gradient(arg):",
            "if False and self._wants_gradient(arg):",
            "tests/test_gradient_flow.py",
        ),
        (
            *("reading: as many labels as rows, without a guard", "graph/shapes.py"),
            "return all(bool(x == y) and equal(x, y) for x, y in pairs)",
            "return True",
            "tests/test_tied_rows.py",
        ),
        (
            *("reading: all parts of a stack have the labels of the first", "rewriting/mixtures.py"),
            'build("select", index, dim, k) for k in',
            'build("select", index, dim, 0) for k in',
            "tests/test_picked_mixtures.py -k steps",
        ),
    ],
)
API = in_folder(
    "inductor_ce/api/",
    [
        (
            *("uninstall: a foreign pass dropped", "install.py"),
            "return tuple(p for p in passes_in(value) if not isinstance(p, OURS))",
            "return ()",
            "tests/test_traps.py -k test_trap_13",
        ),
        (
            *("cache key: of the top folder's files alone", "../common/sources.py"),
            "package.rglob(",
            "package.glob(",
            "tests/test_backend.py -k key",
        ),
        (
            *("cache key: of the files' sizes, not of their text", "../common/sources.py"),
            ".encode() + file.read_bytes())",
            ".encode())",
            "tests/test_backend.py -k key",
        ),
        (
            *("cache key: without the options", "passes.py"),
            "return type(self).__name__, sources(), self.options.key()",
            "return type(self).__name__, sources()",
            "tests/test_backend.py -k key",
        ),
    ],
)
BREAKS = [*TEMPLATES, *OPERATORS, *COMPAT, *HEADS, *READING, *REWRITING, *ENTRIES, *API]


def broken(text: str, each: Break) -> str:
    found = text.count(each.old)
    if found != 1:
        raise SystemExit(f"{each.name}: {found} times in {each.file}: {each.old!r}")
    return text.replace(each.old, each.new)


def run_tests(tree: Path, tests: str) -> tuple[int, list[str]]:
    """(how many tests ran, the names of those that failed)."""
    report = tree / "report.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    run = subprocess.run(
        [*command, *shlex.split(tests)],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode > 1:  # neither passed nor failed: what was to be run could not be
        raise SystemExit(f"{tests}: {run.stdout[-3000:]}{run.stderr[-1000:]}")
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [case for case in cases if {"failure", "error"} & {part.tag for part in case}]
    return len(cases), [case.attrib["name"].partition("[")[0] for case in failed]


def try_each(breaks: list[Break], tree: Path) -> int:
    """Print the row of each break. Returns how many were not seen."""
    unseen = 0
    for each in breaks:
        file = tree / each.file
        whole = file.read_text()
        file.write_text(broken(whole, each))
        ran, failed = run_tests(tree, each.tests)
        file.write_text(whole)
        unseen += not failed
        seen_by = ", ".join(f"`{name}`" for name in list(dict.fromkeys(failed))[:2]) or "**nobody**"
        print(f"| {each.name} | {len(failed)} of {ran} | {seen_by} |", flush=True)
    return unseen


def main(words: list[str]) -> int:
    breaks = [each for each in BREAKS if all(word in each.name for word in words)]
    for each in BREAKS:
        broken((ROOT / each.file).read_text(), each)
    print(f"{datetime.date.today()}, torch {importlib.metadata.version('torch')}, {len(breaks)} breaks\n")
    print("| what is broken | failures | seen by |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=NOT_COPIED)
        return try_each(breaks, tree)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
