"""Every strategy of a head, forced, over losses, dtypes and sizes, against float64."""

from __future__ import annotations

from typing import Any

import head_cases as cases
import pytest
import torch
from harness import compile_without_codegen, sites
from head_cases import BUDGETS, CASES, D, V, assert_all_fair, counts, exactly, inputs, measure
from pairwise import EVERYTHING, pairwise
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves

from inductor_ce import ops
from inductor_ce.graph.examples import Examples
from inductor_ce.ops import counted

MATERIALISE, CHUNKS, SLABS = "materialise", "token_chunks", "vocab_slabs"
DIVIDING = [CHUNKS, SLABS]
D_16 = 64  # with so many terms a row's error is hardly a matter of luck
FEW = 0.35  # the budget for three pieces
FEW_IN_16_BITS = 2.4  # the same of slabs, which keep the gradient of hidden in float32


def check(
    case: cases.Case,
    given: cases.Inputs,
    strategy: str,
    budget: float | None = None,
    *,
    expected: str | None = None,
    frozen: str = "",
    dynamic: bool | None = None,
    in_16_bits: bool = False,
) -> int:
    """The loss is computed as wanted and is fair. Returns in how many pieces its logits are made.

    In 16 bits the upstream gradient is a power of two; test_head_errors tells of others.
    """
    shape = case.loss(*given).shape
    upstream = torch.full(shape, -0.5) if in_16_bits else torch.randn(shape)
    if budget is None:
        budget = FEW_IN_16_BITS if in_16_bits and (expected or strategy) == SLABS else FEW
    compiled, graphs = compile_without_codegen(
        case.loss, strategy=strategy, memory_budget=budget, dynamic=dynamic
    )
    ours = measure(compiled, given, upstream, frozen)
    assert sites() == 1
    assert counts() == {expected or case.strategy(strategy): 1}
    assert_all_fair(ours, measure(case.loss, given, upstream, frozen), exactly(case, given, upstream, frozen))
    return graphs.pieces


SLABS_IN_16_BITS = ("bias", "soft-cap", "entropy bonus", "per token")


def is_a_case(name: str, strategy: str, dtype: torch.dtype) -> bool:
    if dtype == torch.float32:
        return True
    return name in SLABS_IN_16_BITS if strategy == SLABS else name not in ("by hand", "per token")


@pytest.mark.parametrize(
    ("name", "strategy", "dtype"),
    pairwise(list(CASES), DIVIDING, (torch.float32, torch.bfloat16), valid=is_a_case),
)
def test_loss(name: str, strategy: str, dtype: torch.dtype) -> None:
    narrow = dtype != torch.float32
    check(CASES[name], inputs(d=D_16 if narrow else D).to(dtype), strategy, in_16_bits=narrow)


@pytest.mark.parametrize("name", ["plain", "soft-cap", "per token"])
def test_materialised(name: str) -> None:
    check(CASES[name], inputs(), MATERIALISE)


@pytest.mark.in_turns
@pytest.mark.parametrize("strategy", DIVIDING)
@pytest.mark.parametrize("name", ["bias", "z-loss"])
def test_float16(name: str, strategy: str) -> None:
    """A gradient without its upstream gradient may leave the range, so chunks are refused."""
    expected = SLABS if strategy == CHUNKS else strategy
    check(CASES[name], inputs(d=D_16).to(torch.float16), strategy, expected=expected, in_16_bits=True)


