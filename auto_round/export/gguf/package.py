"""The optional `gguf` package, which owns the file format."""

from __future__ import annotations

import importlib
from typing import Any

from auto_round.errors import UnsupportedError


def gguf_package() -> Any:
    """The `gguf` module. Raises UnsupportedError when it is not installed."""
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise UnsupportedError('GGUF files need their own package: pip install "auto-round[gguf]"') from error
