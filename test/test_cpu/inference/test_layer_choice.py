"""Backends of a whole model: what was asked for, what the rest gets, kernels in a loaded model, and its files again."""

from __future__ import annotations

import json
import logging
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from integer_weights import int_format

from auto_round.errors import UnsupportedError
from auto_round.inference import table as backend_table
from auto_round.inference.config import LayerFormat
from auto_round.inference.convert_model import convert_hf_model
from auto_round.inference.kernels import IntegerWeight, LayerSpec, LinearKernel
from auto_round.inference.linear import QuantLinear
from auto_round.inference.table import BACKENDS, Backend, choose_backends
from auto_round.layouts.bit_stream import unpack_rows
from auto_round.modeling.experts import unfuse_experts
from auto_round.modeling.files.safetensors import read_header
from auto_round.schemes import QuantizationScheme as Scheme

IDS = torch.tensor([[1, 5, 9, 2, 44, 17, 3, 8], [7, 7, 1, 0, 60, 31, 12, 2]])


class Float64(LinearKernel):
    """The formula in float64, for layers of 64 inputs."""

    def __init__(self, weight: IntegerWeight) -> None:
        super().__init__(weight)
        if bool((weight.codes == 255).all()):
            raise UnsupportedError("all codes are 255")
        size = weight.spec.group_size
        scales, zeros = (t.double().repeat_interleave(size, 1) for t in (weight.scales, weight.zeros))
        self.register_buffer("own", weight.codes.clone(), persistent=False)
        self.register_buffer("dense", scales * (weight.codes.double() - zeros), persistent=False)

    @classmethod
    def unsupported_reason(cls, spec: LayerSpec) -> str | None:
        return None if spec.in_features == 64 else f"runs 64 inputs, not {spec.in_features}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.double() @ self.get_buffer("dense").T).to(x.dtype)

    def codes(self) -> torch.Tensor:
        return self.get_buffer("own")


DOUBLE = Backend("double", ("cpu",), (4, 8), ("float32",), 9, ("gptq", "gptq_zp+-1", "awq"), kernel="plain64:Float64",
                 by_name=True)  # fmt: skip
ABSENT = Backend("absent", ("cpu",), (4,), ("float32",), 8, ("gptq_zp+-1",), ("no-such-package",),
                 gain="twice as fast")  # fmt: skip


@pytest.fixture(autouse=True)
def rows(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("plain64")
    module.Float64 = Float64  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "plain64", module)
    plain = tuple(b for b in BACKENDS if b.plain)
    monkeypatch.setattr(backend_table, "BACKENDS", (DOUBLE, ABSENT, *plain))


def layers(*kinds: tuple[int, int]) -> dict[str, tuple[LayerFormat, LayerSpec]]:
    """Layers of (bits, inputs)."""
    return {
        f"l{i}": (int_format(b, 32, True, "gptq_zp+-1"), LayerSpec(b, 32, True, k, 64, torch.float32, "cpu"))
        for i, (b, k) in enumerate(kinds)
    }


def test_what_was_asked_for_runs_what_it_can(caplog: pytest.LogCaptureFixture) -> None:
    chosen = choose_backends(layers((4, 64), (3, 64), (4, 96), (8, 64), (3, 64)), "cpu", "double")
    names = [c.backend.name for c in chosen.values()]
    assert names == ["double", "auto_round:torch_zp", "auto_round:torch_zp", "double", "auto_round:torch_zp"]
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warnings == [
        "backend 'double' runs 2 of 5 layers; 2 such as l1 run with auto_round:torch_zp (it runs 4, 8 bits, not 3); "
        "1 such as l2 run with auto_round:torch_zp (it runs 64 inputs, not 96)"
    ]


def test_what_was_asked_for_runs_nothing() -> None:
    with pytest.raises(UnsupportedError, match="'double' does not run 3-bit weights .*use backend='auto'"):
        choose_backends(layers((3, 64), (4, 96)), "cpu", "double")
    with pytest.raises(UnsupportedError, match="pip install no-such-package, or use backend='auto'"):
        choose_backends(layers((4, 64)), "cpu", "absent")


def test_one_hint_a_load(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "auto_round")
    choose_backends(layers((4, 64), (3, 64), (4, 96)), "cpu")
    assert [r.getMessage() for r in caplog.records] == [
        "2 of 3 layers could run faster on cpu with backend absent (twice as fast): pip install no-such-package"
    ]
    caplog.clear()
    choose_backends(layers((4, 64)), "cpu", "torch")
    assert caplog.records == []


def load(folder: Path, name: str = "auto", **kwargs: Any) -> Any:
    from transformers import AutoModelForCausalLM, AutoRoundConfig

    config = AutoRoundConfig(backend=name)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config, **kwargs)


def kernels(model: torch.nn.Module) -> int:
    return sum(isinstance(m, QuantLinear) and m.kernel is not None for m in model.modules())


