"""Where views put the vocabulary, and what they do to the rows."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_timeline import graph_of
from torch import Tensor

from inductor_ce.graph.shapes import constant, equal, hint, same_shape
from inductor_ce.reading.row_views import (
    Permute,
    Reshape,
    Slice,
    arrangement,
    follow_axis,
    row_shape,
    slice_steps,
)
from inductor_ce.reading.views import keeps_order, step_back, viewed

B, S, V = 2, 5, 11

AXES = [
    ((2, 5, 11), 2, (10, 11), 1),
    ((10, 11), 1, (2, 5, 11), 2),
    ((2, 11, 5), 1, (2, 11, 5), 1),
    ((2, 11, 3, 4), 1, (2, 11, 12), 1),
    ((2, 5, 11), 2, (110,), None),
    ((2, 5, 11), 2, (11, 10), None),
    ((2, 5, 11), 2, (2, 55), None),
    ((4, 4), 1, (4, 4), 1),
    ((4, 4), 0, (4, 4), 0),
    ((4, 4, 4), 2, (16, 4), 1),
    ((11,), 0, (1, 11), 1),
    ((1, 11), 1, (11,), 0),
    ((1, 1, 11), 2, (1, 11), 1),
    ((0, 11), 1, (0, 5, 11), 2),
]


@pytest.mark.parametrize(("source", "axis", "result", "expected"), AXES)
def test_follow_axis(source: tuple[int, ...], axis: int, result: tuple[int, ...], expected: int | None):
    assert follow_axis(source, axis, result) == expected


def test_symbols():
    x = torch.ones(3, 4, V)
    torch._dynamo.mark_dynamic(x, 0)
    node = next(n for n in graph_of(lambda x: x.view(-1, V), x).nodes if n.target == "view")
    source, result = (tuple(n.meta["example_value"].shape) for n in (node.args[0], node))
    n = source[0]
    assert follow_axis(result, 1, source) == 2
    assert (constant(n), hint(n)) == (None, 3)
    assert constant(n - (n - 1)) == 1
    assert equal(n, n)
    assert not equal(n, 3)


def test_same_shape():
    assert same_shape((2, 3), [2, 3])
    assert not same_shape((2, 3), (2, 3, 1))
    assert not same_shape((2, 3), (3, 2))


SLICES: list[tuple[Any, Slice | None]] = [
    ((slice(None), slice(None, -1)), Slice((0, 0), (0, 1))),
    ((slice(None), slice(1, None)), Slice((0, 1), (0, 0))),
    ((Ellipsis, slice(None, -1), slice(None)), Slice((0, 0), (0, 1))),
    (slice(1, None), Slice((1, 0), (0, 0))),
    (slice(-1, None), Slice((1, 0), (0, 0))),
    ((slice(None), slice(1, 4, 1)), Slice((0, 1), (0, 1))),
    (Ellipsis, Slice((0, 0), (0, 0))),
    ((slice(None), slice(None, 100)), Slice((0, 0), (0, 0))),
    (slice(-100, None), Slice((0, 0), (0, 0))),
    (slice(-100, 1), Slice((0, 0), (1, 0))),
    ((slice(None), slice(None, None, 2)), None),
    ((Ellipsis, slice(None, 5)), None),
    ((Ellipsis, slice(1, None)), None),
    (0, None),
    (True, None),
    ((slice(None), None), None),
    ((slice(None), [0, 1]), None),
]


@pytest.mark.parametrize(("index", "expected"), SLICES, ids=[str(index) for index, _ in SLICES])
def test_slices(index: Any, expected: Slice | None):
    source = torch.empty(B, S, V)
    assert slice_steps(index, source.shape, source[index].shape, axis=2) == expected


def test_slice_of_the_class_axis_in_the_middle():
    source = torch.empty(B, V, S)
    index = (Ellipsis, slice(None, -1))
    assert slice_steps(index, source.shape, source[index].shape, axis=1) == Slice((0, 0), (0, 1))


def back(view: Callable[[Tensor], Tensor], axis: int, shape: tuple[int, ...] = (B, S, V)) -> Any:
    """What `step_back` says of the last view in a graph, its vocabulary on `axis`."""
    graph = graph_of(view, torch.ones(shape))
    node = next(iter(graph.output_node().all_input_nodes))
    source = viewed(node)
    return None if source is None else step_back(node, source, axis)


def test_a_reshape_keeps_the_rows_in_order():
    axis, (reshape,) = back(lambda x: x.view(-1, V), 1)
    assert (axis, type(reshape), reshape.source_axis, reshape.result_axis) == (2, Reshape, 2, 1)
    assert (row_shape(reshape.source, 2), row_shape(reshape.result, 1)) == ((B, S), (B * S,))
    assert arrangement((reshape, reshape)) == ()
    assert arrangement((reshape, Permute((1, 0)))) == ((str(B * S),), Permute((1, 0)))


STEPS: dict[str, tuple[Callable[[Tensor], Tensor], int, Any]] = {
    "transpose of the class axis": (lambda x: x.transpose(1, 2), 1, (2, ())),
    "transpose of rows": (lambda x: x.transpose(0, 1), 2, (2, (Permute((1, 0)),))),
    "negative": (lambda x: torch.swapaxes(x, -1, -2), 1, (2, ())),
    "permute": (lambda x: x.permute(2, 0, 1), 0, (2, ())),
    "permute of rows": (lambda x: x.permute((2, 1, 0)), 0, (2, (Permute((1, 0)),))),
    "movedim": (lambda x: x.movedim(-1, 1), 1, (2, ())),
    "slice": (lambda x: x[:, :-1], 2, (2, (Slice((0, 0), (0, 1)),))),
    "narrow": (lambda x: x.narrow(1, 1, 4), 2, (2, (Slice((0, 1), (0, 0)),))),
    "slice of everything": (lambda x: x[:], 2, (2, ())),
    "slice that leaves little": (lambda x: x[:, :1], 2, None),
    "slice of the vocabulary": (lambda x: x[..., :-1], 2, None),
    "copy": (lambda x: x.clone(), 2, (2, ())),
    "cast that rounds": (lambda x: x.bfloat16(), 2, None),
    "cast to other statistics": (lambda x: x.double(), 2, None),
    "cast to integers": (lambda x: x.to(torch.int32), 2, None),
    "reshape that splits the vocabulary": (lambda x: x.view(B, -1), 1, None),
    "arithmetic": (lambda x: x * 2, 2, None),
}


@pytest.mark.parametrize("name", STEPS)
def test_step_back(name: str):
    view, axis, expected = STEPS[name]
    assert back(view, axis) == expected


def test_order():
    def kept(view: Callable[[Tensor], Tensor]) -> bool:
        node = next(iter(graph_of(view, torch.ones(B, S)).output_node().all_input_nodes))
        return keeps_order(node, node.args[0])

    assert kept(lambda y: y.reshape(-1))
    assert kept(lambda y: y.unsqueeze(-1))
    assert kept(lambda y: y.clone())
    assert kept(lambda y: y[..., None])
    assert kept(lambda y: y[:, None, :])
    assert not kept(lambda y: y.transpose(0, 1))
    assert not kept(lambda y: y[:, 1:])
