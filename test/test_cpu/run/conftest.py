"""Short runs of the whole job on tiny models."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

IDS = torch.randint(3, 250, (2, 20), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def make(packable_folder: Callable[..., str], token_ids: list[torch.Tensor]) -> Callable[..., Any]:
    """`make(family or folder or model, **kwargs)`: an AutoRound with a little data."""
    from auto_round import AutoRound

    def build(model: Any, **kwargs: Any) -> Any:
        if isinstance(model, str) and "/" not in model:
            model = packable_folder(model)
        given = {"group_size": 32, "dataset": token_ids, "nsamples": 8, "seqlen": 24, "batch_size": 4, **kwargs}
        return AutoRound(model, **given)

    return build


@pytest.fixture
def logits() -> Callable[[Any], torch.Tensor]:
    """`logits(model or folder)`: of a few fixed tokens, in float32."""

    def compute(model: Any) -> torch.Tensor:
        if not isinstance(model, torch.nn.Module):
            from transformers import AutoModelForCausalLM

            model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        with torch.no_grad():
            return model(IDS).logits

    return compute


@pytest.fixture
def weights_hash() -> Callable[[Any], str]:
    """`weights_hash(folder)`: of the bytes of all weight files."""

    def compute(folder: Any) -> str:
        files = sorted(Path(folder).glob("*.safetensors"))
        assert files
        return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()

    return compute


@pytest.fixture
def read_json() -> Callable[..., dict[str, Any]]:
    return lambda *parts: json.loads(Path(*parts).read_text())
