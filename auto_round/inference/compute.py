"""Which dtype to multiply matrices in on a device, and nothing else."""

from __future__ import annotations

import functools

import torch


@functools.lru_cache(maxsize=1)
def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has bfloat16 matrix instructions that oneDNN uses."""
    # Without them bfloat16 matmul is emulated, an order of magnitude slower than float32. The probe is private to
    # PyTorch; where it is missing the safe answer is float32.
    probe = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return bool(probe()) if probe is not None else False


def compute_dtype_for(device: torch.device | str, dtype: torch.dtype) -> torch.dtype:
    """`dtype`, or float32 where matrix products in `dtype` are emulated (float16 and, mostly, bfloat16 on CPUs).

    float32 represents every float16 and bfloat16 value, so no weight changes.
    """
    if torch.device(device).type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return dtype
    return dtype if dtype is torch.bfloat16 and cpu_multiplies_bf16() else torch.float32
