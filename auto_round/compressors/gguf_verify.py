"""Read a finished GGUF file with the `gguf` package and hold it against the plan and against what was tuned."""

from __future__ import annotations

from typing import Any

import torch

from auto_round.compressors.digest import bytes_digest, layer_digest
from auto_round.compressors.gguf_job import weight_name
from auto_round.compressors.gguf_sink import GgufSink
from auto_round.compressors.job import Job
from auto_round.data_type.gguf.packing import unpack_blocks
from auto_round.data_type.gguf.types import GGML_TYPES
from auto_round.errors import VerifyError
from auto_round.export.gguf.placement import Placement
from auto_round.export.gguf.plan import GgufPlan
from auto_round.export.gguf.read import GgufTensors
from auto_round.modeling.source import ModelSource
from auto_round.quantized_layer import QuantizedLayer


def verify_file(sink: GgufSink, job: Job, source: ModelSource) -> dict[str, Any]:
    """Check a saved file: names, shapes and types of all tensors, every layer's numbers, every other tensor's bytes.

    Returns plain values for the report.

    Raises:
        VerifyError: something is not as planned or not as it was tuned.
    """
    plan, file = sink.plan, GgufTensors(sink.path)
    _check_values(plan, file)
    _check_infos(plan, file)
    for name, digest in sink.expected.items():
        layer = job.layers[name]
        assert layer.ggml is not None
        kind = GGML_TYPES[layer.ggml]
        places = plan.places[weight_name(source, name)]
        data = torch.empty(layer.out_features, kind.row_bytes(layer.in_features), dtype=torch.uint8)
        for place in places:
            order = torch.arange(layer.out_features) if place.rows is None else place.rows
            data[order] = _stored(file, place, len(order))
        read = QuantizedLayer(name, layer.scheme, None, None, None, blocks=unpack_blocks(data, kind, layer.in_features))
        if layer_digest(read, False, torch.float32) != digest:
            raise VerifyError(
                f"{sink.path}: {places[0].tensor} does not hold what was tuned for layer {name}; do not use this file, "
                "and report this"
            )
    for name, place, rows, digest in sink.dense:
        if bytes_digest(_stored(file, place, rows)) != digest:
            raise VerifyError(
                f"{sink.path}: tensor {place.tensor} is not what was made of {name}; do not use this file"
            )
    return {"passed": True, "tensors": len(plan.shapes), "layers": len(sink.expected), "loss_reopened": None}


def _check_values(plan: GgufPlan, file: GgufTensors) -> None:
    """What the file says of the model and its tokenizer."""
    for pair in plan.metadata:
        kind = (pair.item_kind or pair.kind).name
        items = list(pair.value) if isinstance(pair.value, (list, tuple)) else [pair.value]
        found = file.value(pair.key)
        stored = found if isinstance(found, list) else [found]
        if [_as_stored(item, kind) for item in items] != stored:
            raise VerifyError(f"{file.path}: key {pair.key!r} is not as planned; do not use this file")


def _as_stored(value: Any, kind: str) -> Any:
    """A value as a reader of the file gets it."""
    if kind == "FLOAT32":
        return float(torch.tensor(value, dtype=torch.float32))
    return value.decode("utf-8") if isinstance(value, bytes) else value


def _check_infos(plan: GgufPlan, file: GgufTensors) -> None:
    planned = {name: (shape, plan.types[name]) for name, shape in plan.shapes.items()}
    stored = {name: (file.shape(name), file.kind(name)) for name in file}
    if planned != stored:
        wrong = sorted(n for n in planned.keys() | stored.keys() if planned.get(n) != stored.get(n))
        first = wrong[0]
        raise VerifyError(
            f"{file.path}: {len(wrong)} tensors are not as planned, such as {first}: {stored.get(first)} in the file, "
            f"{planned.get(first)} in the plan"
        )


def _stored(file: GgufTensors, place: Placement, rows: int) -> torch.Tensor:
    """The rows that a placement put into the file."""
    stored = file.stored(place.tensor, place.slot)
    return stored[place.at_row : place.at_row + rows]
