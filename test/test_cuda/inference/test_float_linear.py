"""Layers of the small float types on a CUDA device give what they give on the CPU."""

from __future__ import annotations

import pytest
import torch

from auto_round.algorithms.base import LayerTask
from auto_round.algorithms.quantization.rtn.quantizer import quantize_layer
from auto_round.codecs.activation import ActivationQuantizer
from auto_round.formats.base import ExportPlan, get_format
from auto_round.inference.config import read_config
from auto_round.inference.convert_model import build_layer
from auto_round.inference.linear import PackedLinear, ScaledMmLinear
from auto_round.inference.table import SCALED_MM, choose_backend
from auto_round.schemes import PRESET_SCHEMES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
NAME = "model.layers.0.l"


def filled(preset: str, backend: str = "") -> PackedLinear:
    scheme, fmt = PRESET_SCHEMES[preset], get_format("auto_round")
    step = None
    if scheme.activations is not None:
        fixed = None if scheme.activations.dynamic else torch.tensor(0.0098)
        above = torch.tensor(600.0) if "static_gs" in scheme.activations.data_type else None
        step = ActivationQuantizer(scheme.activations, fixed, None, above)
    weight = torch.randn(160, 256, generator=torch.Generator().manual_seed(1))
    layer = quantize_layer(
        LayerTask(NAME, torch.nn.Linear(1, 1), weight, scheme, activation=step), False, torch.float16
    )
    read = read_config(fmt.config(ExportPlan(scheme, {NAME: scheme}, ("model.layers.0",)))).default
    tensors = {k.rpartition(".")[2]: v for k, v in fmt.pack(layer, model_dtype=torch.float32).items()}
    stored = {leaf: tensor.dtype for leaf, tensor in tensors.items()}
    module = build_layer(read, torch.empty(160, 256), False, stored, False, backend)
    assert isinstance(module, PackedLinear)
    module.load_state_dict(tensors)
    return module


@pytest.mark.parametrize(
    "preset", ["MXFP4", "MXFP4_RCEIL", "MXFP8", "MXINT4", "NVFP4", "FPW8A16", "FP8_STATIC", "FP8_BLOCK"]
)
def test_same_as_on_the_cpu(preset: str) -> None:
    module = filled(preset)
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(2))
    weight, expected = module.dequantize(), module(x)
    step = module.activation
    inputs = x if step is None else step(x)
    module.cuda()
    assert torch.equal(module.dequantize().cpu(), weight)
    moved = module.activation
    assert moved is None or torch.equal(moved(x.cuda()).cpu(), inputs)
    assert (module(x.cuda()).cpu() - expected).norm() / expected.norm() < 1e-3


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs FP8 in hardware"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_hardwares_product(dtype: torch.dtype) -> None:
    module = filled("FP8_STATIC", SCALED_MM).cuda()
    assert isinstance(module, ScaledMmLinear)
    assert choose_backend(module.format, "cuda").backend.name == SCALED_MM
    x = torch.randn(3, 5, 256, generator=torch.Generator().manual_seed(3)).to("cuda", dtype)
    fast, plain = module(x), PackedLinear.forward(module, x)
    assert fast.dtype == dtype and fast.shape == plain.shape
    assert (fast.float() - plain.float()).norm() / plain.float().norm() < (1e-3 if dtype == torch.float32 else 1e-2)
