"""Packed layers go into `torch.compile` as one graph, alone and in a loaded model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from backend_matrix import Case, build
from families import older_than
from integer_weights import int_format

from auto_round.inference.config import LayerFormat
from auto_round.schemes import QuantizationScheme as Scheme

GPTQ, AWQ = int_format(4, 32, False, "gptq_zp+-1"), int_format(4, 32, False, "awq")
# Tracing the words of 2 and 3 bits apart takes long.
MORE = [
    int_format(2, 32, False, "gptq"), int_format(3, 32, False, "gptq_zp+-1"), int_format(4, 48, False, "gptq"),
    int_format(8, -1, True, "gptq"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def check(fmt: LayerFormat, act_order: bool = False, backend: str = "eager") -> None:
    module, _ = build(Case(fmt, 96, 64, torch.float32, act_order=act_order), "cpu")
    x = torch.randn(5, 96)
    with torch.no_grad():
        assert torch.allclose(torch.compile(module, fullgraph=True, backend=backend)(x), module(x), atol=1e-5)


@pytest.mark.parametrize(("fmt", "act_order"), [(GPTQ, False), (GPTQ, True), (AWQ, False)], ids=["gptq", "act", "awq"])
def test_one_graph(fmt: LayerFormat, act_order: bool) -> None:
    check(fmt, act_order)


@pytest.mark.slow
@pytest.mark.parametrize("fmt", MORE, ids=lambda fmt: f"{fmt.scheme.bits}-{fmt.scheme.group_size}")
def test_other_layouts(fmt: LayerFormat) -> None:
    check(fmt)


@pytest.mark.slow
@pytest.mark.parametrize("fmt", [GPTQ, AWQ], ids=["gptq", "awq"])
def test_compiled_to_machine_code(fmt: LayerFormat) -> None:
    """Tens of seconds a layer, most of them in the C++ compiler."""
    check(fmt, backend="inductor")


@pytest.mark.skipif(older_than("torch", "2.13"), reason="PyTorch 2.6 cannot trace Transformers' decorators")
def test_a_loaded_model_in_one_graph(llama: Callable[..., Any], write_checkpoint: Callable[..., Any]) -> None:
    from transformers import AutoModelForCausalLM, AutoRoundConfig

    written = write_checkpoint(llama(num_hidden_layers=1), Scheme(group_size=32))
    model = AutoModelForCausalLM.from_pretrained(
        written.folder, dtype=torch.float32, quantization_config=AutoRoundConfig(backend="torch")
    )
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ids = torch.tensor([[1, 5, 9, 2, 44, 17, 3, 8]])
    with torch.no_grad():
        assert torch.allclose(compiled(input_ids=ids, use_cache=False).logits, model(ids).logits, atol=1e-5)
