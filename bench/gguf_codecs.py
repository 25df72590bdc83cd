"""How fast one core turns float32 weights into the bytes of each ggml type, and how fast ggml's own code does.

    python bench/gguf_codecs.py [--rows 256 --columns 4096 --repeat 7] [--types Q4_K Q6_K] [--out results/gguf_codecs.json]

Ours is plain rounding and packing, ggml's is `libgguf.quantize_rows_into_raw`, without an importance matrix; the two take
turns on the same weights and one core. Speed is in GB of float32 input per second of the process's CPU time, the best of
`--repeat`; `times` is our time over theirs, and `wanted` is what we hold ourselves to. `same` is the share of blocks with
the same bytes, `error` our squared error over theirs. Memory is the largest that PyTorch held at once, in bytes a weight,
beside the weight; the packed result is part of it. Linux only.
"""  # noqa: E501

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import libgguf
import numpy as np
import torch
from packing import peak_bytes
from vs_peer import machine

from auto_round.data_type.gguf.packing import pack_blocks, unpack_blocks
from auto_round.data_type.gguf.plain import plain_blocks
from auto_round.data_type.gguf.types import GGML_TYPES

WANTED = 3.0


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()  # of all threads: libgguf works in some of its own
    work()
    return time.process_time() - start


def measure(name: str, weight: torch.Tensor, repeat: int) -> dict[str, object]:
    kind, columns, size = GGML_TYPES[name], weight.shape[1], weight.numel() * 4 / 1e9
    type_, source = libgguf.GGMLQuantizationType[name], weight.numpy()
    theirs = np.empty((weight.shape[0], kind.row_bytes(columns)), np.uint8)

    def by_ggml() -> None:
        libgguf.quantize_rows_into_raw(type_, source, theirs, *source.shape)

    blocks = plain_blocks(weight, name)
    ours = pack_blocks(blocks)
    work = {
        "plain": lambda: plain_blocks(weight, name), "pack": lambda: pack_blocks(blocks), "ggml": by_ggml,
        "unpack": lambda: unpack_blocks(ours, kind, columns),
    }  # fmt: skip
    best = dict.fromkeys(work, float("inf"))
    for _ in range(repeat + 1):
        for key, run in work.items():
            best[key] = min(best[key], seconds(run))
    both = best["plain"] + best["pack"]
    errors = [
        float((unpack_blocks(data, kind, columns).dequantize() - weight).double().pow(2).sum())
        for data in (ours, torch.from_numpy(theirs))
    ]
    same = (ours.numpy().reshape(-1, kind.nbytes) == theirs.reshape(-1, kind.nbytes)).all(1).mean()
    peak = peak_bytes(lambda: pack_blocks(plain_blocks(weight, name)))
    return {
        "type": name, "GB_per_second": round(size / both, 3), "ggml_GB_per_second": round(size / best["ggml"], 3),
        "times": round(both / best["ggml"], 2), "wanted": WANTED,
        "pack_GB_per_second": round(size / best["pack"], 2), "unpack_GB_per_second": round(size / best["unpack"], 2),
        "same": float(same), "error": round(errors[0] / errors[1], 6),
        "peak_bytes_a_weight": round(peak / weight.numel(), 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--types", nargs="+", default=list(GGML_TYPES), choices=list(GGML_TYPES))
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    weight = torch.randn(a.rows, a.columns, generator=torch.Generator().manual_seed(1)) * 0.02
    rows = []
    for name in a.types:
        rows.append(measure(name, weight, a.repeat))
        print(json.dumps(rows[-1]), flush=True)
    if a.out:
        result = {"machine": machine(), "rows": a.rows, "columns": a.columns, "types": rows}
        a.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
