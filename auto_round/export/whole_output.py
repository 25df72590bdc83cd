"""Files of which all are there in the end, or none."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import TypeVar

_Own = TypeVar("_Own", bound="WholeOutput")


class WholeOutput(ABC):
    """A writer as a context manager: leaving it normally finishes, unless that was done; leaving it by an exception, or
    one in finishing, removes what was begun."""

    _finished = False

    @abstractmethod
    def finish(self) -> object:
        """Give what was written its names."""

    @abstractmethod
    def abort(self) -> None:
        """Remove what was begun and not finished."""

    def __enter__(self: _Own) -> _Own:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abort()
        elif not self._finished:
            try:
                self.finish()
            except BaseException:
                self.abort()
                raise
