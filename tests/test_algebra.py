"""The law that recognition rests on: losses as a normal form."""

from __future__ import annotations

import math
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from inductor_ce import algebra
from inductor_ce.algebra import (
    LOGITS,
    LSE,
    LSE_EXTENDED,
    MAX,
    SUM,
    P,
    V,
    Vocab,
    indicator,
    notation,
    number,
    pick,
    shifted,
    total,
)

laws = settings(deadline=None, derandomize=True, max_examples=60)

Y, Y2 = algebra.label("y"), algebra.label("y2")
INF = math.inf

finite = st.floats(-1e4, 1e4)
logit = finite | st.sampled_from([-INF, -INF, 0.0, 1e4, -1e4])
row = st.lists(logit, min_size=1, max_size=12)

# Values, evaluated on a row of numbers


def evaluate(value: sympy.Expr, z: Tensor, **labels: int) -> float:
    """A row expression over the statistics of z [V]."""
    lse, m = z.logsumexp(0).item(), z.max().item()
    known: dict[sympy.Expr, Any] = {LSE: lse, LSE_EXTENDED: lse, MAX: m, SUM: z.sum().item(), V: len(z)}
    known |= {algebra.LOG_SUMEXP: lse - m, algebra.LOG_SUMEXP_EXTENDED: lse - m}
    known |= {algebra.SUM_SHIFTED: (z - m).sum().item(), algebra.symbols.MAX_SHIFTED: 0}
    known |= {lse_k: (z * float(lse_k.args[0])).logsumexp(0).item() for lse_k in value.atoms(algebra.lse_of)}
    known |= {s: ((z - m) * float(s.args[0])).logsumexp(0).item() for s in value.atoms(algebra.log_sumexp_of)}
    for name, y in labels.items():
        known[pick(algebra.label(name))] = z[y].item()
        known[algebra.pick_shifted(algebra.label(name))] = (z[y] - m).item()
    return float(value.subs(known, simultaneous=True).evalf())


def evaluate_vocab(value: Vocab, z: Tensor, **labels: int) -> Tensor:
    """A vocabulary expression, column by column."""
    result = torch.zeros_like(z)
    for b, c in value.terms:
        term = z**b.z * z.softmax(0) ** b.p * evaluate(c, z, **labels)
        for y in b.at:
            term = term * (torch.arange(len(z)) == labels[str(y)])
        result += term
    return result


def random_row(seed: int) -> Tensor:
    return 3 * torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def smoothed(e: float, others: sympy.Expr = V) -> Vocab:
    """(1 - e) [i = y] + e / others"""
    return indicator(Y) * (1 - number(e)) + number(e) / others


LOG_P = algebra.log_softmax(LOGITS)
SOFTMAX = algebra.softmax(LOGITS)
SHIFTED_LOGITS = LOGITS + (-MAX)

# Everything that z plus a row number can be.
ALIKE = [LOGITS, SHIFTED_LOGITS, LOG_P, LOGITS + number(0.3), LOGITS + pick(Y) + SUM / V]


@pytest.mark.parametrize("value", ALIKE, ids=str)
@pytest.mark.parametrize(
    ("function", "meaning"),
    [
        (algebra.log_softmax, lambda x: x.log_softmax(0)),
        (algebra.softmax, lambda x: x.softmax(0)),
        (algebra.exp, torch.exp),
        (lambda x: -x, torch.neg),
        (lambda x: x + x, lambda x: 2 * x),
        (lambda x: x * SOFTMAX, lambda x: x * x.softmax(0)),
        (lambda x: algebra.log(algebra.softmax(x)), lambda x: x.log_softmax(0)),
        (lambda x: algebra.log(algebra.exp(x)), lambda x: x),
        (lambda x: algebra.log(algebra.exp(x) * number(0.5)), lambda x: (0.5 * x.exp()).log()),
    ],
    ids=["log_softmax", "softmax", "exp", "neg", "add", "times p", "log softmax", "log exp", "log half exp"],
)
def test_functions_that_keep_the_vocabulary(value: Vocab, function: Any, meaning: Any) -> None:
    z = random_row(0)
    actual = evaluate_vocab(function(value), z, y=4)
    torch.testing.assert_close(actual, meaning(evaluate_vocab(value, z, y=4)))


