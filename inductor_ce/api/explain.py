"""explain: what is fused in a function, what is not, and why."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from functorch.compile import make_boxed_func  # type: ignore[import-untyped]
from torch.fx import Graph, GraphModule

from ..common.compat.dynamo import (
    Break,
    aot_eager,
    break_of,
    breaks_told,
    captured_copy,
    no_recompile_limit,
    uncompiled,
)
from ..common.compat.inductor import (
    HEAD_PASSES,
    LOSS_PASSES,
    CustomGraphPass,
    compile_fx,
    is_on,
    patches_of,
)
from ..common.compat.versions import check_torch
from ..common.failsafe import attempt
from ..common.findings import Cut, Miss, Reason, Site, line_of
from ..common.options import FORWARD, Options
from ..graph.walk import graphs_within
from ..heads.fuse import Planned, fuse_heads, sentence
from ..heads.plan import Plan
from .deferral import copied, read_and_defer
from .install import installed_options
from .lazy_inputs import made_inside, taken_apart
from .pass_slots import HEADS_SLOT, LOSSES_SLOT
from .passes import fuse_losses
from .report import Report


def explain(f: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Report:
    """Run `f(*args, **kwargs)` once and report the losses found in the graphs that torch.compile captures.

    Every graph is captured afresh and read outside all caches, so the report is the same on a machine where
    everything is compiled already. All passes run, so that each head's plan is known, and no code is
    generated: the graphs themselves run unfused, and nothing that is compiled for `f` is touched. The options
    are those of the `install` in force, or the defaults.

    Args:
        f: a function or module, compiled or not.
        *args, **kwargs: its arguments.

    Returns:
        A `Report`: `.sites`, `.misses`, `.small`, `.cuts`, `.to_dict()`, and `str()` of it to read.
    """
    check_torch()
    report = Report()
    options, patches = installed_options(), patches_of(f)
    why_whole = "" if is_on(HEAD_PASSES, patches) else f"{SWITCHED_OFF} ({HEAD_PASSES})"

    breaks: list[Break] = []

    def read(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        breaks.extend(filter(None, [break_of(gm)]))
        found, planned = _found(gm, example_inputs, options, why_whole)
        sites = with_plans([site for each in found for site in each.sites], planned)
        if is_on(LOSS_PASSES, patches):
            report.sites += sites
        else:
            report.misses += map(_not_fused, sites)
        report.misses += [miss for each in found for miss in each.misses]
        report.small += [miss for each in found for miss in each.small]
        return _runnable(gm, example_inputs, options)

    with no_recompile_limit(), breaks_told() as told:
        torch.compile(_apart(uncompiled(f)), backend=read)(*args, **kwargs)
    report.cuts = cuts_of(breaks, told)
    return report


def cuts_of(breaks: Sequence[Break], told: Sequence[str]) -> list[Cut]:
    """Breaks whose place is known, each once, and then what Dynamo has told without one."""
    placeless = [Break(text, ()) for text in told if all(text != each.text for each in breaks)]
    return [_cut(each) for each in dict.fromkeys([*breaks, *placeless])]


def _cut(where: Break) -> Cut:
    """What Dynamo says comes with explanations, and hints, of which the first is the one that helps."""
    first, *rest = map(str.strip, where.text.splitlines())
    parts = [line.partition(": ") for line in rest]
    hints = [text for kind, _, text in parts if kind == "Hint"]
    said = dict.fromkeys([first, *(text for kind, _, text in parts if kind == "Explanation"), *hints[:1]])
    location, code = line_of(where.frames) if where.frames else ("", "")
    does = "ends the graph" if where.frames else "gives a function up, or ends its graph"
    sentences = " ".join(line.rstrip(".") + "." for line in said)
    return Cut(location, code, f"Dynamo {does}: {sentences}")


def _runnable(gm: GraphModule, example_inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    """The graph as it is, but what it returns lazily, for graphs behind it to be read as they will be."""
    if len(graphs_within(gm)) > 1:  # bodies of higher-order operators may run by way of AOTAutograd alone
        return aot_eager(gm, list(example_inputs))
    if not has_products(gm):
        return gm.forward
    module = captured_copy(gm)
    _, finish = read_and_defer(module, options)
    if finish is None:
        return gm.forward
    return lambda *args: finish(args, module(*args))


class _Silent(CustomGraphPass):
    """A pass that tells nobody. The caches, which would ask what it is, are off."""

    def __init__(self, run: Callable[[Graph], object]):
        self._run = run

    def __call__(self, graph: Graph) -> None:
        self._run(graph)

    def uuid(self) -> str:
        return "explain"


SWITCHED_OFF = 'the passes of Inductor that ours run among are off, as in mode="lite"'


def _not_fused(site: Site) -> Miss:
    message = f"{site.form} at {site.location} is not fused: {SWITCHED_OFF} ({LOSS_PASSES})."
    return Miss(site.location, site.code, Reason.PASSES_OFF, f"{message} {Reason.PASSES_OFF.value}")


def _found(
    gm: GraphModule, example_inputs: Sequence[Any], options: Options, why_whole: str = ""
) -> tuple[list[Report], list[Planned]]:
    """(what is found in a torch-level graph, then in those inside it, the plans of the heads)"""
    module, inputs, *_ = taken_apart(gm, example_inputs)
    if has_products(module) or options.gradient == FORWARD:
        given = captured_copy(module), inputs, options, why_whole
        compiled, _ = attempt("the plans are not told", _compiled, *given)
        if compiled is not None:
            return compiled
    return [fuse_losses(copied(graph)[0], options) for graph in graphs_within(gm)], []


LINEAR_NAMES = ("linear", "mat", "mm", "einsum", "conv", "dot", "inner", "dist")


def has_products(gm: GraphModule) -> bool:
    """Whether anything in a torch-level graph, or in the graphs inside it, may be a linear layer."""
    nodes = (node for inner in graphs_within(gm) for node in inner.graph.nodes if node.op.startswith("call"))
    return any(n.op == "call_module" or any(name in str(n.target) for name in LINEAR_NAMES) for n in nodes)


def _compiled(
    module: GraphModule, inputs: Sequence[Any], options: Options, why_whole: str
) -> tuple[list[Report], list[Planned]]:
    """What both passes tell when a graph, which is changed, goes through Inductor."""
    found: list[Report] = []
    planned: list[Planned] = []
    patches = {
        LOSSES_SLOT: _Silent(lambda graph: found.append(fuse_losses(graph, options))),
        HEADS_SLOT: _Silent(lambda graph: planned.extend(fuse_heads(graph, options, why_whole))),
        **dict.fromkeys((LOSS_PASSES, HEAD_PASSES), True),
        "force_disable_caches": True,
    }

    def no_code(graph: GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
        return make_boxed_func(graph.forward)

    read_and_defer(module, options)
    with made_inside(inputs):
        compile_fx(module, inputs, inner_compile=no_code, config_patches=patches)
    return [*found[-1:], *found[:-1]], planned  # the graphs inside come first to the passes


def with_plans(sites: list[Site], planned: list[Planned]) -> list[Site]:
    """Sites with the plans of their heads.

    A site has none where nobody reads its statistics, and several where the graph that it is in is called
    several times: all are told, and the strategy of the first.
    """
    plans: dict[int, list[Plan]] = {}
    for each in planned:
        plans.setdefault(each.site, []).append(each.plan)
    return [_with_plans(site, plans[site.id]) if site.id in plans else site for site in sites]


def _with_plans(site: Site, plans: list[Plan]) -> Site:
    told = "; ".join(dict.fromkeys(map(sentence, plans)))
    rows = "; ".join(dict.fromkeys(plan.rows for plan in plans if plan.rows))
    return dataclasses.replace(site, strategy=plans[0].strategy, plan=told, rows=rows)


def _apart(f: Callable[..., Any]) -> Callable[..., Any]:
    """`f` called from code of its own, by a name of its own: by these Dynamo keeps what it has compiled
    and which sizes it has seen change."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return f(*args, **kwargs)

    run.__code__ = run.__code__.replace(co_name=f"explain_{next(_calls)}")
    return run


_calls = itertools.count()
