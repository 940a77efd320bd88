"""Process groups and their collectives."""

from __future__ import annotations

from typing import Any

import torch

ALL_GATHER: Any
ALL_REDUCE: Any
WAIT: Any

if torch.distributed.is_available():
    from torch.distributed import _functional_collectives, distributed_c10d

    ALL_GATHER = torch.ops._c10d_functional.all_gather_into_tensor.default
    ALL_REDUCE = torch.ops._c10d_functional.all_reduce.default
    WAIT = torch.ops._c10d_functional.wait_tensor.default
else:
    ALL_GATHER = ALL_REDUCE = WAIT = None


def calls(node: torch.fx.Node, operator: Any) -> bool:
    """Whether a node calls one of the operators above, by its overload or by its name."""
    return operator is not None and node.target in (operator, operator.overloadpacket)


def calls_in(graph: torch.fx.Graph, operator: Any) -> list[torch.fx.Node]:
    """The nodes of a graph that do."""
    if operator is None:
        return []
    targets = operator, operator.overloadpacket
    return [n for target in targets for n in graph.find_nodes(op="call_function", target=target)]


def group_size(group_name: Any) -> int:
    """How many ranks a group has."""
    return distributed_c10d._resolve_process_group(group_name).size()


def all_gather_blocks(x: torch.Tensor, group_name: Any) -> torch.Tensor:
    """[P * K, ...] of the [K, ...] that each of the P ranks of a group gives, without a gradient."""
    # Renamed in 2.13, where the old name warns.
    new = getattr(_functional_collectives, "all_gather_single", None)
    return (new or _functional_collectives.all_gather_tensor)(x, 0, group_name)


def all_reduce_sum(x: torch.Tensor, group_name: Any) -> torch.Tensor:
    """The sum of the tensors that the ranks of a group give, which is there when it is returned."""
    summed = _functional_collectives.all_reduce(x, "sum", group_name)
    is_pending = isinstance(summed, _functional_collectives.AsyncCollectiveTensor)
    return summed.wait() if is_pending else summed


def rank_in_group(group_name: Any) -> int:
    """The rank of this process in a group."""
    return distributed_c10d._resolve_process_group(group_name).rank()


def waits_for_backward(hook: Any) -> bool:
    """Whether a hook of a tensor is FSDP2's, which waits for the backward to begin and reads no gradient."""
    kind = type(getattr(hook, "__self__", None))
    return kind.__name__ == "FSDPState" and kind.__module__.startswith("torch.distributed.fsdp")
