"""The only part that logits are cut into: fused, and a head, as the logits themselves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from gallery import check_numbers, run
from harness import Rewritten, compile_without_codegen, misses, sites
from pairwise import in_turns
from torch import Tensor

from inductor_ce import ops

S, V, D = 24, 1100, 8

Inputs = tuple[Tensor, Tensor, Tensor]
Loss = Callable[..., Tensor]


def inputs(s: int = S) -> Inputs:
    h = torch.randn(1, s, D, requires_grad=True)
    W = torch.randn(V, D, requires_grad=True)
    y = torch.randint(V, (1, s))
    y[0, :2] = -100
    return h, W, y


def check(f: Loss, compiled: Loss, args: Inputs) -> None:
    check_numbers(run(compiled, args), f, args)


def entropy(z: Tensor) -> Tensor:
    log_p = z.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def a_batch_of_one(h, W, y):
    pairs = zip(F.linear(h, W).unbind(0), y.unbind(0), strict=True)
    return torch.stack([F.cross_entropy(z, t) for z, t in pairs]).mean()


def one_chunk_of_positions(h, W, y):
    total = h.new_zeros(())
    for z, t in zip(F.linear(h, W).float().chunk(1, dim=1), y.chunk(1, dim=1), strict=True):
        total = total + F.cross_entropy(z.reshape(-1, V), t.reshape(-1), reduction="sum")
    return total / (y != -100).sum()


def fewer_rows_than_a_chunk(h, W, y):
    """As TRL has them beside each other."""
    z = F.linear(h, W) / 0.9
    log_p = z.gather(-1, y.clamp(min=0).unsqueeze(-1)).squeeze(-1) - z.logsumexp(-1)
    with torch.no_grad():
        spread = torch.cat([entropy(rows) for rows in z.reshape(-1, V).split(128)])
    return -(log_p * spread.view_as(log_p)).mean()


def sequences_by_one(h, W, y):
    z, spread = F.linear(h, W), []
    for part in z.split(1, dim=0):
        spread.extend(entropy(part))
    return torch.stack(spread).mean() + F.cross_entropy(z.flatten(0, 1), y.flatten())


def sizes_that_are_told(h, W, y):
    (z,) = torch.split(F.linear(h[0], W), [h.shape[1]])
    return F.cross_entropy(z, y[0])


WHOLE = [
    a_batch_of_one,
    one_chunk_of_positions,
    fewer_rows_than_a_chunk,
    sequences_by_one,
    sizes_that_are_told,
]


@pytest.mark.parametrize(("f", "strategy"), in_turns(WHOLE, ["token_chunks", "vocab_slabs"]))
def test_one_head(f: Loss, strategy: str, caplog: pytest.LogCaptureFixture):
    compiled, graphs = compile_without_codegen(f, strategy=strategy, memory_budget=0.5)
    check(f, compiled, inputs())
    assert misses() == 0
    made = [node.meta["val"] for node in graphs.nodes if isinstance(node.meta.get("val"), Tensor)]
    assert max(each.numel() for each in made) < S * V
    assert not caplog.records, "something failed"


def test_at_any_length():
    """Until there are more rows than one part has."""
    backend = Rewritten()
    compiled = torch.compile(fewer_rows_than_a_chunk, backend=backend)
    for s in (S, S + 3, 150):
        given = inputs(s)
        torch._dynamo.mark_dynamic(given[0], 1)
        torch._dynamo.mark_dynamic(given[2], 1)
        check(fewer_rows_than_a_chunk, compiled, given)
    assert len(backend.final) == 2
    assert sum(node.target == ops.ROW_STATS for node in backend.final[0].graph.nodes) == 1


# What is seen of a part is seen of it still


def cut_without_a_gradient(h, W, y):
    """The loss has none by it, though it is made where gradients are on."""
    z = F.linear(h, W)
    with torch.no_grad():
        (part,) = z.split(1)
    return F.cross_entropy(part[0], y[0]) * F.cross_entropy(z[0], y[0])


def edited_by_the_name_of_the_part(h, W, y):
    z = F.linear(h, W)
    with torch.no_grad():
        (part,) = z.detach().split(1)
        part *= 2
    return F.cross_entropy(z[0], y[0])


def returned(h, W, y):
    z = F.linear(h, W)
    (part,) = z.chunk(1)
    return F.cross_entropy(part[0], y[0]) + 0 * part.sum()


def a_part_of_two(h, W, y):
    first, _ = F.linear(h[0], W).split([h.shape[1] - 2, 2])
    return F.cross_entropy(first, y[0, 2:])


SEEN = [cut_without_a_gradient, edited_by_the_name_of_the_part, returned, a_part_of_two]


@pytest.mark.parametrize("f", SEEN, ids=lambda f: f.__name__)
def test_numbers(f: Loss, caplog: pytest.LogCaptureFixture):
    compiled, _ = compile_without_codegen(f, memory_budget=0.5)
    check(f, compiled, inputs())
    assert sites() > 0
    assert not caplog.records, "something failed"


def test_all_parts_are_returned():
    def f(h, W, y):
        parts = F.linear(h, W).split(1)
        return F.cross_entropy(parts[0][0], y[0]), parts

    given = inputs()
    compiled, _ = compile_without_codegen(f, memory_budget=0.5)
    loss, (part,) = compiled(*given)
    exact, (whole,) = f(*given)
    torch.testing.assert_close((loss, part * 1), (exact, whole))
