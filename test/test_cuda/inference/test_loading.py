"""Loading onto a CUDA device: the kernels that are installed, and a model that is moved away and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from auto_round import AutoRound
from auto_round.inference.linear import QuantLinear
from auto_round.inference.table import unmet_requirement

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
IDS = torch.tensor([[1, 5, 9, 2, 44, 17, 3, 8]])


@pytest.fixture(scope="module")
def folder(packable_folder: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    out = str(tmp_path_factory.mktemp("w4") / "out")
    source = packable_folder("llama", hidden_size=256, intermediate_size=512, num_attention_heads=4)
    ar = AutoRound(source, scheme="W4A16", group_size=128, iters=0, disable_opt_rtn=True, device_map="cpu")
    ar.quantize_and_save(out)
    return out


def load(folder: str, backend: str, device: str = "cuda") -> Any:
    from transformers import AutoModelForCausalLM, AutoRoundConfig

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float16, device_map=device, quantization_config=AutoRoundConfig(backend=backend)
    )


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS.to(model.device)).logits.double().cpu()


@pytest.mark.parametrize(("name", "package"), [
    ("torch", "torch"), ("auto", "torch"), ("triton", "triton"), ("marlin", "gptqmodel>=7.0.0"),
    ("exllamav2", "gptqmodel>=7.0.0"),
])  # fmt: skip
def test_backends_agree(name: str, package: str, folder: str, tmp_path: Path) -> None:
    missing_requirement = unmet_requirement(package)
    if missing_requirement is not None:
        pytest.skip(missing_requirement)
    model, want = load(folder, name), logits(load(folder, "torch", "cpu").float())
    if name not in ("torch", "auto"):
        assert any(isinstance(m, QuantLinear) and m.kernel is not None for m in model.modules())
    got = logits(model)
    assert float((got - want).norm() / want.norm()) < 2e-2
    model.save_pretrained(tmp_path / "again")
    assert torch.allclose(logits(load(str(tmp_path / "again"), name)), got, atol=1e-3)


def test_moving_warns_and_keeps_the_numbers(folder: str, caplog: pytest.LogCaptureFixture) -> None:
    model = load(folder, "auto")
    want = logits(model)
    model.to("cpu")
    assert "loaded for cuda and moved to cpu" in caplog.text
    assert not any(isinstance(m, QuantLinear) and m.kernel is not None for m in model.modules())
    got = logits(model.float())
    assert float((got - want).norm() / want.norm()) < 2e-2
    assert torch.allclose(logits(model.half().to("cuda")), want, atol=1e-2)
