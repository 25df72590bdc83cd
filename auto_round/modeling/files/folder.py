"""Find a model's folder (local or from a hub) and read its files safely: links, JSON, side files."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from auto_round import envs
from auto_round.errors import ConfigError, ModelError, first_line, nearest

_MAX_JSON_BYTES = 200_000_000  # the index of the largest checkpoints has a hundredth of it
# Weights, and leftovers of training: everything that unpickles.
_WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".gguf", ".ggml", ".onnx", ".onnx_data", ".h5",
    ".msgpack", ".ot", ".npz", ".tflite", ".mlpackage", ".mlmodel", ".distcp", ".pdparams", ".part", ".incomplete",
)  # fmt: skip
_CODE_SUFFIXES = (".py", ".pyc", ".so", ".pyd", ".dll", ".dylib")
_INDEX = re.compile(r"\.index(\.[\w-]+)?\.json$")
_QUANTIZATION_FILES = (
    "quantization_config.json", "quantize_config.json", "hf_quant_config.json", "quant_config.json", "quant_log.csv",
    "recipe.yaml",
)  # fmt: skip
_REWRITTEN_FILES = ("config.json", "readme.md", "report.json")
_MODEL_FOLDERS = ("original", "onnx", "metal", "openvino", "coreml", "gguf", "ggml", "__pycache__")
_UNFINISHED, _REPORT = ".partial", "report.json"  # marks of an output folder
_WORK_SPACE = "ar_work_space"  # default folder of the journals of runs
_CONFIGS = ("config.json", "adapter_config.json", "params.json", "model_index.json")

# Patterns of the same files for hub clients, which match whole paths.
NOT_FETCHED = (
    *(f"*{suffix}" for suffix in (*_WEIGHT_SUFFIXES, *_CODE_SUFFIXES) if suffix not in (".safetensors", ".py")),
    *(f"{name}/*" for name in _MODEL_FOLDERS),
    "*/.*",
)
# Files of every model; ModelScope's client fetches only these.
_MODEL_PATTERNS = (
    "*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.vocab", "LICENSE*", "NOTICE*",
)  # fmt: skip
_REPO_ID = re.compile(r"^[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?$")
_PLATFORMS = ("hf", "model_scope")
_TIMEOUT_S = 10.0


def check_inside(folder: Path, file: Path) -> Path:
    """Return `file`. Raises ModelError when its links lead out of `folder`.

    A downloaded folder may contain a link to any file of this machine, whose bytes would be read as weights or copied
    into the output. The hub's cache links from `models--org--name/snapshots/REVISION` to `models--org--name/blobs`.
    """
    root, target = folder.resolve(), file.resolve()
    cache = next((parent.parent for parent in root.parents if parent.name == "snapshots"), root)
    if root in target.parents or cache / "blobs" in target.parents:
        return file
    raise ModelError(
        f"{file} is a link to {target}, outside of the model's folder, and is not followed; put the file itself there, "
        "or give the folder that contains it"
    )


def parse_object(raw: bytes, what: str) -> dict[str, Any]:
    """Parse a JSON object without duplicate keys from UTF-8 bytes, or raise ModelError; `what` describes them."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ModelError(f"{what} names {twice!r} twice; fetch the file again")
        return found

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ModelError(f"{what} is not JSON ({reason}); fetch the file again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{what} is not a JSON object; fetch the file again")
    return value


def read_object(file: Path) -> dict[str, Any]:
    """Read a JSON object from a file. Raises ModelError as `parse_object`, and when the file cannot be read."""
    try:
        size = file.stat().st_size
        if size > _MAX_JSON_BYTES:
            raise ModelError(f"{file} has {size} bytes, which is no configuration; fetch the model again")
        raw = file.read_bytes()
    except OSError as error:
        raise ModelError(f"cannot read {file}: {error.strerror or error}") from error
    return parse_object(raw, str(file))


def side_files(folder: Path, trusted: bool, without: Collection[Path] = ()) -> list[Path]:
    """Paths within the `folder` of a model of the files to copy into a quantized one, sorted.

    That is every file except weights and their indexes, leftovers of an earlier quantization or of training, hidden
    files, what is written again, Python code unless `trusted`, folders that are models or outputs of this package, and
    folders in `without`. Raises ModelError for a link that leads out of the folder.
    """
    skipped = {path.expanduser().resolve() for path in (*without, envs.resume_folder(), envs.work_space())}

    def visit(inner: Path, above: tuple[Path, ...]) -> Iterator[Path]:
        for path in inner.iterdir():
            if path.name.startswith(".") or not _is_wanted(path.name, inner == folder, trusted):
                continue
            real = path.resolve()
            if path.is_symlink() and path.exists() and real not in above:
                check_inside(folder, path)
            if path.is_file():
                yield path.relative_to(folder)
            elif path.is_dir() and real not in above and real not in skipped and not _is_model_or_output(path):
                yield from visit(path, (*above, real))

    return sorted(visit(folder, (folder.resolve(),)))


