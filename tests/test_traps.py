"""Traps that others fell into, by their numbers. On a GPU the same tests run on the generated kernels."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from harness import Graphs, Rewritten, compile_rewritten, compile_without_codegen, sites
from pairwise import EVERYTHING, in_turns, pairwise
from reference import Measured, Terms, assert_as_fair, assert_fair, measure
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass

import inductor_ce
from inductor_ce import ops
from inductor_ce.ops import lowering

N, V = 12, 37
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
on_devices = pytest.mark.parametrize("device", DEVICES)
INF, NAN = math.inf, math.nan


@pytest.fixture(autouse=True)
def _one_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing for the GPU to time."""
    monkeypatch.setattr(lowering, "STATS", lowering.STATS[:1])
    monkeypatch.setattr(lowering, "GRAD", lowering.GRAD[:1])


def compiled(f: Callable[..., Any], device: str, **options: Any) -> Callable[..., Any]:
    """On the CPU all passes and no code generation; on a GPU the kernels themselves."""
    if device == "cpu":
        return compile_without_codegen(f, **options)[0]
    dynamic = options.pop("dynamic", None)
    inductor_ce.install(min_vocab=2, **options)
    return torch.compile(f, dynamic=dynamic)


def rewritten(f: Callable[..., Any], device: str) -> Callable[..., Any]:
    """On the CPU the rewrite alone: what the mistake was made in is the loss that is read, or its kernels."""
    return compile_rewritten(f)[0] if device == "cpu" else compiled(f, device)


def logits(device: str = "cpu", n: int = N, v: int = V, dtype: torch.dtype = torch.float32) -> Tensor:
    return (3 * torch.randn(n, v)).to(device, dtype)


def labels(device: str = "cpu", n: int = N, v: int = V) -> Tensor:
    return torch.randint(0, v, (n,)).to(device)


def cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, reduction="none")


def log_softmax_gather(z: Tensor, y: Tensor) -> Tensor:
    return -F.log_softmax(z, dim=-1).gather(-1, y[:, None]).squeeze(-1)


def logsumexp_gather(z: Tensor, y: Tensor) -> Tensor:
    return torch.logsumexp(z, -1) - z.gather(-1, y.unsqueeze(-1)).squeeze(-1)


def rich(z: Tensor, y: Tensor) -> Tensor:
    """Label smoothing and z-loss: every statistic is used."""
    smoothed = F.cross_entropy(z, y, reduction="none", label_smoothing=0.1)
    return smoothed + 1e-2 * z.logsumexp(-1).square()


def exactly(z: Tensor, y: Tensor, terms: Terms) -> Measured:
    return measure(lambda z: reference.cross_entropy(z, y, terms), z.double())


def with_logsumexp(z: Tensor, y: Tensor) -> Tensor:
    """The normaliser is a number of its own: -inf for a row of -inf, +inf for a row that holds +inf."""
    return torch.stack([cross_entropy(z, y), torch.logsumexp(z, dim=-1)])


SPELLINGS = [cross_entropy, log_softmax_gather, logsumexp_gather]


def assert_as_eager(
    f: Callable[..., Tensor], z: Tensor, *args: Any, fused: int = 1, run: Callable[..., Tensor] | None = None
) -> None:
    """Value and gradient, NaN included; `run` is f compiled, once for all that it is given."""
    eager = measure(f, z, *args)
    ours = measure(run or rewritten(f, z.device.type), z, *args)
    assert sites() == fused
    torch.testing.assert_close(ours.value, eager.value, equal_nan=True)
    torch.testing.assert_close(ours.gradient, eager.gradient, equal_nan=True)


# 1


def leave_nan(*like: Tensor) -> None:
    """In the memory that the next allocations of these sizes get."""
    for t in like:
        torch.full(t.shape, NAN, device=t.device)


@pytest.fixture
def poison(device: str) -> Iterator[Callable[..., None]]:
    """On the CPU torch.empty holds NaN throughout; on a GPU each call leaves NaN for what comes next."""
    if device != "cpu":
        yield leave_nan
        return
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield lambda *like: None
    torch.use_deterministic_algorithms(False)


