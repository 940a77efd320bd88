"""Heads whose vocabulary is padded: the padding cut off, or filled with -inf, behind the linear layer."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from harness import compile_lazily, compile_without_codegen, sites
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


IN_PIECES = {
    f.__name__: f
    for f in (
        *(sliced, sliced_by_a_negative_number, sliced_in_front, narrowed, flat_and_cast, by_addmm),
        *(shifted, capped, filled, filled_flat, masked),
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


def filled_with_another_number(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    z = F.linear(h, w)
    z[..., V:] = -1e4
    return ce(z, y)


def filled_in_the_middle(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    z = F.linear(h, w)
    z[..., V:-1] = -math.inf
    return ce(z, y)


def rows_as_well(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """In one step; the rows that are cut then lie between the linear layer and the loss."""
    return ce(F.linear(h, w, b)[:, :-1, :V], y[:, 1:])


def every_other(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return ce(F.linear(h, w)[..., ::2], y % (PADDED // 2))


LEFT = {
    f.__name__: f
    for f in (
        *(read_whole, edited, read_before, viewed_before, filled_with_another_number, filled_in_the_middle),
        *(rows_as_well, every_other),
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


def test_in_slabs() -> None:
    compiled, _ = compile_without_codegen(sliced, strategy="vocab_slabs", memory_budget=0.7)
    assert_right(compiled, sliced, given())
    assert counts() == {"vocab_slabs": 1}


@pytest.mark.parametrize("name", LEFT)
def test_left_as_written(name: str) -> None:
    """Right; and whole, but where the head is one without us."""
    f = LEFT[name]
    compiled, _ = compile_without_codegen(f, **CHUNKS)
    assert_right(compiled, f, given())
    assert sites() == 1


def test_any_number_of_rows() -> None:
    compiled, _ = compile_without_codegen(sliced, dynamic=True, **CHUNKS)
    for s in (4, 7):
        h, y = torch.randn(B, s, D), torch.randint(V, (B, s))
        assert_right(compiled, sliced, (h, *given()[1:3], y))
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
