"""Whole runs with small floats: every preset, plain, searched and tuned; mixtures; inputs; what layers share."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch

from auto_round import AutoRound
from auto_round.codecs.activation import ActivationQuantizer
from auto_round.codecs.block_float import BLOCK_FLOAT_SPECS, encode, spec_for_bits
from auto_round.codecs.quantized_layer import FloatCodes
from auto_round.errors import UnsupportedError
from auto_round.modeling.files.safetensors import TensorFiles
from auto_round.run.driver import InMemory

PRESETS = (
    "MXFP4", "MXFP8", "MXFP4_RCEIL", "MXFP8_RCEIL", "MXINT4", "NVFP4", "FPW8A16", "FP8_STATIC", "FP8_BLOCK"
)  # fmt: skip
PLAIN = {"iters": 0, "disable_opt_rtn": True}
HOW: dict[str, dict[str, Any]] = {"plain": PLAIN, "searched": {"iters": 0}, "tuned": {"iters": 3}}


def in_memory(ar: AutoRound) -> InMemory:
    """The result of `quantize()` with its layers and records."""
    ar.quantize()
    assert ar._result is not None
    return ar._result


@pytest.fixture
def run(make: Callable[..., Any]) -> Callable[..., Any]:
    return lambda model, scheme, **kw: make(model, **{"scheme": scheme, "group_size": None, **kw})


@pytest.fixture
def layers_of(run: Callable[..., Any]) -> Callable[..., Any]:
    """`layers_of(model, scheme, **options)`: (model in memory, its quantized layers, records of the blocks)."""

    def quantize(model: Any, scheme: str, **options: Any) -> Any:
        found = in_memory(run(model, scheme, **options))
        return found.model, found.layers, found.finished.state.records

    return quantize


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("scheme", PRESETS)
@pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
def test_saved_weights_are_the_codes(
    family: str, scheme: str, how: str, run: Callable[..., Any], logits: Callable[[Any], torch.Tensor], tmp_path: Path
) -> None:
    ar = run(family, scheme, **HOW[how])
    found = in_memory(ar)
    layers, finished = found.layers, found.finished
    assert bool(torch.isfinite(logits(found.model)).all())
    assert layers and all(isinstance(layer.codes, FloatCodes) for layer in layers.values())
    run(family, scheme, **HOW[how]).quantize_and_save(tmp_path / "out", format="fake")  # opens it and compares weights
    files = TensorFiles.open(tmp_path / "out")
    for name, layer in layers.items():
        if ".experts." not in name:
            assert torch.equal(files.read(f"{name}.weight"), layer.dequantize()), name
    for record in finished.state.records:
        assert record.loss_after is None or record.loss_after <= record.loss_before


@pytest.mark.parametrize("scheme", PRESETS)
def test_plain_rounding_is_the_data_types_own(
    scheme: str, layers_of: Callable[..., Any], packable_model: Callable[..., Any]
) -> None:
    source = packable_model("llama")
    weights = {name: parameter.detach().clone() for name, parameter in source.named_parameters()}
    _, layers, _ = layers_of(source, scheme, **PLAIN)
    for name, layer in layers.items():
        family = spec_for_bits(BLOCK_FLOAT_SPECS[layer.scheme.data_type], layer.scheme.data_type, layer.scheme.bits)
        assert family is not None
        wanted = encode(
            weights[f"{name}.weight"], family, layer.scheme.group_size, global_scale=layer.codes.global_scale
        )
        assert torch.equal(layer.codes.codes, wanted.codes) and torch.equal(layer.codes.scale, wanted.scale)


def test_tuning_lowers_the_error_on_samples_that_only_judge(layers_of: Callable[..., Any]) -> None:
    generator = torch.Generator().manual_seed(8)
    data = [torch.randint(3, 250, (24,), generator=generator) for _ in range(32)]
    for scheme in PRESETS:
        _, _, records = layers_of("llama", scheme, act_bits=16, iters=20, dataset=data, nsamples=32)
        assert records[0].loss_after < 0.95 * records[0].loss_before, scheme


def test_scales_move_on_request_only(layers_of: Callable[..., Any]) -> None:
    scales = {}
    for key, options in (("start", {"iters": 0}), ("default", {"iters": 8}), ("moved", {"iters": 8, "minmax_lr": 0.1})):
        _, layers, _ = layers_of("llama", "FP8_STATIC", not_use_best_mse=key != "start", **options)
        scales[key] = {name: layer.codes.scale for name, layer in layers.items()}
    name = "model.layers.0.mlp.up_proj"
    assert torch.equal(scales["start"][name], scales["default"][name])
    assert not torch.equal(scales["start"][name], scales["moved"][name])


@pytest.mark.parametrize("scheme", ["MXFP4", "NVFP4", "FP8_STATIC", "FP8_BLOCK", "MXFP8_RCEIL", "INT8"])
def test_layers_quantize_their_inputs(
    scheme: str, layers_of: Callable[..., Any], packable_model: Callable[..., Any]
) -> None:
    model, layers, _ = layers_of(packable_model("llama"), scheme, **PLAIN)
    name = "model.layers.0.mlp.up_proj"
    layer, module = layers[name], model.get_submodule(name)
    step = ActivationQuantizer(layer.scheme.activations, layer.act_scale, layer.act_zero_point, layer.act_global_scale)
    x = torch.randn(2, 5, module.in_features)
    assert torch.equal(module(x), torch.nn.functional.linear(step(x), module.weight))
    assert not torch.equal(module(x), torch.nn.functional.linear(x, module.weight))


def test_static_fp8_scales_are_the_largest_inputs(
    layers_of: Callable[..., Any], packable_model: Callable[..., Any], token_ids: list[torch.Tensor]
) -> None:
    model = packable_model("llama")
    largest: dict[str, float] = {}

    def seen(name: str) -> Any:
        return lambda _m, args: largest.update({name: max(largest.get(name, 0.0), float(args[0].abs().max()))})

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            module.register_forward_pre_hook(seen(name))
    with torch.no_grad():
        for ids in token_ids:
            model(ids.view(1, -1))
    counted = dict(largest)
    _, layers, _ = layers_of(packable_model("llama"), "FP8_STATIC", **PLAIN)
    for name, layer in layers.items():
        assert torch.equal(layer.act_scale, layer.act_scale.bfloat16().float())
        assert float(layer.act_scale) == pytest.approx(counted[name] / 448, rel=5e-3)  # bfloat16 has 8 bits


@pytest.mark.parametrize("scheme", ["NVFP4", "FP8_STATIC"])
def test_experts_that_no_token_reached_have_scales(
    scheme: str, layers_of: Callable[..., Any], packable_model: Callable[..., Any]
) -> None:
    model = packable_model("qwen3-moe")
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            torch.nn.init.zeros_(parameter)  # every token is routed to the same two of four
    _, layers, _ = layers_of(model, scheme, iters=2)
    key = "act_global_scale" if scheme == "NVFP4" else "act_scale"
    fixed = {
        n: float(getattr(layer, key)) for n, layer in layers.items() if n.startswith("model.layers.0.mlp.experts.")
    }
    assert len(fixed) == 12 and all(0 < v < float("inf") for v in fixed.values())
    up, down = (sorted(v for n, v in fixed.items() if n.endswith(leaf)) for leaf in ("up_proj", "down_proj"))
    assert len(set(up)) == 1  # the two that ran saw every token, and the others take theirs
    widest = down[0] if scheme == "NVFP4" else down[-1]
    assert down.count(widest) == 3 and len(set(down)) == 2  # the wider of the two, and those that took it


def shares(layers: dict[str, Any], key: str, names: list[str]) -> bool:
    return len({float(attrgetter(key)(layers[f"model.layers.1.{name}"])) for name in names}) == 1


def test_joined_layers_share_global_scales(
    layers_of: Callable[..., Any], packable_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    qkv = [f"self_attn.{n}_proj" for n in "qkv"]
    gate_up = ["mlp.gate_proj", "mlp.up_proj"]
    model = packable_model("llama")
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for options in (PLAIN, {"iters": 2}):
        _, layers, _ = layers_of(packable_model("llama"), "NVFP4", **options)
        for group in (qkv, gate_up):
            assert shares(layers, "codes.global_scale", group) and shares(layers, "act_global_scale", group)
            largest = max(float(weights[f"model.layers.1.{n}.weight"].abs().max()) for n in group)
            found = layers[f"model.layers.1.{group[0]}"].codes.global_scale
            assert torch.equal(found, torch.tensor(2688.0) / torch.tensor(largest))
        assert not shares(layers, "codes.global_scale", ["self_attn.q_proj", "self_attn.o_proj"])
    monkeypatch.setenv("AR_NVFP4_FUSED_LAYER_GLOBAL_SCALE", "0")
    _, layers, _ = layers_of(packable_model("llama"), "NVFP4", **PLAIN)
    assert not shares(layers, "codes.global_scale", qkv) and not shares(layers, "codes.global_scale", gate_up)


@pytest.mark.parametrize(("scheme", "key"), [("NVFP4", "act_global_scale"), ("FP8_STATIC", "act_scale")])
def test_experts_share_input_scales_when_asked(
    scheme: str, key: str, layers_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    up = [f"mlp.experts.{i}.{leaf}" for i in range(4) for leaf in ("gate_proj", "up_proj")]
    down = [f"mlp.experts.{i}.down_proj" for i in range(4)]
    _, apart, _ = layers_of("qwen3-moe", scheme, **PLAIN)
    assert not shares(apart, key, up) and shares(apart, key, up[:2])  # gate and up of an expert have one input
    monkeypatch.setenv("AR_ENABLE_UNIFY_MOE_INPUT_SCALE", "1")
    _, layers, _ = layers_of("qwen3-moe", scheme, **PLAIN)
    assert shares(layers, key, up) and shares(layers, key, down)
    value = lambda found, name: float(getattr(found[f"model.layers.1.{name}"], key))
    extreme = min if scheme == "NVFP4" else max  # a global scale is the larger, the smaller the inputs are
    assert value(layers, up[0]) == extreme(value(apart, name) for name in up)


@pytest.mark.parametrize("options", [PLAIN, {"iters": 2}])
def test_mixed_types(
    options: dict[str, Any], layers_of: Callable[..., Any], logits: Callable[[Any], torch.Tensor]
) -> None:
    config = {"down_proj": "MXFP8", "q_proj": "BF16", "k_proj": {"bits": 8}, "layers.1.*o_proj": "NVFP4",
              "layers.0.*o_proj": "W4A16", "layers.0.*v_proj": "FP8_BLOCK"}  # fmt: skip
    model, layers, _ = layers_of("llama", "MXFP4", layer_config=config, **options)
    assert bool(torch.isfinite(logits(model)).all())
    found = {
        n.removeprefix("model.layers."): (layer.scheme.data_type, layer.scheme.bits) for n, layer in layers.items()
    }
    assert found["0.mlp.down_proj"] == found["1.self_attn.k_proj"] == ("mx_fp", 8)
    assert found["0.mlp.up_proj"] == ("mx_fp", 4) and "0.self_attn.q_proj" not in found
    assert found["1.self_attn.o_proj"] == ("nv_fp", 4) and found["0.self_attn.o_proj"] == ("int", 4)
    assert found["0.self_attn.v_proj"] == ("fp", 8)


def test_a_head_in_small_floats(layers_of: Callable[..., Any], logits: Callable[[Any], torch.Tensor]) -> None:
    for scheme in ("MXFP8", "NVFP4", "FP8_STATIC"):
        for options in (PLAIN, {"iters": 2}):
            model, layers, _ = layers_of("llama-tied", scheme, quant_lm_head=True, **options)
            assert layers["lm_head"].codes.element is not None and bool(torch.isfinite(logits(model)).all())


@pytest.mark.parametrize(
    "name", ["mxfp", "MXFP4", "mx_fp_rceil", "nvfp4", "mxint4", "fp8", "fp8_e5m2", "w4fp8", "mxfp8e5m2"]
)
def test_types_by_name(name: str, make: Callable[..., Any], tmp_path: Path) -> None:
    ar = make("llama", data_type=name, bits=4 if "8" not in name or name == "w4fp8" else 8, group_size=32, iters=1)
    ar.quantize_and_save(tmp_path / "out", format="fake")
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"bits": 6}, UnsupportedError, "'mx_fp' with 6 bits"),
    ({"act_dynamic": False, "act_group_size": -1}, UnsupportedError, "'mx_fp' has no static activations"),
    ({"act_data_type": "nv_fp", "act_bits": 8}, UnsupportedError, "'nv_fp' with 8 bits"),
])  # fmt: skip
def test_what_is_refused(
    options: dict[str, Any], error: type[Exception], message: str, run: Callable[..., Any]
) -> None:
    with pytest.raises(error, match=message):
        run("llama", "MXFP4", **options).plan("fake")
