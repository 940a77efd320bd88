"""Losses composed at random are fused and right; with a slip in them they are what eager makes of them.

The same cases each time, with ALL=1 three times as many. Of those with a slip one in six goes through all
passes, the others are rewritten alone; with ALL=1 all of them do. GENERATED=20 runs twenty times these, and
others each time.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import grammar as g
import grammar_of_logits as before
import meaning
import mutations
import pytest
import torch
from compose import FAMILIES, Spelling, choose_spelling, filled, fits, function, source, statements
from gallery import in_double
from harness import Graphs, Rewritten, compile_without_codegen, counters, misses, sites
from hypothesis import HealthCheck, Phase, given, note, seed, settings
from hypothesis import strategies as st
from meaning import Inputs
from pairwise import EVERYTHING
from reference import Measured, assert_fair, measure
from torch import Tensor

import inductor_ce
from inductor_ce import ops

TIMES = int(os.environ.get("GENERATED", "0"))
ONE_IN = 6  # of the cases, without ALL=1
SEEDS = st.integers(0, 2**31 - 1)


def run_cases(check: Callable[[st.DataObject], None], count: int, salt: int) -> None:
    """Hypothesis on `count` cases, which differ between salts."""
    settled = settings(
        max_examples=max(TIMES, 1) * (count if TIMES or EVERYTHING else -(-count // ONE_IN)),
        deadline=None,
        database=None,
        derandomize=not TIMES,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    test = settled(given(st.data())(check))
    (test if TIMES else seed(salt)(test))()


def drawn(data: st.DataObject, family: str | None = None) -> tuple[Spelling, int]:
    return choose_spelling(lambda options: data.draw(st.sampled_from(options)), family), data.draw(SEEDS)


def compiled_afresh(loss: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], Graphs]:
    torch._dynamo.reset()
    counters.clear()
    return compile_without_codegen(loss)


def rewritten_afresh(loss: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], Rewritten]:
    torch._dynamo.reset()
    counters.clear()
    graphs = Rewritten()
    return torch.compile(loss, backend=graphs), graphs


# Right ones


@pytest.mark.parametrize("family", FAMILIES)
def test_a_generated_loss_is_fused_and_right(family: str):
    counts = {"wide": 70, "narrow": 60, "torch": 30, "whole": 25, "nll": 25}
    run_cases(lambda data: check_fused(*drawn(data, family)), counts[family], FAMILIES.index(family))


@pytest.mark.parametrize(
    ("family", "table", "count", "salt"),
    [("wide", g.CHOSEN, 60, 300), ("wide", g.MANY, 40, 320), ("narrow", g.MANY, 20, 321)],
    ids=["rows chosen after", "many labels", "many labels of logits"],
)
def test_a_generated_loss_of_a_table_is_fused_and_right(
    family: str, table: dict[str, g.Where], count: int, salt: int
):
    def check(data: st.DataObject) -> None:
        spelling, number = drawn(data, family)
        fitting = [p for p, where in table.items() if fits(where, spelling.viewed)]
        if fitting and g.ROUNDED not in spelling.normaliser:
            pick = data.draw(st.sampled_from(fitting))
            safe = spelling.safe if spelling.safe != g.AS_IT_IS or spelling.ignore >= 0 else g.SAFE[0]
            safe = safe if spelling.ignored != "none" else g.AS_IT_IS
            plain = {"smoothing": "", "z_loss": "", "labels": next(iter(before.LABELS))}
            check_fused(replace(spelling, pick=pick, safe=safe, **plain), number)

    run_cases(check, count, salt)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_generated_loss_through_all_passes(family: str):
    run_cases(lambda data: check_fused(*drawn(data, family), whole=True), 6, 100 + FAMILIES.index(family))


@pytest.mark.parametrize("kept", g.KEPT)
def test_a_generated_loss_is_right_beside_what_is_kept(kept: str):
    def check(data: st.DataObject) -> None:
        spelling, number = drawn(data, "wide")
        check_fused(spelling, number, kept=kept)

    run_cases(check, 15, 310 + g.KEPT.index(kept))


def check_fused(spelling: Spelling, number: int, whole: bool = False, kept: str = "") -> None:
    text = source(
        spelling, {**statements(spelling), "result": f"{filled(kept, spelling)}\n{spelling.result}"}
    )
    note(f"{spelling}\n\n{text}")
    inputs, loss = meaning.make_inputs(spelling, number), function(text)
    upstream = upstream_for(loss, inputs)
    exact = check_meaning(spelling, inputs, loss, upstream)
    naive = measure(loss, inputs.logits, *inputs.others, upstream=upstream)
    compiled, graphs = compiled_afresh(loss) if whole else rewritten_afresh(loss)
    ours = measure(compiled, inputs.logits, *inputs.others, upstream=upstream)
    assert (sites(), misses()) == (1, 0), told(loss, inputs)
    parts = 2 if "torch.cat" in spelling.chain else 1
    assert 1 <= graphs.count(ops.ROW_STATS) <= parts
    assert not counters["graph_break"]
    assert_fair_in(meaning.coarsest(spelling), ours.value, naive.value, exact.value)
    assert_fair(ours.gradient, naive.gradient, exact.gradient)


def upstream_for(loss: Callable[..., Tensor], inputs: Inputs) -> Tensor:
    """Of either sign, in the shape of the result."""
    value = loss(inputs.logits.clone(), *inputs.others)
    return torch.randn(value.shape, generator=torch.Generator().manual_seed(1))


def check_meaning(
    spelling: Spelling, inputs: Inputs, loss: Callable[..., Tensor], upstream: Tensor
) -> Measured:
    """The loss by its formula. Eager must agree in float64, or the reference would excuse anything."""
    wide = inputs.in_double()

    def formula(z: Tensor) -> Tensor:
        return meaning.exact(spelling, z, inputs.labels, inputs.weights, inputs.bias)

    exact = measure(formula, wide.logits, upstream=upstream)
    with in_double():
        eager = measure(lambda z: loss(z.clone(), *wide.others), wide.logits, upstream=upstream)
    torch.testing.assert_close(eager.value, exact.value.reshape(eager.value.shape))
    torch.testing.assert_close(eager.gradient, exact.gradient)
    return exact


def assert_fair_in(dtype: torch.dtype, ours: Tensor, naive: Tensor, exact: Tensor) -> None:
    """`assert_fair` of results that were rounded to `dtype` on the way."""
    assert ours.dtype == naive.dtype
    dtype = max(dtype, ours.dtype, key=lambda d: torch.finfo(d).eps)
    assert_fair(ours.to(dtype), naive.to(dtype), exact)


def told(loss: Callable[..., Tensor], inputs: Inputs) -> str:
    return str(inductor_ce.explain(loss, inputs.logits.clone().requires_grad_(), *inputs.others))


# Wrong ones


@pytest.mark.parametrize("family", mutations.FAMILIES)
def test_a_loss_with_a_slip_is_what_eager_makes_of_it(family: str):
    counts = {"slip": 45, "other operand": 35, "edit": 60, "tensor": 35}

    def check(data: st.DataObject) -> None:
        spelling, number = drawn(data)
        if data.draw(st.booleans()):
            spelling = squared(spelling)
        fitting = [m for m in mutations.FAMILIES[family] if mutations.mutated(spelling, m)]
        check_slip(spelling, data.draw(st.sampled_from(fitting)), number)

    run_cases(check, counts[family], list(mutations.FAMILIES).index(family))


def squared(spelling: Spelling) -> Spelling:
    """With as many classes as rows, so that a wrong axis is not an error."""
    classes = before.N if spelling.viewed.rank == 2 and spelling.shift not in before.SLICES else before.S
    return replace(spelling, V=classes, ignore=min(spelling.ignore, classes - 1))


@dataclass
class Outcome:
    """What running a loss came to: an error, or a value and, where it has one, a gradient or an error."""

    labels: Tensor
    error: Exception | None = None
    value: Tensor | None = None
    gradient: Tensor | None = None
    no_gradient: Exception | None = None


def outcome(loss: Callable[..., Any], inputs: Inputs) -> Outcome:
    labels, *others = inputs.others
    leaf = inputs.logits.clone().requires_grad_()
    found = Outcome(labels)
    try:
        value = loss(leaf, labels, *others)
    except Exception as error:
        found.error = error
        return found
    found.value = value.detach().clone()
    if not value.requires_grad:
        return found
    upstream = torch.randn(value.shape, generator=torch.Generator().manual_seed(1)).to(value.dtype)
    try:
        (found.gradient,) = torch.autograd.grad(value, leaf, upstream, materialize_grads=True)
    except RuntimeError as error:
        found.no_gradient = error
    return found


def check_slip(spelling: Spelling, mutation: mutations.Mutation, number: int) -> None:
    text = source(spelling, mutations.mutated(spelling, mutation))
    note(f"{mutation}\n{spelling}\n\n{text}")
    inputs, loss = meaning.make_inputs(spelling, number), function(text)
    naive = outcome(loss, inputs)
    whole = EVERYTHING or number % ONE_IN == 0
    compiled, _ = compiled_afresh(loss) if whole else rewritten_afresh(loss)
    ours = outcome(compiled, inputs)
    if naive.error is not None:
        check_refused(ours, loss, inputs)
        return
    if naive.no_gradient is not None:
        if ours.error is not None or ours.no_gradient is not None:
            return
        with torch.autograd.graph.allow_mutation_on_saved_tensors():  # ours may be right where eager gives up
            naive = outcome(loss, inputs)
    try:
        check_as_eager(ours, naive, loss, inputs, dtype_of(spelling, text))
    except AssertionError:
        check_as_compiled_alone(ours, loss, inputs)


def check_refused(ours: Outcome, loss: Callable[..., Any], inputs: Inputs) -> None:
    """What eager refuses is refused, NaN for a label that is no class, or as torch.compile alone has it."""
    if ours.error is None and not ours.value.isnan().any():
        check_as_compiled_alone(ours, loss, inputs)


def check_as_compiled_alone(ours: Outcome, loss: Callable[..., Any], inputs: Inputs) -> None:
    """Where torch.compile is not as eager without us either, we are as it is."""
    inductor_ce.uninstall()
    torch._dynamo.reset()
    alone = outcome(torch.compile(loss, backend=Graphs()), inputs)
    assert (ours.error is None) == (alone.error is None), ours.error or alone.error
    assert (ours.no_gradient is None) == (alone.no_gradient is None), ours.no_gradient or alone.no_gradient
    assert torch.equal(ours.labels, alone.labels)
    for mine, theirs in ((ours.value, alone.value), (ours.gradient, alone.gradient)):
        torch.testing.assert_close(mine, theirs, rtol=0.02, atol=1e-4, equal_nan=True)


def dtype_of(spelling: Spelling, text: str) -> torch.dtype:
    return torch.bfloat16 if "bfloat16" in text else meaning.coarsest(spelling)


def check_as_eager(
    ours: Outcome, naive: Outcome, loss: Callable[..., Any], inputs: Inputs, dtype: torch.dtype
) -> None:
    with in_double(), torch.autograd.graph.allow_mutation_on_saved_tensors():
        exact = outcome(lambda z, *others: loss(z.clone(), *others), inputs.in_double())
    assert ours.error is None
    assert ours.no_gradient is None
    assert torch.equal(ours.labels, naive.labels)
    assert (ours.gradient is None) == (naive.gradient is None)
    assert_as_eager(dtype, ours.value, naive.value, exact.value)
    if naive.gradient is not None:
        defined = exact.gradient.isfinite()
        assert_as_eager(dtype, *(x.gradient.where(defined, 0) for x in (ours, naive, exact)))


def assert_as_eager(dtype: torch.dtype, ours: Tensor, naive: Tensor, exact: Tensor) -> None:
    """Close to eager, or fair. Not finite where eager in float64 is not."""
    assert (ours.shape, ours.dtype) == (naive.shape, naive.dtype)
    defined = exact.reshape(ours.shape).isfinite()
    assert not ours[~defined].isfinite().any(), "finite where eager is not"
    ours, naive, exact = (x.reshape(ours.shape).where(defined, 0) for x in (ours, naive, exact))
    try:
        torch.testing.assert_close(ours, naive)  # a slip may leave a difference of large numbers
    except AssertionError:
        defined = naive.isfinite()
        assert_fair_in(dtype, *(x.where(defined, 0) for x in (ours, naive, exact)))
