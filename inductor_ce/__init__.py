"""Fused online-softmax cross entropy for torch.compile, however the loss is spelled.

NOTE Why names are imported when they are first used
Importing Inductor and sympy takes seconds. `import inductor_ce` must cost a program nothing that does not
compile in the end, so a name brings its module along only when somebody asks for it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api.backend import inductor_ce_backend
    from .api.defer import defer, restore
    from .api.explain import explain
    from .api.functional import cross_entropy, linear_cross_entropy
    from .api.install import Installation, install, uninstall
    from .api.report import Report
    from .common.errors import (
        ArtefactError,
        DerivativeError,
        InductorCEError,
        InputError,
        LazyLogitsError,
        MissError,
        OptionError,
        UnsupportedTorchError,
    )
    from .common.findings import Miss, Reason, Site
    from .common.options import Options

__version__ = "0.1.0"

__all__ = [
    "ArtefactError",
    "DerivativeError",
    "InductorCEError",
    "InputError",
    "Installation",
    "LazyLogitsError",
    "Miss",
    "MissError",
    "OptionError",
    "Options",
    "Reason",
    "Report",
    "Site",
    "UnsupportedTorchError",
    "cross_entropy",
    "defer",
    "explain",
    "inductor_ce_backend",
    "install",
    "linear_cross_entropy",
    "restore",
    "uninstall",
]

_HOMES = {
    "api.backend": ("inductor_ce_backend",),
    "api.install": ("Installation", "install", "uninstall"),
    "common.options": ("Options",),
    "common.errors": (
        *("ArtefactError", "DerivativeError", "InductorCEError", "InputError", "LazyLogitsError"),
        *("MissError", "OptionError", "UnsupportedTorchError"),
    ),
    "api.defer": ("defer", "restore"),
    "api.explain": ("explain",),
    "api.functional": ("cross_entropy", "linear_cross_entropy"),
    "api.report": ("Report",),
    "common.findings": ("Miss", "Reason", "Site"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
