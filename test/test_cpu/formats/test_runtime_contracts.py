"""What serving engines read of a GPTQ, AWQ or auto-round checkpoint: keys, names, dtypes and shapes.

Written from what vLLM's and SGLang's loaders look up, for the cells that no program here can open.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from auto_round.formats.base import ExportPlan, get_format
from auto_round.schemes import QuantizationScheme as Scheme

IN, OUT = 256, 128
# quant_method -> keys that `from_config` asks for without a default.
REQUIRED = {
    "gptq": {"bits": int, "group_size": int, "desc_act": bool, "sym": bool, "lm_head": bool},
    "awq": {"bits": int, "group_size": int, "zero_point": bool, "modules_to_not_convert": list},
    "auto-round": {"bits": int, "group_size": int, "sym": bool, "packing_format": str, "block_name_to_quantize": str},
}
# packing_format values that engines know. Plain `auto_round` (asymmetric 2, 3, 8 bits) is opened by Transformers only.
ENGINE_PACKINGS = {"auto_round:auto_gptq", "auto_round:auto_awq"}


def config_of(name: str, scheme: Scheme) -> dict[str, Any]:
    layers = {"model.layers.0.mlp.up_proj": scheme, "lm_head": Scheme(bits=16)}
    config = get_format(name).config(ExportPlan(scheme, layers, ("model.layers.0",)))
    assert config is not None
    return config


def expected(name: str, packing: str, bits: int, groups: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Parameters that an engine makes for one linear layer before it reads the file."""
    if packing == "awq":
        weight = (IN, OUT * bits // 32)
    else:
        weight = (IN * bits // 32, OUT)
    specs = {
        f"{name}.qweight": (weight, torch.int32),
        f"{name}.qzeros": ((groups, OUT * bits // 32), torch.int32),
        f"{name}.scales": ((groups, OUT), torch.float16),
    }
    return {**specs, f"{name}.g_idx": ((IN,), torch.int32)} if packing == "gptq" else specs


@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("fmt", ["auto_gptq", "auto_awq", "auto_round", "auto_round:auto_gptq", "auto_round:auto_awq"])
def test_keys_names_dtypes_shapes(fmt: str, bits: int, sym: bool, group_size: int) -> None:
    scheme = Scheme(bits=bits, sym=sym, group_size=group_size)
    if get_format(fmt).check_scheme(scheme) is not None:
        assert fmt.endswith("awq") and bits != 4
        return
    config = config_of(fmt, scheme)
    for key, kind in REQUIRED[config["quant_method"]].items():
        assert type(config[key]) is kind, key
    assert (config["bits"], config["group_size"]) == (bits, group_size)
    method = config["quant_method"]
    packing = method if method != "auto-round" else {True: "awq", False: "plain"}["awq" in config["packing_format"]]
    if method == "auto-round" and (sym or bits == 4):
        assert config["packing_format"] in ENGINE_PACKINGS
    if method == "gptq":
        assert config["desc_act"] is False and config["checkpoint_format"] == "gptq"
    if method == "awq":
        assert config["version"] == "gemm" and config["zero_point"] is not sym
        assert config["modules_to_not_convert"] == ["lm_head"]
    groups = 1 if group_size == -1 else IN // group_size
    assert get_format(fmt).tensor_specs("a.b", scheme, IN, OUT) == expected("a.b", packing, bits, groups)


def test_a_bias_keeps_the_models_dtype() -> None:
    for fmt in ("auto_gptq", "auto_awq"):
        specs = get_format(fmt).tensor_specs("a.b", Scheme(), IN, OUT, bias_dtype=torch.bfloat16)
        assert specs["a.b.bias"] == ((OUT,), torch.bfloat16)
