"""The gallery: every spelling of patterns/ is fused and right; every near miss is right and told of.

EXPECTTEST_ACCEPT=1 writes EXPECTED, and the table of docs/spellings.md, for the files whose numbers and
graphs are right.
"""

import ast
from pathlib import Path

import gallery
import pytest
import torch
from gallery_graphs import check_graphs
from pairwise import EVERYTHING

import inductor_ce


def name(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", gallery.alone(gallery.PATTERNS), ids=name)
def test_pattern(path: Path):
    settle_fused(path, gallery.rewrite_and_check(gallery.load(path)).report)


def settle_fused(path: Path, report: inductor_ce.Report):
    assert report.sites, report
    assert not report.misses, report
    gallery.settle(path, gallery.rendered(report))


# What else of the size of the logits a program has for itself.
ITS_OWN = {
    "circle_loss_pairs": "the gradient of normalised proxies",
    "gumbel_codes": "a softmax with noise, of which codes are chosen",
    "class_balanced_bce": "the weights of the classes, once for each row, times what the labels are",
    "pygcn_train_rows": "the chosen rows of the adjacency matrix",
}


@pytest.mark.parametrize("path", gallery.whole(gallery.PATTERNS), ids=name)
def test_pattern_through_all_passes(path: Path):
    module = gallery.load(path)
    graphs, _ = gallery.compile_and_check(module)
    check_graphs(graphs, kept=path.stem in ITS_OWN or any(site.kept for site in graphs.report.sites))
    settle_fused(path, gallery.told(graphs, module))


@pytest.mark.parametrize("path", gallery.PATTERNS[:: 15 if EVERYTHING else 40], ids=name)
def test_pattern_within_a_default_device(path: Path):
    module = gallery.load(path)
    with torch.device("cpu"):
        report = gallery.rewrite_and_check(module).report
    assert gallery.rendered(report) == gallery.about(path).expected


@pytest.mark.gpu
@pytest.mark.parametrize("path", gallery.PATTERNS, ids=name)
def test_pattern_on_a_gpu(path: Path):
    with torch.device("cuda"):
        gallery.generate_code_and_check(gallery.load(path))


@pytest.mark.parametrize("path", gallery.NEAR_MISSES, ids=name)
def test_near_miss(path: Path):
    ours = gallery.rewrite_and_check(gallery.load(path))
    assert ours.changed == bool(ours.report.sites)
    gallery.settle(path, gallery.rendered(ours.report))


@pytest.mark.parametrize("path", gallery.whole(gallery.NEAR_MISSES), ids=name)
def test_near_miss_through_all_passes(path: Path):
    module = gallery.load(path)
    graphs, ours = gallery.compile_and_check(module)
    report = gallery.told(graphs, module)
    if not report.sites:
        gallery.check_as_without_us(module, ours)
    assert gallery.rendered(report) == gallery.about(path).expected


EVERY_FILE = pytest.mark.parametrize("path", gallery.PATTERNS + gallery.NEAR_MISSES, ids=name)


@EVERY_FILE
def test_a_file_says_what_it_is_and_needs_torch_only(path: Path):
    gallery.about(path)
    tree = ast.parse(path.read_text())
    imported = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    imported |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert {module.split(".")[0] for module in imported} <= {"math", "torch"}


def test_the_spellings_are_listed():
    if gallery.accepting():
        gallery.write_table()
    assert gallery.table_in(gallery.SPELLINGS.read_text()) == gallery.table(), f"stale: {gallery.HINT}"


SOURCE = '"""Doc."""\n\nEXPECTED = """\\\nold\n"""\nAFTER = "é"\n'


def test_accepting_replaces_the_literal_in_its_place():
    accepted = gallery.with_expected(SOURCE, 'a "b" \\ é\n')
    assert accepted == '"""Doc."""\n\nEXPECTED = """\\\na "b" \\\\ é\n"""\nAFTER = "é"\n'
    assert gallery.with_expected(accepted, "old\n") == SOURCE


def test_accepting_adds_what_a_new_file_lacks():
    accepted = gallery.with_expected('"""Doc."""\n', "new\n")
    assert accepted == '"""Doc."""\n\n\nEXPECTED = """\\\nnew\n"""\n'


def test_a_file_without_expected_is_told_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("EXPECTTEST_ACCEPT", raising=False)
    path = tmp_path / "new.py"
    path.write_text('"""Project: idea.\n\nSource: a/b, c.py\nFamily: Heads\n"""\n')
    with pytest.raises(AssertionError, match="has no EXPECTED: `make accept`"):
        gallery.settle(path, "lse\n")
