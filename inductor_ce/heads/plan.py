"""How a head is computed: numbers in, a `Plan` out. It never looks at free memory or a clock.

A head is the linear layer before the statistics with the products of its gradients. Extra memory is the
most that is held at once beyond the hidden states, the weight, and their gradients.

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
from ..ops.gemm import TERMS_BYTES

MIB = 2**20

SMALL = 128 * MIB  # logits that are not worth dividing
CHUNK_WORK = 2**37  # N V D of a chunk: of less, its launches may take the host longer than they take the GPU
LOOKED_WORK = 2**38  # of which the device alone knows how many rows count, for the same reason
WORTH_SKIPPING = 2**36  # N V D, of which products take half a millisecond: it costs the host something
OUT_OF_RANGE = "float16 gradients without their upstream gradient may leave its range"
NOT_WORTH_IT = f"logits under {SMALL // MIB} MiB are not worth dividing"
CHUNK_ROWS = 2048  # over fewer, products run more slowly, and each chunk reads and writes all of the sum
ALIGNED = 16  # rows and columns, so that products find their factors where they read fastest
LEAST_COLUMNS = 8192
FORWARD_ROWS = 512  # a multiple of it
FORWARD_BYTES = 512 * MIB
SLABS_BUDGET = 0.27  # of the logits, where nothing else is asked
WORTH = 0.6  # of the logits: what dividing must leave less than
MOST_PIECES = 128  # the graph grows with each

# NOTE float32 beside 16-bit gradients
# Wherever that costs little, they are kept in float32 until they are complete, the upstream gradient with
# them, and rounded once. Where it would cost much, the weight's is summed in 16 bits over few chunks, without
# its entries at the labels (see ops/products.py). Such a sum, and such a gradient of the hidden states, is
# rounded before the upstream gradient is known and, if that is no power of two, once more. Where no entries
# stand out, the first of two chunks is rounded where it is half of the sum, and its share is small beside
# that of 16-bit logits and their gradient; of more chunks each is rounded in a sum that is nearly the whole.
NARROW_CHUNKS = 8
UNLABELLED_CHUNKS = 2
LITTLE = 32 * MIB
LITTLE_OF_LOGITS = 1 / 64


@dataclass(frozen=True)
class HeadNumbers:
    """What a plan is made from.

    Attributes:
        n, v, d: rows, classes and hidden size; of this rank where the classes are sharded.
        element: bytes of a logit.
        weight_element: bytes of an element of the weight's gradient.
        backward: whether a gradient is wanted.
        wants_hidden, wants_weight: which.
        chained: whether a gradient needs memory of its own beside the logits.
        once: whether in chunks of rows it does not, as one kernel makes it with the statistics.
        added: bytes of what other products add to a logit, such as an adapter's, with its gradient.
        sides: why the columns cannot be divided, as those of several sides are not, or "".
        d_weights, d_hidden: the hidden sizes of all weights, and of all hidden states, of which gradients are
            made, added up; None for d.
        shares: how many products of a piece add to one gradient of the weight.
        taught: bytes of a teacher's logits for each of the student's, in pieces of the same rows.
        in_terms: whether gradients of the logits are multiplied as sums of 16-bit terms.
        skips: whether rows that do not count are not computed. Time is in proportion to those that do, of
            which nothing is known; memory is not, as all may.
        labelled: whether gradients have entries at labels, which stand out.
        float16: whether gradients are float16, which need the true upstream gradient within its range.
        escapes: why the logits must be in memory, or "".
        varies: why the gradient cannot be made in the forward, or "".
        sharded: whether the classes are sharded over ranks, which must then decide alike: a budget in bytes
            is not looked at where that could differ.
        uneven: whether ranks may have different numbers of classes, or none.
    """

    n: int
    v: int
    d: int
    element: int = 2
    weight_element: int = 2
    backward: bool = True
    wants_hidden: bool = True
    wants_weight: bool = True
    chained: bool = False
    once: bool = False
    added: int = 0
    sides: str = ""
    d_weights: int | None = None
    d_hidden: int | None = None
    shares: int = 1
    taught: int = 0
    in_terms: bool = False
    skips: bool = False
    labelled: bool = True
    float16: bool = False
    escapes: str = ""
    varies: str = ""
    sharded: bool = False
    uneven: bool = False

    @property
    def logits_bytes(self) -> int:
        return self.n * self.v * self.element


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
    wide_sum, wide_hidden = whole.wants_weight and whole.weight_element < 4, _waits_in_float32(whole)
    piece = max(piece_size(head.n, k) * _held_of_chunk(head) for head, k in zip(heads, each, strict=True))
    extra = _most_in_chunks(whole, piece * whole.v, wide_sum, wide_hidden)
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
    """
    pieces = _usual_chunks(head)
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
        return (
            "ranks with different numbers of classes may not decide alike how often they exchange statistics"
        )
    if head.float16:
        return OUT_OF_RANGE
    return ""


# One strategy each


def _is_small(head: HeadNumbers, budget: int | None) -> bool:
    return budget is None and head.logits_bytes < SMALL


