"""Write `report.json`, the machine-readable record of one run, without the paths of this machine."""

from __future__ import annotations

import json
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
from auto_round.config import plain
from auto_round.files import write_text

# Incremented when a field changes its meaning or is removed, not for new fields.
SCHEMA_VERSION = 1
FILE_NAME = "report.json"

# Paths from the root, the home or the current folder; not the middle of a word, a hub id or an address.
_PATH = re.compile(r"(?<![\w/:.~\\-])(?:~|\.{1,2})?(?:/[^\s/,;:'\"`|()\[\]{}<>*?\\]+)+/?")


@dataclass(frozen=True)
class LayerRecord:
    """One linear layer."""

    name: str  # of the module, in full
    scheme: str  # such as "int4 g128 sym", or "full precision"
    bits: float | None = None  # per weight as stored, scales and zero points included; None in full precision
    reason: str | None = None  # why it is unquantized or has other settings than requested
    weight_error: float | None = None  # mean square of the error over that of the weight; None: not measured


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
    """Contents of report.json."""

    model: str  # name or path of the source model
    format: str
    job: Mapping[str, Any]  # the resolved settings
    layers: tuple[LayerRecord, ...] = ()  # these and blocks in the model's order
    blocks: tuple[BlockRecord, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)  # of wall time, by phase
    peak_rss_bytes: int | None = None
    peak_vram_bytes: int | None = None
    files: Mapping[str, str] = field(default_factory=dict)  # SHA-256 of the weight files by name
    small_files: Mapping[str, str] = field(default_factory=dict)  # the same of the others
    sizes: Mapping[str, int] = field(default_factory=dict)  # bytes by file name
    verify: Mapping[str, Any] | None = None  # result of the check after saving; None when it was disabled
    quality: Mapping[str, Any] | None = None  # result of an evaluation
    numerics: Mapping[str, Any] | None = None  # how NaN, Inf and overflowing scales were handled; None: not checked
    # Digests of the settings, weights and data, by which the same command recognises its result; None: not all known.
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
    """`value`, of JSON's types, with every path in its texts and keys cut to the last part; those in `known` even if
    they contain spaces or are relative."""
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
