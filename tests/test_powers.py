"""Sums over powers of probabilities, sum_i p_i^k, through every part: algebra, operators, law, heads, code.

Each is exp(lse(k) - k lse), with one statistic more, and as near to float64 as eager is; what would cancel
beside a target is left as written.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import head_cases
import kernel_reference
import pytest
import reference
import torch
import torch.nn.functional as F
from gpu_codegen import generate, interpret
from harness import compile_with_codegen, compile_without_codegen, misses, sites
from head_cases import BUDGETS
from pairwise import EVERYTHING, in_turns
from reference import assert_as_fair, measure
from sympy import sympify
from test_algebra import LOG_P, evaluate, random_row
from test_head import check as check_head
from torch import Tensor
from torch.autograd import gradcheck

import inductor_ce
from inductor_ce import algebra, ops
from inductor_ce.algebra import LOGITS, LSE, notation, number
from inductor_ce.common.findings import Reason
from inductor_ce.ops import lowering

N, V = 9, 70
ORDERS = (0.5, 1.5, 2.0, 3.0)
POWERS = [f"sumexp^{k:g}" for k in ORDERS]
EVERY = kernel_reference.rows(1, "sum", "sumexpz", *POWERS, "expdot:0")


def logits(dtype: torch.dtype = torch.float32, scale: float = 2.0) -> Tensor:
    return (scale * torch.randn(N, V)).to(dtype)


def log_p(z: Tensor) -> Tensor:
    return z - reference.log_sum_exp(z)[..., None]


def mass(z: Tensor, k: float) -> Tensor:
    """sum_i p_i^k"""
    return (k * log_p(z)).exp().sum(-1)


# Spellings, each with its formula


def collision(z: Tensor) -> Tensor:
    return -torch.log((F.softmax(z, dim=1) ** 2).sum(dim=1))


def gini(z: Tensor) -> Tensor:
    p = torch.softmax(z, -1)
    return 1 - (p * p).sum(-1)


def gini_in_the_sum(z: Tensor) -> Tensor:
    p = z.softmax(-1)
    return torch.sum(p * (1 - p), dim=-1)


def tsallis(z: Tensor) -> Tensor:
    return (1 - torch.softmax(z, -1).pow(1.5).sum(-1)) / (1.5 - 1)


def square_roots(z: Tensor) -> Tensor:
    return z.softmax(-1).sqrt().sum(-1)


def renyi(z: Tensor) -> Tensor:
    return torch.logsumexp(3.0 * z.log_softmax(-1), -1) / (1 - 3.0)


def renyi_by_exp(z: Tensor) -> Tensor:
    return torch.log(torch.exp(z.log_softmax(-1) * 0.7).sum(-1)) / (1 - 0.7)


def polynomial(z: Tensor) -> Tensor:
    p = z.softmax(1)
    return (p - 0.5 * p**3 - p**2 / 4).sum(1)


def effective_samples(z: Tensor) -> Tensor:
    w = torch.exp(z - z.amax(-1, keepdim=True).detach())
    return w.sum(-1) ** 2 / (w**2).sum(-1)


def norm(z: Tensor) -> Tensor:
    return z.softmax(-1).norm(dim=-1)


def norm_by_linalg(z: Tensor) -> Tensor:
    return (2 * z.softmax(-1)).pow(1.5).norm(2, -1) + torch.linalg.vector_norm(
        z.softmax(-1), ord=2, dim=(-1,)
    )


SPELLINGS: dict[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] = {
    collision: lambda z: -mass(z, 2).log(),
    gini: lambda z: 1 - mass(z, 2),
    gini_in_the_sum: lambda z: 1 - mass(z, 2),
    tsallis: lambda z: 2 - 2 * mass(z, 1.5),
    square_roots: lambda z: mass(z, 0.5),
    renyi: lambda z: mass(z, 3).log() / -2,
    renyi_by_exp: lambda z: mass(z, 0.7).log() / 0.3,
    polynomial: lambda z: 1 - mass(z, 3) / 2 - mass(z, 2) / 4,
    effective_samples: lambda z: 1 / mass(z, 2),
    norm: lambda z: mass(z, 2).sqrt(),
    norm_by_linalg: lambda z: 2**1.5 * mass(z, 3).sqrt() + mass(z, 2).sqrt(),
}


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize(("f", "dtype"), in_turns([*SPELLINGS], DTYPES))
def test_spelling(f: Callable[[Tensor], Tensor], dtype: torch.dtype):
    z, upstream = logits(dtype), torch.randn(N)
    compiled, graphs = compile_without_codegen(f)
    ours = measure(compiled, z, upstream=upstream)
    exact = measure(SPELLINGS[f], z.double(), upstream=upstream)
    assert_as_fair(ours, measure(f, z, upstream=upstream), exact)
    assert (sites(), misses(), graphs.count(ops.ROW_STATS)) == (1, 0, 1)


@pytest.mark.in_turns
@pytest.mark.parametrize("scale", [10.0, 0.3])
@pytest.mark.parametrize("f", [collision, tsallis, renyi], ids=lambda f: f.__name__)
def test_of_one_class_or_of_all(f: Callable[[Tensor], Tensor], scale: float):
    z, upstream = logits(scale=scale), torch.randn(N)
    compiled, _ = compile_without_codegen(f)
    assert_as_fair(
        measure(compiled, z, upstream=upstream),
        measure(f, z, upstream=upstream),
        measure(SPELLINGS[f], z.double(), upstream=upstream),
    )


@pytest.mark.in_turns
@pytest.mark.parametrize("compile_it", [compile_without_codegen, compile_with_codegen])
@pytest.mark.parametrize("scale", [2.0, 6.0])
def test_rows_that_are_sure_keep_their_gradient(scale: float, compile_it: Callable):
    """2 p_i (p_i - sum_j p_j^2) is small there, and each row is as near to float64 as eager's."""
    z = scale * torch.randn(3000, 20)
    compiled, _ = compile_it(gini)
    ours, naive = measure(compiled, z).gradient.double(), measure(gini, z).gradient.double()
    exact = measure(SPELLINGS[gini], z.double()).gradient
    rows = torch.linalg.vector_norm(exact, dim=-1)
    error, accepted = (
        (torch.linalg.vector_norm(found - exact, dim=-1) / rows).square().mean().sqrt()
        for found in (ours, naive)
    )
    assert error <= 1.1 * accepted


