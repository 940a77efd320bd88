"""The passes: recognise, judge and rewrite over a torch-level graph; tag the chains of a joint graph."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node

from ..algebra.notation import render, statistics_of
from ..common.compat.dynamo import counters, numbers_of_compilation
from ..common.compat.inductor import CustomGraphPass, is_ahead_of_time
from ..common.errors import MissError
from ..common.failsafe import attempt
from ..common.findings import Miss, Reason, Site, make_miss, user_line
from ..common.options import Options
from ..common.sources import sources
from ..common.strategies import MATERIALISE
from ..graph.exported import is_exported, make_examples
from ..graph.functions import function_bodies
from ..graph.shapes import bytes_of
from ..heads.fuse import fuse_heads, plan_line
from ..heads.recompute import recompute_chains
from ..reading.aten import to_torch
from ..reading.chosen import forget
from ..reading.recognise import recognise
from ..reading.values import LossValue, Reading
from ..reading.views import forget_no_copies
from ..rewriting.by_hand import rewrite_by_hand
from ..rewriting.chosen_rows import choose_hidden, cut_hidden
from ..rewriting.column_blocks import join_blocks
from ..rewriting.divergences import FORM, fuse_divergences
from ..rewriting.edits import make_functional
from ..rewriting.escapes import KEPT
from ..rewriting.filled_steps import stack_steps
from ..rewriting.folded_rows import fold_rows
from ..rewriting.groups import Group, Replaceable, headline, value_of
from ..rewriting.joined_columns import split_columns
from ..rewriting.joined_layers import join_layers
from ..rewriting.joined_rows import join_rows
from ..rewriting.joined_steps import join_steps
from ..rewriting.legal import is_function_body, judge
from ..rewriting.lone_parts import take_lone_parts
from ..rewriting.padded_vocabulary import unpad
from ..rewriting.picked_mixtures import pick_parts
from ..rewriting.ranges_beside import part_ranges
from ..rewriting.returned_logits import settle_logits
from ..rewriting.rewrite import rewrite, sweep
from ..rewriting.some_classes import part_normalisers
from ..rewriting.stacked_parts import take_parts
from ..rewriting.turned_products import turn_products
from ..rewriting.whole_sums import sum_by_rows
from .report import Report, form_of_loss, miss_line, site_line
from .telling import is_told

log = logging.getLogger("inductor_ce")

LEFT = "the loss is left as it was"

AHEAD_OF_TIME = "pieces take operators of Python, which a package of AOTInductor has not"


class _Pass(CustomGraphPass):
    """A pass whose cache key is our sources and options."""

    def __init__(self, options: Options):
        self.options = options

    def uuid(self) -> Any:
        return type(self).__name__, sources(), self.options.key()


class FuseLosses(_Pass):
    """Before autograd: losses become `row_stats` and arithmetic of size [N]."""

    def __call__(self, graph: Graph) -> None:
        options = self.options
        if is_ahead_of_time():  # there is no memory of what differs, and no gradient
            options = replace(options, verify=False)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not is_ahead_of_time()):
            report = fuse_losses(graph, options)
        if not is_told():
            publish(report, options)


class FuseHeads(_Pass):
    """Before partitioning: heads are computed in pieces; where logits are kept, no chain of them is saved."""

    def __call__(self, graph: Graph) -> None:
        why_whole = AHEAD_OF_TIME if is_ahead_of_time() else ""
        planned, _ = attempt("heads are left as they were", fuse_heads, graph, self.options, why_whole)
        for each in planned or []:
            counters["inductor_ce"][each.plan.strategy] += 1
            if each.plan.skips:
                counters["inductor_ce"]["skips_rows"] += 1
            log.debug("%s", plan_line(each))
        attempt("a chain before the logits may be saved for the backward", recompute_chains, graph)


def fuse_losses(graph: Graph, options: Options, numbers: Iterator[int] | None = None) -> Report:
    """Rewrite every loss in a torch-level graph that is recognised and may be rewritten.

    A failure of ours leaves the graph, or the loss in question, as it was, and is told as a miss. The ids of
    sites are those of the compilation, or `numbers`.
    """
    report = Report()
    if is_function_body(graph.nodes):
        return report  # told where the function is called: there it may have been understood
    numbers = numbers or numbers_of_compilation()
    if not options.verify:
        by_hand, _ = attempt(LEFT, rewrite_by_hand, graph, numbers)
        report.sites += [each for each in by_hand or [] if isinstance(each, Site)]
        report.misses += [each for each in by_hand or [] if isinstance(each, Miss)]
    attempt(LEFT, read_aten, graph)
    attempt(LEFT, forget_no_copies, graph)
    attempt("edits in place stay as they are", make_functional, graph, options.min_vocab)
    for left, step in () if options.verify else _BEFORE_READING:
        attempt(left, step, graph, options.min_vocab)
    judged, error = attempt(LEFT, _read_and_judge, graph, options, True)
    if judged is None:
        report.misses.append(_internal_error(graph.output_node(), error))
        return report
    reading, groups = judged
    for read in (reading, *_read_functions(graph, options)):
        report.misses += read.misses
        report.small += read.small
    fused: list[tuple[Group, Site]] = []
    for group, number in zip(groups, numbers, strict=False):
        site, error = attempt(LEFT, _fuse, graph, reading, group, number, options.verify)
        if site is not None:
            fused.append((group, site))
        else:
            report.misses.append(_internal_error(headline(reading, group.nodes), error))
    attempt("unused nodes are left in the graph", forget, reading)
    if fused:
        attempt("unused nodes are left in the graph", sweep, graph, reading)
        report.sites += _bare_layers(graph, reading, fused, options)
    return report


# Steps before losses are read, of what has at least `min_vocab` classes, each with what its failure leaves.
_BEFORE_READING: tuple[tuple[str, Callable[[Graph, int], None]], ...] = (
    ("a part that is all stays a part", take_lone_parts),
    ("sums of all logits stay as they are", sum_by_rows),
    ("blocks of columns stay apart", join_blocks),
    ("steps that are written into a tensor stay so", stack_steps),
    ("steps that are joined stay apart", join_steps),
    ("logits that are joined stay apart", join_layers),
    ("parts that are stacked stay together", take_parts),
)


def _bare_layers(
    graph: Graph, reading: Reading, fused: list[tuple[Group, Site]], options: Options
) -> list[Site]:
    """Move away what stands between linear layers and `row_stats`. Returns the sites as they are then.

    Sites of parts that are joined have one id. Normalisers of a divergence, without a form, are told with it.
    """
    became: dict[int, int] | None = None
    if not options.verify:
        became, _ = attempt("losses of parts of rows stay apart", join_rows, graph)
    gone, _ = attempt("a concatenation hides the linear layer", split_columns, graph)
    groups = [group for group, _ in fused]
    heads, _ = attempt("returned logits are kept", settle_logits, graph, reading, groups, options, gone or {})
    attempt("a padded vocabulary hides the linear layer", unpad, graph)
    attempt("chosen rows hide the linear layer", choose_hidden, graph)
    attempt("a frozen layer is a batched product", fold_rows, graph)
    told = zip(fused, heads or [""] * len(fused), strict=True)
    sites = [replace(s, head=head, id=(became or {}).get(s.id, s.id)) for (_, s), head in told]
    return [site for site in sites if site.form]


def read_aten(graph: Graph) -> None:
    """Let a graph of ATen operators with a loss call torch, with examples if it is not Dynamo's."""
    if to_torch(graph) and is_exported(graph):
        make_examples(graph)


