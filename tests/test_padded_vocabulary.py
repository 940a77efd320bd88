"""Heads whose vocabulary is padded: the padding cut off, or filled with -inf, behind the linear layer."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from harness import compile_lazily, compile_rewritten, compile_without_codegen, sites
from head_cases import counts
from reference import assert_fair
from torch import Tensor

B, S, D, V, PADDED = 3, 4, 8, 50, 64
CHUNKS = {"strategy": "token_chunks", "memory_budget": 0.7}
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def ce(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.reshape(-1, z.shape[-1]), y.flatten())


def sliced(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return ce(F.linear(h, w)[..., :V], y)


def sliced_by_a_negative_number(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return ce(F.linear(h, w, b)[:, :, : V - PADDED], y)


def sliced_in_front(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return ce(F.linear(h, w, b)[..., PADDED - V :], y)


def narrowed(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return ce((h @ w.t()).narrow(-1, 0, V), y)


def flat_and_cast(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    z = F.linear(h, w, b).view(-1, PADDED).double()[:, :V]
    return F.cross_entropy(z, y.flatten()).to(h.dtype)


def by_addmm(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return ce(torch.addmm(b, h.flatten(0, 1), w.t())[:, :V], y)


def shifted(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    z = F.linear(h, w, b)[..., :V]
    return ce(z[:, :-1], y[:, 1:])


def capped(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    z = F.linear(h, w)[..., :V]
    return ce(15 * torch.tanh(z / 15), y)


def sliced_after_a_cap(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    z = F.linear(h, w, b).double() / 15
    return ce((torch.tanh(z) * 15.0)[..., :V], y).to(h.dtype)


def filled(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    z = F.linear(h, w, b)
    z[..., V:] = -math.inf
    return ce(z, y)


def filled_flat(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    z = F.linear(h.flatten(0, 1), w)
    z[:, V:] = float("-inf")
    return F.cross_entropy(z, y.flatten())


def masked(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return ce(F.linear(h, w).masked_fill(torch.arange(PADDED) >= V, -math.inf), y)


def filled_with_another_number(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    z = F.linear(h, w)
    z[..., V:] = -1e4
    return ce(z, y)


def filled_in_the_middle(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    z = F.linear(h, w)
    z[..., V:-1] = -math.inf
    z[..., -1] = torch.finfo(z.dtype).min
    return ce(z, y)


def filled_by_a_product(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """A score for each item, of which the first is the padding."""
    z = h.flatten(0, 1) @ w.flip(0).t()
    z[:, 0] = -1e9
    z[:, 1 : PADDED - V] = -1e9
    return F.cross_entropy(z, torch.where(y < 0, y, PADDED - 1 - y).flatten())


def filled_after_a_temperature(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    z = F.linear(h, w, b).view(-1, PADDED) / 0.7
    z[:, [*range(V, PADDED - 2)]] = -math.inf
    z[:, (-1, -2)] = -math.inf
    return F.cross_entropy(z, y.flatten())


def filled_by_numbers(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """As many as there are rows."""
    z = F.linear(h, w)
    z[:, :, torch.arange(V, V + B * S)] = -math.inf
    z[..., torch.tensor([-2, -1, -1])] = -math.inf
    return ce(z, y)


def filled_by_truth_values(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    z, bad = F.linear(h, w), torch.arange(PADDED) >= V
    z[..., bad] = -math.inf
    return ce(z, y)


def index_filled(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    z = F.linear(h, w).index_fill(2, torch.arange(V, PADDED - 1), -math.inf)
    return ce(z.index_fill_(-1, torch.tensor(PADDED - 1), -1e4), y)


def filled_by_a_view(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    z = F.linear(h, w, b).float().view(-1, PADDED)
    z[:, V:] = -math.inf
    return F.cross_entropy(30 * torch.tanh(z / 30), y.flatten())


def filled_and_sliced(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    z = F.linear(h, w)[..., :V]
    z[..., 0] = -1.0
    return ce(z, y)


def filled_over(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """The last number is that which counts; between, the columns are read."""
    z = F.linear(h, w)
    z[..., V:] = 1.0
    before = z.sigmoid().mean()
    z[..., V:] = -math.inf
    return ce(z, y) + before


FILLED = {
    f.__name__: f
    for f in (
        *(filled, filled_flat, filled_with_another_number, filled_in_the_middle, filled_by_a_product),
        *(filled_after_a_temperature, filled_by_numbers, filled_by_truth_values, index_filled),
        filled_by_a_view,
    )
}
IN_PIECES = FILLED | {
    f.__name__: f
    for f in (
        *(sliced, sliced_by_a_negative_number, sliced_in_front, narrowed, flat_and_cast, by_addmm),
        *(shifted, capped, masked, filled_and_sliced, sliced_after_a_cap),
    )
}


def read_whole(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """The padding is read as well."""
    z = F.linear(h, w)
    return ce(z[..., :V], y) + z.sigmoid().mean()


def edited(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """Between the layer and the cut."""
    z = F.linear(h, w)
    z.mul_(2)
    return ce(z[..., :V], y)


def read_before(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    z = F.linear(h, w)
    before = z.sigmoid().mean()
    z[..., V:] = -math.inf
    return ce(z, y) + before


def viewed_before(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """The view sees the edit too."""
    z = F.linear(h, w)
    view = z.view(-1, PADDED)
    z[..., V:] = -math.inf
    return ce(view, y)


def filled_without_gradient(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """What is written leaves the gradient of the columns as it was."""
    z = F.linear(h, w)
    with torch.no_grad():
        z[..., V:] = -math.inf
    return ce(z, y)


def filled_by_another_name(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    z = F.linear(h, w)
    z.view(-1, PADDED)[:, V:] = -1.0
    return ce(z, y)


def seen_by_another_name(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    z = F.linear(h, w)
    flat = z.view(-1, PADDED)
    flat[:, V:] = -1.0
    return ce(flat, y) + 0.1 * z.logsumexp(-1).mean()


def filled_for_some_rows(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    z = F.linear(h, w)
    z[0, :, V:] = -1.0
    return ce(z, y)


def filled_with_numbers_of_rows(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    z = F.linear(h, w)
    z[..., -1] = h.sum(-1)
    return ce(z, y)


def filled_in_steps(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    z = F.linear(h, w)
    z[..., ::2] = -1.0
    return ce(z, y)


def sliced_without_gradient(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    z = F.linear(h, w)
    with torch.no_grad():
        z = z[..., :V]
    return ce(z, y) + h.sum() + w.square().sum()


def rows_as_well(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """In one step; the rows that are cut then lie between the linear layer and the loss."""
    return ce(F.linear(h, w, b)[:, :-1, :V], y[:, 1:])


def every_other(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return ce(F.linear(h, w)[..., ::2], y % (PADDED // 2))


LEFT = {
    f.__name__: f
    for f in (
        *(read_whole, edited, read_before, viewed_before, filled_without_gradient, filled_by_another_name),
        *(filled_for_some_rows, filled_with_numbers_of_rows, filled_in_steps, rows_as_well, every_other),
        sliced_without_gradient,
    )
}


def given() -> tuple[Tensor, ...]:
    y = torch.randint(V, (B, S))
    y[0, 1] = -100
    return torch.randn(B, S, D), torch.randn(PADDED, D), torch.randn(PADDED), y


def measure(f: Loss, args: tuple[Tensor, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    *tensors, y = args
    leaves = [t.to(dtype).requires_grad_() for t in (x.detach().clone() for x in tensors)]
    value = f(*leaves, y)
    made = torch.autograd.grad(value, leaves, allow_unused=True)
    return value.detach(), *(g for g in made if g is not None)


def assert_right(compiled: Loss, f: Loss, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    ours = measure(compiled, args)
    for o, n, e in zip(ours, measure(f, args), measure(f, args, torch.float64), strict=True):
        assert_fair(o, n, e)
    return ours


@pytest.mark.parametrize("name", IN_PIECES)
def test_in_pieces(name: str) -> None:
    f = IN_PIECES[name]
    compiled, _ = compile_without_codegen(f, **CHUNKS)
    _, _, of_weight, *_ = assert_right(compiled, f, given())
    assert counts() == {"token_chunks": 1}
    padding = slice(None, PADDED - V) if f is sliced_in_front else slice(V, None)
    assert torch.count_nonzero(of_weight[padding]) == 0


@pytest.mark.parametrize("f", [sliced, filled_by_numbers])
def test_in_slabs(f: Loss) -> None:
    compiled, _ = compile_without_codegen(f, strategy="vocab_slabs", memory_budget=0.7)
    assert_right(compiled, f, given())
    assert counts() == {"vocab_slabs": 1}


@pytest.mark.parametrize("f", [filled_over, seen_by_another_name])
def test_what_else_reads_the_columns_reads_them_as_they_are_then(f: Loss) -> None:
    compiled, _ = compile_rewritten(f)
    assert_right(compiled, f, given())
    assert sites() > 0


@pytest.mark.parametrize("name", LEFT)
def test_left_as_written(name: str) -> None:
    """Right; and whole, but where the head is one without us."""
    f = LEFT[name]
    compiled, _ = compile_without_codegen(f, **CHUNKS)
    assert_right(compiled, f, given())
    assert sites() == 1


@pytest.mark.parametrize("f", [sliced, filled_by_truth_values])
def test_any_number_of_rows(f: Loss) -> None:
    compiled, _ = compile_without_codegen(f, dynamic=True, **CHUNKS)
    for s in (4, 7):
        h, y = torch.randn(B, s, D), torch.randint(V, (B, s))
        assert_right(compiled, f, (h, *given()[1:3], y))
    assert sites() == 1


def test_a_label_in_the_padding() -> None:
    """Eager refuses it where the padding is cut off; where it is filled the loss is infinite."""
    h, w, b, y = given()
    y[0, 0] = V
    compiled, _ = compile_without_codegen(sliced, **CHUNKS)
    assert compiled(h, w, b, y).isnan()
    compiled, _ = compile_without_codegen(filled, **CHUNKS)
    assert torch.equal(compiled(h, w, b, y), filled(h, w, b, y))


def test_returned_beside_the_loss() -> None:
    """nanochat's forward gives one or the other; who gives both has the logits made."""

    def both(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = F.linear(h, w)[..., :V]
        return ce(z, y), z

    args = given()
    compiled, _ = compile_lazily(both, **CHUNKS)
    loss, z = compiled(*args)
    torch.testing.assert_close((loss, z + 0), both(*args))
