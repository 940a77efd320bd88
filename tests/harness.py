"""How most tests compile: every pass of Inductor runs, and the final graphs run eagerly."""

import contextlib
import copy
import functools
import gc
import resource
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from functorch.compile import make_boxed_func
from kernels import backwards_at_once, compiled_together
from pairwise import EVERYTHING
from spared import spare
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.utils import counters
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch.fx import GraphModule
from torch.fx._lazy_graph_module import _LazyGraphModule

import inductor_ce
import inductor_ce.api.backend
import inductor_ce.api.passes
from inductor_ce import Options, Report
from inductor_ce.api.deferral import compile_deferring
from inductor_ce.api.passes import fuse_losses, publish
from inductor_ce.ops import ROW_STATS, ROW_STATS_GRAD, SOME_ROW_STATS, SOME_ROW_STATS_GRAD
from inductor_ce.ops.chunks import CHUNKS

# The operators that make statistics, of all rows or of those that count.
STATISTICS = ROW_STATS, SOME_ROW_STATS, ROW_STATS_GRAD, SOME_ROW_STATS_GRAD

# Where a process has had as much memory (KiB), what tests left is collected.
ENOUGH = 18 << 18

# NOTE: classes of graph modules
# Each graph module has a class of its own, and for each trace FX sets these two of nn.Module, upon which
# Python goes through all classes below but those that have their own. Here go the classes of earlier tests.
SET_BY_TRACES = ("__call__", "__getattr__")
ASIDE = {
    kind: type("Aside", (kind,), {name: getattr(torch.nn.Module, name) for name in SET_BY_TRACES})
    for kind in (GraphModule, _LazyGraphModule)
}


def collect_seldom() -> None:
    """No garbage collection looks at what is there now, which stays; nor, but where one test makes very much,
    at what tests leave: see `set_aside`. Looking at all of it takes a tenth of a run."""
    gc.collect()
    gc.freeze()
    gc.enable()
    gc.set_threshold(500_000, 20, 20)


def set_aside() -> None:
    """What a test left is collected once memory is short, and until then by none of the collections that
    tests ask for, which take the less for it."""
    global ENOUGH
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if peak > ENOUGH:
        gc.unfreeze()
        gc.collect()
        ENOUGH = peak + (1 << 19)
    gc.freeze()
    for kind, aside in ASIDE.items():
        for own in kind.__subclasses__():
            if own.__qualname__.endswith(".GraphModuleImpl"):
                own.__bases__ = (aside,)


