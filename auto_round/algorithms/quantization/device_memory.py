"""What is done when a device has too little memory."""

from __future__ import annotations

import gc

import torch

from auto_round.errors import DeviceError


def free_cached(device: torch.device) -> None:
    """Give memory that PyTorch keeps for later back to the device."""
    gc.collect()
    if device.type == "cuda" and torch.cuda.is_available():
        torch.cuda.empty_cache()


def out_of_memory(doing: str, device: torch.device) -> DeviceError:
    """The error when nothing more can be split or moved away."""
    return DeviceError(
        f"{device} has too little memory for {doing}, with everything else off it; lower seqlen, set "
        "low_gpu_mem_usage=True (--low_gpu_mem_usage), batch_size=1 with gradient_accumulate_steps for the same "
        "effective batch, tune on another device (device_map), or leave tuning out (iters=0)"
    )
