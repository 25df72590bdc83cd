"""The Triton kernel on a GPU: the share of memory bandwidth at decode, of a bfloat16 product's speed at prefill.

    python bench/triton_kernels.py [--bits 4 --group_size 128] [--out bench/results/triton.json]
    TRITON_INTERPRET=1 python bench/triton_kernels.py --tiny     # does it run, on a CPU; its times mean nothing

Decode: one row, layers one after the other so that none is in the cache from the last call, inside one CUDA graph. Its
share is bytes of words, scales and zero points over time, against what copying a large array moves (read and write) on
the same device, and against the given peak. Prefill: many rows, against `torch.matmul` with a bfloat16 weight of the
same shape, both from the cache or not alike.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
SHAPES = [(4096, 4096), (8192, 8192), (14336, 4096), (4096, 14336)]  # outputs, inputs
ROWS = [16, 64, 256, 512, 2048, 4096]
PEAK = {"H100": 3.35, "H200": 4.8}  # TB/s, from NVIDIA's data sheets of the SXM boards


def kernel(out: int, inputs: int, bits: int, group: int, sym: bool, device: str, seed: int) -> Any:
    from auto_round.inference.kernels import IntegerWeight, LayerSpec
    from auto_round.inference.kernels.triton_linear import TritonLinear

    gen = torch.Generator(device).manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (out, inputs), generator=gen, dtype=torch.uint8, device=device)
    shape = (out, inputs // group)
    zeros = torch.full(shape, 1 << (bits - 1), dtype=torch.uint8, device=device)
    if not sym:
        zeros = torch.randint(0, 1 << bits, shape, generator=gen, dtype=torch.uint8, device=device)
    scales = torch.rand(shape, generator=gen, device=device).half() / 100
    spec = LayerSpec(bits, group, sym, inputs, out, torch.bfloat16, device)
    reason = TritonLinear.unsupported_reason(spec)
    if reason is not None:
        sys.exit(f"cannot run: {reason}")
    return TritonLinear(IntegerWeight(codes, scales, zeros, spec))


def bytes_of(layer: Any) -> int:
    return sum(b.numel() * b.element_size() for b in layer.buffers())


def seconds(call: Callable[[], object], device: str, repeats: int) -> float:
    """Median of one call; on a GPU of calls in a replayed graph."""
    if device == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    times = []
    for _ in range(12):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1e3 / repeats)
    return statistics.median(times[2:])


def copy_speed(device: str, tiny: bool) -> float:
    """Bytes a second, read and written, of copying an array much larger than the cache."""
    source = torch.empty(1 << (16 if tiny else 31), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source), device, 4)


def decode(
    a: argparse.Namespace, out: int, inputs: int, rows: int, copying: float, peak: float | None
) -> dict[str, Any]:
    one = kernel(out, inputs, a.bits, a.group_size, not a.asym, a.device, 0)
    copies = 1 if a.tiny else max(2, int(3e8 // bytes_of(one)))  # more than any cache holds
    layers = [one, *(kernel(out, inputs, a.bits, a.group_size, not a.asym, a.device, s) for s in range(1, copies))]
    x = torch.randn(rows, inputs, device=a.device, dtype=torch.bfloat16)
    taken = seconds(lambda: [layer(x) for layer in layers], a.device, 1) / len(layers)
    weights = [torch.randn(out, inputs, device=a.device, dtype=torch.bfloat16) for _ in range(max(2, copies // 4))]
    plain = seconds(lambda: [torch.nn.functional.linear(x, w) for w in weights], a.device, 1) / len(weights)
    moved = bytes_of(one) / taken
    return {
        "out": out, "in": inputs, "rows": rows, "us": taken * 1e6, "tb_s": moved / 1e12,
        "share_of_copy": moved / copying, "share_of_peak": None if peak is None else moved / 1e12 / peak,
        "bf16_us": plain * 1e6, "times_bf16": plain / taken,
    }  # fmt: skip


def prefill(a: argparse.Namespace, out: int, inputs: int, rows: int) -> dict[str, Any]:
    layer = kernel(out, inputs, a.bits, a.group_size, not a.asym, a.device, 0)
    weight = torch.randn(out, inputs, device=a.device, dtype=torch.bfloat16)
    x = torch.randn(rows, inputs, device=a.device, dtype=torch.bfloat16)
    ours = seconds(lambda: layer(x), a.device, 10)
    plain = seconds(lambda: torch.nn.functional.linear(x, weight), a.device, 10)
    flops = 2 * rows * out * inputs
    return {
        "out": out, "in": inputs, "rows": rows, "us": ours * 1e6, "bf16_us": plain * 1e6, "ratio": plain / ours,
        "tflops": flops / ours / 1e12,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group_size", type=int, default=128)
    parser.add_argument("--asym", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on a CPU, to see that it runs")
    parser.add_argument("--out", type=Path, default=None)
    a = parser.parse_args()
    a.device = "cpu" if a.tiny else "cuda"
    if not a.tiny and not torch.cuda.is_available():
        sys.exit("no CUDA device is here; --tiny with TRITON_INTERPRET=1 shows on a CPU that it runs")
    name = platform.processor() or "CPU" if a.tiny else torch.cuda.get_device_name()
    peak = next((value for key, value in PEAK.items() if key in name), None)
    shapes, many = ([(64, 256)], [3]) if a.tiny else (SHAPES, ROWS)
    copying = copy_speed(a.device, a.tiny)
    result: dict[str, Any] = {
        "machine": name, "torch": torch.__version__, "bits": a.bits, "group_size": a.group_size, "sym": not a.asym,
        "copy_tb_s": copying / 1e12, "peak_tb_s": peak, "decode": [], "prefill": [],
    }  # fmt: skip
    for out, inputs in shapes:
        for rows in (1, 2, 4, 8):
            row = decode(a, out, inputs, rows, copying, peak)
            result["decode"].append(row)
            print(
                f"decode  {out}x{inputs} rows {rows}: {row['us']:8.2f} us, {row['tb_s']:.2f} TB/s, "
                f"{row['share_of_copy']:.0%} of a copy, {row['times_bf16']:.2f} times bf16"
            )
        for rows in many:
            row = prefill(a, out, inputs, rows)
            result["prefill"].append(row)
            print(f"prefill {out}x{inputs} rows {rows}: {row['us']:8.2f} us, {row['ratio']:.0%} of bf16's speed")
    if a.out is not None:
        a.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
