"""Divergences between sets of logits, and sums of entries: the operators, beside the two of the waist.

    divergence(zs [N, V], ms S x [N], ds (S + R) x [N], which)                  -> [1 + K + C + 2 S + R, N]
    divergence_grad(zs, ms, packed [1 + K + C + 2 S + R, N], upstream [N], which) -> dz of the sides wanted

`which` is a `Divergence` of `algebra/divergences.py`, or an `Entries` of `algebra/entries.py`, as text; the
formulas are there. The first S of `zs` are the logits of the sides; tensors that `Entries` name follow. The
normalisers of each side, its maximum m and d = sum_i exp(z_i - m), are those that `row_stats` gives, so a
cross entropy of the same logits has them for nothing. Behind the d are the numbers of rows that `Entries`
name; those that move, which alone of all rows have a gradient, come first. The rows of the first result are
the value, for each gradient that needs one, or is one, a sum over the classes, of each side log d and 1 / d,
and the numbers: with m, all that the backward reads of a row.

They are lowered to Inductor's own loops: one reads all sides and makes all sums, one all gradients. For an
entry each has one exp a side and one log a mixture, and a division where a mixture weighs otherwise than the
divergence does.

NOTE Probabilities of 0
p log x is 0 where p is 0, as the limit is, also where the logits are -inf, and where exp gives 0 for what is
below the smallest number. So log m may be taken of the sum of the w p: it is -inf only where all p of the
mixture are 0, and none but these weigh it. Where some are 0 by underflow only, the error is of that size.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ..algebra.divergences import Divergence
from ..algebra.entries import Entries
from ..common.errors import DerivativeError
from . import entries
from .arithmetic import Arithmetic, Normalised, Operands, Tensors

T = TypeVar("T")


def encode(formula: Divergence | Entries) -> str:
    """A formula as the argument `which` of the operators."""
    return json.dumps(tuple(formula))


@functools.lru_cache(maxsize=256)
def decode(which: str) -> Divergence | Entries:
    """What `encode` has made text of."""
    fields = _tuples(json.loads(which))
    return Entries(*fields) if len(fields) == len(Entries._fields) else Divergence(*fields)


def _tuples(x: Any) -> Any:
    return tuple(map(_tuples, x)) if isinstance(x, list) else x


class _Weighed(Generic[T]):
    """What an entry of each side has: its probability p, and L, the sum of the logarithms that it weighs."""

    def __init__(self, do: Arithmetic[T], which: Divergence, sides: Sequence[Normalised[T]]):
        self.do, self.which, self._sides = do, which, sides
        self.a, self.p = zip(*(side.logarithm_and_probability(do) for side in sides), strict=True)
        self.m = [self._sum(zip(w, self.p, strict=True)) for w in which.mixtures]
        self.logs = [do.log(m) for m in self.m]

    def _sum(self, terms: Iterable[tuple[float, T]], constant: float = 0.0) -> T:
        """sum of c x, of which there is at least one, and a constant; a factor of all comes last."""
        kept = sorted(((c, x) for c, x in terms if c), key=lambda term: term[0] < 0)
        scale = abs(kept[0][0]) if len({abs(c) for c, _ in kept}) == 1 else 1.0
        result = self._times(kept[0][1], kept[0][0] / scale)
        for c, x in kept[1:]:
            term = self._times(x, abs(c) / scale)
            result = self.do.sub(result, term) if c < 0 else self.do.add(result, term)
        return self._times(self.do.add(result, constant / scale) if constant else result, scale)

    def _times(self, x: T, c: float) -> T:
        return x if c == 1 else self.do.mul(x, c)

    def terms(self, u: int) -> T | None:
        """L_u; None for 0."""
        which = self.which
        pairs = [*zip(which.logs[u], self.a, strict=True), *zip(which.mixed[u], self.logs, strict=True)]
        if not any(which.mixed[u]) and (between := _difference(which.logs[u])) is not None:
            c, s, t = between
            pairs = [(c, self._sides[s].log_ratio(self.do, self._sides[t]))]
        return self._sum(pairs, which.constants[u]) if which.has_terms(u) else None

    def value(self, u: int) -> T | None:
        """p_u L_u"""
        terms = self.terms(u)
        return None if terms is None else self.do.unless_zero(self.p[u], self.do.mul(self.p[u], terms))

    def shares(self, u: int) -> T | None:
        """sum_k w_ku p_u T_k / m_k, without those k for which it is a multiple of p_u."""
        do, which = self.do, self.which
        parts = []
        for k in which.shares(u):
            weighed = self._sum((which.mixed[s][k], self.p[s]) for s in which.sides)
            parts.append(do.mul(do.div(do.mul(self.p[u], which.mixtures[k][u]), self.m[k]), weighed))
        return do.unless_zero(self.p[u], _added(do, parts)) if parts else None

    def gradient(self, u: int, total: T | None) -> T:
        """Of side u, of whose sum over the classes `total` is, for an upstream gradient of 1."""
        do, which = self.do, self.which
        parts: list[T] = []
        if total is not None:
            terms, total = self.terms(u), do.over_classes(total)
            gap = do.mul(total, -1.0) if terms is None else do.sub(terms, total)
            parts.append(do.unless_zero(self.p[u], do.mul(self.p[u], gap)))
        shares = self.shares(u)
        parts += [] if shares is None else [shares]
        parts += [
            do.mul(do.sub(self.p[s], self.p[u]), which.logs[s][u])
            for s in which.sides
            if s != u and which.logs[s][u]
        ]
        return _added(do, parts) if parts else do.mul(self.p[u], 0.0)


def _difference(logs: Sequence[float]) -> tuple[float, int, int] | None:
    """(c, s, t) where a sum of logarithms is c log p_s - c log p_t."""
    weighed = sorted((-c, s) for s, c in enumerate(logs) if c)
    if len(weighed) != 2 or weighed[0][0] != -weighed[1][0]:
        return None
    (c, s), (_, t) = weighed
    return -c, s, t


def _sums(do: Arithmetic[T], which: Divergence, sides: Sequence[Normalised[T]]) -> list[T]:
    weighed = _Weighed(do, which, sides)
    values = {u: x for u in which.sides if (x := weighed.value(u)) is not None}
    totals = [do.total(_added(do, values.values()))]
    for u in which.summed:
        parts = [x for x in (values.get(u), weighed.shares(u)) if x is not None]
        totals.append(do.total(_added(do, parts)))
    return totals


def _added(do: Arithmetic[T], terms: Iterable[T]) -> T:
    first, *others = terms
    return functools.reduce(do.add, others, first)


def _gradients(
    do: Arithmetic[T], which: Divergence, sides: Sequence[Normalised[T]], totals: Sequence[T]
) -> list[T]:
    weighed, of_side = _Weighed(do, which, sides), dict(zip(which.summed, totals, strict=True))
    return [weighed.gradient(u, of_side.get(u)) for u in which.wanted]


def sums(do: Arithmetic[T], which: Divergence | Entries, given: Operands[T]) -> list[T]:
    """The rows that `divergence` packs."""
    if isinstance(which, Entries):
        totals = entries.sums(do, which, given)
    else:
        totals = _sums(do, which, given.sides)
    return [*totals, *(row for side in given.sides for row in (side.logd, side.scale)), *given.numbers]


def gradients(
    do: Arithmetic[T],
    which: Divergence | Entries,
    zs: Sequence[T],
    ms: Sequence[T],
    packed: Sequence[T],
    upstream: T,
) -> list[T]:
    """Those of the sides that are wanted, in the dtype in which they are computed."""
    first = 1 + len(which.summed)
    logits, tensors = zs[: len(ms)], zs[len(ms) :]
    beside = packed[first + _n_moving(which) :]
    of_sides, numbers = beside[: 2 * len(ms)], beside[2 * len(ms) :]
    logds, scales = of_sides[::2], of_sides[1::2]
    sides = [Normalised(*rows) for rows in zip(logits, ms, logds, scales, strict=True)]
    if isinstance(which, Entries):
        made = entries.gradients(do, which, Operands(sides, tensors, numbers), packed[1:first])
    else:
        made = _gradients(do, which, sides, packed[1:first])
    up = do.over_classes(upstream)
    return [do.mul(dz, up) for dz in made]


def _n_numbers(which: Divergence | Entries) -> int:
    return which.n_numbers if isinstance(which, Entries) else 0


def _n_moving(which: Divergence | Entries) -> int:
    return which.n_moving if isinstance(which, Entries) else 0


def computed_in(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """float64 where any of the logits are, or what is beside them, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _check(
    zs: list[Tensor], which: str, ms: list[Tensor], ds: list[Tensor] | None = None
) -> Divergence | Entries:
    formula = decode(which)
    n_sides, n_tensors = len(formula.sides), formula.n_tensors if isinstance(formula, Entries) else 0
    if len(zs) != n_sides + n_tensors or len(ms) != n_sides:
        beside = f" and {n_tensors} tensors" * (n_tensors > 0)
        raise ValueError(f"{len(zs)} sets of logits for {n_sides} sides{beside}")
    if ds is not None and len(ds) != n_sides + _n_numbers(formula):
        raise ValueError(f"{len(ds)} rows for {n_sides} sides and {_n_numbers(formula)} numbers")
    for z in zs:
        if z.dim() != 2 or z.shape[1] != zs[0].shape[1]:
            raise ValueError(f"logits and tensors must be [N, V], got {tuple(z.shape)}")
    for z in zs[:n_sides]:
        if not z.is_floating_point():
            raise ValueError(f"logits must be floating point, got {z.dtype}")
    for x in (*zs, *ms, *(ds or ())):
        torch._check(x.shape[0] == zs[0].shape[0], lambda: "the sides differ in N")
    return formula


