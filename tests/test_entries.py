"""Sums over the classes of what each entry makes by itself: the algebra, the operators, programs at random,
heads, and what is left."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from gallery import check_draws, check_numbers, run
from harness import Rewritten, compile_with_codegen, compile_without_codegen
from head_cases import counts
from pairwise import EVERYTHING, in_turns
from reference import assert_all_fair, assert_fair
from test_divergences import check, normalisers, rewritten
from test_head_memory import largest, saved, sizes
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from inductor_ce import ops
from inductor_ce.algebra import entries, entries_text
from inductor_ce.algebra.entries import Entries, Term
from inductor_ce.common.compat.graphs import clamps_pass_ends
from inductor_ce.ops.divergences import decode, divergence, divergence_grad, encode

N, V = 6, 16
P, Q, LOG_P, LOG_Q, T = ("p", 0), ("p", 1), ("log p", 0), ("log p", 1), ("t", 0)
ENDS = float(clamps_pass_ends())

# Terms: what they are, by torch's own functions

FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    **{name: getattr(torch, name) for name in ("add", "sub", "mul", "div", "neg", "exp", "log", "log1p")},
    **{
        name: getattr(torch, name)
        for name in ("sqrt", "abs", "xlogy", "sigmoid", "tanh", "maximum", "minimum", "logaddexp", "where")
    },
    **{name: getattr(torch, name) for name in ("sign", "gt", "ge", "lt", "le", "eq", "ne")},
    **{name: getattr(torch, f"logical_{name}") for name in ("and", "or", "not")},
    "number": lambda x: x.double(),
}


def number(term: Term, zs: list[Tensor], tensors: list[Tensor]) -> Tensor:
    """The entries of a term, through which autograd finds its gradients."""
    if isinstance(term, float):
        return torch.tensor(term, dtype=torch.float64)
    name, *args = term
    if name in ("t", "z"):
        return (tensors if name == "t" else zs)[args[0]]
    if name in ("p", "log p"):
        return (F.softmax if name == "p" else F.log_softmax)(zs[args[0]], -1)
    if name == "pow":
        power = args[1] if isinstance(args[1], float) else number(args[1], zs, tensors)
        return torch.pow(number(args[0], zs, tensors), power)
    if name == "clamp":
        return torch.clamp(number(args[0], zs, tensors), *args[1:3])
    return FUNCTIONS[name](*(number(arg, zs, tensors) for arg in args))


def made_of(term: Term) -> Entries:
    sides, tensors = entries.sides_of(term) | {0}, entries.places_of(term, "t")
    return Entries(term, max(sides) + 1, max(tensors, default=-1) + 1, tuple(range(max(sides) + 1)))


def check_term(term: Term, zs: list[Tensor], tensors: list[Tensor]) -> None:
    """The value of the operator and its gradients against autograd's."""
    which = made_of(term)
    zs, tensors = zs[: which.n_sides], tensors[: which.n_tensors]
    encoded = encode(which)
    assert decode(encoded) == which
    assert entries_text.render(which).startswith("sum ")
    expected = number(term, zs, tensors).expand_as(zs[0]).sum(-1)
    packed = divergence([*zs, *tensors], *normalisers(zs), encoded)
    torch.testing.assert_close(packed[0], expected, rtol=1e-11, atol=1e-12, equal_nan=True)
    upstream = torch.arange(len(expected)).double().cos()
    if not expected.requires_grad:
        return
    grads = [torch.autograd.grad(x, zs, upstream, materialize_grads=True) for x in (packed[0], expected)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-11, equal_nan=True)


def both(n: int = N, v: int = V) -> list[Tensor]:
    return [(2 * torch.randn(n, v)).double().requires_grad_() for _ in range(2)]


OF_EACH: dict[str, Term] = {
    "add": ("add", ("mul", P, P), LOG_Q),
    "sub": ("sub", ("mul", P, P), T),
    "mul": ("mul", ("mul", P, LOG_Q), T),
    "div": ("div", P, ("add", Q, 0.1)),
    "neg": ("neg", ("mul", P, Q)),
    "exp": ("exp", ("mul", P, T)),
    "log": ("log", ("add", P, 1e-3)),
    "log1p": ("log1p", ("neg", ("mul", 0.9, P))),
    "sqrt": ("sqrt", ("add", P, Q)),
    "abs": ("abs", ("sub", P, Q)),
    "sigmoid": ("sigmoid", ("sub", LOG_P, LOG_Q)),
    "tanh": ("tanh", ("sub", LOG_P, ("mul", T, LOG_Q))),
    "pow": ("pow", ("sub", 1.0, P), 2.5),
    "xlogy": ("xlogy", P, ("add", Q, 0.1)),
    "maximum": ("maximum", P, Q),
    "minimum": ("minimum", ("mul", P, P), Q),
    "where": ("where", ("gt", P, Q), ("mul", P, P), ("exp", Q)),
    "logaddexp": ("mul", ("logaddexp", ("add", LOG_P, 0.3), LOG_Q), ("sub", P, ("logaddexp", LOG_Q, LOG_Q))),
    "clamp": ("clamp", P, 0.02, 0.2, ENDS),
    "sign": ("mul", ("sign", ("sub", P, Q)), ("mul", P, P)),
    "number": ("mul", ("number", ("lt", P, 0.1)), ("mul", 0.3, ("sqrt", P))),
    **{name: ("where", (name, P, Q), ("exp", P), 0.3) for name in ("gt", "ge", "lt", "le", "eq", "ne")},
    **{name: ("where", (name, ("gt", P, Q), ("lt", P, 0.1)), ("exp", P), T) for name in ("and", "or")},
    "not": ("where", ("not", ("gt", P, Q)), 0.3, 0.7),
}


def test_no_function_is_forgotten() -> None:
    assert OF_EACH.keys() == entries.FUNCTIONS


@pytest.mark.parametrize("name", OF_EACH)
def test_each_function(name: str) -> None:
    check_term(OF_EACH[name], both(), [torch.rand(N, V).double()])


QUARTER = 0.25  # of four classes whose logits are equal, to the last bit


@pytest.mark.parametrize(
    "term",
    [
        ("mul", LOG_P, ("maximum", P, QUARTER)),
        ("mul", LOG_P, ("minimum", QUARTER, P)),
        ("mul", T, ("maximum", P, Q)),
        ("mul", T, ("maximum", ("mul", P, P), ("mul", P, 0.25))),
        ("mul", T, ("clamp", P, QUARTER, 1.0, ENDS)),
        ("mul", T, ("clamp", P, 0.0, QUARTER, ENDS)),
        ("mul", T, ("abs", ("sub", P, QUARTER))),
        ("mul", T, ("abs", ("sub", P, Q))),
        ("mul", ("where", ("ge", P, QUARTER), ("exp", P), 0.5), T),
        ("xlogy", ("sub", P, QUARTER), ("sub", Q, 0.125)),
        ("xlogy", ("sub", P, QUARTER), ("sub", Q, QUARTER)),
        ("mul", T, ("pow", ("sub", P, QUARTER), 2.0)),
        ("mul", T, ("pow", ("sub", P, QUARTER), 1.0)),
        ("mul", T, ("pow", ("sub", P, QUARTER), 0.0)),
        ("mul", T, ("sqrt", ("sub", P, QUARTER))),
        ("pow", ("add", P, Q), T),
        ("pow", ("sub", P, QUARTER), ("number", ("gt", T, 0.5))),
        ("pow", ("sub", P, QUARTER), Q),
        ("pow", ("add", Q, 0.1), ("sub", P, QUARTER)),
    ],
)
def test_where_torch_chooses_a_derivative(term: Term) -> None:
    zs = [torch.zeros(N, 4).double().requires_grad_() for _ in range(2)]
    check_term(term, zs, [torch.rand(N, 4).double()])


