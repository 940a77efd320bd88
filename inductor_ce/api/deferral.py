"""Round `compile_fx`: returned logits leave a graph before it is compiled and come back lazy when it runs."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from ..common.compat import graphs
from ..common.compat.dynamo import is_captured, is_to_be_saved, leave_alone
from ..common.compat.graphs import keep_dynamic
from ..common.compat.inductor import LOSS_PASSES, inductor_config, is_on, uses_cudagraphs
from ..common.failsafe import attempt
from ..common.options import LAZY, Options
from ..distributed import local_logits
from ..distributed.local_logits import LocalLogits
from ..graph.walk import graphs_within
from ..reading import row_views
from ..rewriting import recipes
from ..rewriting.edits import make_layers_functional
from ..rewriting.promises import FACT, Promise, promise
from ..rewriting.recipes import Recipe
from . import (
    lazy_functions,
    lazy_logits,
    lazy_memory,
    lazy_nodes,
    lazy_questions,
    lazy_source,
    lazy_trees,
)
from .lazy_inputs import made_inside, taken_apart
from .lazy_logits import LazyLogits
from .lazy_source import Source
from .pass_slots import LOSSES_SLOT, passes_in
from .passes import FuseLosses, fuse_losses, publish, read_aten
from .report import Report
from .telling import is_told, telling


@dataclass(frozen=True)
class _Lazy:
    """How one result is put together: a recipe, and for each part whether it is a result, and its number.

    `is_shared` says that another result is in the same memory.
    """

    place: int
    recipe: Recipe
    spread: LocalLogits | None
    parts: tuple[tuple[bool, int], ...]
    is_shared: bool

    def made(self, part: Callable[[bool, int], Tensor], given: list[tuple[Tensor, int]]) -> Tensor:
        parts = [part(*where) for where in self.parts]
        shared = given if self.is_shared else None
        if self.spread is None:
            return LazyLogits.returned(Source(self.recipe, parts), shared)
        of = Source(self.recipe, self.spread.parts(parts), watched=parts)
        return self.spread.whole(LazyLogits.returned(of, shared))


def compile_deferring(
    module: GraphModule,
    inputs: Sequence[Any],
    compile: Callable[..., Any],
    options: Options,
    patches: dict[str, Any],
) -> Callable[..., Any]:
    """compile(module, inputs), with what is fused told, and logits that need not be there returned lazily.

    Here, and not in the pass that fuses, which Inductor's caches spare a warm machine.

    Args:
        module: as Dynamo captured it.
        inputs: examples of its inputs.
        compile: `compile_fx`, which compiles it.
        options: in force.
        patches: of Inductor's configuration, under which it compiles.
    """
    module, inputs, apart = taken_apart(module, inputs)
    report, finish = Report(), None
    if is_on(LOSS_PASSES, patches):
        report, finish = read_and_defer(module, options, uses_cudagraphs(patches))
    publish(report, options)
    with telling(), made_inside(inputs):
        compiled = compile(module, inputs)
    if apart is None and finish is None:
        return compiled

    def run(*args: Any) -> Sequence[Any]:
        given = args if apart is None else apart.flattened(args)
        results = compiled(*given)
        results = results if finish is None else finish(given, results)
        return results if apart is None else apart.finished(args, results)

    return run


def deferring(
    compile_fx: Callable[..., Any], missing: Callable[[dict[str, Any]], dict[str, Any]]
) -> Callable[..., Any]:
    """`compile_fx` for graphs that Dynamo captured under an installation, and as it was for any other.

    Args:
        compile_fx: Inductor's.
        missing: what the configuration of this thread lacks, under patches of it, of what is installed.
    """

    @functools.wraps(compile_fx)
    def compile_with_promises(model_: Any, example_inputs_: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(model_, GraphModule) or not is_captured(model_) or is_told():
            return compile_fx(model_, example_inputs_, *args, **kwargs)
        patches = kwargs.get("config_patches") or {}
        if lacking := missing(patches):
            patches = kwargs["config_patches"] = {**patches, **lacking}
        options = options_in_force(patches)
        if options is None:
            return compile_fx(model_, example_inputs_, *args, **kwargs)
        again = functools.partial(_with_arguments, compile_fx, args, kwargs)
        return compile_deferring(model_, example_inputs_, again, options, patches)

    return compile_with_promises


def _with_arguments(f: Any, args: Any, kwargs: Any, module: Any, inputs: Any) -> Any:
    return f(module, inputs, *args, **kwargs)


def options_in_force(patches: dict[str, Any]) -> Options | None:
    """Those of the pass that Inductor's configuration has in this thread, under these patches of it."""
    slot = patches.get(LOSSES_SLOT, getattr(inductor_config, LOSSES_SLOT))
    return next((p.options for p in passes_in(slot) if isinstance(p, FuseLosses)), None)


