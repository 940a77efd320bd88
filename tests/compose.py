"""A loss composed from pieces of `grammar.py`: the choices, and the source that they make."""

from __future__ import annotations

import itertools
import linecache
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import grammar as g
import grammar_of_logits as before
import torch
import torch.nn.functional as F
from grammar import Where
from grammar_of_logits import View
from torch import nn

T = TypeVar("T")
Choose = Callable[[Sequence[T]], T]

HALF = (torch.bfloat16, torch.float16)
FAMILIES = ["wide", "narrow", "torch", "whole", "nll"]
ORDERS = list(itertools.permutations(("cast", "chain", "arrange")))


@dataclass(frozen=True)
class Spelling:
    """Which pieces, in the order of the source; "" where there is none.

    `ignored` says by what the rows with the label `ignore` are left out: "none" where there are no such rows,
    "torch" where a loss of torch is told ignore_index, "counts" by a mask, "weights" by a weight of each row.
    """

    V: int
    dtype: torch.dtype
    labels: str
    order: tuple[str, ...]
    cast: str
    chain: str
    shift: str
    view: str
    dim: int
    ignored: str
    ignore: int
    counts: str
    safe: str
    normaliser: str
    pick: str
    smoothing: str
    z_loss: str
    mask: str
    reduction: str
    result: str

    @property
    def viewed(self) -> View:
        return before.VIEWS[self.view]

    @property
    def wide(self) -> bool:
        """Whether there are log-probabilities of all classes."""
        return "logp" in self.normaliser

    @property
    def picks_by_hand(self) -> bool:
        return any(self.pick in table for table in (g.PICKS, g.OF_LOGP, g.OF_COLUMNS, g.CHOSEN, g.MANY))


# Choosing


def choose_spelling(choose: Choose[Any], family: str | None = None) -> Spelling:
    """A spelling that eager torch runs; `choose` takes one of a sequence."""
    frame = _choose_frame(choose, family or choose(FAMILIES))
    view = frame.view
    return Spelling(
        V=frame.V,
        dtype=frame.dtype,
        order=frame.order,
        cast=frame.cast,
        chain=frame.chain,
        shift=frame.shift,
        view=frame.code,
        ignored=frame.ignored,
        ignore=frame.ignore,
        **_body(choose, frame),
        dim=choose([-1, view.rank - 1] if view.axis == -1 else [1, -2]),
        counts=choose(g.COUNTS) if frame.ignored != "none" else "",
        result=choose(list(g.RESULTS)),
    )


@dataclass(frozen=True)
class _Frame:
    """What is chosen first, since the loss itself depends on it."""

    family: str
    code: str
    shift: str
    ignored: str
    ignore: int
    V: int
    dtype: torch.dtype
    order: tuple[str, ...]
    cast: str
    chain: str

    @property
    def view(self) -> View:
        return before.VIEWS[self.code]

    @property
    def half(self) -> bool:
        """Whether the loss is computed in 16 bits."""
        return self.dtype in HALF and not self.cast

    @property
    def masked(self) -> bool:
        """Whether some classes are as good as impossible."""
        return "masked_fill" in self.chain


def _choose_frame(choose: Choose[Any], family: str) -> _Frame:
    by_hand = family in ("wide", "narrow")
    code = choose([v for v in before.VIEWS if by_hand or _torch_reads(before.VIEWS[v])])
    view = before.VIEWS[code]
    shift = choose(["", *_shifts(view)]) if view.logits == "BSV" else ""
    left_out = ["counts", "weights"] if by_hand else ["torch"]
    ignored = choose(left_out + ([] if shift in before.PADS else ["none"]))
    classes = choose([16, 37, 64])
    ignore = choose([-100, -1, 0, classes - 1]) if ignored != "none" else -100
    dtype = choose([torch.float32, torch.float32, *HALF])
    order = choose(ORDERS)
    cast = choose(["", *before.CASTS]) if dtype in HALF else choose(["", "", "", before.CASTS[0]])
    chain = choose(_chains(view, order, dtype in HALF and bool(cast)))
    return _Frame(family, code, shift, ignored, ignore, classes, dtype, order, cast, chain)


