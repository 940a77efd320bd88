"""Who looks at how many rows count: the host, where a body keeps the GPU busy meanwhile, or the GPU alone."""

from __future__ import annotations

import operator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, Node

from inductor_ce.common.compat.distributed import ALL_GATHER
from inductor_ce.heads import skip
from inductor_ce.heads.counted_rows import AllCount
from inductor_ce.heads.packing import DEVICE, HOST, RECORDING, counted_first
from inductor_ce.heads.plan import LOOKED_WORK
from inductor_ce.ops import counted_kernels
from inductor_ce.ops.counted import HOST_COPY, ROW_ORDER

aten = torch.ops.aten
N, D, V = 64, 16, 40
SDPA = aten._scaled_dot_product_flash_attention.default


def called(graph: Graph, target: Any, args: tuple[Any, ...], shape: tuple[int, ...], **other: Any) -> Node:
    node = graph.call_function(target, args)
    with FakeTensorMode():
        node.meta["val"] = torch.empty(shape, device="cuda", dtype=other.get("dtype", torch.bfloat16))
    return node


def given(graph: Graph, name: str, shape: tuple[int, ...], **other: Any) -> Node:
    node = graph.placeholder(name)
    node.meta["val"] = called(Graph(), aten.empty.memory_format, (), shape, **other).meta["val"]
    return node


def head_of(body: str, v: int = V, sharded: bool = False, weight_is_rows: bool = True) -> tuple[Any, Node]:
    """(a head behind a body, which rows count)"""
    graph = Graph()
    x, y = given(graph, "x", (N, D)), given(graph, "y", (N,), dtype=torch.int64)
    square = given(graph, "A", (D, D))
    if body == "products":
        x = called(
            graph, aten.mm.default, (called(graph, aten.mm.default, (x, square), (N, D)), square), (N, D)
        )
    elif body == "attention":
        x = called(graph, SDPA, (x, x, x), (N, D))
    elif body == "loops":
        x = called(graph, aten.tanh.default, (x,), (N, D))
    weight = given(graph, "W", (v, D) if weight_is_rows else (D, v))
    columns = weight
    if weight_is_rows:
        columns = called(graph, aten.permute.default, (weight, [1, 0]), (D, v))
        columns.meta["val"] = weight.meta["val"].t()
    product = called(graph, aten.mm.default, (x, columns), (N, v))
    stats = called(
        graph, torch.ops.inductor_ce.row_stats.default, (product, [y], [], "max,sumexp,pick"), (3, N)
    )
    if sharded:
        called(graph, ALL_GATHER, (stats, 2, "group"), (6, N))
    hidden = SimpleNamespace(hidden=x, columns=columns)
    head = SimpleNamespace(products=[hidden], product=product, stats=[stats], n=N, v=v)
    return head, called(graph, aten.ne.Scalar, (y, -100), (N,), dtype=torch.bool)


@pytest.fixture(autouse=True)
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counted_kernels, "reads_tiles", lambda device: True)
    monkeypatch.setattr(skip, "has_16_bit_factors", lambda head: False)


def looks(head: Any, counts: Node, work: int = LOOKED_WORK) -> str:
    return skip._who_looks(head, counts, work)


@pytest.mark.parametrize("body", ["none", "loops", "products", "attention"])
def test_the_host_looks_where_a_body_hides_it(body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skip, "BODY", 2 * N * D * D)
    assert looks(*head_of(body)) == (DEVICE if body in ("none", "loops") else HOST)


def test_a_body_that_is_too_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skip, "BODY", 2 * N * D * D + 1)
    assert looks(*head_of("products")) == DEVICE


def test_the_host_would_wait_for_a_mask_of_the_body(monkeypatch: pytest.MonkeyPatch) -> None:
    head, counts = head_of("attention")
    (y,) = counts.all_input_nodes
    counts.replace_input_with(y, head.product)
    assert looks(head, counts) == DEVICE