@pytest.mark.parametrize("f", [collision, tsallis, renyi], ids=lambda f: f.__name__)
def test_rows_that_are_not_finite_are_as_in_eager(f: Callable[[Tensor], Tensor]):
    z = logits()
    z[0] = z[1] = z[2, ::2] = -math.inf
    z[1, 7] = 1.0
    z[3, 3], z[4, 69] = math.inf, math.nan
    compiled, _ = compile_without_codegen(f)
    torch.testing.assert_close(tuple(measure(compiled, z)), tuple(measure(f, z)), equal_nan=True)


def soft_capped(z: Tensor) -> Tensor:
    return collision(3 * torch.tanh(z.float() / 3))


def test_behind_a_soft_cap():
    z, upstream = logits(torch.bfloat16), torch.randn(N)
    compiled, graphs = compile_with_codegen(soft_capped)
    assert_as_fair(
        measure(compiled, z, upstream=upstream),
        measure(soft_capped, z, upstream=upstream),
        measure(lambda z: -mass(3 * torch.tanh(z / 3), 2).log(), z.double(), upstream=upstream),
    )
    assert graphs.count(ops.ROW_STATS) == 1


def temperature(z: Tensor) -> Tensor:
    """Scaled before they are normalised, they are other logits: no statistic more is computed."""
    s = (z - z.max(-1, keepdim=True).values) * 2.0
    return s.logsumexp(-1) - s[:, 0]


def test_a_temperature_is_no_power():
    z = logits()
    compiled, _ = compile_without_codegen(temperature)
    torch.testing.assert_close(measure(compiled, z), measure(temperature, z))
    with inductor_ce.install(min_vocab=2):
        (site,) = inductor_ce.explain(temperature, z.requires_grad_()).sites
    assert site.which == "max,sumexp,pick"


# Beside targets


def brier(z: Tensor, y: Tensor) -> Tensor:
    return (z.softmax(-1) - F.one_hot(y, V)).square().sum(-1) + F.cross_entropy(z, y, reduction="none")


