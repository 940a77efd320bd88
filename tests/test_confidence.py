"""The confidence of a prediction, softmax(z).max(-1), with its gradient and without.

The maximum has the gradient of torch.max, all of it in the first column that has it; where nobody wants a
gradient, or where the maximum cancels, no more is computed than was.
"""

from __future__ import annotations

from collections.abc import Callable

import head_cases
import kernel_reference
import pytest
import reference
import torch
import torch.nn.functional as F
from gpu_codegen import generate, interpret
from harness import Graphs, compile_with_codegen, compile_without_codegen, misses, sites
from head_cases import BUDGETS
from pairwise import EVERYTHING
from reference import assert_as_fair, measure
from test_algebra import evaluate
from test_head import check as check_head
from torch import Tensor

import inductor_ce
from inductor_ce import algebra, ops
from inductor_ce.algebra import symbols
from inductor_ce.common.findings import Reason
from inductor_ce.ops import lowering, verified

N, V = 9, 70
GRADIENT, PLAIN = "max,sumexp,argmax,top", "max,sumexp"


def log_confidence(z: Tensor) -> Tensor:
    """Of rows of numbers; max(dim) gives its gradient to the first column."""
    return z.max(-1).values - reference.log_sum_exp(z)


def of_softmax(z: Tensor) -> Tensor:
    return torch.softmax(z, -1).max(-1).values


def of_softmax_kept(z: Tensor) -> Tensor:
    return F.softmax(z, dim=-1).max(dim=-1, keepdim=True)[0].squeeze(-1)


def of_log_softmax(z: Tensor) -> Tensor:
    return torch.max(z.log_softmax(-1), -1)[0]


def by_logsumexp(z: Tensor) -> Tensor:
    return z.max(-1).values - z.logsumexp(-1)


def by_hand(z: Tensor) -> Tensor:
    """The maximum is the shift as well, and cancels there."""
    shifted = z - z.max(-1, keepdim=True).values
    return shifted.max(-1).values - shifted.exp().sum(-1).log()


SPELLINGS = {
    of_softmax: lambda z: log_confidence(z).exp(),
    of_softmax_kept: lambda z: log_confidence(z).exp(),
    of_log_softmax: log_confidence,
    by_logsumexp: log_confidence,
}


def logits(dtype: torch.dtype = torch.float32) -> Tensor:
    """Some rows have ties of the maximum, one is of one number."""
    z = (3 * torch.randn(N, V)).to(dtype)
    z[0, [20, 3, 60]] = 9.0
    z[1] = 0.5
    z[2, [0, V - 1]] = 12.0
    return z


def rows_of(graphs: Graphs) -> set[str]:
    """Which rows are packed."""
    calls = [node for node in graphs.nodes if node.target == ops.ROW_STATS]
    return {call.args[3] for call in calls}


# Values and gradients


@pytest.mark.in_turns
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("f", SPELLINGS, ids=lambda f: f.__name__)
def test_value_and_gradient(f: Callable[[Tensor], Tensor], dtype: torch.dtype):
    z, upstream = logits(dtype), torch.randn(N)
    compiled, graphs = compile_without_codegen(f)
    ours = measure(compiled, z, upstream=upstream)
    exact = measure(SPELLINGS[f], z.double(), upstream=upstream.to(dtype))
    assert_as_fair(ours, measure(f, z, upstream=upstream), exact)
    assert (sites(), rows_of(graphs)) == (1, {GRADIENT})


def test_ties_have_the_gradient_in_their_first_column():
    z = torch.zeros(1, V, dtype=torch.float64)
    compiled, _ = compile_without_codegen(by_logsumexp)
    expected = torch.full((1, V), -1 / V, dtype=torch.float64)
    expected[0, 0] += 1
    torch.testing.assert_close(measure(compiled, z).gradient, expected)


def infinite() -> Tensor:
    z = torch.randn(7, V)
    z[0] = z[1] = -torch.inf
    z[1, 7] = 1.0  # one finite column
    z[2, 3] = torch.inf
    z[3, [5, 50]] = torch.inf
    z[4, 69] = torch.nan
    z[5, 1], z[5, 2] = torch.nan, torch.inf
    return z


@pytest.mark.in_turns
@pytest.mark.parametrize("wanted", [True, False], ids=["gradient", "no gradient"])
@pytest.mark.parametrize("f", [*SPELLINGS, by_hand], ids=lambda f: f.__name__)
def test_rows_that_are_not_finite_are_as_in_eager(f: Callable[[Tensor], Tensor], wanted: bool):
    """A row of -inf has no confidence: NaN, neither inf nor 1."""
    z = infinite()
    compiled, _ = (compile_with_codegen if f is of_softmax else compile_without_codegen)(f)
    if not wanted:
        torch.testing.assert_close(compiled(z), f(z), equal_nan=True)
        return
    torch.testing.assert_close(tuple(measure(compiled, z)), tuple(measure(f, z)), equal_nan=True)


