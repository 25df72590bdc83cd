"""From what the user typed to a local folder with a checkpoint in it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from auto_round import envs
from auto_round.errors import ConfigError, ModelError, nearest
from auto_round.modeling.side_files import NOT_FETCHED

# What every model needs; ModelScope's client is asked for no more.
_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.vocab", "LICENSE*", "NOTICE*")
_CODE = ("*.py",)
_REPO_ID = re.compile(r"^[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?$")
_PLATFORMS = ("hf", "model_scope")
_TIMEOUT_S = 10.0


def model_folder(
    model: str | os.PathLike[str], *, trust_remote_code: bool = False, platform: str | None = None,
    allow_pickle: bool = False,
) -> Path:  # fmt: skip
    """The local folder of a model given as folder or hub id. Of a hub everything is fetched but weights in other
    formats than safetensors, other models in subfolders, and code.

    Args:
        model: a folder, or an id such as "org/name".
        trust_remote_code: fetch the repository's Python files too.
        platform: "hf" or "model_scope"; default: as the variable AR_USE_MODELSCOPE says, else "hf".
        allow_pickle: fetch `pytorch_model*.bin` where the repository has no safetensors.

    Raises:
        ModelError: no such folder, or the hub cannot be reached or does not know the id.
        ConfigError: unknown platform.
    """
    given = os.fspath(model)
    where = platform or ("model_scope" if envs.AR_USE_MODELSCOPE else "hf")
    if where not in _PLATFORMS:
        raise ConfigError(f"platform={platform!r} is unknown; use one of {', '.join(_PLATFORMS)}")
    if not given.strip():
        raise ModelError("no model folder or hub id was given")
    folder = Path(given).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ModelError(f"{given!r} is a file; give the folder that holds config.json and the safetensors files")
    if isinstance(model, os.PathLike) or not _REPO_ID.match(given):
        raise ModelError(f"no model folder {given!r}{_similar(folder)}")
    patterns = [*_FILES, *(_CODE if trust_remote_code else ())]
    fetch = _from_modelscope if where == "model_scope" else _from_hub
    found = fetch(given, patterns, folder)
    if allow_pickle and not any(found.glob("*.safetensors")):
        found = fetch(given, [*patterns, "pytorch_model*.bin"], folder)
    return found


def is_hub_id(text: str) -> bool:
    """Whether a text could name a repository, and is nothing on this disk."""
    return _REPO_ID.match(text) is not None and not Path(text).expanduser().exists()


def _from_hub(repo: str, patterns: list[str], folder: Path) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        everything = [*patterns, "*"]
        ignored = [p for p in (*NOT_FETCHED, *_CODE) if p not in patterns and not _are_pickles(p, patterns)]
        return Path(
            snapshot_download(repo, allow_patterns=everything, ignore_patterns=ignored, etag_timeout=_TIMEOUT_S)
        )
    except LocalEntryNotFoundError as error:
        reason = "the hub cannot be reached and the model is not in the local cache"
        raise ModelError(f"no folder {repo!r} here{_similar(folder)}, and {reason}: {_first_line(error)}") from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ModelError(
            f"no folder {repo!r} here{_similar(folder)}, and the hub refuses it: {_first_line(error)}"
        ) from error


def _are_pickles(ignored: str, patterns: list[str]) -> bool:
    """Whether a pattern would leave out what is asked for by name."""
    return ignored == "*.bin" and any(pattern.endswith(".bin") for pattern in patterns)


def _from_modelscope(repo: str, patterns: list[str], folder: Path) -> Path:
    try:
        from modelscope import snapshot_download
    except ImportError as error:
        raise ModelError("ModelScope needs its own package: pip install modelscope") from error
    try:
        return Path(snapshot_download(repo, allow_patterns=patterns))
    except Exception as error:  # the client raises its own, undocumented kinds
        raise ModelError(f"ModelScope cannot give {repo!r}: {_first_line(error)}") from error


def _similar(folder: Path) -> str:
    try:
        siblings = [p.name for p in folder.parent.iterdir() if p.is_dir()]
    except OSError:
        return ""
    return nearest(folder.name, siblings)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
