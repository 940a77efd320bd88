"""Generated Triton kernels: run on CPU tensors by Triton's interpreter, or compiled and not run.

Triton decides when it is imported whether it interprets, so interpretation has a process of its own.
"""

from __future__ import annotations

import functools
import importlib.util
import multiprocessing
import os
import re
import tempfile
from concurrent.futures import ProcessPoolExecutor
from typing import Any
from unittest import mock

import torch
import triton


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


def run(
    source: str, name: str, grid: tuple[int, ...], arguments: list[torch.Tensor], output: torch.Tensor
) -> None:
    """Launch kernel `name`; `output` is one of its arguments."""
    index = next(i for i, a in enumerate(arguments) if a is output)
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        result = _process().submit(_run, source, name, grid, arguments, index).result()
    output.copy_(result)


@functools.cache
def _process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


def _run(source: str, name: str, grid: tuple[int, ...], arguments: list[torch.Tensor], index: int) -> Any:
    load_kernel(source, name)[grid](*arguments)
    return arguments[index]
