"""How much extra memory a head takes in pieces, of numbers alone, and which sums of it are float32."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ..ops.gemm import TERMS_BYTES

MIB = 2**20
ALIGNED = 16  # rows and columns, so that products find their factors where they read fastest

# NOTE float32 beside 16-bit gradients
# Wherever that costs little, they are kept in float32 until they are complete, the upstream gradient with
# them, and rounded once. Where it would cost much, the weight's is summed in 16 bits over few chunks, without
# its entries at the labels (see `ops/label_products.py`). Such a sum, and such a gradient of the hidden
# states, is rounded before the upstream gradient is known and, if that is no power of two, once more. Where
# no entries stand out, the first of two chunks is rounded where it is half of the sum, and its share is small
# beside that of 16-bit logits and their gradient; of more chunks each is rounded in a sum that is nearly the
# whole.
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


def held(head: HeadNumbers) -> int:
    """Bytes that are held at once for each logit of a piece."""
    return head.element * (2 if head.backward and head.chained else 1) + head.added + head.taught


def held_of_chunk(head: HeadNumbers) -> int:
    return held(dataclasses.replace(head, chained=head.chained and not head.once))


def most_in_chunks(head: HeadNumbers, piece: int, wide_sum: bool, wide_hidden: bool) -> int:
    """The extra memory of chunks of which one takes `piece` bytes."""
    beyond = _beyond_weight(head) if wide_sum else 0
    waiting = _beyond_hidden(head) if wide_hidden else 0
    # At last there is no piece, and the 16-bit gradient is made beside the float32 one.
    weight_at_last = head.v * _d_weights(head) * 4 + waiting if wide_sum else 0
    hidden_at_last = _hidden_at_last(head, wide_hidden) + beyond
    return max(piece + terms_of_piece(head, piece) + beyond + waiting, weight_at_last, hidden_at_last)


def _hidden_at_last(head: HeadNumbers, wide_hidden: bool) -> int:
    """Bytes beside the hidden states' gradient when it is made of what chunks put together.

    Rows that chunks took in their own order go back to their places in another tensor.
    """
    if wide_hidden:
        return head.n * _d_hidden(head) * 4
    return head.n * head.d * head.element if head.wants_hidden and head.skips else 0


def sums_in_float32(head: HeadNumbers, pieces: int) -> bool:
    """Whether the sum over chunks is float32 beside a 16-bit gradient of the weight."""
    if pieces == 1 or not head.wants_weight or head.weight_element >= 4:
        return False
    few = NARROW_CHUNKS if head.labelled else UNLABELLED_CHUNKS
    return pieces * head.shares > few or _is_little(_beyond_weight(head), head)


def waits_in_float32(head: HeadNumbers) -> bool:
    """Whether a 16-bit gradient of the hidden states is float32 until its upstream gradient is known."""
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


def terms_of_piece(head: HeadNumbers, piece: int) -> int:
    """Bytes of the terms of a piece's gradient, which are three of 16 bits for 32."""
    return min(TERMS_BYTES, piece * 3 // 2) if head.in_terms and head.backward else 0


def piece_size(size: int, pieces: int) -> int:
    """The size of all pieces but the last, which may be smaller."""
    step = -(-size // pieces)
    return step if step < 16 * ALIGNED else -(-step // ALIGNED) * ALIGNED
