"""Fused online-softmax cross entropy for torch.compile, however the loss is spelled."""

from .backend import Installation, inductor_ce_backend, install, uninstall
from .config import Options
from .errors import InductorCEError, MissError, OptionError, UnsupportedTorchError
from .explain import explain
from .report import Report
from .sites import Miss, Reason, Site

__version__ = "0.1.0"

__all__ = [
    "InductorCEError",
    "Installation",
    "Miss",
    "MissError",
    "OptionError",
    "Options",
    "Reason",
    "Report",
    "Site",
    "UnsupportedTorchError",
    "explain",
    "inductor_ce_backend",
    "install",
    "uninstall",
]
