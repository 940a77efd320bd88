"""Linear layers of a torch-level graph, by whatever function they are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from ..common.compat.graphs import is_plain_tensor
from ..distributed.local_logits import Dims, beside
from ..graph.shapes import constant, example_of, tensor_of
from ..reading import spellings


@dataclass(frozen=True)
class LinearLayer:
    """target(*args), which makes rows [..., V] of hidden states [..., D]."""

    hidden: Node
    target: Callable[..., Any]
    args: tuple[Any, ...]

    @property
    def weight(self) -> Any:
        """[V, D], or [D, V] of other functions than `linear`."""
        return self.args[2 if self.target is torch.addmm else 1]

    def operands(self, result: Tensor) -> list[tuple[Tensor, Dims]]:
        """The tensors that it is given, each with its dimensions that the result has."""
        last = result.ndim - 1
        bias = self.args[:1] if self.target is torch.addmm else self.args[2:]
        of_weight: Dims = (last, None)
        if self.target is not F.linear:
            of_weight = (None, last)
        added = [example_of(b) for b in bias if isinstance(b, Node)]
        return [
            (example_of(self.hidden), (*range(last), None)),
            (example_of(self.weight), of_weight),
            *((b, beside(result, b)) for b in added),
        ]


def linear_layer(node: Node, spelled: Any) -> LinearLayer | None:
    """The linear layer that a node is, `spelled` as it is read; None for any other."""
    if node.op == "call_function" and node.target is F.linear:
        names = ("input", "weight", "bias")
        given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        hidden: Any = given["input"]
        return LinearLayer(hidden, F.linear, (hidden, given["weight"], given.get("bias")))
    if node.op == "call_function" and node.target is torch.addmm and not node.kwargs:
        bias, hidden, columns = node.args
        return LinearLayer(hidden, torch.addmm, (bias, hidden, columns))
    if spelled is not None and spelled[0].name == "matmul":
        hidden, columns = spelled[1].get("input"), spelled[1].get("other")
        example = tensor_of(columns)
        if example is not None and example.dim() == 2 and isinstance(hidden, Node):
            return LinearLayer(hidden, torch.matmul, (hidden, columns))
    return None


def logit_classes(node: object) -> int | None:
    """V of what may be logits, floating [..., V] with rows; None for all else, and where V is symbolic."""
    example = tensor_of(node)
    if example is None or example.dim() < 2 or not example.is_floating_point():
        return None
    return constant(example.shape[-1])


def plain_layer(node: Node) -> LinearLayer | None:
    """The linear layer that a node is, if its result is an ordinary tensor."""
    layer = linear_layer(node, spellings.read(node))
    return layer if layer is not None and is_plain_tensor(example_of(node)) else None
