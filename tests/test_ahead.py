"""Kernels that are compiled while the code that launches them is generated."""

from __future__ import annotations

import inspect
import itertools
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import gpu_codegen
import pytest
import sympy
import torch
import torch._inductor.config
import torch.nn.functional as F
from harness import compile_without_codegen
from test_one_read import of_cross_entropy
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule

from inductor_ce.api.backend import inductor_ce_backend
from inductor_ce.common import failsafe
from inductor_ce.common.compat import launches
from inductor_ce.common.compat.stand_ins import stand_ins
from inductor_ce.heads import skip
from inductor_ce.ops import (
    ahead,
    chunks,
    counted,
    counted_kernels,
    label_kernels,
    label_products,
    launch,
    lowering,
    one_read_kernel,
    product_kernels,
    products,
)

N, V, D = 320, 1024, 64


def loss(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy((h @ w.t()).float(), y)


def given(n: int = N, device: str = "cpu") -> list[Tensor]:
    h, w = (torch.randn(size, D, dtype=torch.bfloat16, device=device) for size in (n, V))
    y = torch.randint(0, V, (n,), device=device)
    y[::3] = -100
    return [h.requires_grad_(), w.requires_grad_(), y]


@pytest.fixture
def asked() -> Iterator[list[tuple[Any, ...]]]:
    """What threads are to compile: the name, the device, the grid, the arguments, the options, the thread."""
    made: list[tuple[Any, ...]] = []

    def compile_ahead(function: Any, *others: Any) -> None:
        made.append((function.fn.__name__, *others, threading.current_thread()))

    with (
        mock.patch.object(launches, "compile_ahead", compile_ahead),
        mock.patch.object(ahead, "attempt", lambda what, step, *given: step(*given)),
        mock.patch("torch.cuda.is_initialized", lambda: True),
    ):
        yield made
        ahead.wait()


def graphs(dynamic: bool = False) -> list[GraphModule]:
    options: dict[str, Any] = {"strategy": "token_chunks", "memory_budget": 0.26}
    compiled, found = compile_without_codegen(loss, dynamic=dynamic, **options)
    h, w, y = given()
    if dynamic:
        for x in (h, y):
            torch._dynamo.mark_dynamic(x, 0)
    compiled(h, w, y).backward()
    return found.final


def test_kernels_of_a_head(asked: list[tuple[Any, ...]]) -> None:
    """Each once, though there are five pieces of rows, of which the last has fewer, and no thread is left."""
    forward, backward = graphs()
    gpu_codegen.lower_after_passes(forward, is_backward=False)
    assert ahead._pool is not None
    ahead.wait()
    products_ = {"_multiply": 4}  # of logits, of the weight's gradient, the same that is added, and of rows
    once = dict.fromkeys(("_fill_order", "_fill_rows"), 1)
    assert Counter(name for name, *_ in asked) == products_ | once
    assert not any(thread.is_alive() for *_, thread in asked)
    assert {device for _, device, *_ in asked} == {0}
    gpu_codegen.lower_after_passes(backward, is_backward=True)
    ahead.wait()
    assert "_fill_rows" in [name for name, *_ in asked][6:]


def test_sizes_that_are_known_later(asked: list[tuple[Any, ...]]) -> None:
    for graph, is_backward in zip(graphs(dynamic=True), (False, True), strict=True):
        gpu_codegen.lower_after_passes(graph, is_backward=is_backward)
    assert not asked


def test_numbers_that_are_known_later() -> None:
    """Those of a graph are numbers, or nothing is known ahead."""
    assert stand_ins(([sympy.Integer(3)], {"start": 4})) == ([3], {"start": 4})
    assert stand_ins([sympy.Symbol("s0", integer=True)]) is None


def test_no_gpu_is_asked_for() -> None:
    """Nothing begins to use one that the program has not."""
    with mock.patch.object(launches, "compile_ahead", mock.Mock(side_effect=AssertionError)):
        gpu_codegen.lower_after_passes(graphs()[0], is_backward=False)
        ahead.wait()
    assert ahead._pool is None


MODE = FakeTensorMode()


def fake(*size: int, dtype: torch.dtype = torch.bfloat16, device: Any = gpu_codegen.GPU) -> Tensor:
    with MODE:
        return torch.empty(size, dtype=dtype, device=device)


@pytest.fixture
def compiled() -> Iterator[Counter[str]]:
    """How many compilations Triton makes of each kernel, for a GPU that is not there."""
    made: Counter[str] = Counter()
    compile_one = launches.triton.runtime.jit.JITFunction._do_compile

    def counted(self: Any, *args: Any) -> Any:
        made[self.fn.__name__] += 1
        return compile_one(self, *args)

    with (
        gpu_codegen.pretended_gpu(),
        mock.patch("torch.cuda.set_device"),
        mock.patch.object(launches.triton.runtime.jit.JITFunction, "_do_compile", counted),
    ):
        yield made
        ahead.wait()


def test_what_a_thread_compiles(compiled: Counter[str]) -> None:
    """A real compilation of a placeholder for each tensor; the same again is found, another is not."""
    x, y = (fake(64, 32, dtype=torch.float32) for _ in range(2))
    factor = fake(1, dtype=torch.float32)
    for matrix in (x, y, x.t(), fake(64, 32)):
        product_kernels.scale(matrix, factor)
    ahead.wait()
    assert compiled == {"_scale": 3}


@launches.triton.jit
def _any(x):
    pass


@launches.triton.jit(do_not_specialize=["x"])
def _any_number(x):
    pass


@launches.triton.jit(do_not_specialize_on_alignment=["x"])
def _any_address(x):
    pass


NUMBERS = 0, 1, 2, 16, -1, -16, 2**31 - 1, 2**31 - 16, 2**31, 2**31 + 1, -(2**31) - 1
PLACEHOLDERS = [launches.Placeholder(dtype, at) for dtype in (torch.bool, torch.half) for at in (0, 4, 16)]


@pytest.mark.parametrize("function", [_any, _any_number, _any_address])
def test_what_a_compilation_depends_on(function: Any) -> None:
    """Arguments differ in it that do to Triton, and no others."""
    with gpu_codegen.pretended_gpu():
        *_, binder = function.create_binder()
    for pair in itertools.combinations([*NUMBERS, *PLACEHOLDERS], 2):
        by_triton, ours = ([binder(x)[1] for x in pair], [launches.compiled_for(function, [x]) for x in pair])
        assert (by_triton[0] == by_triton[1]) == (ours[0] == ours[1]), pair


def test_tiles_of_placeholders(compiled: Counter[str]) -> None:
    """Where the number of rows lies in memory compiles nothing anew."""
    (a, b, out), left = (fake(128, 128) for _ in range(3)), fake(9, dtype=torch.int32)
    with mock.patch.dict(counted_kernels._known, clear=True):
        for piece in range(3):
            counted_kernels.product_of_rows(out, a, b.t(), left.select(0, piece))
        counted_kernels.product_over_rows(out, a.t(), b, left.select(0, 1), True)
    ahead.wait()
    assert compiled == {"_multiply": 2}


def test_what_a_product_has_compiled_is_kept() -> None:
    """Where its operator is lowered once more, in another graph."""
    a, out = fake(128, 128), fake(128, 128)
    with (
        gpu_codegen.pretended_gpu(),
        mock.patch.object(launches, "compile_ahead"),
        mock.patch.dict(counted_kernels._known, clear=True),
    ):
        counted_kernels.product_of_rows(out, a, a, 128)
        (how,) = counted_kernels._known.values()
        assert how is not None
        how.launch = mock.Mock()
        counted_kernels.product_of_rows(out, a, a, 128)
        assert how.launch is not None
        how.launch.assert_not_called()
        ahead.wait()


def test_how_many_rows_a_product_has_compiles_nothing_anew(compiled: Counter[str]) -> None:
    """Not even 1, for which Triton would: what is known of a product tells numbers of the host not apart."""
    a, out = fake(128, 128), fake(128, 128)
    with mock.patch.dict(counted_kernels._known, clear=True):
        for left in (1, 64, 3):
            counted_kernels.product_of_rows(out, a, a, left)
            ahead.wait()
    assert compiled == {"_multiply": 1}


def test_threads_that_begin_with_a_function(compiled: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What either compiles is kept."""
    function = product_kernels._scale.function

    def slowly() -> Any:
        made = function.create_binder()
        time.sleep(0.2)
        return made

    monkeypatch.setattr(function, "device_caches", defaultdict(slowly))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    for dtype in (torch.float32, torch.bfloat16):
        product_kernels.scale(fake(64, 32, dtype=dtype), fake(1, dtype=torch.float32))
    ahead.wait()
    assert len(function.device_caches[0][0]) == compiled["_scale"] == 2


def test_a_launch_while_another_thread_asks(
    asked: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is asked for is compiled."""

    class Pool(ThreadPoolExecutor):
        def submit(self, *given: Any) -> Any:
            launching.start()
            launching.join(0.2)
            return super().submit(*given)

    launching = threading.Thread(target=ahead.wait)
    monkeypatch.setattr(ahead, "ThreadPoolExecutor", Pool)
    product_kernels.scale(fake(64, 32), fake(1, dtype=torch.float32))
    launching.join()
    assert [name for name, *_ in asked] == ["_scale"]
    assert ahead._pool is None


def test_operators_on_the_host(asked: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a GPU that is used for something else: none launches a kernel, and none is called."""
    monkeypatch.setattr(ahead, "stand_ins", lambda x: x)
    operator = mock.Mock()
    ahead.lowered(operator, (fake(64, D, device="cpu"), fake(2, dtype=torch.int32, device="cpu")), {})
    operator.assert_not_called()
    assert not asked


@pytest.mark.usefixtures("asked")
def test_a_number_on_the_host_is_there_whatever_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "stand_ins", lambda x: x)
    seen: list[list[int]] = []
    given = fake(64, D), fake(2, dtype=torch.int32, device="cpu")
    with torch.device("meta"):
        ahead.lowered(lambda x, host: seen.append(host.tolist()), given, {})
    assert seen == [[ahead.MANY] * 2]


@pytest.mark.fails_inside
def test_a_failure_leaves_kernels_to_their_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also that of finding out what is lowered."""
    monkeypatch.setattr(failsafe, "_warned", True)
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr(ahead, "stand_ins", mock.Mock(side_effect=NotImplementedError))
    ahead.lowered(mock.Mock(), (), {})


@pytest.mark.parametrize("host", [False, True])
def test_every_operator_is_rehearsed(host: bool, asked: list[tuple[Any, ...]]) -> None:
    """With the number of rows on the device, and on the host, which is looked at."""
    dz, h, w, kept = fake(64, V), fake(64, D), fake(V, D), fake(64, 136)
    label, columns = (fake(n, dtype=torch.int64) for n in (64, 128))
    counts, runs = fake(64, dtype=torch.bool), fake(3, 64, dtype=torch.int32)
    entries, often = fake(64, 1, dtype=torch.float32), fake(128, D, dtype=torch.float32)
    given_rows, program = fake(64, dtype=torch.float32), of_cross_entropy(1).where_given().encode()
    of_rows = [label], [], [given_rows], "max,sumexp,pick", program, [32, 64]
    given: dict[Any, tuple[Any, ...]] = {
        label_products.product_but: (w, kept, dz, h, [label], columns, 0, True, True),
        products.product_into: (w, dz.t(), h, 0, True),
        products.logits: (h, w.t(), None, []),
        products.column_sums: (dz,),
        label_products.most_frequent: ([label], V, 128),
        label_products.complete: (w, runs, entries, h, often),
        products.once_made: (w, torch.float32, []),
        products.times_in_place: (w, fake(1, dtype=torch.float32)),
        counted.row_order: (counts,),
        counted.take_rows: (h, label, counts, []),
        counted.product_to_rows: (h, dz, w, 0),
        counted.frequent_rows: (kept, h, label, counts),
        chunks.chunks: (h, w.t(), None, *of_rows, counts, w, h, [label], 128, True),
    }
    number = fake(2, dtype=torch.int32, device="cpu") if host else None
    rest = {"left": fake(2, dtype=torch.int32), "host": number, "piece": 1}
    with (
        mock.patch("torch.cuda.current_stream", mock.Mock()),
        mock.patch("torch.cuda.is_current_stream_capturing", lambda: False),
        mock.patch.object(counted_kernels, "reads_tiles", lambda _: True),
        mock.patch.object(counted_kernels, "_processors", lambda _: 132),
        mock.patch.object(ahead, "stand_ins", lambda x: x),
        mock.patch.dict(counted_kernels._known, clear=True),
    ):
        for operator, args in given.items():
            known = inspect.signature(operator._init_fn).parameters
            kwargs = {name: x for name, x in rest.items() if name in known}
            ahead.lowered(operator._init_fn, args, kwargs)
    ahead.wait()
    assert {*given, *lowering.WITHOUT_KERNELS} == {*lowering.DIRECT}
    names = {"_take_out", "_put_back", "_sum_rows", "_sort_tiles", "_merge_tiles", "_take_frequent"}
    names |= {"_add_rows", "_scale", "_fill_order", "_fill_rows", "_frequent", "_sum_parts", "_multiply"}
    names |= {"_fill_left", "_fill_numbers", "_fill_statistics", "_clear", one_read_kernel.NAME}
    assert {name for name, *_ in asked} == names


@pytest.mark.gpu
def test_the_first_step_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """But in the threads."""
    names: list[tuple[str, str]] = []
    compile_one = launches.triton.runtime.jit.JITFunction._do_compile
    modules = (product_kernels, label_kernels, counted_kernels)
    kernels = [k for m in modules for k in vars(m).values() if isinstance(k, launch.Kernel)]

    def recorded(self: Any, *args: Any) -> Any:
        names.append((self.fn.__name__, threading.current_thread().name))
        return compile_one(self, *args)

    ahead.wait()  # for what a test before has asked, and never launched
    for kernel in kernels:
        kernel._launchers.clear()
        kernel.function.device_caches.clear()
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    monkeypatch.setattr(skip, "LOOKED_WORK", 0)  # rows are left out of however small a head
    inputs = given(4096, "cuda")
    compiled = torch.compile(
        loss, backend=inductor_ce_backend, options={"strategy": "token_chunks", "memory_budget": 0.26}
    )
    with mock.patch.object(launches.triton.runtime.jit.JITFunction, "_do_compile", recorded):
        compiled(*inputs).backward()
    ours = {kernel.function.fn.__name__ for kernel in kernels}
    assert {name for name, _ in names} >= {"_fill_order", "_fill_rows", "_multiply"}
    assert [each for each in names if each[0] in ours and not each[1].startswith("ThreadPool")] == []
