"""Faults seen in another implementation, one test each; every test fails on the behaviour that is described."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from auto_round import AutoRound, SignRoundConfig
from auto_round.calibration.capture import CapturedInputs, capture_inputs
from auto_round.errors import ConfigError, UnsupportedError
from auto_round.modeling.source import open_source

IDS = torch.randint(3, 90, (2, 11), generator=torch.Generator().manual_seed(1))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def reopened(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_1_asymmetric_integers_rounded_without_data_open_as_what_they_were(
    bits: int, packable_folder: Any, tmp_path: Path
) -> None:
    """Zero points were stored less one under a packing that does not subtract one."""
    kwargs: dict[str, Any] = dict(iters=0, disable_opt_rtn=True, sym=False, bits=bits, group_size=32)
    dense, _ = AutoRound(packable_folder("llama"), **kwargs).quantize()
    AutoRound(packable_folder("llama"), **kwargs).quantize_and_save(tmp_path / "packed")
    AutoRound(packable_folder("llama"), **kwargs).quantize_and_save(tmp_path / "fake", format="fake")
    packed, fake = logits(reopened(tmp_path / "packed")), logits(reopened(tmp_path / "fake"))
    assert torch.allclose(packed, fake, atol=1e-5) and torch.allclose(packed, logits(dense), atol=1e-5)


def run_blocks(captured: CapturedInputs, source: Any) -> torch.Tensor:
    hidden = captured.hidden
    samples = list(range(hidden.shape[0]))
    with torch.no_grad():
        for index, name in enumerate(source.blocks):
            hidden = captured.run(index, source.load(name), hidden, samples)
    return captured.run_head(source, hidden, samples)


@pytest.mark.parametrize("family", ["gemma3", "qwen3-next", "gpt-oss", "mistral"])
def test_2_every_block_is_called_with_its_own_arguments(
    family: str, tiny_folder: Callable[..., Path], tiny_model: Any
) -> None:
    """The arguments of block 0 were used for all: local rotary tables in global layers, or a crash."""
    source = open_source(str(tiny_folder(family)))
    captured = capture_inputs(source, [{"input_ids": ids} for ids in IDS])
    assert torch.allclose(run_blocks(captured, source), logits(tiny_model(family)), atol=1e-4)


def test_2_rotary_tables_and_masks_differ_by_kind_of_attention(tiny_folder: Callable[..., Path]) -> None:
    source = open_source(str(tiny_folder("gemma3")))
    captured = capture_inputs(source, [{"input_ids": ids} for ids in IDS])
    kinds = source.config.layer_types
    by_kind: dict[str, list[Any]] = {kind: [] for kind in kinds}
    for index, kind in enumerate(kinds):
        args, kwargs, _ = captured._calls[index][0].build()
        tables = kwargs.get("position_embeddings") or args[0]
        by_kind[kind].append((tables[0], kwargs["attention_mask"]))
    sliding, full = by_kind["sliding_attention"], by_kind["full_attention"]
    assert len(sliding) == 3 and len(full) == 1
    assert all(torch.equal(sliding[0][0], table) for table, _ in sliding)
    assert not torch.equal(sliding[0][0], full[0][0])
    masks = [None if mask is None else mask for _, mask in (sliding[0], full[0])]
    assert masks[0] is not None and (masks[1] is None or not torch.equal(masks[0], masks[1]))


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral"])
def test_3_masks_that_are_boolean_stay_so_and_calibration_stays_causal(
    family: str, tiny_folder: Callable[..., Path]
) -> None:
    """Boolean masks became additive ones of 0 and 1, so that nothing was masked."""
    source = open_source(str(tiny_folder(family)))
    changed = IDS[0].clone()
    changed[7:] = 5
    padding = torch.ones_like(changed)
    padding[:2] = 0
    samples = [{"input_ids": ids, "attention_mask": padding} for ids in (IDS[0], changed)]
    captured = capture_inputs(source, samples)
    masks = 0
    for index in range(len(source.blocks)):
        args, kwargs, _ = captured._calls[index][0].build()
        mask = kwargs.get("attention_mask")
        if mask is not None:
            masks += 1
            assert mask.dtype == torch.bool, (index, mask.dtype)
    assert masks
    seen = []

    class Spy(torch.nn.Module):
        def __init__(self, block: torch.nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            seen.append(kwargs.get("attention_mask"))
            return self.block(*args, **kwargs)

    hidden = captured.hidden
    for index, name in enumerate(source.blocks):
        with torch.no_grad():
            hidden = captured.run(index, Spy(source.load(name)), hidden, [0, 1])
    assert all(mask is None or mask.dtype == torch.bool for mask in seen)
    # What comes later does not reach back: positions 2 .. 6 are the same in both samples, padding aside.
    assert torch.allclose(hidden[0, 2:7], hidden[1, 2:7], atol=1e-5)
    assert not torch.allclose(hidden[0, 7:], hidden[1, 7:], atol=1e-3)


@pytest.mark.parametrize("scheme", ["FP8_STATIC", "INT8"])
def test_10_static_scales_of_inputs_do_not_follow_the_input(
    scheme: str, packable_model: Any, token_ids: list[torch.Tensor]
) -> None:
    """The fixed scale was handed over under a name that no function takes, so inputs got scales of their own."""
    kwargs: dict[str, Any] = dict(iters=0, disable_opt_rtn=True, act_dynamic=False, dataset=token_ids, seqlen=24)
    model, _ = AutoRound(packable_model("llama"), scheme=scheme, **kwargs).quantize()
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    x = torch.randn(3, layer.in_features)
    with torch.no_grad():
        # Whatever is far above the calibrated range is cut to its end; with scales of their own it would grow.
        assert torch.equal(layer(x.sign() * 1e4), layer(x.sign() * 1e6))
        assert not torch.equal(layer(x), layer(x * 2))


def test_18_a_mantissa_that_rounds_up_carries_into_the_exponent() -> None:
    """1.97 became 1.875 where 2 is nearer."""
    from auto_round.codecs.minifloat import MINIFLOATS

    for element in MINIFLOATS.values():
        powers = 2.0 ** torch.arange(element.lowest, element.exponent + 1)
        below = powers * (1 - 2.0 ** -(element.mantissa + 3))  # nearer to the power than to the value beneath it
        assert torch.equal(element.nearest(below), powers)
        assert torch.equal(element.decode(element.encode(below)), powers)


@pytest.mark.parametrize(
    "spelling, dtype",
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16), ("float32", torch.float32)],
)
def test_11_spellings_of_the_models_dtype(spelling: str, dtype: torch.dtype, packable_folder: Any) -> None:
    """`fp32` looked up `torch.bfloat32` and ended the process with exit code 0."""
    ar = AutoRound(packable_folder("llama"), iters=0, model_dtype=spelling)
    assert all(parameter.dtype == dtype for parameter in ar.model.parameters())


@pytest.mark.parametrize("spelling", ["bfloat32", "int8", "double precision", 32])
def test_11_a_wrong_one_is_an_error(spelling: Any, packable_folder: Any) -> None:
    with pytest.raises(ConfigError, match=f"{spelling}.*float32"):
        AutoRound(packable_folder("llama"), iters=0, model_dtype=spelling)


def test_12_nblocks_is_not_ignored(packable_folder: Any) -> None:
    with pytest.raises(UnsupportedError, match="nblocks=2.*not available"):
        AutoRound(packable_folder("llama"), nblocks=2)
    with pytest.raises(UnsupportedError):
        SignRoundConfig(nblocks=2)
    AutoRound(packable_folder("llama"), nblocks=1)


def test_12_nblocks_is_not_ignored_on_the_command_line(packable_folder: Any, tmp_path: Path, capsys: Any) -> None:
    from auto_round.cli.main import run

    arguments = [packable_folder("llama"), "--iters", "0", "--nblocks", "2", "--output_dir", str(tmp_path / "out")]
    try:
        code = run(arguments)
    except SystemExit as leaving:
        code = leaving.code
    assert code not in (0, None)
    assert "nblocks" in "".join(capsys.readouterr())


def test_17_four_asymmetric_bits_open_on_a_cpu(packable_folder: Any, tmp_path: Path) -> None:
    """No CPU backend was there for its layout, and loading ended the process."""
    ar = AutoRound(packable_folder("llama"), scheme="W4A16", sym=False, group_size=32, iters=0, disable_opt_rtn=True)
    ar.quantize_and_save(tmp_path / "out")
    model = reopened(tmp_path / "out")
    assert model.config.quantization_config.packing_format == "auto_round:auto_awq"
    assert bool(torch.isfinite(logits(model)).all())


@pytest.mark.parametrize("scheme", ["FP8_STATIC", "FPW8A16", "MXFP4", "NVFP4"])
def test_4_what_stays_dense_is_ignored_by_name(scheme: str, packable_folder: Any, tmp_path: Path) -> None:
    """`ignore` was empty though lm_head was dense: its scales were made up by the reader, and the logits NaN."""
    ids = [torch.arange(3, 27), torch.arange(40, 64)]
    ar = AutoRound(packable_folder("llama"), scheme=scheme, iters=0, dataset=ids, nsamples=2, seqlen=24, layer_config={
        "model.layers.0.mlp.down_proj": {"bits": 16, "act_bits": 16}
    })  # fmt: skip
    ar.quantize_and_save(tmp_path / "out", format="llm_compressor")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert set(config["ignore"]) == {"lm_head", "model.layers.0.mlp.down_proj"}


@pytest.mark.parametrize(("scheme", "fmt"), [
    ("FP8_BLOCK", "auto_round"), ("FP8_BLOCK", "auto_round:fp8"), ("FPW8A16", "auto_round"),
])  # fmt: skip
def test_16_fp8_in_blocks_and_per_tensor_opens(scheme: str, fmt: str, packable_folder: Any, tmp_path: Path) -> None:
    """Transformers' config class refused a group_size of [128, 128] and of 0."""
    kwargs: dict[str, Any] = dict(scheme=scheme, iters=0, disable_opt_rtn=True)
    folder = packable_folder("llama", hidden_size=128, intermediate_size=256)  # whole groups of inputs
    dense, _ = AutoRound(folder, **kwargs).quantize()
    AutoRound(folder, **kwargs).quantize_and_save(tmp_path / "out", format=fmt)
    packed = logits(reopened(tmp_path / "out"))
    assert torch.allclose(packed, logits(dense), atol=1e-5)
    assert not torch.allclose(packed, logits(reopened(Path(folder))), atol=1e-3)


def test_16_format_fp8_opens_without_this_package(packable_folder: Any, tmp_path: Path) -> None:
    """It was written under a packing that nobody knows."""
    kwargs: dict[str, Any] = dict(scheme="FP8_BLOCK", iters=0, disable_opt_rtn=True, group_size=(32, 32))
    kwargs |= {"act_group_size": 32}
    AutoRound(packable_folder("llama"), **kwargs).quantize_and_save(tmp_path / "out", format="fp8,fake")
    config = json.loads((tmp_path / "out" / "fp8" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "fp8" and config["weight_block_size"] == [32, 32]
    from transformers import AutoModelForCausalLM

    native = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "fp8", dtype=torch.bfloat16)
    fake = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "fake", dtype=torch.bfloat16)
    weights = {name: tensor for name, tensor in fake.state_dict().items() if name.endswith("proj.weight")}
    assert len(weights) > 10
    for name, tensor in native.state_dict().items():
        assert name not in weights or torch.equal(tensor.bfloat16(), weights[name]), name
