"""How a head is computed: numbers in, a `Plan` out. It never looks at free memory or a clock.

A head is the linear layer before the statistics with the products of its gradients. Extra memory is the
most that is held at once beyond the hidden states, the weight, and their gradients: see `extra_memory`.

    strategy       products  extra memory
    materialise    6 NVD     N V logits
    token_chunks   6 NVD     logits of N / K rows; 16-bit gradients in float32, where not left at 16 bits
    vocab_slabs    8 NVD     logits of V / S columns; a 16-bit dh in float32
    forward_only   2 NVD     logits of one chunk
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from ..common.strategies import FORWARD_ONLY, MATERIALISE, TOKEN_CHUNKS, VOCAB_SLABS
from .extra_memory import (
    MIB,
    NARROW_CHUNKS,
    HeadNumbers,
    held,
    held_of_chunk,
    most_in_chunks,
    piece_size,
    sums_in_float32,
    terms_of_piece,
    waits_in_float32,
)

SMALL = 128 * MIB  # logits that are not worth dividing
CHUNK_WORK = 2**37  # N V D of a chunk: of less, its launches may take the host longer than they take the GPU
LOOKED_WORK = 2**38  # of which the device alone knows how many rows count, for the same reason
WORTH_SKIPPING = 2**36  # N V D, of which products take half a millisecond: it costs the host something
UNEVEN = "ranks with different numbers of classes may not decide alike how often they exchange statistics"
OUT_OF_RANGE = "float16 gradients without their upstream gradient may leave its range"
NOT_WORTH_IT = f"logits under {SMALL // MIB} MiB are not worth dividing"
CHUNK_ROWS = 2048  # over fewer, products run more slowly, and each chunk reads and writes all of the sum
LEAST_COLUMNS = 8192  # of a slab
FORWARD_ROWS = 512  # of which the rows of a chunk without a gradient are a multiple
FORWARD_BYTES = 512 * MIB  # of the logits of such a chunk
SLABS_BUDGET = 0.27  # of the logits, where nothing else is asked
WORTH = 0.6  # of the logits: what dividing must leave less than
MOST_PIECES = 128  # the graph grows with each


@dataclass(frozen=True)
class Plan:
    """A strategy.

    Attributes:
        strategy: one of `STRATEGIES`.
        pieces: how many chunks of rows or slabs of columns; 1 where nothing is divided.
        wide_sum: whether the gradient that is a sum over pieces is summed in float32 though it is 16-bit.
        extra_bytes: the extra memory.
        reason: why, in words.
        wide_hidden: whether the hidden states' gradient, put together from chunks, waits in float32 for its
            upstream gradient though it is 16-bit.
        rows: which rows are skipped, or why none are, in words; "" for nothing to tell.
        skips: whether some are.
    """

    strategy: str
    pieces: int
    wide_sum: bool
    extra_bytes: int
    reason: str
    wide_hidden: bool = False
    rows: str = ""
    skips: bool = False


def plan(head: HeadNumbers, strategy: str = "auto", memory_budget: int | float | None = None) -> Plan:
    """How to compute a head.

    Args:
        head: the numbers.
        strategy: "auto", or the one wanted; where it cannot be had, the nearest that can.
        memory_budget: extra memory to keep to, in bytes, or as a fraction (a float) of the logits. The
            fewest pieces that keep to it are taken, and where none do, those that come nearest.
    """
    if head.escapes:
        return _materialise(head, head.escapes)
    if strategy == MATERIALISE:
        return _materialise(head, "asked for")
    budget = int(memory_budget * head.logits_bytes) if isinstance(memory_budget, float) else memory_budget
    if not head.backward:
        return _forward_only(head, strategy, budget)
    if strategy == VOCAB_SLABS and not head.sides:
        return _slabs(head, budget, "asked for")
    why_not = _why_no_chunks(head)
    if head.sharded and not why_not:
        return _alike(head, strategy, memory_budget)
    if strategy in (TOKEN_CHUNKS, VOCAB_SLABS):
        reason = "asked for" if strategy == TOKEN_CHUNKS else head.sides
        return _slabs(head, budget, why_not) if why_not else _chunks(head, budget, reason, 2)
    return _auto(head, budget, why_not)


def plan_loop(
    heads: list[HeadNumbers], strategy: str = "auto", memory_budget: int | float | None = None
) -> list[Plan] | None:
    """How to compute heads of one weight, one after another, that add to one gradient of it.

    The chunks are the user's own, or some of each, so that no more is held at once than one of them and
    that gradient, however small they are. None where that cannot be, or something else is asked for.
    """
    whole = dataclasses.replace(heads[0], n=sum(head.n for head in heads))
    if any(head.escapes or head.sharded or _why_no_chunks(head) for head in heads):
        return None
    wanted = plan(whole, strategy, memory_budget)
    if strategy == MATERIALISE or wanted.strategy not in (MATERIALISE, TOKEN_CHUNKS):
        return None
    each = [_pieces(head.n, -(-wanted.pieces * head.n // max(whole.n, 1))) for head in heads]
    wide_sum, wide_hidden = whole.wants_weight and whole.weight_element < 4, waits_in_float32(whole)
    piece = max(piece_size(head.n, k) * held_of_chunk(head) for head, k in zip(heads, each, strict=True))
    extra = most_in_chunks(whole, piece * whole.v, wide_sum, wide_hidden)
    reason = f"one of {len(heads)} chunks in a loop"
    reason += ", which add to one gradient of the weight" if whole.wants_weight else ", one after another"
    return [Plan(TOKEN_CHUNKS, k, wide_sum, extra, reason, wide_hidden) for k in each]


def _auto(head: HeadNumbers, budget: int | None, why_not: str) -> Plan:
    whole = _materialise(head, "")
    if _is_small(head, budget):
        if head.skips and not why_not and head.n * head.v * head.d >= WORTH_SKIPPING:
            return _chunks_of(head, 1, "rows that count are computed at once")
        return _materialise(head, NOT_WORTH_IT)
    if budget is not None and whole.extra_bytes <= budget:
        return _materialise(head, "the logits fit in the budget")
    if why_not:
        return _slabs(head, budget, why_not)
    chunks = _chunks(head, budget, "one scalar scales every gradient, so the forward makes them")
    if budget is not None:
        slabs = _slabs(head, budget, "the sum over chunks does not fit in the budget")
        return slabs if slabs.extra_bytes < chunks.extra_bytes and chunks.extra_bytes > budget else chunks
    if chunks.pieces == 1 or chunks.extra_bytes > WORTH * whole.extra_bytes:
        if head.skips:
            return _chunks_of(head, 1, "so few rows are not divided, but those that count are fewer")
        return _materialise(head, "dividing so few rows would save little")
    return chunks


def _alike(head: HeadNumbers, strategy: str, memory_budget: int | float | None) -> Plan:
    """What every rank decides, whose classes may be fewer: ranks exchange statistics once a chunk.

    The other strategies exchange them once, whatever the pieces, so that each rank may choose for itself.
    Usually there are as many chunks as a power of two says: where lengths vary, what is compiled for each
    number of chunks is little then.
    """
    pieces = 1 << round(math.log2(_usual_chunks(head)))
    if isinstance(memory_budget, float):
        pieces = max(1, math.ceil(1 / memory_budget))
    pieces = _pieces(head.n, max(pieces, 2) if strategy == TOKEN_CHUNKS else pieces)
    if pieces == 1:
        return _materialise(head, "dividing so few rows would save little")
    return _chunks_of(head, pieces, "by rows and fractions alone, on which all ranks agree")


def _why_no_chunks(head: HeadNumbers) -> str:
    if head.varies:
        return head.varies
    if head.uneven:
        return UNEVEN
    return OUT_OF_RANGE if head.float16 else ""


# One strategy each


def _is_small(head: HeadNumbers, budget: int | None) -> bool:
    return budget is None and head.logits_bytes < SMALL


def _usual_chunks(head: HeadNumbers) -> int:
    """As many chunks as leave products fast, and no more than pay; four of what is a little work."""
    rows = max(CHUNK_ROWS, min(CHUNK_WORK // max(head.v * head.d, 1), head.n // 4))
    return min(max((head.n + rows // 2) // rows, 1), NARROW_CHUNKS)


def _materialise(head: HeadNumbers, reason: str) -> Plan:
    return Plan(MATERIALISE, 1, False, head.n * head.v * held(head), reason)


def _forward_only(head: HeadNumbers, strategy: str, budget: int | None) -> Plan:
    if strategy == "auto" and _is_small(head, budget):
        return _materialise(head, NOT_WORTH_IT)
    if budget is not None:
        return _fewest([_forward_of(head, k) for k in (1, *_candidates(head.n))], budget)
    rows = max(FORWARD_BYTES // (head.v * head.element), 1) if head.v else head.n
    if rows > FORWARD_ROWS:
        rows -= rows % FORWARD_ROWS
    pieces = _pieces(head.n, -(-head.n // max(rows, 1)))
    return _forward_of(head, pieces if strategy == "auto" else max(pieces, _pieces(head.n, 2)))


def _forward_of(head: HeadNumbers, pieces: int) -> Plan:
    rows = piece_size(head.n, pieces)
    extra = rows * head.v * held(head) + (rows * head.d * head.element if head.skips else 0)
    return Plan(FORWARD_ONLY, pieces, False, extra, "no gradient")


def _chunks(head: HeadNumbers, budget: int | None, reason: str, least: int = 1) -> Plan:
    if budget is None:
        return _chunks_of(head, _pieces(head.n, max(_usual_chunks(head), least)), reason)
    return _fewest([_chunks_of(head, k, reason) for k in _candidates(head.n)], budget)


def _chunks_of(head: HeadNumbers, pieces: int, reason: str) -> Plan:
    rows = piece_size(head.n, pieces)
    piece = rows * head.v * held_of_chunk(head) + (2 * rows * head.d * head.element if head.skips else 0)
    wide_sum, wide_hidden = sums_in_float32(head, pieces), waits_in_float32(head)
    extra = most_in_chunks(head, piece, wide_sum, wide_hidden)
    return Plan(TOKEN_CHUNKS, pieces, wide_sum, extra, reason, wide_hidden)


def _slabs(head: HeadNumbers, budget: int | None, reason: str) -> Plan:
    if head.sides:
        return _materialise(head, f"{reason}; {head.sides}")
    if budget is None:
        most = max(head.v // LEAST_COLUMNS, 2)
        budget = int(SLABS_BUDGET * head.logits_bytes)
        candidates = [s for s in _candidates(head.v) if s <= most]
    else:
        candidates = _candidates(head.v)
    return _fewest([_slabs_of(head, s, reason) for s in candidates], budget)


def _slabs_of(head: HeadNumbers, pieces: int, reason: str) -> Plan:
    piece = head.n * piece_size(head.v, pieces) * held(head)
    wide = head.wants_hidden and head.element < 4
    extra = piece + terms_of_piece(head, piece) + (head.n * head.d * 4 if wide else 0)
    return Plan(VOCAB_SLABS, pieces, wide, extra, reason)


# Pieces


def work_of_piece(head: HeadNumbers, pieces: int) -> int:
    """The N V D of a piece."""
    return piece_size(head.n, pieces) * head.v * head.d


def _candidates(size: int) -> list[int]:
    """Numbers of pieces to consider, from 2 where `size` allows it."""
    return sorted({_pieces(size, k) for k in range(2, MOST_PIECES + 1)}) or [1]


def _pieces(size: int, wanted: int) -> int:
    """As many pieces as wanted, if none is to be empty."""
    return max(1, min(wanted, size, MOST_PIECES))


def _fewest(plans: list[Plan], budget: int) -> Plan:
    """The plan with the fewest pieces that keeps to the budget, or the one that comes nearest."""
    return next((p for p in plans if p.extra_bytes <= budget), min(plans, key=lambda p: p.extra_bytes))
