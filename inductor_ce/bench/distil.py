"""Distillation from two heads, and R-Drop of two passes through one, forward and backward.

The logits of both sides are products. The generalised Jensen-Shannon divergence is that of TRL's GKD, of a
student from a frozen teacher; of R-Drop both passes learn, by labels as well, and add to one gradient of the
weight.

A record says of plain torch.compile and of inductor_ce what a step takes, and how far its loss and gradients
are from float64's, which are made for a few rows at a time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .shared.against_plain import compared, in_words, run
from .shared.losses import jsd_of_entries
from .shared.measure import Calls

HELP = "distillation from two heads, and R-Drop"
SHAPES = ("4096x128256x4096x4096", "16384x128256x4096x4096", "16384x151936x896x3584")
TEMPERATURE = 2.0
BETA = 0.5  # of the teacher in the mixture
ROWS = 256  # of float64 logits at a time
OF_MEMORY, OF_TIME = 0.35, 1.05

METHOD = {
    "step": "loss.backward() for the gradients of the student's hidden states and weight, in bfloat16; "
    "nothing is added to an earlier gradient",
    "frozen": "whether the student's weight wants no gradient, as where adapters are trained",
    "beyond_gradients": "peak of the memory allocated in a warm step less that before it and the gradients",
    "errors": "norm of what is off from float64 over the norm of that",
    "bars": f"at most {OF_MEMORY} of plain's memory beyond the gradients, and {OF_TIME} of its time",
}


class Shape(NamedTuple):
    """N rows, V classes, D and T the hidden sizes of the student and of the teacher."""

    N: int
    V: int
    D: int
    T: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


class Given(NamedTuple):
    """h [N, D] and W [V, D] of the student, t [N, T] and U [V, T] of the teacher, which rows count [N].

    Of R-Drop t has the hidden states of a second pass, which learn, and U is not read.
    """

    h: Tensor
    W: Tensor
    t: Tensor
    U: Tensor
    mask: Tensor

    @property
    def leaves(self) -> dict[str, Tensor]:
        named = {"dh": self.h, "dW": self.W, "dt": self.t}
        return {name: x for name, x in named.items() if x.requires_grad}


Loss = Callable[..., Tensor]


def forward_kl(h: Tensor, W: Tensor, t: Tensor, U: Tensor, mask: Tensor) -> Tensor:
    """KL of the student from the teacher, over a temperature, of the rows that count."""
    with torch.no_grad():
        target = F.softmax(F.linear(t, U).float() / TEMPERATURE, -1)
    log_p = F.log_softmax(F.linear(h, W).float() / TEMPERATURE, -1)
    rows = F.kl_div(log_p, target, reduction="none").sum(-1)
    return TEMPERATURE**2 * (rows * mask).sum() / mask.sum()


def reverse_kl(h: Tensor, W: Tensor, t: Tensor, U: Tensor, mask: Tensor) -> Tensor:
    """KL of the teacher from the student."""
    with torch.no_grad():
        log_q = F.log_softmax(F.linear(t, U).float() / TEMPERATURE, -1)
    log_p = F.log_softmax(F.linear(h, W).float() / TEMPERATURE, -1)
    rows = (log_p.exp() * (log_p - log_q)).sum(-1)
    return TEMPERATURE**2 * (rows * mask).sum() / mask.sum()


def generalised_jsd(h: Tensor, W: Tensor, t: Tensor, U: Tensor, mask: Tensor) -> Tensor:
    """The mixture by a logsumexp over both."""
    with torch.no_grad():
        teacher = F.linear(t, U)
    log_p, log_q = (F.log_softmax(z.float() / TEMPERATURE, -1) for z in (F.linear(h, W), teacher))
    return TEMPERATURE**2 * (jsd_of_entries(log_p, log_q, BETA) * mask[:, None]).sum() / mask.sum()


def r_drop(h: Tensor, W: Tensor, t: Tensor, U: Tensor, mask: Tensor) -> Tensor:
    """The labels' cross entropy of both passes, and the KL of each from the other."""
    one, two = F.linear(h, W).float(), F.linear(t, W).float()
    y = _labels(mask, len(W))
    log_p, log_q = F.log_softmax(one, -1), F.log_softmax(two, -1)
    rows = F.kl_div(log_p, log_q.exp(), reduction="none").sum(-1)
    rows = rows + F.kl_div(log_q, log_p.exp(), reduction="none").sum(-1)
    return (F.cross_entropy(one, y) + F.cross_entropy(two, y) + (rows * mask).sum() / mask.sum()) / 2


def _labels(mask: Tensor, v: int) -> Tensor:
    return torch.where(mask > 0, torch.arange(len(mask), device=mask.device) * 31 % v, -100)


