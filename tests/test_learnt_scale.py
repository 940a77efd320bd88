"""Heads whose temperature, scale or soft-cap is learnt: its gradient is a sum over all logits, in pieces."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import compile_without_codegen
from harness import sites as sites_told
from head_cases import counts
from kernels import backwards_at_once
from pairwise import EVERYTHING, in_turns
from reference import assert_fair
from test_head_memory import most_at_once, sizes
from torch import Tensor
from torch._inductor.utils import run_and_get_code

import inductor_ce
from inductor_ce import ops

B, S, V, D = 4, 8, 64, 8
N = B * S
CHUNKS: dict[str, Any] = {"strategy": "token_chunks", "memory_budget": 0.8}  # three pieces
SLABS: dict[str, Any] = {"strategy": "vocab_slabs", "memory_budget": 0.8}

Loss = Callable[..., Tensor]


def ce(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.reshape(-1, z.shape[-1]), y.reshape(-1))


def wide(z: Tensor) -> Tensor:
    """In float32 at the least."""
    return z.to(torch.promote_types(z.dtype, torch.float32))


def logit_scale(h: Tensor, w: Tensor, b: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """CLIP's, which is learnt as a logarithm and clamped."""
    return ce(s.exp().clamp(max=100) * F.linear(h, w), y)


def divided(h: Tensor, w: Tensor, b: Tensor, y: Tensor, s: Tensor) -> Tensor:
    return ce(F.linear(h, w) / s, y)


def divided_in_float32(h: Tensor, w: Tensor, b: Tensor, y: Tensor, s: Tensor) -> Tensor:
    return ce(wide(F.linear(h, w)) / s, y)


def scaled_and_cast(h: Tensor, w: Tensor, b: Tensor, y: Tensor, s: Tensor) -> Tensor:
    return ce(wide(F.linear(h, w) * s.to(h.dtype)), y)


def scaled_with_its_bias(h: Tensor, w: Tensor, b: Tensor, y: Tensor, s: Tensor) -> Tensor:
    return ce(F.linear(h, w, b) * F.softplus(s), y)


def scaled_before_a_bias(h: Tensor, w: Tensor, b: Tensor, y: Tensor, s: Tensor) -> Tensor:
    return ce(F.linear(h, w) * s + b, y)


def by_addmm(h: Tensor, w: Tensor, b: Tensor, y: Tensor, s: Tensor) -> Tensor:
    return ce(torch.addmm(b, h.flatten(0, 1), w.t()) * s, y)


def scaled_before_a_cap(h: Tensor, w: Tensor, b: Tensor, y: Tensor, s: Tensor) -> Tensor:
    return ce(3 * torch.tanh(wide(F.linear(h, w)) * s / 3), y)


def scaled_behind_a_cap(h: Tensor, w: Tensor, b: Tensor, y: Tensor, s: Tensor) -> Tensor:
    return ce(3 * torch.tanh(wide(F.linear(h, w)) / 3) * s, y)


def learnt_cap(h: Tensor, w: Tensor, b: Tensor, y: Tensor, s: Tensor) -> Tensor:
    return ce(s * torch.tanh(F.linear(h, w) / s), y)


def in_place(h: Tensor, w: Tensor, b: Tensor, y: Tensor, s: Tensor) -> Tensor:
    z = F.linear(h, w)
    z *= s.to(z.dtype)
    return ce(z, y)


