"""What is known of the tensors that nodes stand for: their examples, and sizes that may be symbolic."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..common.compat.symbols import expected_value

Size = int | torch.SymInt


def tensor_of(node: object) -> torch.Tensor | None:
    """The example tensor of a node: None for another kind of value, or where shapes were not recorded."""
    if not isinstance(node, Node):
        return None
    value = node.meta.get("example_value", node.meta.get("val"))
    return value if isinstance(value, torch.Tensor) else None


def number_of(node: object) -> torch.SymInt | torch.SymFloat | None:
    """The number that a node stands for, which is none of the program's constants."""
    value = node.meta.get("example_value", node.meta.get("val")) if isinstance(node, Node) else None
    return value if isinstance(value, (torch.SymInt, torch.SymFloat)) else None


def value_of(node: Node) -> int | float:
    """The number that a node stands for in the example. What is compiled is called for that number alone."""
    number = number_of(node)
    assert number is not None, f"{node} is no number"
    return int(number) if isinstance(number, torch.SymInt) else float(number)


def example_of(node: Node) -> torch.Tensor:
    """The tensor that a node stands for, which has one."""
    example = tensor_of(node)
    assert example is not None, f"{node} is no tensor"
    return example


def requires_grad(node: object) -> bool:
    """Whether a node stands for a tensor that requires a gradient, as its example tells."""
    example = tensor_of(node)
    return example is not None and example.requires_grad


def is_promoted(node: Node, other: Node) -> bool:
    """Whether torch takes the numbers of a tensor in another dtype, that of a tensor beside it."""
    own, wide = example_of(node).dtype, example_of(other).dtype
    return own not in (wide, torch.bool) and torch.promote_types(own, wide) == wide


def shape_of(node: Node) -> tuple[Size, ...]:
    """The shape of the tensor that a node stands for."""
    value = tensor_of(node)
    assert value is not None, f"{node} is no tensor"
    return tuple(value.shape)


def equal(a: Size, b: Size) -> bool:
    """Whether two sizes are known to be equal, without adding a guard."""
    return a == b if isinstance(a, int) and isinstance(b, int) else statically_known_true(a == b)


def tied(a: Sequence[Size], b: Sequence[Size]) -> bool:
    """Whether two shapes are equal, for which a guard is added where they are so in the example alone.

    `x.gather(-1, y)` takes the first rows of x where y has fewer, so torch leaves open whether it has. Where
    it does, what was compiled is not called.
    """
    pairs = [*zip(a, b, strict=False)]
    if len(a) != len(b) or not all(equal(x, y) or _is_equal_in_example(x, y) for x, y in pairs):
        return False
    return all(bool(x == y) and equal(x, y) for x, y in pairs)


def decided_equal(a: Sequence[Size], b: Sequence[Size]) -> bool:
    """Whether two shapes are equal where what was compiled is called: either way a guard says so.

    What is decided by this is decided alike whichever of the sizes are symbolic.
    """
    return len(a) == len(b) and all(map(_is_decided_equal, a, b))


def decided_same_count(a: Sequence[Size], b: Sequence[Size]) -> bool:
    """The same of how many numbers there are."""
    return decided_equal([math.prod(a)], [math.prod(b)])


def _is_decided_equal(a: Size, b: Size) -> bool:
    known = all(isinstance(x, int) or x.node.has_hint() for x in (a, b))
    return bool(a == b) if known else equal(a, b)


def _is_equal_in_example(a: Size, b: Size) -> bool:
    """Of two sizes with symbols, which a guard may make one."""
    symbols = isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt)
    return symbols and all(x.node.has_hint() for x in (a, b)) and hint(a) == hint(b)  # type: ignore[union-attr]


def same_shape(a: Sequence[Size], b: Sequence[Size]) -> bool:
    return len(a) == len(b) and all(map(equal, a, b))


def same_count(a: Sequence[Size], b: Sequence[Size]) -> bool:
    return equal(math.prod(a), math.prod(b))


def constant(size: Size) -> int | None:
    """The value of a size that does not depend on a symbol."""
    if isinstance(size, int):
        return size
    expr = size.node.expr
    return int(expr) if expr.is_Integer else None


def hint(size: Size) -> int:
    """A size as a number, for reports and estimates only."""
    return size if isinstance(size, int) else int(size.node.hint or 0)


def is_hinted(size: Size) -> bool:
    """Whether anything is known of a size when code is compiled."""
    return isinstance(size, int) or size.node.hint is not None


def expected(size: Size) -> int:
    """The same, and a guess where a size depends on data."""
    return hint(size) if is_hinted(size) else expected_value(size)  # type: ignore[arg-type]


def elements_of(node: Node) -> int:
    """How many a tensor has, with what is expected in place of symbols."""
    return math.prod(map(expected, shape_of(node)))


def bytes_of(node: Node) -> int:
    """Bytes of a tensor, with what is expected in place of symbols."""
    return elements_of(node) * example_of(node).element_size()
