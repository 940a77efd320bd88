"""The gallery: the files of patterns/ loaded, run, rendered, and their EXPECTED accepted.

A file of patterns/ holds a loss as some project spells it. Its numbers are those of its own eager run in
float64; what our rewrite made of it is rendered from `explain` and compared with its literal EXPECTED.
"""

from __future__ import annotations

import ast
import contextlib
import fcntl
import importlib.util
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from harness import Graphs, Rewritten, misses, sites
from pairwise import EVERYTHING
from reference import assert_fair
from releases import before
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

import inductor_ce
from inductor_ce.rewriting.divergences import CONSTANT

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "patterns"
SPELLINGS = ROOT / "docs/spellings.md"
PATTERNS = sorted(FOLDER.glob("*.py"))
NEAR_MISSES = sorted((FOLDER / "near_misses").glob("*.py"))

BEGIN, END = "<!-- spellings: begin -->\n", "<!-- spellings: end -->\n"
HINT = "`make accept` writes it, once the numbers are right; read the diff"
NOTHING = "nothing to fuse\n"
FOLD = "\n    "
ONE_IN = 1 if EVERYTHING else 11  # of each family, and of the near misses, goes through all passes

# The headings of the table, in its order; any others follow.
FAMILIES = (
    "Cross entropy",
    "Log-probabilities",
    "By hand",
    "Label smoothing",
    "Z-loss",
    "Masks and weights",
    "Causal shift",
    "Soft-cap, scale, bias",
    "Heads",
    "Class weights",
    "Soft targets",
    "KL divergence",
    "Preferences",
    "Policy gradients",
    "Entropy and accuracy",
    "Contrastive",
    "Normalisers",
    "Images",
    "Focal and poly",
    "Several losses",
    "Autocast, checkpoints, chunks",
)


# What a file says of itself


@dataclass(frozen=True)
class About:
    """The docstring of a file, and its EXPECTED, None where it has none yet."""

    path: Path
    project: str
    idea: str
    source: str
    family: str
    expected: str | None

    @property
    def forms(self) -> list[str]:
        """The normal forms in EXPECTED."""
        lines = (self.expected or "").replace(FOLD, " ").splitlines()
        return [line for line in lines if not line.startswith(("row_stats: ", "sharded: ", "kept: "))]


_DOCSTRING = re.compile(
    r"(?P<project>[^:\n]+): (?P<idea>[^\n]+)\.\n\nSource: (?P<source>[^\n]+)\nFamily: (?P<family>[^\n]+)"
)


def about(path: Path) -> About:
    """Read without importing. Raises AssertionError for a docstring of another form."""
    tree = ast.parse(path.read_text())
    doc = _DOCSTRING.match(ast.get_docstring(tree) or "")
    assert doc, f'{path.name}: the docstring is "project: idea.", an empty line, "Source: " and "Family: "'
    literal = _literal(tree)
    expected = None if literal is None else ast.literal_eval(literal)
    return About(path, **{k: v.strip() for k, v in doc.groupdict().items()}, expected=expected)


def _literal(tree: ast.Module) -> ast.expr | None:
    """The expression assigned to EXPECTED."""
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "EXPECTED":
            return statement.value
    return None


def whole(paths: Sequence[Path]) -> list[Path]:
    """Those to go through all passes: of each family the first, and then one in `ONE_IN`."""
    families: dict[str, list[Path]] = {}
    for path in paths:
        families.setdefault(about(path).family, []).append(path)
    return [path for members in families.values() for path in members[::ONE_IN]]


def alone(paths: Sequence[Path]) -> list[Path]:
    """The others, of which the rewritten graph is asked; with ALL=1 it is asked of all."""
    left_out = set() if EVERYTHING else set(whole(paths))
    return [path for path in paths if path not in left_out]


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # Dynamo looks it up by name
    spec.loader.exec_module(module)
    return module


def inputs(module: ModuleType, seed: int) -> tuple[Any, ...]:
    torch.manual_seed(seed)
    return module.inputs()


# Running


class InDouble(TorchFunctionMode):
    """Every cast to a floating dtype is one to float64."""

    CASTS = frozenset({"float", "half", "bfloat16"})

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in self.CASTS and len(args) == 1:
            return args[0].double()
        args, kwargs = tree_map(_widened, (args, kwargs or {}))
        return func(*args, **kwargs)


def _widened(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value


@contextlib.contextmanager
def in_double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with InDouble():
            yield
    finally:
        torch.set_default_dtype(before)


@dataclass(frozen=True)
class Run:
    """The tensors that a loss returned, and its gradients."""

    results: list[Tensor]
    gradients: list[Tensor]


def run(loss: Callable[..., Any], args: tuple[Any, ...], upstream: list[Tensor] | None = None) -> Run:
    """One step on copies of `args`, under random upstream gradients unless they are given."""
    args = tuple(_copied(a) for a in args)
    torch.manual_seed(2)
    results = [r for r in tree_leaves(loss(*args)) if isinstance(r, Tensor)]
    wanted = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    assert wanted, "no input requires a gradient"
    tangents = upstreams(results) if upstream is None else upstream
    pairs = [(r, t.to(r.dtype)) for r, t in zip(results, tangents, strict=True) if r.requires_grad]
    assert pairs, "no result requires a gradient"
    _backward(*zip(*pairs, strict=True), tuple(wanted))
    gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in wanted]
    return Run([r.detach() for r in results], gradients)


