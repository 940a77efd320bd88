"""Statistics and gradient of given logits as a head in pieces makes them: by one template, and by two.

A record says what they take as a multiple of a copy of the logits in the same run, which reads and writes
them once, and how far they are from float64.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..ops import lowering
from ..ops.chains import Chain
from ..ops.row_program import RowProgram, Step, coefficients
from .divergences import shape
from .shared import peers
from .shared.against_plain import error, run
from .shared.measure import Budget, Calls, over, timed

HELP = "statistics and gradient of given logits, by one template and by two"
SHAPES = ((8192, 32000), (8192, 128256), (16384, 151936), (4096, 256000))
ROWS = 64  # that are compared with float64
IGNORED = 17  # every so many labels is
SMOOTHING, Z_LOSS, SOFT_CAP = 0.1, 1e-4, 30.0
COPY, TWO, ONE, PEER = "copy", "two templates", "one template", "quack, one read"
QUACK = "cross_entropy", "cross_entropy_fwd_out"  # whose gradient has a factor of 1 for each row

METHOD = {
    "step": "statistics, coefficients and gradient of bfloat16 logits, of a factor for each row",
    "time": "the median of do_bench, which empties the L2 cache before each call, in rounds by turns",
    "errors": f"norm of what is off from float64 over the norm of that, of the first {ROWS} rows",
}

Both = tuple[Tensor, Tensor]


class Loss(NamedTuple):
    """Its statistics, what makes their coefficients of a factor g of each row, and the cap of the logits."""

    which: str
    program: Callable[[int], RowProgram]
    cap: float | None = None

    @property
    def chain(self) -> str:
        return "" if self.cap is None else soft_cap(self.cap).encode()


def of_cross_entropy(v: int) -> RowProgram:
    return RowProgram(3, 1, (Step("div", ([3], [1])), Step("neg", ([3],))), (0.0, [4], [5]))


def smoothed(v: int) -> RowProgram:
    """Of (1 - e) (lse - z_y) + e (lse - mean z)."""
    steps = Step("div", ([4], [1])), Step("mul", ([4], SMOOTHING - 1)), Step("mul", ([4], -SMOOTHING / v))
    return RowProgram(4, 1, steps, (0.0, [5], [6], [7]))


def with_z_loss(v: int) -> RowProgram:
    """The same and c lse^2, whose derivative by lse is 2 c lse."""
    steps = [*smoothed(v).steps, Step("log", ([1],)), Step("add", ([0], [8])), Step("mul", ([9], 2 * Z_LOSS))]
    steps += [Step("add", ([10], 1.0)), Step("mul", ([11], [5]))]
    return RowProgram(4, 1, tuple(steps), (0.0, [12], [6], [7]))


def soft_cap(c: float) -> Chain:
    """c t of logits z, with t = tanh(z / c), whose derivative is 1 - t^2."""
    t = Step("div", ([0], c)), Step("tanh", ([1],))
    slope = Step("div", ([0], c)), Step("tanh", ([2],)), Step("mul", ([3], [3])), Step("sub", (1.0, [4]))
    return Chain(
        RowProgram(1, 0, (*t, Step("mul", ([2], c))), ([3],)),
        RowProgram(1, 1, (*slope, Step("mul", ([5], [1]))), ([6],)),
    )


PLAIN = "cross entropy"
LOSSES = {
    PLAIN: Loss("max,sumexp,pick", of_cross_entropy),
    "+ smoothing": Loss("max,sumexp,pick,sum", smoothed),
    "+ smoothing, z-loss": Loss("max,sumexp,pick,sum", with_z_loss),
    "+ soft-cap": Loss("max,sumexp,pick", of_cross_entropy, SOFT_CAP),
}


def by_one(loss: Loss, program: RowProgram, text: str, z: Tensor, y: Tensor, g: Tensor) -> Both:
    return ops.ROW_STATS_GRAD(z, [y], [], loss.which, [g], text, chain=loss.chain)


def by_two(loss: Loss, program: RowProgram, text: str, z: Tensor, y: Tensor, g: Tensor) -> Both:
    x = z if loss.cap is None else loss.cap * torch.tanh(z.float() / loss.cap)
    packed = ops.ROW_STATS(x, [y], [], loss.which)
    c = coefficients(program, packed, [g])
    dz = ops.ROW_GRAD(x, [y], [], packed[0], c, loss.which)
    return packed, dz if loss.cap is None else (dz * (1 - (x / loss.cap) ** 2)).to(z.dtype)


def exactly(loss: Loss, z: Tensor, y: Tensor, g: Tensor) -> Both:
    """In float64, by their definitions."""
    x, v = z.double(), z.shape[1]
    slope = torch.ones_like(x)
    if loss.cap is not None:
        t = torch.tanh(x / loss.cap)
        x, slope = loss.cap * t, 1 - t * t
    m = x.amax(1)
    gap = x - m[:, None]
    exp = gap.exp()
    hits = torch.nn.functional.one_hot(y.clamp(min=0), v) * (y >= 0)[:, None]
    values = {"max": m, "sumexp": exp.sum(1), "pick": (hits * x).sum(1), "sum": gap.sum(1)}
    packed = torch.stack([values[name] for name in loss.which.split(",")])
    _, a, b, *rest = coefficients(loss.program(v), packed, [g.double()])
    return packed, (a[:, None] * exp + b[:, None] * hits + sum(c[:, None] for c in rest)) * slope


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", type=shape, nargs="+", metavar="NxV", default=[*SHAPES])
    parser.add_argument("--quick", action="store_true", help="fewer rounds")


def main(options: argparse.Namespace) -> int:
    """Measure, keep the JSON, print the table."""

    def cases(clock: Calls) -> Iterator[dict[str, Any]]:
        lowering.register()
        for n, v in options.shapes:
            yield from measured(n, v, Budget(clock.rounds, rep_ms=30))

    return run("rows", METHOD, options, cases, table)


def drawn(n: int, v: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Logits as sure as those of a trained model, labels, and a factor for each row."""
    z = (3 * torch.randn(n, v, device=device)).bfloat16()
    y = torch.randint(0, v, (n,), device=device)
    y[::IGNORED] = -100
    return z, y, torch.rand(n, device=device)


