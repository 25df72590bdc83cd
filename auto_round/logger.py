"""The package's logger. Importing this module adds no output."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

from auto_round import envs
from auto_round.errors import ConfigError, OutputError, nearest

TRACE = 5
"""Below DEBUG: one line per layer."""

logger = logging.getLogger("auto_round")
logger.addHandler(logging.NullHandler())

_seen: set[str] = set()


class _StderrHandler(logging.StreamHandler):
    """Writes to the current sys.stderr, so that log lines do not break a progress bar that redirects it."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def setup_logging(level: str | int | None = None, log_file: str | Path | None = None) -> None:
    """Show the package's messages on stderr, and write all of them to `log_file` when one is given.

    Calling it again changes level and file, and never doubles the output. `level` None takes AR_LOG_LEVEL. Raises
    ConfigError for an unknown level and OutputError when the file cannot be opened.
    """
    given = envs.get("AR_LOG_LEVEL") if level is None else level
    name = str(given).strip().upper()
    if not isinstance(given, int) and name not in envs.LOG_LEVELS:
        raise ConfigError(
            f"log level {level!r} is not known; use {', '.join(envs.LOG_LEVELS)}{nearest(name, envs.LOG_LEVELS)}"
        )
    number: int = given if isinstance(given, int) else TRACE if name == "TRACE" else getattr(logging, name)
    file_handler: logging.FileHandler | None = None
    if log_file is not None:
        try:
            Path(log_file).parent.mkdir(parents=True, exist_ok=True)
            file_handler = logging.FileHandler(log_file, encoding="utf-8")
        except OSError as err:
            raise OutputError(
                f"log file {str(log_file)!r} cannot be opened: {err.strerror}; choose another path"
            ) from err
        file_handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.addLevelName(TRACE, "TRACE")
    _remove_own_handlers()
    screen = _StderrHandler()
    screen.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S"))
    screen.setLevel(number)
    logger.addHandler(screen)
    if file_handler is not None:
        logger.addHandler(file_handler)
        number = min(number, logging.DEBUG)
    logger.setLevel(number)


def ensure_logging() -> None:
    """Call `setup_logging()` unless the program has set up logging itself."""
    if not logging.getLogger().handlers and all(isinstance(h, logging.NullHandler) for h in logger.handlers):
        setup_logging()


def _remove_own_handlers() -> None:
    for handler in list(logger.handlers):
        if isinstance(handler, (_StderrHandler, logging.FileHandler)):
            logger.removeHandler(handler)
            handler.close()


def warn_once(message: str, *args: Any, key: str | None = None) -> None:
    """Log a warning once per process; calls with the same text (or `key`) count as one."""
    text = key if key is not None else (message % args if args else message)
    if text not in _seen:
        _seen.add(text)
        logger.warning(message, *args)
