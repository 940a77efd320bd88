"""The exceptions that users can meet."""


class InductorCEError(Exception):
    """Base of every exception raised by inductor_ce."""


class OptionError(InductorCEError, ValueError):
    """An option of the wrong name or value."""


class UnsupportedTorchError(InductorCEError, ImportError):
    """The installed torch is outside the supported range."""


class MissError(InductorCEError):
    """A loss was left unfused while `on_miss="raise"`."""