def random_term(rng: random.Random, depth: int) -> Term:
    """One that is finite, and whose derivative is not all too steep."""
    if depth == 0:
        return rng.choice([P, Q, P, LOG_P, LOG_Q, T, 0.3, ("mul", 0.5, P)])
    a, b = (random_term(rng, rng.randrange(depth)) for _ in range(2))
    positive = ("add", ("abs", a), 0.3)
    compared = (rng.choice(["gt", "ge", "lt", "le"]), a, b)
    return rng.choice(
        [
            *((name, a, b) for name in ("add", "sub", "mul", "maximum", "minimum")),
            *((name, positive) for name in ("log", "log1p", "sqrt")),
            ("div", b, positive),
            ("pow", positive, rng.choice([-1.0, 0.5, 1.5, 2.0, 3.0])),
            ("exp", ("clamp", a, -3.0, 1.0, ENDS)),
            ("xlogy", positive, ("add", ("pow", b, 2.0), 0.1)),
            ("where", compared, a, ("neg", b)),
            ("mul", ("number", ("not", compared)), a),
        ]
    )


OF_NUMBERS: list[Term] = [
    ("sigmoid", ("sub", LOG_P, ("n", 0))),
    ("mul", P, ("where", ("le", ("sub", ("z", 0), ("n", 0)), 0.0), 0.0, ("sub", ("z", 0), ("n", 0)))),
    ("pow", ("sub", P, ("mul", ("n", 0), ("z", 1))), 2.0),
    ("mul", ("exp", ("mul", ("c", 0), ("z", 0))), ("add", P, ("mul", ("n", 0), ("c", 1)))),
    ("mul", ("n", 0), ("exp", ("n", 1))),
    ("add", ("mul", ("z", 0), Q), ("div", ("mul", P, ("z", 1)), ("add", ("abs", ("n", 0)), 1.0))),
    ("mul", ("n", 0), ("tanh", ("z", 0))),
]


@pytest.mark.parametrize("term", OF_NUMBERS)
def test_logits_and_numbers_of_rows(term: Term) -> None:
    """What each entry makes of its logit, and of numbers that its row has, which have gradients too."""
    which = made_of(term)
    zs, numbers = both()[: which.n_sides], [torch.randn(N).double() for _ in range(which.n_numbers)]
    moving = [*zs, *(x.requires_grad_() for x in numbers[: which.n_moving])]
    ms, ds = normalisers([z.detach() for z in zs])
    ours = divergence(zs, ms, [*ds, *numbers], encode(which))[0]
    of_rows: dict[Term, Term] = {("n", k): ("t", k) for k in range(which.n_moving)}
    of_rows |= {("c", k): ("t", which.n_moving + k) for k in range(2)}
    wide = [x.unsqueeze(-1).expand(N, V) for x in numbers]
    exact = number(entries.replaced(term, of_rows), zs, wide).sum(-1)
    torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)
    upstream = torch.arange(N).double().cos()
    grads = [torch.autograd.grad(x, moving, upstream, materialize_grads=True) for x in (ours, exact)]
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("seed", range(40))
def test_terms_at_random(seed: int) -> None:
    term = random_term(random.Random(seed), 5)
    if isinstance(term, float) or not entries.sides_of(term):
        term = ("mul", P, term)
    check_term(term, both(), [torch.rand(N, V).double()])


def test_text() -> None:
    term = ("neg", ("mul", P, ("log", ("add", P, 1e-8))))
    assert entries_text.render(made_of(term)) == "sum -p*log(p + 1e-08)"
    power = ("mul", ("pow", ("sub", 1.0, P), 2.0), ("sub", LOG_Q, ("clamp", T, 0.1, math.inf, ENDS)))
    assert entries_text.render(made_of(power)) == "sum (1 - p)^2*(log q - clamp(t, min=0.1))"
    assert entries_text.render(made_of(("mul", Q, ("sub", ("z", 0), ("n", 1))))) == "sum q*(z - n2)"


def test_text_of_what_people_call_by_a_name() -> None:
    gap: Term = ("sub", ("z", 0), ("n", 0))
    relu: Term = ("where", ("le", gap, 0.0), 0.0, gap)
    softplus: Term = ("where", ("gt", gap, 20.0), gap, ("logaddexp", gap, 0.0))
    assert entries_text.render(made_of(("mul", P, relu))) == "sum p*relu(z - n)"
    assert entries_text.render(made_of(softplus)) == "sum softplus(z - n)"
    assert entries_text.render(made_of(("neg", ("logaddexp", ("neg", P), 0.0)))) == "sum logsigmoid(p)"


def test_long_text_is_cut() -> None:
    term: Term = ("mul", P, ("log", ("add", Q, 1e-8)))
    for k in range(5):
        term = ("add", ("exp", ("mul", ("t", k), P)), ("mul", term, ("sqrt", ("add", term, LOG_P))))
    assert len(entries_text.render(made_of(term))) <= entries_text.LONGEST
    assert entries_text.render(made_of(("exp", term))).endswith("*sqrt(g(log p, p, q, ...)))")


def test_what_a_statistic_is_is_not_own() -> None:
    assert not entries.is_own(("mul", 3.0, P))
    assert not entries.is_own(LOG_P)
    assert entries.is_own(("mul", P, LOG_P))
    assert entries.is_own(("clamp", P, 0.1, 1.0, ENDS))
    assert entries.is_own(("mul", P, ("pow", ("sub", T, ("n", 0)), 2.0)))
    assert not entries.is_own(("mul", P, ("pow", ("sub", T, ("c", 0)), 2.0)))


def test_squares_of_squares_are_too_long() -> None:
    """Written out they are: nothing is done that grows with the length of the text."""
    term: Term = P
    for _ in range(60):
        term = ("mul", term, term)
    assert entries.is_long(term)


# The operators


ENTROPY: Term = ("neg", ("mul", P, ("log", ("add", P, 1e-3))))
OF_TENSORS: Term = (
    *("add", ("mul", ("number", ("t", 0)), ("mul", P, ("t", 1)))),
    ("pow", ("sub", Q, ("mul", ("t", 2), ("t", 3))), 2.0),
)


