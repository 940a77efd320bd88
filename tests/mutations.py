"""Wrong losses: a generated one with a slip in it, by which it means something else, or nothing.

A mutation is a place and what is put there: around or in one piece of `compose.statements`. What it
means then, eager says. In code, `{y}` are the labels that are picked by, `{x}` what they pick from.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from compose import Spelling, filled, statements

Pieces = dict[str, str]
Slip = Callable[[Pieces, Spelling], None]


@dataclass(frozen=True)
class Mutation:
    """`slip` changes the pieces of a spelling; one that it leaves alone is not for it."""

    family: str
    name: str
    slip: Slip

    def __repr__(self) -> str:
        return f"{self.family}: {self.name}"


def mutated(spelling: Spelling, mutation: Mutation) -> Pieces | None:
    """The pieces with the slip; None where there is no place for it."""
    pieces = statements(spelling)
    mutation.slip(pieces, spelling)
    return None if pieces == statements(spelling) else pieces


def _each(text: str) -> list[str]:
    """What stands between bars; a newline is written \\n."""
    return [part.strip().replace("\\n", "\n") for part in re.split(r"\s\|(?:\s|$)", text)]


# One operand seen otherwise in one place

SEEN_OTHERWISE = _each("""
    {x}.detach() | {x} / 0.7 | {x} + 1.0 | -{x} | {x} ** 2 | {x} * 1.0 | {x} * temperature | {x}.exp() |
    {x}.abs() | {x}.flip(0) | {x}.roll(1, 0) | {x}.roll(1, {d}) | {x}.flip({d}) | {x}[:1] | {x}.double() |
    {x}.nan_to_num() | {x}.softmax({d}) | {x}.log_softmax({d}) | {x}.softmax(0) | {x}.log_softmax(0) |
    {x}.cumsum({d}) | {x}.clamp(max=0.5) | {x}.clamp(min=-2.0) | {x}.masked_fill({x} < 0, -20.0) |
    {x}.sort({d}).values | {x} - {x}.mean() | {x} - {x}.amax({d}, keepdim=True) |
    {x} - {x}.amax(0, keepdim=True) | F.dropout({x}, 0.0) | {x}.bfloat16().to({x}.dtype) |
    {x}.int().to({x}.dtype) | {x} * {x}.detach() | {x}.expand_as({x}) |
    {x}.transpose(0, 1).reshape({x}.shape) | {x}.transpose(-2, -1).reshape({x}.shape) |
    {x}.flatten().reshape({x}.shape) | {x}.unsqueeze(0).squeeze(0) |
    torch.where({x} > 0, {x}, {x}.detach()) | {x}.narrow({d}, 0, {V} - 3) | {x}.narrow({d}, 1, {V} - 1)
""")


def _seen_otherwise(piece: str, expression: str) -> Slip:
    def slip(pieces: Pieces, s: Spelling) -> None:
        x = "logp" if piece == "pick" and s.wide else "z"
        if pieces[piece]:
            other = filled(expression.replace("{x}", x), s)
            pieces[piece] = f"kept = {x}\n{x} = {other}\n{pieces[piece]}\n{x} = kept"

    return slip


# Edits in place between uses

EDITS = _each(r"""
    z.mul_(1.5) | z += 1 | z[0] = 0.5 | z.zero_() | z.tanh_() | z.clamp_(max=1.0) |
    z.masked_fill_(z > 1, 0.0) | z.detach().mul_(1.5) | z.select({d}, 0).fill_(1.0) |
    z.view(z.shape).add_(1) | z.flatten()[:3].mul_(2) | z.unsqueeze(0)[0, 0] *= 2 |
    z.transpose(0, 1).mul_(0.5) | z.copy_(z.flip({d})) | logits.detach().mul_(1.5) |
    with torch.no_grad():\n    z.mul_(1.5) | {y}.fill_(1) | {y}[..., 0] = 1 | {y}.add_(1).remainder_({V}) |
    {y}.view(-1)[0] = 2 | {y}.copy_({y}.flip(-1)) | {y} *= 0 | {y}[{y} == 1] = 2 |
    {y}.unsqueeze(-1).fill_(0) | {y}.flatten()[0] = 3 | y.zero_() | labels.fill_(2) | logp.mul_(0.5) |
    logp[..., 0] = 0 | logp.exp_() | lse.mul_(0.5) | lse += 1 | picked.neg_() | m.zero_() | s.mul_(2) |
    e.mul_(2) | q.mul_(2) | rows.mul_(2) | rows.view(-1)[0] = 0 | rows.detach().zero_()
