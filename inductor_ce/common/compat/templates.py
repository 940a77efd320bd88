"""Triton templates of Inductor's: how they are made and chosen, and what may be fused into them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from sympy import sympify

from .inductor import IRNode
from .loops import buffer_of
from .versions import of_supported_torch

with of_supported_torch():
    from torch._inductor import ir
    from torch._inductor.codegen.common import WorkspaceArg, WorkspaceZeroMode
    from torch._inductor.select_algorithm import (
        SymbolicGridFn,
        TritonTemplate,
        TritonTemplateKernel,
        autotune_select_algorithm,
    )
    from torch._inductor.virtualized import V as virtualized


class _Kernel(TritonTemplateKernel):
    """A template's kernel, into which several loops may be fused that make one input after another.

    They are rendered at each place that reads the last one's. Inductor takes the second time for a read of
    memory by the others, keeps that, and frees it, though nobody has allocated it.
    """

    def remove_kernel_local_buffers(self) -> None:
        made_by = virtualized.graph.scheduler.name_to_buf if virtualized.graph.scheduler else {}
        within, count = set(self.prologue_fused_inputs), 0
        while count < len(within):
            count = len(within)
            for name in self.must_keep_buffers & self.store_buffer_names & made_by.keys():
                readers: list[Any] = [user.node for user in made_by[name].users]
                if all(within.issuperset(reader.get_buffer_names()) for reader in readers):
                    within.add(name)
        self.must_keep_buffers -= within
        super().remove_kernel_local_buffers()


class _Template(TritonTemplate):
    kernel_type = _Kernel


def template(name: str, source: str, grid: Callable[..., tuple[Any, Any, Any]]) -> TritonTemplate:
    """The template `name`, made by the first call: up to 2.13 a second one of a name is refused."""
    known = TritonTemplate.all_templates.get(name)
    return known or _Template(name=name, source=source, grid=SymbolicGridFn(grid))


def choose(
    source: TritonTemplate,
    inputs: Sequence[IRNode],
    layout: ir.Layout,
    call_sizes: Sequence[Any],
    configurations: Sequence[dict[str, Any]],
    over: IRNode | None = None,
    written: Sequence[IRNode] = (),
    zeroed_bytes: Any = None,
    **constants: Any,
) -> IRNode:
    """The output of `source` under the fastest of `configurations`, or the first where none can be timed.

    All have the `constants` beside.

    It is written over `over`, where that is given: a value that it `may_overwrite`. Of the inputs those in
    `written` are results too. The template has so many `zeroed_bytes` for itself, at `ws_ptr`.
    """
    if over is not None:
        # What has been lowered but not realised may read it: realise that first, as it was lowered first.
        virtualized.graph.mark_buffer_mutated(over.get_name())
    given: dict[str, Any] = {"input_nodes": tuple(inputs), "layout": layout, "call_sizes": list(call_sizes)}
    if written:
        given["mutated_inputs"] = list(written)
    if zeroed_bytes is not None:
        given["workspace_arg"] = _zeroed(zeroed_bytes, inputs[0].get_device_or_error())
    choices: list[Any] = []
    for configuration in configurations:
        refused = source.maybe_append_choice(choices, **given, **configuration, **constants)
        if refused is not None:
            raise refused
    node = _fastest(source.name, choices, list(inputs), layout)
    if over is None:
        return node
    buffer_of(node).layout = ir.MutationLayoutSHOULDREMOVE(over)
    return ir.TensorBox(over)


def _fastest(name: str, choices: list[Any], inputs: list[IRNode], layout: ir.Layout) -> IRNode:
    """The output of the fastest choice.

    NOTE return_multi_template
    Deferred selection would time the fusions as well and may decide against one. Here a fusion always saves a
    pass over [N, V].
    """
    try:
        best = autotune_select_algorithm(name, choices, inputs, layout, return_multi_template=False)
    except torch.OutOfMemoryError:
        best = choices[0].output_node()
    return best[0] if isinstance(best, tuple) else best  # (node, choice) from 2.12


def _zeroed(count: Any, device: torch.device) -> WorkspaceArg:
    """So many bytes of memory, zeroed before each launch."""
    mode, name = WorkspaceZeroMode.ZERO_ON_CALL, WorkspaceArg.unique_name()
    return WorkspaceArg(count=sympify(count), zero_mode=mode, device=device, outer_name=name)
