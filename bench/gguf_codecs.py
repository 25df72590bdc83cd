"""How fast one core turns float32 weights into the bytes of each ggml type, and how fast ggml's own code does.

    python bench/gguf_codecs.py [--rows 512 --columns 4096 --repeat 7] [--types Q4_K Q6_K] [--out gguf_codecs.json]
                                [--ggml_library build/bin/libggml-base.so]

Ours is plain rounding and packing, ggml's is `libgguf.quantize_rows_into_raw`, without an importance matrix; libgguf is
built for every x86-64. With `--ggml_library`, one of llama.cpp built for this machine, what `llama-quantize` calls
takes part too (`native`). All take turns on the same weights and one core.

Speed is in GB of float32 input per second of the process's CPU time, the best of `--repeat`; `times` is our time over
libgguf's, `native_times` over the library's, and `wanted` is what we hold ourselves to. `same` is the share of blocks
with the same bytes, `error` our squared error over libgguf's. Memory is the largest that PyTorch held at once, in bytes
a weight, beside the weight; the packed result is part of it. Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
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

from auto_round.codecs.ggml.pack import pack_blocks, unpack_blocks
from auto_round.codecs.ggml.plain import plain_blocks
from auto_round.codecs.ggml.types import GGML_TYPES

WANTED = 3.0


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()  # of all threads: libgguf works in some of its own
    work()
    return time.process_time() - start


def native_quantizer(path: str) -> Callable[[int, np.ndarray, np.ndarray], None]:
    """`ggml_quantize_chunk` of a shared library of ggml."""
    chunk = ctypes.CDLL(path).ggml_quantize_chunk
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    chunk.argtypes, chunk.restype = [ctypes.c_int, pointer, pointer, number, number, number, pointer], ctypes.c_size_t

    def run(type_: int, source: np.ndarray, target: np.ndarray) -> None:
        chunk(type_, source.ctypes.data, target.ctypes.data, 0, *source.shape, None)

    return run


def measure(
    name: str, weight: torch.Tensor, repeat: int, native: Callable[[int, np.ndarray, np.ndarray], None] | None
) -> dict[str, object]:
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
    if native is not None:
        theirs_native = np.empty_like(theirs)
        work["native"] = lambda: native(int(type_), source, theirs_native)
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
    row = {
        "type": name, "GB_per_second": round(size / both, 3), "ggml_GB_per_second": round(size / best["ggml"], 3),
        "times": round(both / best["ggml"], 2), "wanted": WANTED,
        "pack_GB_per_second": round(size / best["pack"], 2), "unpack_GB_per_second": round(size / best["unpack"], 2),
        "same": float(same), "error": round(errors[0] / errors[1], 6),
        "peak_bytes_a_weight": round(peak / weight.numel(), 2),
    }  # fmt: skip
    if native is not None:
        row["native_GB_per_second"] = round(size / best["native"], 3)
        row["native_times"] = round(both / best["native"], 2)
        blocks_of = [x.reshape(-1, kind.nbytes) for x in (ours.numpy(), theirs_native)]
        row["native_same"] = float((blocks_of[0] == blocks_of[1]).all(1).mean())
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--types", nargs="+", default=list(GGML_TYPES), choices=list(GGML_TYPES))
    parser.add_argument("--ggml_library")
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    weight = torch.randn(a.rows, a.columns, generator=torch.Generator().manual_seed(1)) * 0.02
    native = native_quantizer(a.ggml_library) if a.ggml_library else None
    rows = []
    for name in a.types:
        rows.append(measure(name, weight, a.repeat, native))
        print(json.dumps(rows[-1]), flush=True)
    if a.out:
        result = {"machine": machine(), "rows": a.rows, "columns": a.columns, "types": rows}
        a.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
