"""explain: what is fused in a function, what is not, and why."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule

from .backend import installed_options
from .compat import check_torch, no_recompile_limit, uncompiled
from .passes import fuse_losses
from .report import Report


def explain(f: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
    """Run `f(*args, **kwargs)` once and report the losses found in the graphs that torch.compile captures.

    Every graph is captured afresh and read outside all caches, so the report is the same on a machine where
    everything is compiled already. The graphs themselves run unfused, and nothing that is compiled for `f`
    is touched. The options are those of the `install` in force, or the defaults.

    Args:
        f: a function or module, compiled or not.
        *args, **kwargs: its arguments.

    Returns:
        A `Report`: `.sites`, `.misses`, `.to_dict()`, and `str()` of it to read.
    """
    check_torch()
    report = Report()
    options = installed_options()

    def read(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        for module in gm.modules():
            if isinstance(module, GraphModule):
                found = fuse_losses(copied(module), options)
                report.sites += found.sites
                report.misses += found.misses
        return gm.forward

    with no_recompile_limit():
        torch.compile(_apart(uncompiled(f)), backend=read)(*args, **kwargs)
    return report


def _apart(f: Callable[..., Any]) -> Callable[..., Any]:
    """`f` called from code of its own, by a name of its own: by these Dynamo keeps what it has compiled
    and which sizes it has seen change."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return f(*args, **kwargs)

    run.__code__ = run.__code__.replace(co_name=f"explain_{next(_calls)}")
    return run


_calls = itertools.count()


def copied(module: GraphModule) -> Graph:
    """The graph of a module, to be rewritten without the module noticing."""
    copy = Graph(owning_module=module)
    copy.output(copy.graph_copy(module.graph, {}))
    return copy
