"""Statistics and gradient by one template, run by Triton's interpreter against float64."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import gpu_codegen
import interpreter
import kernel_reference as reference
import pytest
import torch
from gpu_codegen import Wrapper, generate, interpret, launch_of
from interpreter import triton_ir
from test_templates import (
    MINUS_INFINITY,
    RELATIVE,
    Like,
    labels_for,
    logits,
    weights_for,
    with_more_in_memory,
)
from torch import Tensor

from inductor_ce import ops
from inductor_ce.bench import rows as bench
from inductor_ce.ops import chains, lowering, one_read, one_read_lowering
from inductor_ce.ops.chains import Chain
from inductor_ce.ops.row_program import FUNCTIONS, RowProgram, Step, coefficients, decode

N, BLOCK = 3, 256
VOCABULARIES = [1, 2, 7, 255, 256, 257, 600, 1300]
NARROW = torch.float16, torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def registered() -> None:
    lowering.register()


@pytest.fixture(autouse=True)
def delay(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As short as may be, and small blocks: an interpreter has one program at a time."""
    once = one_read_lowering.ONCE._replace(block=BLOCK, delay=getattr(request, "param", 1), spin=1)
    monkeypatch.setattr(one_read_lowering, "ONCE", once)
    monkeypatch.setattr(one_read, "is_faster", lambda *_: True)


# Without a delay a program waits for the blocks behind its own, which in an interpreter never come.
in_time_and_by_help = pytest.mark.parametrize("delay", [1, 0], ids=["in time", "all by help"], indirect=True)


def of_cross_entropy(n_labels: int, *others: float) -> RowProgram:
    """d lse = g / sumexp, each label -g, and of other rows g times a number; g is given."""
    k = 2 + n_labels + len(others)
    steps = [Step("div", ([k], [1])), Step("neg", ([k],))]
    steps += [Step("mul", ([k], number)) for number in others]
    results = [0.0, [k + 1], *[[k + 2]] * n_labels, *([k + 3 + i] for i in range(len(others)))]
    return RowProgram(k, 1, tuple(steps), tuple(results))


