"""Layers of the small float types: their numbers, their buffers, and the hardware's product."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from auto_round.algorithms.base import LayerTask
from auto_round.algorithms.quantization.rtn.quantizer import quantize_layer
from auto_round.codecs.activation import ActivationQuantizer
from auto_round.codecs.quantized_layer import QuantizedLayer
from auto_round.errors import ConfigError, ModelError, UnsupportedError
from auto_round.formats.base import ExportPlan, get_format
from auto_round.inference.config import read_config
from auto_round.inference.convert_model import build_layer, check_tensors
from auto_round.inference.linear import PackedLinear, ScaledMmLinear
from auto_round.inference.table import BACKENDS, SCALED_MM, choose_backend, usable
from auto_round.schemes import PRESET_SCHEMES, QuantizationScheme

PRESETS = ["MXFP4", "MXFP4_RCEIL", "MXFP8", "MXFP8_RCEIL", "MXINT4", "NVFP4", "FPW8A16", "FP8_STATIC", "FP8_BLOCK"]
NAME = "model.layers.0.l"
IN, OUT = 256, 48


def layer_of(scheme: QuantizationScheme) -> QuantizedLayer:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(OUT, IN, generator=generator).bfloat16()
    step = None
    if scheme.activations is not None:
        fixed = not scheme.activations.dynamic
        above = torch.tensor(448 * 6 / 4.0) if "static_gs" in scheme.activations.data_type else None
        step = ActivationQuantizer(
            scheme.activations, torch.tensor(0.01).bfloat16().float() if fixed else None, None, above
        )
    bias = torch.randn(OUT, generator=generator).bfloat16()
    task = LayerTask(NAME, torch.nn.Linear(1, 1), weight, scheme, bias=bias, activation=step)
    return quantize_layer(task, False, torch.float16)


def filled(
    scheme: QuantizationScheme, fmt: str = "auto_round", backend: str = ""
) -> tuple[PackedLinear, QuantizedLayer]:
    """A module with the buffers of what `fmt` writes."""
    layer = layer_of(scheme)
    config = get_format(fmt).config(ExportPlan(scheme, {NAME: scheme}, ("model.layers.0",)))
    read = read_config(config).layer(NAME, True)
    assert read is not None
    tensors = {k.rpartition(".")[2]: v for k, v in get_format(fmt).pack(layer, model_dtype=torch.bfloat16).items()}
    shapes = {leaf: tuple(tensor.shape) for leaf, tensor in tensors.items() if leaf != "bias"}
    specs = read.layout.specs(read.scheme, IN, OUT)
    assert {leaf: shape for leaf, (shape, _) in specs.items()} == shapes
    dtypes = {leaf: tensor.dtype for leaf, tensor in tensors.items()}
    module = build_layer(read, torch.empty(OUT, IN, dtype=torch.bfloat16), True, dtypes, False, backend)
    assert isinstance(module, PackedLinear)
    check_tensors(NAME, module, tensors)
    module.load_state_dict(tensors)
    module.prepare(NAME)
    return module, layer


@pytest.mark.parametrize("fmt", ["auto_round", "earlier:int8"])
@pytest.mark.parametrize("preset", PRESETS)
def test_numbers(preset: str, fmt: str, earlier_int8: str) -> None:
    scheme = PRESET_SCHEMES[preset]
    if get_format(fmt).check_scheme(scheme) is not None:
        assert (preset, fmt) == ("MXINT4", earlier_int8)
        return
    module, layer = filled(scheme, fmt)
    weight = layer.dequantize()
    assert torch.equal(module.dequantize(), weight)
    x = torch.randn(2, 5, IN, generator=torch.Generator().manual_seed(3))
    step = module.activation
    assert (step is None) is (scheme.activations is None)
    bias = module.bias.float() if module.bias is not None else None
    inputs = x
    if scheme.activations is not None:
        inputs = ActivationQuantizer(scheme.activations, layer.act_scale, None, layer.act_global_scale)(x)
        assert not torch.equal(inputs, x)
    assert torch.equal(module(x), torch.nn.functional.linear(inputs, weight, bias))


@pytest.mark.parametrize("preset", ["MXFP8", "NVFP4", "FP8_STATIC", "FP8_BLOCK", "FPW8A16"])
def test_nothing_but_the_bias_is_cast(preset: str) -> None:
    module, layer = filled(PRESET_SCHEMES[preset])
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    module.to(torch.float16).float()
    for name, buffer in module.named_buffers():
        assert buffer.dtype == (torch.float32 if name == "bias" else before[name].dtype), name
        assert name == "bias" or torch.equal(buffer.view(torch.uint8), before[name].view(torch.uint8))
    assert torch.equal(module.dequantize(), layer.dequantize())
    assert module(torch.randn(1, IN).half()).dtype == torch.float16


@pytest.mark.parametrize(("preset", "leaf", "value"), [
    ("MXFP4", "weight_scale", 255), ("NVFP4", "weight_scale", float("nan")),
    ("FP8_STATIC", "input_scale", float("inf")),
    ("NVFP4", "input_global_scale", float("nan")), ("FP8_BLOCK", "weight_scale_inv", float("nan")),
])  # fmt: skip
def test_a_broken_file(preset: str, leaf: str, value: float) -> None:
    module, _ = filled(PRESET_SCHEMES[preset])
    buffer = module.get_buffer(leaf)
    buffer.copy_(torch.full_like(buffer.float(), value).to(buffer.dtype))
    with pytest.raises(ModelError, match=f"up: {leaf} holds NaN"):
        module.prepare("up")


def test_dtypes_that_contradict_the_config() -> None:
    module, _ = filled(PRESET_SCHEMES["MXFP8"])
    stored = dict(module.named_buffers())
    with pytest.raises(ModelError, match=r"tensor a\.weight is torch.float8_e5m2, but layout mxfp8"):
        check_tensors("a", module, stored | {"weight": stored["weight"].view(torch.float8_e5m2)})
    with pytest.raises(ModelError, match="weight_scale is torch.float32"):
        check_tensors("a", module, stored | {"weight_scale": stored["weight_scale"].float()})


def test_wider_scales_are_taken() -> None:
    """Other programs store FP8 scales as float32."""
    read = read_config({"quant_method": "fp8", "weight_block_size": [128, 128]}).default
    weight = torch.empty(OUT, IN)
    module = build_layer(read, weight, False, {"weight_scale_inv": torch.float32}, False, "")
    assert module.get_buffer("weight_scale_inv").dtype == torch.float32


@pytest.mark.parametrize("group_size", [-1, 0])
def test_the_product_of_the_hardware(group_size: int) -> None:
    """`torch._scaled_mm` has a CPU form that computes the same, so that its operands can be tried anywhere."""
    if os.environ.get("ONEDNN_MAX_CPU_ISA") == "AVX2":  # of the other tests; oneDNN has no FP8 product there
        test = f"{__file__}::test_the_product_of_the_hardware[{group_size}]"
        env = os.environ | {"ONEDNN_MAX_CPU_ISA": "DEFAULT"}
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", test], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
        return
    scheme = PRESET_SCHEMES["FP8_STATIC"].with_overrides({"group_size": group_size})
    module, _ = filled(scheme, backend=SCALED_MM)
    assert isinstance(module, ScaledMmLinear)
    x = torch.randn(3, 7, IN, generator=torch.Generator().manual_seed(5)) * 3
    try:
        plain, fast = PackedLinear.forward(module, x), module.multiply(x)
    except NotImplementedError:  # PyTorch 2.6
        pytest.skip(f"PyTorch {torch.__version__} has no CPU form of it")
    assert fast.shape == (3, 7, OUT) and fast.dtype == x.dtype
    assert float((fast - plain).norm() / plain.norm()) < 1e-5
    assert torch.equal(module(x), plain)  # no hardware here: the path in plain PyTorch
    empty = module(x[:0])
    assert empty.shape == (0, 7, OUT)
    half = module.multiply(x.bfloat16())
    assert half.dtype == torch.bfloat16 and float((half.float() - plain).norm() / plain.norm()) < 2e-2


@pytest.mark.parametrize(("preset", "backend"), [
    ("MXFP4", "mxfp4"), ("MXFP8", "mxfp8"), ("MXINT4", "mxint4"), ("NVFP4", "nvfp4"), ("FPW8A16", "fp8"),
    ("FP8_BLOCK", "fp8"), ("FP8_STATIC", "fp8_static"),
])  # fmt: skip
def test_backends(preset: str, backend: str) -> None:
    scheme = PRESET_SCHEMES[preset]
    fmt = read_config(get_format("auto_round").config(ExportPlan(scheme, {NAME: scheme}, ("model.layers.0",)))).default
    assert choose_backend(fmt, "cpu").backend.name == f"auto_round:torch_{backend}"
    assert choose_backend(fmt, "cuda", "torch").backend.name == f"auto_round:torch_{backend}"
    row = next(row for row in BACKENDS if row.name == f"auto_round:torch_{backend}")
    assert usable(row, ("cpu",))[0] and fmt.packing in row.packings


def test_the_hardware_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = PRESET_SCHEMES["FP8_STATIC"]
    fmt = read_config(get_format("auto_round").config(ExportPlan(scheme, {NAME: scheme}, ("model.layers.0",)))).default
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, name in (((8, 0), "auto_round:torch_fp8_static"), ((8, 9), SCALED_MM), ((9, 0), SCALED_MM)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda c=capability: c)
        choice = choose_backend(fmt, "cuda")
        assert choice.backend.name == name
        assert any("compute capability 8.9" in text for text in choice.rejected) is (name != SCALED_MM)


CONFIG: dict[str, Any] = {"bits": 4, "group_size": 32, "sym": True, "data_type": "mx_fp", "quant_method": "auto-round"}


@pytest.mark.parametrize(("changes", "error", "reason"), [
    ({"bits": 6}, UnsupportedError, "the checkpoint: data type 'mx_fp' with 6 bits"),
    ({"sym": False}, UnsupportedError, "asymmetric"),
    ({"act_bits": 4, "act_data_type": "nope"}, UnsupportedError, "activations of data type 'nope'"),
    ({"group_size": "x"}, ConfigError, "group_size='x'"), ({"bits": "4"}, ConfigError, "bits='4'"),
    ({"data_type": "fp", "bits": 8, "group_size": [128]}, ConfigError, "two positive whole numbers"),
    ({"quant_method": "fp8", "weight_block_size": None}, UnsupportedError, "Transformers opens it by itself"),
])  # fmt: skip
def test_configs_that_cannot_be_run(changes: dict[str, Any], error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=reason):
        read_config(CONFIG | changes)


def test_what_others_wrote() -> None:
    """Group sizes that Transformers refuses, and no packing_format."""
    tensor = read_config({"bits": 8, "group_size": 0, "data_type": "fp", "fmt": "e4m3"}).default
    assert tensor.packing == "fp8" and tensor.scheme.group_size == 0
    block = read_config({"bits": 8, "group_size": [128, 128], "data_type": "fp", "packing_format": "fp8"}).default
    assert block.packing == "fp8_block" and block.columns_per_scale(512) == 128
    wide = read_config({"bits": 8, "group_size": -1, "data_type": "fp", "fmt": "e5m2"}).default
    assert wide.scheme.data_type == "fp8_e5m2"
