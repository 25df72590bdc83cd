"""Codes and scales against checkpoints that another implementation made of the same model, by plain rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from auto_round.codecs.block_float import BLOCK_FLOAT_SPECS, encode, global_scale_of, spec_for_bits
from auto_round.codecs.minifloat import MINIFLOATS, tensor_absmax
from auto_round.modeling.files.safetensors import TensorFiles
from auto_round.modeling.layer_rules import fused_groups

Size = Any


def layers(files: TensorFiles) -> list[str]:
    return [name.removesuffix(".weight") for name in files if name.endswith("_proj.weight")]


def four_bits(packed: torch.Tensor) -> torch.Tensor:
    """The low half of a byte is the even column."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(1)


@pytest.mark.parametrize(("folder", "name", "bits"), [
    ("mxfp4-auto_round", "mx_fp", 4), ("mxfp4-llm_compressor", "mx_fp", 4), ("mxfp4_rceil-auto_round", "mx_fp", 4),
    ("mxfp8-auto_round", "mx_fp", 8), ("mxfp8-llm_compressor", "mx_fp", 8), ("mxint4-auto_round", "mx_int", 4),
])  # fmt: skip
def test_microscaling_is_the_same_to_the_bit(folder: str, name: str, bits: int, golden_folder: Path) -> None:
    source, made = TensorFiles.open(golden_folder / "_source-tiny-llama"), TensorFiles.open(golden_folder / folder)
    family = spec_for_bits(BLOCK_FLOAT_SPECS[name], name, bits)
    assert family is not None and len(layers(source)) == 14
    for layer in layers(source):
        found = encode(source.read(f"{layer}.weight"), family, 32)
        exponents = made.read(f"{layer}.weight_scale").int() - 127
        assert torch.equal(found.scale, torch.exp2(exponents.float()))
        codes = four_bits(made.read(f"{layer}.weight_packed")) if bits == 4 else made.read(f"{layer}.weight")
        assert torch.equal(found.codes, codes.view(torch.uint8))


@pytest.mark.parametrize("folder", ["nvfp4-auto_round", "nvfp4-llm_compressor"])
def test_nvfp4(folder: str, golden_folder: Path) -> None:
    """Scales of both levels are the same. Values differ at ties alone, which the order of two divisions decides there;
    and there negative values that become zero lose their sign."""
    source, made = TensorFiles.open(golden_folder / "_source-tiny-llama"), TensorFiles.open(golden_folder / folder)
    family = spec_for_bits(BLOCK_FLOAT_SPECS["nv_fp"], "nv_fp", 4)
    assert family is not None
    names = layers(source)
    joined = fused_groups(names, across_experts=False)
    alone = [(name,) for name in names if not any(name in group for group in joined)]
    different = total = 0
    for group in [*joined, *alone]:
        largest = torch.stack([tensor_absmax(source.read(f"{name}.weight")) for name in group]).max()
        for layer in group:
            found = encode(source.read(f"{layer}.weight"), family, 16, global_scale=global_scale_of(largest))
            assert torch.equal(found.global_scale, made.read(f"{layer}.weight_global_scale").view(()))
            assert torch.equal(found.scale, made.read(f"{layer}.weight_scale").float())
            codes = four_bits(made.read(f"{layer}.weight_packed"))
            different += int((MINIFLOATS["e2m1"].decode(codes) != MINIFLOATS["e2m1"].decode(found.codes)).sum())
            total += codes.numel()
    assert different < 5e-4 * total


@pytest.mark.parametrize(("folder", "size", "leaf"), [
    ("fp8_static-auto_round", -1, "weight_scale"), ("fp8_static-llm_compressor", -1, "weight_scale"),
    ("fp8_block-auto_round", (128, 128), "weight_scale_inv"), ("fp8_block-fp8", (128, 128), "weight_scale_inv"),
    ("fpw8a16-auto_round", 0, "weight_scale"),
])  # fmt: skip
def test_fp8(folder: str, size: Size, leaf: str, golden_folder: Path) -> None:
    """The stored scales are the same. There codes were chosen before the scale was rounded to bfloat16, so that a few
    are not the nearest for it; ours are never further from the weight."""
    source, made = TensorFiles.open(golden_folder / "_source-tiny-llama"), TensorFiles.open(golden_folder / folder)
    family = spec_for_bits(BLOCK_FLOAT_SPECS["fp"], "fp", 8)
    assert family is not None
    for layer in layers(source):
        weight = source.read(f"{layer}.weight")
        found = encode(weight, family, size)
        assert torch.equal(found.scale, made.read(f"{layer}.{leaf}").float().view_as(found.scale))
        theirs = made.read(f"{layer}.weight").view(torch.uint8)
        assert float((theirs != found.codes).float().mean()) < 0.05
        assert int(((theirs & 127).int() - (found.codes & 127).int()).abs().max()) <= 1  # the sign of zero aside
        scale = found.scale.repeat_interleave(128, 0).repeat_interleave(128, 1) if size == (128, 128) else found.scale
        ours, other = (MINIFLOATS["e4m3"].decode(codes) * scale - weight.float() for codes in (found.codes, theirs))
        assert bool((ours.abs() <= other.abs() * (1 + 1e-5) + 1e-9).all())
