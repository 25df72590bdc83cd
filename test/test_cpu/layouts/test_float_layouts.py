"""Layers of the small float types as tensors, and back: by ourselves, and in checkpoints that another one wrote."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from auto_round.algorithms.base import LayerTask
from auto_round.algorithms.quantization.rtn.quantizer import quantize_layer
from auto_round.codecs.activation import ActivationQuantizer
from auto_round.codecs.quantized_layer import QuantizedLayer
from auto_round.errors import NumericsError
from auto_round.formats.base import formats_for_scheme, get_format
from auto_round.inference.config import read_config
from auto_round.layouts.floats import AUTO_ROUND_FLOATS, COMPRESSED_TENSORS_FLOATS, FloatLayout
from auto_round.output.verify import layer_digest
from auto_round.schemes import PRESET_SCHEMES, QuantizationScheme

PRESETS = ["MXFP4", "MXFP4_RCEIL", "MXFP8", "MXFP8_RCEIL", "MXINT4", "NVFP4", "FPW8A16", "FP8_STATIC", "FP8_BLOCK"]
Scheme = QuantizationScheme
OTHERS = [
    Scheme(8, 0, data_type="fp8_e5m2"), Scheme(8, -1, data_type="fp"), Scheme(8, 32, data_type="fp"),
    Scheme(8, (8, 16), data_type="fp"), Scheme(4, 16, data_type="nv_fp"), Scheme(8, 32, data_type="mx_fp8e5m2"),
]  # fmt: skip
SCHEMES = [PRESET_SCHEMES[name] for name in PRESETS] + OTHERS
GOLDEN = {
    "mxfp4-auto_round": AUTO_ROUND_FLOATS,
    "mxfp4_rceil-auto_round": AUTO_ROUND_FLOATS,
    "mxfp8-auto_round": AUTO_ROUND_FLOATS,
    "mxint4-auto_round": AUTO_ROUND_FLOATS,
    "nvfp4-auto_round": AUTO_ROUND_FLOATS,
    "fp8_block-auto_round": AUTO_ROUND_FLOATS,
    "fp8_block-fp8": AUTO_ROUND_FLOATS,
    "fp8_static-auto_round": AUTO_ROUND_FLOATS,
    "fpw8a16-auto_round": AUTO_ROUND_FLOATS,
    "mxfp4-llm_compressor": COMPRESSED_TENSORS_FLOATS,
    "mxfp8-llm_compressor": COMPRESSED_TENSORS_FLOATS,
    "nvfp4-llm_compressor": COMPRESSED_TENSORS_FLOATS,
    "fp8_block-llm_compressor": COMPRESSED_TENSORS_FLOATS,
    "fp8_static-llm_compressor": COMPRESSED_TENSORS_FLOATS,
    "fpw8a16-llm_compressor": COMPRESSED_TENSORS_FLOATS,
}
PRESET_OF = {
    "mxfp4": "MXFP4",
    "mxfp8": "MXFP8",
    "nvfp4": "NVFP4",
    "fp8_block": "FP8_BLOCK",
    "fp8_static": "FP8_STATIC",
    "fpw8a16": "FPW8A16",
}


def rounded(scheme: QuantizationScheme, out: int, columns: int, seed: int = 0, bias: bool = False) -> QuantizedLayer:
    weight = torch.randn(out, columns, generator=torch.Generator().manual_seed(seed))
    activation = None
    if scheme.activations is not None:
        fixed = not scheme.activations.dynamic
        above = torch.tensor(123.0) if "static_gs" in scheme.activations.data_type else None
        activation = ActivationQuantizer(scheme.activations, torch.tensor(0.25) if fixed else None, None, above)
    task = LayerTask(
        "m.l", torch.nn.Linear(1, 1), weight, scheme, bias=torch.randn(out) if bias else None, activation=activation
    )
    return quantize_layer(task, False, torch.float16)


@given(st.sampled_from(SCHEMES), st.integers(1, 40), st.integers(1, 5), st.booleans(), st.integers(0, 99))
def test_every_format_gives_back_what_it_took(
    scheme: QuantizationScheme, out: int, groups: int, bias: bool, seed: int
) -> None:
    unit = scheme.group_size if isinstance(scheme.group_size, int) and scheme.group_size > 0 else 7
    layer = rounded(scheme, out, unit * groups, seed, bias)
    taken = [name for name in formats_for_scheme(scheme) if name != "fake"]
    assert "auto_round" in taken
    for name in taken:
        fmt = get_format(name)
        tensors = fmt.pack(layer, model_dtype=torch.bfloat16)
        specs = fmt.tensor_specs(
            "m.l", scheme, layer.in_features, out, bias_dtype=torch.float32 if bias else None,
            model_dtype=torch.bfloat16,
        )  # fmt: skip
        assert {k: (tuple(v.shape), v.dtype) for k, v in tensors.items()} == specs
        assert all(tensor.is_contiguous() for tensor in tensors.values())
        naming = COMPRESSED_TENSORS_FLOATS if "llm_compressor" in name else AUTO_ROUND_FLOATS
        found = {key.removeprefix("m.l."): tensor for key, tensor in tensors.items()}
        back = naming.unpack("m.l", scheme, found, layer.in_features, out)
        assert torch.equal(back.dequantize(), layer.dequantize())
        assert layer_digest(back, False, torch.float32) == layer_digest(layer, False, torch.float32)
        assert back.codes.scale.shape == layer.codes.scale.shape
        if not fmt.loadable_here:
            read = fmt.unpack_layer("m.l", scheme, tensors, layer.in_features, out)
            assert layer_digest(read, False, torch.float32) == layer_digest(layer, False, torch.float32)


@pytest.mark.parametrize("name", ["scale", "global_scale", "act_global_scale", "codes"])
def test_the_digest_sees_every_number(name: str) -> None:
    layer = rounded(PRESET_SCHEMES["NVFP4"], 4, 32)
    holder = layer if name.startswith("act_") else layer.codes
    value = getattr(holder, name).clone()
    value.view(-1)[0] += 1
    changed = replace(holder, **{name: value})
    changed = changed if isinstance(changed, QuantizedLayer) else replace(layer, codes=changed)
    assert layer_digest(changed, False, torch.float32) != layer_digest(layer, False, torch.float32)


def test_scales_are_never_rounded() -> None:
    layer = rounded(PRESET_SCHEMES["FPW8A16"], 4, 32)
    odd = replace(layer, codes=replace(layer.codes, scale=layer.codes.scale * 1.001))
    with pytest.raises(NumericsError, match="bfloat16"):
        get_format("auto_round").pack(odd)


@pytest.mark.parametrize(("name", "leaves"), [
    ("MXFP4", {"weight_packed", "weight_scale"}), ("MXFP8", {"weight", "weight_scale"}),
    ("MXINT4", {"weight_packed", "weight_scale"}), ("FPW8A16", {"weight", "weight_scale"}),
    ("NVFP4", {"weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"}),
    ("FP8_STATIC", {"weight", "weight_scale", "input_scale"}), ("FP8_BLOCK", {"weight", "weight_scale_inv"}),
])  # fmt: skip
def test_names(name: str, leaves: set[str]) -> None:
    specs = get_format("auto_round").tensor_specs("a.b", PRESET_SCHEMES[name], 256, 128)
    assert {key.rpartition(".")[2] for key in specs} == leaves


def stored(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def scheme_of(folder: Path) -> QuantizationScheme:
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    if "config_groups" in config:
        return PRESET_SCHEMES[PRESET_OF[folder.name.partition("-")[0]]]
    return read_config(config).default.scheme


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_bytes(golden_folder: Path, name: str) -> None:
    """Decoded to codes and scales, and packed again: the same bytes, in the same tensors."""
    folder, naming = golden_folder / name, GOLDEN[name]
    scheme, tensors = scheme_of(folder), stored(folder)
    layers = sorted({key.rpartition(".")[0] for key in tensors if "_proj." in key})
    assert len(layers) == 14 and naming.problem(scheme) is None
    source = stored(golden_folder / "_source-tiny-llama")
    for layer in layers:
        out, columns = source[f"{layer}.weight"].shape
        found = {key.rpartition(".")[2]: tensor for key, tensor in tensors.items() if key.rpartition(".")[0] == layer}
        read = naming.unpack(layer, scheme, found, columns, out)
        again = naming.pack(read)
        assert set(again) == set(found)
        for leaf, tensor in again.items():
            assert tensor.dtype == found[leaf].dtype and tensor.shape == found[leaf].shape, leaf
            assert torch.equal(tensor.view(torch.uint8), found[leaf].view(torch.uint8)), leaf
        # Right, and not only reversible: what was read is near what was quantized.
        error = (read.dequantize() - source[f"{layer}.weight"].float()).norm() / source[
            f"{layer}.weight"
        ].float().norm()
        assert error < (0.04 if read.codes.element == "e4m3" else 0.2)


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8", "nvfp4", "fp8_block", "fp8_static"])
def test_both_layouts_of_a_scheme_hold_the_same(golden_folder: Path, name: str) -> None:
    dense: list[dict[str, torch.Tensor]] = []
    for suffix, naming in (("auto_round", AUTO_ROUND_FLOATS), ("llm_compressor", COMPRESSED_TENSORS_FLOATS)):
        dense.append(dequantized(golden_folder / f"{name}-{suffix}", naming))
    assert all(torch.equal(weight, dense[1][layer]) for layer, weight in dense[0].items())


def dequantized(folder: Path, naming: FloatLayout) -> dict[str, torch.Tensor]:
    scheme, tensors = scheme_of(folder), stored(folder)
    result: dict[str, Any] = {}
    for layer in {key.rpartition(".")[0] for key in tensors if "_proj." in key}:
        found = {key.rpartition(".")[2]: tensor for key, tensor in tensors.items() if key.rpartition(".")[0] == layer}
        codes = found.get("weight", found.get("weight_packed"))
        assert codes is not None
        columns = codes.shape[1] * (1 if "weight" in found else 2)
        result[layer] = naming.unpack(layer, scheme, found, columns, codes.shape[0]).dequantize()
    return result
