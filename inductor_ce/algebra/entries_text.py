"""Sums of entries in words: short, and with what people call by a name of its own."""

from __future__ import annotations

import math
from typing import Any

from .entries import LEAVES, Entries, Term, parts

LONGEST = 80
SHORT = 12  # what is no longer than a name would be
MOST_LEAVES = 4
NAMES = "fgh"  # of what is too long to be written out

_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "pow": "^", "and": "and", "or": "or"}
_INFIX |= {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "eq": "==", "ne": "!="}
_BINDING = {"pow": 5, "neg": 4, "mul": 4, "div": 4, "add": 3, "sub": 3, "and": 1, "or": 0}
_CLOSED = 9


def render(entries: Entries) -> str:
    """As text, for example `sum -p*log(p + 1e-08)`; where that is long, `sum p*f(p, q)`."""
    for depth in range(40, 1, -1):
        words = _Words(depth)
        text = f"sum {words.text(entries.term)[0]}"
        if len(text) <= LONGEST and len(words.named) <= len(NAMES):
            return text
    return f"sum {NAMES[0]}{_arguments(entries.term)}"


def _arguments(term: Term) -> str:
    """f(p, t): what a term is made of."""
    leaves = sorted({_leaf(*part) for part in parts(term) if part[0] in LEAVES})
    return f"({', '.join(leaves if len(leaves) <= MOST_LEAVES else [*leaves[: MOST_LEAVES - 1], '...'])})"


def _leaf(name: str, k: int) -> str:
    if name in ("p", "log p"):
        return name.replace("p", "pqrstuvw"[k])
    return f"{name}{k + 1 if k else ''}"


def _known(term: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """(the name of a function that torch has by itself, of what it is)"""
    match term:
        case ("where", ("le", x, 0.0), 0.0, y) if x == y:
            return "relu", x
        case ("where", ("gt", x, 20.0), y, ("logaddexp", z, 0.0)) if x == y == z:
            return "softplus", x
        case ("neg", ("logaddexp", ("neg", x), 0.0)):
            return "logsigmoid", x
        case ("add", ("sub", _, ("mul", t, _)), ("mul", ("div", _, ("maximum", _, 1e-12)), ("sub", x, _))):
            return "binary_cross_entropy", x, t
    return None


class _Words:
    """Terms as text, those at a depth, if it is not -1, by a name.

    Attributes:
        named: those terms.
    """

    def __init__(self, depth: int):
        self.depth = depth
        self.named: list[Term] = []

    def text(self, term: Term, depth: int = 0) -> tuple[str, int]:
        """(a term as text, how tightly it holds together)"""
        if isinstance(term, float):
            return f"{term:.4g}", _CLOSED if term >= 0 or math.isnan(term) else 3
        name, *args = term
        if name in LEAVES:
            return _leaf(name, args[0]), 4 if name == "log p" else _CLOSED
        if name == "number":
            return self.text(args[0], depth)
        if depth == self.depth:
            whole = _Words(depth=-1).text(term)
            return whole if len(whole[0]) <= SHORT else (self._name(term), _CLOSED)
        known = _known(term)
        if known is not None:
            return f"{known[0]}({', '.join(self.text(arg, depth + 1)[0] for arg in known[1:])})", _CLOSED
        if name == "neg":
            return f"-{self._within(args[0], 4, depth + 1)}", 4
        if name == "clamp":
            low_high = zip(("min", "max"), args[1:3], strict=True)
            ends = [f"{end}={x:g}" for end, x in low_high if math.isfinite(x)]
            return f"clamp({', '.join([self.text(args[0], depth + 1)[0], *ends])})", _CLOSED
        if name == "mul" and isinstance(args[1], float):
            args = args[::-1]  # as within a default device the same program has them
        if name in _INFIX:
            own = _BINDING.get(name, 2)
            space = "" if name in ("mul", "div", "pow") else " "
            left = self._within(args[0], own, depth + 1)
            right = self._within(args[1], own + (name not in ("add", "mul")), depth + 1)
            return f"{left}{space}{_INFIX[name]}{space}{right}", own
        return f"{name}({', '.join(self.text(arg, depth + 1)[0] for arg in args)})", _CLOSED

    def _within(self, term: Term, binding: int, depth: int) -> str:
        text, own = self.text(term, depth)
        return text if own >= binding else f"({text})"

    def _name(self, term: Term) -> str:
        if term not in self.named:
            self.named.append(term)
        return f"{NAMES[self.named.index(term) % len(NAMES)]}{_arguments(term)}"