def _wide(tensors: Sequence[Tensor], zs: list[Tensor], rows: list[Tensor]) -> list[Tensor]:
    """In the dtype in which they are computed, but for what is true or false."""
    dtype = computed_in([x.dtype for x in (*zs, *rows)])
    return [tensor if tensor.dtype == torch.bool else tensor.to(dtype) for tensor in tensors]


@torch.library.custom_op("inductor_ce::divergence", mutates_args=())
def divergence(zs: list[Tensor], ms: list[Tensor], ds: list[Tensor], which: str) -> Tensor:
    """The value of a divergence and what its gradients need of each row, [1 + K + C + 2 S + R, N].

    Args:
        zs: the logits of each side, [N, V], and then the tensors of `Entries`, [N, V].
        ms, ds: of each side the maximum of each row, and the sum of exp(z - max), [N]; behind the sums the
            numbers of `Entries`, [N], of which those that move have a gradient.
        which: an encoded `Divergence` or `Entries`, see `encode`.

    Returns:
        float64 if any of `zs`, or of the numbers, are, else float32. Only the value has a gradient.

    Raises:
        ValueError: the sides or tensors differ in number or in V.
    """
    checked = _check(zs, which, ms, ds)
    wide, m, d = (_wide(each, zs, ds[len(ms) :]) for each in (zs, ms, ds))
    sides = [Normalised(z, m, d.log(), 1 / d) for z, m, d in zip(wide, m, d, strict=False)]
    return torch.stack(sums(Tensors, checked, Operands(sides, wide[len(ms) :], d[len(ms) :])))


