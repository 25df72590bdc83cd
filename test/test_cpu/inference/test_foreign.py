"""GPTQ and AWQ checkpoints, ours and others', through `AutoRoundConfig()`; and saved again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from auto_round.eval.evaluate import load_model
from auto_round.inference.linear import QuantLinear
from auto_round.layouts.integers import GPTQ_V1
from auto_round.schemes import QuantizationScheme as Scheme

IDS = torch.tensor([[1, 5, 9, 2, 44, 17, 3, 8], [7, 7, 1, 0, 60, 31, 12, 2]])


def open_model(folder: Path, **kwargs: Any) -> Any:
    from transformers import AutoModelForCausalLM, AutoRoundConfig

    kwargs.setdefault("quantization_config", AutoRoundConfig())
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **kwargs)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def check(written: Any, tmp_path: Path, **kwargs: Any) -> Any:
    """Opens with the right logits and integers, and once saved opens again, without being told how."""
    from transformers import AutoModelForCausalLM

    model = open_model(written.folder, **kwargs)
    wanted = logits(written.fake)
    assert float((logits(model) - wanted).norm() / wanted.norm()) < 1e-5
    packed = [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]
    assert sorted(packed) == sorted(written.layers)
    for name, layer in written.layers.items():
        assert torch.equal(model.get_submodule(name).dequantize(), layer.dequantize()), name
    model.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert saved["quant_method"] == "auto-round" and saved["block_name_to_quantize"] == "model.layers"
    assert not {"dynamic", "modules_to_not_convert", "desc_act", "zero_point"} & set(saved)
    first, second = load_file(written.folder / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert set(first) == set(second) and all(torch.equal(second[k], v) for k, v in first.items())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(logits(again), logits(model))
    return model


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_gptq(
    llama: Callable[..., Any], write_checkpoint: Callable[..., Any], tmp_path: Path, bits: int, sym: bool
) -> None:
    scheme = Scheme(bits=bits, sym=sym, group_size=32)
    check(write_checkpoint(llama(attention_bias=True), scheme, None, "auto_gptq"), tmp_path)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group_size", [32, -1])
def test_awq(
    llama: Callable[..., Any], write_checkpoint: Callable[..., Any], tmp_path: Path, sym: bool, group_size: int
) -> None:
    dense = {"model.layers.1.mlp.up_proj": Scheme(bits=16)}
    check(write_checkpoint(llama(), Scheme(sym=sym, group_size=group_size), dense, "auto_awq"), tmp_path)


def test_gptq_with_rules_for_single_layers_and_a_packed_head(
    llama: Callable[..., Any], write_checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    layers = {
        "model.layers.0.self_attn.k_proj": Scheme(bits=8, group_size=32),
        "model.layers.1.mlp.down_proj": Scheme(bits=16),
        "model.layers.1.self_attn.q_proj": Scheme(bits=2, group_size=16, sym=False),
        "lm_head": Scheme(bits=8, group_size=64),
    }
    written = write_checkpoint(llama(), Scheme(group_size=32), layers, "auto_gptq")
    assert len(written.config["dynamic"]) == 4 and written.config["lm_head"]
    check(written, tmp_path)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def keep(*keys: str, **more: Any) -> Callable[[dict[str, Any]], None]:
    """Leave only these keys of the config: what another writer would have written."""

    def change(config: dict[str, Any]) -> None:
        kept = {key: config[key] for key in ("quant_method", "bits", "group_size", *keys) if key in config}
        config.clear()
        config.update({**kept, **more})

    return change


@pytest.mark.parametrize("g_idx", [True, False])
def test_gptq_as_others_write_it(
    llama: Callable[..., Any], write_checkpoint: Callable[..., Any], tmp_path: Path, g_idx: bool
) -> None:
    """No block names, no provider; some leave `g_idx` out when the order is plain."""
    written = write_checkpoint(llama(), Scheme(group_size=32), None, "auto_gptq")
    rewrite(written.folder, keep("sym", "desc_act", "true_sequential", "damp_percent"))
    if not g_idx:
        tensors = load_file(written.folder / "model.safetensors")
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("g_idx")}
        save_file(tensors, written.folder / "model.safetensors", metadata={"format": "pt"})
    check(written, tmp_path)


def test_gptq_v2(llama: Callable[..., Any], write_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    """The same layout with zero points as they are."""
    scheme = Scheme(bits=8, sym=False, group_size=32)
    written = write_checkpoint(llama(), scheme, None, "auto_round")
    assert written.config["packing_format"] == "auto_round"
    rewrite(written.folder, keep("sym", quant_method="gptq", desc_act=False, checkpoint_format="gptq_v2"))
    check(written, tmp_path)


def test_groups_in_any_order(llama: Callable[..., Any], write_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    """`desc_act`: columns belong to groups in the order of `g_idx`. Shuffled columns of the layer's inputs and outputs
    of the layer before it must give the same function."""
    written = write_checkpoint(llama(), Scheme(group_size=32), None, "auto_gptq")
    tensors = load_file(written.folder / "model.safetensors")
    expected = logits(open_model(written.folder))
    unpack = lambda name: (
        GPTQ_V1.codes(tensors[f"{name}.qweight"], 4), GPTQ_V1.zeros(tensors[f"{name}.qzeros"], 4)
    )  # fmt: skip
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    for i in range(2):
        mlp = f"model.layers.{i}.mlp"
        codes, zeros = unpack(f"{mlp}.down_proj")
        tensors[f"{mlp}.down_proj.qweight"] = GPTQ_V1.words(codes[:, order], zeros, 4)[0]
        tensors[f"{mlp}.down_proj.g_idx"] = tensors[f"{mlp}.down_proj.g_idx"][order].contiguous()
        for leaf in ("gate_proj", "up_proj"):
            codes, zeros = unpack(f"{mlp}.{leaf}")
            qweight, qzeros = GPTQ_V1.words(codes[order], zeros[order], 4)
            tensors[f"{mlp}.{leaf}.qweight"], tensors[f"{mlp}.{leaf}.qzeros"] = qweight, qzeros
            tensors[f"{mlp}.{leaf}.scales"] = tensors[f"{mlp}.{leaf}.scales"][:, order].contiguous()
    save_file(tensors, written.folder / "model.safetensors", metadata={"format": "pt"})
    rewrite(written.folder, lambda c: c.update(desc_act=True))
    model = open_model(written.folder)
    assert torch.allclose(logits(model), expected, atol=1e-5)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(open_model(tmp_path / "again")), logits(model))


@pytest.mark.parametrize("old_names", [True, False])
def test_awq_as_others_write_it(
    llama: Callable[..., Any], write_checkpoint: Callable[..., Any], tmp_path: Path, old_names: bool
) -> None:
    dense = {f"model.layers.{i}.mlp.down_proj": Scheme(bits=16) for i in range(2)}
    written = write_checkpoint(llama(), Scheme(sym=False, group_size=32), dense, "auto_awq")
    rewrite(written.folder, keep(zero_point=True, version="gemm", modules_to_not_convert=["down_proj"]))
    if old_names:
        rewrite(written.folder, lambda c: c.update(w_bit=c.pop("bits"), q_group_size=c.pop("group_size")))
    model = check(written, tmp_path)
    assert not next(m for m in model.modules() if isinstance(m, QuantLinear)).format.scheme.sym


def test_without_other_packages_transformers_says_what_it_misses(
    llama: Callable[..., Any], write_checkpoint: Callable[..., Any]
) -> None:
    """The plain way asks for gptqmodel; the guide's way does not, and measuring takes it by itself."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import is_gptqmodel_available

    written = write_checkpoint(llama(), Scheme(group_size=32), None, "auto_awq")
    if not is_gptqmodel_available():
        with pytest.raises(ImportError, match="gptqmodel"):
            AutoModelForCausalLM.from_pretrained(written.folder)
    model = load_model(written.folder, dtype=torch.float32)
    assert torch.equal(logits(model), logits(open_model(written.folder)))
