"""install, uninstall, and the backend."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any

from ..common.compat.inductor import current_compile_fx, inductor_config, set_compile_fx
from ..common.compat.versions import check_torch
from ..common.options import Options, make_options
from ..ops import lowering
from .deferral import deferring, options_in_force
from .pass_slots import HEADS_SLOT, LOSSES_SLOT, passes_in, slot_value
from .passes import FuseHeads, FuseLosses

SLOTS = {LOSSES_SLOT: FuseLosses, HEADS_SLOT: FuseHeads}
OURS = (FuseLosses, FuseHeads)


class Installation:
    """What `install` returns. Leaving the `with` block, or `uninstall()`, takes this installation back."""

    def __init__(self, options: Options):
        self.options = options

    def uninstall(self) -> None:
        if self in _installed:
            _installed.remove(self)
            _apply()

    def __enter__(self) -> Installation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.uninstall()

    def __repr__(self) -> str:
        return f"<inductor_ce installed with {self.options}>"


# The last one is in force. Its passes stand in Inductor's configuration behind those of others.
_installed: list[Installation] = []
_before: dict[str, Any] = {}


def install(**options: Any) -> Installation:
    """Let every `torch.compile` with Inductor fuse the losses that it finds, in every thread of the process.

    It sets Inductor's configuration. Of that each thread has its own from torch 2.13; what is compiled in
    others is given the passes when it is compiled.

    Installing again puts the new options in force; passes of others that are configured already keep
    running, before ours.

    Args:
        **options: fields of `Options`.

    Returns:
        A handle; as a context manager it restores everything on leaving the block, exceptions included.

    Raises:
        OptionError: an option of the wrong name or value.
        UnsupportedTorchError: a torch outside the supported range.
    """
    check_torch()
    handle = Installation(make_options(options))
    lowering.register()
    _installed.append(handle)
    _apply()
    return handle


def uninstall() -> None:
    """Take back every `install`. Without one, nothing happens."""
    _installed.clear()
    _apply()


def installed_options() -> Options:
    """The options in force in this thread, the defaults where nothing is installed."""
    return options_in_force(_missing({})) or Options()


_here = threading.local()  # whether Inductor's configuration of this thread has been set by us


def _missing(patches: dict[str, Any]) -> dict[str, Any]:
    """What the configuration of a thread that installed nothing lacks, under patches of it.

    A thread that did install may have taken our passes out since, and that is respected.
    """
    if not _installed or getattr(_here, "is_set", False) or options_in_force(patches) is not None:
        return {}
    return with_passes(patches, _installed[-1].options)


def with_passes(patches: dict[str, Any], options: Options) -> dict[str, Any]:
    """What the slots are to hold under patches of the configuration: our passes behind those of others."""
    return {
        slot: slot_value((*_foreign(patches.get(slot, getattr(inductor_config, slot))), make_pass(options)))
        for slot, make_pass in SLOTS.items()
    }


def _apply() -> None:
    """Make Inductor's configuration say what `_installed` says, and no more."""
    _here.is_set = bool(_installed)
    for slot, make_pass in SLOTS.items():
        value = getattr(inductor_config, slot)
        foreign = _foreign(value)
        if _installed:
            if len(foreign) == len(passes_in(value)):
                _before[slot] = value
            value = slot_value((*foreign, make_pass(_installed[-1].options)))
        else:
            before = _before.pop(slot, value)
            value = before if passes_in(before) == foreign else slot_value(foreign)
        setattr(inductor_config, slot, value)
    _wrap() if _installed else _unwrap()


# What compile_fx was before it was wrapped, and the wrapper, while that is in place or within another's.
_wrapped: list[Any] = []


def _wrap() -> None:
    """Let torch.compile's own backend return logits lazily."""
    if not _wrapped:
        original = current_compile_fx()
        _wrapped[:] = [original, deferring(original, _missing)]
        set_compile_fx(_wrapped[1])


def _unwrap() -> None:
    """Put compile_fx back. Where somebody has wrapped it since, ours stays within and does nothing."""
    if _wrapped and current_compile_fx() is _wrapped[1]:
        set_compile_fx(_wrapped[0])
        _wrapped.clear()


def _foreign(value: Any) -> tuple[Any, ...]:
    return tuple(p for p in passes_in(value) if not isinstance(p, OURS))