@on_devices
@pytest.mark.parametrize("f", [cross_entropy, rich])
def test_trap_01_ignored_rows_are_written(
    f: Callable[[Tensor, Tensor], Tensor], device: str, poison: Callable[..., None]
) -> None:
    """An ignored row returns early and its output slot is never written; garbage survives."""
    terms = Terms("none") if f is cross_entropy else Terms("none", smoothing=0.1)

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y, reduction="none", label_smoothing=terms.smoothing)

    z, run = logits(device), rewritten(loss, device)
    for ignored in ([], [3], slice(None), slice(None, None, 2), slice(1, None, 3), slice(0, -1)):
        y = labels(device)
        y[ignored] = -100
        naive, exact = measure(loss, z, y), exactly(z, y, terms)
        poison(z, y, z[:, 0])
        ours = measure(run, z, y)
        assert_as_fair(ours, naive, exact)
        assert ours.value[ignored].eq(0).all()
        assert ours.gradient[ignored].eq(0).all()
        poison(z, y, z[:, 0])
        with torch.no_grad():
            assert_fair(run(z, y), naive.value, exact.value)
    assert sites() == 2  # with gradients, and without


# 2, 3

UPSTREAM: dict[str, Callable[[Tensor], Tensor]] = {
    "scaled": lambda loss: (loss * 0.37).sum(),
    "weighted": lambda loss: (loss * torch.linspace(-2, 3, N, device=loss.device)).sum(),
    "negative": lambda loss: -loss.mean(),
    "zero": lambda loss: (0 * loss).sum(),
    "squared": lambda loss: (loss**2).sum(),
}


@on_devices
@pytest.mark.parametrize("inside", [True, False])
def test_trap_02_upstream_gradients_other_than_one(inside: bool, device: str) -> None:
    """Tests only used an upstream gradient of 1."""
    half, terms = rewritten(rich, device), Terms("none", smoothing=0.1, z_weight=1e-2)
    for then in UPSTREAM.values():
        z, y = logits(device), labels(device)
        whole = lambda z, y, then=then: then(rich(z, y))  # noqa: E731
        outside = lambda z, y, then=then: then(half(z, y))  # noqa: E731
        ours = measure(rewritten(whole, device) if inside else outside, z, y)
        exact = measure(lambda z, y=y, then=then: then(reference.cross_entropy(z, y, terms)), z.double())
        assert_as_fair(ours, measure(whole, z, y), exact)
    assert sites() == (len(UPSTREAM) if inside else 1)


@pytest.mark.in_turns
@on_devices
@pytest.mark.parametrize("upstream", ["expanded", "transposed", "sum"])
@pytest.mark.parametrize("transposed", [False, True])
def test_trap_03_upstream_gradients_of_any_strides(transposed: bool, upstream: str, device: str) -> None:
    """Upstream gradient expanded (stride 0) or transposed: `loss.sum()`, transposed per-token losses."""

    def loss(z: Tensor, y: Tensor) -> Tensor:
        per_token = rich(z, y).view(3, 4)
        return per_token.t() if transposed else per_token

    z, y, run = logits(device).requires_grad_(), labels(device), rewritten(loss, device)
    eager, ours = loss(z, y), run(z, y)
    if upstream == "sum":
        eager.sum().backward()
        expected, z.grad = z.grad, None
        ours.sum().backward()
    else:
        g = torch.rand(1, 1, device=device).expand_as(eager)
        g = g if upstream == "expanded" else torch.randn(*eager.t().shape, device=device).t()
        eager.backward(g)
        expected, z.grad = z.grad, None
        ours.backward(g)
    assert sites() == 1
    torch.testing.assert_close(z.grad, expected)


# 4