def beside_loss(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return F.cross_entropy(z, y, reduction="none"), z.max(-1).values


def test_the_maximum_alone_is_what_it_is_where_it_is_infinite():
    z = infinite()
    y = torch.randint(V, z.shape[:1])
    compiled, graphs = compile_without_codegen(beside_loss)
    ours, eager = compiled(z.requires_grad_(), y), beside_loss(z, y)
    torch.testing.assert_close(ours, eager, equal_nan=True)
    assert rows_of(graphs) == {"max,sumexp,pick,argmax,top"}


# Beside other losses


def penalised(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y) + 0.3 * torch.softmax(z, -1).max(-1).values.square().mean()


def exact_penalised(z: Tensor, y: Tensor) -> Tensor:
    return reference.cross_entropy(z, y) + 0.3 * log_confidence(z.double()).exp().square().mean()


def test_beside_a_cross_entropy_there_is_one_sweep():
    z, y = logits(), torch.randint(V, (N,))
    y[0] = -100
    compiled, graphs = compile_without_codegen(penalised)
    ours = measure(compiled, z, y)
    assert_as_fair(ours, measure(penalised, z, y), measure(exact_penalised, z.double(), y))
    assert (sites(), misses()) == (1, 0)
    assert (graphs.count(ops.ROW_STATS), graphs.count(ops.ROW_GRAD)) == (1, 1)


def fixmatch(z: Tensor, y: Tensor) -> Tensor:
    """The confidence as a threshold has no gradient, though the logits want one."""
    confidence = torch.softmax(z, -1).max(-1).values
    return (F.cross_entropy(z, y, reduction="none") * (confidence > 0.5).float()).mean()


def detached(z: Tensor, y: Tensor) -> Tensor:
    confidence = torch.softmax(z, -1).max(-1).values.detach()
    return (F.cross_entropy(z, y, reduction="none") * (1 - confidence)).mean()


def shift(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z - z.max(-1, keepdim=True).values, y)


def added_back(z: Tensor, y: Tensor) -> Tensor:
    m = z.max(-1, keepdim=True).values
    lse = (z - m).exp().sum(-1).log() + m.squeeze(-1)
    return (lse - z.gather(-1, y[:, None]).squeeze(-1)).mean()


@pytest.mark.parametrize("f", [fixmatch, detached, shift, added_back])
def test_no_more_is_computed_where_the_maximum_has_no_gradient(f: Callable[[Tensor, Tensor], Tensor]):
    z, y = logits(), torch.randint(V, (N,))
    compiled, graphs = compile_without_codegen(f)
    torch.testing.assert_close(measure(compiled, z, y), measure(f, z, y))
    assert sites() == 1
    assert rows_of(graphs) == {"max,sumexp,pick"}


@pytest.mark.parametrize("f", SPELLINGS, ids=lambda f: f.__name__)
def test_without_a_gradient_no_more_is_computed(f: Callable[[Tensor], Tensor]):
    z = logits().requires_grad_()
    compiled, graphs = compile_without_codegen(f)
    with torch.no_grad():
        torch.testing.assert_close(compiled(z), f(z))
    assert (sites(), rows_of(graphs)) == (1, {PLAIN})


def not_added_back(z: Tensor, y: Tensor) -> Tensor:
    shifted = z - z.max(-1, keepdim=True).values
    return shifted.exp().sum(-1).log() - z.gather(-1, y[:, None]).squeeze(-1)


def test_a_maximum_that_is_left_over_has_its_gradient():
    z, y, upstream = logits(), torch.randint(V, (N,)), torch.randn(N)
    compiled, _ = compile_without_codegen(not_added_back)
    ours = measure(compiled, z, y, upstream=upstream)
    assert_as_fair(
        ours,
        measure(not_added_back, z, y, upstream=upstream),
        measure(not_added_back, z.double(), y, upstream=upstream),
    )
    assert sites() == 1


# Left as written


def by_amax(z: Tensor) -> Tensor:
    return torch.softmax(z, -1).amax(-1)


def test_the_gradient_of_amax_is_shared_and_left_to_torch():
    z = logits()
    compiled, _ = compile_without_codegen(by_amax)
    torch.testing.assert_close(measure(compiled, z), measure(by_amax, z))
    assert sites() == 0
    (miss,) = inductor_ce.explain(by_amax, z.requires_grad_()).misses
    assert miss.reason is Reason.NOT_UNDERSTOOD
    assert "take max(dim).values" in miss.message


def test_amax_without_a_gradient_is_read():
    z = logits()
    compiled, graphs = compile_without_codegen(by_amax)
    torch.testing.assert_close(compiled(z), by_amax(z))
    assert (sites(), rows_of(graphs)) == (1, {PLAIN})


def half_detached(z: Tensor) -> Tensor:
    """The gradient is that of the maximum alone."""
    return z.max(-1).values - z.detach().logsumexp(-1)


def test_a_maximum_with_a_gradient_beside_detached_logits_keeps_it():
    z = logits()
    compiled, _ = compile_without_codegen(half_detached)
    torch.testing.assert_close(measure(compiled, z), measure(half_detached, z))


# Heads


def of_head(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return penalised(*head_cases.rows(F.linear(h, w, b), y))


def exact_of_head(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return exact_penalised(*head_cases.rows(head_cases.logits(h, w, b), y))


def per_token(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return torch.softmax(F.linear(h, w, b), -1).max(-1).values


def exact_per_token(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return log_confidence(head_cases.logits(h, w, b)).exp()


@pytest.mark.in_turns
@pytest.mark.parametrize("strategy", ["token_chunks", "vocab_slabs"])
@pytest.mark.parametrize("pieces", [2, 5])
@pytest.mark.parametrize(("loss", "exact"), [(of_head, exact_of_head), (per_token, exact_per_token)])
def test_head_in_pieces(loss: head_cases.Loss, exact: head_cases.Loss, pieces: int, strategy: str):
    """The column that has the gradient is told by statistics: of all strategies slabs can wait for them."""
    case = head_cases.Case(loss, exact)
    given = head_cases.inputs()
    given.weight[[5, 40, 63]] = given.weight[2].clone()  # ties within slabs, and over them
    given.bias[[5, 40, 63]] = given.bias[2] = 3.0
    assert check_head(case, given, strategy, BUDGETS[pieces], expected="vocab_slabs") == pieces


def test_head_says_why_it_is_not_in_chunks():
    with inductor_ce.install(min_vocab=2, strategy="token_chunks", memory_budget=0.5):
        (site,) = inductor_ce.explain(of_head, *head_cases.inputs().leaves()).sites
    assert "made of their statistics" in site.plan


# Code


@pytest.mark.parametrize("dtype", [torch.bfloat16, *[torch.float32] * EVERYTHING], ids=str)
def test_code_of_a_cpu(dtype: torch.dtype):
    z, y = logits(dtype), torch.randint(V, (N,))
    compiled, graphs = compile_with_codegen(penalised)
    ours = measure(compiled, z, y)
    assert_as_fair(ours, measure(penalised, z, y), measure(exact_penalised, z.double(), y))
    assert graphs.count(ops.ROW_STATS) == 1


@pytest.mark.parametrize("v", [7, 130, 9000])
def test_template_of_statistics(v: int):
    lowering.register()
    z = torch.randn(3, v)
    z[1, [v // 2, v - 1]] = 8.0
    z[2, v - 1] = torch.nan
    (wrapper,) = generate(lambda z: ops.row_stats(z, [], [], GRADIENT), z)
    out = torch.full((4, 3), -1.0)
    interpret(wrapper, [z], out)
    expected = kernel_reference.stats(z, [], [], GRADIENT)
    assert torch.equal(out[2].double(), expected[2])
    torch.testing.assert_close(out[:, :2].double(), expected[:, :2], rtol=1e-5, atol=1e-5)
    assert out[1, 2].isnan()  # which tells of NaN; the maximum need not


@pytest.mark.parametrize("v", [7, 9000])
def test_template_of_gradients(v: int):
    """The column that `argmax` tells is a label more."""
    lowering.register()
    z, told = torch.randn(3, v), torch.tensor([0, v - 1, v // 2])
    m, c = z.amax(1), torch.randn(4, 3)
    (wrapper,) = generate(lambda z, y, m, c: ops.row_grad(z, [y], [], m, c, GRADIENT), z, told, m, c)
    out = torch.full_like(z, torch.nan)
    interpret(wrapper, [z, told, m, c], out)
    exact = (c[1, :, None] * (z - m[:, None]).exp()).double()
    exact[range(3), told] += c[3]
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


def test_verified():
    verified._verdicts.clear()
    z, y = logits(), torch.randint(V, (N,))
    compiled, _ = compile_without_codegen(penalised, verify=True)
    for _ in range(2):
        torch.testing.assert_close(measure(compiled, z, y), measure(penalised, z, y), rtol=1e-4, atol=1e-6)
    (verdict,) = verified._verdicts.values()
    assert verdict.gradient is True
    assert all(verdict.values.values())
    verified._verdicts.clear()


# The algebra


def test_the_maximum_cancels_but_for_its_gradient():
    lse, top = algebra.LSE, symbols.TOP
    assert not algebra.shifted(top - lse).has(algebra.MAX)
    assert algebra.shifted(top - lse).has(symbols.TOP_SHIFTED)
    assert algebra.held(top - lse) == algebra.MAX_HELD - lse
    z = torch.randn(V, dtype=torch.float64)
    known = algebra.shifted(top - lse).subs(symbols.TOP_SHIFTED, 0)
    assert evaluate(known, z) == pytest.approx(log_confidence(z).item(), rel=1e-12)
