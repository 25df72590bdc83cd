"""Checkpoints in FP8 and MXFP4, written by hand, each with the dense copy that it stands for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
Tensors = dict[str, torch.Tensor]


def fp8_blocks(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes e4m3, scales float32, dense float32), tile by tile; the last tiles may be smaller."""
    rows, columns = weight.shape
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-rows // block[0]), -(-columns // block[1]))
    dense = torch.empty(rows, columns)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            place = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            tile = weight[place].float()
            scales[i, j] = tile.abs().max() / 448
            codes[place] = (tile / scales[i, j]).to(torch.float8_e4m3fn)
            dense[place] = codes[place].float() * scales[i, j]
    return codes, scales, dense


def mxfp4_groups(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes [.., n], E8M0 bytes [.., n / 32], dense float32) along the last dimension."""
    groups = weight.float().unflatten(-1, (-1, 32))
    exponent = torch.floor(torch.log2(groups.abs().amax(-1).clamp(min=1e-30))) - 2
    scaled = groups / torch.exp2(exponent)[..., None]
    codes = (scaled[..., None] - E2M1).abs().argmin(-1)
    dense = E2M1[codes] * torch.exp2(exponent)[..., None]
    return codes.flatten(-2).to(torch.uint8), (exponent + 127).to(torch.uint8), dense.flatten(-2)


def _is_quantized(name: str, tensor: torch.Tensor) -> bool:
    skipped = ("embed", "lm_head", "router", "gate.weight", "norm")
    return tensor.dim() == 2 and name.endswith(".weight") and not any(word in name for word in skipped)


def _fp8(name: str, weight: torch.Tensor, kind: str, block: tuple[int, int]) -> tuple[Tensors, torch.Tensor]:
    """What replaces a weight in the files, and the dense float32 weight."""
    rows, columns = weight.shape
    stem = name.removesuffix(".weight")
    tile = {"fp8-tensor": (rows, columns), "modelopt": (rows, columns), "ct-tensor": (rows, columns)}.get(kind, block)
    tile = (1, columns) if kind in ("ct-channel", "fbgemm") else tile
    codes, scales, dense = fp8_blocks(weight, tile)
    leaf = "weight_scale_inv" if kind.startswith("fp8") else "weight_scale"
    if kind in ("fp8-tensor", "modelopt"):
        scales = scales.reshape(())
    elif kind == "ct-tensor":
        scales = scales.reshape(1)
    elif kind == "ct-channel":
        scales = scales.bfloat16()
        dense = codes.float() * scales.float()
    made = {name: codes, f"{stem}.{leaf}": scales}
    if kind in ("modelopt", "ct-tensor", "ct-channel"):
        made[f"{stem}.input_scale"] = torch.tensor([0.5])
    return made, dense


def _float_group(strategy: str, bits: int = 8, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "float", "strategy": strategy, "symmetric": True, "dynamic": False, **more}
    return {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}


def _declaration(kind: str, block: tuple[int, int]) -> dict[str, Any]:
    compressed = {"quant_method": "compressed-tensors", "ignore": ["lm_head"], "quantization_status": "compressed"}
    return {
        "fp8-block": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(block)},
        "fp8-tensor": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": None},
        "fbgemm": {"quant_method": "fbgemm_fp8"},
        "modelopt": {"quant_method": "modelopt", "quant_algo": "FP8", "producer": {"name": "modelopt"}},
        "ct-tensor": {**compressed, "format": "naive-quantized", "config_groups": _float_group("tensor")},
        "ct-channel": {**compressed, "format": "float-quantized", "config_groups": _float_group("channel")},
        "ct-block": {
            **compressed, "format": "float-quantized",
            "config_groups": _float_group("block", block_structure=list(block)),
        },
        "ct-mxfp4": {
            **compressed, "format": "mxfp4-pack-quantized", "config_groups": _float_group("group", 4, group_size=32),
        },
        "mxfp4": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens", "lm_head"]},
    }[kind]  # fmt: skip


def _mxfp4_experts(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """GPT-OSS's layout of [experts, in, out]: bytes [experts, out, in / 32, 16], and the dense float32 weight."""
    codes, scales, dense = mxfp4_groups(weight.transpose(1, 2))
    pairs = codes.unflatten(-1, (-1, 16, 2))
    return {f"{name}_blocks": pairs[..., 0] | pairs[..., 1] << 4, f"{name}_scales": scales}, dense.transpose(1, 2)


@pytest.fixture(scope="session")
def quantized_copy(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """`quantized_copy(folder, kind, block=(128, 128))`: (quantized, dense) copies of a saved model in bfloat16.

    Kinds: fp8-block, fp8-tensor, fbgemm, modelopt, ct-tensor, ct-channel, ct-block, ct-mxfp4, mxfp4 (experts).
    """

    def make(folder: str | Path, kind: str, block: tuple[int, int] = (128, 128)) -> tuple[Path, Path]:
        root = tmp_path_factory.mktemp(kind)
        stored: Tensors = {}
        dense: Tensors = {}
        for name, tensor in load_file(Path(folder) / "model.safetensors").items():
            tensor = tensor.bfloat16() if tensor.is_floating_point() else tensor
            if kind == "mxfp4" and tensor.dim() == 3:
                made, whole = _mxfp4_experts(name, tensor)
            elif kind == "ct-mxfp4" and _is_quantized(name, tensor):
                codes, scales, whole = mxfp4_groups(tensor)
                stem = name.removesuffix(".weight")
                made = {f"{stem}.weight_packed": codes[:, ::2] | codes[:, 1::2] << 4, f"{stem}.weight_scale": scales}
            elif kind not in ("mxfp4", "ct-mxfp4") and _is_quantized(name, tensor):
                made, whole = _fp8(name, tensor, kind, block)
            else:
                made, whole = {name: tensor}, tensor
            stored |= {k: v.contiguous() for k, v in made.items()}
            dense[name] = whole.to(tensor.dtype).contiguous()
        for part, tensors, declared in (("quantized", stored, _declaration(kind, block)), ("dense", dense, None)):
            shutil.copytree(folder, root / part)
            save_file(tensors, root / part / "model.safetensors", {"format": "pt"})
            config = json.loads((root / part / "config.json").read_text()) | {"dtype": "bfloat16"}
            config |= {} if declared is None else {"quantization_config": declared}
            (root / part / "config.json").write_text(json.dumps(config))
        return root / "quantized", root / "dense"

    return make
