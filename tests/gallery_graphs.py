"""What the final graphs of a fused loss may hold: the logits, and nothing more of their size.

In the forward the logits and the pointwise chain that leads to them, and the weights that `row_stats` reads,
with terms of these and of statistics, such as q log q, that Inductor fuses with their sum; in the backward
the result of `row_grad` and what is made of it, with the derivative of the chain. The kernels absorb both
chains, so nothing of them is saved for the backward but where they begin. What the logits were made of, by a
product for example, is the user's model and not looked at.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from harness import Graphs
from torch import Tensor
from torch.fx import Graph, Node

from inductor_ce import ops
from inductor_ce.graph.shapes import hint
from inductor_ce.ops.products import LOGITS

BOTH = (ops.ROW_STATS_GRAD, ops.SOME_ROW_STATS_GRAD)
STATS, GRADS = (ops.ROW_STATS, ops.SOME_ROW_STATS, *BOTH), (ops.ROW_GRAD, ops.SOME_ROW_GRAD, *BOTH)
KERNELS = tuple(dict.fromkeys(STATS + GRADS))
# Those of several sets of logits.
BETWEEN = (ops.DIVERGENCE, ops.DIVERGENCE_GRAD)

# Beside the pointwise operators: what a chain before the logits may be made of.
MOVES = frozenset(
    {
        *(
            "view",
            "_unsafe_view",
            "reshape",
            "permute",
            "transpose",
            "t",
            "expand",
            "slice",
            "select",
            "squeeze",
        ),
        *(
            "unsqueeze",
            "clone",
            "alias",
            "cat",
            "copy",
            "_to_copy",
            "convert_element_type",
            "constant_pad_nd",
        ),
        *("slice_scatter", "as_strided", "split", "split_with_sizes", "getitem"),
    }
)
# Those that leave the rows as they are.
RESHAPES = frozenset(
    {"view", "_unsafe_view", "reshape", "clone", "alias", "unsqueeze", "squeeze", "expand", "_to_copy"}
)


# Logits of so few columns are no measure of what is large: their rows are as many as they are.
FEW_COLUMNS = 8
ROWS_BY_DATA = 16


def check_graphs(graphs: Graphs, kept: bool = False) -> None:
    """Raises AssertionError, with the nodes, where a graph holds more than it may or sweeps a row twice.

    With `kept` it holds what the user keeps as well, of whatever size.
    """
    every = [node for gm in graphs.final for node in _kernels(gm.graph)]
    assert any(node.target in STATS for node in every), "no row_stats in the final graphs"
    logits = [_example(z) for node in every for z in _logits(node)]
    size = min(_count(z) for z in [z for z in logits if z.shape[1] >= FEW_COLUMNS] or logits)
    in_pieces = graphs.count(LOGITS) > 0  # `test_head_memory.py` looks at these
    for gm in graphs.final:
        more = [] if kept or in_pieces else _more_than_allowed(gm.graph, size)
        assert not more, "of the size of the logits, and not absorbed:\n" + "\n".join(map(_shown, more))
        for op in KERNELS:
            sweeps = Counter(_rows(node.args[0]) for node in gm.graph.nodes if node.target == op)
            twice = [key[0] for key, count in sweeps.items() if count > 1]
            assert not twice, f"several {op} for one z: {twice}"


def _more_than_allowed(graph: Graph, size: int) -> list[Node]:
    kernels = _kernels(graph)
    chains = _up([z for n in kernels for z in _logits(n)], size, _is_chain)
    weights = [w for n in kernels for w in n.all_input_nodes if w not in _logits(n) and _is_large(w, size)]
    masks = [w for n in (*kernels, *chains) for w in n.all_input_nodes if not _is_floating(w)]
    weights += [source for mask in masks for source in mask.all_input_nodes]
    outside = _up(weights, size, lambda node: True)
    logits = {n for n in chains if n.op != "placeholder" and not _is_chain(n)}
    assert not logits & outside, "weights are made of the logits"
    gradients = _down([n for n in kernels if n.target in (*GRADS, ops.DIVERGENCE_GRAD)])
    derivatives = _up([n for n in gradients if _is_chain(n)], size, _is_derivative)
    of_logits = _down(chains, stop=KERNELS + BETWEEN)
    terms = {n for n in _down(outside) if _is_pointwise(n) and n not in of_logits}
    allowed = chains | outside | terms | gradients | derivatives
    kept = {n for n in graph.output_node().all_input_nodes if _is_pointwise(n)} - outside - gradients
    model = _of_model(graph, kernels, chains)
    return [
        n
        for n in graph.nodes
        if n.op == "call_function"
        and _is_large(n, size)
        and n not in model
        and (n not in allowed or n in kept)
    ]


def _of_model(graph: Graph, kernels: list[Node], chains: set[Node]) -> set[Node]:
    """What parameters and activations are made into before there are logits: no part of a loss."""
    roots = {n for n in chains if n.op == "placeholder" or not _is_chain(n)}
    model: set[Node] = set()
    for node in graph.nodes:
        own = node.op == "placeholder" and node not in roots and _is_floating(node)
        made = node.op == "call_function" and node not in kernels and node.all_input_nodes
        constant = node.target == torch.ops.aten.full.default  # Inductor keeps no constant in memory
        if own or constant or (made and model.issuperset(node.all_input_nodes) and node not in chains):
            model.add(node)
    return model


def _kernels(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if node.target in KERNELS + BETWEEN]


def _logits(node: Node) -> list[Node]:
    """Those that an operator reads."""
    return list(node.args[0]) if node.target in BETWEEN else [node.args[0]]


def _up(nodes: Iterable[Node], size: int, through: Any) -> set[Node]:
    """The large nodes among `nodes` and what they are made of, as far as `through` holds."""
    seen: set[Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in seen and _is_large(node, size):
            seen.add(node)
            stack += node.all_input_nodes if through(node) else []
    return seen


def _down(nodes: Iterable[Node], stop: tuple[Any, ...] = ()) -> set[Node]:
    """`nodes` and all that is made of them, but not what is made of the results of `stop`."""
    seen: set[Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack += () if node.target in stop else node.users
    return seen


def _rows(node: Node) -> tuple[Any, ...]:
    """Equal for equal rows: where they come from, and what moves them on the way."""
    path = []
    while _name(node) in MOVES - {"cat", "convert_element_type"} and node.op == "call_function":
        if _name(node) not in RESHAPES:
            path.append((_name(node), *map(str, node.args[1:])))
        node = node.args[0]
    return node, *path


def _is_large(node: Node, size: int) -> bool:
    return _is_floating(node) and 2 * sum(map(_count, _parts(node))) > size


def _count(x: Tensor) -> int:
    """How many elements it has, of rows that data choose as many as there may be."""
    return math.prod(hint(size) or ROWS_BY_DATA for size in x.shape)


def _is_floating(node: Node) -> bool:
    return any(part.is_floating_point() for part in _parts(node))


def _parts(node: Node) -> list[Tensor]:
    """What a node is, or the tensors of a split."""
    example = _example(node)
    return [
        part
        for part in (example if isinstance(example, (list, tuple)) else [example])
        if isinstance(part, Tensor)
    ]


def _is_chain(node: Node) -> bool:
    return node.op == "call_function" and (_name(node) in MOVES or _is_pointwise(node))


def _is_derivative(node: Node) -> bool:
    """A chain may hold tanh, but the softmax is the kernels' alone."""
    return _is_chain(node) and _name(node) != "exp"


def _is_pointwise(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


def _name(node: Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.split("::")[1]
    return getattr(node.target, "__name__", str(node.target))


def _example(node: Any) -> Any:
    return node.meta.get("val") if isinstance(node, Node) else None


def _shown(node: Node) -> str:
    return f"{node.format_node()}  {[tuple(part.shape) for part in _parts(node)]}"
