"""How large a journal becomes, before there is one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
from auto_round.compressors.job import LayerPlan
from auto_round.compressors.settings import Settings
from auto_round.data_type.gguf.types import GGML_TYPES
from auto_round.errors import OutputError
from auto_round.export.disk import free_bytes
from auto_round.quantized_layer import group_count

_GB = 1e9


def journal_bytes(layers: Mapping[str, LayerPlan], settings: Settings, width: int, itemsize: int) -> int:
    """Most bytes that a run's journal takes: codes of all layers with their scales, and the activations twice, since
    the new ones are written before the old ones go.

    Args:
        width: of the hidden states.
        itemsize: bytes of one of their values.
    """
    codes = sum(stored_bytes(plan) for plan in layers.values() if plan.scheme.quantizes_weights)
    if not settings.needs_data:
        return codes
    algorithm = settings.algorithm
    streams = 2 if isinstance(algorithm, SignRoundConfig) and algorithm.enable_quanted_input else 1
    return codes + 2 * streams * settings.nsamples * settings.seqlen * width * itemsize


def stored_bytes(plan: LayerPlan) -> int:
    """Bytes of one layer's codes, packed, and of its scales."""
    weights = plan.out_features * plan.in_features
    if plan.ggml is not None:
        kind = GGML_TYPES[plan.ggml]
        parts = 2 * plan.in_features // kind.group  # integer scales and minima, a byte each
        return weights * _width(kind.bits) // 8 + plan.out_features * (parts + 4 * plan.in_features // kind.block)
    scheme = plan.scheme
    size = scheme.group_size if isinstance(scheme.group_size, int) else scheme.group_size[1]
    groups = plan.out_features * group_count(plan.in_features, size)
    return weights * _width(scheme.bits) // 8 + groups * (4 + (0 if scheme.sym else 1))


def _width(bits: int) -> int:
    """Bits that a code takes in the journal."""
    return next(width for width in (1, 2, 4, 8) if bits <= width or width == 8)


def check_journal_disk(folder: Path, output: str | os.PathLike[str], needed: int, output_bytes: int) -> None:
    """Raise OutputError when the disk of the work space has no room for `needed` bytes of journal, besides
    `output_bytes` where the output folder is on it too."""
    free = free_bytes(folder)
    shared = _device(folder) == _device(Path(output))
    if free < needed + (output_bytes if shared else 0):
        besides = f" besides {output_bytes / _GB:.2f} GB for the output folder" if shared else ""
        raise OutputError(
            f"the journal in {folder.parent} needs {needed / _GB:.2f} GB{besides}, and its disk has "
            f"{free / _GB:.2f} GB free; set AR_WORK_SPACE to a folder on another disk, or do without a journal "
            "(--no_resume)"
        )


def _device(path: Path) -> int:
    path = path.expanduser().absolute()
    while not path.exists():
        path = path.parent
    return path.stat().st_dev