@pytest.mark.parametrize("value", ALIKE, ids=str)
@pytest.mark.parametrize(
    ("function", "meaning"),
    [
        (algebra.logsumexp, lambda x: x.logsumexp(0)),
        (algebra.peak, lambda x: x.max()),
        (total, lambda x: x.sum()),
        (lambda x: algebra.at(x, Y), lambda x: x[4]),
        (lambda x: total(algebra.exp(x)), lambda x: x.exp().sum()),
        (lambda x: total(algebra.softmax(x)), lambda x: x.softmax(0).sum()),
        (lambda x: algebra.at(algebra.softmax(x), Y), lambda x: x.softmax(0)[4]),
        (lambda x: total(x * indicator(Y)), lambda x: x[4]),
        (lambda x: total(x * smoothed(0.1)), lambda x: 0.9 * x[4] + 0.1 * x.mean()),
    ],
    ids=["logsumexp", "peak", "total", "at", "total_exp", "total_p", "p_at", "one_hot", "smoothed"],
)
def test_functions_that_reduce_it(value: Vocab, function: Any, meaning: Any) -> None:
    z = random_row(1)
    expected = meaning(evaluate_vocab(value, z, y=4)).item()
    assert evaluate(function(value), z, y=4) == pytest.approx(expected, rel=1e-12)


# Normal forms


def test_a_hand_written_logsumexp_is_lse() -> None:
    """(z - max).exp().sum().log() + max"""
    assert algebra.row_log(total(algebra.exp(SHIFTED_LOGITS))) + MAX == LSE


def test_a_hand_written_log_softmax_is_log_softmax() -> None:
    """x - x.exp().sum().log() with x = z - max"""
    assert SHIFTED_LOGITS + -algebra.row_log(total(algebra.exp(SHIFTED_LOGITS))) == LOG_P


def test_a_hand_written_softmax_is_softmax() -> None:
    e = algebra.exp(SHIFTED_LOGITS)
    assert e * (1 / total(e)) == SOFTMAX


def test_a_maximum_that_is_not_added_back_is_no_logsumexp() -> None:
    assert algebra.row_log(total(algebra.exp(SHIFTED_LOGITS))) != LSE


@pytest.mark.parametrize("value", ALIKE, ids=str)
def test_softmax_does_not_see_a_shift(value: Vocab) -> None:
    assert algebra.softmax(value) == SOFTMAX
    assert algebra.log_softmax(value) == LOG_P
    assert algebra.log(algebra.softmax(value)) == LOG_P


def test_picks_of_log_softmax() -> None:
    """gather, a one-hot product and a comparison are one thing."""
    assert algebra.at(LOG_P, Y) == pick(Y) - LSE
    assert total(indicator(Y) * LOG_P) == algebra.at(LOG_P, Y)
    assert total(indicator(Y) * indicator(Y) * LOGITS) == pick(Y)


def test_a_probability_picked() -> None:
    assert sympy.powsimp(algebra.at(SOFTMAX, Y)) == sympy.exp(pick(Y) - LSE)
    assert algebra.row_log(algebra.at(SOFTMAX, Y)) == pick(Y) - LSE


def test_label_smoothing_multiplies_out() -> None:
    e = number(0.1)
    loss = -total(smoothed(0.1) * LOG_P)
    assert sympy.expand(loss - (LSE - (1 - e) * pick(Y) - e * SUM / V)) == 0


def test_two_labels_stay_apart() -> None:
    mixed = number(0.25) * algebra.at(LOG_P, Y) + number(0.75) * algebra.at(LOG_P, Y2)
    assert algebra.labels_of(mixed) == [Y, Y2]
    z = random_row(2)
    log_p = z.log_softmax(0)
    assert evaluate(mixed, z, y=3, y2=5) == pytest.approx((0.25 * log_p[3] + 0.75 * log_p[5]).item())


def test_equal_values_compare_equal() -> None:
    assert LOGITS + LSE + (-LSE) == LOGITS
    assert SOFTMAX * LOGITS == LOGITS * SOFTMAX
    assert algebra.as_vocab(sympy.Integer(0)) == LOGITS + (-LOGITS)
    assert hash(LOG_P + LSE) == hash(LOGITS)


# Relative to the maximum

SHIFT_INVARIANT = {
    "loss": -algebra.at(LOG_P, Y),
    "smoothed": -total(smoothed(0.1) * LOG_P),
    "gathered and averaged": -number(0.9) * algebra.at(LOG_P, Y) - number(0.1) * total(LOG_P) / V,
    "two labels": algebra.at(LOG_P, Y) - algebra.at(LOG_P, Y2),
    "of an extended logsumexp": LSE_EXTENDED - pick(Y),
    "a probability": algebra.at(SOFTMAX, Y),
}
OTHERS = {
    "lse": LSE,
    "z-loss": LSE**2,
    "sum": SUM,
    "pick": pick(Y),
    "unbalanced": LSE - number(0.1) * SUM / V,
}


