"""A model on meta: nothing is allocated for weights, and buffers are real."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from auto_round.errors import ModelError
from auto_round.modeling.build import build_on_meta

# Two threads: with one the heap happens to give the same place to the next weight.
GROWTH = """
import torch
torch.set_num_threads(2)
from transformers import LlamaConfig
from auto_round.modeling.build import build_on_meta
torch.ones(1 << 20).sum()
small = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4)
build_on_meta(small, torch.bfloat16, False)
def data():
    return next(int(x.split()[1]) for x in open("/proc/self/status") if x.startswith("VmData:"))
before = data()
big = LlamaConfig(hidden_size=2048, intermediate_size=5632, num_hidden_layers=8, num_attention_heads=32)
model = build_on_meta(big, torch.bfloat16, False)
print((data() - before) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_take_no_addresses() -> None:
    """Eight such layers are 800 MB; the heap kept most of it as holes, which a limit on private memory counts."""
    done = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 60


class Odd(nn.Module):
    def __init__(self, reads: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3, 4))
        filled = torch.empty(5).fill_(2.0)
        self.register_buffer("filled", filled)
        if reads and filled.sum().item() != 10:
            raise ValueError("not filled")


@pytest.mark.parametrize("reads", [False, True])
def test_what_begins_empty_and_is_used_is_real(reads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", lambda *_, **__: Odd(reads))
    model: Any = build_on_meta(None, torch.float32, False)
    assert model.weight.is_meta and not model.training and torch.equal(model.filled, torch.full((5,), 2.0))


def test_a_model_that_cannot_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    def broken(*_: object, **__: object) -> None:
        raise KeyError("odd")

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", broken)
    with pytest.raises(ModelError, match="cannot build a model from NoneType: KeyError: 'odd'"):
        build_on_meta(None, torch.float32, False)
