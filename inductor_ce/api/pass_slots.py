"""Slots of Inductor's configuration that hold passes: none, one, or several from 2.13."""

from __future__ import annotations

from typing import Any

from torch.fx import Graph

from ..common.compat.inductor import HAS_PASS_LISTS, CustomGraphPass

LOSSES_SLOT, HEADS_SLOT = "pre_grad_custom_pass", "joint_custom_pre_pass"


class ChainedPass(CustomGraphPass):
    """Several passes in one, for releases whose configuration holds only one."""

    def __init__(self, passes: tuple[Any, ...]):
        self.passes = passes

    def __call__(self, graph: Graph) -> None:
        for each in self.passes:
            each(graph)

    def uuid(self) -> Any:
        """None, which turns Inductor's cache off, where a pass has none of its own."""
        uuids = tuple(each.uuid() if isinstance(each, CustomGraphPass) else None for each in self.passes)
        return None if None in uuids else uuids


def passes_in(value: Any) -> tuple[Any, ...]:
    """The passes that a configuration slot holds: none, one, or several from 2.13."""
    if value is None:
        return ()
    if isinstance(value, ChainedPass):
        return value.passes
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def slot_value(passes: tuple[Any, ...]) -> Any:
    """The value for a configuration slot that holds `passes`."""
    if len(passes) < 2:
        return passes[0] if passes else None
    return list(passes) if HAS_PASS_LISTS else ChainedPass(passes)