def measured(n: int, v: int, budget: Budget) -> Iterator[dict[str, Any]]:
    """A case for each loss of one shape."""
    z, y, g = drawn(n, v, "cuda")
    for name, loss in LOSSES.items():
        torch.compiler.reset()
        made = {TWO: _compiled(by_two, loss, v), ONE: _compiled(by_one, loss, v)}
        errors = {way: errors_of(f, loss, z, y, g) for way, f in made.items()}
        target = torch.empty_like(z)
        steps: dict[str, Callable[[], Any]] = {COPY: functools.partial(target.copy_, z)}
        steps |= {way: functools.partial(f, z, y, g) for way, f in made.items()}
        if loss == LOSSES[PLAIN]:
            steps |= by_peers(z, y, target)
        times = timed(steps, budget)
        rows = [
            {
                "way": way,
                "ms": ms,
                "spread": spread,
                "of_copy": over(ms, times[COPY][0]),
                "errors": errors.get(way),
            }
            for way, (ms, spread, _) in times.items()
        ]
        steps.clear()
        del target
        yield {"N": n, "V": v, "loss": name, "rows": rows}


def by_peers(z: Tensor, y: Tensor, target: Tensor) -> dict[str, Callable[[], Any]]:
    """What peers make of a cross entropy, where they are installed."""
    kernel = peers.quack(*QUACK)
    if isinstance(kernel, peers.NotOffered):
        return {}
    losses = torch.empty(len(z), device=z.device)
    return {PEER: lambda: kernel(z, y, None, losses, None, target, None)}


def _compiled(way: Callable[..., Both], loss: Loss, v: int) -> Callable[..., Both]:
    return torch.compile(bound(way, loss, v), dynamic=False, fullgraph=True)


def bound(way: Callable[..., Both], loss: Loss, v: int) -> Callable[..., Both]:
    """A way to make one loss of V columns; a graph has its program as text."""
    program = loss.program(v)
    text = program.encode()
    return lambda z, y, g: way(loss, program, text, z, y, g)


def errors_of(f: Callable[..., Both], loss: Loss, z: Tensor, y: Tensor, g: Tensor) -> dict[str, float]:
    """Of the statistics and of the gradient."""
    packed, dz = f(z, y, g)
    few = min(ROWS, len(z))
    right = exactly(loss, z[:few], y[:few], g[:few])
    return {"statistics": error(packed[:, :few], right[0]), "gradient": error(dz[:few], right[1])}


def table(result: dict[str, Any]) -> str:
    """The result to read."""
    return "\n".join(map(_told, result["cases"]))


def _told(each: dict[str, Any]) -> str:
    ways = ", ".join(f"{row['way']} {row['ms']:.3f} ms {row['of_copy']:.3f}x" for row in each["rows"])
    return f"{each['N']}x{each['V']} {each['loss']}: {ways}"
