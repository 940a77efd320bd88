"""Rows chosen after: of log-probabilities, and of a linear layer, which then is a head of fewer rows."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from gallery import in_double
from harness import Rewritten, compile_without_codegen, misses, sites
from pairwise import in_turns
from reference import assert_fair
from torch import Tensor
from torch._dynamo.utils import counters

import inductor_ce
from inductor_ce import ops

B, S, D, V = 4, 6, 8, 40
UPSTREAM = 3.0


def inputs() -> tuple[Tensor, ...]:
    h, W = torch.randn(B, S, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    y = torch.randint(V, (B, S))
    y[0, :2] = -100
    return h, W, y, torch.tensor([3, 5, 5, 17, 23, 20, 11]), torch.randint(1, S + 1, (B,))


def by_numbers(h, W, y, rows, lengths):
    logp = F.log_softmax((h @ W.t()).view(-1, V), -1)[rows]
    return F.nll_loss(logp, y.view(-1)[rows])


def by_index_select(h, W, y, rows, lengths):
    logp = F.linear(h, W).view(-1, V).log_softmax(-1).index_select(0, rows)
    picked = logp.gather(1, y.view(-1).index_select(0, rows).clamp(min=0)[:, None])
    return -picked.sum()


def by_numbers_of_columns(h, W, y, rows, lengths):
    logp = F.linear(h, W).log_softmax(-1)[:, rows[:3] % S]
    return -logp.gather(-1, y[:, rows[:3] % S].clamp(min=0)[..., None]).mean()


def last_under_a_cap(h, W, y, rows, lengths):
    logp = (30 * torch.tanh(F.linear(h, W) / 30)).log_softmax(-1)
    return -logp[torch.arange(B), lengths - 1].gather(-1, y[:, 2:3]).mean()


def last_by_gather(h, W, y, rows, lengths):
    index = (lengths - 1).view(-1, 1, 1).repeat(1, 1, V)
    return F.nll_loss(F.linear(h, W).log_softmax(-1).gather(1, index)[:, 0], y[:, 3])


def with_labels(h, W, y, rows, lengths):
    logp = F.linear(h, W).log_softmax(-1)
    return -logp[torch.arange(B), lengths - 1, y[:, 4]].mean()


def in_steps(h, W, y, rows, lengths):
    logp = F.linear(h, W).log_softmax(-1)[:, 1::2]
    return -logp.gather(-1, y[:, 1::2].clamp(min=0)[..., None]).mean()


def of_logits(h, W, y, rows, lengths):
    return F.cross_entropy(F.linear(h, W).view(-1, V)[rows].float(), y.view(-1)[rows])


def entropies(h, W, y, rows, lengths):
    logp = F.linear(h, W).view(-1, V).log_softmax(-1)
    chosen, again = logp[rows], logp.exp()[rows]
    return -(again * chosen).sum(-1).mean() + F.nll_loss(chosen, y.view(-1)[rows])


def counted(h, W, y, rows, lengths):
    counts = y != -100
    logp = F.linear(h, W).log_softmax(-1)[counts]
    return -logp.gather(-1, y[counts][:, None]).mean()


def first_of_the_batch(h, W, y, rows, lengths):
    return F.cross_entropy(F.linear(h, W)[0].float(), y[0])


def last_of_each(h, W, y, rows, lengths):
    """No label of a loss over the places of a sequence."""
    return F.cross_entropy((h @ W.t())[:, -1], y[:, -1])


def last_by_select(h, W, y, rows, lengths):
    z = 15 * torch.tanh(F.linear(h, W, W[:, 0]) / 15)
    return z.select(1, -1).logsumexp(-1).square().mean() + F.cross_entropy(z.select(1, -1), y[:, -1])


def one_of_ranges(h, W, y, rows, lengths):
    """Of a view: rows that are apart, of one of the dimensions before."""
    z = F.linear(h.flatten(0, 1), W).view(2, B // 2, S, V)
    return F.cross_entropy(z[1, :, 1:-1].flatten(0, 1), y[B // 2 :, 1:-1].flatten())


def rows_of_filled_columns(h, W, y, rows, lengths):
    z = h.view(-1, D) @ W.t() * 2 + W[:, 0]
    z[:, 3] = -1.0
    z = z.masked_fill(torch.arange(V) == 4, -math.inf)[rows]
    return F.cross_entropy(z.float(), (y.view(-1)[rows] + 5).clamp(min=5) % V)


def filled_after_one_place(h, W, y, rows, lengths):
    z = F.linear(h, W, W[:, 0])[:, -1]
    z[:, 0] = -1e3
    return F.cross_entropy(z / 0.7, y[:, -1])


def a_bias_edited_between(h, W, y, rows, lengths):
    bias = W[:, 0].detach().clone()
    z = h.view(-1, D) @ W.t() + bias
    bias.zero_()
    return F.cross_entropy(z[rows], y.view(-1)[rows]) + bias.sum()


def shifted_under_a_temperature(h, W, y, rows, lengths):
    z = F.linear(h, W)[:, :-1, :] / 0.7
    return -z.log_softmax(-1).gather(-1, y[:, 1:].clamp(min=0).unsqueeze(-1)).mean()


def bounded_and_banned_before_a_shift(h, W, y, rows, lengths):
    z = torch.where(torch.arange(V) == V - 1, -1e4, F.linear(h, W).clamp(-3, 3))[:, :-1]
    return F.cross_entropy((z / 0.7).flatten(0, 1), y[:, 1:].clamp(max=V - 2).flatten())


def shifted_and_capped_sequence_by_sequence(h, W, y, rows, lengths):
    z = 5 * torch.tanh((F.linear(h, W, W[:, 0])[:, 1:-1].float()) / 5)
    picked = torch.gather(z, -1, y[:, 2:].clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (torch.stack([torch.logsumexp(each, -1) for each in z]) - picked).mean()


def shifted_and_cut_again(h, W, y, rows, lengths):
    z = (h @ W.t())[:, :-1]
    z = z[:, -4:] / 0.7
    picked = torch.gather(z, -1, y[:, -4:].clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (z.logsumexp(-1) - picked).mean()


def shifted_and_divided_in_place(h, W, y, rows, lengths):
    z = F.linear(h, W)[:, 1:-1]
    z /= 0.7
    return -z.log_softmax(-1).gather(-1, y[:, 2:].clamp(min=0).unsqueeze(-1)).mean()


FUNCTIONS = [
    *(shifted_and_cut_again, shifted_and_divided_in_place),
    *(
        shifted_under_a_temperature,
        shifted_and_capped_sequence_by_sequence,
        bounded_and_banned_before_a_shift,
    ),
    *(rows_of_filled_columns, filled_after_one_place),
    *(first_of_the_batch, last_of_each, one_of_ranges),
    *(by_numbers, by_index_select, by_numbers_of_columns, last_under_a_cap, last_by_gather),
    *(with_labels, in_steps, of_logits, entropies, counted),
]


@pytest.fixture(autouse=True)
def captured_whole():
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield


def stepped(f: Callable[..., Tensor], args: tuple[Tensor, ...]) -> list[Tensor]:
    args = tuple(a.detach().clone().requires_grad_(a.requires_grad) for a in args)
    value = f(*args)
    wanted = [a for a in args if a.requires_grad]
    return [value.detach(), *torch.autograd.grad(value, wanted, torch.full_like(value, UPSTREAM))]


def check(f: Callable[..., Tensor], compiled: Callable[..., Tensor], args: tuple[Tensor, ...]) -> None:
    naive = stepped(f, args)
    wide = tuple(
        a.detach().double().requires_grad_(a.requires_grad) if a.is_floating_point() else a for a in args
    )
    with in_double():
        exact = stepped(f, wide)
    for ours, eager, true in zip(stepped(compiled, args), naive, exact, strict=True):
        assert_fair(ours, eager, true)


@pytest.mark.parametrize(("f", "strategy"), in_turns([*FUNCTIONS], ["token_chunks", "vocab_slabs"]))
def test_a_head_of_the_rows_that_are_chosen(f, strategy: str):
    compiled, graphs = compile_without_codegen(f, strategy=strategy, memory_budget=0.9)
    check(f, compiled, inputs())
    assert (sites(), misses()) == (1, 0)
    assert graphs.pieces > 1
    assert not [n for n in graphs.nodes if _elements(n) >= B * S * V], "all logits are in memory"


def _elements(node: torch.fx.Node) -> int:
    example = node.meta.get("val")
    if not isinstance(example, Tensor) or not all(isinstance(s, int) for s in example.shape):
        return 0
    return example.numel()


def test_places_that_are_taken_twice_are_of_logits_that_stay_whole():
    compiled, _ = compile_without_codegen(last_by_select, strategy="token_chunks", memory_budget=0.9)
    check(last_by_select, compiled, inputs())


def test_what_is_added_is_as_it_was():
    compiled, _ = compile_without_codegen(a_bias_edited_between)
    check(a_bias_edited_between, compiled, inputs())


def divided_beside_the_whole(h, W, y, rows, lengths):
    z = F.linear(h, W)
    some = z[:, 1:-1]
    some /= 0.7
    return F.cross_entropy(some.flatten(0, 1), y[:, 2:].flatten()) + z.square().mean()


def divided_and_returned_beside(h, W, y, rows, lengths):
    some = F.linear(h, W)[:, 1:-1]
    some /= 0.7
    return F.cross_entropy(some.flatten(0, 1), y[:, 2:].flatten()) + some.square().mean()


def divided_under_no_grad(h, W, y, rows, lengths):
    some = F.linear(h, W)[:, 1:-1]
    with torch.no_grad():
        some /= 0.7
    return F.cross_entropy(some.flatten(0, 1), y[:, 2:].flatten())


@pytest.mark.parametrize(
    "f",
    [divided_beside_the_whole, divided_and_returned_beside, divided_under_no_grad],
    ids=lambda f: f.__name__,
)
def test_parts_that_are_edited_where_something_else_sees_it(f):
    compiled, _ = compile_without_codegen(f, strategy="token_chunks", memory_budget=0.9)
    check(f, compiled, inputs())


def test_one_place_without_a_gradient():
    def f(h, W, y, rows, lengths):
        z = F.linear(h, W)
        with torch.no_grad():
            z = z[:, -1]
        return F.cross_entropy(z, y[:, -1]) + h.square().sum() + W.sum()

    compiled, _ = compile_without_codegen(f)
    check(f, compiled, inputs())


def test_the_place_may_hold_any_number_of_rows():
    compiled, graphs = compile_without_codegen(
        first_of_the_batch, dynamic=True, strategy="token_chunks", memory_budget=0.9
    )
    for s in (S, S + 3):
        h, W, *others = inputs()
        h = torch.randn(B, s, D, requires_grad=True)
        check(first_of_the_batch, compiled, (h, W, torch.randint(V, (B, s)), *others[1:]))
    assert graphs.pieces > 1


def test_logits_that_something_else_needs_stay_whole():
    def f(h, W, y, rows, lengths):
        z = F.linear(h, W).view(-1, V)
        return F.nll_loss(z.log_softmax(-1)[rows], y.view(-1)[rows]) + 0.1 * z.square().mean()

    compiled, graphs = compile_without_codegen(f, strategy="token_chunks", memory_budget=0.9)
    check(f, compiled, inputs())
    assert (sites(), graphs.pieces) == (1, 1)


def test_rows_and_sizes_may_change_without_compiling_anew():
    compiled, _ = compile_without_codegen(by_numbers, dynamic=True)
    for count in (7, 5, 3):
        h, W, y, rows, lengths = inputs()
        check(by_numbers, compiled, (h, W, y, rows[:count], lengths))
    assert sites() == 1


def test_verified():
    compiled, _ = compile_without_codegen(by_numbers, verify=True)
    check(by_numbers, compiled, inputs())
    assert sites() == 1


# Programs over logits


def logits() -> tuple[Tensor, ...]:
    z = torch.randn(B * S, V, requires_grad=True)
    return z, torch.randint(V, (B * S,)), torch.tensor([3, 5, 5, 17, 23])


def rewritten(f: Callable[..., Tensor]) -> Rewritten:
    backend = Rewritten()
    check(f, torch.compile(f, backend=backend), logits())
    return backend


def rows_edited_after(z, y, rows):
    rows = rows.clone()
    chosen = z.log_softmax(-1)[rows]
    labels = y[rows]
    rows.zero_()
    return F.nll_loss(chosen, labels) + z[rows].sum() * 0.1


def rows_edited_between(z, y, rows):
    rows, logp = rows.clone(), z.log_softmax(-1)
    first = logp[rows]
    rows.zero_()
    return F.nll_loss(first, y[:5]) + 2 * F.nll_loss(logp[rows], y[5:10])


def chosen_without_gradient(z, y, rows):
    logp = z.log_softmax(-1)
    with torch.no_grad():
        entropy = -(logp[rows].exp() * logp[rows]).sum(-1)
    return F.nll_loss(logp[rows], y[rows], reduction="none").mul(entropy).mean()


def detached_before(z, y, rows):
    logp = z.log_softmax(-1)
    weight = logp.detach()[rows].gather(1, y[rows][:, None]).exp()
    return -(weight * logp[rows].gather(1, y[rows][:, None])).mean()


def a_view_edited(z, y, rows):
    logp = z.log_softmax(-1)
    some = logp[::2]
    some.mul_(0.5)
    return -some.gather(1, y[::2, None]).mean() - logp.gather(1, y[:, None]).sum()


def rows_and_all(z, y, rows):
    logp = z.log_softmax(-1)
    return F.nll_loss(logp[rows], y[rows]) + F.nll_loss(logp, y) * 0.5


def a_flat_index_of_sequences(z, y, rows):
    z = z.view(B, S, V)
    return (torch.logsumexp(z, -1).mean() - z.view(-1)[torch.arange(B * S) * V + y].mean()) * 2


def of_both_shifts(z, y, rows):
    z, y = z.view(B, S, V), y.view(B, S)
    before, after = z[:, :-1].log_softmax(-1), z[:, 1:].log_softmax(-1)
    rows = rows % B
    first = before[rows].gather(-1, y[rows][:, :-1, None]).mean()
    return -first - 2 * after[rows].gather(-1, y[rows][:, 1:, None]).mean()


PROGRAMS = [of_both_shifts, chosen_without_gradient, detached_before, rows_and_all, a_flat_index_of_sequences]
EDITS = [rows_edited_after, rows_edited_between, a_view_edited]  # eager has no backward of these


@pytest.mark.parametrize("f", PROGRAMS, ids=lambda f: f.__name__)
def test_programs(f):
    rewritten(f)


@pytest.mark.parametrize("f", EDITS, ids=lambda f: f.__name__)
def test_edits(f):
    z, y, rows = logits()
    with torch.no_grad():
        ours = torch.compile(f, backend=Rewritten())(z, y, rows)
        torch.testing.assert_close(ours.double(), f(z.double(), y, rows), rtol=1e-6, atol=1e-6)


def test_what_is_edited_while_its_backward_reads_it_is_left():
    """Where another view of it is read thereafter; else the edit is a function, and the loss is fused."""

    def of(seen_by: Callable[[Tensor], Tensor | None]) -> Rewritten:
        def f(z, y, rows):
            z = z * 1.0
            seen = seen_by(z)
            some = z.log_softmax(-1)[::2]
            loss = F.nll_loss(some, y[::2])
            z.mul_(2)
            return loss + (z if seen is None else seen).sum() * 0.1

        torch._dynamo.reset()
        return rewritten(f)

    assert not of(lambda z: z.view(-1)).report.sites
    assert of(lambda z: None).report.sites


def test_a_maximum_that_is_kept_has_its_gradient():
    def f(z, y, rows):
        top = z.log_softmax(-1)[rows].max(-1).values
        return F.nll_loss(z.log_softmax(-1)[rows], y[rows]) + top.square().mean()

    rewritten(f)


def test_what_is_read_twice_is_chosen_once():
    backend = rewritten(detached_before)
    assert backend.count(ops.ROW_STATS) == 1


def test_nothing_is_left_in_the_graph_where_nothing_is_fused():
    def f(z, y, rows):
        return z.log_softmax(-1)[rows].sin().sum()

    backend = rewritten(f)
    assert not backend.changed
    assert not backend.report.sites


def test_a_mask_is_no_label():
    def f(z, mask):
        z = z[: V // 2, : V // 2]
        logp = z.log_softmax(-1)
        return logp[0][mask].sum() - logp[:, 0].sum()

    z, mask = torch.randn(V, V, requires_grad=True), torch.ones(V // 2, dtype=torch.bool)
    check(f, torch.compile(f, backend=Rewritten()), (z, mask))


def test_explain_tells_of_rows_that_are_chosen():
    inductor_ce.install(min_vocab=2)
    (site,) = inductor_ce.explain(by_numbers, *inputs()).sites
    assert site.form == "mean[y != -100](lse - pick(y))"


def test_rows_that_are_cut_off_under_no_grad_keep_having_no_gradient():
    """The layer before has one: rows that are cut off hidden states there would have it."""

    def f(h: Tensor, W: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, W)
        with torch.no_grad():
            cut = z[:, :-1]
        return F.cross_entropy((cut / 2).reshape(-1, V), y[:, 1:].reshape(-1)) + h.sum()

    h, W, y, *_ = inputs()
    compiled = torch.compile(f, backend=Rewritten())
    gradients = torch.autograd.grad(compiled(h, W, y), [h, W], allow_unused=True)
    torch.testing.assert_close(gradients[0], torch.ones_like(h))
    assert gradients[1] is None


def test_what_is_made_of_rows_that_are_cut_off_may_be_viewed():
    """It is where torch has it, one element behind another."""

    def f(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        cut = z[:, :-1]
        nll = cut.logsumexp(-1) - cut.gather(-1, y[:, 1:, None]).squeeze(-1)
        return nll.view(-1), nll

    z, y = torch.randn(B, S, V, requires_grad=True), torch.randint(V, (B, S))
    backend = Rewritten()
    flat, nll = torch.compile(f, backend=backend, fullgraph=True)(z, y)
    assert backend.count(ops.ROW_STATS) == 1
    assert nll.is_contiguous()
    expected = F.cross_entropy(z[:, :-1].reshape(-1, V).double(), y[:, 1:].reshape(-1), reduction="none")
    torch.testing.assert_close(flat.double(), expected, rtol=1e-5, atol=1e-5)


FROZEN: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "linear": lambda h, W, b: F.linear(h[:, :-1], W),
    "with a bias": lambda h, W, b: F.linear(h[:, :-1], W, b),
    "matmul, a temperature": lambda h, W, b: (h[:, :-1] @ W.t()) / 0.7,
    "two dimensions of sequences": lambda h, W, b: F.linear(h.view(2, 2, S, D)[:, :, :-1], W).flatten(0, 1),
    "time in front": lambda h, W, b: F.linear(h.transpose(0, 1)[:-1], W, b).transpose(0, 1),
}


@pytest.mark.parametrize("name", FROZEN)
@pytest.mark.parametrize("strategy", ["token_chunks", "vocab_slabs"])
def test_rows_that_are_cut_before_a_frozen_layer(name: str, strategy: str):
    """Of a weight that wants no gradient torch makes a batch, one copy for each sequence."""

    def f(h, W, b, y):
        return F.cross_entropy(FROZEN[name](h, W, b).reshape(-1, V), y[:, 1:].reshape(-1))

    h, W, y, *_ = inputs()
    compiled, graphs = compile_without_codegen(f, strategy=strategy, memory_budget=0.9)
    check(f, compiled, (h, W.detach(), torch.randn(V), y))
    assert counters["inductor_ce"][strategy] == 1
    assert not [n for n in graphs.nodes if _elements(n) >= B * (S - 1) * V], "all logits are in memory"


def test_rows_that_are_cut_before_a_frozen_teacher():
    def f(h, W, T, y):
        with torch.no_grad():
            q = F.linear(h[:, 1:], T).softmax(-1)
        return -(q * F.linear(h[:, 1:], W).log_softmax(-1)).sum(-1).mean()

    h, W, y, *_ = inputs()
    compiled, graphs = compile_without_codegen(f, strategy="token_chunks", memory_budget=0.9)
    check(f, compiled, (h, W, torch.randn(V, D), y))
    assert counters["inductor_ce"]["token_chunks"] == 1
    assert not [n for n in graphs.nodes if _elements(n) >= B * (S - 1) * V], "all logits are in memory"