def read_and_defer(
    module: GraphModule, options: Options, copies: bool = False
) -> tuple[Report, Callable[..., Any] | None]:
    """What is fused in a captured graph, and what its compiled results are to be put through, if anything.

    Where logits that are returned can be lazy, the graph returns what they are made of instead.
    """
    report = Report()
    finish = None
    may_be_lazy = options.returned_logits == LAZY and not options.verify and not is_to_be_saved()
    for inner in graphs_within(module):
        attempt("operators of ATen are not read", read_aten, inner.graph)
        if inner is module and may_be_lazy:
            attempt("edits in place stay as they are", make_layers_functional, inner.graph, options.min_vocab)
        fused, twins = copied(inner)
        found = fuse_losses(fused, options, itertools.count())
        if inner is module and may_be_lazy:
            finish, _ = attempt("returned logits are kept", _defer, module, fused, twins, options, copies)
            if found.sites and any(FACT in node.meta for node in module.graph.nodes):
                # Read again, for what is told of them now.
                found = fuse_losses(copied(module)[0], options, itertools.count())
        report.add(found)
    return report, finish


def _defer(
    module: GraphModule, fused: Graph, twins: dict[Node, Node], options: Options, copies: bool
) -> Callable[..., Any] | None:
    promised = promise(module.graph, fused, twins, options.min_vocab)
    finish = _returning_parts(module, promised.promises, copies) if promised.promises else None
    promised.tell()
    return finish


def _returning_parts(
    module: GraphModule, promises: Sequence[Promise], copies: bool
) -> Callable[..., tuple[Any, ...]]:
    """Let a graph return the parts of what is promised. Returns what its results are put through."""
    keep_for_python()
    output = module.graph.output_node()
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    results: list[Any] = list(output.args[0])  # type: ignore[arg-type]
    places = {p.place for p in promises}
    kept: list[Any] = [r for i, r in enumerate(results) if i not in places]
    lazy = []
    for each in promises:
        parts = []
        for part in each.found.parts:
            if part in inputs:
                parts.append((False, inputs.index(part)))
                continue
            if part not in kept:
                kept.append(part)
            parts.append((True, kept.index(part)))
        found = each.found
        lazy.append(_Lazy(each.place, found.recipe, found.spread, tuple(parts), each.is_shared))
    output.args = (tuple(kept),)
    module.recompile()
    return functools.partial(_finished, len(results), tuple(lazy), copies)


@functools.cache
def keep_for_python() -> None:
    """Let Dynamo compile nothing of lazy logits by itself, where programs use them between graphs."""
    ours = lazy_logits, lazy_functions, lazy_memory, lazy_nodes, lazy_questions, lazy_source, lazy_trees
    for module in (graphs, *ours, row_views, recipes, local_logits):
        leave_alone(module)


def _finished(
    count: int, lazy: tuple[_Lazy, ...], copies: bool, inputs: Sequence[Any], results: Sequence[Any]
) -> tuple[Any, ...]:
    """The results that the program is given: of CUDA graphs, which write over theirs, `copies`."""
    owned: dict[int, Tensor] = {}

    def part(is_result: bool, number: int) -> Tensor:
        if not is_result:
            return inputs[number]
        if number not in owned:
            owned[number] = _copied(results[number]) if copies else results[number]
        return owned[number]

    given: list[tuple[Tensor, int]] = []
    made = {each.place: each.made(part, given) for each in lazy}
    others = iter(results)
    return tuple(made[i] if i in made else next(others) for i in range(count))


def _copied(result: Tensor) -> Tensor:
    made = result.clone()
    keep_dynamic(result, made, dims=result.ndim)
    return made


def copied(module: GraphModule) -> tuple[Graph, dict[Node, Node]]:
    """The graph of a module, to be rewritten without the module noticing, and each node's twin in it."""
    graph = Graph(owning_module=module)
    twins: dict[Node, Node] = {}
    graph.output(graph.graph_copy(module.graph, twins))
    twins[module.graph.output_node()] = graph.output_node()
    return graph, twins
