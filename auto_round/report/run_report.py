"""Write `report.json`, the machine-readable record of one run.

`redact_path` and `redact_paths` cut each path to its last part, so that published files do not show
folders of this machine.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from auto_round._version import __version__
from auto_round.files import write_text

# Incremented when a field changes its meaning or is removed, not for new fields.
SCHEMA_VERSION = 1
FILE_NAME = "report.json"

# Paths from the root, the home or the current folder; not the middle of a word, a hub id or an address.
_PATH = re.compile(r"(?<![\w/:.~\\-])(?:~|\.{1,2})?(?:/[^\s/,;:'\"`|()\[\]{}<>*?\\]+)+/?")


@dataclass(frozen=True)
class LayerRecord:
    """One linear layer.

    Attributes:
        name: full module name.
        scheme: description such as "int4 g128 sym", or "full precision".
        bits: per weight as stored, scales and zero points included; None in full precision.
        reason: why a layer is unquantized or has other settings than requested.
        weight_error: mean squared error of the dequantized weight, relative to the weight's mean square; None when not
            measured.
    """

    name: str
    scheme: str
    bits: float | None = None
    reason: str | None = None
    weight_error: float | None = None


@dataclass(frozen=True)
class BlockRecord:
    """One block: its loss (mean squared error of its output) before and after tuning, steps done, wall seconds."""

    name: str
    loss_before: float | None = None
    loss_after: float | None = None
    steps: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class RunReport:
    """Contents of report.json.

    Attributes:
        model: name or path of the source model.
        format: name of the output format.
        job: the resolved settings.
        layers, blocks: in the model's order.
        seconds: wall seconds per phase, such as {"calibration": 3.1, "quantization": 60.2, "total": 70.0}.
        peak_rss_bytes, peak_vram_bytes: memory peaks of the process.
        files: sha256 of the weight files by name.
        small_files: sha256 of the other files by name.
        sizes: bytes by file name.
        verify: result of the check after saving; None when it was disabled.
        quality: result of an evaluation, if any.
        made_from: digests of the settings, the weights and the data, by which the same command recognises its result;
            None when one of them is not known before the run.
        numerics: how NaN, Inf and overflowing scales were handled; None when they were not checked.
        versions: of this package, Python and the libraries used.
    """

    model: str
    format: str
    job: Mapping[str, Any]
    layers: tuple[LayerRecord, ...] = ()
    blocks: tuple[BlockRecord, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    peak_rss_bytes: int | None = None
    peak_vram_bytes: int | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    small_files: Mapping[str, str] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    verify: Mapping[str, Any] | None = None
    quality: Mapping[str, Any] | None = None
    numerics: Mapping[str, Any] | None = None
    made_from: Mapping[str, str] | None = None
    versions: Mapping[str, str] = field(default_factory=lambda: versions())

    def to_dict(self) -> dict[str, Any]:
        """JSON values; NaN and infinity become the texts "nan", "inf", "-inf"."""
        return {"schema_version": SCHEMA_VERSION, **plain(asdict(self))}


def versions() -> dict[str, str]:
    """Versions of this package, Python, the platform and the installed libraries that can affect a result."""
    found = {
        "auto_round": __version__,
        "python": platform.python_version(),
        "platform": f"{sys.platform} {platform.machine()}",
    }
    for name in ("torch", "transformers", "tokenizers", "safetensors", "accelerate", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def plain(value: Any) -> Any:
    """`value` as JSON types; objects of other types become their text."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value, key=str) if isinstance(value, set | frozenset) else value
        return [plain(v) for v in items]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return str(value)


def write_report(folder: str | os.PathLike[str], report: RunReport) -> Path:
    """Write `report.json` into `folder`; returns its path. Raises OutputError when it cannot be written."""
    text = json.dumps(report.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return write_text(Path(folder) / FILE_NAME, text)


def redact_path(text: str) -> str:
    """The last part of a path of this machine; any other text unchanged."""
    looks = text.startswith(("/", "~", "./", "../"))
    if text and (looks or os.path.exists(os.path.expanduser(text))):
        return os.path.basename(os.path.abspath(os.path.expanduser(text)))
    return text


def redact_paths(value: Any, known: Iterable[str] = ()) -> Any:
    """`value` with every path in its texts and keys cut to the last part.

    Args:
        value: of JSON's types.
        known: paths to cut even if they contain spaces or are relative.
    """
    spellings: dict[str, str] = {}
    for path in known:
        full_path = Path(path).expanduser()
        if full_path.is_absolute() or full_path.exists():
            name = os.path.basename(os.path.abspath(full_path))
            forms = (path, str(full_path), os.path.abspath(full_path), str(full_path.resolve()))
            spellings |= dict.fromkeys(forms, name)
    longest = sorted((s for s in spellings if "/" in s or os.sep in s), key=len, reverse=True)

    def redact_text(text: str) -> str:
        for spelling in longest:
            text = text.replace(spelling, spellings[spelling])
        return _PATH.sub(lambda match: os.path.basename(match[0].rstrip("/")) or match[0], text)

    def redact_value(part: Any) -> Any:
        if isinstance(part, str):
            return redact_text(part)
        if isinstance(part, Mapping):
            return {redact_text(key) if isinstance(key, str) else key: redact_value(item) for key, item in part.items()}
        if isinstance(part, (list, tuple)):
            return [redact_value(item) for item in part]
        return part

    return redact_value(value)