def brier_in_parts(z: Tensor, y: Tensor) -> Tensor:
    p = z.softmax(-1)
    return 1 - 2 * p.gather(1, y[:, None]).squeeze(1) + p.square().sum(-1)


def spherical(z: Tensor, y: Tensor) -> Tensor:
    p = z.softmax(-1)
    return -p.gather(1, y[:, None]).squeeze(1) / p.pow(2).sum(-1).sqrt()


@pytest.mark.parametrize("f", [brier, brier_in_parts, spherical], ids=lambda f: f.__name__)
def test_what_cancels_beside_a_target_is_left(f: Callable[..., Tensor]):
    """Where the prediction is all but sure, the gradient is far below what sums of the row are rounded to."""
    z, y = logits(), torch.randint(V, (N,))
    z[range(N), y] += 20
    compiled, _ = compile_without_codegen(f)
    ours, naive = measure(compiled, z, y), measure(f, z, y)
    torch.testing.assert_close(ours, naive)
    exact = measure(f, z.double(), y).gradient
    ours_is_off, naive_is_off = ((made.gradient - exact).norm() for made in (ours, naive))
    assert ours_is_off <= 2 * naive_is_off + 1e-10
    report = inductor_ce.explain(f, z.requires_grad_(), y)
    assert all(miss.reason is Reason.NOT_UNDERSTOOD for miss in report.misses)
    assert not any("sumexp^" in site.which for site in report.sites)
    if f is not brier:
        assert "they cancel" in report.misses[0].message


def test_without_a_gradient_nothing_cancels():
    z, y = logits(), torch.randint(V, (N,))
    compiled, graphs = compile_without_codegen(brier_in_parts)
    torch.testing.assert_close(compiled(z, y), brier_in_parts(z, y))
    assert graphs.count(ops.ROW_STATS) == 1


def regularised(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y) + 0.3 * z.softmax(-1).pow(2).sum(-1).mean()


def exact_regularised(z: Tensor, y: Tensor) -> Tensor:
    return reference.cross_entropy(z, y) + 0.3 * mass(z.double(), 2).mean()


@pytest.mark.in_turns
@pytest.mark.parametrize("compile_it", [compile_without_codegen, *[compile_with_codegen] * EVERYTHING])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_beside_a_cross_entropy_there_is_one_sweep(dtype: torch.dtype, compile_it: Callable):
    z, y = logits(dtype), torch.randint(V, (N,))
    y[0] = -100
    compiled, graphs = compile_it(regularised)
    ours = measure(compiled, z, y)
    assert_as_fair(ours, measure(regularised, z, y), measure(exact_regularised, z.double(), y))
    assert (sites(), misses()) == (1, 0)
    assert (graphs.count(ops.ROW_STATS), graphs.count(ops.ROW_GRAD)) == (1, 1)


# Heads


