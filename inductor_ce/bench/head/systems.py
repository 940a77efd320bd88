"""What is compared: plain torch.compile, peers, and inductor_ce by strategy and by memory budget."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..shared import compilers, peers
from ..shared.body import body
from ..shared.compilers import BASELINE, DEFAULT, GRAPHS, MODES, OURS
from ..shared.losses import IGNORED
from ..shared.peers import NotOffered, find
from .inputs import HeadFunction, Shape, cross_entropy

STRATEGIES = ("materialise", "token_chunks", "vocab_slabs")
BUDGETS = (1.0, 0.5, 0.25, 0.125, 0.0625)  # of the materialised logits
AUTO_CHUNKER, LIGER = "auto_chunker", "liger_kernel"
CCE, CCE_EXACT = "cce", "cce_exact"
CCE_BUDGET = f"{OURS}@cce+30%"
CCE_ROOM = 1.3
# Of a chunk; as many as the hidden size fail by scaled exponentials.
QUACK_ROWS = (2048, 4096)


@dataclass(frozen=True)
class Case:
    """What a system is built for.

    Attributes:
        peaks: the peak in bytes of each system measured before it.
        behind: whether the head stands behind a body.
    """

    shape: Shape
    peaks: Mapping[str, int] = field(default_factory=dict)
    mode: str = DEFAULT
    behind: bool = False


@dataclass(frozen=True)
class Built:
    """A system ready to run at one shape, and what the reader should know of it."""

    function: HeadFunction
    note: str = ""


@dataclass(frozen=True)
class System:
    """A name, how to build the system, and what it is: "baseline", "peer" or "ours".

    `budget` is the fraction of the logits that ours was given, where it is a point of the curve.
    """

    name: str
    kind: str
    build: Callable[[Case], Built | NotOffered]
    budget: float | None = None
    modes: tuple[str, ...] = (DEFAULT,)


def compiled(case: Case, **options: Any) -> Built:
    return _built(compilers.plain, case, options)


def ours(case: Case, **options: Any) -> Built:
    return _built(compilers.ours, case, options)


def _built(compile: Callable[..., HeadFunction], case: Case, options: dict[str, Any]) -> Built:
    if case.mode == GRAPHS:
        return Built(of_parameters(functools.partial(compile, mode=GRAPHS), case.shape.head))
    function = behind_body(case.shape.head) if case.behind else case.shape.head
    return Built(compile(function, options=options or None))


def behind_body(head: HeadFunction) -> HeadFunction:
    """A head as part of a step: what makes h keeps the GPU busy for a while."""
    return lambda h, W, y, b=None: head(body(h), W, y, b)


def of_parameters(compile: Callable[[HeadFunction], HeadFunction], function: HeadFunction) -> HeadFunction:
    """The head of a module: CUDA graphs read parameters where they lie, and copy other inputs first."""
    held: Any = nn.Module()

    def head(h: Tensor, y: Tensor) -> Tensor:
        return function(h, held.W, y, held.b)

    compiled = compile(head)

    def of_all(h: Tensor, W: Tensor, y: Tensor, b: Tensor | None = None) -> Tensor:
        held.W, held.b = W, b
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(h, y)

    return of_all


def ours_with_room_of_cce(case: Case) -> Built | NotOffered:
    """With CCE's peak and 30 % as the budget. The peak counts the gradients, which a budget does not."""
    if CCE not in case.peaks:
        return NotOffered(f"{CCE} was not measured, and its peak is the budget")
    budget = int(CCE_ROOM * case.peaks[CCE]) - case.shape.gradient_bytes
    return Built(ours(case, memory_budget=budget).function, f"memory_budget={budget}")


def auto_chunker(case: Case) -> Built | NotOffered:
    """Inductor's own chunking, with thresholds low enough for every shape."""
    options = {
        "auto_chunker.enable": True,
        "auto_chunker.output_size_threshold": 1,
        "auto_chunker.amplify_ratio_threshold": 1,
    }
    missing = sorted(name for name, value in options.items() if not is_option(name, value))
    return NotOffered(f"this torch has no {', '.join(missing)}") if missing else compiled(case, **options)


def is_option(name: str, value: Any) -> bool:
    """Whether this torch's Inductor can be told it."""
    try:
        torch.compile(cross_entropy, options={name: value})
    except RuntimeError:
        return False
    return True


