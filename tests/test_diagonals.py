"""What is picked on a diagonal: of a square, of ranges, of the columns that an index has picked."""

import pytest
import torch
import torch.nn.functional as F
from gallery import check_numbers, run
from harness import Rewritten, compile_without_codegen, misses, sites

from inductor_ce import ops

N, V, D = 12, 40, 8


def inputs(v: int = V):
    return torch.randn(N, v, requires_grad=True), torch.randint(v, (N,))


def of_columns(z, y):
    return -F.log_softmax(z, 1)[:, y].diagonal().mean()


def of_columns_from_the_end(z, y):
    return -F.log_softmax(z, 1)[:, y - z.shape[1]].diag().sum()


def of_selected_columns(z, y):
    return -torch.diag(torch.index_select(z.log_softmax(-1), 1, y)).mean()


def of_classes_in_front(z, y):
    return -torch.diagonal(z.log_softmax(1).t()[y], 0).mean()


def of_the_trace(z, y):
    return -F.log_softmax(z, 1)[:, y].trace() / len(y)


def of_ranges(z, y):
    return (F.log_softmax(z, 1)[range(N), range(N)] * y).sum()


def of_exponentials_by_ranges(z, y):
    e = torch.exp(z)
    own = e[range(N), range(N)]
    return -torch.log(own / (e.sum(1) - own)).mean()


def of_logits_with_classes_in_front(z, y):
    return (torch.logsumexp(z, 1) - torch.diagonal(z.transpose(0, 1)[y])).mean()


def of_columns_of_logits(z, y):
    return (z[:, y].diag() - z.exp().sum(1).log()).sum()


READ = [of_columns, of_columns_from_the_end, of_selected_columns, of_classes_in_front, of_the_trace]
READ += [of_ranges, of_exponentials_by_ranges, of_logits_with_classes_in_front, of_columns_of_logits]


@pytest.mark.parametrize("f", READ, ids=lambda f: f.__name__)
def test_is_read(f):
    args = inputs()
    backend = Rewritten()
    check_numbers(run(torch.compile(f, backend=backend, fullgraph=True), args), f, args)
    assert backend.count(ops.ROW_STATS) == 1
    assert not backend.report.misses


def test_a_head_is_in_pieces():
    def f(h, W, y):
        return of_columns(h @ W.t(), y)

    args = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True), inputs()[1]
    compiled, graphs = compile_without_codegen(f, strategy="token_chunks", memory_budget=0.5)
    check_numbers(run(compiled, args), f, args)
    assert (sites(), misses()) == (1, 0)
    assert graphs.pieces > 1


def beside_the_diagonal(z, y):
    return -F.log_softmax(z, 1)[:, y].diagonal(1).mean()


def of_fewer_labels(z, y):
    return -F.log_softmax(z, 1)[:, y[:5]].diagonal().mean()


def labels_edited_between(z, y):
    y = y.clone()
    picked = F.log_softmax(z.detach(), 1)[:, y]
    y.zero_()
    return -picked.diagonal().mean() + y.sum() + 0 * z.sum()


def columns_edited_between(z, y):
    picked = F.log_softmax(z, 1)[:, y]
    picked.mul_(2)
    return -picked.diagonal().mean()


def columns_read_as_well(z, y):
    picked = F.log_softmax(z, 1)[:, y]
    return -picked.diagonal().mean() + picked.square().mean()


def of_chosen_rows(z, y):
    return -F.log_softmax(z, 1)[y % N][:, :N].diagonal().mean()


def of_the_other_axis(z, y):
    return -F.log_softmax(z, 0)[:, y].diagonal().mean()


def of_logits_along_the_other_axis(z, y):
    return z.logsumexp(0).sum() - z[y % N][:, :N].diag().sum() + z[y % N].diagonal(0, 1, 0).sum()


def of_logits_edited_between(z, y):
    z = z * 1
    picked = z.t()[y]
    z.mul_(2)
    return (z.logsumexp(1) - picked.diagonal()).mean()


def of_a_shorter_range(z, y):
    return (F.log_softmax(z, 1)[range(5), range(5)] * y[:5]).sum()


def of_ranges_backwards(z, y):
    return (F.log_softmax(z, 1)[range(N), range(N)[::-1]] * y).sum()


OTHERS = [beside_the_diagonal, of_fewer_labels, labels_edited_between, columns_edited_between]
OTHERS += [of_logits_along_the_other_axis, of_logits_edited_between]
OTHERS += [columns_read_as_well, of_chosen_rows, of_the_other_axis, of_a_shorter_range, of_ranges_backwards]


@pytest.mark.parametrize("f", OTHERS, ids=lambda f: f.__name__)
def test_what_is_none_is_right(f):
    """Whether it is read otherwise or left."""
    args = inputs()
    backend = Rewritten()
    check_numbers(run(torch.compile(f, backend=backend, fullgraph=True), args), f, args)


def test_a_label_that_names_no_column_makes_nan():
    z, y = inputs()
    y[3] = V + 2
    compiled = torch.compile(of_columns, backend=Rewritten())
    assert bool(compiled(z, y).isnan())
