"""A head as one operator on a GPU: the same numbers however its kernels are launched."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from harness import compile_without_codegen
from test_counted_gpu import LOSSES, N, V, errors, in_64_bits, inputs, plain, stepped
from torch import Tensor
from torch._inductor.utils import run_and_get_code

import inductor_ce
from inductor_ce.heads import rolled, skip
from inductor_ce.ops import chunks, tapes
from inductor_ce.ops.tapes import Tape, Tapes

pytestmark = pytest.mark.gpu

Given = tuple[Tensor, ...]


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[object, Tape | int]]:
    """What is known of this test's calls."""
    torch._dynamo.reset()
    monkeypatch.setattr(chunks, "_tapes", Tapes())
    monkeypatch.setattr(skip, "LOOKED_WORK", 0)
    config = torch._inductor.config.patch(force_disable_caches=True)
    with config, inductor_ce.install(strategy="token_chunks", memory_budget=0.3):
        yield chunks._tapes.known


def compiled(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(f, dynamic=False)


def is_right(f: Callable[..., Tensor], given: Given, made: list[Tensor], than: list[Tensor]) -> None:
    """As near to float64 as plain torch is."""
    exact = in_64_bits(f, given)
    for ours, theirs in zip(errors(made, exact), errors(than, exact), strict=True):
        assert ours <= 1.3 * theirs + 1e-5


def all_rows(h: Tensor, W: Tensor, b: Tensor | None, y: Tensor) -> Tensor:
    log_p = F.linear(h, W, b).float().log_softmax(-1)
    return -log_p.gather(-1, y.clamp(min=0)[:, None]).sum() / 100


@pytest.mark.parametrize("f", [*LOSSES.values(), all_rows])
def test_all_ways_of_launching_agree(f: Callable[..., Tensor], known: dict[object, Tape | int]) -> None:
    """By the operator's function, noted, one by one and as a graph, whatever counts."""
    g = compiled(f)
    for share in (0.0, 0.3, 1.0):
        known.clear()
        check(f, g, inputs(share), known)


def test_an_odd_vocabulary(known: dict[object, Tape | int]) -> None:
    check(plain, compiled(plain), inputs(0.3, v=V + 3), known)


def test_float16(known: dict[object, Tape | int]) -> None:
    """Is not offered: a gradient without its upstream gradient may leave the range."""
    given = inputs(0.3, torch.float16)
    is_right(plain, given, stepped(compiled(plain), *given), stepped(plain, *given))
    assert not known


def check(
    f: Callable[..., Tensor], g: Callable[..., Tensor], given: Given, known: dict[object, Tape | int]
) -> None:
    """What g, which is f compiled, makes time and again is the same, and right."""
    tapes._with_graphs.clear()
    first = stepped(g, *given)
    for _ in range(4 + tapes.TIMES_APART):
        made = stepped(g, *given)
        assert all(map(torch.equal, made, first))
        del made
    assert [type(tape) for tape in known.values()] == [Tape]
    assert len(tapes._with_graphs) > 0
    is_right(f, given, first, stepped(f, *given))


def test_other_labels_in_the_same_memory() -> None:
    """A graph reads what is there when it is launched, and how much of it counts."""
    g, (h, w, b, y) = compiled(plain), inputs(0.5)
    for share in (0.5, 0.5, 0.5, 0.5, 0.5, 0.0, 0.9, 1.0):
        y.copy_(inputs(share)[3])
        h.copy_(torch.randn_like(h))
        made = stepped(g, h, w, b, y)
        is_right(plain, (h, w, b, y), made, stepped(plain, h, w, b, y))


def test_tensors_that_are_elsewhere() -> None:
    """In each step, as where all gradients are kept."""
    g, kept, given = compiled(plain), [], inputs(0.3)
    for _ in range(6):
        leaves = [x.clone().requires_grad_() for x in given[:3]]
        kept.append((leaves, torch.autograd.grad(g(*leaves, given[3]), leaves)))
    for _, gradients in kept[1:]:
        for x, first in zip(gradients, kept[0][1], strict=True):
            assert torch.equal(x, first)


def test_another_stream() -> None:
    given, g = inputs(0.3), compiled(plain)
    first = [stepped(g, *given) for _ in range(5)][-1]
    with torch.cuda.stream(stream := torch.cuda.Stream()):
        stream.wait_stream(torch.cuda.default_stream())
        all_made = [stepped(g, *given) for _ in range(5)]
    torch.cuda.synchronize()
    for made in all_made:
        assert all(map(torch.equal, made, first))


def test_lengths_in_turn() -> None:
    g, (h, w, b, y) = torch.compile(plain, dynamic=True), inputs(0.3)
    for _ in range(4):
        for n in (N, N - 64, 1000, 1, 700):
            made = stepped(g, h[:n], w, b, y[:n])
            is_right(plain, (h[:n], w, b, y[:n]), made, stepped(plain, h[:n], w, b, y[:n]))


def test_a_graph_of_the_user() -> None:
    """Has the kernels, of whatever is in memory when it is launched."""
    g, (h, w, b, y) = compiled(plain), inputs(0.3)
    leaves = [x.requires_grad_() for x in (h, w, b)]
    with torch.cuda.stream(stream := torch.cuda.Stream()):
        stream.wait_stream(torch.cuda.default_stream())
        for _ in range(5):
            torch.autograd.grad(g(*leaves, y), leaves)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = torch.autograd.grad(g(*leaves, y), leaves)
    for share in (0.0, 0.9):
        y.copy_(inputs(share)[3])
        graph.replay()
        exact = in_64_bits(plain, (h.detach(), w.detach(), b.detach(), y))[1:]
        theirs = stepped(plain, h, w, b, y)[1:]
        for ours, than in zip(errors(list(made), exact), errors(theirs, exact), strict=True):
            assert ours <= 1.3 * than + 1e-5


def test_the_code_does_not_grow() -> None:
    """However many chunks there are: one call, and no template."""
    given, sizes = inputs(0.3), []
    for budget in (0.5, 0.05):
        torch._dynamo.reset()
        with inductor_ce.install(strategy="token_chunks", memory_budget=budget):
            leaves = [x.requires_grad_() for x in given[:3]]
            _, (forward, *_) = run_and_get_code(torch.compile(plain), *leaves, given[3])
        assert forward.count("extern_kernels.inductor_ce_chunks(") == 1
        assert "triton_tem" not in forward
        sizes.append(forward.count("\n"))
    assert abs(sizes[0] - sizes[1]) < 20


def test_a_piece_at_a_time_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As operators of their own the steps make the same numbers."""
    given = inputs(0.3)
    made = stepped(compiled(plain), *given)
    monkeypatch.setattr(rolled, "DEVICES", ())
    torch._dynamo.reset()
    apart, graphs = compile_without_codegen(plain, strategy="token_chunks", memory_budget=0.3)
    for x, other in zip(made, stepped(apart, *given), strict=True):
        assert errors([x], [other.double()])[0] < 4e-3
    assert graphs.count(chunks.CHUNKS) == 0