def liger_kernel(case: Case) -> Built | NotOffered:
    module = find("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss")
    if isinstance(module, NotOffered):
        return module
    loss = module(ignore_index=IGNORED, **_cap_of(case))
    return Built(lambda h, W, y, b=None: loss(W, h, y, b))


def quack(case: Case, rows: int, scaled: bool = False) -> Built | NotOffered:
    """In chunks of so many rows, its kernels as they are without minutes of tuning.

    `scaled` is its path by scaled exponentials, which rounds more.
    """
    function = peers.quack("linear_cross_entropy", "chunked_linear_cross_entropy")
    if isinstance(function, NotOffered):
        return function
    if case.shape.bias or case.shape.cap:
        return NotOffered("quack has no bias and no soft-cap")
    chunked = functools.partial(
        function, chunk_size=rows, ignore_index=IGNORED, tuned=False, use_scaled_exp=scaled
    )
    return Built(lambda h, W, y, b=None: chunked(h, W, y))


def cut_cross_entropy(case: Case, **options: Any) -> Built | NotOffered:
    function = find("cut_cross_entropy", "linear_cross_entropy")
    if isinstance(function, NotOffered):
        return function
    return Built(_with_bias(function, "bias", ignore_index=IGNORED, **_cap_of(case), **options))


def _cap_of(case: Case) -> dict[str, float]:
    return {} if case.shape.cap is None else {"softcap": case.shape.cap}


def cce_exact(case: Case) -> Built | NotOffered:
    """The variant with the same gradients as everybody's: nothing is filtered."""
    function = find("cut_cross_entropy", "linear_cross_entropy")
    if isinstance(function, NotOffered):
        return function
    if "accum_c_fp32" in inspect.signature(function).parameters:
        return cut_cross_entropy(case, impl="cce_exact")
    options = _cap_of(case) | {"ignore_index": IGNORED, "impl": "cce", "filter_eps": None}
    exact = _with_bias(function, "bias", **options)
    return Built(exact, "this release has no cce_exact: its filter is off, its sums stay 16-bit")


def linear_cross_entropy(case: Case) -> Built | NotOffered:
    """torch's own, with its chunks; compiled or not, that operator runs in eager."""
    function = getattr(F, "linear_cross_entropy", None)
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if function is None or options is None:
        return NotOffered("this torch has no F.linear_cross_entropy with chunks")
    if case.shape.cap:
        return NotOffered("F.linear_cross_entropy has no soft-cap")
    return Built(_with_bias(function, "linear_bias", ignore_index=IGNORED, options=options()))


def _with_bias(function: HeadFunction, name: str, **options: Any) -> HeadFunction:
    """A function that takes a bias, where there is one, by this name."""

    def head(h: Tensor, W: Tensor, y: Tensor, *b: Tensor) -> Tensor:
        return function(h, W, y, **dict(zip((name,), b, strict=False)), **options)

    return head


def _all() -> list[System]:
    peer = functools.partial(System, kind="peer")
    others = [
        peer(AUTO_CHUNKER, build=auto_chunker),
        peer(LIGER, build=liger_kernel),
        peer(CCE, build=functools.partial(cut_cross_entropy, impl="cce")),
        peer(CCE_EXACT, build=cce_exact),
        peer("cce_torch_compile", build=functools.partial(cut_cross_entropy, impl="torch_compile")),
        peer("linear_cross_entropy", build=linear_cross_entropy),
        *(peer(f"quack@{rows}", build=functools.partial(quack, rows=rows)) for rows in QUACK_ROWS),
        peer("quack_scaled_exp", build=functools.partial(quack, rows=QUACK_ROWS[0], scaled=True)),
    ]
    forced = [System(f"{OURS}:{name}", "ours", functools.partial(ours, strategy=name)) for name in STRATEGIES]
    curve = [
        System(f"{OURS}@{budget:g}", "ours", functools.partial(ours, memory_budget=budget), budget)
        for budget in BUDGETS
    ]
    return [
        System(BASELINE, "baseline", compiled, modes=MODES),
        *others,
        System(OURS, "ours", ours, modes=MODES),
        *forced,
        *curve,
        System(CCE_BUDGET, "ours", ours_with_room_of_cce),
    ]


# CCE stands before ours, whose last budget is read off it.
SYSTEMS = {system.name: system for system in _all()}
FORWARD_ALONE = (BASELINE, LIGER, CCE, OURS)
