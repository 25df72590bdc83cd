"""`inputs.py` beside against the library itself: values to the last bit, and the logits of our checkpoints.

Runs in the referee's environment, on checkpoints that the first command writes (below .referees, or below --root, which
then is AR_REFEREES for the second one):

    python tools/referees.py --programs compressed_tensors --twins
    .referees/compressed_tensors/bin/python -m pytest --noconftest test/referees/compressed_tensors
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent))

from inputs import logits, quantize  # noqa: E402

WORK = Path(os.environ.get("AR_REFEREES", Path(__file__).resolve().parents[3] / ".referees")) / "work" / "tiny"
HOW = "not there; `python tools/referees.py --programs compressed_tensors --twins` writes it"
MX = {"type": "float", "strategy": "group", "group_size": 32, "symmetric": True, "dynamic": True}
TYPES = {
    "MXFP4": {**MX, "num_bits": 4, "scale_dtype": "torch.uint8"},
    "MXFP8": {**MX, "num_bits": 8, "scale_dtype": "torch.uint8"},
    "NVFP4": {
        **MX, "num_bits": 4, "strategy": "tensor_group", "group_size": 16, "dynamic": "local",
        "scale_dtype": "torch.float8_e4m3fn",
    },
}  # fmt: skip


def examples(dtype: torch.dtype) -> torch.Tensor:
    """[3, 40, 64]: ordinary groups, zeros, groups of all sizes, and largest values around 1.75 times a power of two."""
    x = torch.randn(3, 40, 64, generator=torch.Generator().manual_seed(1)) * 2
    x[0, 1] = 0
    x[1] *= torch.exp2(torch.arange(-20, 20).float() / 2).view(-1, 1)
    x[2, :10] = x[2, :10].clamp(-1.5, 1.5)
    for row, top in enumerate((1.75, 1.7422, 1.7578, 3.5, 28.0, 448.0, 6.0, 7.0, 2.0, 1.0)):
        x[2, row, ::16] = top * (1 if row % 2 else -1)
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", TYPES)
def test_values(name: str, dtype: torch.dtype) -> None:
    x, args = examples(dtype), QuantizationArgs(**TYPES[name])
    above = torch.tensor([448 * 6 / 60.0]) if name == "NVFP4" else None
    scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Identity(), above)
    theirs = fake_quantize(x, scale, zero, args, above)
    assert torch.equal(quantize(x, TYPES[name], above), theirs)


@pytest.mark.parametrize(("scheme", "weights"), [
    ("MXFP4", "MXFP4"), ("MXFP4_RCEIL", "MXFP4"), ("MXFP8", "MXFP8"), ("MXFP8_RCEIL", "MXFP8"), ("NVFP4", "NVFP4"),
])  # fmt: skip
def test_logits(scheme: str, weights: str) -> None:
    folder, dense = WORK / f"{scheme}-llm_compressor", WORK / f"{weights},_weights_alone-fake-float32"
    missing = [str(path) for path in (folder, dense) if not path.is_dir()]
    assert not missing, f"{', '.join(missing)}: {HOW}"
    ids = torch.randint(0, 250, (2, 48), generator=torch.Generator().manual_seed(2))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        theirs = model(ids).logits.float()
    ours = logits(folder, dense, ids, torch.bfloat16)
    assert float((theirs - ours).norm() / theirs.norm()) < 1e-3
