"""The grammar of generated losses: every piece is source, and beside it stands what it means.

`z` are logits and `y` labels; `{d}` is the class axis, `{V}` the number of classes, `{x}` what a label picks
from. `grammar_of_logits.py` has what comes before, `compose.py` puts pieces together. Meanings are functions
of float64 tensors with the classes on the last axis; they share no code with inductor_ce, nor with torch's
losses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

EPS = 0.1  # as the pieces spell it


# The normaliser: log-probabilities `logp` [.., V], or `lse` [..]

_MAXIMA = [
    "m = z.max({d}, keepdim=True).values",
    "m = z.max(dim={d}, keepdim=True)[0]",
    "m, _ = torch.max(z, {d}, keepdim=True)",
    "m = z.amax({d}, keepdim=True)",
    "m = torch.amax(z, dim={d}, keepdim=True)",
    "m = z.detach().amax({d}, keepdim=True)",
    "m = z.amax(dim={d}, keepdim=True).detach()",
    "m = z.max({d}).values.unsqueeze({d})",
    "with torch.no_grad():\n    m = z.max({d}, keepdim=True).values",
]
_WIDE_BY_HAND = [
    "s = z - m\nlogp = s - s.exp().sum({d}, keepdim=True).log()",
    "s = z - m\nlogp = s - torch.log(torch.sum(torch.exp(s), dim={d}, keepdim=True))",
    "logp = z - (m + (z - m).exp().sum({d}, keepdim=True).log())",
    "logp = (z - m) - torch.logsumexp(z - m, dim={d}, keepdim=True)",
    "e = torch.exp(z - m)\nlogp = torch.log(e / e.sum({d}, keepdim=True))",
    "e = (z - m).exp()\np = e / e.sum(dim={d}).unsqueeze({d})\nlogp = p.log()",
    "logp = F.log_softmax(z - m, dim={d})",
]
_NARROW_BY_HAND = [
    "lse = (z - m).exp().sum({d}).log() + m.squeeze({d})",
    "lse = m.squeeze({d}) + torch.log(torch.exp(z - m).sum(dim={d}))",
    "lse = (m + (z - m).exp().sum({d}, keepdim=True).log()).squeeze({d})",
    "lse = torch.logsumexp(z - m, {d}) + m.squeeze({d})",
]

WIDE = [
    "logp = F.log_softmax(z, dim={d})",
    "logp = F.log_softmax(z, {d})",
    "logp = torch.log_softmax(z, {d})",
    "logp = torch.log_softmax(input=z, dim={d})",
    "logp = torch.special.log_softmax(z, {d})",
    "logp = z.log_softmax({d})",
    "logp = z.log_softmax(dim={d})",
    "logp = nn.LogSoftmax(dim={d})(z)",
    "logp = F.log_softmax(z, dim={d}, dtype=torch.float32)",
    "logp = z.log_softmax(dim={d}, dtype=torch.float32)",
    "logp = z.softmax({d}).log()",
    "logp = torch.log(F.softmax(z, dim={d}))",
    "logp = torch.softmax(z, dim={d}, dtype=torch.float32).log()",
    "logp = z - z.logsumexp({d}, keepdim=True)",
    "logp = z - torch.logsumexp(z, dim={d}).unsqueeze({d})",
    "logp = z.sub(torch.logsumexp(z, {d}, True))",
    "logp = z - z.exp().sum({d}, keepdim=True).log()",
    "logp = -(torch.logsumexp(z, {d}, keepdim=True) - z)",
    *(f"{maximum}\n{rest}" for maximum in _MAXIMA for rest in _WIDE_BY_HAND),
]
ROUNDED = "logp = logp.to(torch.bfloat16)"

NARROW = [
    "lse = z.logsumexp({d})",
    "lse = z.logsumexp(dim={d})",
    "lse = torch.logsumexp(z, {d})",
    "lse = torch.logsumexp(z, dim=({d},))",
    "lse = torch.special.logsumexp(z, {d})",
    "lse = torch.logsumexp(z, {d}, keepdim=True).squeeze({d})",
    "lse = torch.log(z.exp().sum(dim={d}))",
    *(f"{maximum}\n{rest}" for maximum in _MAXIMA for rest in _NARROW_BY_HAND),
]


# The pick: `picked`, the element of {x} at `safe`


@dataclass(frozen=True)
class Where:
    """On which class axes and ranks a piece makes sense, and which labels it takes."""

    axes: tuple[int, ...] = (-1, 1)
    ranks: tuple[int, ...] = (2, 3)
    int32: bool = False
    outside: bool = False
    wraps: bool = False


LAST = Where(axes=(-1,))
FLAT = Where(axes=(-1,), ranks=(2,))
EQUAL = Where(axes=(-1,), int32=True, outside=True)
FIRST = Where(axes=(1,), ranks=(3,))

_HOT = [
    "hot = torch.zeros_like({x}).scatter_({d}, safe.unsqueeze({d}), 1.0)",
    "hot = torch.zeros_like({x}).scatter({d}, safe.unsqueeze({d}), 1.0)",
    "hot = torch.zeros_like({x})\nhot.scatter_({d}, safe.unsqueeze({d}), 1)",
]
PICKS = {
    "picked = {x}.gather({d}, safe.unsqueeze({d})).squeeze({d})": Where(int32=True),
    "picked = torch.gather({x}, {d}, safe.unsqueeze({d})).squeeze({d})": Where(int32=True),
    "picked = torch.gather({x}, dim={d}, index=safe.unsqueeze({d})).squeeze({d})": Where(),
    "picked = {x}.gather(dim={d}, index=safe.unsqueeze(dim={d})).squeeze(dim={d})": Where(),
    "picked = {x}.gather({d}, safe.unsqueeze({d})).sum({d})": Where(),
    "picked = torch.take_along_dim({x}, safe.unsqueeze({d}), dim={d}).squeeze({d})": Where(),
    "picked = {x}.take_along_dim(safe.unsqueeze({d}), {d}).squeeze({d})": Where(),
    "picked = {x}.gather({d}, safe[..., None])[..., 0]": LAST,
    "picked = {x}.gather({d}, safe.clone().unsqueeze({d})).select({d}, 0)": LAST,
    "picked = {x}.gather(1, safe.view(-1, 1)).view(-1)": FLAT,
    "picked = torch.gather({x}, 1, safe[:, None])[:, 0]": FLAT,
    "picked = {x}.gather(1, safe[:, None]).flatten()": FLAT,
    "picked = {x}[torch.arange({x}.shape[0]), safe]": Where((-1,), (2,), int32=True, wraps=True),
    "picked = {x}[torch.arange(safe.numel(), device={x}.device), safe]": Where((-1,), (2,), wraps=True),
    "picked = {x}[range(len({x})), safe]": FLAT,
    "b, s = safe.shape\npicked = {x}[torch.arange(b)[:, None], torch.arange(s), safe]": Where((-1,), (3,)),
    "b, s = safe.shape\npicked = {x}[torch.arange(b)[:, None], safe, torch.arange(s)[None]]": FIRST,
    "picked = ({x} * F.one_hot(safe, {V})).sum({d})": LAST,
    "picked = (F.one_hot(safe, num_classes={V}).to({x}.dtype) * {x}).sum(dim={d})": LAST,
    "picked = torch.sum({x} * F.one_hot(safe, {V}).float(), {d})": LAST,
    "picked = ({x} * F.one_hot(safe, {V}).movedim(-1, 1)).sum({d})": FIRST,
    "picked = ({x} * F.one_hot(safe, {V}).permute(0, 2, 1).to({x}.dtype)).sum({d})": FIRST,
    **{f"{hot}\npicked = ({{x}} * hot).sum({{d}})": Where() for hot in _HOT},
    "picked = torch.where(torch.arange({V}) == safe[..., None], {x}, 0.0).sum({d})": EQUAL,
    "picked = torch.where(safe[..., None] == torch.arange({V}), {x}, torch.zeros_like({x})).sum({d})": EQUAL,
    "picked = ({x} * (torch.arange({V}) == safe[..., None])).sum({d})": EQUAL,
    "picked = ({x} * torch.eq(safe.unsqueeze(-1), torch.arange({V})).float()).sum({d})": EQUAL,
    "picked = {x}.masked_fill(torch.arange({V}) != safe[..., None], 0.0).sum({d})": EQUAL,
    "picked = {x}.masked_fill(~(safe[..., None] == torch.arange({V})), 0).sum({d})": EQUAL,
    "hot = torch.arange({V})[:, None] == safe.unsqueeze(1)\npicked = ({x} * hot).sum({d})": FIRST,
    'picked = torch.einsum("nv,nv->n", {x}, F.one_hot(safe, {V}).to({x}.dtype))': FLAT,
    'picked = torch.einsum("bsv,bsv->bs", F.one_hot(safe, {V}).to({x}.dtype), {x})': Where((-1,), (3,)),
}
MANY = {  # the same label many times
    "picked = {x}.gather({d}, torch.stack([safe] * 18, {d})).mean({d})": Where(),
    "many = safe.unsqueeze({d}).repeat_interleave(20, {d})\n"
    "picked = torch.take_along_dim({x}, many, {d}).mean({d})": Where(),
    "picked = {x}[torch.arange(len({x}))[:, None], safe[:, None].expand(-1, 17)].mean(-1)": FLAT,
}
OF_LOGP = {  # what only log-probabilities are given to, by habit
    'picked = -F.nll_loss({x}, safe, reduction="none")': Where(axes=(1,), outside=False),
    'picked = -F.nll_loss({x}, y, ignore_index={ignore}, reduction="none")': Where(axes=(1,), outside=False),
    'picked = F.nll_loss({x}, target=safe, reduction="none").neg()': Where(axes=(1,), outside=False),
}
# Columns of all labels, for all rows, and of these the diagonal.
OF_COLUMNS = {
    "picked = {x}[:, safe].diagonal()": FLAT,
    "picked = {x}.t()[safe].diag()": FLAT,
    "picked = {x}.index_select(1, safe).diagonal(dim1=-2, dim2=-1)": FLAT,
}
# Rows of log-probabilities chosen before labels are picked of them, and put back in their order.
CHOSEN = {
    "back = torch.arange({x}.shape[0] - 1, -1, -1)\n"
    "picked = {x}[back].gather(1, safe[back].unsqueeze(1)).squeeze(1)[back]": FLAT,
    "back = torch.arange({x}.shape[0]).flip(0)\n"
    "picked = {x}.index_select(0, back).gather({d}, safe[back][:, None])[back, 0]": FLAT,
    "back = torch.arange({x}.shape[0]).flip(0)\npicked = {x}[back, safe[back]][back]": FLAT,
    "back = torch.arange(safe.shape[1]).flip(0)\n"
    "picked = {x}[:, back].gather({d}, safe[:, back, None]).squeeze({d})[:, back]": Where((-1,), (3,)),
    "back = torch.arange(safe.shape[1]).flip(0)\n"
    "picked = {x}.index_select(1, back).gather({d}, safe[:, back, None]).squeeze({d})[:, back]": Where(
        (-1,), (3,)
    ),
    "back = torch.arange(safe.shape[-1]).flip(0)\n"
    "picked = {x}.index_select(2, back).gather(1, safe[:, None, back]).squeeze(1)[:, back]": FIRST,
}
CROSS_ENTROPY_ROWS = [
    'rows = F.cross_entropy(z, y, ignore_index={ignore}, reduction="none"{smooth})',
    'rows = nn.CrossEntropyLoss(reduction="none", ignore_index={ignore}{smooth})(z, y)',
    'rows = F.cross_entropy(input=z, target=y, reduction="none", ignore_index={ignore}{smooth})',
]
CROSS_ENTROPIES = {
    "loss = F.cross_entropy(z, y, ignore_index={ignore}{smooth})": "mean",
    'loss = F.cross_entropy(z, y, None, None, {ignore}, None, "mean"{smooth})': "mean",
    "loss = nn.CrossEntropyLoss(ignore_index={ignore}{smooth})(z, y)": "mean",
    'loss = F.cross_entropy(z, y, ignore_index={ignore}, reduction="sum"{smooth})': "sum",
}
NLLS = {
    "loss = F.nll_loss(logp, y, ignore_index={ignore})": "mean",
    "loss = nn.NLLLoss(ignore_index={ignore})(logp, y)": "mean",
    'loss = F.nll_loss(logp, y, ignore_index={ignore}, reduction="sum")': "sum",
}


# Smoothing: the target q [.., V] that the rows are of, from the one-hot target


def _uniform(hot: Tensor) -> Tensor:
    return (1 - EPS) * hot + EPS / hot.shape[-1]


def _others(hot: Tensor) -> Tensor:
    """1 - EPS on the label and the rest on the other classes."""
    return torch.where(hot == 1, 1 - EPS, EPS / (hot.shape[-1] - 1))


_DENSE_UNIFORM = [
    "q = 0.9 * F.one_hot(safe, {V}) + 0.1 / {V}",
    "q = F.one_hot(safe, {V}).float() * (1 - 0.1) + 0.1 / {V}",
]
_DENSE_OTHERS = [
    "q = torch.full_like({x}, 0.1 / ({V} - 1)).scatter_({d}, safe.unsqueeze({d}), 0.9)",
    "q = torch.full_like({x}, 0.1 / ({V} - 1)).scatter({d}, safe.unsqueeze({d}), 1 - 0.1)",
    "with torch.no_grad():\n    q = torch.zeros_like({x})\n    q.fill_(0.1 / ({V} - 1))\n"
    "    q.scatter_({d}, safe.unsqueeze({d}), 0.9)",
]
_DENSE = {
    **dict.fromkeys(_DENSE_UNIFORM, (_uniform, LAST)),
    **dict.fromkeys(_DENSE_OTHERS, (_others, Where())),
    "q = torch.where(torch.arange({V}) == safe[..., None], 0.9, 0.1 / ({V} - 1))": (_others, LAST),
}

Smoothing = tuple[Callable[[Tensor], Tensor], Where]

SMOOTH_WIDE: dict[str, Smoothing] = {
    "rows = 0.9 * rows - 0.1 * logp.mean({d})": (_uniform, Where()),
    "rows = (1 - 0.1) * rows + 0.1 * -logp.mean(dim={d})": (_uniform, Where()),
    "rows = (1 - 0.1) * rows - 0.1 / {V} * logp.sum({d})": (_uniform, Where()),
    "rows = torch.lerp(rows, -logp.mean({d}), 0.1)": (_uniform, Where()),
    "smooth = -logp.sum({d})\nrows = (1 - 0.1 - 0.1 / ({V} - 1)) * rows + 0.1 / ({V} - 1) * smooth": (
        _others,
        Where(),
    ),
    "rows = 0.9 * rows - 0.1 / ({V} - 1) * (logp.sum({d}) - picked)": (_others, Where()),
    **{f"{q}\nrows = -(q * logp).sum({{d}})": meaning for q, meaning in _DENSE.items()},
    **{f"{q}\nrows = torch.sum(-q * logp, dim={{d}})": meaning for q, meaning in _DENSE.items()},
}
SMOOTH_NARROW: dict[str, Smoothing] = {
    "rows = 0.9 * rows + 0.1 * (lse - z.mean({d}))": (_uniform, Where()),
    "rows = lse - 0.9 * picked - 0.1 * z.mean({d})": (_uniform, Where()),
    "rows = rows + 0.1 * (picked - z.sum({d}) / {V})": (_uniform, Where()),
    **{f"{q}\nrows = lse - (q * z).sum({{d}})": meaning for q, meaning in _DENSE.items()},
}
KL = {  # adds sum q log q
    f'{q}\nrows = F.kl_div(logp, q, reduction="none").sum({{d}})': meaning for q, meaning in _DENSE.items()
}


# The z-loss: (its weight, over which rows)

Z_ROWS = {
    "rows = rows + 1e-4 * z.logsumexp({d}) ** 2": 1e-4,
    "rows = rows + 1e-2 * torch.logsumexp(z, dim={d}).square()": 1e-2,
    "rows = rows + 0.01 * torch.logsumexp(z, {d}, keepdim=True).squeeze({d}).pow(2)": 1e-2,
}
Z_ROWS_OF_LSE = {"rows = rows + 1e-2 * lse ** 2": 1e-2, "rows = rows + 1e-4 * lse * lse": 1e-4}
Z_ALL = {
    "loss = loss + 1e-2 * z.logsumexp({d}).pow(2).mean()": 1e-2,
    "loss = loss + 1e-4 * torch.mean(torch.logsumexp(z, dim={d}) ** 2)": 1e-4,
}
Z_COUNTED = {
    "z2 = torch.logsumexp(z, {d}).square() * counts\nloss = loss + 1e-2 * z2.sum() / counts.sum()": 1e-2,
    "z2 = z.logsumexp({d}).pow(2).where(counts, 0.0)\nloss = loss + 1e-2 * z2.sum() / counts.sum()": 1e-2,
}


# Sums over powers of the probabilities, added to the rows, of log-probabilities [.., V]

POWER_ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows = rows + 0.1 * (z.softmax({d}) ** 2).sum({d})": lambda logp: 0.1 * (2 * logp).exp().sum(-1),
    "p = F.softmax(z, dim={d})\nrows = rows - torch.log((p * p).sum(dim={d}))": lambda logp: (
        -((2 * logp).exp().sum(-1).log())
    ),
    "rows = rows + (1 - torch.pow(torch.softmax(z, {d}), 1.5).sum({d})) / 0.5": lambda logp: (
        2 - 2 * ((1.5 * logp).exp().sum(-1))
    ),
    "rows = rows - 0.5 * torch.logsumexp(3 * F.log_softmax(z, {d}), dim={d})": lambda logp: (
        -0.5 * ((3 * logp).exp().sum(-1).log())
    ),
}

# Sums of which entries are left out, added to the rows, of log-probabilities [.., V]


_KEPT = (
    "size = [{V} if i == {d} % z.dim() else 1 for i in range(z.dim())]\n"
    "kept = (torch.arange({V}) > 5).view(size)"
)


def _kept(logp: Tensor) -> Tensor:
    return torch.arange(logp.shape[-1]) > 5


def _finite(logp: Tensor) -> Tensor:
    return torch.where(logp.isfinite(), logp, 0.0)


LEFT_OUT_ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows = rows - 0.1 * torch.masked_fill(F.log_softmax(z, {d}), torch.isinf(z), 0).sum({d}) / {V}": (
        lambda logp: -0.1 * _finite(logp).sum(-1) / logp.shape[-1]
    ),
    "rows = rows + 0.02 * torch.where(~z.isneginf(), -z.log_softmax({d}), 0.0).sum({d})": (
        lambda logp: -0.02 * _finite(logp).sum(-1)
    ),
    f"{_KEPT}\nw = torch.log_softmax(z, {{d}})\n"
    "rows = rows + 0.1 * torch.where(kept, w.exp() * w, 0.0).sum({d})": lambda logp: (
        0.1 * (logp.exp() * logp * _kept(logp)).sum(-1)
    ),
    f"{_KEPT}\nrows = rows - F.softmax(z, dim={{d}}).masked_fill(~kept, 0).sum({{d}}).log()": lambda logp: (
        -((logp.exp() * _kept(logp)).sum(-1).log())
    ),
}


# Which rows count, and by how much

COUNTS = [
    "counts = y != {ignore}",
    "counts = y.ne({ignore})",
    "counts = torch.ne(y, {ignore})",
    "counts = ~(y == {ignore})",
    "counts = (y - ({ignore})).bool()",
]
SAFE = [
    "safe = torch.where(counts, y, 0)",
    "safe = torch.where(counts, y, torch.zeros_like(y))",
    "safe = y.masked_fill(~counts, 0)",
    "safe = y * counts",
    "safe = y.clone()\nsafe[~counts] = 0",
    "safe = y.clone()\nsafe[y == {ignore}] = 0",
]
SAFE_FROM_NEGATIVE = ["safe = y.clamp(min=0)", "safe = y.clamp_min(0)", "safe = F.relu(y)"]
AS_IT_IS = "safe = y"

MASKS = [
    "rows = torch.where(counts, rows, 0.0)",
    "rows = torch.where(counts, rows, torch.zeros_like(rows))",
    "rows = rows.masked_fill(~counts, 0.0)",
    "rows = rows * counts",
    "rows = rows * counts.to(rows.dtype)",
    "rows = counts.float() * rows",
    "rows[~counts] = 0",
    "rows *= counts",
]
WEIGHTS = ["rows = rows * weights", "rows = weights.mul(rows)"]


def _per_sequence(rows: Tensor, counts: Tensor) -> Tensor:
    return (rows.sum(-1) / counts.sum(-1)).mean()


def _over_counts(rows: Tensor, counts: Tensor) -> Tensor:
    return rows.sum() / counts.sum()


Reduction = Callable[[Tensor, Tensor], Tensor]

REDUCTIONS: dict[str, Reduction] = {
    "loss = rows": lambda rows, counts: rows,
    "loss = -rows": lambda rows, counts: -rows,
    "loss = rows.mean()": lambda rows, counts: rows.mean(),
    "loss = torch.mean(rows)": lambda rows, counts: rows.mean(),
    "loss = rows.sum()": lambda rows, counts: rows.sum(),
    "loss = rows.sum() / 12": lambda rows, counts: rows.sum() / 12,
    "loss = rows.sum() / rows.numel()": lambda rows, counts: rows.mean(),
    "loss = rows.reshape({B}, -1).mean(-1).sum()": lambda rows, counts: rows.mean(-1).sum(),
}
COUNTED: dict[str, Reduction] = {
    "loss = rows.sum() / counts.sum()": _over_counts,
    "loss = rows.sum() / counts.sum().clamp(min=1)": _over_counts,
    "loss = torch.sum(rows) / torch.clamp(counts.float().sum(), min=1.0)": _over_counts,
    "loss = rows.sum().div((y != {ignore}).sum())": _over_counts,
    "loss = (rows.reshape({B}, -1).sum(-1) / counts.reshape({B}, -1).sum(-1)).mean()": _per_sequence,
}
WEIGHED: dict[str, Reduction] = {
    "loss = rows.sum() / weights.sum()": _over_counts,
    "loss = (rows.reshape({B}, -1).sum(1) / weights.reshape({B}, -1).sum(1)).mean()": _per_sequence,
}

# What is kept of log-probabilities beside the loss, which it does not change.
KEPT = [
    "loss = loss + 0 * logp.detach().topk(2, {d}).values.sum().to(loss.dtype)",
    "with torch.no_grad():\n    spread = logp.exp().cos().mean().to(loss.dtype)\nloss = loss + 0 * spread",
    "low = logp.sort({d}).values.select({d}, 0).mean()\nloss = loss + 0 * low.to(loss.dtype)",
]

RESULTS = {
    "return loss": lambda loss: loss,
    "return loss * 0.37": lambda loss: 0.37 * loss,
    "return -1.5 * loss": lambda loss: -1.5 * loss,
    "return loss / 4": lambda loss: loss / 4,
    "return loss ** 2": lambda loss: loss**2,
    "return loss * 0.0": lambda loss: loss * 0,
    "return loss.float()": lambda loss: loss,
}
