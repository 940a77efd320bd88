"""What is computed for a row between its statistics and their coefficients, as a value.

    given       numbers of the row, [N], or of all rows, []
    a program   the K statistics, the given numbers, and steps, each a function of what comes before it;
                which of all these the K coefficients are

The same program runs on tensors, in Inductor's loops, and as lines of a template, where it is all that lies
between the two sweeps over a row: see `templates/row_stats_grad.py.jinja`.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

aten, prims = torch.ops.aten, torch.ops.prims

Number = int | float | bool
Argument = Number | list[int]  # a list of one is a value, by its place


class Function(NamedTuple):
    """A function of a step, as ATen and Triton have it.

    Attributes:
        op: of tensors.
        triton: with the arguments in their places.
        of_number: with a number in the second place, if ATen has that.
        others: overloads by which graphs call it too.
    """

    op: Any
    triton: str
    of_number: Any = None
    others: tuple[Any, ...] = ()

    @property
    def arity(self) -> int:
        return sum(f"{{{i}}}" in self.triton for i in range(3))


def _of_two(name: str, sign: str) -> Function:
    packet = getattr(aten, name)
    return Function(packet.Tensor, f"{{0}} {sign} {{1}}", packet.Scalar)


def _bounded(name: str, clamp: Any) -> Function:
    triton = f"tl.{name}({{0}}, {{1}}, propagate_nan=tl.PropagateNan.ALL)"
    return Function(getattr(aten, name).default, triton, clamp.default, (clamp.Tensor,))


_SIGNS = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
_SIGNS |= {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}

FUNCTIONS = {name: _of_two(name, sign) for name, sign in _SIGNS.items()} | {
    "neg": Function(aten.neg.default, "-{0}"),
    "reciprocal": Function(aten.reciprocal.default, "1.0 / {0}"),
    "exp": Function(aten.exp.default, "tl.exp({0})"),
    "log": Function(aten.log.default, "tl.log({0})"),
    "abs": Function(aten.abs.default, "tl.abs({0})"),
    "sqrt": Function(aten.sqrt.default, "tl.sqrt({0})"),
    "sigmoid": Function(aten.sigmoid.default, "tl.sigmoid({0})"),
    "tanh": Function(aten.tanh.default, "libdevice.tanh({0})"),
    "maximum": _bounded("maximum", aten.clamp_min),
    "minimum": _bounded("minimum", aten.clamp_max),
    "where": Function(aten.where.self, "tl.where({0}, {1}, {2})"),
    "isnan": Function(aten.isnan.default, "{0} != {0}"),
    "and": Function(aten.logical_and.default, "({0} != 0) & ({1} != 0)", others=(aten.bitwise_and.Tensor,)),
    "or": Function(aten.logical_or.default, "({0} != 0) | ({1} != 0)", others=(aten.bitwise_or.Tensor,)),
    "not": Function(aten.logical_not.default, "{0} == 0", others=(aten.bitwise_not.default,)),
    "float": Function(prims.convert_element_type.default, "{0}.to(tl.float32)"),
}
OF_TRUTHS = {"eq", "ne", "lt", "le", "gt", "ge", "where", "isnan", "and", "or", "not"}  # or of floats
NAMES = {
    overload: name
    for name, function in FUNCTIONS.items()
    if name != "float"  # a cast of what is no number of float32 already
    for overload in (function.op, function.of_number, *function.others)
    if overload is not None
}


NO_OTHERS: Mapping[str, str] = MappingProxyType({})
NORMAL = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


class Step(NamedTuple):
    """A function by its name, and what it is of."""

    name: str
    args: tuple[Argument, ...]


class RowProgram(NamedTuple):
    """See above. A result is a value, or a number."""

    n_statistics: int
    n_given: int
    steps: tuple[Step, ...]
    results: tuple[Argument, ...]

    def encode(self) -> str:
        """As an argument of the operators."""
        return json.dumps(self)

    def __repr__(self) -> str:
        """A literal: what a template is given is a constant of its code too."""
        return repr(self.encode())

    def where_given(self) -> RowProgram:
        """The same, 0 where another given number, the last, is not True."""
        k, g = self.n_statistics, self.n_given

        def moved(argument: Argument) -> Argument:
            later = isinstance(argument, list) and argument[0] >= k + g
            return [argument[0] + 1] if later else argument  # type: ignore[index]

        steps = [Step(name, tuple(map(moved, args))) for name, args in self.steps]
        last = k + g + 1 + len(steps)
        chosen = [Step("where", ([k + g], moved(result), 0.0)) for result in self.results]
        results = tuple([last + i] for i in range(len(chosen)))
        return RowProgram(k, g + 1, (*steps, *chosen), results)

    def run(
        self,
        statistics: Sequence[Any],
        given: Sequence[Any],
        call: Callable[[Any, tuple[Any, ...]], Any],
        number: Callable[[Number], Any],
    ) -> list[Any]:
        """The coefficients, by what calls an ATen operator, and makes a number what such a one returns."""
        values = [*statistics, *given]

        def of(argument: Argument) -> Any:
            return values[argument[0]] if isinstance(argument, list) else number(argument)

        for name, args in self.steps:
            function = FUNCTIONS[name]
            if function.of_number is not None and not isinstance(args[1], list):
                values.append(call(function.of_number, (of(args[0]), args[1])))
            else:
                more = (torch.float32,) if name == "float" else ()
                values.append(call(function.op, (*map(of, args), *more)))
        return [*map(of, self.results)]

    # In the templates

    @property
    def lines(self) -> list[str]:
        """Each step, and each coefficient c_k, in Triton; the statistics are s_k, and what is given g_k."""
        values = [f"s_{k}" for k in range(self.n_statistics)] + [f"g_{k}" for k in range(self.n_given)]
        return self.written(values, "v_", [f"c_{k}" for k in range(len(self.results))])

    def written(
        self, values: Sequence[str], step: str, results: Sequence[str], others: Mapping[str, str] = NO_OTHERS
    ) -> list[str]:
        """The same of variables `values`, for `results`, with what the names of steps begin with.

        A quotient by a number is a product with its reciprocal, as Inductor has it. Some functions may be
        others.
        """
        names, lines = [*values], []
        for name, args in self.steps:
            if name == "div" and not isinstance(args[1], list) and args[1] and _is_normal(1.0 / args[1]):
                name, args = "mul", (args[0], 1.0 / args[1])
            made = others.get(name, FUNCTIONS[name].triton).format(*(_written(a, names) for a in args))
            names.append(f"{step}{len(names)}")
            lines.append(f"{names[-1]} = {made}")
        ends = zip(results, self.results, strict=True)
        return lines + [f"{result} = {_written(value, names)}" for result, value in ends]


def _written(argument: Argument, names: Sequence[str]) -> str:
    if isinstance(argument, list):
        return names[argument[0]]
    if isinstance(argument, float) and not math.isfinite(argument):
        return f'float("{argument}")'
    if argument and not _is_normal(argument):
        return f"tl.full([], {float(argument)!r}, tl.float32)"  # Triton would have it in float64
    return f"({argument!r})" if argument < 0 else repr(argument)


def _is_normal(number: Number) -> bool:
    """In float32."""
    return NORMAL[0] <= abs(number) <= NORMAL[1]


@functools.lru_cache(maxsize=256)
def decode(text: str) -> RowProgram:
    """What `encode` has made text of."""
    n_statistics, n_given, steps, results = json.loads(text)
    return RowProgram(
        n_statistics, n_given, tuple(Step(name, tuple(args)) for name, args in steps), tuple(results)
    )


def coefficients(program: RowProgram, statistics: Tensor, given: Sequence[Tensor]) -> Tensor:
    """[K, N] of statistics [K, N] and given numbers [N] or []."""
    made = program.run(list(statistics), given, lambda op, args: op(*args), number_beside(statistics))
    return torch.stack([row.to(statistics.dtype).expand(statistics.shape[1]) for row in made])


def number_beside(x: Tensor) -> Callable[[Number], Tensor]:
    """What makes a number a tensor [] of the dtype of x, or of truth values."""
    return lambda number: x.new_full((), number, dtype=torch.bool if isinstance(number, bool) else None)
