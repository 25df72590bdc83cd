from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from auto_round.modeling.files.dequantized import dequantize, scale_block
from auto_round.modeling.source import open_source

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


@pytest.mark.parametrize(
    ("weight", "scale", "block", "wanted"),
    [
        ((6, 8), (), None, (6, 8)),
        ((6, 8), (1,), None, (6, 8)),
        ((6, 8), (1, 1), (128, 128), (6, 8)),
        ((6, 8), (6,), None, (1, 8)),
        ((6, 8), (6, 1), None, (1, 8)),
        ((6, 8), (3, 2), None, (2, 4)),
        ((6, 8), (6, 2), None, (1, 4)),
        ((576, 300), (5, 3), (128, 128), (128, 128)),
        ((256, 256), (2, 2), (128, 128), (128, 128)),
        ((576, 300), (5, 3), None, None),
        ((6, 8), (8,), None, None),
        ((6, 8), (4, 2), None, None),
        ((5, 6, 8), (5,), None, (6, 8)),
        ((5, 6, 8), (5, 1, 1), None, (6, 8)),
        ((5, 6, 8), (5, 6, 1), None, (1, 8)),
        ((5, 6, 8), (5, 1, 8), None, (6, 1)),
        ((5, 6, 8), (5, 3, 2), None, (2, 4)),
        ((5, 6, 8), (4, 3, 2), None, None),
    ],
)
def test_what_shares_a_scale(weight: Any, scale: Any, block: Any, wanted: Any) -> None:
    assert scale_block(weight, scale, block) == wanted


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40), columns=st.integers(1, 40), height=st.integers(1, 50), width=st.integers(1, 50),
    experts=st.sampled_from([None, 1, 3]), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    stored=st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]), seed=st.integers(0, 99),
)  # fmt: skip
def test_blocks_of_any_shape(
    rows: int, columns: int, height: int, width: int, experts: int | None, dtype: torch.dtype, stored: torch.dtype,
    seed: int,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    front = () if experts is None else (experts,)
    weight = torch.randn(*front, rows, columns, generator=generator).to(torch.float8_e4m3fn)
    grid = (*front, math.ceil(rows / height), math.ceil(columns / width))
    scale = torch.randint(110, 140, grid, generator=generator, dtype=torch.uint8)
    if stored != torch.uint8:
        scale = torch.rand(grid, generator=generator).to(stored)
    out = torch.empty(weight.shape, dtype=dtype)
    assert dequantize(weight, "e4m3", scale, (height, width), out) is out
    numbers = torch.exp2(scale.float() - 127) if stored == torch.uint8 else scale.float()
    for place in {(0, 0), (rows - 1, columns - 1), (rows // 2, columns // 3)}:
        factor = numbers[..., place[0] // height, place[1] // width]
        assert torch.equal(out[..., place[0], place[1]], (weight[..., place[0], place[1]].float() * factor).to(dtype))
    spread = numbers.repeat_interleave(height, -2).repeat_interleave(width, -1)[..., :rows, :columns]
    assert torch.equal(out, (weight.float() * spread).to(dtype))


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 9), groups=st.integers(1, 4), experts=st.sampled_from([None, 2]), seed=st.integers(0, 99)
)  # fmt: skip
def test_mxfp4_value_by_value(rows: int, groups: int, experts: int | None, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    front = () if experts is None else (experts,)
    packed = torch.randint(0, 256, (*front, rows, groups * 16), generator=generator, dtype=torch.uint8)
    scale = torch.randint(100, 150, (*front, rows, groups), generator=generator, dtype=torch.uint8)
    out = dequantize(packed, "e2m1", scale, (1, 32), torch.empty(*front, rows, groups * 32))
    bytes_of, scale_of = packed.reshape(-1, groups * 16).tolist(), scale.reshape(-1, groups).tolist()
    wanted = [
        [
            E2M1[byte >> (4 * half) & 15] * 2.0 ** (scale_of[row][place // 16] - 127)
            for place, byte in enumerate(line)
            for half in (0, 1)
        ]
        for row, line in enumerate(bytes_of)
    ]
    assert out.reshape(-1, groups * 32).tolist() == wanted


GOLDEN = {
    "fp8_block-llm_compressor": "weight_scale", "fp8_block-fp8": "weight_scale_inv",
    "fpw8a16-llm_compressor": "weight_scale", "fp8_static-llm_compressor": "weight_scale",
    "mxfp8-llm_compressor": "weight_scale", "mxfp4-llm_compressor": "weight_scale",
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_checkpoints_of_another_implementation(name: str, golden_folder: Path) -> None:
    """Values by an independent formula, and close to the weights that they were made of."""
    stored: dict[str, torch.Tensor] = {}
    for file in (golden_folder / name).glob("*.safetensors"):
        stored |= load_file(file)
    source, original = open_source(golden_folder / name), open_source(golden_folder / "_source-tiny-llama")
    layers = [key.removesuffix(f".{GOLDEN[name]}") for key in stored if key.endswith(f".{GOLDEN[name]}")]
    assert len(layers) == 14 and source.dtype == torch.bfloat16
    for layer in layers:
        scale = stored[f"{layer}.{GOLDEN[name]}"]
        numbers = torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()
        if f"{layer}.weight_packed" in stored:
            packed = stored[f"{layer}.weight_packed"]
            values = torch.tensor(E2M1)[torch.stack((packed & 15, packed >> 4), -1).flatten(1).int()]
        else:
            values = stored[f"{layer}.weight"].float()
        rows, columns = values.shape
        numbers = numbers.reshape(1, 1) if numbers.numel() == 1 else numbers
        factors = numbers.repeat_interleave(-(-rows // numbers.shape[0]), 0)[:rows]
        factors = factors.repeat_interleave(-(-columns // numbers.shape[1]), 1)[:, :columns]
        found, weight = source.read(f"{layer}.weight"), original.read(f"{layer}.weight").float()
        assert torch.equal(found, (values * factors).bfloat16()), layer
        assert (found.float() - weight).norm() < (0.2 if "mxfp4" in name else 0.06) * weight.norm(), layer


def test_reading_is_in_the_wanted_dtype_with_one_rounding(
    quantized_copy: Callable[..., tuple[Path, Path]], tiny_folder: Callable[..., Path]
) -> None:
    folder, _ = quantized_copy(tiny_folder("llama"), "fp8-block", (16, 16))
    name = "model.layers.1.mlp.up_proj.weight"
    exact = open_source(folder, dtype="float32").read(name)
    assert exact.dtype == torch.float32 and not torch.equal(exact, exact.bfloat16().float())
    assert torch.equal(open_source(folder, dtype="float16").read(name), exact.half())
