"""The import law: one way down, private torch in one file, no file too long to read."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "inductor_ce"
FILES = sorted(PACKAGE.rglob("*.py"))

# Each may import what stands on a line above its own.
LAYERS = [
    {"errors", "algebra", "monoid", "plan", "shield", "verify", "kernels"},
    {"config", "compat", "ops", "notation"},
    {"slots", "timeline", "spellings", "sites", "shards", "products"},
    {"rows", "placements", "loss_rows", "nodes"},
    {"views", "report", "arguments"},
    {"reading"},
    {"place", "unread"},
    {"movement"},
    {"columns", "stacks", "operands"},
    {"arithmetic"},
    {"losses"},
    {"builder", "heads", "sizes"},
    {"recognise", "hoist", "recompute", "loops", "pieces", "rowlocal"},
    {"groups", "narrow"},
    {"exits"},
    {"legal", "chunks"},
    {"arrange", "lowering", "slabs"},
    {"layouts", "joint"},
    {"statistics"},
    {"rewrite", "drop"},
    {"passes"},
    {"backend"},
    {"explanation", "functional"},
    {"__init__"},
    {"bench"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

everywhere = pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))


def imports(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    return (node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)))


def modules(node: ast.Import | ast.ImportFrom) -> list[str]:
    """The dotted names that an import may mean; those of the package itself begin with a dot."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = "." * node.level + (node.module or "")
    return [f"{base.rstrip('.') + '.' if base else ''}{alias.name}" for alias in node.names] + [base]


def siblings(file: Path) -> set[str]:
    """The modules of the package that `file` imports."""
    found = set()
    for node in imports(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            if node.level < len(file.relative_to(PACKAGE).parts):
                continue  # within the folder
            names = {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
            found |= {name if name in LEVEL else "__init__" for name in names}
        else:
            found |= {m.split(".")[1] for m in modules(node) if m.startswith("inductor_ce.")}
    return found


def layer_of(file: Path) -> str:
    """A folder is one layer."""
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def test_every_file_has_its_layer():
    assert {layer_of(file) for file in FILES} - set(LEVEL) == set()


@everywhere
def test_imports_go_down(file: Path):
    layer = layer_of(file)
    upward = {name for name in siblings(file) if LEVEL[name] >= LEVEL[layer] and name != layer}
    assert upward == set()


@everywhere
def test_no_import_inside_a_function(file: Path):
    functions = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.FunctionDef)]
    assert [ast.unparse(node) for f in functions for node in imports(f)] == []


@everywhere
def test_private_torch_is_in_compat(file: Path):
    if file.name == "compat.py":
        return
    named = {m for node in imports(ast.parse(file.read_text())) for m in modules(node)}
    private = {m for m in named if m.startswith("torch.") and any(p.startswith("_") for p in m.split("."))}
    assert private == set()


@everywhere
def test_private_torch_is_not_reached_by_attributes(file: Path):
    """As torch._C or torch._ops. torch._check is public in all but its name."""
    if file.name == "compat.py":
        return
    chains = (ast.unparse(n) for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Attribute))
    private = {
        c for c in chains if c.startswith("torch._") and not c.startswith(("torch._check", "torch.__"))
    }
    assert private == set()


@everywhere
def test_a_file_is_short(file: Path):
    assert len(file.read_text().splitlines()) <= 400


@everywhere
def test_no_exception_is_swallowed(file: Path):
    handlers = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.ExceptHandler)]
    assert [ast.unparse(h) for h in handlers if h.type is None] == []
    assert [ast.unparse(h) for h in handlers if all(isinstance(s, ast.Pass) for s in h.body)] == []


PURE = {"__future__", "collections", "dataclasses", "functools", "itertools", "math", "sympy", "typing"}


@pytest.mark.parametrize("name", ["algebra", "monoid", "plan"])
def test_the_algebra_is_pure(name: str):
    named = {m for node in imports(ast.parse((PACKAGE / f"{name}.py").read_text())) for m in modules(node)}
    assert {m.split(".")[0] for m in named} <= PURE


@everywhere
def test_a_file_opens_with_what_it_is(file: Path):
    assert ast.get_docstring(ast.parse(file.read_text()))
