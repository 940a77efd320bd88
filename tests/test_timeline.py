"""Which nodes write in place, what they write, and what reads as it did."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.fx import Graph, GraphModule, Node

from inductor_ce.graph.shapes import tensor_of
from inductor_ce.graph.timeline import Timeline, written_by


def graph_of(f: Callable[..., Any], *args: Any) -> Graph:
    """The torch-level graph that Dynamo captures of f."""
    captured: list[Graph] = []

    def keep(gm: GraphModule, example_inputs: Any) -> Callable[..., Any]:
        captured.append(gm.graph)
        return gm.forward

    torch.compile(f, backend=keep, fullgraph=True)(*args)
    return captured[0]


def call(target: Any, *args: Any, **kwargs: Any) -> tuple[Node, list[Node]]:
    """A node that calls target on two placeholders and what is given, and the placeholders."""
    graph = Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    names = {"a": a, "b": b}
    op = "call_method" if isinstance(target, str) else "call_function"
    args = tuple(names.get(x, x) if isinstance(x, str) else x for x in args)
    kwargs = {k: names.get(v, v) if isinstance(v, str) else v for k, v in kwargs.items()}
    return graph.create_node(op, target, args, kwargs), [a, b]


WRITERS = {
    "method": ("div_", "a", 2.0),
    "method without arguments": ("zero_", "a"),
    "setitem": (operator.setitem, "a", 0, "b"),
    "setitem method": ("__setitem__", "a", 0, "b"),
    "operator": (operator.imul, "a", 2),
    "operator method": ("__iadd__", "a", "b"),
    "operator descriptor": (torch.Tensor.__iadd__, "a", "b"),
    "function": (torch.relu_, "a"),
    "overload": (torch.ops.aten.add_.Tensor, "a", "b"),
    "packet": (torch.ops.aten.add_, "a", "b"),
    "descriptor": (torch.Tensor.add_, "a", "b"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_first_argument_is_written(name: str):
    target, *args = WRITERS[name]
    node, (a, _) = call(target, *args)
    assert list(written_by(node)) == [a]


@pytest.mark.parametrize("target", [operator.or_, operator.and_, operator.not_, operator.xor])
def test_operators_named_like_keywords_write_nothing(target: Any):
    node, _ = call(target, "a", "b")
    assert list(written_by(node)) == []


def test_methods_named_like_operators_in_place_write_nothing():
    """~x within a default device is a call of __invert__."""
    node, _ = call("__invert__", "a")
    assert list(written_by(node)) == []


def test_out_is_written():
    node, (_, b) = call(torch.add, "a", 1, out="b")
    assert list(written_by(node)) == [b]


def test_every_out_is_written():
    graph = Graph()
    a, b, c = map(graph.placeholder, "abc")
    node = graph.call_function(torch.max, (a, 0), {"out": (b, c)})
    assert list(written_by(node)) == [b, c]


def test_out_of_an_overload_is_written_once():
    node, (_, b) = call(torch.ops.aten.add.out, "a", 1, out="b")
    assert list(written_by(node)) == [b]


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("how", ["by name", "by position"])
def test_inplace_argument(inplace: bool, how: str):
    args, kwargs = (("a",), {"inplace": inplace}) if how == "by name" else (("a", inplace), {})
    node, (a, _) = call(F.relu, *args, **kwargs)
    assert list(written_by(node)) == ([a] if inplace else [])


def test_inplace_argument_with_the_input_by_name():
    node, (a, _) = call(F.dropout, input="a", p=0.5, inplace=True)
    assert list(written_by(node)) == [a]


def test_position_of_another_argument_is_not_inplace():
    node, _ = call(F.dropout, "a", 0.5, True)
    assert list(written_by(node)) == []


@pytest.mark.parametrize(
    "target", ["__add__", "__len__", "add", "detach", operator.add, operator.getitem, torch.add]
)
def test_readers_write_nothing(target: Any):
    node, _ = call(target, "a", "b")
    assert list(written_by(node)) == []


def test_only_what_the_schema_says_is_written():
    node, (a, _) = call(torch.ops.aten.copy_.default, "a", src="b")
    assert list(written_by(node)) == [a]


def test_lists_that_a_schema_says_are_written():
    graph = Graph()
    a, b, c = map(graph.placeholder, "abc")
    node = graph.call_function(torch.ops.aten._foreach_add_.List, ([a, b], [c, c]))
    assert list(written_by(node)) == [a, b]


def test_set_grad_enabled_writes_nothing():
    node, _ = call(torch._C._set_grad_enabled, False)
    assert list(written_by(node)) == []


def test_tensor_of():
    graph = graph_of(lambda x: (x.shape[0] + x.sum(), x), torch.ones(3))
    values = [tensor_of(n) for n in graph.nodes if n.op != "output"]
    assert all(isinstance(v, torch.Tensor) for v in values)
    assert tensor_of(None) is tensor_of(3) is tensor_of(Graph().placeholder("a")) is None


def edit_between(x):
    y = x * 1
    view = y.view(-1)
    before = y.sum()
    view.mul_(2)
    after = y.sum()
    copy = y.clone()
    copy.zero_()
    return before, after, y.sum(), copy


def test_versions_of_aliases():
    timeline = Timeline(graph_of(edit_between, torch.ones(2, 3)))
    node = {n.name: n for n in timeline.nodes}
    y, view, copy = node["y"], node["view"], node["copy"]
    edit = next(n for n in timeline.nodes if n.target == "mul_")
    last = next(n for n in timeline.nodes if n.target == "zero_")
    assert timeline.shares_storage(y, view)
    assert not timeline.shares_storage(y, copy)
    assert [timeline.version(y, timeline.position[n]) for n in (edit, last)] == [0, 1]
    assert timeline.version(view, len(timeline.nodes)) == timeline.version(y, len(timeline.nodes)) == 1
    assert timeline.version(copy, timeline.position[last] + 1) == 1
    assert timeline.unchanged(y, view, timeline.position[edit])
    assert not timeline.unchanged(y, view, timeline.position[edit] + 1)
    assert timeline.unchanged(y, edit, len(timeline.nodes))
    assert not timeline.unchanged(copy, 0, len(timeline.nodes))


def test_windows():
    """Where a node reads as it does at a position: from its birth or the last write to the next write."""
    timeline = Timeline(graph_of(edit_between, torch.ones(2, 3)))
    y = next(n for n in timeline.nodes if n.name == "y")
    edit = next(n for n in timeline.nodes if n.target == "mul_")
    born, edited, end = timeline.position[y], timeline.position[edit], len(timeline.nodes) - 1
    assert timeline.window(y, edited) == (born + 1, edited)
    assert timeline.window(y, edited + 1) == (edited + 1, end)
    x = timeline.nodes[0]
    assert timeline.window(x, 1) == (1, end)


def test_two_edits():
    def f(x):
        y = x * 1
        y.add_(1)
        a = y * 2
        y.add_(1)
        return a, y

    timeline = Timeline(graph_of(f, torch.ones(3)))
    y = next(n for n in timeline.nodes if n.name == "y")
    first, second = (timeline.position[n] for n in timeline.nodes if n.target in ("add_", operator.iadd))
    assert timeline.window(y, first + 1) == (first + 1, second)
    assert [timeline.version(y, p) for p in (first, first + 1, second, second + 1)] == [0, 1, 1, 2]


def test_nodes_without_examples_alias_nothing():
    graph = Graph()
    a = graph.placeholder("a")
    b = graph.call_method("view", (a, -1))
    graph.call_method("zero_", (b,))
    timeline = Timeline(graph)
    assert timeline.version(a, 3) == 0
    assert timeline.version(b, 3) == 1


def test_gradient_mode():
    def f(x):
        a = x * 2
        with torch.no_grad():
            b = x * 3
            with torch.enable_grad():
                c = x * 4
        return a, b, c, x * 5

    timeline = Timeline(graph_of(f, torch.ones(3, requires_grad=True)))
    products = {n.args[1]: timeline.position[n] for n in timeline.nodes if n.target is operator.mul}
    modes = {by: timeline.grad_mode(position) for by, position in products.items()}
    assert modes == {2: True, 3: False, 4: True, 5: True}


def test_gradient_mode_without_switches():
    timeline = Timeline(graph_of(lambda x: x * 2, torch.ones(3)))
    assert all(timeline.grad_mode(i) for i in range(len(timeline.nodes)))
