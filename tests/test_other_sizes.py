"""Other values of symbolic sizes: they keep to the guards, and leave nothing as it was that need not be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import SymInt, Tensor
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from inductor_ce import ops
from inductor_ce.heads.other_sizes import UnknownSize, at, other_sizes
from inductor_ce.heads.row_locality import facts_about


def sizes(*hints: int) -> list[SymInt]:
    """Dynamic sizes of these hints, each a symbol of its own."""
    env = ShapeEnv(duck_shape=False)
    made = []
    for i, hint in enumerate(hints):
        source = ConstantSource(f"n{i}")
        symbol = env.create_symbol(hint, source=source, dynamic_dim=DimDynamic.DYNAMIC)
        made.append(env.create_symintnode(symbol, hint=hint, source=source))
    return made


GUARDED: dict[str, tuple[tuple[int, ...], Callable[..., bool]]] = {
    "nothing": ((8192, 12, 3), lambda a, b, c: True),
    "multiples": ((8192, 4), lambda a, b: a % 512 == 0 and a % b == 0),
    "large": ((4096, 3), lambda a, b: a > 2047 and a * b > 8000),
    "at most": ((100, 3), lambda a, b: a <= 128 and b < 4),
    "a product": ((12, 3, 4), lambda a, b, c: a == b * c),
    "a sum": ((12, 3), lambda a, b: a == 4 * b and b >= 3),
    "shares": ((12, 5, 4), lambda a, b, c: b // c == 1 and a % (2 * (b // c)) == 0),
    "unequal": ((6, 6), lambda a, b: a // 2 != 2 and a * b != 25),
}


@pytest.mark.parametrize("name", GUARDED)
def test_guards_hold_and_every_size_is_another(name: str) -> None:
    hints, holds = GUARDED[name]
    symbolic = sizes(*hints)
    assert holds(*symbolic)  # which adds the guards
    found = other_sizes(symbolic)
    assert found
    for size_of in found:
        values = [size_of(size) for size in symbolic]
        assert holds(*values)
        assert all(value != hint for value, hint in zip(values, hints, strict=True))


def test_what_is_made_of_sizes_is_another_too() -> None:
    """The first values that come to mind, 5 and 7, would leave their difference what it is."""
    a, b = sizes(4, 2)
    size_of = other_sizes([a, b, b - a, a // b])[0]
    assert size_of(b - a) != -2
    assert size_of(a // b) != 2


def test_where_guards_leave_no_choice() -> None:
    (a,) = sizes(12)
    assert a % 12 == 0
    assert a < 20
    assert other_sizes([a]) == []


def test_a_size_of_other_symbols_is_not_made_up() -> None:
    a, b = sizes(12, 3)
    with pytest.raises(UnknownSize):
        at({})(a * b)
    assert at({})(7) == 7


def test_row_numbers_at_other_sizes() -> None:
    def turned(z: Tensor) -> Tensor:
        return ops.row_stats(z, [], [], "max,sumexp")[0].view(-1, 2).t().reshape(-1)

    graph = make_fx(turned, tracing_mode="symbolic")(torch.randn(12, 37)).graph
    (result,) = graph.output_node().all_input_nodes
    stats = graph.find_nodes(op="call_function", target=ops.ROW_STATS)
    (n,) = (size for size in stats[0].meta["val"].shape if isinstance(size, SymInt))
    size_of = next(size_of for size_of in other_sizes([n]) if size_of(n) % 2 == 0)
    rows = facts_about([result], stats, lambda node: False, size_of)[result].rows
    assert rows is not None
    assert rows.tolist() == [*range(0, size_of(n), 2), *range(1, size_of(n), 2)]