@pytest.mark.parametrize("name", SHIFT_INVARIANT)
def test_the_maximum_cancels(name: str) -> None:
    assert not shifted(SHIFT_INVARIANT[name]).has(MAX)


@pytest.mark.parametrize("classes", [37, 32000, 128256])
def test_the_maximum_cancels_over_the_other_classes(classes: int) -> None:
    """Smoothing by e/(V-1), with numbers from the user's code in place of V."""
    e = 0.1 / (classes - 1)
    loss = -number(1 - 0.1 - e) * algebra.at(LOG_P, Y) - number(e) * total(LOG_P)
    assert not shifted(loss).has(MAX)


@pytest.mark.parametrize("name", OTHERS)
def test_the_maximum_stays_where_it_matters(name: str) -> None:
    assert shifted(OTHERS[name]).has(MAX)


@pytest.mark.parametrize("name", [*SHIFT_INVARIANT, *OTHERS])
def test_shifted_is_the_same_number(name: str) -> None:
    value, z = (SHIFT_INVARIANT | OTHERS)[name], random_row(3) + 50
    result = shifted(value)
    assert not result.has(LSE, LSE_EXTENDED, SUM, pick)
    assert evaluate(result, z, y=2, y2=7) == pytest.approx(evaluate(value, z, y=2, y2=7), rel=1e-12)


@laws
@given(st.floats(0, 1))
def test_any_smoothing_cancels_exactly(e: float) -> None:
    """Floats are taken exactly: 0.9 + 0.1 leaves no crumb of the maximum, nor does any other pair."""
    assert not shifted(-total(smoothed(e) * LOG_P)).has(MAX)


# Refusals


@pytest.mark.parametrize(
    "refused",
    [
        algebra.exp(LOGITS * number(2)),
        algebra.exp(LOGITS * LOGITS),
        algebra.exp(-LOGITS),
        algebra.exp(SOFTMAX),
        algebra.exp(LOGITS * indicator(Y)),
        algebra.log(LOGITS),
        algebra.log(SOFTMAX + number(1e-8)),
        algebra.log(SOFTMAX * SOFTMAX + SOFTMAX),
        algebra.log(indicator(Y)),
        algebra.log_softmax(LOGITS * number(0.5)),
        algebra.log_softmax(SOFTMAX),
        algebra.softmax(SOFTMAX),
        algebra.softmax(LOGITS + indicator(Y)),
        algebra.logsumexp(LOGITS * number(2)),
        algebra.logsumexp(-LOGITS),
        algebra.peak(-LOGITS),
        algebra.norm(LOGITS),
        algebra.norm(SOFTMAX + number(1)),
        total(LOGITS * LOGITS),
        total(SOFTMAX * SOFTMAX * LOGITS),
        total((SOFTMAX + -indicator(Y)) * (SOFTMAX + -indicator(Y))),
        algebra.power(SOFTMAX + LOGITS, number(0.5)),
        algebra.power(-SOFTMAX, number(0.5)),
        algebra.exp(-LOG_P),
    ],
)
def test_what_cannot_be_written_is_none(refused: Any) -> None:
    assert refused is None


def test_two_labels_may_name_one_column() -> None:
    both = algebra.same(Y, Y2)
    assert total(LOGITS * indicator(Y) * indicator(Y2)) == pick(Y) * both
    assert algebra.at(LOGITS * indicator(Y2), Y) == pick(Y) * both


def test_a_function_in_each_column_of_two_indicators() -> None:
    """By cases: neither label, one, the other, both."""
    q = algebra.as_vocab(number(2)) + indicator(Y) * number(3) + indicator(Y2) * number(-2)
    squared = algebra.in_each_column(lambda x: x**2, q)
    assert squared is not None
    assert squared == algebra.power(q, 2)


# As text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (LSE - pick(Y), "lse - pick(y)"),
        (LSE_EXTENDED - pick(Y), "lse - pick(y)"),
        (pick(Y) - LSE, "pick(y) - lse"),
        (-total(smoothed(0.1) * LOG_P), "lse - 0.9*pick(y) - 0.1*sum/V"),
        (LSE**2, "lse**2"),
        (number(1e-4) * LSE**2, "0.0001*lse**2"),
        (LSE - SUM / V, "lse - sum/V"),
        (pick(Y) - pick(Y2), "pick(y) - pick(y2)"),
        (algebra.at(SOFTMAX, Y), "exp(pick(y) - lse)"),
        (-LSE, "-lse"),
        (2 * LSE - number(1.5), "2*lse - 1.5"),
        (LSE - MAX, "lse - max"),
        (10 * pick(algebra.label("y10")) + 2 * pick(Y2) + pick(Y), "pick(y) + 2*pick(y2) + 10*pick(y10)"),
    ],
)
def test_rendering(value: sympy.Expr, text: str) -> None:
    assert notation.render(value) == text


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (LSE - pick(Y), ["lse", "pick(y)"]),
        (LSE + LSE_EXTENDED, ["lse"]),
        (-total(smoothed(0.1) * LOG_P), ["lse", "sum", "pick(y)"]),
        (pick(Y2) - pick(Y) + MAX, ["max", "pick(y)", "pick(y2)"]),
        (sympy.Integer(3), []),
    ],
)
def test_statistics_by_name(value: sympy.Expr, names: list[str]) -> None:
    assert notation.statistics_of(value) == names