def test_the_device_looks_where_it_saves_more_than_it_costs_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(AllCount, match="costs the host more"):
        looks(*head_of("none"), LOOKED_WORK - 1)
    assert looks(*head_of("attention"), LOOKED_WORK - 1) == HOST
    assert looks(*head_of("none", sharded=True), LOOKED_WORK - 1) == DEVICE  # of any rank's work
    monkeypatch.setattr(skip, "uses_cudagraphs", lambda patches: True)
    assert looks(*head_of("none"), LOOKED_WORK - 1) == RECORDING


def test_the_device_looks_where_one_operator_launches_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever hides launches, and also at how many there are where all are computed."""

    def looks_rolled(body: str, work: int = LOOKED_WORK) -> str:
        head, counts = head_of(body)
        assert skip._is_told_on_device(head, work) == (work >= LOOKED_WORK and not in_graphs)
        return skip._who_looks(head, counts, work, skip._is_told_on_device(head, work))

    in_graphs = False
    assert looks_rolled("none") == looks_rolled("attention") == DEVICE
    assert looks_rolled("attention", LOOKED_WORK - 1) == HOST
    in_graphs = True
    monkeypatch.setattr(skip, "uses_cudagraphs", lambda patches: True)
    assert looks_rolled("attention") == RECORDING


def test_cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skip, "uses_cudagraphs", lambda patches: True)
    assert looks(*head_of("attention")) == RECORDING


@pytest.mark.parametrize(
    ("looks", "bytes_"), [(HOST, 0), *((looks, 144 * 128 * 256 * 4) for looks in (DEVICE, RECORDING))]
)
def test_what_products_need_beside_is_planned(looks: str, bytes_: int) -> None:
    _, counts = head_of("none")
    assert skip.bytes_beside(skip.ToCompute("", counts, looks)) == bytes_
    assert skip.bytes_beside(skip.ALL) == 0
    assert skip.bytes_beside(skip.ToCompute("", looks=looks)) == bytes_


def test_all_count_where_neither_can_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counted_kernels, "reads_tiles", lambda device: False)
    assert looks(*head_of("attention")) == HOST
    with pytest.raises(AllCount, match="since Hopper"):
        looks(*head_of("none"))


@pytest.mark.parametrize("v", [40, 41])
def test_ranks_that_share_classes_leave_out_rows_alike(v: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever classes each has: how much work its body is, and whether rows of its weight are aligned."""
    assert looks(*head_of("none", v, sharded=True, weight_is_rows=False)) == HOST
    assert looks(*head_of("none", v, sharded=True)) == DEVICE
    monkeypatch.setattr(skip, "uses_cudagraphs", lambda patches: True)
    assert looks(*head_of("none", v, sharded=True)) == RECORDING
    with pytest.raises(AllCount):
        looks(*head_of("none", v, sharded=True, weight_is_rows=False))
    if v == 40:
        assert looks(*head_of("none", v, weight_is_rows=False)) == RECORDING


def test_rows_that_count_by_those_of_another_head_are_counted_first() -> None:
    """In the order of what they are made of, once, and before what is large."""
    graph = Graph()
    y = given(graph, "y", (N,), dtype=torch.int64)
    large = called(graph, aten.mm.default, (given(graph, "x", (N, D)), given(graph, "A", (D, D))), (N, D))
    counts, made = called(graph, aten.ne.Scalar, (y, -100), (N,), dtype=torch.bool), []
    for _ in range(2):
        order = graph.call_function(ROW_ORDER, (counts,))
        place, count = (called(graph, operator.getitem, (order, i), (N,), dtype=torch.int64) for i in (1, 2))
        made += [order, graph.call_function(HOST_COPY, (count,))]
        counts = called(graph, aten.ne.Scalar, (place, 0), (N,), dtype=torch.bool)
    ordered = counted_first([*graph.nodes])
    assert [node for node in ordered if node in made] == made
    assert ordered.index(made[-1]) < ordered.index(large)