def _torch_reads(view: View) -> bool:
    """Whether the losses of torch find the classes where they look for them."""
    return view.rank == 2 or view.axis == 1


def _shifts(view: View) -> list[str]:
    return [shift for shift, packed in {**before.SLICES, **before.PADS}.items() if packed or not view.packed]


def _chains(view: View, order: tuple[str, ...], copied: bool) -> list[str]:
    early = order.index("chain") < order.index("arrange")
    chains = ["", "", *before.CHAINS]
    if view.logits != "BVS" if early else view.axis == -1:
        chains += before.BIASES
    if copied and order.index("cast") < order.index("chain"):
        chains += before.EDITS
    return chains


def _body(choose: Choose[Any], frame: _Frame) -> dict[str, str]:
    """The pieces from the normaliser to the reduction, and the labels, which not every pick takes."""
    family, view = frame.family, frame.view
    normaliser, picks = "", {p: Where() for p in g.CROSS_ENTROPY_ROWS}
    if family not in ("torch", "whole"):
        table = g.NARROW if family == "narrow" else g.WIDE
        normaliser = choose([n for n in table if _stays_finite(n, frame)])
        picks = {p: w for p, w in g.PICKS.items() if fits(w, view)}
        picks |= g.OF_LOGP if family == "wide" and _torch_reads(view) else {}
        further = g.OF_COLUMNS | g.CHOSEN if family == "wide" else {}
        picks |= {p: w for p, w in further.items() if fits(w, view)}
    rounded = family == "wide" and not frame.half and choose([False] * 9 + [True])
    if rounded:
        normaliser = f"{normaliser}\n{g.ROUNDED}"
        picks = {p: w for p, w in picks.items() if "gather(" in p and p not in g.CHOSEN}
    whole = {"whole": g.CROSS_ENTROPIES, "nll": g.NLLS}.get(family)
    pick = choose(list(whole or picks))
    where = picks.get(pick, Where())
    chosen = pick in g.CHOSEN  # those rows are logits of their own
    plain = rounded or frame.masked or family == "nll" or chosen
    smoothing = "" if plain else choose(["", *_smoothings(family, view)])
    int32 = where.int32 and "F." not in pick + smoothing
    return {
        "normaliser": normaliser,
        "pick": pick,
        "smoothing": smoothing,
        "labels": choose([*before.LABELS, *([before.INT32] if int32 else [])]),
        "safe": _safe(choose, where, frame, smoothing),
        **_rows(choose, family, frame.ignored, bool(whole), chosen),
    }


def _stays_finite(normaliser: str, frame: _Frame) -> bool:
    """Whether no exponential overflows and no logarithm of 0 is taken on the way."""
    underflows = re.search(r"(?<!log_)(?<!Log)softmax|e / e", normaliser)
    float16 = frame.half and frame.dtype == torch.float16
    return not (frame.masked and underflows) and not (float16 and ("z.exp()" in normaliser or underflows))


def fits(where: Where, view: View) -> bool:
    return view.axis in where.axes and view.rank in where.ranks


def _smoothings(family: str, view: View) -> list[str]:
    if family in ("torch", "whole"):
        return [", label_smoothing=0.1"]
    tables = [g.SMOOTH_NARROW] if family == "narrow" else [g.SMOOTH_WIDE, g.KL]
    return [s for table in tables for s, (_, where) in table.items() if fits(where, view)]


