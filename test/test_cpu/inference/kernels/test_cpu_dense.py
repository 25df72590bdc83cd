"""Products with weights in half precision against float64, and the layers of a model that they are for."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from auto_round.inference.kernels import cpu as cpu_dense
from auto_round.inference.kernels.cpu import ROWS, DenseLinear, dense_product, use_dense_linear
from auto_round.schemes import QuantizationScheme as Scheme

HALVES = [torch.bfloat16, torch.float16]
EPS = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
IDS = torch.tensor([[1, 5, 9, 2, 44, 17, 3, 8]])


def pair(out: int, width: int, rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(out + width)
    weight = torch.randn(out, width, generator=generator).to(dtype)
    return weight, torch.randn(rows, width, generator=generator).to(dtype)


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 7, ROWS, ROWS + 1, 100])
@pytest.mark.parametrize("out, width", [(1, 1), (3, 31), (40, 32), (33, 70), (65, 513), (9000, 600)])
@pytest.mark.parametrize("dtype", HALVES)
def test_every_size_against_float64(dtype: torch.dtype, out: int, width: int, rows: int) -> None:
    weight, x = pair(out, width, rows, dtype)
    y = dense_product(weight, x)
    exact, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    assert y.shape == (rows, out) and y.dtype == dtype
    far = (y.double() - exact).abs()
    assert bool((far <= EPS[dtype] * exact.abs() + width * 2.0**-23 * size + 2.0**-25).all())


@pytest.mark.parametrize("dtype", HALVES)
def test_rows_and_threads_do_not_matter(dtype: torch.dtype) -> None:
    weight, x = pair(700, 300, ROWS, dtype)
    whole = dense_product(weight, x)
    assert all(torch.equal(dense_product(weight, x[i : i + 1]), whole[i : i + 1]) for i in range(ROWS))
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(dense_product(weight, x), whole)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", HALVES)
def test_tensors_that_are_not_in_a_row(dtype: torch.dtype) -> None:
    weight, x = pair(48, 64, 12, dtype)
    want = dense_product(weight, x)
    assert torch.equal(dense_product(weight, x.view(3, 4, 64)), want.view(3, 4, 48))
    assert torch.equal(dense_product(weight.T.contiguous().T, x.T.contiguous().T), want)
    wide = torch.zeros(12, 100, dtype=dtype)
    wide[:, 20:84] = x
    assert torch.equal(dense_product(weight, wide[:, 20:84]), want)


@pytest.mark.parametrize("dtype", HALVES)
def test_numbers_that_are_none(dtype: torch.dtype) -> None:
    weight, x = pair(50, 70, 2, dtype)
    x[0, 3], weight[7, 69] = float("nan"), float("inf")
    y = dense_product(weight, x)
    assert y[0].isnan().all() and y[1, 7].isinf() and y[1, :7].isfinite().all() and y[1, 8:].isfinite().all()


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without instructions for bfloat16, whichever this is."""
    monkeypatch.setattr(cpu_dense, "cpu_multiplies", lambda dtype: False)


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(64, 90, bias=bias)
    model = nn.Sequential(plain.bfloat16(), nn.Linear(90, 20)).eval()
    use_dense_linear(model)
    assert type(model[0]) is DenseLinear and type(model[1]) is nn.Linear  # float32 is fast
    layer = model[0]
    assert layer.weight is plain.weight and layer.bias is plain.bias and not layer.training
    x = torch.randn(5, 64).bfloat16()
    want = plain.double()(x.double())
    plain.bfloat16()
    with torch.no_grad():
        assert float((layer(x).double() - want).abs().max()) < 2.0**-7 * float(want.abs().max())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            compiled: Any = torch.compile(layer, fullgraph=True, backend="aot_eager")
            assert torch.equal(compiled(x), layer(x))
        assert torch.equal(layer.float()(x.float()), plain.float()(x.float()))
    layer.bfloat16()
    layer(x.requires_grad_()).sum().backward()
    assert x.grad is not None and layer.weight.grad is not None
    called: list[int] = []
    monkeypatch.setattr("auto_round.inference.kernels.cpu.dense_product", lambda *_: called.append(1))
    layer(x)
    assert not called


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("tied", [True, False])
def test_the_head_of_a_model(
    tied: bool, llama: Callable[..., Any], write_checkpoint: Callable[..., Any], tmp_path: Any
) -> None:
    from transformers import AutoModelForCausalLM, AutoRoundConfig

    written = write_checkpoint(llama(torch.bfloat16, tie_word_embeddings=tied), Scheme(group_size=32))
    model, plain = (
        AutoModelForCausalLM.from_pretrained(
            written.folder, dtype=torch.bfloat16, quantization_config=AutoRoundConfig(backend=backend)
        ).eval()
        for backend in ("auto", "torch")
    )
    assert type(model.lm_head) is DenseLinear and type(plain.lm_head) is nn.Linear
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    with torch.no_grad():
        got, want = model(IDS).logits.double(), plain(IDS).logits.double()
    assert float((got - want).norm() / want.norm()) < 1.5e-2
    model.save_pretrained(tmp_path / "again")
    one, other = (load_file(folder / "model.safetensors") for folder in (written.folder, tmp_path / "again"))
    assert set(one) == set(other) and all(torch.equal(one[key], other[key]) for key in one)
