"""The plan of a folder whose layers are quantized already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from auto_round.compressors.job import Job
from auto_round.errors import UnsupportedError
from auto_round.quantized_layer import QuantizedLayer


def as_done(job: Job, memory: Job, done: Mapping[str, QuantizedLayer]) -> Job:
    """`job` for layers that are quantized already. Raises UnsupportedError when its formats cannot hold one of them."""
    refused = sorted(set(done) - set(job.quantized()))
    if refused:
        raise UnsupportedError(
            f"{', '.join(job.formats)} cannot hold {len(refused)} of the quantized layers, such as {refused[0]}: "
            f"{job.layers[refused[0]].reason}; use quantize_and_save, which leaves them in full precision, or format "
            "fake"
        )
    other = [name for name, layer in done.items() if layer.blocks is not None and job.layers[name].ggml != layer.kind]
    if other:
        raise UnsupportedError(
            f"{', '.join(job.formats)} stores {other[0]} as {job.layers[other[0]].ggml}, and it is quantized as "
            f"{done[other[0]].kind}; use quantize_and_save, or the format of the scheme that was used"
        )
    left = {name: memory.layers[name] for name in job.quantized() if name not in done}
    return replace(job, layers={**job.layers, **left})
