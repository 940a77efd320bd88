"""What torch does in each compilation for logs, devices and checks of its own, and tests are spared.

What is compiled is the same; on a machine with a GPU, so is what is done for it.
"""

from __future__ import annotations

import functools
import logging
import traceback
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from networkx.algorithms.flow import boykov_kolmogorov, maxflow
from torch._decomp.decompositions_for_rng import PhiloxStateTracker
from torch._dynamo import guards
from torch._functorch._aot_autograd import graph_compile
from torch._inductor import cpu_vec_isa, utils
from torch._inductor.codegen import common
from torch._inductor.dtype_propagation import DtypePropagationOpsHandler
from torch._subclasses import fake_tensor
from torch.utils import _pytree

users_record = torch._dynamo.utils.record_compilation_metrics
users_rules = DtypePropagationOpsHandler.__init__
every_kind_of_vectors = cpu_vec_isa.valid_vec_isa_list.__wrapped__


@functools.cache
def spare() -> None:
    """From now on, in this process."""
    _logs()
    _vectors()
    _random_numbers()
    _asked_once()
    _cuts()


def _replace(where: Any, name: str, by: Any) -> None:
    """Where this release has it."""
    if hasattr(where, name):
        setattr(where, name, by)


def _logs() -> None:
    """Dynamo neither measures how long guards take, for which it would flush the processor's caches, nor
    keeps a record of each compilation with all options: 25 and 2 ms. AOTAutograd makes no text of its graphs
    for a log that nobody reads: 3 ms of 150. Modes of fake tensors do not know by whom they were made."""
    torch._logging._internal.trace_log = logging.Logger("torch.__trace")  # of which pytest does not know
    _replace(guards, "profile_guard_manager", lambda *_: 0.0)
    _replace(torch._dynamo.utils, "record_compilation_metrics", lambda *_, **__: None)
    _replace(graph_compile, "_log_joint_graph", lambda *_: None)
    _replace(graph_compile, "_log_fw_bw_graphs", lambda *_: (None, None))
    fake_tensor.traceback = SimpleNamespace(**{**vars(traceback), "extract_stack": list})


def _vectors() -> None:
    """That a library made for this processor can be loaded is not seen in a process of its own, for every
    process that asks: 1 s. And of its kinds of vectors those are not looked for that nobody asks for, 6 s
    where no library was made yet."""
    _replace(cpu_vec_isa.VecISA, "_probe_load", lambda *_: True)
    cpu_vec_isa.valid_vec_isa_list = best_vectors


def _random_numbers() -> None:
    """Devices that are not there have no seed, for which torch would keep a trace each time: 1 % of all. Nor
    has a compilation states of random numbers, but where graphs are to hold them: 1 % as well."""
    for device in (torch.cuda, torch.xpu, torch.mtia):
        if not device.is_available():
            device.manual_seed_all = lambda seed: None
    reset = PhiloxStateTracker.reset
    PhiloxStateTracker.reset = lambda: torch._functorch.config.functionalize_rng_ops and reset()


def _asked_once() -> None:
    """Whether a class is a named tuple is asked ten thousand times a compilation, and answered once: 3 %. The
    one handler of dtypes is not made anew for each kernel, unless there are more rules."""
    _replace(_pytree, "is_namedtuple_class", functools.lru_cache(1000)(_pytree.is_namedtuple_class))
    make = functools.cache(lambda handler, *counts: users_rules(handler))
    rules = utils.op_dtype_propagation_rules, common.pointwise_overrides_data
    DtypePropagationOpsHandler.__init__ = lambda handler: make(handler, *map(len, rules))


def _cuts() -> None:
    """Of what a forward saves the smallest cut that is nearest to the backward is found, which is one and the
    same by whatever algorithm: by one that takes a third of the time, 2 % of all."""
    maxflow.default_flow_func = boykov_kolmogorov


@functools.cache
def best_vectors() -> list[cpu_vec_isa.VecISA]:
    """The first of the kinds of vectors for which libraries can be made here, which is that one uses."""
    for kind in cpu_vec_isa.supported_vec_isa_list:
        with mock.patch.object(cpu_vec_isa, "supported_vec_isa_list", [kind]):
            found = every_kind_of_vectors()
        if found:
            return found
    return []


def known_to_children() -> dict[str, str]:
    """What of the environment spares a process of its own to look, 1 s each, whether libraries made for this
    processor can be loaded; nothing where some cannot be made."""
    with torch._inductor.config.patch({"cpp.vec_isa_ok": True}):
        named = every_kind_of_vectors()
    return {"TORCHINDUCTOR_VEC_ISA_OK": "1"} if named[:1] == best_vectors() else {}