@pytest.mark.in_turns
@pytest.mark.parametrize("strategy", DIVIDING)
@pytest.mark.parametrize("name", ["bias", "smoothing", "soft-cap"])
def test_autocast(name: str, strategy: str) -> None:
    """Parameters in float32, products in bfloat16."""
    case = CASES[name]

    def loss(*given: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return case.loss(*given)

    check(cases.Case(loss, case.exact), inputs(d=D_16), strategy, in_16_bits=True)
    assert case.loss(*inputs()).dtype == torch.float32


@pytest.mark.in_turns
@pytest.mark.parametrize(
    ("name", "pieces"), [*(("plain", k) for k in BUDGETS), ("soft-cap", 2), ("soft-cap", 5)]
)
@pytest.mark.parametrize("strategy", DIVIDING)
def test_pieces(strategy: str, pieces: int, name: str) -> None:
    """A budget makes as many; a chain before the statistics takes memory of its own, and so do the hidden
    states of rows that are brought together, and their gradient. That of all goes back to its rows at last,
    which is less than a piece."""
    v = 4 * V
    taken = 2 * D / v if strategy == CHUNKS else 0
    budget = BUDGETS[pieces] * (taken + (2 if name == "soft-cap" else 1))
    assert check(CASES[name], inputs(v=v, ignored=False), strategy, budget) == pieces


def test_as_many_slabs_as_columns() -> None:
    given = inputs(v=8, d=D_16).to(torch.float16)
    assert check(CASES["bias"], given, SLABS, FEW, in_16_bits=True) == 8


@pytest.mark.in_turns
@pytest.mark.parametrize("strategy", DIVIDING)
@pytest.mark.parametrize("shape", [(31,), (33,), (1,), (0,), (2, 3, 5)])
def test_rows(shape: tuple[int, ...], strategy: str) -> None:
    """Odd, prime, one, none; in one dimension or in several."""
    case, given = CASES["sum"], inputs(*shape)
    check(case, given, strategy)


@pytest.mark.in_turns
@pytest.mark.parametrize("strategy", DIVIDING)
@pytest.mark.parametrize("v", [2, 37, 300])
def test_classes(v: int, strategy: str) -> None:
    check(CASES["bias"], inputs(v=v), strategy)


@pytest.mark.parametrize(
    ("name", "strategy"),
    [*((name, CHUNKS) for name in ("shift", "soft-cap")), ("shift", SLABS)]
    + [("bias", CHUNKS), ("weighted tokens", CHUNKS)] * EVERYTHING,
)
def test_symbolic_sizes(name: str, strategy: str) -> None:
    check(CASES[name], inputs(3, 7), strategy, 2 * FEW, dynamic=True)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in ("plain", "bias", "soft-cap", "entropy bonus", "per token", "shift")]
    + [("bias", torch.bfloat16)],
)
def test_forward_only(name: str, dtype: torch.dtype) -> None:
    case, given = CASES[name], inputs().to(dtype)
    compiled, graphs = compile_without_codegen(case.loss, strategy=CHUNKS, memory_budget=FEW)
    with torch.no_grad():
        ours, naive = compiled(*given), case.loss(*given)
    assert counts() == {"forward_only": 1}
    takes_rows = graphs.count(counted.TAKE_ROWS) > 0  # which are memory too
    assert graphs.pieces == (4 if takes_rows else 3)
    assert takes_rows == (name != "entropy bonus")
    gradients = (ops.ROW_GRAD, ops.SOME_ROW_GRAD, ops.ROW_STATS_GRAD, ops.SOME_ROW_STATS_GRAD)
    assert not any(map(graphs.count, gradients))
    cases.assert_fair(ours, naive, case.exact(*given))


@pytest.mark.parametrize("strategy", DIVIDING)
def test_forward_only_of_what_is_frozen(strategy: str) -> None:
    """Not under no_grad: nothing wants a gradient."""
    case, given = CASES["bias"], inputs()
    compiled, _ = compile_without_codegen(case.loss, strategy=strategy, memory_budget=FEW)
    cases.assert_fair(compiled(*given), case.loss(*given), case.exact(*given))
    assert counts() == {"forward_only": 1}


@pytest.mark.in_turns
@pytest.mark.parametrize("strategy", [MATERIALISE, *DIVIDING])
@pytest.mark.parametrize(
    "frozen", ["hidden", "weight", "bias", "hidden bias", "weight bias", "hidden weight"]
)
def test_frozen(frozen: str, strategy: str) -> None:
    check(CASES["bias"], inputs(), strategy, frozen=frozen)


PRODUCTS_OF_A_CHUNK = {"": 3, "hidden": 2, "weight": 2, "hidden weight": 1}


@pytest.mark.parametrize("frozen", PRODUCTS_OF_A_CHUNK)
def test_what_nobody_wants_is_not_computed(frozen: str) -> None:
    """The products of a chunk: its logits, dh, dW."""
    compiled, graphs = compile_without_codegen(cases.biased, strategy=CHUNKS, memory_budget=0.63)
    measure(compiled, inputs(), frozen=frozen)
    products = [n for n in graphs.nodes if "ce.product_" in str((n.target, *n.args[:1]))]
    products += [n for n in graphs.nodes if n.target is torch.ops.inductor_ce.logits.default]
    assert len(products) == 2 * PRODUCTS_OF_A_CHUNK[frozen]
    assert graphs.count(torch.ops.aten.mm.default) == 0


