"""Which dtype to multiply matrices in on a device, and nothing else."""

from __future__ import annotations

import functools

import torch

# Private to PyTorch; where a probe is missing the safe answer is float32.
_PROBES = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


@functools.lru_cache(maxsize=2)
def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has matrix instructions for a half precision. Without them it is emulated, several times
    slower than float32."""
    probe = getattr(torch.ops.mkldnn, _PROBES.get(dtype, ""), None)
    return bool(probe()) if probe is not None else False


def compute_dtype_for(device: torch.device | str, dtype: torch.dtype) -> torch.dtype:
    """`dtype`, or float32 for a half precision on a CPU without matrix instructions for it.

    float32 represents every float16 and bfloat16 value, so no weight changes.
    """
    if torch.device(device).type != "cpu" or dtype not in _PROBES:
        return dtype
    return dtype if cpu_multiplies(dtype) else torch.float32
