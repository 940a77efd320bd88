"""The template of `row_stats_grad` as a function of Triton's, for an operator that launches it itself.

Inductor writes a template for the buffers of a graph. What it writes at the hooks of this one is little where
logits, labels and weights are in memory, and the gradient lies over the logits; `_Hooks` does.
"""

from __future__ import annotations

import functools
import itertools
import linecache
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jinja2 import Environment, StrictUndefined
from torch import Tensor

from ..common.compat.launches import Grid
from . import chains, row_program
from .gemm import aligned_strides
from .launch import Kernel, cdiv
from .one_read import Given, OneRead
from .one_read_lowering import configuration
from .rows import Rows
from .with_templates import template_text

NAME = "row_stats_grad_in_place"
HEADER = """\
import triton
import triton.language as tl
from triton.language.extra import libdevice

"""
MOST = 256  # kernels that are kept

_count = itertools.count()


class Wanted(NamedTuple):
    """What a kernel is written for.

    Attributes:
        which, program, chain: as `row_stats_grad` is given them.
        given: how the program reads what it is given.
        v: how many columns there are.
        itemsize: bytes of a logit.
        row: how many elements lie between the first logits of two rows.
        strides: of the labels, the weights and the given numbers, each along its only dimension.
    """

    which: str
    program: str
    chain: str
    given: tuple[Given, ...]
    v: int
    itemsize: int
    row: int
    strides: tuple[tuple[int, ...], ...]

    def one(self) -> OneRead:
        labels, weights, _ = self.strides
        rows = Rows.decode(self.which, len(labels), len(weights))
        program = row_program.decode(self.program)
        return OneRead(rows, program, self.given, chains.decode(self.chain), self.itemsize == 2)


class RowKernel:
    """`kernel(z, stats, labels, weights, given, left, words)` launches it for the rows of z [n, V].

    The gradient becomes z. `stats` [K, n] are columns of a matrix. `left` [] says how many rows are
    computed. Of `words`, int64 [n, W], all are 0.

    Attributes:
        words: W.
        source: of the kernel.
    """

    def __init__(self, wanted: Wanted):
        one = wanted.one()
        columns = wanted.v if one.rows.weight_names else wanted.row  # a weight has none beyond V
        chosen = configuration(wanted.v, columns, wanted.itemsize, one.rows)
        self._blocks, self._delay = cdiv(columns, chosen["BLOCK"]), chosen["DELAY"]
        self.words = one.words_of_row(self._blocks)
        self._options = {name: chosen.pop(name) for name in ("num_warps", "num_stages")}
        self.source = _written(wanted, one, chosen | {"WORDS": self.words})
        self._kernel = Kernel(_function(self.source))

    def __call__(
        self,
        z: Tensor,
        stats: Tensor,
        labels: Sequence[Tensor],
        weights: Sequence[Tensor],
        given: Sequence[Tensor],
        left: Tensor,
        words: Tensor,
    ) -> None:
        if n := len(z):
            pointers = z, stats, words, *labels, *weights, *given, left
            self._kernel(self.grid(n), pointers, n, stats.stride(0), **self._options)

    def grid(self, n: int) -> Grid:
        return n * self._blocks + self._delay, 1, 1


def kernel_for(
    like: tuple[int, torch.dtype, torch.device],
    strides: tuple[tuple[int, ...], ...],
    given: tuple[tuple[torch.dtype, bool], ...],
    texts: tuple[str, str, str],
) -> RowKernel:
    """The kernel for logits as `products.logits` makes them, [n, V], and what is beside them.

    Args:
        like: V, the dtype of the logits, and the device.
        strides: of labels, weights and given numbers, each along its only dimension.
        given: of each number the dtype, and whether each row has its own.
        texts: the arguments `which`, `program` and `chain` of `row_stats_grad`.
    """
    v, dtype, device = like
    row, _ = aligned_strides(v, device)
    read = tuple(Given.of(k, *each) for k, each in enumerate(given))
    return _kept(Wanted(*texts, read, v, dtype.itemsize, row, strides))


@functools.lru_cache(MOST)
def _kept(wanted: Wanted) -> RowKernel:
    return RowKernel(wanted)


class _Hooks:
    """What Inductor gives a template to write with, where all that it reads is in memory."""

    def __init__(self, wanted: Wanted, one: OneRead, constants: dict[str, Any]):
        self._row, self._constants, rows = wanted.row, constants, one.rows
        labels, weights, given = wanted.strides
        names = rows.label_names, rows.weight_names, [x.name for x in one.given]
        self._steps = {
            name: step
            for of_kind, steps in zip(names, (labels, weights, given), strict=True)
            for name, step in zip(of_kind, steps, strict=True)
        }

    def all(self) -> dict[str, Callable[..., str]]:
        hooks = self.def_kernel, self.size, self.stride, self.load_input, self.store_output
        return {hook.__name__: hook for hook in hooks}

    def def_kernel(self, *_: str) -> str:
        """The head of the function, and its constants."""
        own = [*self._steps, "left"]
        arguments = ["z", "stats", "ws_ptr", *own, "n", "stats_stride"]
        once = ["n", "stats_stride"]  # for which no other code would be better
        head = f"@triton.jit(do_not_specialize={once}, do_not_specialize_on_alignment={['stats', *own]})\n"
        head += f"def {NAME}({', '.join(arguments)}):\n"
        return head + "\n".join(f"    {k}: tl.constexpr = {x}" for k, x in self._constants.items())

    def size(self, name: str, dim: int) -> str:
        assert (name, dim) == ("z", 0)
        return "n"

    def stride(self, name: str, dim: int) -> str:
        if name == "stats":
            return ("stats_stride", "1")[dim]
        return str(self._steps[name])

    def load_input(self, name: str, to: str, indices: tuple[str, str], **_: Any) -> str:
        row, column = indices
        if name.startswith("z"):
            return f"{to} = tl.load(z + ({column} + {self._row} * {row}))"
        weight = name.removesuffix("_help").removesuffix("_again")
        return f"{to} = tl.load({weight} + {column} * {self._steps[weight]})"

    def store_output(self, indices: tuple[str, str], value: str, mask: str, **_: Any) -> str:
        row, column = indices
        return f"tl.store(z + ({column} + {self._row} * {row}), {value}, mask={mask})"


def _written(wanted: Wanted, one: OneRead, constants: dict[str, Any]) -> str:
    known = constants | _Hooks(wanted, one, constants).all()
    known |= {"ROWS": one.rows, "ONE": one, "OVER": 1, "PIECE": 0}
    template = Environment(undefined=StrictUndefined).from_string(template_text("row_stats_grad"))
    return HEADER + template.render(**known)


def _function(source: str) -> Any:
    """What `triton.jit` makes of the text, which Python is told to be that of a file."""
    file = f"<inductor_ce {NAME} {next(_count)}>"
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
    names: dict[str, Any] = {"__name__": __name__}
    exec(compile(source, file, "exec"), names)
    return names[NAME]