def edited_afterwards(h: Tensor, w: Tensor, b: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """The scale is another thereafter, which the loss does not see."""
    t = s.clone()
    z = F.linear(h, w) / t.clone()
    t.mul_(2)
    return ce(z, y) + t.sum()


def cosines(h: Tensor, w: Tensor, b: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """Between -1 and 1, with a margin at the label."""
    z = F.normalize(h, dim=-1) @ F.normalize(w, dim=-1).t()
    return ce(s * (z - 0.1 * F.one_hot(y, V)), y)


def expanded(h: Tensor, w: Tensor, b: Tensor, y: Tensor, s: Tensor) -> Tensor:
    z = F.linear(h, w).view(-1, V)
    return ce(z / s.reshape(1, 1).expand(z.shape), y)


def smoothed_and_z_loss(h: Tensor, w: Tensor, b: Tensor, y: Tensor, s: Tensor) -> Tensor:
    z = (F.linear(h, w) * s).view(-1, V)
    return F.cross_entropy(z, y.view(-1), label_smoothing=0.1) + 1e-2 * z.logsumexp(-1).square().mean()


def entropy(h: Tensor, w: Tensor, b: Tensor, y: Tensor, s: Tensor) -> Tensor:
    log_p = (F.linear(h, w) / s).log_softmax(-1)
    return ce(log_p, y) + 0.1 * (log_p.exp() * log_p).sum(-1).mean()


def made_of_the_weight(h: Tensor, w: Tensor, b: Tensor, y: Tensor, s: Tensor) -> Tensor:
    return ce(F.linear(h, w) / (w.abs().mean() * s), y)


def of_rows(h: Tensor, w: Tensor, b: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """Each token has a temperature of its own."""
    return ce(F.linear(h, w) / (s + h.square().mean(-1, keepdim=True)), y)


def of_flat_rows(h: Tensor, w: Tensor, b: Tensor, y: Tensor, s: Tensor) -> Tensor:
    t = (s + h.abs().amax(-1)).flatten()
    return ce(F.linear(h, w).view(-1, V) * t[:, None], y)


def of_sequences(h: Tensor, w: Tensor, b: Tensor, y: Tensor, s: Tensor) -> Tensor:
    return ce(F.linear(h, w) * (s + h[:, 0, :1].square())[:, None], y)


def of_positions(h: Tensor, w: Tensor, b: Tensor, y: Tensor, s: Tensor) -> Tensor:
    return ce(F.linear(h, w) * (s + h[0, :, :1].square()), y)


def of_classes(h: Tensor, w: Tensor, b: Tensor, y: Tensor, s: Tensor) -> Tensor:
    return ce(F.linear(h, w) * (s + b.square()), y)


IN_PIECES = {
    f.__name__: f
    for f in (
        *(
            logit_scale,
            divided,
            divided_in_float32,
            scaled_and_cast,
            scaled_with_its_bias,
            scaled_before_a_bias,
        ),
        *(by_addmm, scaled_before_a_cap, scaled_behind_a_cap, learnt_cap, in_place, edited_afterwards),
        *(cosines, expanded, smoothed_and_z_loss, entropy, made_of_the_weight),
        *(of_rows, of_flat_rows, of_sequences, of_positions, of_classes),
    )
}


def read_whole(h: Tensor, w: Tensor, b: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """The logits have a use of their own."""
    z = F.linear(h, w) * s
    return ce(z, y) + z.sigmoid().mean()


def summed(h: Tensor, w: Tensor, b: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """A sum over the logits themselves is no gradient."""
    z = F.linear(h, w)
    return ce(z * s, y) + 1e-3 * z.sum()


def of_the_logits(h: Tensor, w: Tensor, b: Tensor, y: Tensor, s: Tensor) -> Tensor:
    z = F.linear(h, w)
    return ce(z / (s + z.std()), y)


def of_sequences_and_classes(h: Tensor, w: Tensor, b: Tensor, y: Tensor, s: Tensor) -> Tensor:
    return ce(F.linear(h, w) * (s + h[:, :1, :1].square() * b), y)


LEFT = {
    read_whole: "the logits, or their gradient, are read by",
    summed: "the logits, or their gradient, are read by",
    of_the_logits: "the logits, or their gradient, are read by",
    of_sequences_and_classes: "the logits, or their gradient, are read by sum as well",
}


def given(dtype: torch.dtype = torch.float32, scale: float = 1.3, d: int = D) -> tuple[Tensor, ...]:
    """hidden, weight, bias, labels, and a scale, which is float32 at the least."""
    y = torch.randint(V, (B, S))
    y[0, 0], y[0, 1] = V - 1, 0
    made = [x.to(dtype) for x in (torch.randn(B, S, d), torch.randn(V, d) / d**0.5, torch.randn(V))]
    return *made, y, torch.tensor(scale)


def measure(
    f: Loss, args: tuple[Tensor, ...], exact: bool = False, upstream: float = 1.0, frozen: str = ""
) -> dict[str, Tensor]:
    """The loss and the gradients of what is not frozen and has one, by name."""
    names = ("hidden", "weight", "bias", "y", "scale")
    leaves = {}
    for name, x in zip(names, args, strict=True):
        x = x.detach().clone()
        x = x.double() if exact and x.is_floating_point() else x
        leaves[name] = x.requires_grad_(name != "y" and name not in frozen.split())
    value = f(*leaves.values())
    value.backward(torch.full_like(value, upstream))
    made = {name: x.grad for name, x in leaves.items() if x.grad is not None}
    return {"loss": value.detach(), **made}


def assert_right(compiled: Loss, f: Loss, args: tuple[Tensor, ...], **how: Any) -> None:
    ours, naive, exact = (
        measure(compiled, args, **how),
        measure(f, args, **how),
        measure(f, args, True, **how),
    )
    assert ours.keys() == naive.keys() == exact.keys()
    for name, found in ours.items():
        assert_fair(found, naive[name], exact[name])


@pytest.mark.parametrize("name", IN_PIECES)
def test_token_chunks(name: str) -> None:
    f = IN_PIECES[name]
    compiled, _ = compile_without_codegen(f, **CHUNKS)
    assert_right(compiled, f, given(), upstream=-0.37)
    assert counts() == {"token_chunks": 1}


@pytest.mark.parametrize(
    "name", ["logit_scale", "learnt_cap", "scaled_before_a_bias", "of_rows", "of_sequences"]
)
def test_vocab_slabs(name: str) -> None:
    f = IN_PIECES[name]
    compiled, _ = compile_without_codegen(f, **SLABS)
    assert_right(compiled, f, given(), upstream=-0.37)
    assert counts() == {"vocab_slabs": 1}


@pytest.mark.parametrize("f", LEFT, ids=lambda f: f.__name__)
def test_left_whole(f: Loss, caplog: pytest.LogCaptureFixture) -> None:
    compiled, _ = compile_without_codegen(f, **CHUNKS)
    with caplog.at_level("DEBUG", logger="inductor_ce"):
        assert_right(compiled, f, given())
    assert counts() == {"materialise": 1}
    assert LEFT[f] in caplog.text


def per_token(h: Tensor, w: Tensor, b: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """A loss that mixes rows: its gradient is known in the backward only."""
    z = F.linear(h, w) * s
    return F.cross_entropy(z.view(-1, V), y.view(-1), reduction="none").view(B, S).mean(-1).exp().sum().log()


def test_a_loss_that_mixes_rows() -> None:
    compiled, _ = compile_without_codegen(per_token, **CHUNKS)
    assert_right(compiled, per_token, given())
    assert counts() == {"vocab_slabs": 1}


# 16 bits

DRAWS = 48  # of inputs: how a sum over all logits is rounded is a matter of luck
IN_16_BITS = ("logit_scale", "divided_in_float32", "scaled_and_cast", "learnt_cap", "of_rows")


def assert_right_in_16_bits(
    compiled: Loss, f: Loss, draws: list[tuple[Tensor, ...]], exact: Loss | None = None
) -> None:
    """With an upstream gradient that is a power of two, and errors over all draws."""
    made = [
        [measure(g, args, in_float64, upstream=0.5) for args in draws]
        for g, in_float64 in ((compiled, False), (f, False), (exact or f, True))
    ]
    for name in made[0][0]:
        assert_fair(*(torch.stack([draw[name] for draw in of_one]) for of_one in made))


@pytest.mark.parametrize(("name", "options"), in_turns(IN_16_BITS, [CHUNKS, {**SLABS, "memory_budget": 4.0}]))
def test_bfloat16(name: str, options: dict[str, Any]) -> None:
    """With a scale in float32, which has the logits in float32 if it has a dimension or they are cast."""
    f = IN_PIECES[name]
    compiled, _ = compile_without_codegen(f, **options)
    assert_right_in_16_bits(compiled, f, [given(torch.bfloat16, 1.25, d=64) for _ in range(DRAWS)])
    assert counts() == {options["strategy"]: 1}


def cancelling(scale: float, d: int = 64) -> tuple[Tensor, ...]:
    """Large hidden states, whose products with the rows of the weight are small sums of large terms."""
    h, w, b, y, _ = given(torch.float64, d=d)
    w = w - w.mean(-1, keepdim=True)
    return (h + 30).bfloat16(), w.bfloat16(), b.bfloat16(), y, torch.tensor(scale)


@pytest.mark.parametrize(
    ("f", "scales"), in_turns([divided_in_float32, scaled_and_cast], [(1 / 128, 100.0), (1.0,)])
)
def test_cancelling_logits(f: Loss, scales: tuple[float, ...]) -> None:
    """A scale that were moved to the hidden states would be rounded with them, before they cancel."""
    compiled, _ = compile_without_codegen(f, **CHUNKS)
    for scale in scales:
        assert_right_in_16_bits(compiled, f, [cancelling(scale) for _ in range(DRAWS)])
    assert counts() == {"token_chunks": 1}


@pytest.mark.parametrize("log_scale", [math.log(100), 0.0][: 2 if EVERYTHING else 1])
def test_cosines_times_a_hundred(log_scale: float) -> None:
    def f(h: Tensor, w: Tensor, b: Tensor, y: Tensor, s: Tensor) -> Tensor:
        return ce(F.normalize(h, dim=-1) @ F.normalize(w, dim=-1).t() * s.exp(), y)

    compiled, _ = compile_without_codegen(f, **CHUNKS)
    assert_right_in_16_bits(compiled, f, [given(torch.bfloat16, log_scale, d=64) for _ in range(DRAWS)])
    assert counts() == {"token_chunks": 1}


def test_float16() -> None:
    """A gradient without its upstream gradient may leave the range, so chunks are refused."""
    compiled, _ = compile_without_codegen(logit_scale, strategy="token_chunks", memory_budget=4.0)
    assert_right_in_16_bits(compiled, logit_scale, [given(torch.float16, 0.25, d=64) for _ in range(DRAWS)])
    assert counts() == {"vocab_slabs": 1}


@pytest.mark.parametrize("name", ["of_rows", "scaled_with_its_bias", *["logit_scale"] * EVERYTHING])
def test_autocast(name: str) -> None:
    exact = IN_PIECES[name]

    def f(*args: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return exact(*args)

    compiled, _ = compile_without_codegen(f, **CHUNKS)
    assert_right_in_16_bits(compiled, f, [given(d=64) for _ in range(DRAWS)], exact)
    assert counts() == {"token_chunks": 1}


# Odd scales


@pytest.mark.parametrize("options", [CHUNKS, SLABS], ids=["chunks", "slabs"])
def test_a_scale_that_is_not_usual(options: dict[str, Any]) -> None:
    """What eager gives: a scale of 0 has a gradient."""

    def f(h: Tensor, w: Tensor, b: Tensor, y: Tensor, s: Tensor) -> Tensor:
        return ce(F.linear(h, w, b) * s, y)

    compiled, _ = compile_without_codegen(f, **options)
    for value in (0.0, -0.0, -2.0, math.inf, math.nan):
        args = given(scale=value)
        ours, naive = measure(compiled, args), measure(f, args)
        torch.testing.assert_close(ours, naive, equal_nan=True, msg=lambda told, of=value: f"{of}: {told}")
        assert math.isfinite(value) == bool(ours["scale"].isfinite())
    assert counts() == {options["strategy"]: 1}


def test_all_rows_ignored() -> None:
    h, w, b, y, s = given()
    args = (h, w, b, torch.full_like(y, -100), s)
    compiled, _ = compile_without_codegen(divided, **CHUNKS)
    torch.testing.assert_close(measure(compiled, args), measure(divided, args), equal_nan=True)
    assert counts() == {"token_chunks": 1}


# Within programs


@pytest.mark.parametrize(
    ("name", "options"),
    in_turns(["of_rows", *["of_sequences", "logit_scale"] * EVERYTHING], [CHUNKS, SLABS][: 1 + EVERYTHING]),
)
def test_any_number_of_rows(name: str, options: dict[str, Any]) -> None:
    f = IN_PIECES[name]
    compiled, _ = compile_without_codegen(f, dynamic=True, **options)
    for shape in ((4, 7), (5, 3)):
        _, w, b, _, s = given()
        assert_right(compiled, f, (torch.randn(*shape, D), w, b, torch.randint(V, shape), s))
    assert counts() == {options["strategy"]: 1}
    assert sites_told() == 1


@pytest.mark.in_turns
@pytest.mark.parametrize("frozen", ["scale", "hidden weight bias", "hidden", "weight"])
@pytest.mark.parametrize("options", [CHUNKS, SLABS], ids=["chunks", "slabs"])
def test_frozen(frozen: str, options: dict[str, Any]) -> None:
    """What needs no gradient has none; the scale alone may need one."""
    compiled, _ = compile_without_codegen(scaled_with_its_bias, **options)
    assert_right(compiled, scaled_with_its_bias, given(), frozen=frozen)
    assert counts() == {options["strategy"]: 1}


def test_no_grad() -> None:
    compiled, _ = compile_without_codegen(logit_scale, **CHUNKS)
    args = given()
    with torch.no_grad():
        assert_fair(
            compiled(*args), logit_scale(*args), logit_scale(*(x.double() for x in args[:3]), *args[3:])
        )
    assert counts() == {"forward_only": 1}


def test_two_backwards() -> None:
    h, w, b, y, s = (x.requires_grad_() if x.is_floating_point() else x for x in given())
    compiled, _ = compile_without_codegen(logit_scale, **CHUNKS)
    loss, eager = compiled(h, w, b, y, s), logit_scale(h, w, b, y, s)
    for upstream in (0.37, -2.0, 0.37):
        ours = torch.autograd.grad(loss, (h, w, s), torch.tensor(upstream), retain_graph=True)
        naive = torch.autograd.grad(eager, (h, w, s), torch.tensor(upstream), retain_graph=True)
        torch.testing.assert_close(ours, naive)


def test_two_temperatures_of_one_product() -> None:
    def f(h: Tensor, w: Tensor, b: Tensor, y: Tensor, s: Tensor) -> Tensor:
        z = F.linear(h, w)
        return ce(z * s, y) + ce(z / (1 + s), y)

    compiled, _ = compile_without_codegen(f, **CHUNKS)
    assert_right(compiled, f, given())
    assert counts() == {"token_chunks": 2}


@pytest.mark.parametrize("options", [CHUNKS, SLABS][: 2 if EVERYTHING else 1], ids=str)
def test_generated_code(options: dict[str, Any]) -> None:
    """It is right, and has the logits of one piece and their gradient at most."""
    inductor_ce.install(min_vocab=2, **{**options, "memory_budget": 1.3})
    h, w, b, y, s = given()
    args, compiled = (h[:2], w, b, y[:2], s), torch.compile(logit_scale)  # two pieces that have one code
    with backwards_at_once():
        _, codes = run_and_get_code(lambda: assert_right(compiled, logit_scale, args))
    assert counts() == {options["strategy"]: 1}
    assert len(codes) == 2
    piece = 2 * S * V // 2
    assert max(size for code in codes for size in sizes(code).values()) <= 1.2 * piece
    assert max(most_at_once(code, piece // 2) for code in codes) <= 2


@pytest.mark.parametrize(("dtype", "again"), [(torch.float32, 0), (torch.bfloat16, 1)])
def test_what_stays_whole_is_summed_unrounded(dtype: torch.dtype, again: int) -> None:
    """A template stores the gradient in 16 bits; the scale's is a sum of what it was before."""
    compiled, graphs = compile_without_codegen(logit_scale, strategy="materialise")
    args = [t.to(dtype) if t.is_floating_point() else t for t in given()]
    assert_right(compiled, logit_scale, args)
    assert counts() == {"materialise": 1}
    assert graphs.count(ops.ROW_GRAD_AGAIN) == again
    assert graphs.count(ops.ROW_GRAD) == 1
