"""What is computed of each logit alone before the statistics of its row, and of their gradient behind it.

    before     x of z, such as c tanh(z / c); the statistics, and the gradient dx, are of x
    after      dz of z and dx, such as (1 - tanh(z / c)^2) dx

Both are programs as those of rows are, computed in float32, and not rounded in between: see `row_program.py`.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from . import row_program
from .row_program import NO_OTHERS, Number, RowProgram

# NOTE tanh of 16 bits
# 1 - 2 / (1 + exp 2u) is off by a few units of 2^-24, whatever u is. The library's is off by as many of its
# own last place, and takes more than twice the time. In c tanh(z / c) it is what a logit near c is rounded by
# in float32, and less than a z of 16 bits is off itself. Numbers far from 1, as a c that no logit comes near,
# would make more of it: behind these it is the library's.
OF_16_BITS = {"tanh": "1.0 - libdevice.fast_dividef(2.0, 1.0 + libdevice.fast_expf(2.0 * {0}))"}
FAR = 64.0

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
        return self.before.written([x], "before_", [x], self._others(narrow))

    def lines_after(self, z: str, dx: str, narrow: bool) -> list[str]:
        """The variable dx becomes dz."""
        return self.after.written([z, dx], "after_", [dx], self._others(narrow))

    def _others(self, narrow: bool) -> Mapping[str, str]:
        """Which functions are others in the template."""
        args = (arg for step in self.before.steps for arg in step.args)
        sizes = (abs(arg) for arg in args if not isinstance(arg, list) and arg)
        reach = math.prod(max(size, 1 / size) for size in sizes)
        return OF_16_BITS if narrow and reach <= FAR**2 else NO_OTHERS


@functools.lru_cache(maxsize=256)
def decode(text: str) -> Chain | None:
    """What `encode` has made text of; None of ""."""
    return Chain(*map(row_program.decode, json.loads(text))) if text else None