def of_head(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return regularised(*head_cases.rows(F.linear(h, w, b), y))


def exact_of_head(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return exact_regularised(*head_cases.rows(head_cases.logits(h, w, b), y))


def per_token(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return tsallis(F.linear(h, w, b))


def exact_per_token(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return 2 - 2 * mass(head_cases.logits(h, w, b), 1.5)


@pytest.mark.in_turns
@pytest.mark.parametrize("strategy", ["token_chunks", "vocab_slabs"])
@pytest.mark.parametrize("pieces", [2, 5])
def test_head_in_pieces(pieces: int, strategy: str):
    case = head_cases.Case(of_head, exact_of_head)
    assert check_head(case, head_cases.inputs(), strategy, BUDGETS[pieces]) > 1


def test_head_per_token():
    case = head_cases.Case(per_token, exact_per_token, per_row=True)
    check_head(case, head_cases.inputs(ignored=False), "vocab_slabs")


# The operators


def test_opcheck():
    z = logits().requires_grad_()
    torch.library.opcheck(ops.row_stats, (z, [torch.randint(V, (N,))], [torch.rand(V)], EVERY))


@pytest.mark.parametrize(
    "order", ["", "0", "-1", "nan", "inf", "2.0", "x", "2,sumexp^2", "3,sumexp^2", "2,sum"]
)
def test_rows_that_are_none(order: str):
    with pytest.raises(ValueError, match=r"which=|convert"):
        ops.row_stats(logits(), [], [], f"max,sumexp,sumexp^{order}")


def test_gradcheck():
    z, y = logits(torch.float64)[:3, :9].requires_grad_(), torch.tensor([0, 8, -1])
    which = kernel_reference.rows(1, *POWERS)

    def of(z: Tensor) -> Tensor:
        m, d, picked, *sums = ops.row_stats(z, [y], [], which).unbind(0)
        powers = [s.log() - k * d.log() for s, k in zip(sums, ORDERS, strict=True)]
        return (torch.stack(powers).exp() * torch.arange(1, 5)[:, None]).sum(0) * (picked - m - d.log()).sin()

    assert gradcheck(of, z)


def test_operators_by_their_definitions():
    z, y, q = logits(), torch.randint(-1, V + 1, (N,)), torch.rand(V)
    z[0, ::3] = -math.inf
    actual = ops.row_stats(z, [y], [q], EVERY)
    torch.testing.assert_close(
        actual.double(), kernel_reference.stats(z, [y], [q], EVERY), rtol=1e-5, atol=1e-5
    )
    c, m = torch.randn(len(EVERY.split(",")), N), z.amax(1)
    args = z, [y], [q], m, c, EVERY
    torch.testing.assert_close(
        ops.row_grad(*args).double(), kernel_reference.grad(*args), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("v", [7, 130, 9000])
def test_template_of_statistics(v: int):
    lowering.register()
    z, y, q = torch.randn(3, v), torch.tensor([0, v - 1, -1]), torch.rand(v)
    z[1, 1:] = -math.inf
    z[2, : v - 1] = -math.inf
    (wrapper,) = generate(lambda z, y, q: ops.row_stats(z, [y], [q], EVERY), z, y, q)
    out = torch.full((len(EVERY.split(",")), 3), -1.0)
    interpret(wrapper, [z, y, q], out)
    torch.testing.assert_close(out.double(), kernel_reference.stats(z, [y], [q], EVERY), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_template_of_what_is_not_finite(value: float):
    lowering.register()
    which = kernel_reference.rows(0, *POWERS)
    z = torch.randn(3, 9000)
    z[1] = value
    (wrapper,) = generate(lambda z: ops.row_stats(z, [], [], which), z)
    out = torch.full((6, 3), -1.0)
    interpret(wrapper, [z], out)
    expected = kernel_reference.stats(z, [], [], which)
    torch.testing.assert_close(out[1:].double(), expected[1:], rtol=1e-5, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("v", [7, 9000])
def test_template_of_gradients(v: int):
    lowering.register()
    z, y, q = torch.randn(3, v), torch.tensor([0, v - 1, -1]), torch.rand(v)
    m, c = z.amax(1), torch.randn(len(EVERY.split(",")), 3)
    (wrapper,) = generate(lambda z, y, q, m, c: ops.row_grad(z, [y], [q], m, c, EVERY), z, y, q, m, c)
    out = torch.full_like(z, math.nan)
    interpret(wrapper, [z, y, q, m, c], out)
    expected = kernel_reference.grad(z, [y], [q], m, c, EVERY)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


# The algebra


@pytest.mark.parametrize("order", [2, 3, number(0.5), number(1.5)])
def test_powers_of_the_algebra(order: int):
    z = random_row(4) + 50
    k = float(order)
    expected = z.softmax(0).pow(k).sum().item()
    total = algebra.total(algebra.power(algebra.softmax(LOGITS), order))
    assert not algebra.shifted(total).has(algebra.MAX)
    assert algebra.total(algebra.exp(LOG_P * sympify(order))) == total
    assert (
        algebra.logsumexp(LOG_P * sympify(order))
        == algebra.row_log(total)
        == algebra.lse_of(order) - order * LSE
    )
    assert algebra.log(algebra.power(algebra.softmax(LOGITS), order)) == LOG_P * sympify(order)
    for value in (total, algebra.shifted(total)):
        assert evaluate(value, z) == pytest.approx(expected, rel=1e-12)


def test_powers_are_written():
    assert notation.render(algebra.logsumexp(LOG_P * number(1.5))) == "lse(1.5) - 1.5*lse"
    assert notation.statistics_of(algebra.logsumexp(LOG_P * number(2))) == ["lse", "lse(2)"]
