"""Hold finished files against what was computed, without a model: a few layers read back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from auto_round.compressors.digest import dense_digest, layer_digest
from auto_round.compressors.job import Job, LayerPlan
from auto_round.compressors.model_free.rounding import Rounder
from auto_round.compressors.model_free.units import Unit, layer_outputs
from auto_round.compressors.tensor_joiner import read_pieces
from auto_round.errors import VerifyError
from auto_round.inference.build_layer import build_layer
from auto_round.inference.config_reader import read_config
from auto_round.modeling.tensor_files import TensorFiles
from auto_round.quantized_layer import QuantizedLayer

_LARGEST_SAMPLE = 1 << 26  # weights


def sample_layers(rounder: Rounder) -> frozenset[str]:
    """One unit's layers of each kind (scheme, bias, transposed), the smallest. They are rounded whole, so none that is
    very large."""
    kinds: dict[object, Unit] = {}
    converted = {name for reversal in rounder.work.layout.reversals.values() for name in reversal.stored}
    for unit in rounder.work.units:
        if not converted.isdisjoint(unit.outputs):  # of which single layers cannot be read back
            continue
        for name in unit.layers:
            plan = rounder.job.layers[name]
            if plan.out_features * plan.in_features > _LARGEST_SAMPLE:
                continue
            kind = (plan.scheme, plan.bias_dtype is not None, plan.transposed, len(unit.layers))
            if kind not in kinds or unit.memory < kinds[kind].memory:
                kinds[kind] = unit
    return frozenset(name for unit in kinds.values() for name in unit.layers)


def check_layers(folder: Path, rounder: Rounder, digests: Mapping[str, str]) -> int:
    """Read the sampled layers back as a runtime would, and compare them with what was rounded. Returns how many.

    Raises:
        VerifyError: one differs, or was not noted.
    """
    files = TensorFiles.open(folder)
    for name in sorted(rounder.samples):
        if _read_back(folder, files, rounder, rounder.job.layers[name]) != digests.get(name):
            raise VerifyError(f"{folder}: layer {name} does not hold what was rounded; do not use it, and report this")
    return len(rounder.samples)


def _read_back(folder: Path, files: TensorFiles, rounder: Rounder, plan: LayerPlan) -> str:
    fmt, dtype, layout = rounder.fmt, rounder.source.dtype, rounder.work.layout
    specs = layer_outputs(fmt, plan, dtype)
    if fmt.name == "fake":
        (weight,) = (name for name in specs if name.endswith(".weight"))
        tensor = read_pieces(files, [weight], layout)[weight]
        target = layout.targets.get(weight)
        if target is not None and target.piece is not None:
            tensor = target.piece.cut(tensor)
        return dense_digest(tensor.t() if plan.transposed else tensor)
    tensors = read_pieces(files, specs, layout)
    if not fmt.loads_here:
        layer = fmt.read_layer(plan.name, plan.scheme, tensors, plan.in_features, plan.out_features)
        return layer_digest(layer, False, torch.float32)
    stored_name = rounder.job.stored_names.get(plan.name, plan.name)
    return layer_digest(_opened(folder, rounder.job, stored_name, plan, tensors), False, torch.float32)


def _opened(
    folder: Path, job: Job, stored_name: str, plan: LayerPlan, tensors: Mapping[str, torch.Tensor]
) -> QuantizedLayer:
    """The layer as our loader's module, made from what config.json says of it."""
    config = read_config(json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"])
    in_block = any(plan.name.startswith(f"{block}.") for block in job.blocks)
    described = config.layer(stored_name, in_block)
    if described is None:
        raise VerifyError(f"{folder}: config.json says that {stored_name} is dense, and it is not; report this")
    by_leaf = {name.removeprefix(f"{plan.name}."): tensor for name, tensor in tensors.items()}
    shape = torch.empty((), dtype=plan.bias_dtype or torch.float32).expand(plan.out_features, plan.in_features)
    dtypes = {leaf: tensor.dtype for leaf, tensor in by_leaf.items()}
    module = build_layer(described, shape, plan.bias_dtype is not None, dtypes, False, "")
    for leaf, tensor in by_leaf.items():
        module.get_buffer(leaf).copy_(tensor)
    module.prepare(plan.name)
    return module.layer(plan.name)
