"""Print every name of torch that `common/compat/` imports, with its signature, as this environment has it.

Compare what two releases print to see which moved:

    diff <(.venv/bin/python tools/private_names.py) <(.venv-2.15.0/bin/python tools/private_names.py)
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

COMPAT = Path(__file__).parents[1] / "inductor_ce/common/compat"


def imported() -> Iterator[tuple[str, str]]:
    """(module, name) of each, "" for the module itself."""
    for file in sorted(COMPAT.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                yield from ((alias.name, "") for alias in node.names if alias.name.startswith("torch."))
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
                yield from ((node.module, alias.name) for alias in node.names)


def described(module: str, name: str) -> str:
    try:
        value = importlib.import_module(module)
        if name and not hasattr(value, name):
            value = importlib.import_module(f"{module}.{name}")
        elif name:
            value = getattr(value, name)
    except ImportError:
        return "not there"
    if not callable(value):
        return "there"
    try:
        return ", ".join(map(_parameter, inspect.signature(value).parameters.values()))
    except (TypeError, ValueError):
        return "callable"


def _parameter(parameter: inspect.Parameter) -> str:
    """Without its default, which may be a table of all operators, and its annotation."""
    optional = " = ..." if parameter.default is not parameter.empty else ""
    return str(parameter.replace(default=parameter.empty, annotation=parameter.empty)) + optional


if __name__ == "__main__":
    for module, name in sorted(set(imported())):
        print(f"{module} {name} {described(module, name)}".replace("  ", " "))