@divergence.register_fake
def _(zs: list[Tensor], ms: list[Tensor], ds: list[Tensor], which: str) -> Tensor:
    checked = _check(zs, which, ms, ds)
    dtype = computed_in([x.dtype for x in (*zs, *ds[len(ms) :])])
    n = 1 + len(checked.summed) + _n_moving(checked) + 2 * len(ms) + _n_numbers(checked)
    return zs[0].new_empty((n, zs[0].shape[0]), dtype=dtype)


@torch.library.custom_op("inductor_ce::divergence_grad", mutates_args=())
def divergence_grad(
    zs: list[Tensor], ms: list[Tensor], packed: Tensor, upstream: Tensor, which: str
) -> list[Tensor]:
    """The gradients with respect to the logits of the sides that are wanted, each in the dtype of those.

    Args:
        zs, ms, which: as for `divergence`, whose result `packed` is.
        upstream: the gradient of the value, [N].
    """
    checked = _check(zs, which, ms)
    z, m, (up,) = (_wide(each, zs, [packed]) for each in (zs, ms, [upstream]))
    made = gradients(Tensors, checked, z, m, packed.unbind(0), up)
    return [dz.to(zs[u].dtype).contiguous() for u, dz in zip(checked.wanted, made, strict=True)]


@divergence_grad.register_fake
def _(zs: list[Tensor], ms: list[Tensor], packed: Tensor, upstream: Tensor, which: str) -> list[Tensor]:
    return [zs[u].new_empty(zs[u].shape) for u in _check(zs, which, ms).wanted]


def _save_for_grad(ctx, inputs, output) -> None:
    zs, ms, ds, ctx.which = inputs
    ctx.n_sides, ctx.dtypes = len(ms), [number.dtype for number in ds[len(ms) :]]
    ctx.save_for_backward(*ms, *zs, output)


def _backward(ctx, upstream: Tensor):
    *saved, packed = ctx.saved_tensors
    n = ctx.n_sides
    zs = saved[n:]
    decoded = decode(ctx.which)
    made = divergence_grad(zs, saved[:n], packed, upstream[0], ctx.which) if decoded.wanted else []
    of_side = dict(zip(decoded.wanted, made, strict=True))
    first = 1 + len(decoded.summed)
    moving = ctx.dtypes[: _n_moving(decoded)]
    numbers = [(upstream[0] * packed[first + k]).to(dtype) for k, dtype in enumerate(moving)]
    of_rows = [*[None] * n, *numbers, *[None] * (len(ctx.dtypes) - len(moving))]
    return [of_side.get(u) for u in range(len(zs))], [None] * n, of_rows, None


def _no_second_derivative(ctx, *upstream):
    raise DerivativeError(
        "A divergence of inductor_ce has no second derivative: compile it without inductor_ce where the "
        "gradient of a gradient is wanted."
    )


def _no_batches(info, in_dims, *args, **kwargs):
    raise DerivativeError(
        "A divergence of inductor_ce cannot run under torch.vmap: compile it without inductor_ce there."
    )


divergence.register_autograd(_backward, setup_context=_save_for_grad)
divergence_grad.register_autograd(_no_second_derivative)
divergence.register_vmap(_no_batches)
divergence_grad.register_vmap(_no_batches)

# The form in which graphs hold the operators.
DIVERGENCE = torch.ops.inductor_ce.divergence.default
DIVERGENCE_GRAD = torch.ops.inductor_ce.divergence_grad.default