def _read_and_judge(graph: Graph, options: Options, between: bool = False) -> tuple[Reading, list[Group]]:
    """What a graph is and what of it may be replaced; with `between`, what hides losses has been by then."""
    read_aten(graph)
    reading = recognise(graph)
    heads = between and not options.verify  # beside the originals these are whole
    steps = (pick_parts, part_normalisers, *((part_ranges, turn_products) if heads else ()))
    for step in steps if between else ():
        if attempt(LEFT, step, graph, reading, options)[0]:
            forget(reading)
            reading = recognise(graph)
    while heads:
        fused, _ = attempt(LEFT, fuse_divergences, graph, reading, options)
        if not fused:
            break
        forget(reading)
        attempt("chosen rows hide the linear layer", cut_hidden, graph)  # or statistics are of all rows
        reading = recognise(graph)
    groups = _judge(reading, options)
    if not reading.taken_back:
        return reading, groups
    forget(reading)
    apart = recognise(graph, apart=True)
    groups = _judge(apart, options)
    if len(apart.taken_back) < len(reading.taken_back):
        return apart, groups
    forget(apart)
    reading = recognise(graph)
    return reading, _judge(reading, options)


def _judge(reading: Reading, options: Options) -> list[Group]:
    try:
        return judge(reading, options)
    except Exception:
        forget(reading)
        raise


def _read_functions(graph: Graph, options: Options) -> Iterator[Reading]:
    """What is read of the forwards of a graph's autograd.Functions, and of those inside."""
    for body in function_bodies(graph):
        judged, _ = attempt(LEFT, _read_and_judge, body.forward, options)
        if judged is not None:
            forget(judged[0])
            yield judged[0]
        yield from _read_functions(body.forward, options)


def _internal_error(node: Node, error: Exception | None) -> Miss:
    return make_miss(node, Reason.INTERNAL_ERROR, f"{type(error).__name__}: {error}.")


def _fuse(graph: Graph, reading: Reading, group: Group, number: int, verify: bool) -> Site:
    return _site(reading, group, number, rewrite(graph, reading, group, number, verify))


def _site(reading: Reading, group: Group, number: int, which: str) -> Site:
    read = [node for node in group.nodes if FORM not in node.meta]
    forms = [_form(value_of(reading, node), group.exprs_of(node)) for node in read]
    forms += [node.meta[FORM] for node in group.nodes if node.meta.get(FORM)]
    kept = [reading.kept[node][0] for node in group.nodes if node in reading.kept]
    kept += [node.meta[KEPT] for node in group.nodes if KEPT in node.meta]
    statistics = [name for expr in group.exprs.values() for name in statistics_of(expr)]
    location, code = user_line(headline(reading, group.nodes))
    return Site(
        location,
        code,
        "; ".join(dict.fromkeys(forms)),
        tuple(dict.fromkeys(statistics)),
        which,
        sharded=group.sharded,
        strategy=MATERIALISE,
        logits_bytes=bytes_of(group.logits.node),
        kept="; ".join(dict.fromkeys(kept)),
        id=number,
    )


def _form(value: Replaceable, exprs: tuple[sympy.Expr, ...]) -> str:
    if isinstance(value, LossValue):
        return form_of_loss(exprs[0], value.reduction.how, value.reduction.y, value.reduction.ignore_index)
    return ", ".join(map(render, exprs))


def publish(report: Report, options: Options) -> None:
    """Counters, the log, and what the user asked to happen on a miss."""
    counts = counters["inductor_ce"]
    for site in report.sites:
        counts["sites"] += 1
        log.info("%s", site_line(site))
    for miss in report.misses:
        counts["misses"] += 1
        log.info("%s", miss_line(miss))
        if options.on_miss == "warn":
            warnings.warn(miss_line(miss), stacklevel=2)
    if report.misses and options.on_miss == "raise":
        raise MissError("\n".join(map(miss_line, report.misses)))
