"""Inductor's code for a GPU, on a machine without one.

`generate(f, *args)` differentiates and lowers `f` for an H200 that is only pretended to be there, and
returns the wrappers with their Triton kernels as text. Nothing is compiled, timed or run.

NOTE The graphs are traced on the CPU and moved afterwards
Autograd asks the device's runtime for a guard, which a CPU build does not have; lowering asks for nothing
but metadata.
"""

from __future__ import annotations

import ast
import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import interpreter
import torch
import torch.utils._pytree as pytree
import triton
from torch._dynamo.device_interface import CudaInterface
from torch._functorch.aot_autograd import aot_function, make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import TracingContext, tracing
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._triton import has_triton
from triton.backends.compiler import GPUTarget

from inductor_ce.common.compat import templates

GPU = torch.device("cuda", 0)
H200 = DeviceProperties(
    type="cuda",
    index=0,
    multi_processor_count=132,
    cc=90,
    major=9,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    warp_size=32,
)
PROPERTIES = SimpleNamespace(
    name="NVIDIA H200", gcnArchName="", major=9, minor=0, multi_processor_count=132, total_memory=1 << 37
)
DRIVER = mock.Mock(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0)


@dataclass(frozen=True)
class Wrapper:
    """One generated module: the Python wrapper with its kernels."""

    text: str

    @property
    def kernels(self) -> dict[str, str]:
        """Source of each Triton kernel, by name."""
        return dict(re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", self.text, re.DOTALL))

    @property
    def code(self) -> str:
        """The text without its comments, which quote the graph."""
        return re.sub(r"^\s*#.*$", "", self.text, flags=re.MULTILINE)

    @property
    def launches(self) -> list[str]:
        """Names of the kernels in the order of their calls."""
        return re.findall(r"^\s*(triton_\w+)\.run\(", self.text, re.MULTILINE)

    def signature(self, name: str) -> dict[str, str]:
        """Triton's type of each argument of a kernel."""
        found = re.search(r"'signature': (\{.*?\})", self.kernels[name])
        assert found is not None
        return ast.literal_eval(found[1])

    @property
    def allocations(self) -> list[tuple[int, ...]]:
        """Shapes of the buffers that the wrapper allocates, a symbolic size as -1."""
        return self.allocations_of(r"\w+")

    def allocations_of(self, dtype: str) -> list[tuple[int, ...]]:
        """The same of the buffers of a dtype, by its name or a pattern of names."""
        pattern = rf"= empty_strided_cuda\(\((.*?)\), \([^()]*\), torch\.{dtype}\)"
        shapes = re.findall(pattern, self.text)
        sizes = [[size.strip() for size in shape.split(",") if size.strip()] for shape in shapes]
        return [tuple(int(size) if size.isdigit() else -1 for size in shape) for shape in sizes]


class Launch(NamedTuple):
    """How the only kernel of a wrapper is launched, and which of its arguments it has to write."""

    name: str
    source: str
    grid: tuple[int, int, int]
    arguments: list[torch.Tensor]
    written: list[torch.Tensor]


def launch_of(wrapper: Wrapper, inputs: Sequence[torch.Tensor], *outputs: torch.Tensor) -> Launch:
    """That on tensors of the caller's, and zeroed memory where it wants some for itself."""
    ((name, source),) = wrapper.kernels.items()
    names = re.search(r"^\s*(.*\S) = args$", wrapper.text, re.MULTILINE)
    launch = re.search(rf"{name}\.run\((.*), stream=", wrapper.text)
    assert names is not None
    assert launch is not None
    given = dict(zip(re.findall(r"\w+", names[1]), inputs, strict=True))
    for workspace, size in re.findall(r"(workspace_\d+) = empty_strided_cuda\(\((\d+)", wrapper.text):
        given[workspace] = torch.zeros(int(size), dtype=torch.uint8, device=inputs[0].device)
    *arguments, x, y, z = launch[1].split(", ")
    waiting = iter(outputs)
    written = {a: next(waiting) for a in dict.fromkeys(arguments) if a not in given}
    values = [(given | written)[a] for a in arguments]
    return Launch(name, source, (int(x), int(y), int(z)), values, [*written.values()])


def interpret(wrapper: Wrapper, inputs: Sequence[torch.Tensor], *outputs: torch.Tensor) -> None:
    """Run the only kernel of `wrapper` on CPU tensors, by Triton's interpreter, into what it has to write."""
    launch = launch_of(wrapper, inputs, *outputs)
    interpreter.run(launch.source, launch.name, launch.grid, launch.arguments, *launch.written)


@contextlib.contextmanager
def pretended_gpu(configuration: int = 0) -> Iterator[None]:
    """Inductor takes device "cuda" for an H200; autotuning takes the choice at `configuration`."""

    def choose(name: str, choices: list[Any], *args: Any, **kwargs: Any) -> Any:
        return choices[min(configuration, len(choices) - 1)].output_node()

    patches = [
        mock.patch.object(DeviceProperties, "create", lambda device: H200),
        mock.patch.object(triton.runtime.driver, "_active", DRIVER),
        mock.patch.object(templates, "autotune_select_algorithm", choose),
        mock.patch("torch.cuda.is_available", lambda: True),
        mock.patch("torch.cuda.is_tf32_supported", lambda *a: True),
        mock.patch("torch.cuda.current_device", lambda: 0),
        mock.patch("torch.cuda.get_device_properties", lambda *a: PROPERTIES),
        mock.patch.object(CudaInterface.Worker, "get_device_properties", lambda *a: PROPERTIES),
        mock.patch("torch.cuda.get_device_capability", lambda *a: (9, 0)),
    ]
    with contextlib.ExitStack() as stack:
        stack.callback(has_triton.cache_clear)
        for patch in patches:
            stack.enter_context(patch)
        has_triton.cache_clear()
        yield


def move_to_gpu(graph: torch.fx.GraphModule) -> list[Any]:
    """Put a traced graph on the GPU; its inputs."""

    def moved(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        with value.fake_mode:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=GPU)

    for node in graph.graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = pytree.tree_map(moved, node.meta["val"])
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": GPU}
    graph.recompile()
    return [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]


def lower_after_passes(graph: torch.fx.GraphModule, *, is_backward: bool) -> Wrapper:
    """Inductor's code for a graph as AOTAutograd gives it, which may have functions that become in place."""
    graph = _copy(graph)
    inputs = move_to_gpu(graph)
    with pretended_gpu(), V.set_fake_mode(next(i.fake_mode for i in inputs if isinstance(i, torch.Tensor))):
        post_grad_passes(graph, is_inference=False)
    graph.recompile()
    return lower(graph, is_backward=is_backward)


def lower(graph: torch.fx.GraphModule, *, is_backward: bool, configuration: int = 0) -> Wrapper:
    """Inductor's code for a graph of ATen operators, traced on the CPU, for the GPU."""
    inputs = move_to_gpu(graph)
    modes = [i.fake_mode for i in inputs if isinstance(i, torch.Tensor)]
    lowering = GraphLowering(graph, shape_env=modes[0].shape_env, is_backward=is_backward)
    handlers = (
        pretended_gpu(configuration),
        V.set_graph_handler(lowering),
        V.set_extern_kernel_nodes([]),
        V.set_fake_mode(modes[0]),
        V.set_debug_handler(DebugContext()),
    )
    with contextlib.ExitStack() as stack:
        for handler in handlers:
            stack.enter_context(handler)
        lowering.run(*inputs)
        code, *_ = lowering.codegen()
    return Wrapper(getattr(code, "value", code))


def generate(
    f: Callable[..., Any],
    *args: torch.Tensor,
    prepare_joint: Callable[[torch.fx.Graph], None] = lambda graph: None,
    configuration: int = 0,
    dynamic: bool = False,
    in_place: bool = False,
) -> list[Wrapper]:
    """The code of f(*args): [forward], or [forward, backward] where an argument wants a gradient.

    Of `args` nothing but the metadata is read, so they may be on "meta". With `dynamic`, the first dimension
    of each is symbolic. With `in_place`, functions become in place where they may, by Inductor's passes.
    """
    wrappers: dict[bool, Wrapper] = {}

    def compiler(is_backward: bool) -> Callable[..., Any]:
        def compile_one(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            if in_place:
                wrappers[is_backward] = lower_after_passes(graph, is_backward=is_backward)
            else:
                wrappers[is_backward] = lower(
                    _copy(graph), is_backward=is_backward, configuration=configuration
                )
            return make_boxed_func(graph.forward)

        return compile_one

    def partition(joint: torch.fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        prepare_joint(joint.graph)
        return min_cut_rematerialization_partition(joint, inputs, **kwargs)

    mode = FakeTensorMode(shape_env=ShapeEnv())
    compiled = aot_function(
        f,
        fw_compiler=compiler(False),
        bw_compiler=compiler(True),
        partition_fn=partition,
        decompositions=select_decomp_table(),
        dynamic=dynamic,
    )
    fakes = [_fake(mode, a, dynamic) for a in args]
    with tracing(TracingContext(mode)), mode:
        outputs = [o for o in pytree.tree_leaves(compiled(*fakes)) if o.requires_grad]
        if outputs:
            torch.autograd.backward(outputs, [torch.empty_like(o) for o in outputs])
    return [wrappers[key] for key in sorted(wrappers)]


def _copy(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    copy = torch.fx.Graph()
    copy.output(copy.graph_copy(graph.graph, {}))
    return torch.fx.GraphModule(graph, copy)


def _fake(mode: FakeTensorMode, like: torch.Tensor, dynamic: bool) -> torch.Tensor:
    stand_in = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
    first = DimDynamic.DYNAMIC if dynamic else DimDynamic.STATIC
    sizes = ([first] + [DimDynamic.STATIC] * (like.dim() - 1))[: like.dim()]
    context = StatelessSymbolicContext(dynamic_sizes=sizes)
    return mode.from_tensor(stand_in.requires_grad_(like.requires_grad), symbolic_context=context)
