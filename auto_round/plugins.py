"""Load plugins: modules that call the `register_...` functions when imported (docs/plugins.md).

One is an entry point of an installed package, in the group `auto_round.plugins`, or a file that is named by path.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from auto_round import envs
from auto_round.errors import AutoRoundError, ConfigError

_PREFIX = "auto_round_plugin_"

# Loaded plugins: path or entry point -> (name, digest of the file or version of the package).
_LOADED: dict[str, tuple[str, str]] = {}


def load_plugins(files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = ()) -> None:
    """Load the installed plugins, the files of AR_PLUGINS, and `files`; each once in a process, in this order. Raises
    ConfigError when one cannot be loaded; the message names it, the error and, in a file, the line."""
    _load_entry_points()
    given = [files] if isinstance(files, (str, os.PathLike)) else list(files)
    listed = [part for part in (envs.AR_PLUGINS or "").split(os.pathsep) if part.strip()]
    for file in (*listed, *given):
        _load_file(Path(file).expanduser().absolute())


def loaded_plugins() -> dict[str, str]:
    """Digest or version of each loaded plugin by name; part of what decides whether a run can be resumed."""
    return dict(_LOADED.values())


@cache
def _load_entry_points() -> None:
    """Import the module of each entry point; of `module:function`, call the function too."""
    from importlib.metadata import entry_points  # slow to import, and `--help` needs no plugin

    for entry in sorted(entry_points(group="auto_round.plugins")):
        package = "unknown package" if entry.dist is None else f"package {entry.dist.name} {entry.dist.version}"
        key = f"{entry.name} = {entry.value}"
        if key in _LOADED:
            continue
        _LOADED[key] = (entry.name, package)  # now: what it imports may call `load_plugins`
        try:
            found = entry.load()
            if entry.attr:
                found()
        except Exception as error:
            del _LOADED[key]
            raise ConfigError(
                f"plugin {entry.name!r} of {package} cannot be loaded: {_describe(error)}; repair the package, or "
                "uninstall it"
            ) from error


def _load_file(path: Path) -> None:
    if str(path) in _LOADED:
        return
    if path.suffix != ".py" or not path.is_file():
        reason = "is not a Python file" if path.exists() else "does not exist"
        raise ConfigError(f"plugin {path} {reason}; give the path of a .py file")
    name = _PREFIX + path.stem
    while name in sys.modules:  # another file of this name
        name += "_"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        _LOADED[str(path)] = (name.removeprefix(_PREFIX), hashlib.sha256(path.read_bytes()).hexdigest()[:16])
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        _LOADED.pop(str(path), None)
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f" (line {lines[-1]})" if lines else ""
        raise ConfigError(f"plugin {path} cannot be loaded: {_describe(error)}{where}") from error


def _describe(error: Exception) -> str:
    return str(error) if isinstance(error, AutoRoundError) else f"{type(error).__name__}: {error}"
