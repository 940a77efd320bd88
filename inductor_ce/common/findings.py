"""What recognition finds, as data: a Site for each loss rewritten, a Miss for each one left alone."""

from __future__ import annotations

import enum
import linecache
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.fx import Node


class Reason(enum.Enum):
    """Why a loss was left as it was. The value is the remedy, told to the user after the fact."""

    SMALL_VOCAB = "Lower the option min_vocab if you want it fused all the same."
    DYNAMIC_VOCAB = "Leave the vocabulary dimension static: a kernel is built for one size."
    CLASS_WEIGHTS = "Detach the class weights: no gradient reaches them through the kernels."
    SOFT_TARGETS = (
        "Detach the targets if they are meant as constants; no gradient reaches them through the kernels."
    )
    MIXTURE = "No statistic of one row or of the other stands for it, so it runs as written."
    EACH_ENTRY = "Each entry of a row is needed there by itself, so it runs as written."
    NORMALISER = "A normaliser alone is fused where nothing else needs its logits, so it runs as written."
    LOGITS_ESCAPE = "Compute the loss from the logits, apart from the log-probabilities that you keep."
    NOT_UNDERSTOOD = (
        "If this is a cross entropy, write this step in one of the spellings that the README lists; "
        "if not, it runs as written."
    )
    MUTATED = "Make the edit out of place, or move it before or after the whole loss."
    UNSUPPORTED_DTYPE = "Use float16, bfloat16, float32 or float64 logits."
    UNSUPPORTED_TENSOR = "Compute the loss on plain tensors."
    PLACEMENTS = (
        "Shard the vocabulary over at most one dimension of the mesh, and the rows of the labels like those "
        "of the logits."
    )
    BY_HAND = (
        "docs/tensor_parallel.md says which losses by collectives of their own are read; logits that are a "
        "DTensor need none, nor does inductor_ce.cross_entropy with a group."
    )
    LOCAL_PART = "Read the loss by full_tensor(), or redistribute it first."
    OWN_BACKWARD = "Write the loss in plain PyTorch, outside the autograd.Function, and it is fused."
    BACKWARD_IN_GRAPH = "Capture the forward alone, and let torch.compile differentiate it."
    FUNCTION_TRANSFORM = "Compute the loss outside torch.func transforms."
    PASSES_OFF = "Compile without them, or in another mode, and it is fused."
    INTERNAL_ERROR = "Please report it with the traceback in the log; your program ran as written."


@dataclass(frozen=True)
class Site:
    """A loss that was rewritten.

    Attributes:
        location: the user's line, "file.py:41".
        code: the text of that line.
        form: the normal form of each value taken from the logits, for example
            "mean[y != -100](lse - pick(y))", joined by "; ".
        statistics: the statistics of a row that it needs, for example ("lse", "pick(y)").
        which: the rows of `row_stats` that hold them, for example "max,sumexp,pick".
        sharded: whether the vocabulary is split over ranks.
        strategy: how the logits are dealt with; "materialise" keeps them.
        logits_bytes: size of the logits, with a hint in place of a symbolic N.
        head: a sentence on who else has the logits in memory, for example that they are returned, or that
            they were dropped; "" where there is nothing to tell.
        plan: in how many pieces the head is computed, the memory that takes, and why; "" outside `explain`.
        kept: what of the log-probabilities of all classes the program keeps, and for whom, so that these are
            computed beside the loss; "" where there is nothing.
        rows: whether rows that do not count are skipped, and by what condition, or why none are; "" outside
            `explain`, or where there is nothing to tell.
        id: what its `row_stats` carries; losses that are compiled together have different ones.
    """

    location: str
    code: str
    form: str
    statistics: tuple[str, ...]
    which: str
    sharded: bool
    strategy: str
    logits_bytes: int
    head: str = ""
    plan: str = ""
    rows: str = ""
    kept: str = ""
    id: int = 0


@dataclass(frozen=True)
class Miss:
    """A loss that was left as it was.

    Attributes:
        location: the user's line, "file.py:41".
        code: the text of that line.
        reason: a `Reason`.
        message: what was tried, the fact that stopped it, and the remedy.
    """

    location: str
    code: str
    reason: Reason
    message: str


@dataclass(frozen=True)
class Cut:
    """Where Dynamo ended a graph, or gave up a function: a loss that stands on both sides is read in parts.

    Attributes:
        location: the user's line, "file.py:41"; "" where Dynamo does not tell it.
        code: the text of that line.
        message: what Dynamo says of it, and its hints.
    """

    location: str
    code: str
    message: str


_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')
_PACKAGE = Path(__file__).parents[1]
_NOT_THE_USERS = tuple(f"{folder}{os.sep}" for folder in (Path(torch.__file__).parent, _PACKAGE))
_PYTHONS_OWN = os.path.dirname(os.__file__)  # its modules; installed packages are further within


def user_line(node: Node) -> tuple[str, str]:
    """("file.py:41", the text of that line): the innermost frame that made `node`, outside torch and us.

    Nor is it Python's own, as that of operator.add, which Dynamo of torch 2.15 goes through for a sum.
    """
    return line_of(_FRAME.findall(node.meta.get("stack_trace") or node.stack_trace or ""))


def line_of(frames: Sequence[tuple[str, int | str]]) -> tuple[str, str]:
    """The same of files and lines, the innermost last."""
    if not frames:
        return "<unknown>:0", ""
    others = (f for f in frames if not f[0].startswith(_NOT_THE_USERS))
    outside = [f for f in others if os.path.dirname(f[0]) != _PYTHONS_OWN]
    file, line = (outside or frames)[-1]
    return f"{os.path.basename(file)}:{line}", linecache.getline(file, int(line)).strip()


def name_of(node: Node) -> str:
    """What a node calls, as the user knows it."""
    return getattr(node.target, "__name__", str(node.target))


def where_is(node: Node) -> str:
    """The user's line that made a node, to be put into a sentence."""
    location, code = user_line(node)
    return f"at {location} ({code})"


@dataclass(frozen=True)
class Refusal:
    """Why a node is not read, or a loss not replaced, as far as it is known where it is decided.

    Attributes:
        reason: a `Reason`.
        fact: a sentence, in which {step} is the node that is refused, {culprit} the tensor in the way.
        culprit: that tensor, where there is one.
    """

    reason: Reason
    fact: str
    culprit: Node | None = None

    def sentence(self, node: Node) -> str:
        """The fact, with names for the node that is refused and for the culprit."""
        named = {"{step}": node, "{culprit}": self.culprit}
        for name, each in named.items():
            if each is not None and name in self.fact:
                return self.fact.replace(name, _described(each))
        return self.fact


def _described(node: Node) -> str:
    return "an input" if node.op == "placeholder" else f"{name_of(node)} {where_is(node)}"


def make_miss(node: Node, reason: Reason, fact: str) -> Miss:
    """The refusal of the loss at `node`: `fact` is a sentence, to which the remedy is added."""
    location, code = user_line(node)
    return Miss(location, code, reason, f"{fact} {reason.value}")
