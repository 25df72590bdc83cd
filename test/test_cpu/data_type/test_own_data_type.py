"""A data type in a user's own file, as the guide to adding data types describes it, from registering to saving."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from auto_round import PRESET_SCHEMES, AutoRound, QuantizationScheme
from auto_round.data_type import QUANT_FUNC_WITH_DTYPE, get_quant_func, register_dtype
from auto_round.errors import ConfigError, UnsupportedError

# The steps of the guide, with the "quantization logic here" filled in.
FILE = """
import torch
from auto_round.codecs.registry import register_dtype
from auto_round.codecs.registry import reshape_pad_tensor_by_group_size, revert_tensor_by_pad


@register_dtype(["your_dtype", "your_dtype_v2"])
def quant_tensor_your_dtype(
    tensor, bits=4, group_size=128, v=0, min_scale=0, max_scale=0, scale_dtype=torch.float16, q_scale_thresh=0,
    weight_fp8_max_scale=0, imatrix=None, **kwargs
):
    calls.append(kwargs.get("data_type"))
    # 1. Apply perturbation
    tensor = tensor + v
    # 2. Reshape by group_size
    orig_shape = tensor.shape
    tensor, orig_out_features = reshape_pad_tensor_by_group_size(tensor, group_size)
    # 3. Compute scale and zero-point
    zp = 2 ** (bits - 1)
    scale = (tensor.abs().amax(-1, keepdim=True) * max_scale / (zp - 1)).clamp(min=1e-5)
    # 4. Quantize and dequantize (Straight-Through Estimator for gradients)
    from auto_round.codecs.registry import round_ste

    tensor_q = (round_ste(tensor / scale) + zp).clamp(0, 2 * zp - 1)
    qdq_tensor = (tensor_q - zp) * scale
    # 5. Revert padding
    qdq_tensor = revert_tensor_by_pad(qdq_tensor, orig_out_features, orig_shape)
    return qdq_tensor, scale, zp


calls = []
"""


@pytest.fixture
def your_dtype(tmp_path: Path) -> Iterator[Any]:
    importlib.import_module("auto_round.formats.no_config")  # lists the schemes there are when it is first imported
    path = tmp_path / "your_dtype.py"
    path.write_text(FILE)
    spec = importlib.util.spec_from_file_location("your_dtype", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["your_dtype"] = module
    spec.loader.exec_module(module)
    PRESET_SCHEMES["YOUR_SCHEME"] = QuantizationScheme(bits=4, group_size=32, sym=True, data_type="your_dtype")
    yield module
    for name in ("your_dtype", "your_dtype_v2"):
        del QUANT_FUNC_WITH_DTYPE[name]
    del PRESET_SCHEMES["YOUR_SCHEME"], sys.modules["your_dtype"]


def test_your_dtype_quantization(your_dtype: Any, tiny_opt_model_path: str, dataloader: Any) -> None:
    ar = AutoRound(
        tiny_opt_model_path, bits=4, group_size=128, data_type="your_dtype", dataset=dataloader, iters=2, nsamples=2
    )
    compressed_model, layers = ar.quantize()
    assert set(your_dtype.calls) == {"your_dtype"}
    assert {entry["data_type"] for entry in layers.values() if entry["bits"] == 4} == {"your_dtype"}
    with torch.no_grad():
        logits = compressed_model(torch.arange(3, 20).view(1, -1)).logits
    assert bool(torch.isfinite(logits).all())
    weight = compressed_model.get_submodule("model.decoder.layers.0.fc1").weight
    assert all(len(row.unique()) <= 16 for row in weight)  # group_size 128 is more than the row: 16 levels a row


def test_its_preset_saves_as_fake_and_reopens(
    your_dtype: Any, tiny_opt_model_path: str, dataloader: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    ar = AutoRound(tiny_opt_model_path, scheme="YOUR_SCHEME", dataset=dataloader, iters=2, nsamples=2)
    model, _ = ar.quantize()
    ar.save_quantized(tmp_path / "out", format="fake")
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(3, 20).view(1, -1)
    with torch.no_grad():
        assert torch.equal(reopened(ids).logits, model(ids).logits)


def test_a_format_that_cannot_hold_it_names_one_that_can(
    your_dtype: Any, tiny_opt_model_path: str, tmp_path: Path
) -> None:
    ar = AutoRound(tiny_opt_model_path, scheme="YOUR_SCHEME", iters=0)
    with pytest.raises(UnsupportedError, match="your_dtype.*formats that can: fake"):
        ar.quantize_and_save(tmp_path / "out", format="auto_round")
    assert not (tmp_path / "out").exists()


def test_a_name_is_registered_once(your_dtype: Any) -> None:
    with pytest.raises(ConfigError, match="'your_dtype' is already registered by your_dtype"):
        register_dtype("your_dtype")(lambda tensor, **kwargs: (tensor, None, None))


def test_names_are_found_from_the_most_exact() -> None:
    names = ["probe", "probe_asym", "probe4", "probe4_sym"]
    functions = {name: (lambda tensor, _name=name, **kwargs: (_name, None, None)) for name in names}
    try:
        for name in names:
            register_dtype(name)(functions[name])
        found = {(b, s): get_quant_func("probe", b, s)(None)[0] for b in (2, 4) for s in (True, False)}
        assert found == {
            (4, True): "probe4_sym", (4, False): "probe_asym", (2, True): "probe", (2, False): "probe_asym",
        }  # fmt: skip
    finally:
        for name in names:
            QUANT_FUNC_WITH_DTYPE.pop(name, None)


def test_an_unknown_data_type_lists_those_there_are() -> None:
    with pytest.raises(UnsupportedError, match="'int_smy'.*did you mean.*Available: .*int_sym"):
        get_quant_func("int_smy")
