"""The import law: one way down, private torch in one file, no file too long to read."""

import ast
import re
import runpy
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "inductor_ce"
FILES = sorted(PACKAGE.rglob("*.py"))

# An import goes to a room on a line above, or stays within the room.
ROOMS = ["common", "algebra", "graph", "ops", "distributed", "reading", "rewriting", "heads", "api", "bench"]

TREES = {file: ast.parse(file.read_text()) for file in FILES}  # a test looks at all: they take no time


def imports(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    return (node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)))


def modules(node: ast.Import | ast.ImportFrom) -> list[str]:
    """The dotted names that an import may mean; those of the package itself begin with a dot."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = "." * node.level + (node.module or "")
    return [f"{base.rstrip('.') + '.' if base else ''}{alias.name}" for alias in node.names] + [base]


def dotted(file: Path) -> tuple[str, ...]:
    """("heads", "plan") for heads/plan.py, ("heads",) for the room itself."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


MODULES = {dotted(file) for file in FILES}


def imported(file: Path) -> set[tuple[str, ...]]:
    """The modules of the package that `file` imports, a room for what its `__init__` gives."""
    found = set()
    folder = file.relative_to(PACKAGE).parts[:-1]
    for node in imports(TREES[file]):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (*folder[: len(folder) - node.level + 1], *(node.module or "").split("."))
            base = tuple(part for part in base if part)
            names = [(*base, alias.name) for alias in node.names]
            found |= {name if name in MODULES else base for name in names}
        else:
            found |= {tuple(m.split(".")[1:]) for m in modules(node) if m.startswith("inductor_ce.")}
    return {module for module in found if module in MODULES}


def test_every_file_is_in_a_room():
    assert {file.relative_to(PACKAGE).parts[0] for file in FILES} == {*ROOMS, "__init__.py"}


def offending(found: Callable[[Path], object], files: Iterable[Path] = FILES) -> dict[str, object]:
    """What is found in files where nothing is to be found, by their names."""
    return {str(file.relative_to(PACKAGE)): what for file in files if (what := found(file))}


def upward(file: Path) -> set[str]:
    """The rooms further down that a file imports from."""
    room, *_ = (*dotted(file), "")
    if not room:
        return set()  # the package itself, which names what users may
    own = ROOMS.index(room)
    rooms = {m[0] if m else "api" for m in imported(file)}  # the package itself is what `api` offers
    return {other for other in rooms if ROOMS.index(other) > own}


def test_imports_go_to_rooms_above():
    assert offending(upward) == {}


def test_a_benchmark_imports_what_is_called_and_what_is_lowered():
    """So that it measures what users have."""
    files = (file for file in FILES if dotted(file)[:1] == ("bench",))
    rooms = {m[0] if m else "api" for file in files for m in imported(file)}
    assert rooms - {"bench"} <= {"api", "ops"}


def test_no_imports_in_a_circle():
    waiting = {dotted(file): imported(file) - {dotted(file)} for file in FILES}
    while free := {module for module, needs in waiting.items() if not needs & waiting.keys()}:
        for module in free:
            del waiting[module]
    assert waiting == {}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_what_comes_in_and_what_goes_out(room: str):
    told = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text()))
    assert "\nIn: " in told
    assert "\nOut: " in told
    named = {file.stem for file in (PACKAGE / room).glob("*.py")} - {"__init__", "__main__"}
    assert {name for name in named if not re.search(rf"\b{name}\b", told)} == set()


def imports_in_functions(file: Path) -> list[str]:
    functions = [n for n in ast.walk(TREES[file]) if isinstance(n, ast.FunctionDef)]
    return [ast.unparse(node) for f in functions for node in imports(f)]


def test_no_import_inside_a_function():
    assert offending(imports_in_functions) == {}


NOT_IN_COMPAT = [file for file in FILES if file.parent.name != "compat"]


def private_modules(file: Path) -> set[str]:
    named = {m for node in imports(TREES[file]) for m in modules(node)}
    return {m for m in named if m.startswith("torch.") and any(p.startswith("_") for p in m.split("."))}


def test_private_torch_is_in_compat():
    assert offending(private_modules, NOT_IN_COMPAT) == {}


def private_attributes(file: Path) -> set[str]:
    chains = (ast.unparse(n) for n in ast.walk(TREES[file]) if isinstance(n, ast.Attribute))
    return {c for c in chains if c.startswith("torch._") and not c.startswith(("torch._check", "torch.__"))}


def test_private_torch_is_not_reached_by_attributes():
    """As torch._C or torch._ops. torch._check is public in all but its name."""
    assert offending(private_attributes, NOT_IN_COMPAT) == {}


def test_a_file_is_short():
    lengths = {file: len(file.read_text().splitlines()) for file in FILES}
    assert offending(lambda file: lengths[file] * (lengths[file] > 400)) == {}


def swallowed(file: Path) -> list[str]:
    """Handlers of everything, and those that do nothing."""
    handlers = [n for n in ast.walk(TREES[file]) if isinstance(n, ast.ExceptHandler)]
    passes = (h for h in handlers if all(isinstance(s, ast.Pass) for s in h.body))
    return [ast.unparse(h) for h in (*(h for h in handlers if h.type is None), *passes)]


def test_no_exception_is_swallowed():
    assert offending(swallowed) == {}


PURE = {"__future__", "collections", "dataclasses", "functools", "itertools", "math", "sympy", "typing"}


def impure(file: Path) -> set[str]:
    named = {m for node in imports(TREES[file]) for m in modules(node) if m[0] != "."}
    return {m.split(".")[0] for m in named} - PURE


def test_what_is_pure_imports_no_torch():
    assert offending(impure, [*(PACKAGE / "algebra").glob("*.py"), PACKAGE / "heads/plan.py"]) == {}


def test_a_file_opens_with_what_it_is():
    assert offending(lambda file: not ast.get_docstring(TREES[file])) == {}


def test_what_is_broken_on_purpose_is_there():
    """Each text that `tools/break_on_purpose.py` replaces, once in its file."""
    tool = runpy.run_path(str(PACKAGE.parent / "tools/break_on_purpose.py"))
    for each in tool["BREAKS"]:
        assert (PACKAGE.parent / each.file).read_text().count(each.old) == 1, each.name
