"""What is computed of each logit alone before the statistics of its row, and of their gradient behind it.

    before     x of z, such as c tanh(z / c); the statistics, and the gradient dx, are of x
    after      dz of z and dx, such as (1 - tanh(z / c)^2) dx

Both are programs as those of rows are, computed in float32, and not rounded in between: see `row_program.py`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from . import row_program
from .row_program import NO_OTHERS, Argument, Number, RowProgram

# NOTE tanh of 16 bits
# 1 - 2 / (1 + exp 2u) is off by a few units of 2^-24, whatever u is. The library's is off by as many of its
# own last place, and takes more than twice the time. In c tanh(z / c) it is what the rounding to float32 of a
# logit near c is, and less than a z of 16 bits is off itself, as long as c is no larger than caps are.
OF_16_BITS = MappingProxyType(
    {"tanh": "1.0 - libdevice.fast_dividef(2.0, 1.0 + libdevice.fast_expf(2.0 * {0}))"}
)
LEAST_FACTOR = 1 / 64  # of z in what tanh is of

Call = Callable[[Any, tuple[Any, ...]], Any]


class Chain(NamedTuple):
    """See above: a program of z, and one of z that is given dx."""

    before: RowProgram
    after: RowProgram

    def encode(self) -> str:
        """As an argument of the operators."""
        return json.dumps([program.encode() for program in self])

    def __repr__(self) -> str:
        """A literal: what a template is given is a constant of its code too."""
        return repr(self.encode())

    def of(self, z: Any, call: Call, number: Callable[[Number], Any]) -> Any:
        """x, by what calls an ATen operator, and makes a number what such a one returns."""
        (x,) = self.before.run([z], [], call, number)
        return x

    def gradient(self, z: Any, dx: Any, call: Call, number: Callable[[Number], Any]) -> Any:
        """dz, in the same way."""
        (dz,) = self.after.run([z], [dx], call, number)
        return dz

    def lines_before(self, x: str, narrow: bool) -> list[str]:
        """In Triton: the variable x, which is z, becomes x. `narrow` is whether z has come of 16 bits."""
        return self.before.written([x], "before_", [x], _functions(self.before, narrow))

    def lines_after(self, z: str, dx: str, narrow: bool) -> list[str]:
        """The variable dx becomes dz."""
        return self.after.written([z, dx], "after_", [dx], _functions(self.after, narrow))


def _functions(program: RowProgram, narrow: bool) -> Mapping[str, str]:
    """Which functions are others in the template."""
    factors: dict[int, float] = {0: 1.0}  # of z, by the places of values
    for at, (name, args) in enumerate(program.steps, program.n_statistics + program.n_given):
        if name == "tanh" and abs(factors.get(_place(args[0]), 0.0)) < LEAST_FACTOR:
            return NO_OTHERS
        places = [_place(arg) for arg in args]
        if name in ("mul", "div") and places[0] in factors and not isinstance(args[1], list) and args[1]:
            factors[at] = factors[places[0]] * (args[1] if name == "mul" else 1 / args[1])
    return OF_16_BITS if narrow else NO_OTHERS


def _place(argument: Argument) -> int:
    return argument[0] if isinstance(argument, list) else -1


@functools.lru_cache(maxsize=256)
def decode(text: str) -> Chain | None:
    """What `encode` has made text of; None of ""."""
    return Chain(*map(row_program.decode, json.loads(text))) if text else None
