"""Columns put beside logits: a margin, zeros, a positive before a queue: the parts, combined."""

import math
from collections.abc import Callable
from typing import Any

import gallery
import pytest
import torch
import torch.nn.functional as F
from gallery import check_numbers
from gpu_codegen import generate
from harness import compile_without_codegen, misses, sites
from pairwise import in_turns
from torch import Tensor
from torch._dynamo.utils import counters

from inductor_ce import ops
from inductor_ce.ops import lowering

N, D, V = 16, 12, 60


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Hidden states, a weight, three extra columns a row, and labels of all columns."""
    torch.manual_seed(5)
    h, W = torch.randn(N, D, dtype=dtype), torch.randn(V, D, dtype=dtype)
    e = 3 * torch.randn(N, 3, dtype=dtype)
    y = torch.randint(V + 3, (N,))
    y[:6] = torch.tensor([0, 2, 3, V - 1, V, V + 2])
    return h.requires_grad_(), W.requires_grad_(), e.requires_grad_(), y


# A queue


def positive_first(h, W, e, y):
    logits = torch.cat([e[:, :1], h @ W.t()], dim=1) / 0.5
    return F.cross_entropy(logits, torch.zeros(N, dtype=torch.long))


def positive_of_the_hidden_states(h, W, e, y):
    positive = torch.einsum("nd,nd->n", h, W[y % V]).unsqueeze(-1)
    logits = torch.cat([positive, F.linear(h, W)], dim=-1)
    logits /= 0.7
    return F.cross_entropy(logits, torch.zeros(N, dtype=torch.long))


def edited_in_place(h, W, e, y):
    logits = torch.cat((e, F.linear(h, W)), 1)
    logits.mul_(0.7).add_(1)
    return F.cross_entropy(logits, y)


def edited_through_a_view(h, W, e, y):
    z = torch.cat([e, F.linear(h, W)], -1)
    logits = z.view(-1, V + 3)
    z.mul_(0.5)
    return F.cross_entropy(logits, y)


def positive_picked(h, W, e, y):
    logp = torch.cat([e[:, :1], F.linear(h, W)], dim=-1).log_softmax(-1)
    return -logp[:, 0].mean()


def softmax_picked(h, W, e, y):
    p = torch.concat([F.linear(h, W), e[:, 1:2]], dim=-1).softmax(-1)
    return -p[..., -1].log().mean()


# Labels anywhere


def extra_first(h, W, e, y):
    return F.cross_entropy(torch.cat([e, F.linear(h, W)], -1), y)


def extra_last(h, W, e, y):
    return F.cross_entropy(torch.cat([F.linear(h, W), e], -1), y, reduction="sum")


def on_both_sides(h, W, e, y):
    z = torch.cat([e[:, :1], F.linear(h, W), e[:, 1:]], -1)
    return F.cross_entropy(z, y, ignore_index=1, label_smoothing=0.1)


def abstention(h, W, e, y):
    z = F.linear(h, W)
    z = torch.cat([z, torch.zeros_like(z[:, :1])], dim=-1)
    logp = F.log_softmax(z, dim=-1)
    return -logp.gather(-1, (y % V)[:, None]).mean()


def in_sequences(h, W, e, y):
    z = torch.cat([F.linear(h, W).view(2, N // 2, V), e.view(2, N // 2, 3)], dim=-1)
    return F.cross_entropy(z.float().view(-1, V + 3), y)


def shifted(h, W, e, y):
    z = torch.cat([F.linear(h, W).view(2, N // 2, V), e.view(2, N // 2, 3)], dim=-1)
    return F.cross_entropy(z[:, :-1].flatten(0, 1), y.view(2, N // 2)[:, 1:].flatten())


def scaled_by_class(h, W, e, y):
    scale = torch.linspace(0.5, 1.5, V + 3)
    return F.cross_entropy(torch.cat([F.linear(h, W), e], -1) * scale, y)


def learnt_temperature(h, W, e, y):
    z = torch.cat([F.linear(h, W), e], -1) * W[0, 0].exp()
    return F.cross_entropy(z, y)


def entropy(h, W, e, y):
    z = torch.cat([F.linear(h, W), e], -1)
    logp = z.log_softmax(-1)
    return F.nll_loss(logp, y) + 0.1 * (logp.exp() * logp).sum(-1).mean()


def class_weights(h, W, e, y):
    weight = torch.linspace(0.5, 1.5, V + 3)
    return F.cross_entropy(torch.cat([F.linear(h, W), e], -1), y, weight=weight, label_smoothing=0.2)


def accuracy(h, W, e, y):
    z = torch.cat([e, F.linear(h, W)], -1)
    return F.cross_entropy(z, y), (z.argmax(-1) == y).sum()


def collision(h, W, e, y):
    z = torch.cat([e, F.linear(h, W)], -1)
    return z.softmax(-1).square().sum(-1).log().mean()


def of_two_dtypes(h, W, e, y):
    return F.cross_entropy(torch.cat([F.linear(h, W), e.double()], -1), y)


def two_readings(h, W, e, y):
    z = torch.cat([F.linear(h, W), e], -1)
    with torch.no_grad():
        other = F.cross_entropy(z, (y + 1) % V)
    return F.cross_entropy(z, y), other


FUNCTIONS = [
    *(
        positive_first,
        positive_of_the_hidden_states,
        edited_in_place,
        edited_through_a_view,
        positive_picked,
        softmax_picked,
    ),
    *(extra_first, extra_last, on_both_sides, abstention, in_sequences, shifted, scaled_by_class),
    *(learnt_temperature, entropy, class_weights, accuracy, collision, of_two_dtypes, two_readings),
]


def joins(graphs: Any) -> int:
    """How many concatenations there are with more columns than the logits have."""
    made = [node.meta["val"] for node in graphs.nodes if node.target == torch.ops.aten.cat.default]
    return sum(example.shape[0] == N and example.shape[-1] > V for example in made)


def check(f: Callable[..., Any], *args: Any, **options: Any) -> Any:
    compiled, graphs = compile_without_codegen(f, **options)
    args = args or inputs()
    check_numbers(gallery.run(compiled, args), f, args)
    return graphs


@pytest.mark.parametrize(
    ("f", "strategy"), in_turns(FUNCTIONS, ["token_chunks", "vocab_slabs", "materialise"])
)
def test_numbers(f, strategy):
    graphs = check(f, strategy=strategy, memory_budget=0.5)
    assert (sites(), misses()) == (1, 0)
    assert joins(graphs) == 0
    assert graphs.pieces > 2 or strategy == "materialise"


def positive_first_with_its_accuracy(h, W, e, y):
    z = torch.cat([e[:, :1], h @ W.t()], dim=1) / 0.2
    labels = torch.zeros(N, dtype=torch.long)
    return F.cross_entropy(z, labels) + 0 * (z.argmax(1) == labels).float().mean()


def test_which_is_best_is_of_each_row():
    """Of the blocks of columns, too: an accuracy leaves the head in chunks of rows."""
    check(positive_first_with_its_accuracy, memory_budget=0.3)
    assert counters["inductor_ce"]["token_chunks"] == 1


# Left whole


def returned_too(h, W, e, y):
    z = torch.cat([e, F.linear(h, W)], -1)
    return F.cross_entropy(z, y), z


def read_elsewhere(h, W, e, y):
    z = torch.cat([e, F.linear(h, W)], -1)
    return F.cross_entropy(z, y) + z.sigmoid().mean()


def part_edited_since(h, W, e, y):
    extra = e.clone()
    z = torch.cat([extra, F.linear(h, W)], -1)
    extra.zero_()
    return F.cross_entropy(z, y)


def a_column_filled(h, W, e, y):
    z = torch.cat([e, F.linear(h, W)], -1)
    z[:, 1] = -1.0
    return F.cross_entropy(z, y)


def along_the_rows(h, W, e, y):
    z = torch.cat([F.linear(h, W)[:4], F.linear(h, W)[4:] * 2], 0)
    return F.cross_entropy(z, y % V)


def of_many_columns(h, W, e, y):
    z = torch.cat([*e.unsqueeze(-1).unbind(1), e, F.linear(h, W)], -1)
    return F.cross_entropy(z, y)


def most_confident(h, W, e, y):
    z = torch.cat([e, F.linear(h, W)], -1)
    return -z.softmax(-1).max(-1).values.log().mean()


def probabilities_of_all(h, W, e, y):
    q = torch.linspace(0, 1, N * (V + 3)).view(N, V + 3).softmax(-1)
    return F.cross_entropy(torch.cat([e, F.linear(h, W)], -1), q)


def without_gradient(h, W, e, y):
    z = F.linear(h, W)
    with torch.no_grad():
        z = torch.cat([e, z], -1)
    return F.cross_entropy(z, y) + h.square().sum() + W.sum() + e.sum()


LEFT = [
    without_gradient,
    *(returned_too, read_elsewhere, part_edited_since, a_column_filled),
    *(along_the_rows, of_many_columns, most_confident, probabilities_of_all),
]


@pytest.mark.parametrize("f", LEFT, ids=lambda f: f.__name__)
def test_left_whole(f):
    """Somebody needs the concatenation, or its parts are no longer what they were."""
    graphs = check(f, strategy="token_chunks", memory_budget=0.5)
    assert (sites(), misses()) == (1, 0)
    assert graphs.pieces == 1


# What is not finite


def infinities() -> tuple[Tensor, Tensor]:
    """Logits and extra columns whose rows hold -inf, +inf and NaN, in some or in all."""
    torch.manual_seed(1)
    z, e = torch.randn(N, V), torch.randn(N, 3)
    inf = math.inf
    z[0], e[1], z[2], e[2] = -inf, -inf, -inf, -inf
    z[3, 5], e[4, 0], z[5, 1], e[5, 1] = inf, inf, inf, inf
    z[6, 0], e[7, 2], z[8], e[8] = math.nan, math.nan, -inf, torch.tensor([-inf, 2.0, -inf])
    z[9, 4], e[9], z[10], e[10, 0] = inf, -inf, -inf, inf
    e[11], z[12, 3] = 200.0, -1e38
    return z.requires_grad_(), e.requires_grad_()


@pytest.mark.in_turns
@pytest.mark.parametrize("order", [1, -1], ids=["logits first", "extra first"])
@pytest.mark.parametrize(
    "f",
    [
        lambda x, y: F.cross_entropy(x, y, reduction="none"),
        lambda x, y: x.log_softmax(-1)[:, 0],
        lambda x, y: x.logsumexp(-1) - 0.5 * x.gather(-1, y[:, None])[:, 0],
        lambda x, y: (x.argmax(-1) == y) + x.log_softmax(-1).gather(-1, y[:, None])[:, 0],
    ],
    ids=["cross_entropy", "log_softmax", "logsumexp", "argmax"],
)
def test_what_is_not_finite(f, order):
    """As eager has it, values and gradients, wherever among the parts it is."""
    y = torch.arange(N) * 4 % (V + 3)

    def joined(z, e):
        return f(torch.cat([z, e][::order], -1), y)

    compiled, graphs = compile_without_codegen(joined)
    ours, eager = (gallery.run(run, infinities()) for run in (compiled, joined))
    assert sites() == 1
    assert graphs.pieces == 2
    for mine, theirs in zip(ours.results + ours.gradients, eager.results + eager.gradients, strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True)


def test_columns_of_zeros_are_no_chain_of_a_template():
    """On a GPU they are computed by loops: absorbed by a template they would not have its tile's shape."""
    lowering.register()
    (zeros,) = generate(
        lambda z: ops.row_stats(torch.zeros_like(z), [], [], "max,sumexp"), torch.randn(6, 64)
    )
    (chain,) = generate(lambda z: ops.row_stats(2 * z, [], [], "max,sumexp"), torch.randn(6, 64))
    by_template = [any("_tem_" in name for name in wrapper.kernels) for wrapper in (zeros, chain)]
    assert by_template == [False, True]
