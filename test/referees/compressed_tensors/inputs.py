"""How compressed-tensors 0.20.0 quantizes the inputs of MXFP4, MXFP8 and NVFP4 layers, written down a second time.

| type | scale of a group | computed |
|---|---|---|
| MXFP4, MXFP8 | 2**(floor(log2(largest)) - emax), one power more from a mantissa of 1.75 on | exactly |
| NVFP4 | e4m3 nearest to `largest / 6 * global scale`; 1/8 instead of zero | `largest / 6` in the inputs' own dtype |

Everything else is plain: elements are nearest, ties to even, what is larger than the largest element becomes that one,
and the product with the scale is rounded once to the inputs' dtype.

Also a judge, for `tools/referees.py`: the dense checkpoint DENSE with the inputs of its layers quantized as the
compressed-tensors checkpoint FOLDER says. It needs neither compressed-tensors nor auto_round.

    inputs.py FOLDER IDS.npy OUT.npy DTYPE DENSE
"""

from __future__ import annotations

import json
import os
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

os.environ["TQDM_DISABLE"] = "1"

import numpy as np
import torch
from safetensors import safe_open

# By bits: the exponent of the largest element, and the element itself.
_EMAX = {4: 2, 8: 8}
_TOP = {4: 6.0, 8: 448.0}


def nearest(ratio: torch.Tensor, bits: int) -> torch.Tensor:
    """The e2m1 (4 bits) or e4m3 (8 bits) nearest to each float32."""
    ratio = ratio.clamp(-_TOP[bits], _TOP[bits])
    if bits == 8:
        return ratio.to(torch.float8_e4m3fn).float()
    step = torch.exp2(torch.floor(torch.log2(ratio.abs().clamp(min=1.0))) - 1)  # 0.5 below 2, 1 below 4, then 2
    return torch.round(ratio / step) * step


def microscaling(x: torch.Tensor, bits: int) -> torch.Tensor:
    """`x` [..., in], in groups of 32."""
    groups = x.unflatten(-1, (-1, 32))
    largest = groups.abs().amax(-1, keepdim=True).float()
    mantissa, exponent = torch.frexp(largest)  # 0.5 <= mantissa < 1
    exponent = exponent - 1 + (2 * mantissa >= 1.75) - _EMAX[bits]
    scale = torch.exp2(torch.where(largest == 0, -127, exponent.clamp(-127, 127)).float())
    return (nearest(groups.float() / scale, bits) * scale).flatten(-2).to(x.dtype)


def nvfp4(x: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    """`x` [..., in], in groups of 16 under a float32 scalar."""
    groups = x.unflatten(-1, (-1, 16))
    share = (groups.abs().amax(-1, keepdim=True) / 6).float() * global_scale.reshape(())
    scale = nearest(share, 8)
    factor = torch.where(scale == 0, 0.125, scale) / global_scale.reshape(())
    return (nearest(groups.float() / factor, 4) * factor).flatten(-2).to(x.dtype)


def quantize(x: torch.Tensor, args: dict[str, Any], global_scale: torch.Tensor | None) -> torch.Tensor:
    """`args`: `input_activations` of a group of the configuration."""
    if args["type"] == "float" and args["strategy"] == "group" and args["group_size"] == 32:
        return microscaling(x, args["num_bits"])
    if args["type"] == "float" and args["strategy"] == "tensor_group" and global_scale is not None:
        return nvfp4(x, global_scale)
    raise SystemExit(f"no rule here for inputs of {args}")


def inputs_of(folder: Path) -> dict[str, tuple[dict[str, Any], torch.Tensor | None]]:
    """By name of the layer: `input_activations`, and the global scale of its inputs if it has one."""
    groups = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"].values()
    found = {}
    with safe_open(folder / "model.safetensors", "pt") as file:
        keys = set(file.keys())
        for name in sorted(key.removesuffix(".weight_scale") for key in keys if key.endswith(".weight_scale")):
            args = next(g["input_activations"] for g in groups if any(_fits(t, name) for t in g["targets"]))
            if args is not None:
                key = f"{name}.input_global_scale"
                found[name] = args, file.get_tensor(key).float() if key in keys else None
    return found


def _fits(target: str, name: str) -> bool:
    return bool(re.match(target[3:], name)) if target.startswith("re:") else target in ("Linear", name)


def logits(folder: Path, dense: Path, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 logits of the dense model with quantized inputs."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(dense, dtype=dtype).eval()
    wanted = inputs_of(folder)
    assert wanted, f"{folder} quantizes no inputs"
    for name, (args, above) in wanted.items():
        step = partial(quantize, args=args, global_scale=above)
        model.get_submodule(name).register_forward_pre_hook(lambda _m, given, step=step: (step(given[0]), *given[1:]))
    with torch.no_grad():
        return model(ids).logits.float()


def main(folder: str, ids: str, out: str, dtype: str, dense: str) -> None:
    found = logits(Path(folder), Path(dense), torch.from_numpy(np.load(ids)), getattr(torch, dtype))
    np.save(out, found.numpy())
    print("{}")


if __name__ == "__main__":
    main(*sys.argv[1:])
