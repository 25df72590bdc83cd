"""The packed linear layer on a CUDA device gives what it gives on the CPU."""

from __future__ import annotations

import pytest
import torch
from integer_weights import arrays, int_format, pack_codes

from auto_round.inference.linear import QuantLinear

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("packing", ["gptq", "gptq_zp+-1", "awq"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_same_as_on_the_cpu(bits: int, packing: str, dtype: torch.dtype) -> None:
    if packing == "awq" and bits != 4:
        pytest.skip("the AWQ layout has 4 bits only")
    torch.manual_seed(0)
    codes = torch.randint(0, 1 << bits, (96, 160), dtype=torch.uint8)
    zeros = torch.randint(0, 1 << bits, (96, 5), dtype=torch.uint8)
    fmt = int_format(bits, 32, False, packing)
    module = QuantLinear(160, 96, fmt, bias=True, dtype=dtype)
    module.qweight, module.qzeros = pack_codes(fmt, codes, zeros)
    module.scales = (torch.randn(5, 96) * 0.1).half()
    weight = module.dequantize(dtype)
    module.cuda()
    assert torch.equal(module.dequantize(dtype).cpu(), weight)
    assert module.scales.dtype == torch.float16 and arrays(module)[0].is_cuda
    x = torch.randn(4, 160, dtype=dtype)
    exact = x.double() @ weight.double().T
    y = module(x.cuda())
    assert y.dtype == dtype
    assert (y.cpu().double() - exact).norm() / exact.norm() < (1e-3 if dtype == torch.float32 else 1e-2)