""")
PLACES = _each("counts | safe | normaliser | pick | rows | smoothing | z_rows | mask | reduction | z_term")
ALWAYS_THERE = ("z", "y", "safe", "labels", "logits", "with torch")


def _edited(place: str, edit: str, copied: bool) -> Slip:
    """`edit` after a place; of a copy, since eager takes no edit of a leaf."""
    target = edit.replace("{y}", "y").split(".")[0].split("[")[0].split(" ")[0]

    def slip(pieces: Pieces, s: Spelling) -> None:
        made = "\n".join(list(pieces.values())[: list(pieces).index(place) + 1])
        if not pieces[place] or not (target in (*ALWAYS_THERE, "with") or f"{target} = " in made):
            return
        if copied:
            pieces["start"] = pieces["start"].replace("z = logits", "z = logits.clone()")
        pieces[place] += "\n" + filled(edit.replace("{y}", _picker(s)), s)

    return slip


def _picker(s: Spelling) -> str:
    return "safe" if s.picks_by_hand else "y"


# Slips of the pen: name, piece, and texts of which the first that is found is replaced

SLIPS = r"""
shift missing in the exponential; normaliser; (z - m).exp() -> z.exp() | s.exp() -> z.exp()
shift missing in the exponential; normaliser; torch.exp(s) -> torch.exp(z) | torch.exp(z - m) -> torch.exp(z)
shift missing in one logsumexp; normaliser; logsumexp(z - m -> logsumexp(z
shift missing outside the exponential; normaliser; logp = s - -> logp = z - | (z - m) - -> z -
maximum not added back; normaliser; z - (m + -> z - ( | + m.squeeze({d}) -> | m.squeeze({d}) + -> | (m + -> (
shift taken twice; normaliser; s = z - m -> s = z - 2 * m | (z - m) -> (z - 2 * m)
half a shift; normaliser; \ns = z - m -> \nm = m / 2\ns = z - m | \nlse -> \nm = m / 2\nlse
shift added the wrong way; normaliser; m + -> -m + | + m.squeeze -> - m.squeeze
maximum of everything; normaliser; max({d}, keepdim=True).values -> max() | amax({d}, keepdim=True) -> amax()
maximum over another axis; normaliser; max({d}, keepdim -> max(0, keepdim
minimum; normaliser; amax( -> amin( | z.max( -> z.min( | torch.max( -> torch.min(
mean for a shift; normaliser; amax( -> mean(
no axis kept; normaliser; , keepdim=True) -> )
mean of exponentials; normaliser; .sum( -> .mean(
largest exponential; normaliser; .sum( -> .amax(
powers of two; normaliser; .exp() -> .exp2() | torch.exp( -> torch.exp2(
logarithm to base two; normaliser; .log() -> .log2() | torch.log( -> torch.log2(
logarithm of one more; normaliser; .log() -> .log1p() | torch.log( -> torch.log1p(
epsilon inside the logarithm; normaliser; .log() -> .add(1e-3).log()
epsilon in the denominator; normaliser; e / e.sum( -> e / (0.1 + e).sum(
exponentials weighted; normaliser; .exp().sum( -> .exp().mul(2.0).sum(
exponentials clamped; normaliser; .exp().sum( -> .exp().clamp(min=0.01).sum(
log_softmax for softmax; normaliser; .softmax( -> .log_softmax(
softmax for log_softmax; normaliser; log_softmax( -> softmax(
sigmoids; normaliser; F.log_softmax(z, dim={d}) -> F.logsigmoid(z)
running normaliser; normaliser; logsumexp( -> logcumsumexp(
normaliser of all rows; normaliser; logsumexp({d}) -> logsumexp((0, {d}))
label not squeezed; pick; .squeeze({d}) -> | [:, 0] -> | [..., 0] ->
label in the wrong place; pick; safe.unsqueeze({d}) -> safe.unsqueeze(0)
labels beside the classes; pick; safe[..., None] -> safe | safe.unsqueeze(-1) -> safe
mean of the picked; pick; ).sum( -> ).mean(
largest of the picked; pick; ).sum( -> ).amax(
other classes; pick; == -> != | != -> == | torch.eq -> torch.ne
labels or more; pick; == -> >= | torch.eq -> torch.ge
classes from one; pick; torch.arange({V}) -> torch.arange(1, {V} + 1)
rows backwards; pick; torch.arange({x}.shape[0]) -> torch.arange({x}.shape[0]).flip(0)
all rows; pick; torch.arange({x}.shape[0]) -> :
one-hot of another size; pick; F.one_hot(safe, {V}) -> F.one_hot(safe, {V} + 1)
picked twice; pick; picked = -> picked = 2 *
lse detached; rows; lse -> lse.detach()
picked detached; rows; picked -> picked.detach()
sum for a difference; rows; lse - -> lse +
product for a difference; rows; lse - -> lse *
every row with every row; rows; picked -> picked.unsqueeze(-1)
rows in another order; rows; picked -> picked.flip(0)
rows transposed; rows; picked -> picked.transpose(0, -1)
rows rounded; rows; picked -> picked.bfloat16().float()
rows squared; rows; picked -> picked ** 2
other smoothing; smoothing; 0.1 -> 0.3
target squared; smoothing; \nrows -> \nq = q * q\nrows
target edited; smoothing; \nrows -> \nq[..., 0] = 0.5\nrows
target over its largest; smoothing; \nrows -> \nq = q / q.max()\nrows
target of other rows; smoothing; \nrows -> \nq = q.flip(0)\nrows
target that wants a gradient; smoothing; \nrows -> \nq = q + 0 * {x}\nrows
log-probabilities detached; smoothing; logp -> logp.detach()
mean of everything; smoothing; .mean({d}) -> .mean() | .sum({d}) -> .sum()
z-loss detached; z_rows; z.logsumexp -> z.detach().logsumexp | lse -> lse.detach()
z-loss over another axis; z_rows; logsumexp({d}) -> logsumexp(0)
"""


def _text(piece: str, changes: str) -> Slip:
    def slip(pieces: Pieces, s: Spelling) -> None:
        for change in _each(changes):
            old, _, new = change.partition(" ->")
            old, new = filled(old, s), filled(new.removeprefix(" "), s)
            if old in pieces[piece]:
                pieces[piece] = pieces[piece].replace(old, new, 1)
                return

    return slip


def _other_axis(piece: str) -> Slip:
    def slip(pieces: Pieces, s: Spelling) -> None:
        if pieces[piece]:
            other = next(axis for axis in range(s.viewed.rank) if axis != s.dim % s.viewed.rank)
            pieces[piece] = filled(getattr(s, piece), replace(s, dim=other))

    return slip


def _without_grad(piece: str) -> Slip:
    def slip(pieces: Pieces, s: Spelling) -> None:
        if pieces[piece]:
            pieces[piece] = "with torch.no_grad():\n" + textwrap.indent(pieces[piece], "    ")

    return slip


# Other labels, other logits, and results that need more than the loss

LABELS = _each("""
    {y}[..., :1] | {y}[:1] | {y}[..., :-1] | {y}[..., None] | {y}.unsqueeze(0) | {y}.expand(2, *{y}.shape) |
    {y}.reshape(-1) | {y}.transpose(0, -1) | {y}.transpose(0, -1).reshape({y}.shape) | {y}.flip(0) |
    {y}.roll(1, -1) | ({y} + 1) % {V} | {y} // 2 | {y}.clamp(min=3) | {y} - {V} | {y} + {V} | {y} * 0 - 1 |
    {y}.neg() | ~{y} | {y}.float().long() | {y}.float() | {y}.to(torch.uint8) | {y}.bool() | {y}.int() |
    {y}.to(torch.int16) | torch.full_like({y}, {V}) | torch.cat([{y}, {y}]) | F.one_hot({y}, {V})
""")
LOGITS = _each("""
    z.softmax({d}) | z.log_softmax({d}) | z.softmax(0) | z.log_softmax(0) | z.softmax({d}).log() |
    z.detach() | z - z.amax() | z - z.logsumexp(0, keepdim=True) | z.logsumexp({d}, keepdim=True) - z |
    z.log_softmax({d}).exp() | z.masked_fill(z < -1, float("-inf"))
""")
RESULTS = _each("""
    logp.exp().amax() | 0.1 * logp[..., 0].sum() | (logp * logp.detach()).sum() | logp.std() | z.sum() |
    m.mean() | z.tanh().mean() | lse.sum() | z.softmax({d}).amax({d}).mean() | z.logsumexp(0).mean() |
    m.amax() | picked.std() | logp.log_softmax({d}).amin() | z.argmax({d}).float().mean() |
    (z.argmax({d}) == y).float().sum() | (logp.exp() * logp).sum({d}).mean() | picked[..., -1].mean() |
    z.softmax({d}).amax() * loss
""")


def _first(piece: str, name: str, expression: str) -> Slip:
    """A tensor replaced before a piece, for all that follows."""

    def slip(pieces: Pieces, s: Spelling) -> None:
        target = _picker(s) if name == "y" else name
        pieces[piece] = filled(f"{target} = {expression.replace('{y}', target)}\n", s) + pieces[piece]

    return slip


def _result(expression: str) -> Slip:
    def slip(pieces: Pieces, s: Spelling) -> None:
        made = "\n".join(pieces.values())
        names = [
            name
            for name in ("logp", "lse", "picked", "m")
            if f"{name}." in expression or f"{name}[" in expression
        ]
        if all(f"{name} = " in made or f"{name}, _ = " in made for name in names):
            pieces["result"] = "return loss + " + filled(expression, s)

    return slip


def _all() -> Iterator[Mutation]:
    for line in SLIPS.strip().splitlines():
        name, piece, changes = line.split("; ", 2)
        yield Mutation("slip", name, _text(piece, changes))
    for piece in ("normaliser", "pick", "smoothing"):
        yield Mutation("slip", f"{piece} along another axis", _other_axis(piece))
    for piece in ("normaliser", "pick", "rows", "smoothing", "z_rows"):
        yield Mutation("slip", f"{piece} under no_grad", _without_grad(piece))
    for piece in ("normaliser", "pick", "smoothing", "z_rows", "z_term"):
        for expression in SEEN_OTHERWISE:
            yield Mutation("other operand", f"{expression} in {piece}", _seen_otherwise(piece, expression))
    for edit in EDITS:
        for place in PLACES:
            yield Mutation("edit", f"{edit!r} after {place}", _edited(place, edit, copied=True))
        yield Mutation("edit", f"{edit!r} of no copy", _edited("normaliser", edit, copied=False))
    for expression in LABELS:
        yield Mutation("tensor", f"labels {expression}", _first("pick", "y", expression))
    for expression in LOGITS:
        yield Mutation("tensor", f"logits {expression}", _first("normaliser", "z", expression))
    for expression in RESULTS:
        yield Mutation("tensor", f"result + {expression}", _result(expression))


MUTATIONS = list(_all())
FAMILIES = {
    family: [m for m in MUTATIONS if m.family == family]
    for family in dict.fromkeys(m.family for m in MUTATIONS)
}