def _backward(outputs: tuple[Tensor, ...], tangents: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    """As autograd.backward, but not handled by a TorchFunctionMode, so it is in force in checkpoints too."""
    run_engine = torch.autograd.graph._engine_run_backward
    run_engine(outputs, tangents, False, False, wanted, allow_unreachable=True, accumulate_grad=True)


def upstreams(results: list[Tensor]) -> list[Tensor]:
    """Of size 0.25 to 1.25 and either sign, in the dtype of each result."""
    generator = torch.Generator("cpu").manual_seed(7)
    found = []
    for r in results:
        size, sign = (
            torch.rand(r.shape, generator=generator, dtype=torch.float64, device="cpu").to(r.device)
            for _ in range(2)
        )
        found.append((size + 0.25) * torch.where(sign < 0.5, -1.0, 1.0))
    return [u.to(r.dtype) if r.is_floating_point() else u for u, r in zip(found, results, strict=True)]


def _copied(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    copy = value.detach().clone().requires_grad_(value.requires_grad)
    copy.__dict__.update(value.__dict__)  # what mark_dynamic left
    return copy


def _doubled(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def check_numbers(ours: Run, loss: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """`ours` is as near to the same loss in float64 as eager in the same dtype is."""
    judge(ours, *by_eager(loss, args))


def check_draws(f: Callable[..., Any], loss: Callable[..., Any], draws: Iterable[tuple[Any, ...]]) -> None:
    """The same of f for several inputs of one size, all rows together: errors of few are chance."""
    runs = [(run(f, args), *by_eager(loss, args)) for args in draws]
    judge(*map(_together, zip(*runs, strict=True)))


def by_eager(loss: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Run, Run]:
    """In the dtype of the inputs, and in float64."""
    naive = run(loss, args)
    with in_double():
        return naive, run(loss, tuple(map(_doubled, args)), upstreams(naive.results))


def _together(runs: Sequence[Run]) -> Run:
    results, gradients = ([run.results for run in runs], [run.gradients for run in runs])
    return Run(
        *([torch.stack(each).flatten() for each in zip(*part, strict=True)] for part in (results, gradients))
    )


def judge(ours: Run, naive: Run, exact: Run) -> None:
    for mine, eager, true in zip(ours.results, naive.results, exact.results, strict=True):
        if eager.is_floating_point():
            assert_fair(mine, eager, true)
        else:
            torch.testing.assert_close(mine, eager, rtol=0, atol=0)
    for mine, eager, true in zip(ours.gradients, naive.gradients, exact.gradients, strict=True):
        assert_fair(mine, eager, true)


def compile_and_check(module: ModuleType) -> tuple[Graphs, Run]:
    """`module.loss` through all passes of Inductor, and right for two sets of inputs without recompiling.

    Returns what the first came to.
    """
    inductor_ce.install(**{"min_vocab": 2, **getattr(module, "OPTIONS", {})})
    graphs = Graphs()
    return graphs, check_twice(module, graphs)


def rewrite_and_check(module: ModuleType) -> Rewritten:
    """The same of the rewritten torch-level graph."""
    rewritten = Rewritten(**getattr(module, "OPTIONS", {}))
    check_twice(module, rewritten)
    return rewritten


def check_twice(module: ModuleType, backend: Callable[..., Any]) -> Run:
    compiled = torch.compile(module.loss, backend=backend, fullgraph=True)
    runs = []
    for seed, error_on_recompile in ((0, False), (1, True)):
        args = inputs(module, seed)
        with _strictly(error_on_recompile):
            runs.append(run(compiled, args))
        check_numbers(runs[-1], module.loss, args)
    return runs[0]


def generate_code_and_check(module: ModuleType) -> None:
    """`module.loss` by generated code, on the default device."""
    args = inputs(module, 0)
    options = {"min_vocab": 2, "fallback_random": True, **getattr(module, "OPTIONS", {})}
    backend = inductor_ce.inductor_ce_backend  # by itself, so that the package need not be installed
    compiled = torch.compile(module.loss, backend=backend, options=options, fullgraph=True)
    check_numbers(run(compiled, args), module.loss, args)
    assert sites() >= 1


@contextlib.contextmanager
def _strictly(error_on_recompile: bool) -> Iterator[None]:
    """Random numbers are eager's; whether compiling once more is an error."""
    with (
        torch._dynamo.config.patch(error_on_recompile=error_on_recompile),
        torch._inductor.config.patch(fallback_random=True),
    ):
        yield


def check_as_without_us(module: ModuleType, ours: Run) -> None:
    """What `compile_and_check` came to is to the bit what it is without us. Leaves nothing installed."""
    args = inputs(module, 0)
    inductor_ce.uninstall()
    torch._dynamo.reset()
    with _strictly(False):
        plain = run(torch.compile(module.loss, backend=Graphs(), fullgraph=True), args)
    pairs = zip(ours.results + ours.gradients, plain.results + plain.gradients, strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


# Rendering


def told(graphs: Graphs, module: ModuleType) -> inductor_ce.Report:
    """What the compilation said of itself, as its counters did; with ALL=1, what explain says."""
    counted = (sites(), misses())
    report = graphs.report
    if EVERYTHING:
        # As the compilation did: without breaks, and with no logits that are lazy.
        options = {"min_vocab": 2, "returned_logits": "eager", **getattr(module, "OPTIONS", {})}
        without_breaks = torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
        with without_breaks, inductor_ce.install(**options):
            report = inductor_ce.explain(module.loss, *map(_copied, inputs(module, 0)))
    assert counted == (len(report.sites), len(report.misses)), f"counted {counted}, told\n{report}"
    return report


def rendered(report: inductor_ce.Report) -> str:
    """The text of EXPECTED: of each site its forms and operators, then what was left and why."""
    lines = []
    for site in report.sites:
        lines += site.form.split("; ")
        lines += [f"kept: {_without_locations(site.kept)}"] if site.kept else []
        sums_entries = any(re.search(r"\bsum ", form) for form in site.form.split("; "))
        exchange = "left as written" if sums_entries else f"all_gather [{_width(site.which)}, N]"
        exchange = "as a loss of one side" if CONSTANT in site.form else exchange
        lines += [f"row_stats: {site.which}", f"sharded: {exchange}"]
    left = [*report.misses, *report.small]
    told = [f"{miss.reason.name}: {_without_locations(miss.message)}" for miss in left]
    # In torch 2.11 the body of an autograd.Function returns all its steps, so parts of a loss are losses too.
    lines += dict.fromkeys(told) if before(2, 12) else told
    return "".join(f"{_folded(line)}\n" for line in lines) or NOTHING


def _width(which: str) -> int:
    """How many numbers ranks have of a row: one of each of its statistics, but K of `picks*K`."""
    return sum(int(row.partition("*")[2] or 1) for row in which.split(","))


def _folded(line: str) -> str:
    return FOLD.join(textwrap.wrap(line, 100, break_long_words=False, break_on_hyphens=False))


def _without_locations(message: str) -> str:
    return re.sub(r" at [\w.<>]+:\d+", "", message)


# Accepting


def accepting() -> bool:
    return bool(os.environ.get("EXPECTTEST_ACCEPT"))


def settle(path: Path, actual: str) -> None:
    """Compare EXPECTED with `actual`, or, where new outputs are accepted, write it. Call this last."""
    expected = about(path).expected
    if expected == actual:
        return
    if accepting():
        with _alone():
            path.write_text(with_expected(path.read_text(), actual))
            write_table()
        return
    assert expected is not None, f"{path.name} has no EXPECTED: {HINT}. It would be\n{actual}"
    assert expected == actual, f"{path.name}: EXPECTED is another; {HINT}.\n{actual}"


def with_expected(source: str, text: str) -> str:
    """The source of a file with the literal EXPECTED replaced, or added at its end."""
    body = text.replace("\\", "\\\\").replace('"""', '\\"\\"\\"')
    literal = f'"""\\\n{body}"""'
    node = _literal(ast.parse(source))
    if node is None:
        return f"{source.rstrip()}\n\n\nEXPECTED = {literal}\n"
    lines = source.encode().splitlines(keepends=True)  # the offsets of ast count bytes
    before = b"".join(lines[: node.lineno - 1]) + lines[node.lineno - 1][: node.col_offset]
    after = lines[node.end_lineno - 1][node.end_col_offset :] + b"".join(lines[node.end_lineno :])
    return (before + literal.encode() + after).decode()


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One process at a time: the table has the rows of all files."""
    with SPELLINGS.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# The table of docs/spellings.md


def table() -> str:
    """Markdown: for each family its projects, ideas and normal forms."""
    rows = [about(path) for path in sorted(FOLDER.glob("*.py"))]
    parts = []
    for family in dict.fromkeys([*FAMILIES, *sorted({r.family for r in rows})]):
        members = [r for r in rows if r.family == family]
        if members:
            parts.append(f"<details><summary>{family} ({len(members)})</summary>\n\n")
            parts.append("| project | spelling | normal form |\n|---|---|---|\n")
            parts += map(_row, members)
            parts.append("\n</details>\n")
    return "".join(parts)


def _row(entry: About) -> str:
    forms = "<br>".join(f"`{form}`" for form in entry.forms).replace("|", "\\|")
    return f"| [{entry.project}](../patterns/{entry.path.name}) | {entry.idea} | {forms} |\n"


def table_in(document: str) -> str:
    """What stands between the markers. Raises AssertionError where they are not there once each."""
    markers = f"{SPELLINGS.name} needs {BEGIN.strip()} and {END.strip()}"
    assert document.count(BEGIN) == document.count(END) == 1, markers
    return document.split(BEGIN)[1].split(END)[0]


def write_table() -> None:
    document = SPELLINGS.read_text()
    SPELLINGS.write_text(document.replace(BEGIN + table_in(document) + END, BEGIN + table() + END))