R_DROP = "R-Drop"
LOSSES: dict[str, Loss] = {
    "forward": forward_kl,
    "reverse": reverse_kl,
    "generalised JSD": generalised_jsd,
    R_DROP: r_drop,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shapes",
        type=shape,
        nargs="+",
        metavar="SHAPE",
        default=[shape(text) for text in SHAPES],
        help=f"rows x vocabulary x hidden size x teacher's hidden size (default: {' '.join(SHAPES)})",
    )
    parser.add_argument("--losses", choices=LOSSES, nargs="+", default=[*LOSSES], help="(default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")


def shape(text: str) -> Shape:
    try:
        return Shape(*map(int, text.split("x")))
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r} is not like {SHAPES[0]}") from None


def main(options: argparse.Namespace) -> int:
    """Measure, keep the JSON, print the table."""

    def cases(clock: Calls) -> Iterator[dict[str, Any]]:
        for each in options.shapes:
            for frozen in (False, True):
                for name in options.losses:
                    if name != R_DROP or (each.D == each.T and not frozen):
                        yield case(each, frozen, name, clock)

    return run("distil", METHOD, options, cases, table)


def case(each: Shape, frozen: bool, name: str, clock: Calls, device: str = "cuda") -> dict[str, Any]:
    """What both systems take for a loss, and how far off they are."""
    given = drawn(each, frozen, device, name)
    rows = compared(LOSSES[name], given, given.leaves, exactly(name, given), clock)
    return {**each._asdict(), "divergence": name, "weight": "frozen" if frozen else "trained", "rows": rows}


def drawn(each: Shape, frozen: bool, device: str, name: str) -> Given:
    """Logits of variance 4, as sure as those of a trained model; every fifth row does not count."""
    N, V, D, T = each
    h, t = (torch.randn(N, size, device=device).bfloat16() for size in (D, T))
    W, U = ((2 * size**-0.5 * torch.randn(V, size, device=device)).bfloat16() for size in (D, T))
    mask = (torch.arange(N, device=device) % 5 > 0).float()
    return Given(h.requires_grad_(), W.requires_grad_(not frozen), t.requires_grad_(name == R_DROP), U, mask)


def exactly(name: str, given: Given) -> dict[str, Tensor]:
    """The loss and its gradients by their formulas in float64, some rows at a time."""
    W, U = given.W.detach().double().requires_grad_(given.W.requires_grad), given.U.double()
    total, y = given.mask.double().sum(), _labels(given.mask, len(W))
    found = {part: torch.zeros_like(leaf, dtype=torch.float64) for part, leaf in given.leaves.items()}
    loss = torch.zeros_like(total)
    for rows in torch.arange(len(given.mask), device=total.device).split(ROWS):
        h, t = (x.detach()[rows].double().requires_grad_(x.requires_grad) for x in (given.h, given.t))
        own = Given(h, W, t, U, given.mask[rows].double())
        part = _formula(name, own, y[rows]) / total
        loss += part.detach()
        for which, gradient in zip(
            own.leaves, torch.autograd.grad(part, [*own.leaves.values()]), strict=True
        ):
            if which == "dW":
                found[which] += gradient
            else:
                found[which][rows] = gradient
    return {"loss": loss, **found}


def _formula(name: str, given: Given, y: Tensor) -> Tensor:
    """Of float64: sum_i q_i (log q_i - log p_i) for the forward, the other way round for the reverse."""
    h, W, t, U, mask = given
    if name == R_DROP:
        log_p, log_q = _log_softmax(h @ W.t()), _log_softmax(t @ W.t())
        picked = (log_p + log_q).gather(1, y.clamp(min=0)[:, None])[:, 0]
        return ((((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1) - picked) * mask).sum() / 2
    log_p, log_q = (_log_softmax(x @ w.t() / TEMPERATURE) for x, w in ((h, W), (t, U)))
    if name == "generalised JSD":
        p, q = log_p.exp(), log_q.exp()
        log_m = ((1 - BETA) * p + BETA * q).log()
        rows = (BETA * q * (log_q - log_m) + (1 - BETA) * p * (log_p - log_m)).sum(-1)
        return TEMPERATURE**2 * (rows * mask).sum()
    to, of = (log_p, log_q) if name == "forward" else (log_q, log_p)
    return TEMPERATURE**2 * ((of.exp() * (of - to)).sum(-1) * mask).sum()


def _log_softmax(z: Tensor) -> Tensor:
    z = z - z.detach().amax(-1, keepdim=True)
    return z - z.exp().sum(-1, keepdim=True).log()


def table(result: dict[str, Any]) -> str:
    """The result to read."""
    return "\n".join(map(_told, result["cases"]))


def _told(each: dict[str, Any]) -> str:
    size = Shape(*(each[letter] for letter in Shape._fields))
    return f"{size} {each['divergence']}, {each['weight']} weight: {in_words(each['rows'])}"