@contextlib.contextmanager
def clean_slate():
    """Nothing compiled, nothing installed, no counts; graphs are not cached, so passes run in every test.

    Kernels are: the same text gives the same machine code, whichever test or rank asks for it first. Dynamo
    does not collect garbage after each compilation, 10 ms, nor do more for it than is compiled: see `spared`.
    """
    spare()
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    with (
        torch._inductor.config.patch(fx_graph_cache=False, fx_graph_remote_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
        torch._dynamo.config.patch(run_gc_after_compile=False),
        compiled_together(),
    ):
        yield
    inductor_ce.uninstall()
    set_aside()


@contextlib.contextmanager
def without_codegen() -> Iterator[None]:
    """Within the block, what is compiled for Inductor runs as the graph that its passes made."""
    graphs = functools.partial(compile_fx, inner_compile=Graphs().inner_compile)
    with (
        mock.patch.object(torch._inductor.compile_fx, "compile_fx", graphs),
        mock.patch.object(inductor_ce.api.backend, "compile_fx", graphs),
    ):
        yield


class Graphs:
    """A torch.compile backend that runs Inductor's passes and keeps the final graphs, before code if any.

    `report` is what the pass over losses told of each graph, and then of those inside it; without plans.
    """

    def __init__(self, code: bool = False) -> None:
        self.code = code
        self.final: list[GraphModule] = []
        self.report = Report()

    def inner_compile(
        self, gm: GraphModule, example_inputs: Sequence[Any], **kwargs: Any
    ) -> Callable[..., Any]:
        self.final.append(copy.deepcopy(gm) if self.code else gm)
        if self.code:
            return compile_fx_inner(gm, example_inputs, **kwargs)
        return make_boxed_func(gm.forward)

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        found: list[Report] = []

        def published(report: Report, options: Options) -> None:
            found.append(report)
            publish(report, options)

        with (
            mock.patch.object(inductor_ce.api.passes, "publish", published),
            backwards_at_once() if self.code else contextlib.nullcontext(),
        ):
            compiled = compile_fx(gm, example_inputs, inner_compile=self.inner_compile)
        for report in [*found[-1:], *found[:-1]]:  # the graphs inside come first to the pass
            self.report.add(report)
        return compiled

    @property
    def nodes(self) -> list[torch.fx.Node]:
        return [node for gm in self.final for node in gm.graph.nodes]

    def count(self, op: Any) -> int:
        return sum(node.target == op for node in self.nodes)

    @property
    def pieces(self) -> int:
        """How often statistics are made, of all rows or of those that count."""
        rolled = (node.args[8] for node in self.nodes if node.target == CHUNKS)
        return sum(self.count(op) for op in STATISTICS) + sum(map(len, rolled))


class Rewritten:
    """A torch.compile backend that runs the torch-level graphs as the rewrite leaves them.

    Gradients come by the operators' own backward. No pass of AOTAutograd or Inductor runs, so this is for
    what a loss is read and rewritten as; `report` is that of the graphs that run.
    """

    def __init__(self, **options: Any) -> None:
        self.options = Options(**{"min_vocab": 2, **options})
        self.report = Report()
        self.final: list[GraphModule] = []
        self.changed = False

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        for module in gm.modules():
            if isinstance(module, GraphModule):
                self._rewrite(module)
        return gm.forward

    def _rewrite(self, module: GraphModule) -> None:
        before = str(module.graph)
        with enable_python_dispatcher():  # as Inductor calls its passes
            found = fuse_losses(module.graph, self.options)
        self.changed |= str(module.graph) != before
        module.graph.lint()
        module.recompile()
        publish(found, self.options)
        self.report.add(found)
        self.final.append(module)

    def count(self, op: Any) -> int:
        return sum(node.target == op for gm in self.final for node in gm.graph.nodes)


def compile_without_codegen(f: Callable[..., Any], *, dynamic: bool | None = None, **options: Any):
    """(f compiled with inductor_ce installed under `options`, its Graphs). min_vocab is 2 unless given.

    The installation stays until the test ends.
    """
    inductor_ce.install(**{"min_vocab": 2, **options})
    graphs = Graphs()
    return torch.compile(f, backend=graphs, dynamic=dynamic), graphs


def compile_rewritten(f: Callable[..., Any], *, dynamic: bool | None = None, **options: Any):
    """(f compiled as the rewrite leaves it, its `Rewritten`): for what needs no pass thereafter, in a quarter
    of the time. With ALL=1 they run too, as in `compile_without_codegen`."""
    if EVERYTHING:
        return compile_without_codegen(f, dynamic=dynamic, **options)
    inductor_ce.install(**{"min_vocab": 2, **options})  # for explain
    rewritten = Rewritten(**options)
    return torch.compile(f, backend=rewritten, dynamic=dynamic), rewritten


def compile_lazily(f: Callable[..., Any], *, dynamic: bool | None = None, **options: Any):
    """The same, with logits that are returned lazily."""
    options = {"min_vocab": 2, **options}
    inductor_ce.install(**options)
    graphs = Graphs()

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return compile_deferring(gm, example_inputs, graphs, inductor_ce.Options(**options), {})

    return torch.compile(f, backend=backend, dynamic=dynamic), graphs


def compile_with_codegen(f: Callable[..., Any], **options: Any):
    """The same, but what runs is Inductor's code."""
    inductor_ce.install(**{"min_vocab": 2, **options})
    graphs = Graphs(code=True)
    return torch.compile(f, backend=graphs), graphs


def sites() -> int:
    return counters["inductor_ce"]["sites"]


def misses() -> int:
    return counters["inductor_ce"]["misses"]
