"""Sums weighed by tensors from outside: the rows that hold them, and what becomes of what is left out."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable

import sympy
import torch
from torch.fx import Node

from .. import algebra, ops
from ..graph.builder import Builder
from ..ops.table import Statistic

Product = tuple[sympy.Symbol, ...]

# d; where it is multiplied by exp(max).
SUMEXP = sympy.Symbol("d", real=True)
SUMEXP_EXTENDED = sympy.Symbol("sumexp", extended_real=True)
sumexpdot = sympy.Function("sumexpdot", real=True)  # of a weight: sum_i q_i exp(z_i - max)

# The functions of a product of weights whose sums need the logits.
WEIGHED = (algebra.dot_shifted, algebra.mean_p_of, algebra.mean_pz_shifted)


def rows_of(product: Product, of_rows: bool) -> list[tuple[Statistic, Callable[..., sympy.Expr]]]:
    """The rows that hold the sums weighed by a product, and the functions that they are.

    What is `of_rows` has another mass in each row.
    """
    if algebra.FINITE in product:
        first = [(ops.KEPT_DOT, algebra.dot_shifted), (ops.KEPT_MASS, algebra.mass)]
        return [*first, (ops.KEPT_EXPDOT, algebra.mean_p_of), (ops.EXPZDOT, algebra.mean_pz_shifted)]
    dots = [] if has_masks(product) else [(ops.DOT, algebra.dot_shifted)]
    masses = [(ops.MASS, algebra.mass)] if of_rows else []
    return [*dots, *masses, (ops.EXPDOT, algebra.mean_p_of), (ops.EXPZDOT, algebra.mean_pz_shifted)]


def has_masks(product: Product) -> bool:
    """Whether masks that the user brings along are all that tells of columns that they are left out.

    NOTE Left out, and infinite
    A logit may be -inf where a mask leaves it out, and 0 times that is NaN. So the weight of bare logits is
    NaN there, for a row that does not look at such columns; and a NaN among the weights themselves comes into
    the loss by their mass, which every such sum has beside it, times the normaliser.
    """
    return algebra.FINITE not in product and any(map(algebra.is_mask, product))


def is_of_masks(product: Product) -> bool:
    """Whether a product is made of masks that the user brings along, and of nothing else."""
    return algebra.FINITE not in product and all(map(algebra.is_mask, product))


def weight_of(
    build: Builder, product: Product, flat: Callable[[sympy.Symbol], Node], left_out: float
) -> Node:
    """The product of tensors, `left_out` where masks among them leave a column out; of masks alone a mask."""
    masks = [flat(q) for q in product if algebra.is_mask(q) and q != algebra.FINITE]
    others = [flat(q) for q in product if not algebra.is_mask(q)]
    weight = functools.reduce(functools.partial(build, torch.mul), others) if others else None
    if not masks and weight is not None:
        return weight
    kept = functools.reduce(functools.partial(build, torch.logical_and), masks)
    if weight is None and left_out == 0:
        return kept
    return build(torch.where, kept, 1.0 if weight is None else weight, left_out)


def by_masks(moved: sympy.Expr) -> dict[Product, sympy.Expr]:
    """The parts of a shifted expression by the masks of their sums, those without any under ().

    NOTE Rows of which nothing is kept
    Torch's sum of what a mask left out is 0, in a row of -inf too, where all log-probabilities are NaN, and
    nothing of what comes after reaches a column by it, be it infinite as the gradient of a logarithm of 0 is.
    So a part is the constant 0 in a row where its masks keep no column.
    """
    parts: dict[Product, sympy.Expr] = defaultdict(lambda: sympy.Integer(0))
    for term in sympy.Add.make_args(moved):
        factors = [f for f in sympy.Mul.make_args(term) if f.func in (*WEIGHED, algebra.mass)]
        masks = {tuple(q for q in f.args if algebra.is_mask(q)) for f in factors}
        parts[masks.pop() if len(masks) == 1 else ()] += term
    return dict(parts)


def with_sums(moved: sympy.Expr) -> sympy.Expr:
    """A shifted expression with exp(max) d for exp(max + log d), whose digits no logarithm loses."""

    def is_sum(e: sympy.Basic) -> bool:
        return isinstance(e, sympy.exp) and algebra.LOG_SUMEXP in sympy.Add.make_args(e.args[0])

    def product(e: sympy.Expr) -> sympy.Expr:
        others = e.args[0] - algebra.LOG_SUMEXP
        return sympy.exp(others) * (SUMEXP_EXTENDED if others.has(algebra.MAX) else SUMEXP)

    for f in moved.atoms(algebra.mean_p_of):
        moved = moved.replace(is_sum, product).subs(SUMEXP_EXTENDED * f, sumexpdot(*f.args))
    return moved.replace(is_sum, product)
