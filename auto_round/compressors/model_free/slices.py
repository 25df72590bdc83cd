"""Layers so large that they are rounded some rows at a time, with the same bytes as whole ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from auto_round.algorithms.quantization.layer_codes import is_integer, small_float
from auto_round.compressors.job import LayerPlan
from auto_round.export.formats import OutputFormat
from auto_round.schemes import QuantizationScheme

LARGE = 1 << 23
"""Weights from which on a layer is sliced."""
SLICE = 1 << 22
"""Weights of one slice, about."""
_ROWS = 32  # what all packings along the rows fill whole words with


def row_step(plan: LayerPlan, fmt: OutputFormat, dtype: torch.dtype) -> int | None:
    """Rows of a slice, None where the layer is rounded whole: it is small, its rows share a scale, or the format packs
    something that is not a row's."""
    if plan.out_features * plan.in_features < LARGE or plan.transposed or not _by_rows(plan.scheme):
        return None
    size = plan.scheme.group_size
    unit = max(_ROWS, size[0]) if isinstance(size, tuple) else _ROWS
    step = max(unit, SLICE // plan.in_features // unit * unit)
    if unit % _ROWS or step >= plan.out_features or plan.out_features % _ROWS:
        return None
    return step if slice_axes(plan, fmt, dtype, step) is not None else None


def _by_rows(scheme: QuantizationScheme) -> bool:
    """Whether every row (or block of rows) is rounded by itself."""
    if scheme.group_size == 0:
        return False
    family = small_float(scheme)
    return is_integer(scheme) if family is None else not family.has_global_scale


def slice_axes(plan: LayerPlan, fmt: OutputFormat, dtype: torch.dtype, step: int) -> dict[str, int] | None:
    """By tensor of the packed layer, the dimension in which slices of rows follow each other; None where there is no
    such dimension."""
    whole, part = _specs(plan, fmt, dtype), _specs(replace(plan, out_features=step), fmt, dtype)
    axes = {}
    for name, (shape, _) in whole.items():
        differ = [i for i, (a, b) in enumerate(zip(shape, part[name][0], strict=True)) if a != b]
        if len(differ) != 1:
            return None
        axes[name] = differ[0]
    return axes


def _specs(plan: LayerPlan, fmt: OutputFormat, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return fmt.tensor_specs(
        plan.name, plan.scheme, plan.in_features, plan.out_features, bias_dtype=plan.bias_dtype, model_dtype=dtype,
        transposed=plan.transposed,
    )  # fmt: skip


def row_ranges(rows: int, step: int) -> Iterator[tuple[int, int]]:
    """(first, last) of the slices."""
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def empty_packed(plan: LayerPlan, fmt: OutputFormat, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Room for the packed layer."""
    return {name: torch.empty(shape, dtype=kind) for name, (shape, kind) in _specs(plan, fmt, dtype).items()}
