"""The kernels of a forward and its backward are compiled together: g++ reads torch's headers, and links its
libraries, once for all, half a second each.

Their texts stay the same, each as a module of its own in a library for several. They are not optimised, nor
do they know their lines, and the linker is the fast one: in half the time. With ALL=1 they are compiled as
those of users.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any
from unittest import mock

from pairwise import EVERYTHING
from torch._functorch import config as functorch_config
from torch._inductor import cpp_builder
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import CppPythonBindingsCodeCache, LambdaFuture

# What the text of each kernel defines.
NAMES = ("kernel", "kernel_py", "PyInit_kernel", "parse_arg", "py_methods", "py_module")
NAMES += ("_torchinductor_pyobject_tensor_data_ptr",)

load_alone = CppPythonBindingsCodeCache.load_async.__func__
wait_for_others = AsyncCompile.wait
users_flags = getattr(cpp_builder, "_get_optimization_cflags", None)

_modules: dict[tuple[str, str], ModuleType] = {}  # by the text, and how it is compiled


def quickly() -> contextlib.AbstractContextManager[Any]:
    """Within the block g++ does not optimise, but with ALL=1."""
    if EVERYTHING or users_flags is None:
        return contextlib.nullcontext()
    return mock.patch.object(cpp_builder, "_get_optimization_cflags", _flags)


def _flags(*args: Any) -> tuple[list[str], list[str]]:
    flags, for_linking = users_flags(*args)
    return ["O0" if flag == "O3" else flag for flag in flags if flag != "g1"], for_linking + _linker()


@functools.cache
def _linker() -> list[str]:
    """gold, which takes a third of the time of the usual one, where it finds the compiler's libraries."""
    with tempfile.NamedTemporaryFile(suffix=".so") as made:
        flags = ["-shared", "-fuse-ld=gold", "-xc++", os.devnull, "-o", made.name]
        linked = subprocess.run([cpp_builder.get_cpp_compiler(), *flags], capture_output=True, check=False)
    return [] if linked.returncode else ["fuse-ld=gold"]


def joined(texts: Sequence[str]) -> str:
    """One text of several, of which all but the first have names with a number."""
    includes = dict.fromkeys(re.findall(r"^ *#include.*$", "\n".join(texts), re.MULTILINE))
    parts = [*includes, texts[0]]
    for number, text in enumerate(texts[1:], 1):
        parts += [f"#define {name} {name}_{number}" for name in NAMES]
        parts += [text, *(f"#undef {name}" for name in NAMES)]
    return "\n".join(parts)


def modules_of(library: ModuleType, count: int) -> Iterator[ModuleType]:
    yield library
    for number in range(1, count):
        spec = importlib.util.spec_from_file_location(f"{library.__name__}_{number}", library.__file__)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


@dataclass
class Together:
    """Kernels that are asked for, compiled when the first of them is needed."""

    waiting: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)

    def load(self, cls: Any, text: str, device: str = "cpu", **how: Any) -> Callable[[], ModuleType]:
        if cls is not CppPythonBindingsCodeCache or how.get("optimized_code") is not None:
            return load_alone(cls, text, device, **how)
        how = {"device_type": device, **how, "submit_fn": None}
        key = text, repr(how)
        if key not in _modules:
            self.waiting[key] = how
        return lambda: self.module(key)

    def module(self, key: tuple[str, str]) -> ModuleType:
        if key not in _modules:
            how = self.waiting[key]
            alike = [other for other in self.waiting if other[1] == key[1]]
            for other in alike:
                del self.waiting[other]
            library = load_alone(CppPythonBindingsCodeCache, joined([text for text, _ in alike]), **how)()
            _modules.update(zip(alike, modules_of(library, len(alike)), strict=True))
        return _modules[key]


class Late(LambdaFuture):
    """A kernel of a CPU; on a GPU Inductor has futures of its own."""


def _cpp_pybinding(self: AsyncCompile, argtypes: list[str], text: str) -> Late:
    return Late(CppPythonBindingsCodeCache.load_pybinding_async(argtypes, text))


def _wait(self: AsyncCompile, scope: dict[str, Any]) -> None:
    """Kernels are not waited for: whichever is called first has all compiled that were asked for by then."""
    late = {name: kernel for name, kernel in scope.items() if isinstance(kernel, Late)}
    for name in late:
        del scope[name]
    wait_for_others(self, scope)
    scope.update({name: functools.partial(_first, scope, name, kernel) for name, kernel in late.items()})


def _first(scope: dict[str, Any], name: str, kernel: Late, *args: Any) -> None:
    scope[name] = kernel.result()
    scope[name](*args)


def backwards_at_once() -> contextlib.AbstractContextManager[None]:
    """What is compiled within the block has its backward compiled then, not when it first runs."""
    return functorch_config.patch(force_non_lazy_backward_lowering=True)


@contextlib.contextmanager
def compiled_together() -> Iterator[None]:
    """Within the block they are, once one of them is called."""
    together = Together()

    def load(cls: Any, *args: Any, **how: Any) -> Callable[[], ModuleType]:
        return together.load(cls, *args, **how)

    with (
        mock.patch.object(CppPythonBindingsCodeCache, "load_async", classmethod(load)),
        mock.patch.object(AsyncCompile, "cpp_pybinding", _cpp_pybinding),
        mock.patch.object(AsyncCompile, "wait", _wait),
        quickly(),
    ):
        yield
