"""Tiny models quantized by plain rounding and written by our formats, for the loader to open."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from auto_round.codecs.quantized_layer import IntCodes, QuantizedLayer
from auto_round.files import write_json
from auto_round.formats.base import ExportPlan, get_format
from auto_round.modeling.blocks import find_blocks, is_conv1d, linear_names, set_weight_2d, weight_2d
from auto_round.output.writer import ShardWriter
from auto_round.schemes import QuantizationScheme

SHARED = Path(os.environ.get("AR_TEST_SHARED") or Path(__file__).resolve().parents[4] / "shared")


@pytest.fixture
def golden() -> Path:
    folder = SHARED / "golden"
    if not folder.is_dir():
        pytest.skip("golden checkpoints are not here; set AR_TEST_SHARED")
    return folder


def round_weights(name: str, weight: torch.Tensor, scheme: QuantizationScheme, **kw: Any) -> QuantizedLayer:
    """Plain rounding of weight [out, in], with zero points from one end of the range to the other."""
    out, width = weight.shape
    size = scheme.group_size if isinstance(scheme.group_size, int) and scheme.group_size > 0 else width
    groups = -(-width // size)
    padded = torch.nn.functional.pad(weight.float(), (0, groups * size - width)).view(out, groups, size)
    top = (1 << scheme.bits) - 1
    if scheme.sym:
        scale = (padded.abs().amax(-1) / (1 << (scheme.bits - 1))).clamp(min=1e-5).half()
        zero: torch.Tensor | int = 1 << (scheme.bits - 1)
        offset = torch.full((out, groups), float(1 << (scheme.bits - 1)))
    else:
        low, high = padded.amin(-1).clamp(max=0), padded.amax(-1).clamp(min=0)
        scale = ((high - low) / top).clamp(min=1e-5).half()
        zero = torch.round(-low / scale.float()).clamp(0, top).to(torch.uint8)
        offset = zero.float()
    codes = torch.round(padded / scale.float().unsqueeze(-1)) + offset.unsqueeze(-1)
    codes = codes.clamp(0, top).to(torch.uint8).view(out, groups * size)[:, :width].contiguous()
    return QuantizedLayer(name, scheme, IntCodes(codes, scale, zero, scheme.group_size), **kw)


@dataclass
class Written:
    """A checkpoint on disk, and the same model with dequantized weights in memory."""

    folder: Path
    fake: Any
    layers: dict[str, QuantizedLayer]
    config: dict[str, Any]


@pytest.fixture
def write_checkpoint(tmp_path: Path) -> Callable[..., Written]:
    def write(
        model: Any, scheme: QuantizationScheme, layer_schemes: dict[str, QuantizationScheme] | None = None,
        format_name: str = "auto_round", max_shard_size: int | str = "1GB",
    ) -> Written:  # fmt: skip
        fmt = get_format(format_name)
        blocks = find_blocks(model)
        full = QuantizationScheme(bits=16)
        schemes = {
            n: (layer_schemes or {}).get(n, scheme if n.startswith(tuple(f"{b}." for b in blocks)) else full)
            for n in linear_names(model)
        }
        plan = ExportPlan(scheme, schemes, blocks)
        layers: dict[str, QuantizedLayer] = {}
        folder = tmp_path / "checkpoint"
        folder.mkdir()
        with ShardWriter(folder, max_shard_size) as writer:
            for name, layer_scheme in schemes.items():
                if not layer_scheme.quantizes_weights:
                    continue
                module = model.get_submodule(name)
                layer = round_weights(
                    name, weight_2d(module).detach(), layer_scheme, bias=getattr(module, "bias", None),
                    transposed=is_conv1d(module),
                )  # fmt: skip
                layers[name] = layer
                for key, tensor in fmt.pack(layer, model_dtype=module.weight.dtype).items():
                    writer.add(key, tensor.detach())
                set_weight_2d(module, layer.dequantize(module.weight.dtype))
            owned = {f"{name}.{leaf}" for name in layers for leaf in ("weight", "bias")}
            tied = set(getattr(model, "all_tied_weights_keys", None) or ())
            for key, tensor in model.state_dict().items():
                if key not in owned and key not in tied:
                    writer.add(key, tensor)
        config = fmt.config(plan)
        values = json.loads(model.config.to_json_string(use_diff=False))
        values.pop("quantization_config", None)
        if config is not None:
            values["quantization_config"] = config
        write_json(folder / "config.json", values)
        return Written(folder, model, layers, config or {})

    return write


@pytest.fixture
def llama() -> Callable[..., Any]:
    def build(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(1)
        config = LlamaConfig(
            **{
                "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False, **changes,
            }
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval().to(dtype)
        model.config.dtype = dtype
        return model

    return build