def copy_side_files(folder: Path, target: Path, trusted: bool) -> list[Path]:
    """Copy the side files byte for byte. Returns their paths within both folders."""
    names = side_files(folder, trusted, without=(target, *target.parents))
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, target / name)
    return names


def _is_wanted(name: str, top: bool, trusted: bool) -> bool:
    lower = name.lower()
    if lower.endswith(_WEIGHT_SUFFIXES) or _INDEX.search(lower) or lower in _MODEL_FOLDERS or lower == _WORK_SPACE:
        return False
    if lower.endswith(_CODE_SUFFIXES) and not (trusted and lower.endswith(".py")):
        return False
    return lower not in _QUANTIZATION_FILES and not (top and lower in _REWRITTEN_FILES)


def _is_model_or_output(folder: Path) -> bool:
    """Whether a folder contains weights with their configuration, or is an output of this package, finished or not."""
    names = [path.name.lower() for path in folder.iterdir()]
    is_model = any(name in _CONFIGS for name in names) and any(name.endswith(_WEIGHT_SUFFIXES) for name in names)
    if is_model or (folder / _UNFINISHED).is_dir():
        return True
    try:
        report = json.loads((folder / _REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(report, dict) and {"schema_version", "format"} <= set(report)


def model_folder(
    model: str | os.PathLike[str], *, trust_remote_code: bool = False, platform: str | None = None,
    allow_pickle: bool = False,
) -> Path:  # fmt: skip
    """The local folder of a model given as a folder or hub id such as "org/name".

    Everything is fetched from a hub except weights in formats other than safetensors, models in subfolders, and code.

    Args:
        trust_remote_code: fetch the repository's Python files too.
        platform: "hf" or "model_scope"; default: as AR_USE_MODELSCOPE says, else "hf".
        allow_pickle: fetch `pytorch_model*.bin` if the repository has no safetensors files.

    Raises ModelError when there is no such folder or id, and ConfigError for an unknown platform.
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
    fetch = _from_modelscope if where == "model_scope" else _from_hub
    found = fetch(given, trust_remote_code, (), folder)
    if allow_pickle and not any(found.glob("*.safetensors")):
        found = fetch(given, trust_remote_code, ("pytorch_model*.bin",), folder)
    return found


def is_hub_id(text: str) -> bool:
    """Whether a text could name a repository and is not a path on this disk."""
    return _REPO_ID.match(text) is not None and not Path(text).expanduser().exists()


def _from_hub(repo: str, trusted: bool, pickles: tuple[str, ...], folder: Path) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    ignored = {*NOT_FETCHED, *(() if trusted else ("*.py",))} - ({"*.bin"} if pickles else set())
    try:
        return Path(snapshot_download(repo, ignore_patterns=sorted(ignored), etag_timeout=_TIMEOUT_S))
    except (HfHubHTTPError, OSError, ValueError) as error:
        offline = isinstance(error, LocalEntryNotFoundError)
        reason = (
            "the hub cannot be reached and the model is not in the local cache" if offline else "the hub refuses it"
        )
        raise ModelError(f"no folder {repo!r} here{_similar(folder)}, and {reason}: {first_line(error)}") from error


def _from_modelscope(repo: str, trusted: bool, pickles: tuple[str, ...], folder: Path) -> Path:
    try:
        from modelscope import snapshot_download
    except ImportError as error:
        raise ModelError("ModelScope needs its own package: pip install modelscope") from error
    patterns = [*_MODEL_PATTERNS, *(["*.py"] if trusted else ()), *pickles]
    try:
        return Path(snapshot_download(repo, allow_patterns=patterns))
    except Exception as error:  # the client raises undocumented errors
        raise ModelError(f"ModelScope cannot provide {repo!r}: {first_line(error)}") from error


def _similar(folder: Path) -> str:
    try:
        siblings = [p.name for p in folder.parent.iterdir() if p.is_dir()]
    except OSError:
        return ""
    return nearest(folder.name, siblings)
