"""The main job on a GPU: it tunes, saves, verifies, and two runs give the same bytes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def quantize(folder: Path, out: Path, **kwargs: Any) -> dict[str, Any]:
    from auto_round import AutoRound

    ids = [torch.randint(3, 128, (64,), generator=torch.Generator().manual_seed(i)) for i in range(8)]
    settings = dict(bits=2, group_size=32, iters=20, nsamples=8, seqlen=64, dataset=ids, device_map="cuda:0") | kwargs
    AutoRound(str(folder), None, **settings).quantize_and_save(out)  # type: ignore[arg-type]
    return json.loads((out / "report.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)  # rounding a model this small changes nothing measurable otherwise
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("low_gpu_mem_usage", [True, False])
def test_tuning_improves_the_block_and_the_file_is_verified(
    folder: Path, tmp_path: Path, sym: bool, low_gpu_mem_usage: bool
) -> None:
    report = quantize(folder, tmp_path / "out", sym=sym, low_gpu_mem_usage=low_gpu_mem_usage)
    assert report["verify"]["passed"]
    assert all(b["loss_after"] <= b["loss_before"] for b in report["blocks"])
    assert report["blocks"][0]["loss_after"] < report["blocks"][0]["loss_before"]
    assert report["peak_vram_bytes"] > 0


@pytest.mark.parametrize("compile_step", [False, True])
def test_two_runs_give_the_same_bytes(folder: Path, tmp_path: Path, compile_step: bool) -> None:
    digests = set()
    for run in range(2):
        out = tmp_path / str(run)
        quantize(folder, out, enable_torch_compile=compile_step, enable_deterministic_algorithms=True)
        digests.add(hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest())
    assert len(digests) == 1


def test_plain_rounding_equals_the_cpu(folder: Path, tmp_path: Path) -> None:
    digests = set()
    for device in ("cpu", "cuda:0"):
        out = tmp_path / device.replace(":", "")
        quantize(folder, out, iters=0, disable_opt_rtn=True, device_map=device)
        digests.add(hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest())
    assert len(digests) == 1