def test_trap_04_the_reference_is_independent() -> None:
    """The reference compared with itself."""
    tree = ast.parse(Path(reference.__file__).read_text())
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not any("inductor_ce" in name or "functional" in name for name in imported)
    y = torch.tensor([0, 2, -100])
    uniform = torch.zeros(3, 4)
    assert reference.cross_entropy(uniform, y).item() == pytest.approx(math.log(4))
    z = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, math.log(2)], [9.0, 9.0, 9.0]])
    by_hand = [math.log(math.e + math.e**2 + math.e**3) - 1, math.log(4) - math.log(2), 0]
    assert reference.cross_entropy(z, y, Terms("none")).tolist() == pytest.approx(by_hand)
    z = logits(n=4, v=5).double().requires_grad_()
    terms = Terms("mean", 0, 0.1, 0.1)
    y = torch.tensor([0, 1, 4, 2])
    assert torch.autograd.gradcheck(lambda z: reference.cross_entropy(z, y, terms), z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", ["one row", "one element", "everything a little"])
def test_trap_04_a_wrong_result_is_seen(what: str, dtype: torch.dtype) -> None:
    """The reference compared with itself: the tolerance must refuse what is not right."""
    z, y = logits(dtype=dtype), labels()
    naive, exact = measure(cross_entropy, z, y), exactly(z, y, Terms("none"))
    wrong = exact.gradient.to(dtype)
    assert_fair(wrong, naive.gradient, exact.gradient)
    if what == "one row":
        wrong[3] = 0
    elif what == "one element":
        wrong[3, y[3]] *= 0.8
    else:
        wrong *= 1 + 16 * torch.finfo(dtype).eps
    with pytest.raises(AssertionError, match="error"):
        assert_fair(wrong, naive.gradient, exact.gradient)


# 5, 6


def filled(z: Tensor, rows: slice, value: float, *but: int) -> Tensor:
    kept = z[rows, list(but)].clone()
    z[rows] = value
    z[rows, list(but)] = kept
    return z


NOT_FINITE: dict[str, Callable[[Tensor], Tensor]] = {
    "one finite column, the first": lambda z: filled(z, slice(None), -INF, 0),
    "one finite column, in the middle": lambda z: filled(z, slice(None), -INF, z.shape[1] // 2),
    "one finite column, the last": lambda z: filled(z, slice(None), -INF, z.shape[1] - 1),
    "whole rows of -inf": lambda z: filled(z, slice(2, 5), -INF),
    "NaN": lambda z: z.index_fill_(1, torch.tensor([1], device=z.device), NAN),
    "whole rows of NaN": lambda z: filled(z, slice(2, 5), NAN),
    "+inf": lambda z: z.index_fill_(1, torch.tensor([z.shape[1] - 2], device=z.device), INF),
    "whole rows of +inf": lambda z: filled(z, slice(2, 5), INF),
}


@on_devices
@pytest.mark.parametrize("f", [*SPELLINGS, rich, with_logsumexp])
def test_trap_05_rows_that_are_not_finite(f: Callable[[Tensor, Tensor], Tensor], device: str) -> None:
    """The first block of a row is all -inf: (-inf)-(-inf) = NaN."""
    v, run = 20_000 if device == "cuda" else V, rewritten(f, device)
    for fill in NOT_FINITE.values():
        z, y = fill(logits(device, v=v)), labels(device, v=v)
        y[:4] = torch.tensor([0, v // 2, v - 2, v - 1])
        assert_as_eager(f, z, y, run=run)


@on_devices
@pytest.mark.parametrize("f", SPELLINGS)
def test_trap_05_rows_that_are_not_finite_and_do_not_count(
    f: Callable[[Tensor, Tensor], Tensor], device: str
) -> None:
    """The first block of a row is all -inf: (-inf)-(-inf) = NaN. Such rows may be masked padding."""
    counts = torch.ones(N, dtype=torch.bool, device=device)
    counts[2:5] = False

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return torch.where(counts, f(z, y), 0.0).sum() / counts.sum()

    run = rewritten(loss, device)
    for value in (-INF, INF, NAN):
        assert_as_eager(loss, filled(logits(device), slice(2, 5), value), labels(device), run=run)


CHAINS: dict[str, Callable[[Tensor], Tensor]] = {
    "soft-cap": lambda x: 30 * torch.tanh(x / 30),
    "negative scale": lambda x: x * -1.7,
    "bias": lambda x: x + torch.linspace(1, 2, x.shape[1], device=x.device, dtype=x.dtype),
}


@pytest.mark.in_turns
@on_devices
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("v", [32000, 50257, 65537, 256000])
def test_trap_06_padding_lanes_before_a_chain(v: int, chain: str, device: str) -> None:
    """Padding lanes set to -inf before soft-cap, scale or bias become finite."""
    before = CHAINS[chain]

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(before(z.float()), y)

    z, y = logits(device, 3, v, torch.bfloat16), torch.tensor([0, v // 2, v - 1], device=device)
    exact = measure(lambda z: reference.cross_entropy(before(z), y), z.double())
    ours = measure(rewritten(loss, device), z, y)
    assert sites() == 1
    assert_as_fair(ours, measure(loss, z, y), exact)


# 10


@pytest.mark.gpu
@pytest.mark.parametrize("n", [32767, 32768])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_trap_10_offsets_beyond_32_bits(n: int, smoothing: float) -> None:
    """32-bit offsets: row*V passes 2^31. N*V just below and above, last rows checked, gradients too."""
    v, last = 65537, 3
    assert (n * v < 2**31) == (n == 32767)
    z = torch.empty(n, v, device="cuda", dtype=torch.bfloat16).normal_(0, 3).requires_grad_()
    y = labels("cuda", n, v)
    y[-1], y[-2] = v - 1, 0

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y, reduction="none", label_smoothing=smoothing)

    losses = compiled(loss, "cuda")(z, y)
    (dz,) = torch.autograd.grad(losses, z, torch.ones_like(losses))
    assert sites() == 1
    assert losses.isfinite().all()
    for rows in (slice(0, last), slice(n // 2, n // 2 + last), slice(n - last, n)):
        few = z[rows].detach(), y[rows]
        ours = Measured(losses[rows].detach(), dz[rows])
        assert_as_fair(ours, measure(loss, *few), exactly(*few, Terms("none", smoothing=smoothing)))


# 12: test_artefacts.py


# 13

SLOTS = ("pre_grad_custom_pass", "joint_custom_pre_pass")


def slots() -> list[Any]:
    return [getattr(inductor_config, slot) for slot in SLOTS]


def fuses() -> bool:
    """Whether a loss that is compiled now is fused."""
    torch._dynamo.reset()
    counters.clear()
    torch.compile(cross_entropy, backend=Graphs())(logits(), labels())
    return sites() == 1


def fail_while_installed(and_before: Callable[[], None], **options: Any) -> None:
    with inductor_ce.install(**options):
        and_before()
        raise ZeroDivisionError


def test_trap_13_restored_after_a_raise() -> None:
    """A global handler leaks after an exception."""
    before = slots()

    def within() -> None:
        assert fuses()

    with pytest.raises(ZeroDivisionError):
        fail_while_installed(within, min_vocab=2)
    assert slots() == before
    assert not fuses()


def test_trap_13_restored_after_a_failed_compilation() -> None:
    """A global handler leaks after an exception, be it one in the midst of compilation."""
    before = slots()
    with inductor_ce.install(min_vocab=2, on_miss="raise"):
        refused = torch.compile(lambda z: z.log_softmax(-1), backend=Graphs())
        with pytest.raises(Exception, match="log_softmax is returned"):
            refused(logits())
    assert slots() == before


def test_trap_13_nested() -> None:
    """A global handler leaks after an exception: the inner one restores the outer."""
    before = slots()

    def within() -> None:
        assert not fuses()

    with inductor_ce.install(min_vocab=2):
        outer = [p.options for p in slots()]
        with pytest.raises(ZeroDivisionError):
            fail_while_installed(within, min_vocab=V + 1)
        assert [p.options for p in slots()] == outer
        assert fuses()
    assert slots() == before


def test_trap_13_twice() -> None:
    """A global handler leaks after an exception: twice installed is once installed."""
    before = slots()
    first, second = inductor_ce.install(min_vocab=2), inductor_ce.install(min_vocab=2)
    assert all(not isinstance(value, (list, tuple)) for value in slots())
    assert fuses()
    first.uninstall()
    assert fuses()
    second.uninstall()
    assert slots() == before
    second.uninstall()
    inductor_ce.install()
    inductor_ce.install()
    inductor_ce.uninstall()
    assert slots() == before


class Foreign(CustomGraphPass):
    """A pass of somebody else's."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.calls += 1

    def uuid(self) -> str:
        return "foreign"


@pytest.mark.parametrize("slot", SLOTS)
def test_trap_13_foreign_passes_are_kept(slot: str) -> None:
    """A global handler leaks after an exception: a foreign pass keeps its slot and still runs."""
    foreign = Foreign()

    def within() -> None:
        measure(torch.compile(cross_entropy, backend=Graphs()), logits(), labels())
        assert sites() == 1
        assert foreign.calls == 1

    with inductor_config.patch({slot: foreign}):
        with pytest.raises(ZeroDivisionError):
            fail_while_installed(within, min_vocab=2)
        assert getattr(inductor_config, slot) is foreign


@pytest.mark.parametrize("slot", SLOTS)
def test_trap_13_foreign_passes_that_come_later_are_kept(slot: str) -> None:
    """A global handler leaks after an exception: what others configured meanwhile is theirs."""
    foreign = Foreign()
    with inductor_config.patch({slot: getattr(inductor_config, slot)}):
        handle = inductor_ce.install(min_vocab=2)
        setattr(inductor_config, slot, foreign)
        handle.uninstall()
        assert getattr(inductor_config, slot) is foreign


# 14


def logits_returned(z: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return F.cross_entropy(z, y), z


def logits_viewed(z: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return F.cross_entropy(z, y), z.view(3, 4, V)


def returned_in_float32(z: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = z.float()
    return F.cross_entropy(z, y), z


def auxiliary_loss(z: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return (F.cross_entropy(z, y) + 1e-3 * z.square().mean(),)


def auxiliary_statistics(z: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return F.cross_entropy(z, y), z.amax(-1), z.abs().mean()


AUXILIARY = [logits_returned, logits_viewed, returned_in_float32, auxiliary_loss, auxiliary_statistics]


@pytest.mark.in_turns
@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("f", AUXILIARY)
def test_trap_14_logits_that_somebody_else_reads(
    f: Callable[[Tensor, Tensor], tuple[Tensor, ...]], dtype: torch.dtype, device: str
) -> None:
    """Gradient written over logits that somebody else still reads."""
    y = labels(device)
    h = torch.randn(N, 8).to(device, dtype).requires_grad_()
    w = torch.randn(V, 8).to(device, dtype).requires_grad_()

    def step(f: Callable[..., tuple[Tensor, ...]]) -> tuple[Any, ...]:
        loss, *others = f(h, w)
        before = [t.detach().clone() for t in others]
        total = loss + sum(t.float().square().mean() for t in others if t.requires_grad)
        gradients = torch.autograd.grad(total, (h, w))
        assert all(torch.equal(a, b) for a, b in zip(others, before, strict=True))
        return loss.detach(), *before, *gradients

    def whole(h: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return f(h @ w.t(), y)

    eager, ours = step(whole), step(compiled(whole, device))
    assert sites() == 1
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(ours, eager, **tolerance)


@on_devices
@pytest.mark.parametrize(
    "f", [cross_entropy, lambda z, y: cross_entropy(z.float(), y)], ids=["plain", "cast"]
)
def test_trap_14_logits_that_are_a_leaf(f: Callable[[Tensor, Tensor], Tensor], device: str) -> None:
    """Gradient written over logits that somebody else still reads: the user's own; `.float()` is no copy."""
    z, y = logits(device).requires_grad_(), labels(device)
    kept = z.detach().clone()
    run = compiled(f, device)
    for _ in range(2):
        z.grad = None
        run(z, y).sum().backward()
        assert torch.equal(z, kept)
        assert z.grad.data_ptr() != z.data_ptr()
        torch.testing.assert_close(z.grad, measure(f, kept, y).gradient)
    assert sites() == 1


# 16

REDUCTIONS = ["none", "mean", "sum"]


@on_devices
@pytest.mark.parametrize(
    ("case", "reduction", "smoothing"),
    in_turns(["all ignored", "no row", "one row", "one valid token", "one class"], REDUCTIONS, [0.0, 0.1]),
)
def test_trap_16_hardly_anything_there(case: str, reduction: str, smoothing: float, device: str) -> None:
    """All ignored, N=0, N=1, V=1, one valid token: what eager gives, NaN included."""
    n = {"no row": 0, "one row": 1}.get(case, N)
    v = 1 if case == "one class" else V
    z, y = logits(device, n, v), labels(device, n, v)
    if case in ("all ignored", "one valid token"):
        y[1 if case == "one valid token" else 0 :] = -100

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y, reduction=reduction, label_smoothing=smoothing)

    assert_as_eager(loss, z, y, fused=int(v > 1))


@pytest.mark.in_turns
@pytest.mark.parametrize("f", [log_softmax_gather, logsumexp_gather])
@pytest.mark.parametrize("n", [0, 1])
def test_trap_16_hardly_anything_gathered(n: int, f: Callable[[Tensor, Tensor], Tensor]) -> None:
    """All ignored, N=0, N=1, V=1, one valid token: what eager gives, NaN included."""
    assert_as_eager(lambda z, y: f(z, y).mean(), logits(n=n), labels(n=n))


# 17


def divided(z: Tensor, y: Tensor, num_items: int | Tensor) -> Tensor:
    return F.cross_entropy(z, y, reduction="sum") / num_items


@on_devices
@pytest.mark.parametrize("as_tensor", [False, True])
def test_trap_17_a_divisor_does_not_recompile(as_tensor: bool, device: str) -> None:
    """A Python int divisor (`num_items_in_batch`) specialises and recompiles every step."""
    z, y = logits(device), labels(device)
    divisors = [7, 11, 13, 64, 5, 1009]
    items = [torch.tensor(d, device=device) for d in divisors] if as_tensor else divisors
    run = compiled(divided, device)
    for item in items:
        torch.testing.assert_close(measure(run, z, y, item), measure(divided, z, y, item))
    ours = counters["stats"]["unique_graphs"]
    assert ours <= (1 if as_tensor else 2)
    assert sites() == ours


# 18


@on_devices
@pytest.mark.parametrize("f", [cross_entropy, rich])
def test_trap_18_the_first_call_equals_the_second(
    f: Callable[[Tensor, Tensor], Tensor], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An autotuner runs a mutating kernel several times: ours are functional."""
    monkeypatch.undo()  # every configuration is timed
    assert not ops.ROW_STATS._schema.is_mutable
    assert not ops.ROW_GRAD._schema.is_mutable
    v = 5000 if device == "cuda" else V
    z, y = logits(device, v=v), labels(device, v=v)
    run, kept = compiled(f, device), z.clone()
    first, second = measure(run, z, y), measure(run, z, y)
    assert sites() == 1
    assert torch.equal(first.value, second.value)
    assert torch.equal(first.gradient, second.gradient)
    assert torch.equal(z, kept)
    torch.testing.assert_close(first.gradient, measure(f, z, y).gradient)


# 19


@on_devices
def test_trap_19_operators_before_a_transpose_a_view_and_a_cast(device: str) -> None:
    """A transpose or cast after the op is fused with the wrong index map: with generated code."""
    n, v, which = 6, 17, "max,sumexp,pick,sum"
    z, y, c = logits(device, n, v), labels(device, n, v), torch.randn(4, n).to(device)

    def f(z: Tensor, y: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        stats = ops.row_stats(z, [y], [], which)
        dz = ops.row_grad(z, [y], [], stats[0], c, which)
        return (
            *(stats.t().contiguous() + 1, stats.reshape(2, 2 * n).to(torch.bfloat16), stats[1:3].t() * 2),
            *(dz.t().contiguous() + 1, dz.view(v, n).double() * 2, dz.view(2, 3, v).transpose(0, 2).half()),
        )

    lowering.register()
    for ours, eager in zip(torch.compile(f)(z, y, c), f(z, y, c), strict=True):
        torch.testing.assert_close(ours, eager)


# 20


@on_devices
@pytest.mark.parametrize("f", [cross_entropy, rich])
def test_trap_20_any_number_of_rows(f: Callable[[Tensor, Tensor], Tensor], device: str) -> None:
    """A ragged last chunk breaks symbolic divisibility: N odd, prime, dynamic."""
    run = compiled(f, device, dynamic=True)
    for n in (9, 13, 31, 127, 2):
        z, y = logits(device, n), labels(device, n)
        torch.testing.assert_close(measure(run, z, y), measure(f, z, y))
    assert sites() == counters["stats"]["unique_graphs"] == 1


@on_devices
def test_trap_20_any_batch_and_length(device: str) -> None:
    """A ragged last chunk breaks symbolic divisibility: a causal shift with both sizes dynamic."""

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z[:, :-1].reshape(-1, V), y[:, 1:].reshape(-1), reduction="none")

    run = compiled(loss, device, dynamic=True)
    for b, s in ((3, 5), (2, 7), (5, 11), (7, 4)):
        z, y = logits(device, b * s).view(b, s, V), labels(device, b * s).view(b, s)
        torch.testing.assert_close(measure(run, z, y), measure(loss, z, y))
    assert sites() == counters["stats"]["unique_graphs"] == 1


# 21


@pytest.mark.in_turns
@on_devices
@pytest.mark.parametrize("what", ["smoothing", "z-loss"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_trap_21_zero_equals_absent(reduction: str, what: str, device: str) -> None:
    """z-loss leaks when off; smoothing accepted and dropped: 0.0 equals absent, bit for bit."""

    def loss(z: Tensor, y: Tensor, weight: float | None) -> Tensor:
        if what == "smoothing" and weight is not None:
            return F.cross_entropy(z, y, reduction=reduction, label_smoothing=weight)
        plain = F.cross_entropy(z, y, reduction=reduction)
        return plain if weight is None else plain + weight * z.logsumexp(-1).square().mean()

    z, y = logits(device), labels(device)
    absent, zero, some = (
        measure(compiled(lambda z, y, w=w: loss(z, y, w), device), z, y) for w in (None, 0.0, 0.1)
    )
    assert sites() == 3
    assert torch.equal(zero.value, absent.value)
    assert torch.equal(zero.gradient, absent.gradient)
    assert not torch.equal(some.value, absent.value)
    assert not torch.equal(some.gradient, absent.gradient)


# 23


@on_devices
@pytest.mark.parametrize("f", [cross_entropy, rich])
def test_trap_23_two_backwards(f: Callable[[Tensor, Tensor], Tensor], device: str) -> None:
    """Saved gradient scaled in place: the second backward is wrong. Equal, or a clear error."""
    z, y = logits(device).requires_grad_(), labels(device)
    loss = compiled(f, device)(z, y)
    upstream = torch.randn_like(loss)
    expected = measure(f, z, y, upstream=upstream).gradient
    try:
        first = torch.autograd.grad(loss, z, upstream, retain_graph=True)[0]
        second = torch.autograd.grad(loss, z, 2 * upstream)[0]
    except RuntimeError as error:
        assert "retain_graph" in str(error)  # noqa: PT017
        return
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(second, 2 * expected)
    assert sites() == 1


# 24


@pytest.mark.gpu
def test_trap_24_nothing_waits_for_the_gpu() -> None:
    """`.item()`, `torch.equal` stall the stream and break CUDA graphs."""

    def loss(z: Tensor, y: Tensor) -> Tensor:
        smoothed = F.cross_entropy(30 * torch.tanh(z.float() / 30), y, label_smoothing=0.1)
        return smoothed + 1e-4 * z.float().logsumexp(-1).square().mean()

    inductor_ce.install(min_vocab=2)
    run = torch.compile(loss, mode="reduce-overhead")
    z, y = logits("cuda", 64, 5000, torch.bfloat16).requires_grad_(), labels("cuda", 64, 5000)
    y[::3] = -100

    def step() -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        z.grad = None
        value = run(z, y)
        value.backward()
        return value

    for _ in range(4):
        step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        value = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sites() >= 1
    assert counters["inductor"]["cudagraph_skips"] == 0
    eager = measure(loss, z, y)
    torch.testing.assert_close(value.detach(), eager.value, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(z.grad, eager.gradient, rtol=2e-2, atol=1e-6)


# 25


@on_devices
@pytest.mark.parametrize(
    ("ignore_index", "occurs", "reduction"),
    pairwise([-100, -1, 0, V - 1, V + 5], [True, False], REDUCTIONS),
)
def test_trap_25_any_ignore_index(ignore_index: int, occurs: bool, reduction: str, device: str) -> None:
    """Positive ignore_index, = 0, V-1, or never occurring; with smoothing and z-loss."""
    terms = Terms(reduction, ignore_index, smoothing=0.1, z_weight=1e-2)

    def loss(z: Tensor, y: Tensor) -> Tensor:
        smoothed = F.cross_entropy(
            z, y, ignore_index=ignore_index, reduction=reduction, label_smoothing=terms.smoothing
        )
        counts = y != ignore_index
        squares = z.logsumexp(-1).square() * counts
        if reduction == "none":
            return smoothed + terms.z_weight * squares
        return smoothed + terms.z_weight * squares.sum() / (counts.sum() if reduction == "mean" else 1)

    z, y = logits(device), torch.randint(1, V - 1, (N,)).to(device)
    if occurs:
        y[::3] = ignore_index
    exact = measure(lambda z: reference.cross_entropy(z, y, terms), z.double())
    run = rewritten(loss, device)
    if device == "cpu" and reduction != "mean" and not EVERYTHING:
        run = torch.compile(loss, backend=Rewritten())
    ours = measure(run, z, y)
    assert sites() == 1
    assert_as_fair(ours, measure(loss, z, y), exact)


# 26


@on_devices
@pytest.mark.parametrize("f", [*SPELLINGS, rich])
def test_trap_26_a_label_out_of_range(f: Callable[[Tensor, Tensor], Tensor], device: str) -> None:
    """Out-of-range label answers plausibly: NaN for that row, and for that row alone."""
    z, y, run = logits(device), labels(device), rewritten(f, device)
    rest = torch.arange(N, device=device) != 5
    for outside in (V, V + 1, 2 * V, 10**6, -1, -V, 2**31, -(2**33)):
        wrong = y.clone()
        wrong[5] = outside
        losses = run(z, wrong)
        assert sites() == 1
        assert losses[5].isnan()
        torch.testing.assert_close(losses[rest], f(z, y)[rest])


@on_devices
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_trap_26_a_label_out_of_range_is_not_averaged_away(reduction: str, device: str) -> None:
    """Out-of-range label answers plausibly: the mean over all rows is NaN."""
    z, y = logits(device), labels(device)
    y[5] = V
    assert rewritten(lambda z, y: F.cross_entropy(z, y, reduction=reduction), device)(z, y).isnan()
    assert sites() == 1


# 28

RAW = {
    "plain": lambda z: z,
    "float": lambda z: z.float(),
    "soft-cap": lambda z: 30 * torch.tanh(z.float() / 30),
    "16-bit soft-cap": lambda z: 30 * torch.tanh(z / 30),
    "scale": lambda z: z.float() * 0.5,
    "temperature of 1": lambda z: z / 1.0,
    "temperatures of 1": lambda z: (1.0 * z).float() / torch.ones(()),
    "bias": lambda z: z.float() + torch.arange(V),
    "shift": lambda z: z.view(3, 4, V)[:, :-1].float().reshape(-1, V),
}


def saved(forward: torch.fx.GraphModule) -> list[torch.fx.Node]:
    """What a forward graph leaves in memory that is about as large as the logits."""
    (outputs,) = forward.graph.output_node().args
    nodes = [n for n in outputs if isinstance(n, torch.fx.Node) and isinstance(n.meta.get("val"), Tensor)]
    return [n for n in nodes if n.meta["val"].numel() >= N * V // 2]


@pytest.mark.parametrize(
    ("chain", "f", "with_head"), pairwise(list(RAW), [cross_entropy, rich], [False, True])
)
def test_trap_28_only_the_raw_logits_are_saved(
    chain: str, f: Callable[[Tensor, Tensor], Tensor], with_head: bool
) -> None:
    """The fp32 or soft-capped copy of the logits is saved for the backward because an opaque op reads it."""
    before = RAW[chain]
    w = torch.randn(V, 4, dtype=torch.bfloat16) if with_head else torch.eye(V, dtype=torch.bfloat16)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        z = before(x @ w.t() if with_head else x)
        return f(z, y[: len(z)]).sum()

    x = torch.randn(N, 4).bfloat16() if with_head else logits(dtype=torch.bfloat16)
    y = labels()
    run, graphs = compile_without_codegen(loss)
    ours, eager = measure(run, x, y), measure(loss, x, y)
    assert sites() == 1
    forward, _backward = graphs.final
    (raw,) = saved(forward)
    assert raw.meta["val"].dtype == torch.bfloat16
    while raw.target == torch.ops.aten.view.default:
        raw = raw.args[0]
    assert raw.op == "placeholder" or raw.target == torch.ops.aten.mm.default
    torch.testing.assert_close(ours, eager, rtol=2e-2, atol=2e-2)


def test_trap_28_targets_made_of_labels_are_not_saved() -> None:
    """As smoothing by scatter has them, with a column and rows that are emptied."""

    def loss(z: Tensor, y: Tensor) -> Tensor:
        target = torch.full_like(z, 0.1 / (V - 2)).scatter_(1, y.clamp(min=0).unsqueeze(1), 0.9)
        target[:, 0] = 0
        target.masked_fill_((y < 1).unsqueeze(1), 0.0)
        return F.kl_div(F.log_softmax(z, -1), target, reduction="sum")

    run, graphs = compile_without_codegen(loss)
    z, y = logits(), labels()
    torch.testing.assert_close(measure(run, z, y), measure(loss, z, y), rtol=1e-5, atol=1e-6)
    assert sites() == 1
    assert [node.op for node in saved(graphs.final[0])] == ["placeholder"]


@pytest.mark.gpu
@pytest.mark.parametrize("chain", ["plain", "float", "soft-cap"])
@pytest.mark.parametrize("f", [cross_entropy, rich])
def test_trap_28_peak_memory_is_the_gradient(f: Callable[[Tensor, Tensor], Tensor], chain: str) -> None:
    """The fp32 or soft-capped copy of the logits is saved for the backward because an opaque op reads it."""
    n, v = 4096, 32000
    z, y = logits("cuda", n, v, torch.bfloat16).requires_grad_(), labels("cuda", n, v)
    run = compiled(lambda z, y: f(RAW[chain](z), y).mean(), "cuda")
    run(z, y).backward()
    z.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(z, y).backward()
    assert sites() == 1
    assert torch.cuda.max_memory_allocated() - before <= 1.05 * z.nbytes
