"""GPTQModel's modules as kernels. Its CPU kernels run in the shared matrix as well, where the package is installed."""

from __future__ import annotations

import pytest
import torch
from integer_weights import int_format

from auto_round.errors import UnsupportedError
from auto_round.inference.kernels import IntegerWeight, LayerSpec, LinearKernel, kernel_class, vendor
from auto_round.inference.table import BACKENDS, choose_backend, requested_rows, unmet_requirement

ROWS = [b for b in BACKENDS if b.kernel and b.requirements == ("gptqmodel>=7.0.0",)]
here = pytest.mark.skipif(unmet_requirement("gptqmodel>=7.0.0") is not None, reason="needs gptqmodel 7 or newer")


def spec(bits: int = 4, size: int = 64, sym: bool = True, device: str = "cpu", inputs: int = 256) -> LayerSpec:
    return LayerSpec(bits, size, sym, inputs, 128, torch.bfloat16, device)


def test_the_table_names_kernels_that_are_here() -> None:
    assert len(ROWS) == 9
    for row in ROWS:
        kind = kernel_class(row.kernel)
        assert issubclass(kind, LinearKernel)
        assert kind.unsupported_reason(spec(inputs=250)) == "needs groups of one size: 250 inputs are no multiple of 64"


def test_they_are_never_the_automatic_choice_on_a_cpu() -> None:
    for packing in ("gptq_zp+-1", "gptq", "awq"):
        choice = choose_backend(int_format(4, 64, True, packing), "cpu", "auto", spec())
        assert not choice.backend.name.startswith("gptqmodel") and not any(b in choice.missing for b in ROWS)


def test_without_the_package() -> None:
    if unmet_requirement("gptqmodel>=7.0.0") is None:
        pytest.skip("gptqmodel is installed")
    with pytest.raises(UnsupportedError, match="pip install 'gptqmodel>=7.0.0', or use backend='auto'"):
        choose_backend(int_format(4, 64, True, "gptq"), "cuda", "marlin", None)
    assert [b.name for b in requested_rows("exllamav2")] == ["gptqmodel:exllamav2", "gptq:exllamav2"]


@here
def test_kernels_for_another_machine_say_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("a CUDA machine")
    for row in ROWS:
        if row.devices == ("cuda",):
            reason = kernel_class(row.kernel).unsupported_reason(spec(device="cuda"))
            assert reason is not None and reason.startswith("GPTQModel says: ") and "CUDA" in reason, row.name


@here
def test_what_the_values_forbid() -> None:
    zeros = torch.full((128, 4), 8, dtype=torch.uint8)
    zeros[3, 1] = 7
    weight = IntegerWeight(torch.zeros(128, 256, dtype=torch.uint8), torch.ones(128, 4).half(), zeros, spec())
    with pytest.raises(UnsupportedError, match="says symmetric, but some zero points are not"):
        vendor.Torch(weight)


@here
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_one_scale_a_row(bits: int) -> None:
    gen = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 1 << bits, (128, 768), generator=gen, dtype=torch.uint8)
    zeros = torch.randint(0, 1 << bits, (128, 1), generator=gen, dtype=torch.uint8)
    scales = (torch.rand(128, 1, generator=gen) + 0.1).half()
    sizes = spec(bits, 768, False, inputs=768)
    assert vendor.Torch.unsupported_reason(sizes) is None
    kernel = vendor.Torch(IntegerWeight(codes, scales, zeros, sizes)).train()
    x = torch.randn(3, 2, 768, generator=gen)
    want = x.double() @ (scales.double() * (codes.double() - zeros.double())).T
    y = kernel(x)
    assert y.dtype == torch.float32 and float((y.double() - want).norm() / want.norm()) < 2 * 2.0**-8
    assert torch.equal(kernel.codes(), codes)
