"""The exceptions that users can meet."""

FIRST_TORCH, AFTER_LAST_TORCH = (2, 11), (2, 16)


class InductorCEError(Exception):
    """Base of every exception raised by inductor_ce."""


class OptionError(InductorCEError, ValueError):
    """An option of the wrong name or value."""


class InputError(InductorCEError, ValueError):
    """An argument of a loss function that has no meaning."""


def unsupported(version: str) -> str:
    """Which versions of torch are supported, that `version` is none of them, and what to do."""
    first, after = (".".join(map(str, v)) for v in (FIRST_TORCH, AFTER_LAST_TORCH))
    wanted = f"torch>={first},<{after}"
    return (
        f"inductor_ce supports {wanted}; this is torch {version}. "
        f'Install one that is supported, pip install "{wanted}", or a release of inductor_ce for this torch.'
    )


class UnsupportedTorchError(InductorCEError, ImportError):
    """The installed torch is outside the supported range."""


class DerivativeError(InductorCEError, RuntimeError):
    """A derivative that the operators have not: a second one, in forward mode, or under torch.func."""


class LazyLogitsError(InductorCEError, RuntimeError):
    """Logits that were returned lazily are read when what they are made of is no longer there."""


class ArtefactError(InductorCEError, RuntimeError):
    """Compiled code that was saved is loaded by another version of inductor_ce than made it."""


class MissError(InductorCEError):
    """A loss was left unfused while `on_miss="raise"`."""