def _safe(choose: Choose[Any], where: Where, frame: _Frame, smoothing: str) -> str:
    ignored, ignore = frame.ignored, frame.ignore
    if ignored in ("none", "torch"):
        return g.AS_IT_IS
    safe = list(g.SAFE)
    if ignore < 0:
        safe += g.SAFE_FROM_NEGATIVE
    as_it_is = where.outside or (where.wraps and ignore == -1)
    if ignore >= 0 or (as_it_is and "safe" not in smoothing):
        safe += [g.AS_IT_IS] * 3
    return choose(safe)


def _rows(choose: Choose[Any], family: str, ignored: str, whole: bool, chosen: bool) -> dict[str, str]:
    """What happens to the rows [N] of a loss."""
    counted = ignored != "none"
    terms = ["", "", *g.Z_ALL, *(g.Z_COUNTED if counted else ())] if not chosen else [""]
    if whole:
        return {"z_loss": choose(terms), "mask": "", "reduction": ""}
    if ignored != "torch" and not chosen:
        terms += [
            *g.Z_ROWS,
            *g.POWER_ROWS,
            *g.LEFT_OUT_ROWS,
            *(g.Z_ROWS_OF_LSE if family == "narrow" else ()),
        ]
    mask = {"counts": g.MASKS, "weights": g.WEIGHTS}.get(ignored, [""])
    reductions = {"weights": g.WEIGHED}.get(ignored, g.COUNTED if counted else {})
    return {
        "z_loss": choose(terms),
        "mask": choose(mask),
        "reduction": choose([*g.REDUCTIONS, *reductions, *reductions]),
    }


# Source


def source(spelling: Spelling, pieces: dict[str, str] | None = None) -> str:
    """The function as text, of the pieces of a spelling unless others are given."""
    body = "".join(f"{piece}\n" for piece in (pieces or statements(spelling)).values() if piece)
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    return f"def loss(logits, labels, weights, bias, temperature):\n{lines}"


def statements(s: Spelling) -> dict[str, str]:
    """The pieces in their order, filled in."""
    arrange = "\n".join(piece for piece in (s.shift, s.view) if piece)
    steps = {"cast": s.cast, "chain": s.chain, "arrange": arrange}
    z_rows = s.z_loss in {**g.Z_ROWS, **g.Z_ROWS_OF_LSE, **g.POWER_ROWS, **g.LEFT_OUT_ROWS}
    pieces = {
        "start": f"z = logits\n{s.labels}",
        **{name: steps[name] for name in s.order},
        "counts": s.counts,
        "safe": s.safe if s.picks_by_hand else "",
        "normaliser": s.normaliser,
        "pick": "" if _is_dense(s) else s.pick,
        "rows": _rows_of(s) if s.picks_by_hand and not _is_dense(s) else "",
        "smoothing": "" if s.smoothing.startswith(",") else s.smoothing,
        "z_rows": s.z_loss if z_rows else "",
        "mask": s.mask,
        "reduction": s.reduction,
        "z_term": "" if z_rows else s.z_loss,
        "result": s.result,
    }
    return {name: filled(piece, s) for name, piece in pieces.items()}


def _is_dense(s: Spelling) -> bool:
    """Whether the rows are made of a smoothed target, and nothing of what was picked."""
    return "q = " in s.smoothing


def _rows_of(s: Spelling) -> str:
    return "rows = -picked" if s.wide else "rows = lse - picked"


def filled(piece: str, s: Spelling) -> str:
    smooth = s.smoothing if s.smoothing.startswith(",") else ""
    x = "logp" if s.wide else "z"
    return piece.format(d=s.dim, V=s.V, B=before.B, ignore=s.ignore, x=x, smooth=smooth)


_names = itertools.count()


def function(text: str) -> Callable[..., Any]:
    """The function `loss` of a source, whose lines tracebacks and reports find."""
    name = f"<generated {next(_names)}>"
    linecache.cache[name] = len(text), None, text.splitlines(keepends=True), name
    namespace = {"torch": torch, "F": F, "nn": nn}
    exec(compile(text, name, "exec"), namespace)
    return namespace["loss"]
