"""Divergences between two sets of given logits, and sums of entries, as their users write them.

A record says of plain torch.compile and of inductor_ce what a step takes, and how far its loss and gradients
are from float64's, which are made for a few rows at a time.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .shared.against_plain import compared, in_words, run
from .shared.losses import jsd_of_entries
from .shared.measure import Calls

HELP = "divergences between two sets of given logits, and sums of entries"
SHAPES = ((4096, 128256), (8192, 32000))
ROWS = 256  # in float64 at a time
BETA = 0.5
EPSILON = 1e-8
TEMPERATURE = 2.0
OF_TIME = 0.6

METHOD = {
    "step": "loss.backward() for the gradients of the student's logits, or of both, in bfloat16",
    "beyond_gradients": "peak of the memory allocated in a warm step less that before it and the gradients",
    "errors": "norm of what is off from float64 over the norm of that",
    "bars": f"at most {OF_TIME} of plain's time for a generalised JSD",
}

Loss = Callable[[Tensor, Tensor], Tensor]


def generalised_jsd(z: Tensor, t: Tensor) -> Tensor:
    """The mixture by a logsumexp over both, as in generalised knowledge distillation."""
    log_p, log_q = F.log_softmax(z.float(), -1), F.log_softmax(t.float(), -1)
    return jsd_of_entries(log_p, log_q, BETA).sum() / z.shape[0]


def jsd(z: Tensor, t: Tensor) -> Tensor:
    """The mixture by logaddexp."""
    log_p, log_q = F.log_softmax(z.float(), -1), F.log_softmax(t.float(), -1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return 0.5 * (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(-1).mean()


def symmetric_kl(z: Tensor, t: Tensor) -> Tensor:
    """As in R-Drop."""
    log_p, log_q = F.log_softmax(z.float(), -1), F.log_softmax(t.float(), -1)
    one = F.kl_div(log_p, log_q.exp(), reduction="batchmean")
    return 0.5 * (one + F.kl_div(log_q, log_p.exp(), reduction="batchmean"))


def distillation(z: Tensor, t: Tensor) -> Tensor:
    """From a teacher at a temperature, beside labels, as Hinton et al. have it."""
    log_p, q = F.log_softmax(z.float() / TEMPERATURE, -1), F.softmax(t.float() / TEMPERATURE, -1)
    soft = F.kl_div(log_p, q, reduction="batchmean") * TEMPERATURE**2
    return 0.5 * soft + 0.5 * F.cross_entropy(z.float(), labels(z))


def labels(z: Tensor) -> Tensor:
    """Any that are not the teacher's choice, one a row."""
    return torch.arange(len(z), device=z.device) * 7919 % z.shape[1]


def entropy(z: Tensor, t: Tensor) -> Tensor:
    """With an epsilon in the logarithm, as in actor-critics."""
    p = F.softmax(z.float(), -1)
    return -(p * torch.log(p + EPSILON)).sum(-1).mean()


def squared_distance(z: Tensor, t: Tensor) -> Tensor:
    """Of the probabilities, as of a mean teacher."""
    p, q = F.softmax(z.float(), -1), F.softmax(t.float(), -1)
    return F.mse_loss(p, q, reduction="sum") / z.shape[0]


STUDENT, BOTH = "student", "both"
LOSSES: dict[str, Loss] = {
    "generalised JSD": generalised_jsd,
    "JSD": jsd,
    "symmetric KL": symmetric_kl,
    "distillation": distillation,
    "entropy + eps": entropy,
    "squared distance": squared_distance,
}
CASES = (
    ("generalised JSD", STUDENT),
    ("JSD", STUDENT),
    ("JSD", BOTH),
    ("symmetric KL", BOTH),
    ("distillation", STUDENT),
    ("entropy + eps", STUDENT),
    ("squared distance", STUDENT),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", type=shape, nargs="+", metavar="NxV", default=[*SHAPES])
    parser.add_argument("--quick", action="store_true", help="fewer rounds")


def shape(text: str) -> tuple[int, int]:
    try:
        n, v = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 4096x128256") from None
    return n, v


def main(options: argparse.Namespace) -> int:
    """Measure, keep the JSON, print the table."""

    def cases(clock: Calls) -> Iterator[dict[str, Any]]:
        for n, v in options.shapes:
            for name, moving in CASES:
                yield case(n, v, name, moving, clock)

    return run("divergences", METHOD, options, cases, table)


def case(n: int, v: int, name: str, moving: str, clock: Calls, device: str = "cuda") -> dict[str, Any]:
    """What both systems take for a loss, and how far off they are."""
    z, t = drawn(n, v, moving, device)
    leaves = {"dz": z} | ({"dt": t} if moving == BOTH else {})
    rows = compared(LOSSES[name], (z, t), leaves, exactly(name, z, t), clock)
    return {"N": n, "V": v, "divergence": name, "gradient": moving, "rows": rows}


def drawn(n: int, v: int, moving: str, device: str) -> tuple[Tensor, Tensor]:
    """Logits as sure as those of a trained model, the teacher's near the student's."""
    z = 3 * torch.randn(n, v, device=device)
    t = z + torch.randn(n, v, device=device)
    return z.bfloat16().requires_grad_(), t.bfloat16().requires_grad_(moving == BOTH)


def exactly(name: str, z: Tensor, t: Tensor) -> dict[str, Tensor]:
    """The loss and its gradients by their formulas in float64, some rows at a time."""
    leaves = {"dz": z, "dt": t} if t.requires_grad else {"dz": z}
    found = {key: torch.empty_like(leaf, dtype=torch.float64) for key, leaf in leaves.items()}
    total = torch.zeros((), dtype=torch.float64, device=z.device)
    for rows in torch.arange(len(z), device=z.device).split(ROWS):
        pair = [x.detach()[rows].double().requires_grad_(x.requires_grad) for x in (z, t)]
        loss = _formula(name, pair[0], pair[1], labels(z)[rows]) / len(z)
        wanted = [x for x in pair if x.requires_grad]
        for key, gradient in zip(found, torch.autograd.grad(loss, wanted), strict=True):
            found[key][rows] = gradient
        total += loss.detach()
    return {"loss": total, **found}


def _formula(name: str, z: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """sum_i p_i log(p_i / x_i), of p from the mixture or from the other, weighed; or what the loss sums."""
    if name == "distillation":
        (p, q), (own, _) = _probabilities(z / TEMPERATURE, t / TEMPERATURE), _probabilities(z, t)
        soft = TEMPERATURE**2 * (q * (q / p).log()).sum()
        return 0.5 * soft - 0.5 * own[torch.arange(len(y), device=y.device), y].log().sum()
    p, q = _probabilities(z, t)
    if name == "entropy + eps":
        return -(p * (p + EPSILON).log()).sum()
    if name == "squared distance":
        return (p - q).square().sum()
    x, y = (q, p) if name == "symmetric KL" else ((p + q) / 2,) * 2
    return 0.5 * (p * (p / x).log() + q * (q / y).log()).sum()


def _probabilities(*sides: Tensor) -> Iterator[Tensor]:
    for x in sides:
        exp = (x - x.detach().amax(-1, keepdim=True)).exp()
        yield exp / exp.sum(-1, keepdim=True)


def table(result: dict[str, Any]) -> str:
    """The result to read."""
    return "\n".join(map(_told, result["cases"]))


def _told(each: dict[str, Any]) -> str:
    name = f"{each['N']}x{each['V']} {each['divergence']}, gradient of {each['gradient']}"
    return f"{name}: {in_words(each['rows'])}"