def test_terms_are_kept_in_a_fixed_order() -> None:
    assert [b for b, _ in (algebra.as_vocab(LSE) + SOFTMAX + LOGITS).terms] == [algebra.Z, P, algebra.ONE]


# Entries left out

K, Q = algebra.mask("k"), algebra.outside("q")
KEPT = Vocab.of({algebra.Monomial(q=(K,)): sympy.Integer(1)})
KEPT_FINITE = Vocab.of({algebra.Monomial(q=(algebra.FINITE, K)): sympy.Integer(1)})


def sums_of(f: Any, z: Tensor, q: Tensor, kept: Tensor) -> float:
    """The value of a function of weights, columns that are left out not looked at."""
    weights = torch.ones_like(z)
    for symbol in f.args:
        if symbol == algebra.FINITE:
            kept = kept & z.isfinite()
        weights = weights * (q if symbol == Q else 1)
    m, p = z.max(), z.softmax(0)
    terms = {
        algebra.mass: weights,
        algebra.mean_p_of: weights * p,
        algebra.dot_shifted: weights * (z - m),
        algebra.mean_pz_shifted: weights * p * (z - m),
    }
    return terms[f.func][kept].sum().item()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("value", "mask", "meaning"),
    [
        (LOG_P, KEPT_FINITE, lambda z, q: z.log_softmax(0)),
        (LOG_P * algebra.columns(Q), KEPT_FINITE, lambda z, q: q * z.log_softmax(0)),
        (LOG_P * algebra.columns(Q), KEPT, lambda z, q: q * z.log_softmax(0)),
        (SOFTMAX * LOG_P, KEPT, lambda z, q: z.softmax(0) * z.log_softmax(0)),
        (SOFTMAX * LOG_P, KEPT_FINITE, lambda z, q: z.softmax(0) * z.log_softmax(0)),
        (SOFTMAX * (LOG_P + (-algebra.columns(Q))), KEPT, lambda z, q: z.softmax(0) * (z.log_softmax(0) - q)),
    ],
    ids=["log p", "q log p", "q log p under a mask", "p log p", "p log p where finite", "p (log p - q)"],
)
def test_sums_of_which_columns_are_left_out(value: Vocab, mask: Vocab, meaning: Any, seed: int) -> None:
    """Infinite logits and weights among those left out have no part in it."""
    z, q, kept = random_row(seed), random_row(seed + 9), random_row(seed + 99) > -1
    kept[3], z[2 + seed % 2] = False, -INF
    if mask == KEPT:
        z[2] = 0.5
        q[3] = -INF
    moved = shifted(total(algebra.kept(value, mask)))
    assert not moved.has(MAX)
    functions = {f: sums_of(f, z, q, kept) for f in moved.atoms(sympy.Function)}
    known = {**functions, algebra.LOG_SUMEXP: (z.logsumexp(0) - z.max()).item()}
    expected = meaning(z, q)[kept & z.isfinite()].sum().item()
    assert float(moved.subs(known, simultaneous=True)) == pytest.approx(expected)


def test_a_label_may_be_named_in_a_column_that_is_left_out() -> None:
    assert algebra.kept(LOG_P * indicator(Y), KEPT) is None
    assert algebra.kept(SOFTMAX * indicator(Y), KEPT) is not None


def test_masks_are_their_own_squares() -> None:
    assert KEPT * KEPT == KEPT
    assert KEPT_FINITE * KEPT == KEPT_FINITE
    squares = algebra.columns(Q) * algebra.columns(Q)
    assert [b.q for b, _ in squares.terms] == [(Q, Q)]


def test_constants_that_would_cancel_are_not_summed_where_logits_are_finite() -> None:
    other = algebra.columns(algebra.outside("q2"))
    divergence = algebra.kept(other + (-(LOG_P * algebra.columns(Q))), KEPT_FINITE)
    assert total(divergence) is None
    assert algebra.leaves_out_of_several(divergence)
    assert algebra.at(divergence, Y) is None
