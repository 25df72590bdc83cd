"""A whole model through each back end of CPUs: the loader's choice, logits, generation, and the same files again."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from auto_round.inference.linear import QuantLinear
from auto_round.schemes import QuantizationScheme as Scheme

IDS = torch.tensor([[1, 5, 9, 2, 44, 17, 3, 8], [7, 7, 1, 0, 60, 31, 12, 2]])
ARK = pytest.param("ark", marks=pytest.mark.skipif(
    importlib.util.find_spec("auto_round_kernel") is None, reason="needs auto-round-lib"))  # fmt: skip
SCHEMES = [Scheme(bits=bits, sym=sym, group_size=32) for bits, sym in ((4, True), (4, False), (2, True))]


def open_model(folder: Any, dtype: torch.dtype, backend: str) -> Any:
    from transformers import AutoModelForCausalLM, AutoRoundConfig

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=AutoRoundConfig(backend=backend)
    ).eval()


def kernels(model: Any) -> set[str]:
    return {type(m.kernel).__name__ for m in model.modules() if isinstance(m, QuantLinear)}


def same_logits(model: Any, fake: Any, most: float) -> None:
    with torch.no_grad():
        got, want = model(IDS).logits.double(), fake(IDS).logits.double()
    assert float((got - want).norm() / want.norm()) < most


@pytest.mark.parametrize("scheme", SCHEMES, ids=["sym", "asym", "2-bits"])
@pytest.mark.parametrize(
    "backend, kernel", [("auto", "CpuKernel"), ("auto_round:cpu", "CpuKernel"), ("torch", "NoneType")]
)
def test_a_model_runs_saves_and_generates(
    llama: Callable[..., Any], write_checkpoint: Callable[..., Any], tmp_path: Any, backend: str, kernel: str,
    scheme: Scheme,
) -> None:  # fmt: skip
    written = write_checkpoint(llama(), scheme)
    model = open_model(written.folder, torch.float32, backend)
    assert kernels(model) == {kernel}
    same_logits(model, written.fake, 1e-5)
    told = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        assert torch.equal(model.generate(IDS[:1], **told), written.fake.generate(IDS[:1], **told))
    model.save_pretrained(tmp_path / "again")
    want, got = (load_file(folder / "model.safetensors") for folder in (written.folder, tmp_path / "again"))
    assert set(want) == set(got)
    assert all(torch.equal(want[key], got[key]) and want[key].dtype == got[key].dtype for key in want)
    # the codes lie in one place
    owned = sum(m.qweight is not None for m in model.modules() if isinstance(m, QuantLinear))
    assert owned == (0 if kernel == "CpuKernel" else len(written.layers))


@pytest.mark.parametrize("backend", [ARK])
@pytest.mark.parametrize("scheme", SCHEMES, ids=["sym", "asym", "2-bits"])
def test_ark_runs_a_model(
    llama: Callable[..., Any], write_checkpoint: Callable[..., Any], tmp_path: Any, backend: str, scheme: Scheme
) -> None:
    written = write_checkpoint(llama(), scheme)
    model = open_model(written.folder, torch.float32, backend)
    assert kernels(model) == {"ArkKernel"}
    same_logits(model, written.fake, 1e-5)
    model.save_pretrained(tmp_path / "again")
    want, got = (load_file(folder / "model.safetensors") for folder in (written.folder, tmp_path / "again"))
    assert set(want) == set(got) and all(torch.equal(want[key], got[key]) for key in want)


@pytest.mark.parametrize("backend, kernel", [("auto", "CpuKernel"), ("auto_round:cpu_int4", "CpuInt4")])
def test_in_bfloat16(
    llama: Callable[..., Any], write_checkpoint: Callable[..., Any], backend: str, kernel: str
) -> None:
    written = write_checkpoint(llama(torch.bfloat16), Scheme(bits=4, sym=True, group_size=32))
    model = open_model(written.folder, torch.bfloat16, backend)
    assert kernels(model) == {kernel}
    exact = open_model(written.folder, torch.float32, "torch")
    same_logits(model, exact, 1.5e-2)


def test_it_compiles_whole(llama: Callable[..., Any], write_checkpoint: Callable[..., Any]) -> None:
    written = write_checkpoint(llama(), SCHEMES[0])
    model = open_model(written.folder, torch.float32, "auto")
    layer = model.model.layers[0].mlp
    x = torch.randn(1, 3, 64)
    with torch.no_grad():
        compiled: Any = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(x), layer(x), rtol=1e-6)