def of_all_kinds(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Of truth values, integers, rows and classes, of which the last two are expanded."""
    rows, classes = torch.rand(N, 1, dtype=dtype), torch.rand(1, V, dtype=dtype)
    return [torch.rand(N, V) > 0.5, torch.randint(3, (N, V)), rows.expand(N, V), classes.expand(N, V)]


@pytest.mark.parametrize("wanted", [(0, 1), (0,), (1,), ()])
def test_gradcheck(wanted: tuple[int, ...]) -> None:
    zs = [z.requires_grad_(u in wanted) for u, z in enumerate(both(3, 5))]
    tensors = [t[:3, :5] for t in of_all_kinds()]
    which = encode(Entries(OF_TENSORS, 2, 4, wanted))

    def value(*zs: Tensor) -> Tensor:
        return divergence([*zs, *tensors], *normalisers([*zs]), which)[0]

    if wanted:
        assert torch.autograd.gradcheck(value, zs)
    else:
        assert divergence([*zs, *tensors], *normalisers(zs), which).shape == (5, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_operators_as_torch_sees_them(dtype: torch.dtype) -> None:
    """Logits in float32 beside tensors in float64 too: all is computed in the wider."""
    zs, tensors = [z.detach().to(dtype).requires_grad_() for z in both()], of_all_kinds()
    which = encode(Entries(OF_TENSORS, 2, 4, (0, 1)))
    torch.library.opcheck(divergence, ([*zs, *tensors], *normalisers(zs), which))
    packed = divergence([*zs, *tensors], *normalisers(zs), which).detach()
    assert packed.dtype == torch.float64
    plain = [z.detach() for z in zs]
    given = ([*plain, *tensors], normalisers(zs)[0], packed, packed[0], which)
    torch.library.opcheck(divergence_grad, given)
    assert [dz.dtype for dz in divergence_grad(*given)] == [dtype] * 2


def test_what_the_operators_refuse() -> None:
    zs = [z.detach() for z in both()]
    which = encode(Entries(("mul", P, T), 1, 1, (0,)))
    with pytest.raises(ValueError, match="1 sets of logits for 1 sides and 1 tensors"):
        divergence(zs[:1], *normalisers(zs[:1]), which)
    of_number = encode(Entries(("mul", P, ("n", 0)), 1, 0, (0,)))
    with pytest.raises(ValueError, match="1 rows for 1 sides and 1 numbers"):
        divergence(zs[:1], *normalisers(zs[:1]), of_number)
    with pytest.raises(ValueError, match=r"\[N, V\]"):
        divergence([zs[0], zs[1][:, :-1]], *normalisers(zs[:1]), which)
    with pytest.raises(ValueError, match="floating point"):
        divergence([zs[0].long(), zs[1]], *normalisers(zs[:1]), which)


# Whole programs


def sm(z: Tensor, dim: int = -1) -> Tensor:
    return torch.softmax(z, dim)


class Program:
    """A loss in a spelling made at random, of (z [B, T, V], the same of a second side, t, w, y)."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        self.arranged = self.rng.choice(["flat", "sequence", "classes first"])
        self.second = self.rng.choice(["", "moves", "detached", "no_grad"])
        self.parts = [self.part() for _ in range(2)]
        self.end = self.rng.choice(
            ["sum mean", "mean", "sum", "keepdim", "masked", "all but first", "mse", "l1", "kl", "kl log"]
        )
        self.how = self.rng.choice(["mean", "sum", "batchmean", "none"])
        self.text = f"{self.arranged}, {self.second}, {self.end}, {self.how}"

    def part(self) -> Callable[..., Tensor]:
        number = self.rng.choice([0.2, 0.5, 2.0])
        return self.rng.choice(
            [
                lambda p, b: p * torch.log(p + 1e-3),
                lambda p, b: torch.clamp(p, min=0.01, max=0.9).log() * b,
                lambda p, b: (p - b) ** 2,
                lambda p, b: (1 - p).pow(2.5) * torch.log1p(p * number),
                lambda p, b: torch.maximum(p, b * number) * p,
                lambda p, b: torch.where(p.detach() > 0.05, p.square() * p, number * p),
                lambda p, b: (p / (b + number)) * p,
                lambda p, b: ((p + 0.1).log() * p).masked_fill(b > 0.1, 0.0),
                lambda p, b: number - (p * b.detach() + 0.1).sqrt(),
                lambda p, b: torch.exp(-p) * (1.0 + p.abs()),
            ]
        )

    def __call__(self, z: Tensor, z2: Tensor, t: Tensor, w: Tensor, y: Tensor) -> Tensor:
        axis, shape = -1, z.shape
        if self.arranged == "flat":
            z, z2, t, y = (x.reshape(-1, *x.shape[2:]) for x in (z, z2, t, y))
        elif self.arranged == "classes first":
            z, z2, t = (x.transpose(1, 2) for x in (z, z2, t))
            axis, w = 1, w[:, None]
        p, b = sm(z, axis), t
        if self.second == "no_grad":
            with torch.no_grad():
                b = sm(z2, axis)
        elif self.second:
            b = sm(z2, axis).detach() if self.second == "detached" else sm(z2, axis)
        if self.end in ("mse", "l1"):
            function = F.mse_loss if self.end == "mse" else F.l1_loss
            loss = function(p + self.parts[0](p, t), b, reduction=self.reduction())
            return loss.sum() if loss.dim() else loss
        if self.end in ("kl", "kl log"):
            target, log_target = ((b + 0.01).log(), True) if self.end == "kl log" else (b, False)
            loss = F.kl_div((p + 1e-2).log(), target, reduction=self.how, log_target=log_target)
            return loss.mean() if loss.dim() else loss
        e = self.parts[0](p, b) * w + self.parts[1](p, t) / (1.0 + y).unsqueeze(axis)
        if self.end == "masked":
            kept = (y > 2).to(e.dtype)
            return (e.sum(axis) * kept).sum() / (kept.sum() + 1)
        if self.end == "all but first":
            return e.mean(tuple(range(1, e.dim()))).sum()
        if self.end == "keepdim":
            return (e.sum(axis, keepdim=True) / shape[-1]).square().mean()
        return {"sum mean": lambda: e.sum(dim=axis).mean(), "mean": e.mean, "sum": e.sum}[self.end]()

    def reduction(self) -> str:
        return "mean" if self.how == "batchmean" else self.how


def given(dtype: torch.dtype, batch: int = 2, length: int = 4, seed: int = 0) -> tuple[Tensor, ...]:
    torch.manual_seed(seed)
    z, z2 = (2 * torch.randn(batch, length, V) for _ in range(2))
    t, w = sm(torch.randn(batch, length, V)), torch.rand(V)
    y = torch.randint(V, (batch, length))
    return z.to(dtype).requires_grad_(), z2.to(dtype).requires_grad_(), t.to(dtype), w.to(dtype), y


PROGRAMS = range(30 if EVERYTHING else 20)


@pytest.mark.parametrize(
    ("seed", "dtype"), in_turns(PROGRAMS, [torch.float32, torch.bfloat16, torch.float64])
)
def test_programs_at_random(seed: int, dtype: torch.dtype) -> None:
    program = Program(seed)
    backend = Rewritten()
    compiled = torch.compile(program, backend=backend, fullgraph=True)
    if dtype == torch.float64:
        check(run(compiled, given(dtype)), program, given(dtype))
    else:
        check_draws(compiled, program, (given(dtype, seed=draw) for draw in range(3)))
    assert backend.count(ops.DIVERGENCE) >= 1, program.text


def test_other_numbers_of_rows_are_compiled_once() -> None:
    program = Program(3)
    backend = Rewritten()
    compiled = torch.compile(program, backend=backend, dynamic=True, fullgraph=True)
    for batch, length in ((2, 4), (3, 5), (5, 3)):
        args = given(torch.float32, batch, length)
        with torch._dynamo.config.patch(error_on_recompile=batch > 2):
            check(run(compiled, args), program, args)
    assert backend.count(ops.DIVERGENCE) == 1


def under_autocast(z: Tensor, z2: Tensor, t: Tensor, w: Tensor, y: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        p = F.linear(z, torch.eye(V)).softmax(-1)
        return F.mse_loss(p, t) - (p * (p + 1e-3).log()).sum(-1).mean()


def test_under_autocast() -> None:
    args = given(torch.float32)
    backend = Rewritten()
    ours, eager = (run(f, args) for f in (torch.compile(under_autocast, backend=backend), under_autocast))
    p, t = sm(args[0].detach().bfloat16().double()), args[2].double()  # the product is in bfloat16
    exact = ((p - t) ** 2).mean() - (p * (p + 1e-3).log()).sum(-1).mean()
    assert_fair(ours.results[0], eager.results[0], exact)
    for mine, theirs in zip(ours.gradients, eager.gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=1e-2)
    assert backend.count(ops.DIVERGENCE) == 2


# Binary cross entropies


def to_the_label(z: Tensor, t: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy(sm(z), F.one_hot(y, V).to(z.dtype))


def of_weighed_rows(z: Tensor, t: Tensor, w: Tensor, y: Tensor) -> Tensor:
    target = F.one_hot(y, V).to(z.dtype)
    return F.binary_cross_entropy(sm(z), target, weight=(w * target).sum(-1, keepdim=True).repeat(1, V))


def of_weighed_classes(z: Tensor, t: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy(sm(z), sm(t), w, reduction="sum")


def each_summed(z: Tensor, t: Tensor, w: Tensor, y: Tensor) -> Tensor:
    each = torch.nn.BCELoss(weight=t.sigmoid(), reduction="none")(sm(z), sm(t))
    return (each * w).sum(-1)


def of_bounded(z: Tensor, t: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy(sm(z).clamp(1e-4, 0.5), sm(t).round(), size_average=False)


def to_a_held_side(z: Tensor, t: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return torch.nn.BCELoss()(sm(z), sm(z / 2).detach())


BINARY = [to_the_label, of_weighed_rows, of_weighed_classes, each_summed, of_bounded, to_a_held_side]


def for_binary(dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, ...]:
    torch.manual_seed(seed)
    z, t, w = 2 * torch.randn(N, V), torch.randn(N, V), torch.rand(V)
    return z.to(dtype).requires_grad_(), t.to(dtype), w.to(dtype), torch.randint(V, (N,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("f", BINARY)
def test_binary_cross_entropy(f: Callable[..., Tensor], dtype: torch.dtype) -> None:
    backend = Rewritten()
    compiled = torch.compile(f, backend=backend, fullgraph=True)
    if dtype == torch.float64:
        check(run(compiled, for_binary(dtype)), f, for_binary(dtype))
    else:
        check_draws(compiled, f, (for_binary(dtype, seed=draw) for draw in range(3)))
    assert backend.count(ops.DIVERGENCE) == 1
    assert "binary_cross_entropy(" in backend.report.sites[0].form


@pytest.mark.parametrize("f", [to_the_label, of_weighed_classes])
def test_binary_cross_entropy_of_small_probabilities(f: Callable[..., Tensor]) -> None:
    """Torch's gradient below 1e-12 is not that of its value, whose logarithms end at -100."""
    z, *others = for_binary(torch.float64)
    z.data[:, ::3] -= 40
    z.data[:, 1::4] -= 150
    others[-1][:] = torch.arange(N)
    assert (sm(z) < 1e-12).any()
    assert (z.log_softmax(-1) < -100).any()
    backend = Rewritten()
    check(run(torch.compile(f, backend=backend), (z, *others)), f, (z, *others))
    assert backend.count(ops.DIVERGENCE) == 1


def to_a_side_that_learns(z: Tensor, t: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy(sm(z), sm(z / 2))


def of_sigmoids(z: Tensor, t: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy(z.sigmoid(), sm(t))


def of_one_class(z: Tensor, t: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy(sm(z)[:, 1], sm(t)[:, 1])


@pytest.mark.parametrize("f", [to_a_side_that_learns, of_sigmoids, of_one_class])
def test_binary_cross_entropies_that_are_left(f: Callable[..., Tensor]) -> None:
    assert rewritten(f, for_binary(torch.float32)).count(ops.DIVERGENCE) == 0


# Numbers that are none


BETWEEN: dict[str, Callable[..., Tensor]] = {
    "entropy": lambda p, q, t, a: p * (p + 1e-8).log(),
    "clamped": lambda p, q, t, a: p.clamp(min=1e-6).log() * p,
    "chosen": lambda p, q, t, a: torch.where(q > 1e-3, p * a * a, 0.0),
    "square": lambda p, q, t, a: (p - q) ** 2,
    "distance": lambda p, q, t, a: (p - q).abs(),
    "roots": lambda p, q, t, a: (p.sqrt() - q.sqrt()) ** 2,
    "focal": lambda p, q, t, a: (1 - p) ** 2.5 * a * t,
    "clamped log": lambda p, q, t, a: a.clamp(min=-3.0) * t,
    "xlogy": lambda p, q, t, a: torch.xlogy(p, q + 0.1),
    "larger": lambda p, q, t, a: torch.maximum(p, q) * t,
    "ratio": lambda p, q, t, a: p * p / (q + 0.1),
    "power": lambda p, q, t, a: p.pow(1.5) * q,
    "filled": lambda p, q, t, a: (p * a * a).masked_fill(p == 0, 0.0),
    "positive": lambda p, q, t, a: torch.relu(p - q) * t,
    "from its own": lambda p, q, t, a: torch.sigmoid(a - a.select(-1, 3).unsqueeze(-1)) * q,
}


def spoilt(how: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    z, q, t, *_ = (x.detach().float() for x in given(torch.float32, 1, N))
    z, q, t = z[0].clone(), q[0].clone(), t[0].clone()
    if how == "columns":
        z[:, ::4], q[:, 1::4] = -math.inf, -math.inf
    elif how == "underflow":
        z[:, ::3] -= 200
        q[:, 1::3] -= 200
    elif how.startswith("tensor"):
        t[1, 2] = float(how.split()[1])
    else:
        z[2, slice(None) if how == "-inf" else 3] = float(how)
    return z.to(dtype).requires_grad_(), q.to(dtype).requires_grad_(), t.to(dtype)


SPOILT = ["columns", "underflow", "-inf", "inf", "nan", "tensor nan", "tensor inf"]
SOME = [
    (name, how, [torch.float32, torch.float16, torch.bfloat16][(i + 2 * j) % 3])
    for i, name in enumerate(BETWEEN)
    for j, how in enumerate(SPOILT)
    if EVERYTHING or (i + j) % 2 == 0
]


@pytest.mark.parametrize(("name", "how", "dtype"), SOME)
def test_finite_where_eager_is(name: str, how: str, dtype: torch.dtype) -> None:
    """Eager makes NaN of 0 times infinity, where ours may be the limit: else nothing is another."""

    def f(z: Tensor, q: Tensor, t: Tensor) -> Tensor:
        return BETWEEN[name](z.softmax(-1), q.softmax(-1), t, z.log_softmax(-1)).sum(-1)

    backend, args = Rewritten(), spoilt(how, dtype)
    ours, eager = run(torch.compile(f, backend=backend), args), run(f, args)
    assert backend.count(ops.DIVERGENCE) == 1
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    for mine, theirs in zip(ours.results + ours.gradients, eager.results + eager.gradients, strict=True):
        known = ~theirs.isnan()
        torch.testing.assert_close(mine[known], theirs[known], rtol=tolerance, atol=tolerance)


# What is compared with the same logits, and what is left


def own(z: Tensor, function: Callable[[Tensor], Tensor] = lambda z: z.log_softmax(-1)) -> Tensor:
    """An entry that labels pick, of each row."""
    return function(z).gather(-1, (torch.arange(N) % V).unsqueeze(-1))


def its_maximum(z: Tensor, t: Tensor) -> Tensor:
    p = z.softmax(-1)
    return torch.where(p == p.detach().amax(-1, keepdim=True), 0.0, p * torch.log(p + 1e-3)).sum(-1)


def maximum_without_gradient(z: Tensor, t: Tensor) -> Tensor:
    p = z.softmax(-1)
    with torch.no_grad():
        least = p.topk(3, -1).values[..., -1:]
    return torch.where(p >= least, p * torch.log(p + 1e-3), p * p).sum(-1)


def far_from_its_maximum(z: Tensor, t: Tensor) -> Tensor:
    p = z.softmax(-1)
    return (p - p.detach().amax(-1, keepdim=True)).abs().sum(-1)


def above_its_second(z: Tensor, t: Tensor) -> Tensor:
    p = z.softmax(-1)
    return torch.maximum(p, p.detach().topk(2, -1).values[..., -1:]).pow(1.5).sum(-1)


def clamped_at_its_maximum(z: Tensor, t: Tensor) -> Tensor:
    p = z.softmax(-1)
    return ((p - p.detach().amax(-1, keepdim=True)).clamp(min=0.0) * t).sum(-1)


def from_its_rows(z: Tensor, t: Tensor) -> Tensor:
    p = z.softmax(-1)
    return F.l1_loss(p, p.detach().amax(-1, keepdim=True).expand_as(p), reduction="sum")


def tensor_that_learns(z: Tensor, t: Tensor) -> Tensor:
    p = z.softmax(-1)
    return (t.requires_grad_() * (p + 1e-3).log()).sum(-1)


def edited_without_gradient(z: Tensor, t: Tensor) -> Tensor:
    e = z.softmax(-1).sqrt() * t
    with torch.no_grad():
        e -= 2 * t
    return e.square().sum(-1)


def edited_and_read(z: Tensor, t: Tensor) -> Tensor:
    e = z.softmax(-1).sqrt() * t
    whole = e.view(-1)
    e -= t
    return e.sum(-1) + whole.sum()


def tensor_edited_after(z: Tensor, t: Tensor) -> Tensor:
    t = t.clone()
    e = (z.softmax(-1) - t).exp()
    t.mul_(2)
    return e.sum(-1) + t.sum()


def logits_edited_after(z: Tensor, t: Tensor) -> Tensor:
    z = z * 1
    whole = z.view(-1)
    p = z.softmax(-1)
    e = (p * (p + 1e-3).log()).sum(-1)
    z.mul_(2)
    return e + z.sum(-1) + whole[0]


def some_rows(z: Tensor, t: Tensor) -> Tensor:
    """The tensor is broadcast over a batch."""
    p = z.view(2, N // 2, V).softmax(-1)
    return (p - t[: N // 2]).exp().sum(-1)


def truth_in_float32(z: Tensor, t: Tensor) -> Tensor:
    """Eager rounds the number to float32."""
    p = z.softmax(-1)
    return ((p > 0.1) * 0.3 * p.sqrt()).sum(-1)


def summed_in_float64(z: Tensor, t: Tensor) -> Tensor:
    p = z.softmax(-1).float()
    return (p * (p + 1e-3).log()).sum(-1, dtype=torch.float64)


def squares_of_squares(z: Tensor, t: Tensor) -> Tensor:
    p = z.softmax(-1) * 1.1
    for _ in range(30):
        p = (p * p + 0.1).sqrt()
    return p.sum(-1)


def above_its_own(z: Tensor, t: Tensor) -> Tensor:
    """The comparison stays as it is."""
    return (z.softmax(-1).sqrt() * (z > z[:, 1:2])).sum(-1)


def bent_at_its_own_held(z: Tensor, t: Tensor) -> Tensor:
    return (z.softmax(-1) * torch.relu(z - own(z, torch.Tensor.detach))).sum(-1)


def bent_by_logits_held(z: Tensor, t: Tensor) -> Tensor:
    return (z.softmax(-1) * torch.relu(z.detach() - own(z, torch.clone))).sum(-1)


def bent_at_its_largest(z: Tensor, t: Tensor) -> Tensor:
    return (z.softmax(-1).sqrt() * (z - z.topk(2, -1).values[:, :1] * 1.0).abs()).sum(-1)


def hinge(z: Tensor, t: Tensor) -> Tensor:
    """No softmax."""
    return torch.relu(1 + z - own(z, torch.clone)).sum(-1)


def a_class_that_learns(z: Tensor, t: Tensor) -> Tensor:
    return (z.softmax(-1).sqrt() * z[0].sigmoid()).sum(-1)


def variance_over_bins_that_learn(z: Tensor, t: Tensor) -> Tensor:
    p, bins = z.softmax(-1), t[0] * z[0].tanh()
    return (p * (bins - (p * bins).sum(-1, keepdim=True)).square()).sum(-1)


def mean_edited_after(z: Tensor, t: Tensor) -> Tensor:
    p = z.softmax(-1)
    mean = (p * t).sum(-1, keepdim=True)
    variance = (p * (t - mean).square()).sum(-1)
    mean.mul_(2)
    return variance + mean[:, 0]


def some_classes(z: Tensor, t: Tensor) -> Tensor:
    return (t[:, 1:] * (z.softmax(-1) + 1e-3).log()[:, 1:]).sum(-1)


def weighed_then_chosen(z: Tensor, t: Tensor) -> Tensor:
    """The tensor would have to be chosen of as well."""
    return ((z.softmax(-1) + 1e-3).log() * t)[torch.arange(N).flip(0)].sum(-1)


def chosen_then_edited(z: Tensor, t: Tensor) -> Tensor:
    log_p = (z.softmax(-1) + 1e-3).log()
    rows = log_p[1:]
    log_p.add_(1.0)
    return (rows * rows).sum(-1)


def normalised_by_a_sum_of_entries(z: Tensor, t: Tensor) -> Tensor:
    """The gradients by the sum and by the entries would cancel."""
    p = (z.softmax(-1) + 1e-3).sqrt()
    q = p / p.sum(-1, keepdim=True)
    return (q * q.log() * t).sum(-1)


LEFT = [
    *(its_maximum, maximum_without_gradient, far_from_its_maximum, above_its_second, from_its_rows),
    *(clamped_at_its_maximum, tensor_edited_after, logits_edited_after),
    *(some_rows, squares_of_squares, edited_without_gradient, edited_and_read),
    *(
        bent_at_its_own_held,
        bent_by_logits_held,
        bent_at_its_largest,
        hinge,
        normalised_by_a_sum_of_entries,
        some_classes,
        weighed_then_chosen,
        chosen_then_edited,
        a_class_that_learns,
        variance_over_bins_that_learn,
        mean_edited_after,
    ),
]


@pytest.mark.parametrize(("f", "dtype"), in_turns(LEFT, [torch.float64, torch.float32]))
def test_what_is_left(f: Callable[..., Tensor], dtype: torch.dtype) -> None:
    z, t = (2 * torch.randn(N, V)).to(dtype).requires_grad_(), torch.rand(N, V).to(dtype)
    assert rewritten(f, (z, t)).count(ops.DIVERGENCE) == 0


def against_its_own(z: Tensor, t: Tensor) -> Tensor:
    gap = z.log_softmax(-1) - own(z)
    return F.softplus(gap).sum(-1) - F.logsigmoid(gap * t).mean(-1) + F.softplus(gap, beta=2.0).sum(-1)


def margins(z: Tensor, t: Tensor) -> Tensor:
    gap = z - z[torch.arange(N), torch.arange(N) % V].unsqueeze(-1)
    return (z.softmax(-1) * F.relu(gap + 1)).sum(-1) + (z.softmax(-1) * t * gap.tanh()).sum(-1)


def bent_at_its_own(z: Tensor, t: Tensor) -> Tensor:
    gap = z - own(z, torch.clone)
    largest = torch.maximum(z.log_softmax(-1), own(z))
    return (z.softmax(-1) * (t * torch.relu(gap) + gap.abs() * largest)).sum(-1)


def squares_from_its_own(z: Tensor, t: Tensor) -> Tensor:
    p = z.softmax(-1)
    return (p - own(z, sm)).square().sum(-1)


def renormalised(z: Tensor, t: Tensor) -> Tensor:
    p = z.softmax(-1) + 1e-3
    return (t * (p / p.sum(-1, keepdim=True)).log()).sum(-1)


def weighed_by_a_sum_of_entries(z: Tensor, t: Tensor) -> Tensor:
    """The number of one sum is another's result."""
    p = (z.softmax(-1) + 1e-3).sqrt()
    with torch.no_grad():
        total = p.sum(-1, keepdim=True)
    return (p / total * (p / total).log() * t).sum(-1)


def number_that_is_held(z: Tensor, t: Tensor) -> Tensor:
    """With its gradient in one place, and without in another."""
    log_p = z.log_softmax(-1)
    gap = log_p - own(z)
    with torch.no_grad():
        weights = torch.exp(gap) * t
    return (weights * torch.sigmoid(gap)).sum(-1) + (log_p.exp().sqrt() * gap.detach()).sum(-1)


def own_and_negatives(z: Tensor, t: Tensor) -> Tensor:
    """No softmax, but what one is divided by."""
    z = z - z.max(1, keepdim=True)[0].detach()
    negatives = (z.exp() * (t < 0.7)).sum(1, keepdim=True)
    return ((z - torch.log(negatives + z.exp())) * t).sum(-1)


def number_of_another_tensor(z: Tensor, t: Tensor) -> Tensor:
    """Of rows, and one for all."""
    p, rows, scale = z.softmax(-1), t.mean(-1, keepdim=True), t[0, 0]
    return (torch.exp(p * p * scale) * p * rows).sum(-1)


def age_estimation(z: Tensor, t: Tensor) -> Tensor:
    """Label distributions, with an epsilon, and beside them the mean and the variance over bins."""
    bins, target, p = t[0] * 10, t.softmax(-1), z.softmax(-1)
    kl = (target * (torch.log(target + 1e-3) - torch.log(p + 1e-3))).sum(-1)
    mean = (p * bins).sum(-1)
    return kl + (mean - 3).abs() + (p * (bins - mean[:, None]) ** 2).sum(-1)


def deviations(z: Tensor, t: Tensor) -> Tensor:
    """Distances from the mean by themselves, of classes of which some have no probability."""
    z = z.masked_fill(t < 0.3, -torch.inf)
    p = z.softmax(-1)
    gap = t - (p * t).sum(-1, keepdim=True)
    third = (gap.pow(3) * p).mean(-1)
    return (F.softplus(gap) * gap.square() * p).sum(-1) / (p * gap.square()).sum(-1).sqrt() + third


def far_from_a_mean_elsewhere(z: Tensor, t: Tensor) -> Tensor:
    """The number is of other rows."""
    p = z.softmax(-1)
    return (p * (t - (p * t).sum(-1, keepdim=True).flip(0)).square()).sum(-1)


NUMBERS = [
    *(against_its_own, margins, bent_at_its_own, squares_from_its_own, renormalised),
    *(age_estimation, deviations, far_from_a_mean_elsewhere),
    *(
        weighed_by_a_sum_of_entries,
        number_that_is_held,
        number_of_another_tensor,
        above_its_own,
        own_and_negatives,
    ),
]


@pytest.mark.parametrize(("f", "dtype"), in_turns(NUMBERS, [torch.float64, torch.float32, torch.bfloat16]))
def test_numbers_of_rows(f: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """A number of its row beside each entry, with a gradient of its own."""
    z, t = (2 * torch.randn(N, V)).to(dtype).requires_grad_(), torch.rand(N, V).to(dtype)
    ours = rewritten(f, (z, t.requires_grad_(f is number_of_another_tensor)))
    assert ours.count(ops.DIVERGENCE) >= 1
    assert not ours.report.misses


ROWS_OF = torch.tensor([5, 0, 0, 3, 2, 1])


def clamped_then_chosen(z: Tensor, t: Tensor) -> Tensor:
    """As of the actions that were taken."""
    p = z.view(N // 2, 2, V).softmax(-1).clamp(min=0.02)
    return (t[: N // 2] * p[range(N // 2), [1, 0, 1]].log()).sum(-1)


def gathered_after(z: Tensor, t: Tensor) -> Tensor:
    log_p = (z.view(N // 2, 2, V).softmax(-1) + 1e-3).log()
    which = (ROWS_OF[: N // 2] % 2).view(-1, 1, 1).expand(N // 2, 1, V)
    return (t[: N // 2] * log_p.gather(1, which).squeeze(1)).sum(-1)


def one_row_twice(z: Tensor, t: Tensor) -> Tensor:
    q = (z.softmax(-1) + 1e-3).sqrt()
    return (q[ROWS_OF] * q * t).sum(-1) + q.index_select(0, ROWS_OF).square().log().sum(-1)


def seen_otherwise(z: Tensor, t: Tensor) -> Tensor:
    p = (z.view(2, N // 2, V).softmax(-1) + 1e-3).sqrt()
    moved, cut = p.transpose(0, 1).log(), p[:, 1:].log()
    return (moved * t.view(N // 2, 2, V)).sum((0, 2)) + (cut * cut).sum((-1, 1)) + (p.view(-1, V) * t).sum()


def chosen_without_gradient(z: Tensor, t: Tensor) -> Tensor:
    p = z.softmax(-1) + 1e-3
    with torch.no_grad():
        weights = p[ROWS_OF].sqrt()
    return (weights * p.log() * t).sum(-1)


MOVED = [clamped_then_chosen, gathered_after, one_row_twice, seen_otherwise, chosen_without_gradient]


@pytest.mark.parametrize(("f", "dtype"), in_turns(MOVED, [torch.float64, torch.float32, torch.bfloat16]))
def test_rows_that_are_chosen_or_moved(f: Callable[..., Tensor], dtype: torch.dtype) -> None:
    z, t = (2 * torch.randn(N, V)).to(dtype).requires_grad_(), torch.rand(N, V).to(dtype)
    assert rewritten(f, (z, t)).count(ops.DIVERGENCE) >= 1


def subtracted_in_place(z: Tensor, t: Tensor) -> Tensor:
    p, q = z.softmax(-1), t.softmax(-1)
    e = torch.masked_fill(p * torch.log(0.1 * p + 0.9 * q), t > 0.9, 0)
    e -= torch.masked_fill(p * z.log_softmax(-1), t > 0.9, 0)
    return e.sum(-1)


def edited_twice(z: Tensor, t: Tensor) -> Tensor:
    e = (z.softmax(-1) + 0.1).log() * t
    e += z.softmax(-1).square()
    e.mul_(0.3)
    return e.sum(-1).exp()


def edited_beside_no_gradient(z: Tensor, t: Tensor) -> Tensor:
    with torch.no_grad():
        e = (z.softmax(-1) + 0.1).log()
    e += z.softmax(-1).square()
    return e.sum(-1)


def edited_before(z: Tensor, t: Tensor) -> Tensor:
    p = z.softmax(-1) + 0
    p.add_(1e-3)
    return (p * p.log()).sum(-1)


@pytest.mark.parametrize("f", [subtracted_in_place, edited_twice, edited_beside_no_gradient, edited_before])
def test_edits_that_nothing_else_sees(f: Callable[..., Tensor]) -> None:
    z, t = torch.randn(N, V).double().requires_grad_(), torch.rand(N, V).double()
    assert rewritten(f, (z, t)).count(ops.DIVERGENCE) == 1


def negatives_edited_twice(z: Tensor, t: Tensor) -> Tensor:
    with torch.no_grad():
        negative = torch.zeros_like(t).scatter_(1, t.argsort(-1)[:, :4], 1.0)
        negative.scatter_(1, t.argmin(-1, keepdim=True), 0.0)
    return (torch.clamp(1 - z.log_softmax(-1).exp(), min=1e-5).log() * negative).sum()


def edited_between_two_uses(z: Tensor, t: Tensor) -> Tensor:
    weights = t.clone()
    twice = 2 * weights
    weights[:, 0] = 3
    return ((z.softmax(-1) + 0.1).log() * twice * weights).sum(-1)


def rows_edited_before(z: Tensor, t: Tensor) -> Tensor:
    rows = torch.ones_like(t[:, :1])
    rows[2] = 0
    rows.mul_(3)
    return ((z.softmax(-1) + 0.1).log() * rows).sum(-1)


def rows_of_a_divergence_edited_before(z: Tensor, t: Tensor) -> Tensor:
    rows = torch.ones_like(t[:, :1])
    rows[2] = 0
    return (rows * z.softmax(-1) * (z.log_softmax(-1) - (2 * z).log_softmax(-1))).sum()


EDITED = [
    negatives_edited_twice,
    edited_between_two_uses,
    rows_edited_before,
    rows_of_a_divergence_edited_before,
]


@pytest.mark.parametrize("f", EDITED)
def test_what_is_brought_may_be_edited_before_it_is_read(f: Callable[..., Tensor]) -> None:
    z, t = torch.randn(N, V).double().requires_grad_(), torch.rand(N, V).double()
    assert rewritten(f, (z, t)).count(ops.DIVERGENCE) == 1


def edited_after_it_was_read(z: Tensor, t: Tensor) -> Tensor:
    weights = t.clone()
    with torch.no_grad():
        told = ((z.softmax(-1) + 0.1).log() * weights).sum(-1)
    weights[:, 0] = 3
    return told + F.cross_entropy(z, t.argmax(-1))


def edited_between_two_readers(z: Tensor, t: Tensor) -> Tensor:
    weights = t.clone()
    e = (z.softmax(-1) + 0.1).log().detach() * weights
    weights[:, 0] = 3
    return (e + (z.softmax(-1) + 0.1).log() * weights).sum(-1)


def an_edit_that_learns(z: Tensor, t: Tensor) -> Tensor:
    weights = torch.zeros_like(t)
    weights.add_(t)
    return ((z.softmax(-1) + 0.1).log() * weights).sum(-1)


def compared_with_an_edit_of_its_own(z: Tensor, t: Tensor) -> Tensor:
    largest = torch.zeros_like(t[:, :1])
    p = z.softmax(-1)
    largest.copy_(p.detach().amax(-1, keepdim=True))
    return torch.where(p >= largest, p.sqrt(), p.exp()).sum(-1)


LEFT_EDITED = [
    edited_after_it_was_read,
    edited_between_two_readers,
    an_edit_that_learns,
    compared_with_an_edit_of_its_own,
]


@pytest.mark.parametrize("f", LEFT_EDITED)
def test_edits_by_which_a_sum_is_left(f: Callable[..., Tensor]) -> None:
    z, t = torch.randn(N, V).double().requires_grad_(), torch.rand(N, V).double()
    assert rewritten(f, (z, t.requires_grad_(f is an_edit_that_learns))).count(ops.DIVERGENCE) == 0


def weighed_without_gradient(z: Tensor, t: Tensor) -> Tensor:
    p = z.softmax(-1)
    with torch.no_grad():
        weights = p.sqrt() * t
    return (weights * (p + 0.2).sqrt()).sum(-1)


def test_what_is_made_where_gradients_are_off() -> None:
    z, t = torch.randn(N, V).double().requires_grad_(), torch.rand(N, V).double()
    assert rewritten(weighed_without_gradient, (z, t)).count(ops.DIVERGENCE) == 1


def test_a_number_that_eager_rounds() -> None:
    z, t = torch.randn(N, V).double().requires_grad_(), torch.rand(N, V)
    rewritten(truth_in_float32, (z, t))
    rewritten(summed_in_float64, (z.detach().float().requires_grad_(), t))


def test_a_tensor_that_learns() -> None:
    z, t = torch.randn(N, V).double().requires_grad_(), torch.rand(N, V).double().requires_grad_()
    ours = rewritten(lambda z, t: (t.sigmoid() * (z.softmax(-1) + 1e-3).log()).sum(-1), (z, t))
    assert ours.count(ops.DIVERGENCE) == 0


def test_a_metric_in_inference_mode() -> None:
    def f(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        with torch.inference_mode():
            p = z.softmax(-1)
            told = (p * (p + 1e-3).log()).sum()
        return F.cross_entropy(z, y), told

    ours = rewritten(f, (torch.randn(N, V).requires_grad_(), torch.randint(V, (N,))))
    assert (ours.count(ops.DIVERGENCE), ours.count(ops.ROW_STATS)) == (0, 1)


def test_few_classes_are_silent() -> None:
    backend = Rewritten(min_vocab=100)
    run(torch.compile(Program(3), backend=backend), given(torch.float32))
    assert backend.count(ops.DIVERGENCE) == 0
    assert not backend.report.misses


# Code


def with_all(z: Tensor, q: Tensor, row: Tensor, column: Tensor, t: Tensor, mask: Tensor) -> Tensor:
    """A term with every function, as torch has them."""
    p, q = z.softmax(-1), q.softmax(-1)
    one = torch.maximum(p, q * row) - (p + q).sqrt() / (1 + column) + torch.log1p(p * column).abs()
    two = torch.where((p > q) & ~(p >= 0.9) | (q <= 0.01), p.clamp(0.01, 0.3), torch.xlogy(p, q + row))
    three = ((p < 0.2) | mask).to(p.dtype) * (-p).exp() + (1 - p).pow(2.5) * torch.where(p != q, 0.3, 0.7)
    return ((one + two + three + torch.relu(p - t) * (t + 0.1).log()) * mask).sum(-1).mean()


def inputs_of_all(dtype: torch.dtype, n: int = 24, v: int = 96) -> tuple[Tensor, ...]:
    z, q = ((2 * torch.randn(n, v)).to(dtype).requires_grad_() for _ in range(2))
    rows, classes, t = torch.rand(n, 1), torch.rand(v), torch.rand(n, v)
    return z, q, *(x.to(dtype) for x in (rows, classes, t)), torch.rand(n, v) > 0.3


def test_generated_code() -> None:
    """It is right, and what is given for rows or for classes is not written out for all entries."""
    args = inputs_of_all(torch.float32)
    compiled, graphs = compile_with_codegen(with_all)
    ours, codes = run_and_get_code(lambda: run(compiled, args))
    check_numbers(ours, with_all, args)
    assert graphs.count(ops.DIVERGENCE) == 1
    whole = args[0].numel()
    large = [size for code in codes for size in sizes(code).values() if size >= whole]
    assert large == [whole] * 2, "the gradients"


def test_nothing_as_large_as_the_logits_is_saved() -> None:
    """Between forward and backward there are the logits, what the user brings, and numbers of rows."""
    args = inputs_of_all(torch.bfloat16)
    compiled, graphs = compile_without_codegen(with_all)
    run(compiled, args)
    whole = args[0].numel()
    values = [node.meta["val"] for node in graphs.final[1].graph.nodes if node.op == "placeholder"]
    large = sorted(str(value.dtype) for value in values if value.numel() >= whole)
    assert large == ["torch.bfloat16"] * 3 + ["torch.bool"]


# Heads


def entropy(z: Tensor, q: Tensor, t: Tensor, y: Tensor, r: Tensor, c: Tensor) -> Tensor:
    return -(sm(z) * torch.log(sm(z) + 1e-6)).sum(-1).mean()


def entropy_beside_a_loss(z: Tensor, q: Tensor, t: Tensor, y: Tensor, r: Tensor, c: Tensor) -> Tensor:
    return F.cross_entropy(z, y) + 0.1 * entropy(z, q, t, y, r, c)


def mean_teacher(z: Tensor, q: Tensor, t: Tensor, y: Tensor, r: Tensor, c: Tensor) -> Tensor:
    return F.mse_loss(sm(z), sm(q).detach())


def two_students(z: Tensor, q: Tensor, t: Tensor, y: Tensor, r: Tensor, c: Tensor) -> Tensor:
    return F.mse_loss(sm(z), sm(q)) + F.cross_entropy(z, y) + F.cross_entropy(q, y)


def beside_tensors(z: Tensor, q: Tensor, t: Tensor, y: Tensor, r: Tensor, c: Tensor) -> Tensor:
    return (torch.maximum(sm(z), t) * (r + c) * sm(q)).sum(-1).mean() + F.cross_entropy(z, y)


def mask_of_its_logits(z: Tensor, q: Tensor, t: Tensor, y: Tensor, r: Tensor, c: Tensor) -> Tensor:
    return ((sm(z) + 0.01).log() * sm(z) * (z.detach() > 0)).sum(-1).mean() + F.cross_entropy(z, y)


def mask_of_both(z: Tensor, q: Tensor, t: Tensor, y: Tensor, r: Tensor, c: Tensor) -> Tensor:
    return ((sm(z) + 0.01).log() * sm(q) * (q.detach() > z.detach())).sum(-1).mean()


def from_its_label(z: Tensor, q: Tensor, t: Tensor, y: Tensor, r: Tensor, c: Tensor) -> Tensor:
    log_p = z.log_softmax(-1)
    return (1 + torch.sigmoid(log_p - log_p.gather(-1, y.unsqueeze(-1))).sum(-1)).log().mean()


def margins_of_both(z: Tensor, q: Tensor, t: Tensor, y: Tensor, r: Tensor, c: Tensor) -> Tensor:
    gap = 1 + z - z[torch.arange(ROWS), y].unsqueeze(-1)
    return (sm(z) * torch.relu(gap) * sm(q)).sum(-1).mean() + F.cross_entropy(q, y)


def variance(z: Tensor, q: Tensor, t: Tensor, y: Tensor, r: Tensor, c: Tensor) -> Tensor:
    mean = (sm(z) * c).sum(-1)
    return F.mse_loss(mean, r[:, 0]) + (sm(z) * (c - mean.unsqueeze(1)) ** 2).sum(-1).mean()


ROWS, CLASSES, WIDTH = 12, 40, 5
# Of each, how many heads.
HEADS = {entropy: 1, entropy_beside_a_loss: 1, mean_teacher: 2, two_students: 2, beside_tensors: 2}
HEADS |= {mask_of_its_logits: 1, mask_of_both: 2, margins_of_both: 2, from_its_label: 1, variance: 1}
BRINGS = {beside_tensors, variance}  # a view of one row
# Without gradients a side that weighs the other is what the user makes of whole logits.
WEIGHED = {beside_tensors, mask_of_both, margins_of_both, variance}


def of_heads(dtype: torch.dtype, grad: bool) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    torch.manual_seed(0)
    leaves = {
        name: torch.randn(n, WIDTH).to(dtype).requires_grad_(grad)
        for name, n in (("h", ROWS), ("W", CLASSES), ("g", ROWS), ("U", CLASSES))
    }
    t, y = sm(torch.randn(ROWS, CLASSES)), torch.randint(CLASSES, (ROWS,))
    return leaves, (t.to(dtype), y, torch.rand(ROWS, 1).to(dtype), torch.rand(CLASSES).to(dtype))


def measured(f: Callable[..., Tensor], dtype: torch.dtype, grad: bool) -> tuple[Tensor, dict[str, Tensor]]:
    leaves, others = of_heads(dtype, grad)
    value = f(*leaves.values(), *others)
    if not grad:
        return value, {}
    made = torch.autograd.grad(
        value, [*leaves.values()], -2.5 * torch.ones_like(value), materialize_grads=True
    )
    return value.detach(), dict(zip(leaves, made, strict=True))


@pytest.mark.parametrize(("f", "grad"), in_turns([*HEADS], [True, True, False]))
def test_heads_in_pieces(f: Callable[..., Tensor], grad: bool) -> None:
    def loss(h: Tensor, W: Tensor, g: Tensor, U: Tensor, *others: Tensor) -> Tensor:
        return f(F.linear(h, W), F.linear(g, U), *others)

    compiled, graphs = compile_without_codegen(loss, strategy="token_chunks", memory_budget=0.34)
    runs = [
        measured(each, dtype, grad)
        for each, dtype in ((compiled, torch.float32), (loss, torch.float32), (loss, torch.float64))
    ]
    assert_fair(*(value for value, _ in runs))
    if not grad and f in WEIGHED:
        assert graphs.count(ops.DIVERGENCE) == 0
        return
    assert counts() == {"token_chunks" if grad else "forward_only": HEADS[f]}
    assert graphs.count(ops.DIVERGENCE) >= 2
    if f not in BRINGS:  # what is brought along is whole
        assert max(map(largest, graphs.final)) < ROWS * CLASSES
    if grad:
        assert_all_fair(*(gradients for _, gradients in runs))
        assert max(saved(graphs.final[0])) < ROWS * CLASSES


def test_rows_that_are_cut_for_two_losses() -> None:
    """They are cut off the hidden states once, and one head makes both."""

    def loss(h: Tensor, W: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, W)[:, :-1]
        p = z.softmax(-1)
        entropy = -(p * torch.log(p + 1e-10)).sum(-1)
        picked = z.log_softmax(-1).gather(-1, y[:, 1:].unsqueeze(-1)).squeeze(-1)
        return -picked.mean() - 0.01 * entropy.mean()

    compiled, graphs = compile_without_codegen(loss, strategy="token_chunks", memory_budget=0.34)
    h, W, y = torch.randn(3, 6, 5), torch.randn(41, 5), torch.randint(41, (3, 6))

    def run(f: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (h, W)]
        value = f(*leaves, y)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    for ours, eager, exact in zip(
        run(compiled, torch.float32), run(loss, torch.float32), run(loss, torch.float64), strict=True
    ):
        assert_fair(ours, eager, exact)
    assert graphs.pieces > 1
