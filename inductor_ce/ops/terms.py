"""The language of the terms and slopes of the `table`, over tensors and in Triton."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from typing import Any


def evaluated(
    expression: str,
    names: Mapping[str, Any],
    add: Callable[[Any, Any], Any],
    mul: Callable[[Any, Any], Any],
    functions: Mapping[str, Callable[[Any], Any]],
) -> Any:
    """An expression of the table, over whatever `names` and the names of `functions` stand for."""

    def of(node: ast.expr) -> Any:
        match node:
            case ast.Name(name):
                return names[name]
            case ast.Constant(value):
                return value
            case ast.Call(ast.Name(name), [argument]):
                return functions[name](of(argument))
            case ast.BinOp(left, ast.Add(), right):
                return add(of(left), of(right))
            case ast.BinOp(left, ast.Mult(), right):
                return mul(of(left), of(right))
        raise AssertionError(f"{expression} is beyond the language of the table")

    return of(ast.parse(expression, mode="eval").body)


def in_triton(expression: str, order: float | None = None) -> str:
    """An expression of the table as Triton's."""
    if order is not None:
        expression = expression.replace("k", str(order)).replace("power", f"tl.exp(gap * {order})")
    expression = expression.replace("seen(", "tl.where(q != q, 0.0, ")
    return expression.replace("limit(", 'tl.where(gap == float("-inf"), 0.0, ')
