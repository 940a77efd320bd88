"""What is compared: plain torch.compile, the same after `install()`, and a peer's patch of the model."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...api.install import install
from ..shared.compilers import BASELINE, OURS
from ..shared.peers import NotOffered, find
from .models import Model

LIGER = "liger_kernel"


@dataclass(frozen=True)
class System:
    """A way to train. `options` are those of `install`, or None without it."""

    name: str
    options: dict[str, Any] | None = None
    patch: str = ""

    def concerns(self, model: Model) -> bool:
        """Whether it does something else for `model` than the others do."""
        if self.patch:
            return bool(model.liger)
        return not self.options or model.program == "returned"

    def refused(self, model: Model) -> NotOffered | None:
        """Why this system cannot be had for `model`, where that is known before anything runs."""
        apply = find("liger_kernel.transformers", model.liger) if self.patch else None
        return apply if isinstance(apply, NotOffered) else None

    @contextlib.contextmanager
    def of(self, model: Model, made: nn.Module) -> Iterator[None]:
        """Within the block, torch.compile of `made` is this system."""
        if self.options is not None:
            with install(**self.options):
                yield
        elif self.patch:
            with _patched(model, made):
                yield
        else:
            yield


@contextlib.contextmanager
def _patched(model: Model, made: nn.Module) -> Iterator[None]:
    """The head and its loss by Liger, and nothing else; taken back from this model at the end."""
    apply = find("liger_kernel.transformers", model.liger)
    kind = type(made)
    others = ("rope", "rms_norm", "swiglu", "geglu", "cross_entropy")
    before = copy.copy(kind.forward)
    try:
        apply(fused_linear_cross_entropy=True, **{name: False for name in others if _takes(apply, name)})
        yield
    finally:
        kind.forward = before


def _takes(function: Any, name: str) -> bool:
    return name in function.__code__.co_varnames[: function.__code__.co_argcount]


SYSTEMS = {
    system.name: system
    for system in (
        System(BASELINE),
        System(OURS, {}),
        System(f'{OURS}, returned_logits="nan"', {"returned_logits": "nan"}),
        System(LIGER, patch=LIGER),
    )
}