IGNORED = {
    "all": slice(None),
    "all but one": slice(1, None),
    "the first chunk": slice(0, 11),
    "the last chunk": slice(22, None),
}


@pytest.mark.parametrize("strategy", DIVIDING)
def test_ignored_rows(strategy: str) -> None:
    """What eager gives: the mean over no rows is NaN, its gradient 0."""
    compiled, _ = compile_without_codegen(cases.plain, strategy=strategy, memory_budget=FEW)
    for which, ignored in IGNORED.items():
        given = inputs(ignored=False)
        given.y.view(-1)[ignored] = -100
        ours, eager = measure(compiled, given), measure(cases.plain, given)
        torch.testing.assert_close(ours, eager, equal_nan=True, msg=lambda told, of=which: f"{of}: {told}")
    assert counts() == {strategy: 1}


@pytest.mark.parametrize("strategy", DIVIDING)
def test_what_is_not_finite_stays_in_its_rows(strategy: str) -> None:
    """As in eager: in the gradient of those rows of hidden, and in all of the weight's."""
    compiled, _ = compile_without_codegen(cases.plain, strategy=strategy, memory_budget=FEW)
    for value in (torch.inf, torch.nan):
        given = inputs()
        given.hidden[1, 3, 2] = value
        ours, eager = measure(compiled, given), measure(cases.plain, given)
        torch.testing.assert_close(ours, eager, equal_nan=True)
    assert counts() == {strategy: 1}


def facts(example: object, given: list[Tensor]) -> object:
    """What a pass can see of an example that was made of others."""
    if not isinstance(example, Tensor):
        return example
    views = [example.untyped_storage()._cdata == other.untyped_storage()._cdata for other in given]
    layout = example.shape, example.stride(), example.storage_offset()
    return *layout, example.dtype, example.device, example.requires_grad, views


@pytest.mark.parametrize(("name", "strategy"), [("plain", CHUNKS), ("soft-cap", SLABS)])
def test_examples_of_equal_calls_are_what_torch_makes(
    name: str, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[object, ...]] = []
    called, of = Examples._called, Examples.of
    calls: list[object] = []

    def counted(self: Examples, *call: Any) -> object:
        calls.append(call)
        return called(self, *call)

    def checked(self: Examples, *call: Any) -> object:
        given = [leaf for leaf in tree_leaves(call) if isinstance(leaf, Tensor)]
        result = of(self, *call)
        for pair in zip(tree_leaves(result), tree_leaves(called(self, *call)), strict=True):
            made.append(tuple(facts(example, given) for example in pair))
        return result

    monkeypatch.setattr(Examples, "_called", counted)
    monkeypatch.setattr(Examples, "of", checked)
    given = inputs(d=D_16).to(torch.bfloat16)
    check(CASES[name], given, strategy, 2 * FEW_IN_16_BITS, in_16_bits=True)
    assert len(calls) < 0.9 * len(made)
    assert [ours for ours, _ in made] == [torchs for _, torchs in made]


def test_examples_of_another_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have its mode and follow the default dtype; functions that are not torch's are called anew."""
    calls: list[object] = []
    called = Examples._called

    def counted(self: Examples, target: Any, *call: Any) -> object:
        calls.append(target)
        return called(self, target, *call)

    def doubled(z: Tensor) -> Tensor:
        return z * 2

    monkeypatch.setattr(Examples, "_of_all", {})
    monkeypatch.setattr(Examples, "_called", counted)
    default = torch.get_default_dtype()
    try:
        for dtype in (torch.float32, torch.float64):
            with FakeTensorMode() as mode:
                z = torch.empty(3, 4, dtype=torch.float32)
            for target in (torch.exp, doubled):
                assert Examples(mode).of(target, (z,), {}).fake_mode is mode
            torch.set_default_dtype(dtype)
            assert Examples(mode).of(torch.full, ((2,), 1.0), {}).dtype == dtype
    finally:
        torch.set_default_dtype(default)
    assert calls == [torch.exp, doubled, torch.full, doubled, torch.full]
