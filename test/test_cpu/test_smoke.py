"""One whole run of each kind on a tiny model, for `make smoke`: rounding, tuning, model-free, GGUF, resuming, CLI."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

from auto_round import AutoRound
from auto_round.cli import main
from auto_round.run import blocks

Stop = Callable[..., AbstractContextManager[None]]


def save(model: str, out: Path, data: Any, formats: str = "auto_round", **options: Any) -> Any:
    options = {"dataset": data, "nsamples": 8, "seqlen": 24, "group_size": 32, "device_map": "cpu", **options}
    _, folders = AutoRound(model, **options).quantize_and_save(out, format=formats)
    return Path(folders) if isinstance(folders, str) else [Path(folder) for folder in folders]


def logits(folder: Path | str) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.arange(3, 30).view(1, -1)).logits


def test_rounded_and_tuned_models_open(packable_folder: Any, tmp_path: Path, token_ids: Any) -> None:
    model = packable_folder("llama")
    reference = logits(model)
    for name, options in {"rtn": {"iters": 0}, "tuned": {"iters": 2}}.items():
        packed, dense = map(logits, save(model, tmp_path / name, token_ids, "auto_round,fake", **options))
        assert torch.allclose(packed, dense, atol=1e-4)
        assert 0 < (packed - reference).norm() < 0.5 * reference.norm()


def test_model_free_writes_what_rounding_writes(packable_folder: Any, tmp_path: Path, token_ids: Any) -> None:
    model, plain = packable_folder("llama"), {"iters": 0, "disable_opt_rtn": True}
    regular = save(model, tmp_path / "regular", token_ids, **plain)
    free = save(model, tmp_path / "free", token_ids, model_free=True, **plain)
    assert torch.equal(logits(free), logits(regular))


def test_a_gguf_file_opens(gguf_folder: Any, tmp_path: Path, token_ids: Any) -> None:
    gguf = pytest.importorskip("gguf")
    options = {"scheme": "GGUF:Q4_K_M", "iters": 0, "group_size": None}
    out = save(gguf_folder("llama"), tmp_path / "out", token_ids, "gguf:q4_k_m", **options)
    (file,) = out.glob("*.gguf")
    assert {"Q4_K", "Q6_K"} <= {tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}


def test_a_resumed_run_gives_the_same_bytes(
    packable_folder: Any, tmp_path: Path, token_ids: Any, stop_at: Stop
) -> None:
    model = packable_folder("llama")
    whole = save(model, tmp_path / "whole", token_ids, iters=2)
    with stop_at(blocks, "_quantize_block", call=2), pytest.raises(KeyboardInterrupt):
        save(model, tmp_path / "halves", token_ids, iters=2)
    halves = save(model, tmp_path / "halves", token_ids, iters=2)
    name = "model.safetensors"
    assert (halves / name).read_bytes() == (whole / name).read_bytes()


def test_the_command_line(packable_folder: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = packable_folder("llama"), str(tmp_path / "out")
    flags = ["--iters", "0", "--disable_opt_rtn", "--group_size", "32", "--device", "cpu", "--output_dir", out]
    assert main.run([model, *flags, "--dry_run"]) == 0
    assert "14  int4 g32 sym" in capsys.readouterr().out and not os.path.exists(out)
    assert main.run([model, *flags]) == 0
    assert main.run(["verify", out]) == 0
    assert main.run(["list", "format"]) == 0
    assert main.run([model, "--scheme", "W4A17"]) == 2
    assert "did you mean" in capsys.readouterr().err
