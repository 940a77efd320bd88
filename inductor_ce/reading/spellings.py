"""How a node is spelled: the row of the table of steps that it is, and its arguments by name."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from .steps import STEPS, Step

_BY_TARGET: dict[Any, Step] = {target: step for step in STEPS for target in step.targets}
# Within a default device, Dynamo calls some methods by the functions that they are in torch.Tensor.
_BY_TARGET |= {
    getattr(torch.Tensor, target): step
    for target, step in _BY_TARGET.items()
    if isinstance(target, str) and callable(getattr(torch.Tensor, target, None))
}
_CAT, _COPY = _BY_TARGET[torch.cat], _BY_TARGET[torch.clone]
# Comparisons whose sides change places.
_TURNED = {
    name: _BY_TARGET[turned]
    for name, turned in {"lt": "gt", "gt": "lt", "le": "ge", "ge": "le", "eq": "eq", "ne": "ne"}.items()
}

# Parameters that torch calls otherwise by keyword.
_ALIASES = {
    "axis": "dim",
    "axis0": "dim0",
    "axis1": "dim1",
    "keepdims": "keepdim",
    "self": "input",
    "x": "input",
    "fill_value": "value",
    "indices": "index",
    "diagonal": "offset",
}


def step_of(node: Node) -> Step | None:
    """The step that a node is, None for a callable that the table does not have."""
    if node.op not in ("call_function", "call_method"):
        return None
    step = step_called(node.target if node.target is not getattr else (getattr, node.args[1]))
    return _COPY if step is _CAT and _is_of_one(node) else step


def step_called(target: Any) -> Step | None:
    """The step that a function, or the method of a name, is."""
    try:
        return _BY_TARGET.get(target)
    except TypeError:  # an unhashable callable is none of ours
        return None


def _is_of_one(node: Node) -> bool:
    """Whether a node is torch.cat([x])."""
    tensors = _named(node, _CAT).get("tensors")
    return isinstance(tensors, (list, tuple)) and len(tensors) == 1


def read(node: Node) -> tuple[Step, dict[str, Any]] | None:
    """(step, arguments by name) of a node, None for a callable that the table does not have.

    A number in front of a comparison, as Dynamo has it before torch 2.12, comes behind it.
    """
    step = step_of(node)
    if step is None:
        return None
    given = arguments(node, step)
    if step.name in _TURNED and not isinstance(given.get("input"), Node):
        step, given = _TURNED[step.name], {"input": given.get("other"), "other": given.get("input")}
    return step, given


def arguments(node: Node, step: Step) -> dict[str, Any]:
    """The arguments of a node that is `step`, by the names of its parameters."""
    if step is _COPY and _BY_TARGET.get(node.target) is _CAT:
        return {"input": _named(node, _CAT)["tensors"][0]}
    return _named(node, step)


def _named(node: Node, step: Step) -> dict[str, Any]:
    names, args = step.parameters, node.args
    if step.variadic:
        rest = args[len(names) - 1 :]
        flat = rest[0] if len(rest) == 1 and isinstance(rest[0], (list, tuple)) else rest
        args = (*args[: len(names) - 1], tuple(flat))
    given = dict(zip(names, args, strict=False))
    if node.kwargs:
        given.update({_ALIASES.get(name, name): value for name, value in node.kwargs.items()})
    if step.given:
        given.update(step.given)
    return given


def arguments_of(node: Node) -> dict[str, Any]:
    """The arguments by name of a node that is known to be a step."""
    step = step_of(node)
    assert step is not None, f"{node} is no step"
    return arguments(node, step)


def one_dim(dim: Any) -> Any:
    """The dimension in a list of one, as `dim=[-1]` has it; anything else as it is."""
    return dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim


def is_repeatable(node: Node) -> bool:
    """Whether a node is a step that may be made again elsewhere, or erased where nobody uses it."""
    step = step_of(node)
    return step is not None and not step.stays


def is_step(node: Node, name: str) -> bool:
    """Whether a node is the step of this name."""
    step = step_of(node)
    return step is not None and step.name == name


def is_arithmetic_edit(node: Node) -> bool:
    """Whether a node is x.add_(y) or the like, whose functional form keeps the strides of x."""
    step = step_of(node)
    return step is not None and step.keeps_strides


def reads_shapes(node: Node) -> bool:
    """Whether a node is a step that reads no element of what it is given."""
    step = step_of(node)
    return step is not None and step.reads_shapes


def has_log(node: Node) -> bool:
    """Whether a logarithm is taken of what a node is summed, clamped, raised by an epsilon or mixed into."""
    frontier, seen = [node], {node}
    while frontier:
        fresh = [user for user in frontier.pop().users if user not in seen]
        steps = [(user, step) for user in fresh if (step := step_of(user)) is not None]
        if any(step.takes_log for _, step in steps):
            return True
        seen.update(fresh)
        frontier += [user for user, step in steps if step.before_log or step.view is not None]
    return False
