"""The package's exceptions: one closed hierarchy under `AutoRoundError`, each with an exit code.

A message says what was given, what is allowed and what to do. The command line prints it on one line.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AutoRoundError(Exception):
    """Base of all errors raised on purpose by this package."""

    exit_code: int = 1


class ConfigError(AutoRoundError, ValueError):
    """An argument, flag, scheme or layer pattern is unknown, malformed or contradicts another one."""

    exit_code = 2


class ModelError(AutoRoundError):
    """The model cannot be found, is not a causal language model, or its files are damaged."""

    exit_code = 3


class DataError(AutoRoundError):
    """The calibration or evaluation data is missing, unreadable or leaves no usable sample."""

    exit_code = 4


class DeviceError(AutoRoundError):
    """The device does not exist on this machine or cannot run the job."""

    exit_code = 5


class OutputError(AutoRoundError, OSError):
    """The output folder cannot be used: not empty, not writable, or too little disk."""

    exit_code = 6


class UnsupportedError(AutoRoundError, ValueError, NotImplementedError):
    """A combination that is not supported, such as a scheme that a format cannot store."""

    exit_code = 7


class MissingFeatureError(UnsupportedError, ImportError):
    """A class was imported whose feature this version does not have."""


class NumericsError(AutoRoundError, ArithmeticError):
    """NaN or Inf in weights, activations, scales or loss; the message names the layer."""

    exit_code = 8


class VerifyError(AutoRoundError):
    """The saved files differ from what was computed."""

    exit_code = 9


class LibraryError(AutoRoundError):
    """A library does not behave as this version of the package expects; the model is not at fault."""

    exit_code = 10


class Stopped(KeyboardInterrupt):
    """The run was stopped by a signal; the text says where, and whether the same command resumes there. `number` is the
    signal's: 2 is SIGINT (Ctrl-C), 15 SIGTERM."""

    def __init__(self, text: str = "stopped", number: int = 2) -> None:
        super().__init__(text)
        self.number = number

    @property
    def exit_code(self) -> int:
        return 128 + self.number


def first_line(error: object) -> str:
    """The first line of another library's error message, or the name of its type when it is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """The clause `; did you mean 'a', 'b'?` with the names closest to `name`, or an empty string."""
    lowered = {k.lower(): k for k in known}
    close = difflib.get_close_matches(name.lower(), lowered, n=count, cutoff=0.5)
    return f"; did you mean {', '.join(repr(lowered[c]) for c in close)}?" if close else ""
