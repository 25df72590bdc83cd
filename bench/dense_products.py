"""How long a CPU takes for a layer that is left in half precision, such as the head: PyTorch's product and ours.

    python bench/dense_products.py [--rows 1 2 7 16 48 512] [--save bench/results/dense_products.json]

Medians of `--repeat`, in turns, in ms, for a head of a 1.1B model and one of a 135M model.
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
from torch.nn.functional import linear
from vs_peer import machine

from auto_round.inference.kernels.cpu import dense_product, is_slow

SIZES = ((32000, 2048), (49152, 576))


def seconds(work: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Print a line for each size and number of rows."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rows", type=int, nargs="+", default=[1, 2, 7, 16, 48, 512])
    p.add_argument("--repeat", type=int, default=9)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--save", type=Path)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    if not is_slow(torch.bfloat16):
        print("this CPU multiplies bfloat16: PyTorch's product is used")
    one = torch.ones(1, 1).bfloat16()
    dense_product(one, one)  # compiles it, where that was not done yet
    found = []
    for out, width in SIZES:
        weight = torch.randn(out, width).bfloat16()
        for rows in a.rows:
            x = torch.randn(rows, width).bfloat16()
            theirs, ours = [], []
            for _ in range(a.repeat if rows < 100 else 3):
                theirs.append(seconds(partial(linear, x, weight)))
                ours.append(seconds(partial(dense_product, weight, x)))
            row = {
                "out": out, "in": width, "rows": rows, "torch_ms": statistics.median(theirs) * 1e3,
                "ours_ms": statistics.median(ours) * 1e3,
            }  # fmt: skip
            row["ratio"] = row["ours_ms"] / row["torch_ms"]
            found.append({key: round(value, 3) for key, value in row.items()})
            print(
                f"{out} x {width}, {rows} rows: PyTorch {row['torch_ms']:.1f} ms, ours {row['ours_ms']:.1f} ms, ratio "
                f"{row['ratio']:.2f}",
                flush=True,
            )
    if a.save:
        a.save.write_text(json.dumps({"machine": machine(), "threads": a.threads, "bfloat16": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
