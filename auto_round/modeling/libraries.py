"""What to say when a library does something differently from what this package knows, as after a renaming."""

from __future__ import annotations

import platform
from importlib import metadata

from auto_round._version import __version__
from auto_round.errors import LibraryError


def library_error(found: str, instead: str) -> LibraryError:
    """The error for an observer that saw nothing, or for anything else that only a change in a library explains.

    It is told apart from what a model lacks: the message says that this package is at fault, and with which versions.

    Args:
        found: what was expected and what was found instead.
        instead: what the user can do until a new version of this package knows better.
    """
    libraries = ", ".join(f"{name} {_installed(name)}" for name in ("torch", "transformers"))
    return LibraryError(
        f"{found}. This is a fault of auto-round with the installed libraries, not of the model: please report it with "
        f"the model's config.json and these versions: auto-round {__version__}, {libraries}, "
        f"Python {platform.python_version()}. Until it is mended, {instead}"
    )


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "of unknown version"
