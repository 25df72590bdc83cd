"""How fast one core turns a layer's codes into the tensors of a file, and how much memory that takes beside the result.

    python bench/packing.py [--out 4096 --in_features 14336 --repeat 5] [--save bench/results/packing.json]

Speed is in MB of the bf16 weights that the codes stand for, per second, on one thread: the median of `--repeat`. Memory
is the largest that PyTorch held at once during packing, less what it held before, in MB, beside the size of the layer's
bf16 weights; it includes the packed tensors themselves.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from vs_peer import machine

from auto_round.layouts.bit_stream import pack_rows
from auto_round.layouts.integers import AWQ, GPTQ_V1, signed_values

# By layout: its bits, and what packs the codes [out, in] and zero points [out, groups] of a layer.
PACKERS: dict[str, tuple[tuple[int, ...], Callable[[torch.Tensor, torch.Tensor, int], object]]] = {
    "gptq": ((2, 3, 4, 8), GPTQ_V1.words),
    "awq": ((4,), AWQ.words),
    "mlx": ((2, 3, 4, 5, 6, 8), lambda codes, zeros, bits: pack_rows(codes, bits)),
    "compressed-tensors, packed": ((2, 3, 4, 5, 6, 8), lambda codes, zeros, bits: pack_rows(codes, bits)),
    "compressed-tensors, int8": ((8,), lambda codes, zeros, bits: signed_values(codes, bits)),
}


def peak_bytes(work: Callable[[], object]) -> int:
    """Largest sum of live CPU allocations made by `work`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as log:
        work()
    held = peak = 0
    for event in sorted(log.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=int, default=4096)
    parser.add_argument("--in_features", type=int, default=14336)
    parser.add_argument("--group_size", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--save", type=Path)
    a = parser.parse_args()
    torch.set_num_threads(1)
    layer = a.out * a.in_features * 2 / 1e6
    rows = []
    for name, bits in ((name, bits) for name, (widths, _) in PACKERS.items() for bits in widths):
        codes = torch.randint(0, 1 << bits, (a.out, a.in_features), dtype=torch.uint8)
        zeros = torch.randint(1, 1 << bits, (a.out, a.in_features // a.group_size), dtype=torch.uint8)
        work = partial(PACKERS[name][1], codes, zeros, bits)
        work()
        seconds = []
        for _ in range(a.repeat):
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
        row = {
            "packer": name, "bits": bits, "MB_per_second": round(layer / statistics.median(seconds)),
            "peak_MB": round(peak_bytes(work) / 1e6, 1), "layer_MB": round(layer, 1),
        }  # fmt: skip
        rows.append(row)
        print(json.dumps(row), flush=True)
    if a.save:
        result = {"machine": machine(), "out": a.out, "in_features": a.in_features, "rows": rows}
        a.save.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