def _usual_chunks(head: HeadNumbers) -> int:
    """As many chunks as leave products fast, and no more than pay; four of what is a little work."""
    rows = max(CHUNK_ROWS, min(CHUNK_WORK // max(head.v * head.d, 1), head.n // 4))
    return min(max((head.n + rows // 2) // rows, 1), NARROW_CHUNKS)


def _materialise(head: HeadNumbers, reason: str) -> Plan:
    return Plan(MATERIALISE, 1, False, head.n * head.v * _held(head), reason)


def _held(head: HeadNumbers) -> int:
    """Bytes that are held at once for each logit of a piece."""
    return head.element * (2 if head.backward and head.chained else 1) + head.added + head.taught


def _held_of_chunk(head: HeadNumbers) -> int:
    return _held(dataclasses.replace(head, chained=head.chained and not head.once))


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
    extra = rows * head.v * _held(head) + (rows * head.d * head.element if head.skips else 0)
    return Plan(FORWARD_ONLY, pieces, False, extra, "no gradient")


def _chunks(head: HeadNumbers, budget: int | None, reason: str, least: int = 1) -> Plan:
    if budget is None:
        return _chunks_of(head, _pieces(head.n, max(_usual_chunks(head), least)), reason)
    return _fewest([_chunks_of(head, k, reason) for k in _candidates(head.n)], budget)


def _chunks_of(head: HeadNumbers, pieces: int, reason: str) -> Plan:
    rows = piece_size(head.n, pieces)
    piece = rows * head.v * _held_of_chunk(head) + (2 * rows * head.d * head.element if head.skips else 0)
    wide_sum, wide_hidden = sums_in_float32(head, pieces), _waits_in_float32(head)
    extra = _most_in_chunks(head, piece, wide_sum, wide_hidden)
    return Plan(TOKEN_CHUNKS, pieces, wide_sum, extra, reason, wide_hidden)


def _most_in_chunks(head: HeadNumbers, piece: int, wide_sum: bool, wide_hidden: bool) -> int:
    """The extra memory of chunks of which one takes `piece` bytes."""
    beyond = _beyond_weight(head) if wide_sum else 0
    waiting = _beyond_hidden(head) if wide_hidden else 0
    # At last there is no piece, and the 16-bit gradient is made beside the float32 one.
    weight_at_last = head.v * _d_weights(head) * 4 + waiting if wide_sum else 0
    hidden_at_last = _hidden_at_last(head, wide_hidden) + beyond
    return max(piece + _terms(head, piece) + beyond + waiting, weight_at_last, hidden_at_last)


def _hidden_at_last(head: HeadNumbers, wide_hidden: bool) -> int:
    """Bytes beside the hidden states' gradient when it is made of what chunks put together.

    Rows that chunks took in their own order go back to their places in another tensor.
    """
    if wide_hidden:
        return head.n * _d_hidden(head) * 4
    return head.n * head.d * head.element if head.wants_hidden and head.skips else 0


def sums_in_float32(head: HeadNumbers, pieces: int) -> bool:
    """Whether the sum over chunks is float32 beside a 16-bit gradient of the weight."""
    if not _sums_16_bit(head, pieces):
        return False
    few = NARROW_CHUNKS if head.labelled else UNLABELLED_CHUNKS
    return pieces * head.shares > few or _is_little(_beyond_weight(head), head)


def _sums_16_bit(head: HeadNumbers, pieces: int) -> bool:
    return pieces > 1 and head.wants_weight and head.weight_element < 4


def _waits_in_float32(head: HeadNumbers) -> bool:
    return head.wants_hidden and head.element < 4 and _is_little(_beyond_hidden(head), head)


def _beyond_weight(head: HeadNumbers) -> int:
    return head.v * _d_weights(head) * (4 - head.weight_element)


def _beyond_hidden(head: HeadNumbers) -> int:
    return head.n * _d_hidden(head) * (4 - head.element)


def _d_weights(head: HeadNumbers) -> int:
    return head.d if head.d_weights is None else head.d_weights


def _d_hidden(head: HeadNumbers) -> int:
    return head.d if head.d_hidden is None else head.d_hidden


def _is_little(extra: int, head: HeadNumbers) -> bool:
    return extra <= max(LITTLE, int(LITTLE_OF_LOGITS * head.logits_bytes))


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
    piece = head.n * piece_size(head.v, pieces) * _held(head)
    wide = head.wants_hidden and head.element < 4
    extra = piece + _terms(head, piece) + (head.n * head.d * 4 if wide else 0)
    return Plan(VOCAB_SLABS, pieces, wide, extra, reason)


def _terms(head: HeadNumbers, piece: int) -> int:
    """Bytes of the terms of a piece's gradient, which are three of 16 bits for 32."""
    return min(TERMS_BYTES, piece * 3 // 2) if head.in_terms and head.backward else 0


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


def piece_size(size: int, pieces: int) -> int:
    """The size of all pieces but the last, which may be smaller."""
    step = -(-size // pieces)
    return step if step < 16 * ALIGNED else -(-step // ALIGNED) * ALIGNED


def _fewest(plans: list[Plan], budget: int) -> Plan:
    """The plan with the fewest pieces that keeps to the budget, or the one that comes nearest."""
    return next((p for p in plans if p.extra_bytes <= budget), min(plans, key=lambda p: p.extra_bytes))
