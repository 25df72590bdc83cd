"""Our inputs beside those of programs that run the files: where they are the same, and where not and by what."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from auto_round.codecs.activation import ActivationQuantizer
from auto_round.codecs.block_float import global_scale_of
from auto_round.schemes import PRESET_SCHEMES

FILE = Path(__file__).resolve().parents[3] / "test" / "referees" / "compressed_tensors" / "inputs.py"
HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def theirs() -> ModuleType:
    """The rules of compressed-tensors; its own environment judges that they are."""
    spec = importlib.util.spec_from_file_location("compressed_tensors_inputs", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def examples(dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(4)) * 3
    x[1] *= 1e-4
    x[2] = 0
    x[3, ::100] = 50
    return x.to(dtype)


def ours(preset: str, x: torch.Tensor, above: torch.Tensor | None = None) -> torch.Tensor:
    scheme = PRESET_SCHEMES[preset].activations
    assert scheme is not None
    return ActivationQuantizer(scheme, global_scale=above)(x)


def on_the_gpu(x: torch.Tensor, above: torch.Tensor) -> torch.Tensor:
    """NVFP4 as vLLM's kernels and its reference compute it: scales in float32, zeros under a scale of zero."""
    groups = x.float().unflatten(-1, (-1, 16))
    scale = (above * (groups.abs().amax(-1, keepdim=True) * (1 / 6))).clamp(max=448).to(torch.float8_e4m3fn).float()
    ratio = torch.where(scale == 0, 0.0, groups * (above / scale)).clamp(-6, 6)
    step = torch.exp2(torch.floor(torch.log2(ratio.abs().clamp(min=1.0))) - 1)
    return (torch.round(ratio / step) * step * (scale / above)).flatten(-2).to(x.dtype)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_mxfp8_rounded_up_is_the_same(theirs: ModuleType, dtype: torch.dtype) -> None:
    """NVIDIA's rule takes the next power from just above 1.75 times one on, compressed-tensors from there on; a largest
    value of exactly that is an e4m3 either way, and so are the others unless they are subnormal."""
    x = examples(dtype)
    exact = torch.frexp(x.float().unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True))[0] * 2 == 1.75
    differs = (ours("MXFP8_RCEIL", x) != theirs.microscaling(x, 8)).unflatten(-1, (-1, 32))
    assert not bool((differs & ~exact).any())
    assert float(differs.float().mean()) < 1e-3


@pytest.mark.parametrize(("preset", "bits"), [("MXFP4", 4), ("MXFP8", 8)])
def test_the_floor_rule_differs_above_seven_quarters_alone(theirs: ModuleType, preset: str, bits: int) -> None:
    x = examples(torch.bfloat16)
    above = torch.frexp(x.float().unflatten(-1, (-1, 32)).abs().amax(-1))[0] * 2 >= 1.75
    differs = (ours(preset, x) != theirs.microscaling(x, bits)).unflatten(-1, (-1, 32)).any(-1)
    assert bool(differs[above].any()) and not bool(differs[~above].any())


def test_mxfp4_rounded_up_differs_between_six_and_seven_quarters(theirs: ModuleType) -> None:
    x = examples(torch.bfloat16)
    mantissa = torch.frexp(x.float().unflatten(-1, (-1, 32)).abs().amax(-1))[0] * 2
    differs = (ours("MXFP4_RCEIL", x) != theirs.microscaling(x, 4)).unflatten(-1, (-1, 32)).any(-1)
    between = (mantissa > 1.5) & (mantissa < 1.75)
    assert bool(differs[between].any()) and not bool(differs[~between].any())


def test_nvfp4_differs_by_the_dtype_of_a_division_alone(theirs: ModuleType) -> None:
    """In float32 the same but for divisions by six whose last bit decides; in bfloat16 one scale in fifty or fewer."""
    above = global_scale_of(torch.tensor(60.0))
    for dtype, limit in ((torch.float32, 1e-3), (torch.float16, 5e-3), (torch.bfloat16, 3e-2)):
        x = examples(dtype)
        mine, other = ours("NVFP4", x, above), theirs.nvfp4(x, above)
        differs = (mine != other).unflatten(-1, (-1, 16)).any(-1)
        assert float(differs.float().mean()) < limit
        assert float((mine.float() - other.float()).norm() / mine.float().norm()) < 0.03


@pytest.mark.parametrize("dtype", HALF)
def test_nvfp4_is_what_kernels_compute(dtype: torch.dtype) -> None:
    x = examples(dtype)
    for largest in (60.0, 1.0, 3e6):  # some is cut; the scales of most groups round to zero
        above = global_scale_of(torch.tensor(largest))
        mine, other = ours("NVFP4", x, above), on_the_gpu(x, above)
        assert float((mine != other).float().mean()) < 1e-3  # ties, which the order of two divisions decides
        assert float((mine.float() - other.float()).norm()) <= 0.01 * float(other.float().norm())


def test_groups_too_small_for_a_scale_become_zeros(theirs: ModuleType) -> None:
    above = global_scale_of(torch.tensor(2688.0))  # 1: a scale is a sixth of the group's largest
    x = torch.zeros(1, 48)
    x[0, 3], x[0, 20], x[0, 40] = 6 * 2.0**-10, -6 * 2.0**-9, 6.0  # halfway to the smallest scale, the smallest, 1
    found = ours("NVFP4", x, above)
    assert torch.equal(found, theirs.nvfp4(x, above))
    assert found.nonzero().tolist() == [[0, 20], [0, 40]] and found[0, 20] == -6 * 2.0**-9
