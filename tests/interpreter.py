"""Generated Triton kernels: run on CPU tensors by Triton's interpreter, or compiled and not run.

Triton decides when it is imported whether it interprets, so interpretation has a process of its own.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import multiprocessing
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
import triton.language as tl
import triton.runtime.interpreter


def load_kernel(source: str, name: str) -> Any:
    """The Triton function `name` of a generated kernel, without Inductor's launcher."""
    plain = re.sub(r"@triton_heuristics\.\w+\(.*?\n\)\n(?=@triton\.jit)", "", source, flags=re.DOTALL)
    with tempfile.NamedTemporaryFile("w", suffix=".py", delete=False) as file:
        file.write(plain)
    spec = importlib.util.spec_from_file_location(name, file.name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def triton_ir(source: str, name: str, signature: dict[str, str]) -> str:
    """What Triton makes of a kernel for an H200, before it is given a layout. Refused code raises."""
    kernel = triton.compile(
        triton.compiler.ASTSource(load_kernel(source, name), signature),
        target=triton.backends.compiler.GPUTarget("cuda", 90, 32),
    )
    return kernel.asm["ttir"]


def compiles(kernel: Any, types: dict[str, str], **constants: int) -> bool:
    """Whether Triton makes a binary for an H200. What is not named in `types` is a number."""
    kernel = getattr(kernel, "function", kernel)  # behind what launches it
    types = {name: types.get(name, "constexpr" if name in constants else "i32") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = triton.compiler.ASTSource(kernel, types, constexprs=places)
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    return "cubin" in triton.compile(source, target=target).asm


def run(
    source: str,
    name: str,
    grid: tuple[int, ...],
    arguments: list[Any],
    *outputs: torch.Tensor,
    order: Sequence[int] | None = None,
) -> None:
    """Launch kernel `name`; each of `outputs` is one of its arguments.

    Its programs run one after another, by their numbers, or in an `order` of these.
    """
    places = [next(i for i, a in enumerate(arguments) if a is output) for output in outputs]
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        results = _process().submit(_run, source, name, grid, arguments, places, order).result()
    for output, result in zip(outputs, results, strict=True):
        output.copy_(result)


def call(module: str, name: str, *arguments: Any) -> list[Any]:
    """The arguments after a call of a function that launches kernels and returns nothing."""
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        return _process().submit(_call, module, name, list(arguments)).result()


@functools.cache
def _process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


def _run(
    source: str,
    name: str,
    grid: tuple[int, ...],
    arguments: list[Any],
    places: list[int],
    order: Sequence[int] | None,
) -> Any:
    with _only_in([a for a in arguments if isinstance(a, torch.Tensor)]), _in_order(order):
        kernel = load_kernel(source, name)
        kernel.fn.__globals__.update(range=_range, libdevice=_Libdevice)
        kernel[grid](*arguments)
    return [arguments[place] for place in places]


def _call(module: str, name: str, arguments: list[Any]) -> list[Any]:
    known = [a for a in arguments if isinstance(a, torch.Tensor)]
    new_empty = torch.Tensor.new_empty

    def room(*like: Any, **options: Any) -> torch.Tensor:
        made = new_empty(*like, **options).fill_(77)
        known.append(made)
        return made

    with _only_in(known), mock.patch.object(torch.Tensor, "new_empty", room):
        getattr(importlib.import_module(module), name)(*arguments)
    return arguments


class _Libdevice:
    """What generated kernels call of a library that an interpreter does not have."""

    @staticmethod
    def fast_expf(x: Any) -> Any:
        return tl.exp(x)

    @staticmethod
    def fast_dividef(x: Any, y: Any) -> Any:
        return x / y

    @staticmethod
    def tanh(x: Any) -> Any:
        return (2.0 * tl.sigmoid(2.0 * x.to(tl.float64)) - 1.0).to(x.dtype)


def _range(*bounds: Any) -> Iterator[Any]:
    """A loop of a generated kernel, over tensors, as a compiler has it."""
    for i in range(*bounds):
        handle = triton.runtime.interpreter.TensorHandle(np.array([i], dtype=np.int32), tl.int32)
        yield tl.core.tensor(handle, tl.int32)


@contextlib.contextmanager
def _in_order(order: Sequence[int] | None) -> Iterator[None]:
    """The n-th program of a grid of one dimension is order[n]."""
    builder = triton.runtime.interpreter.interpreter_builder
    begin = builder.set_grid_idx

    def begin_another(x: int, *others: int) -> None:
        begin(x if order is None else order[x], *others)

    with mock.patch.object(builder, "set_grid_idx", begin_another):
        yield


@contextlib.contextmanager
def _only_in(arguments: list[torch.Tensor]) -> Iterator[None]:
    """Refuse to read or write anything but the storages of `arguments`, which a GPU might not notice.

    More may be added to them meanwhile.
    """
    builder = triton.runtime.interpreter.interpreter_builder

    def checked(access: Callable[..., Any], mask_at: int) -> Callable[..., Any]:
        def check(pointers: Any, *args: Any, **how: Any) -> Any:
            mask = args[mask_at]  # of a tile it is an array; it may be of ones and zeros
            if not isinstance(mask, np.ndarray):
                mask.data = mask.data.astype(bool)  # the only ones that Triton 3.9 takes
            used = pointers.data[(mask if isinstance(mask, np.ndarray) else mask.data).astype(bool)]
            storages = [a.untyped_storage() for a in arguments]
            bounds = [(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages]
            inside = [(used >= first) & (used < end) for first, end in bounds]
            assert np.logical_or.reduce(inside).all(), "out of bounds"
            return access(pointers, *args, **how)

        return check

    patch_tensor = triton.runtime.interpreter._patch_lang_tensor

    def with_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)  # it has numbers as arrays, of which NumPy makes no index
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    with (
        mock.patch.object(triton.runtime.interpreter, "_patch_lang_tensor", with_index),
        mock.patch.object(builder, "create_masked_load", checked(builder.create_masked_load, 0)),
        mock.patch.object(builder, "create_masked_store", checked(builder.create_masked_store, 1)),
    ):
        yield
