"""The exceptions that users can meet."""

FIRST_TORCH, AFTER_LAST_TORCH = (2, 11), (2, 16)


class InductorCEError(Exception):
    """Base of every exception raised by inductor_ce."""


class OptionError(InductorCEError, ValueError):
    """An option of the wrong name or value."""


class InputError(InductorCEError, ValueError):
    """An argument of a loss function that has no meaning."""


def unsupported(version: str) -> str:
    """The sentence that says which versions of torch are supported, and that `version` is none of them."""
    first, after = (".".join(map(str, v)) for v in (FIRST_TORCH, AFTER_LAST_TORCH))
    return f"inductor_ce supports torch>={first},<{after}; this is torch {version}"


class UnsupportedTorchError(InductorCEError, ImportError):
    """The installed torch is outside the supported range."""


class DerivativeError(InductorCEError, RuntimeError):
    """A derivative that the operators have not: a second one, in forward mode, or under torch.func."""


class LazyLogitsError(InductorCEError, RuntimeError):
    """Logits that were returned lazily are read when what they are made of is no longer there."""


class MissError(InductorCEError):
    """A loss was left unfused while `on_miss="raise"`."""