def headers(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    files = sorted(folder.glob("*.safetensors"))
    return {n: (tuple(t.shape), t.dtype) for path in files for n, t in read_header(path).items()}


CASES: dict[str, tuple[str, str, Scheme, dict[str, Scheme]]] = {
    "mixed bits and a head": ("llama", "auto_round", Scheme(group_size=32), {
        "model.layers.0.mlp.up_proj": Scheme(bits=3, group_size=32),
        "lm_head": Scheme(bits=8, group_size=32, sym=False),
    }),
    "awq": ("llama", "auto_round:auto_awq", Scheme(group_size=32, sym=False), {}),
    "gptq": ("llama", "auto_round:auto_gptq", Scheme(group_size=32, sym=False), {}),
    "experts": ("mixtral", "auto_round", Scheme(group_size=32), {}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["double", "torch"])
def test_a_loaded_model_saves_what_it_was_loaded_from(
    case: str, name: str, packable_model: Callable[..., Any], write_checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    family, fmt, scheme, others = CASES[case]
    source = packable_model(family)
    for block in source.model.layers if case == "experts" else ():
        unfuse_experts(block.mlp)
    written = write_checkpoint(source, scheme, others, fmt)
    model = load(written.folder, name)
    with torch.no_grad():
        first, want = model(IDS).logits, written.fake(IDS).logits
    assert float((first - want).norm() / want.norm()) < 1e-5
    wide = sum(layer.codes.codes.shape[1] == 64 and layer.scheme.bits != 3 for layer in written.layers.values())
    assert kernels(model) == (wide if name == "double" else 0)

    model.save_pretrained(tmp_path / "again")
    assert headers(tmp_path / "again") == headers(written.folder)
    kept = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    for key in ("bits", "group_size", "sym", "packing_format", "extra_config"):
        assert kept.get(key) == written.config.get(key), key
    assert kept["backend"] == "auto", "the next machine may have others"
    assert kernels(model) == (wide if name == "double" else 0), "saving keeps the kernels"
    with torch.no_grad():
        assert torch.allclose(load(tmp_path / "again", name)(IDS).logits, first, rtol=1e-5, atol=1e-5)


def test_a_model_with_quantized_activations_saves_what_it_was_loaded_from(
    packable_model: Callable[..., Any], write_checkpoint: Callable[..., Any], earlier_int8: str, tmp_path: Path
) -> None:
    scheme = Scheme(bits=8, group_size=-1, act_bits=8, act_dynamic=True)
    written = write_checkpoint(packable_model("llama"), scheme, None, earlier_int8)
    model = load(written.folder, "torch")
    with torch.no_grad():
        first = model(IDS).logits
    model.save_pretrained(tmp_path / "again")
    assert headers(tmp_path / "again") == headers(written.folder)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "again")(IDS).logits, first)


PLACES = {name: "cpu" for name in ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")}


@pytest.mark.parametrize(("device_map", "offload", "count"), [
    (None, False, 12), ("auto", False, 12), ("cpu", False, 12), ({"": "cpu"}, False, 12),
    (torch.device("cpu"), False, 12), (PLACES | {"model.layers.1": "disk"}, False, 12),
    (PLACES | {"model.layers.1": "disk"}, True, 6),
], ids=["none", "auto", "cpu", "dict", "device", "disk", "disk with buffers"])  # fmt: skip
def test_device_maps(
    device_map: Any, offload: bool, count: int, llama: Callable[..., Any], write_checkpoint: Callable[..., Any],
    tmp_path: Path,
) -> None:  # fmt: skip
    written = write_checkpoint(llama(), Scheme(group_size=32))
    more = {"offload_folder": str(tmp_path / "offload"), "offload_buffers": offload}
    model = load(written.folder, "double", device_map=device_map, **more)
    with torch.no_grad():
        logits, want = model(IDS).logits, written.fake(IDS).logits
    assert float((logits - want).norm() / want.norm()) < 1e-5
    assert kernels(model) == count


def test_moving_a_loaded_model_warns_and_comes_back(
    llama: Callable[..., Any], write_checkpoint: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    written = write_checkpoint(llama(), Scheme(group_size=32))
    model = load(written.folder, "double")
    assert kernels(model) == 12
    model.to(torch.float32).to("cpu")
    assert kernels(model) == 12 and "moved" not in caplog.text
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layer = model.model.layers[0].mlp.up_proj
    layer.kernel_device = "xpu"
    layer.to("meta").to_empty(device="cpu")
    assert layer.kernel is None and "loaded for xpu and moved to cpu" in caplog.text
    assert "please avoid moving a quantized model: load it with device_map='cpu'" in caplog.text
    layer.kernel_device = "cpu"
    layer.to("meta").to_empty(device="cpu")
    assert layer.kernel is not None
    model.load_state_dict(state)
    with torch.no_grad():
        logits, want = model(IDS).logits, written.fake(IDS).logits
    assert float((logits - want).norm() / want.norm()) < 1e-5


def test_a_kernel_that_finds_values_it_cannot_take(
    llama: Callable[..., Any], write_checkpoint: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    module = QuantLinear(64, 32, int_format(8, 32, True, "gptq_zp+-1"))
    assert module.qweight is not None
    module.qweight.fill_(-1)
    assert bool((unpack_rows(module.qweight.T, 8) == 255).all())
    module.kernel_path, module.kernel_device, module.backend = "plain64:Float64", "cpu", "double"
    module.start_kernel("some.layer")
    assert module.kernel is None and module.qweight is not None and module.backend == "torch"
    assert "layers such as some.layer run in plain PyTorch, not with double: all codes are 255" in caplog.text


def test_a_model_without_weights_is_converted_for_another_device(llama: Callable[..., Any]) -> None:
    model = llama()
    model.config.quantization_config = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True}
    model, used = convert_hf_model(model.to("meta"), "xpu:0")
    assert used == ["auto_round:torch_zp"]
    layer = model.model.layers[0].mlp.up_proj
    assert (layer.kernel_device, layer.backend) == ("xpu", "auto_round:torch_zp")
