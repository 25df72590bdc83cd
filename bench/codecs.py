"""How fast one core turns float32 weights into the exact codes and scales of each small float type.

    python bench/codecs.py [--out 4096 --in_features 4096 --repeat 7] [--save bench/results/codecs.json]

Speed is in GB of float32 input per second of one thread's own CPU time, the best of `--repeat`: what slows a run down
beyond that is other work on the machine. `wanted` is what we hold ourselves to. Memory is the largest that PyTorch held
at once meanwhile, over the weight itself, in bytes a weight; it includes the codes.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from packing import peak_bytes
from vs_peer import machine

from auto_round.codecs.block_float import BLOCK_FLOAT_SPECS, encode, spec_for_bits
from auto_round.codecs.minifloat import dequantize_minifloat

# name, data type, bits, group size
TYPES: tuple[tuple[str, str, int, Any], ...] = (
    ("MXFP4", "mx_fp", 4, 32), ("MXFP4 rounded up", "mx_fp_rceil", 4, 32), ("MXINT4", "mx_int", 4, 32),
    ("NVFP4", "nv_fp", 4, 16), ("MXFP8", "mx_fp", 8, 32), ("MXFP8 rounded up", "mx_fp_rceil", 8, 32),
    ("MXFP8 e5m2", "mx_fp8e5m2", 8, 32), ("FP8 per channel", "fp", 8, -1), ("FP8 per tensor", "fp", 8, 0),
    ("FP8 blocks of 128x128", "fp", 8, (128, 128)), ("FP8 groups of 128", "fp", 8, 128),
    ("FP8 e5m2 per channel", "fp8_e5m2", 8, -1),
)  # fmt: skip
WANTED = {4: 0.3, 8: 1.0}


def best_seconds(work: Any, repeat: int) -> float:
    """Of `repeat` runs, after one that is not counted."""
    work()
    seconds = []
    for _ in range(repeat):
        start = time.thread_time()
        work()
        seconds.append(time.thread_time() - start)
    return min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=int, default=4096)
    parser.add_argument("--in_features", type=int, default=4096)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--save", type=Path)
    a = parser.parse_args()
    torch.set_num_threads(1)
    weight = torch.randn(a.out, a.in_features, generator=torch.Generator().manual_seed(1)) * 0.02
    size = weight.numel() * 4 / 1e9
    rows = []
    for name, data_type, bits, group_size in TYPES:
        family = spec_for_bits(BLOCK_FLOAT_SPECS[data_type], data_type, bits)
        assert family is not None
        work = partial(encode, weight, family, group_size)
        found = work()
        back = partial(dequantize_minifloat, found.codes, family.element, found.scale, group_size, found.global_scale)
        row = {
            "type": name, "GB_per_second": round(size / best_seconds(work, a.repeat), 2), "wanted": WANTED[bits],
            "decoded_GB_per_second": round(size / best_seconds(back, a.repeat), 2),
            "peak_bytes_a_weight": round(peak_bytes(work) / weight.numel(), 2),
        }  # fmt: skip
        rows.append(row)
        print(json.dumps(row), flush=True)
    if a.save:
        result = {"machine": machine(), "out": a.out, "in_features": a.in_features, "rows": rows}
        a.save.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