@functools.cache
def kernel(
    inputs: tuple[Like, ...], n_labels: int, n_given: int, which: str, program: str, delay: int, chain: str
) -> Wrapper:
    def f(z: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        labels, others = list(rest[:n_labels]), list(rest[n_labels:])
        weights, given = others[: len(others) - n_given], others[len(others) - n_given :]
        return ops.ROW_STATS_GRAD(z.view(z.shape), labels, weights, which, given, program, chain=chain)

    (wrapper,) = generate(f, *(like.meta() for like in inputs))
    return wrapper


def run(
    z: Tensor,
    labels: list[Tensor],
    weights: list[Tensor],
    given: list[Tensor],
    which: str,
    program: RowProgram,
    chain: str = "",
) -> tuple[Tensor, Tensor]:
    """The statistics and the gradient, each element written."""
    inputs = [z, *labels, *weights, *given]
    made_for = Like.of(inputs), len(labels), len(given), which, program.encode()
    wrapper = kernel(*made_for, one_read_lowering.ONCE.delay, chain)
    assert len(wrapper.launches) == 1
    assert "row_stats_grad" in wrapper.text
    packed, dz = torch.full((which.count(",") + 1, len(z)), torch.nan), torch.full_like(z, torch.nan)
    interpret(wrapper, inputs, packed, dz)
    return packed, dz


def check(
    z: Tensor,
    labels: list[Tensor],
    weights: list[Tensor],
    which: str,
    program: RowProgram,
    given: list[Tensor] | None = None,
    chained: Chained | None = None,
) -> None:
    given = [torch.rand(len(z))] if given is None else given
    packed, dz = run(z, labels, weights, given, which, program, chained.chain.encode() if chained else "")
    x = chained.before(z.double()) if chained else z
    expected = reference.stats(x, labels, weights, which)
    expected[0] = packed[0].where(expected[0].isnan(), expected[0])  # a maximum does not see NaN
    torch.testing.assert_close(packed.double(), expected, rtol=1e-5, atol=1e-3, equal_nan=True)
    c = coefficients(program, expected, [x.double() for x in given])
    wanted = reference.grad(x, labels, weights, expected[0], c, which)
    if chained:
        of = z.double().requires_grad_()
        (wanted,) = torch.autograd.grad(chained.before(of), of, wanted)
    torch.testing.assert_close(
        dz.double(), wanted, rtol=RELATIVE[z.dtype], atol=RELATIVE[z.dtype], equal_nan=True
    )


@pytest.mark.parametrize("v", VOCABULARIES)
@in_time_and_by_help
def test_every_vocabulary(v: int) -> None:
    check(logits(v), labels_for(v, 1), [], reference.rows(1, "sum"), of_cross_entropy(1, 0.1))


@pytest.mark.parametrize("dtype", NARROW)
@in_time_and_by_help
def test_every_dtype(dtype: torch.dtype) -> None:
    check(logits(500, dtype), labels_for(500, 2), [], reference.rows(2), of_cross_entropy(2))


SUMS = [f"{name}:{j}" for j in range(2) for name in reference.WEIGHTED + reference.KEPT + reference.SEEN]


@pytest.mark.parametrize("v", [7, 257, 600])
@in_time_and_by_help
def test_every_sum(v: int) -> None:
    others = ["sum", "sumexpz", *SUMS]
    program = of_cross_entropy(1, *(0.01 * (k + 1) for k in range(len(others))))
    check(logits(v), labels_for(v, 1), weights_for(v, 2), reference.rows(1, *others), program)


@pytest.mark.parametrize(
    "others", [["sumexpz"], ["dot:0"], ["expdot:0"], ["keptdot:0"], ["mass:0", "seendot:1"]], ids=",".join
)
def test_sums_that_combine_with_what_is_not_asked_for(others: list[str]) -> None:
    n_weights = len({row.split(":")[1] for row in others if ":" in row})
    program = of_cross_entropy(0, *[0.1] * len(others))
    check(logits(600), [], weights_for(600, n_weights), reference.rows(0, *others), program)


@in_time_and_by_help
def test_what_is_not_finite() -> None:
    """One finite column in each block and at its ends, none, and values that make a row NaN."""
    columns, v = [0, 255, 256, 511, 599], 600
    z = torch.full((len(columns) + 4, v), MINUS_INFINITY)
    z[range(len(columns)), columns] = 1.0
    z[-3:] = logits(v)
    z[-3, 300], z[-2, 599], z[-1, [1, 256]] = torch.nan, torch.inf, MINUS_INFINITY
    labels = torch.tensor([*columns, 3, 1, 2, 1])
    check(z, [labels], [], reference.rows(1), of_cross_entropy(1), [torch.full((len(z),), 0.5)])


def test_the_lowest_numbers() -> None:
    """As masks have them, in a block of nothing else and among others: exp of them is 0 before all else."""
    z, q, others = logits(600), torch.full((600,), 3.0), ["sumexpz", "expdot:0", "expzdot:0", "keptexpdot:0"]
    z[:, 200:520] = torch.finfo(z.dtype).min
    check(z, labels_for(600, 1), [q], reference.rows(1, *others), of_cross_entropy(1, *[0.1] * len(others)))


@pytest.mark.parametrize("left", [0, 2, 16])
def test_rows_that_do_not_count_are_not_written(left: int) -> None:
    z, (y,), g, program = logits(600), labels_for(600, 1), torch.rand(N), of_cross_entropy(1)

    def f(z: Tensor, y: Tensor, g: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
        op, which = torch.ops.inductor_ce.some_row_stats_grad, reference.rows(1)
        return op(z.view(z.shape), [y], [], which, [g], program.encode(), left, 1)

    inputs = [z, y, g, torch.tensor([99, left], dtype=torch.int32)]
    (wrapper,) = generate(f, *(like.meta() for like in Like.of(inputs)))
    packed, dz = torch.full((3, N), torch.nan), torch.full_like(z, torch.nan)
    interpret(wrapper, inputs, packed, dz)
    whole = run(z, [y], [], [g], reference.rows(1), program)
    for made, all_rows in ((packed.t(), whole[0].t()), (dz, whole[1])):
        assert torch.equal(made[:left], all_rows[:left])
        assert made[left:].isnan().all()


def test_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a piece may have whose size is symbolic: nothing is read."""
    monkeypatch.setattr(one_read_lowering, "is_known", lambda *args: True)
    packed, dz = run(
        logits(600)[:0],
        [torch.zeros(0, dtype=torch.int64)],
        [],
        [torch.zeros(0)],
        reference.rows(1),
        of_cross_entropy(1),
    )
    assert packed.numel() == dz.numel() == 0


@functools.cache
def kernel_over(
    v: int, dtype: torch.dtype, n_labels: int, which: str, program: str, delay: int, chain: str
) -> Wrapper:
    """Of logits that a product makes, and that are overwritten."""

    def f(h: Tensor, w: Tensor, g: Tensor, *labels: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.ops.inductor_ce.logits(h, w, None, [])
        packed, dz = ops.ROW_STATS_GRAD(z, [*labels], [], which, [g], program, chain=chain)
        return packed, dz @ w.t()

    inputs = [torch.empty(N, 8, dtype=dtype), torch.empty(8, v, dtype=dtype), torch.empty(N)]
    (wrapper,) = generate(f, *(like.meta() for like in Like.of([*inputs, *labels_for(v, n_labels)])))
    name = str(dtype).removeprefix("torch.")
    assert (N, v) not in wrapper.allocations_of(name), "the gradient has memory of its own"
    return wrapper


def run_over(
    z: Tensor,
    labels: list[Tensor],
    g: Tensor,
    which: str,
    program: RowProgram,
    shuffled: random.Random | None = None,
    chain: str = "",
) -> tuple[Tensor, Tensor]:
    """The statistics, and the gradient that is written over logits as these; by programs in any order."""
    z, delay = with_more_in_memory(z), one_read_lowering.ONCE.delay
    wrapper = kernel_over(z.shape[1], z.dtype, len(labels), which, program.encode(), delay, chain)
    assert f"W : tl.constexpr = {z.stride(0)}\n" in wrapper.text
    packed = torch.full((which.count(",") + 1, N), torch.nan)
    h, w = z.new_empty(N, 8), z.new_empty(8, z.shape[1])
    launch = launch_of(wrapper, [h, w, g, *labels], z, packed)
    order = [*range(launch.grid[0])]
    if shuffled is not None:
        shuffled.shuffle(order)
    interpreter.run(launch.source, launch.name, launch.grid, launch.arguments, *launch.written, order=order)
    return packed, z


@pytest.mark.parametrize("v", [249, 256, 257, 304, 513, 600, 1299])
@in_time_and_by_help
def test_over_the_logits(v: int) -> None:
    """Who helps reads what others have overwritten, and so does the last block, of the one before it."""
    z, labels, g, program = logits(v, torch.bfloat16), labels_for(v, 1), torch.rand(N), of_cross_entropy(1)
    expected = run(z, labels, [], [g], reference.rows(1), program)
    packed, dz = run_over(z, labels, g, reference.rows(1), program)
    if dz.is_contiguous():
        assert torch.equal(packed, expected[0])
        assert torch.equal(dz, expected[1])
    else:  # other columns are summed by one thread
        torch.testing.assert_close(packed, expected[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(dz, expected[1], rtol=2**-8, atol=0.0)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("v", "dtype"), [(600, torch.bfloat16), (1299, torch.float16), (300, torch.float32)])
def test_over_the_logits_in_any_order(v: int, dtype: torch.dtype, seed: int) -> None:
    """Blocks whose sums others have made, and have overwritten, before their own programs begin."""
    z, labels, g = logits(v, dtype), labels_for(v, 2), torch.rand(N)
    which, program = reference.rows(2, "sum"), of_cross_entropy(2, 0.1)
    expected = run_over(z, labels, g, which, program)
    made = run_over(z, labels, g, which, program, random.Random(seed))
    assert all(map(torch.equal, made, expected))


@in_time_and_by_help
def test_what_is_published_stays() -> None:
    """Block 1 of row 0 has been overwritten, so its word is there. Who makes its sums anew is too late."""
    z, (y,), g = logits(3 * BLOCK), labels_for(3 * BLOCK, 1), torch.rand(N)
    which, program = reference.rows(1), of_cross_entropy(1)
    expected = run(z, [y], [], [g], which, program)
    wrapper = kernel(Like.of([z, y, g]), 1, 1, which, program.encode(), one_read_lowering.ONCE.delay, "")

    def ran(z: Tensor, words: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        made = torch.empty(3, N), torch.empty_like(z)
        launch = launch_of(wrapper, [z, y, g], *made)
        launch.arguments[-1].copy_(words)
        interpreter.run(
            launch.source, launch.name, launch.grid, launch.arguments, *made, launch.arguments[-1]
        )
        return *made, launch.arguments[-1]

    *_, words = ran(z, torch.zeros((), dtype=torch.uint8))
    only = torch.zeros_like(words)
    of_block = slice(8, 16)
    only[of_block] = words[of_block]
    z = z.clone()
    z[0, BLOCK : 2 * BLOCK] = 50.0
    packed, dz, after = ran(z, only)
    assert torch.equal(packed, expected[0])
    assert torch.equal(after, words)
    assert torch.equal(dz[0, :BLOCK], expected[1][0, :BLOCK])
    assert torch.equal(dz[0, 2 * BLOCK :], expected[1][0, 2 * BLOCK :])


def test_symbolic_rows() -> None:
    """The words of the template, 8 bytes each, are as many as there are rows."""
    inputs = [logits(600), *labels_for(600, 1), torch.rand(N)]

    def f(z: Tensor, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return ops.ROW_STATS_GRAD(
            z.view(z.shape), [y], [], reference.rows(1), [g], of_cross_entropy(1).encode()
        )

    (wrapper,) = generate(f, *(like.meta() for like in Like.of(inputs)), dynamic=True)
    (name,) = wrapper.launches
    words = -(-600 // BLOCK) + 1
    size = re.search(r"workspace_\d+ = empty_strided_cuda\(\((\d+)\*(s\d+), \)", wrapper.text)
    assert size is not None
    assert int(size[1]) == 8 * words
    assert re.search(rf"{name}\.run\(.*3\*{size[2]} \+ \d+|{name}\.run\(.*\d+ \+ 3\*{size[2]}", wrapper.text)


# Chains


class Chained(NamedTuple):
    """A chain, and what it makes of logits."""

    chain: Chain
    before: Callable[[Tensor], Tensor]


def soft_cap(c: float = 2.0) -> Chained:
    return Chained(bench.soft_cap(c), lambda z: c * torch.tanh(z / c))


def shifted() -> Chained:
    """Of padding, of -inf and of 0 it makes something finite that is larger than what logits are."""
    before = RowProgram(1, 0, (Step("maximum", ([0], -3.0)), Step("add", ([1], 9.0))), ([2],))
    after = RowProgram(1, 1, (Step("ge", ([0], -3.0)), Step("where", ([2], [1], 0.0))), ([3],))
    return Chained(Chain(before, after), lambda z: z.clamp(min=-3.0) + 9.0)


CHAINED = {"soft-cap": soft_cap(), "shift": shifted()}


@pytest.mark.parametrize("v", VOCABULARIES)
@pytest.mark.parametrize("name", CHAINED)
@in_time_and_by_help
def test_every_vocabulary_behind_a_chain(name: str, v: int) -> None:
    z, labels = logits(v), labels_for(v, 1)
    check(z, labels, [], reference.rows(1, "sum"), of_cross_entropy(1, 0.1), chained=CHAINED[name])


@pytest.mark.parametrize("v", [249, 513, 600])
@pytest.mark.parametrize("name", CHAINED)
@in_time_and_by_help
def test_over_the_logits_behind_a_chain(name: str, v: int) -> None:
    z, labels, g, program = logits(v, torch.bfloat16), labels_for(v, 1), torch.rand(N), of_cross_entropy(1)
    chain = CHAINED[name].chain.encode()
    expected = run(z, labels, [], [g], reference.rows(1), program, chain)
    for made, right in zip(
        run_over(z, labels, g, reference.rows(1), program, chain=chain), expected, strict=True
    ):
        torch.testing.assert_close(made, right, rtol=2**-8 if made.itemsize == 2 else 1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", NARROW)
def test_every_dtype_behind_a_chain(dtype: torch.dtype) -> None:
    """It is in float32, and not rounded before the gradient is."""
    z, labels = logits(500, dtype), labels_for(500, 1)
    check(z, labels, [], reference.rows(1), of_cross_entropy(1), chained=soft_cap())


def test_a_cap_that_no_logit_comes_near() -> None:
    """What is lost of 1 beside an exponential is not multiplied with it."""
    z, labels = logits(500, torch.bfloat16), labels_for(500, 1)
    check(z, labels, [], reference.rows(1), of_cross_entropy(1), chained=soft_cap(1e6))


def raised() -> Chained:
    before = RowProgram(1, 0, (Step("maximum", ([0], 1e-40)),), ([1],))
    after = RowProgram(1, 1, (Step("ge", ([0], 1e-40)), Step("where", ([2], [1], 0.0))), ([3],))
    return Chained(Chain(before, after), lambda z: z.clamp(min=1e-40))


def lowered_and_raised() -> Chained:
    """The reciprocal of what it is divided by is no number of float32."""
    tenfold = RowProgram(1, 0, (Step("mul", ([0], 2e-38)), Step("div", ([1], 2e-39))), ([2],))
    return Chained(Chain(tenfold, RowProgram(1, 1, (Step("mul", ([1], 10.0)),), ([2],))), lambda z: 10 * z)


@pytest.mark.parametrize("chained", [raised(), lowered_and_raised()], ids=["bound", "divisor"])
def test_a_number_that_is_subnormal(chained: Chained) -> None:
    """Triton would have it, and all that is made of it, in float64."""
    check(logits(500), labels_for(500, 1), [], reference.rows(1), of_cross_entropy(1), chained=chained)


@pytest.mark.parametrize("by", ["operator", "loops", "template"])
def test_a_truth_value_in_a_chain(by: str) -> None:
    z, (y,), g = logits(500), labels_for(500, 1), torch.rand(N)
    before = RowProgram(1, 0, (Step("where", (True, [0], 0.0)),), ([1],))
    after = RowProgram(1, 1, (Step("where", (True, [1], 0.0)),), ([2],))
    which, program, chain = reference.rows(1), of_cross_entropy(1), Chain(before, after).encode()

    def f(z: Tensor, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return ops.ROW_STATS_GRAD(z, [y], [], which, [g], program.encode(), chain=chain)

    if by == "template":
        made = run(z, [y], [], [g], which, program, chain)
    else:
        made = (f if by == "operator" else torch.compile(f))(z, y, g)
    for own, plain in zip(made, run(z, [y], [], [g], which, program), strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("by", ["operator", "loops", "template"])
def test_what_is_not_finite_behind_a_chain(by: str) -> None:
    z = logits(600)
    z[0, ::2], z[1, 3], z[2, 5] = -torch.inf, torch.inf, torch.nan
    labels, g = labels_for(600, 1), torch.rand(N)
    which, program, (chain, before) = reference.rows(1), of_cross_entropy(1), soft_cap()

    def f(z: Tensor, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return ops.ROW_STATS_GRAD(z, [y], [], which, [g], program.encode(), chain=chain.encode())

    if by == "template":
        packed, dz = run(z, labels, [], [g], which, program, chain.encode())
    else:
        packed, dz = (f if by == "operator" else torch.compile(f))(z, *labels, g)
    of = z.double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(before(of), labels[0], reduction="none", ignore_index=-100)
    (wanted,) = torch.autograd.grad(losses, of, g.double())
    torch.testing.assert_close(dz.double(), wanted, rtol=1e-4, atol=1e-5, equal_nan=True)
    expected = reference.stats(before(z.double()), labels, [], which)
    torch.testing.assert_close(packed[1:].double(), expected[1:], rtol=1e-5, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize(
    ("c", "dtype", "fast"),
    [(30.0, torch.bfloat16, True), (30.0, torch.float32, False), (1e6, torch.bfloat16, False)],
)
def test_tanh_is_as_exact_as_it_is_to_be(c: float, dtype: torch.dtype, fast: bool) -> None:
    """Of 16 bits it may be off by what a rounding is near 1, of which a large cap makes more."""
    inputs = [logits(600, dtype), *labels_for(600, 1), torch.rand(N)]
    program, chain = of_cross_entropy(1).encode(), bench.soft_cap(c).encode()
    text = kernel(Like.of(inputs), 1, 1, reference.rows(1), program, 1, chain).text
    assert ("fast_dividef" in text) == fast
    assert ("libdevice.tanh" in text) != fast


def test_a_chain_is_its_text() -> None:
    for chained in CHAINED.values():
        assert chains.decode(chained.chain.encode()) == chained.chain
    assert chains.decode("") is None


# Programs


def every_function() -> RowProgram:
    """Of s = (max, sumexp) and given a float [N], an integer [N], a bool [N] and a float []."""
    steps = []

    def step(name: str, *args: Any) -> list[int]:
        steps.append(Step(name, args))
        return [5 + len(steps)]

    m, d, g, y, b, one = ([i] for i in range(6))
    x = step("add", step("mul", step("sub", m, 1), g), step("div", d, 2.5))
    x = step("add", x, step("neg", step("abs", step("sub", step("exp", step("mul", g, -1.0)), d))))
    x = step("add", x, step("sqrt", step("log", step("add", d, 1.0))))
    x = step("add", x, step("reciprocal", step("sigmoid", step("tanh", g))))
    x = step("minimum", step("maximum", x, -50.0), step("mul", one, 40.0))
    comparisons = [step(name, y, 2) for name in ("eq", "ne", "lt", "le", "gt", "ge")]
    truth = step("and", step("or", comparisons[0], comparisons[2]), step("not", comparisons[5]))
    for comparison in (comparisons[1], comparisons[3], comparisons[4]):
        truth = step("or", truth, step("and", comparison, b))
    truth = step("and", truth, step("not", step("isnan", x)))
    x = step("where", truth, x, step("where", b, 1.5, step("float", b)))
    results = x, step("sub", 1.0, x)
    return RowProgram(2, 4, tuple(steps), results)


def test_every_function_means_the_same() -> None:
    program = every_function()
    assert {step.name for step in program.steps} == set(FUNCTIONS)
    assert decode(program.encode()) == program
    n = 6
    z, given = 3 * torch.randn(n, 300), [torch.rand(n), torch.arange(n), torch.arange(n) % 3 > 0]
    given.append(torch.tensor(0.3))
    packed, dz = run(z, [], [], given, reference.rows(0), program)
    eager = ops.ROW_STATS_GRAD(z, [], [], reference.rows(0), given, program.encode())
    torch.testing.assert_close(packed, eager[0])
    torch.testing.assert_close(dz, eager[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["maximum", "minimum"])
def test_nan_stays_nan(name: str) -> None:
    program = RowProgram(2, 1, (Step(name, ([2], 0.5)),), (0.0, [3]))
    z, g = logits(300), torch.tensor([torch.nan, 0.2, 0.8])
    _, dz = run(z, [], [], [g], reference.rows(0), program)
    assert dz.isnan().all(1).tolist() == [True, False, False]


def truth_of_numbers() -> RowProgram:
    """Of those of which no bits are common, and of what a literal is beside truth values."""
    steps = [Step("gt", ([1], 0.0)), Step("and", ([2], [4])), Step("or", ([2], [3]))]
    steps += [Step("where", ([5], [6], False)), Step("where", ([7], 1.0, 0.0)), Step("and", ([2], [3]))]
    steps += [Step("float", ([9],)), Step("mul", ([10], 0.5)), Step("add", ([8], [11]))]
    return RowProgram(2, 2, tuple(steps), (0.0, [12]))


@pytest.mark.parametrize("by", ["operator", "loops", "template"])
def test_truth_of_numbers(by: str) -> None:
    z, given = logits(300), [torch.tensor([2, 0, 2]), torch.tensor([0.0, 3.0, 1.0])]
    which, program = reference.rows(0), truth_of_numbers()

    def f(z: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
        return ops.ROW_STATS_GRAD(z, [], [], which, list(given), program.encode())

    if by == "template":
        _, dz = run(z, [], [], given, which, program)
    else:
        _, dz = (f if by == "operator" else torch.compile(f))(z, *given)
    factor = torch.tensor([1.0, 0.0, 1.5])[:, None]
    torch.testing.assert_close(dz, factor * (z - z.amax(1, keepdim=True)).exp(), rtol=1e-5, atol=1e-6)


def test_0_where_another_number_is_not_true() -> None:
    program = of_cross_entropy(1)
    z, labels, g = logits(300), labels_for(300, 1), torch.rand(N)
    counts = torch.tensor([True, False, True])
    _, dz = run(z, labels, [], [g, counts], reference.rows(1), program.where_given())
    _, expected = run(z, labels, [], [g], reference.rows(1), program)
    assert torch.equal(dz, torch.where(counts[:, None], expected, 0.0))


def test_a_program_of_something_else() -> None:
    z, labels, g = logits(300), labels_for(300, 1), torch.rand(N)
    program = of_cross_entropy(1).encode()
    for which, given in (
        (reference.rows(1, "sum"), [g]),
        (reference.rows(1), []),
        (reference.rows(1), [g[None]]),
    ):
        with pytest.raises(ValueError, match="is no program of"):
            ops.ROW_STATS_GRAD(z, labels, [], which, given, program)


# Where there is no such template


@pytest.mark.parametrize(
    ("v", "others", "templates"),
    [(304, [], 1), (304, ["sum"], 1), (304, ["sumexpz"], 2), (304, ["dot:0"], 2), (300, [], 2)],
)
def test_where_two_are_no_slower(
    v: int, others: list[str], templates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    weights = weights_for(v, 1) if "dot:0" in others else []
    inputs = [logits(v, torch.bfloat16), *labels_for(v, 1), torch.rand(N), *weights]
    which, program = reference.rows(1, *others), of_cross_entropy(1, *[0.1] * len(others)).encode()

    def f(z: Tensor, y: Tensor, g: Tensor, *weights: Tensor) -> Any:
        return ops.ROW_STATS_GRAD(z.view(z.shape), [y], [*weights], which, [g], program)

    (wrapper,) = generate(f, *(like.meta() for like in Like.of(inputs)))
    assert len([name for name in wrapper.launches if "tem" in name]) == templates


def test_a_chain_before_has_two() -> None:
    """They absorb it; what writes several results absorbs nothing."""
    inputs = [logits(300, torch.bfloat16), *labels_for(300, 1), torch.rand(N)]

    def f(z: Tensor, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        capped = 30 * torch.tanh(z / 30)
        return ops.ROW_STATS_GRAD(capped, [y], [], reference.rows(1), [g], of_cross_entropy(1).encode())

    (wrapper,) = generate(f, *(like.meta() for like in Like.of(inputs)))
    assert [name for name in wrapper.launches if "tem" in name] == wrapper.launches[::2]
    assert len(wrapper.launches) == 3


def test_a_chain_within_has_two_where_one_is_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    """They absorb it too: before the gradient, and behind it."""
    monkeypatch.undo()
    inputs, chain = (
        [logits(300, torch.bfloat16), *labels_for(300, 1), torch.rand(N)],
        soft_cap().chain.encode(),
    )
    which, program = reference.rows(1), of_cross_entropy(1).encode()

    def f(z: Tensor, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return ops.ROW_STATS_GRAD(z.view(z.shape), [y], [], which, [g], program, chain=chain)

    (wrapper,) = generate(f, *(like.meta() for like in Like.of(inputs)))
    assert [name for name in wrapper.launches if "tem" in name] == wrapper.launches[::2]
    assert len(wrapper.launches) == 3


@pytest.mark.parametrize("v", [300, 304])
def test_rows_of_a_gradient_that_two_make_behind_a_chain_are_aligned(
    v: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not lie over the logits, and products read it."""
    monkeypatch.setattr(one_read_lowering, "is_known", lambda *args: False)
    which, program, chain = reference.rows(1), of_cross_entropy(1).encode(), soft_cap().chain.encode()

    def f(h: Tensor, w: Tensor, g: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.ops.inductor_ce.logits(h, w, None, [])
        packed, dz = ops.ROW_STATS_GRAD(z, [y], [], which, [g], program, chain=chain)
        return packed, dz @ w.t()

    inputs = [*(torch.empty(size, dtype=torch.bfloat16) for size in ((N, 8), (8, v))), torch.empty(N)]
    (wrapper,) = generate(f, *(like.meta() for like in Like.of([*inputs, *labels_for(v, 1)])))
    assert len(wrapper.launches) == 3
    assert wrapper.code.count(f"empty_strided_cuda(({N}, {v}), (304, 1), torch.bfloat16)") == 1
    assert (N, v) not in wrapper.allocations_of("float32")


def test_a_number_of_the_cpu_has_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch takes it beside tensors of a GPU, and so does a loop; a template would be given no pointer."""
    move = gpu_codegen.move_to_gpu

    def moved(graph: torch.fx.GraphModule) -> list[Any]:
        places = [node for node in graph.graph.nodes if node.op == "placeholder"]
        numbers = {node: node.meta["val"] for node in places if not node.meta["val"].dim()}
        move(graph)
        for node, number in numbers.items():
            node.meta["val"] = number
        return [node.meta["val"] for node in places]

    monkeypatch.setattr(gpu_codegen, "move_to_gpu", moved)
    inputs = [logits(300), *labels_for(300, 1), torch.tensor(0.5)]

    def f(z: Tensor, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return ops.ROW_STATS_GRAD(z, [y], [], reference.rows(1), [g], of_cross_entropy(1).encode())

    (wrapper,) = generate(f, *(like.meta() for like in Like.of(inputs)))
    assert [name for name in wrapper.launches if "tem" in name] == wrapper.launches[::2]
    assert len(wrapper.launches) == 3


@pytest.mark.parametrize(
    ("dtype", "which"),
    [(torch.float64, "max,sumexp,pick"), (torch.float32, "max,sumexp,pick,sumexp^2.0")],
    ids=["float64", "float64 sums"],
)
def test_what_has_no_template_has_two(dtype: torch.dtype, which: str) -> None:
    which = ops.Rows.of(1, *([ops.Row(ops.POWER, order=2.0)] if "^" in which else [])).encode()
    program = of_cross_entropy(1, *([0.1] if "^" in which else []))
    inputs = [logits(300, dtype), *labels_for(300, 1), torch.rand(N)]

    def f(z: Tensor, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return ops.ROW_STATS_GRAD(z.view(z.shape), [y], [], which, [g], program.encode())

    (wrapper,) = generate(f, *(like.meta() for like in Like.of(inputs)))
    assert len([name for name in wrapper.launches if "tem" in name]) == 2


@pytest.mark.parametrize("chain", ["", soft_cap().chain.encode()], ids=["plain", "soft-cap"])
def test_it_compiles_for_a_gpu(chain: str) -> None:
    inputs = [logits(600, torch.bfloat16), *labels_for(600, 1), torch.rand(N)]
    which, program = reference.rows(1, "sum"), of_cross_entropy(1, 0.1)
    wrapper = kernel(Like.of(inputs), 1, 1, which, program.encode(), 1, chain)
    (name,) = wrapper.launches
    text = triton_ir(wrapper.kernels[name], name, wrapper.signature(name))
    assert text.count("tt.atomic_cas") == 6
