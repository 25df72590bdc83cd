"""The packed linear layer on a CUDA device gives what it gives on the CPU."""

from __future__ import annotations

import pytest
import torch

from auto_round.inference.config import LayerFormat
from auto_round.inference.qlinear import QuantLinear
from auto_round.layouts.awq import pack_awq
from auto_round.layouts.gptq import pack_gptq

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", [("gptq", 0), ("gptq", 1), ("awq", 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_same_as_on_the_cpu(bits: int, kind: tuple[str, int], dtype: torch.dtype) -> None:
    layout, offset = kind
    if layout == "awq" and bits != 4:
        pytest.skip("the AWQ layout has 4 bits only")
    torch.manual_seed(0)
    codes = torch.randint(0, 1 << bits, (96, 160), dtype=torch.uint8)
    zeros = torch.randint(0, 1 << bits, (96, 5), dtype=torch.uint8)
    module = QuantLinear(160, 96, LayerFormat(bits, 32, False, layout, offset), bias=True, dtype=dtype)
    pack = pack_awq(codes, zeros) if layout == "awq" else pack_gptq(codes, zeros, bits, offset)
    module.qweight, module.qzeros, module.scales = *pack, (torch.randn(5, 96) * 0.1).half()
    weight = module.dequantize(dtype)
    module.cuda()
    assert torch.equal(module.dequantize(dtype).cpu(), weight)
    assert module.scales.dtype == torch.float16 and module.unpack()[0].is_cuda
    x = torch.randn(4, 160, dtype=dtype)
    exact = x.double() @ weight.double().T
    y = module(x.cuda())
    assert y.dtype == dtype
    assert (y.cpu().double() - exact).norm() / exact.norm() < (1e-3 if dtype == torch.float32 else 1e-2)
