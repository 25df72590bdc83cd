from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from auto_round.errors import ModelError, UnsupportedError
from auto_round.modeling.files.dequantized import READABLE
from auto_round.modeling.source import open_source

Copy = Callable[..., tuple[Path, Path]]
Folder = Callable[..., Path]
KINDS = ["fp8-block", "fp8-tensor", "fbgemm", "modelopt", "ct-tensor", "ct-channel", "ct-block", "ct-mxfp4"]
DEEPSEEK: dict[str, Any] = dict(
    vocab_size=96, hidden_size=48, intermediate_size=80, moe_intermediate_size=32, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1,
    first_k_dense_replace=1, kv_lora_rank=32, q_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16,
    n_group=2, topk_group=1, max_position_embeddings=64,
)  # fmt: skip


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    folder = tmp_path_factory.mktemp("deepseek")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.DeepseekV3Config(**DEEPSEEK)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def wide_llama(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Any]) -> Path:
    """Rows that groups of 32 fill, as MXFP4 wants them."""
    folder = tmp_path_factory.mktemp("wide")
    tiny_model("llama", hidden_size=64, intermediate_size=96).save_pretrained(folder)
    return folder


def check_equal(quantized: Path, dense: Path) -> None:
    """Every tensor, by name and block by block, as the dense checkpoint gives it."""
    one, other = open_source(quantized), open_source(dense)
    assert one.dtype == other.dtype == torch.bfloat16 and one.stored_as and not other.stored_as
    assert one.tensor_names() == other.tensor_names() and one.blocks == other.blocks and one.tied() == other.tied()
    for name in other.tensor_names():
        assert one.tensor_meta(name) == other.tensor_meta(name), name
        assert torch.equal(one.read(name), other.read(name)), name
    for block in other.blocks:
        loaded = dict(one.load(block).named_parameters())
        for name, parameter in other.load(block).named_parameters():
            assert torch.equal(loaded[name], parameter), name
        one.release(block)
        assert all(p.is_meta for p in loaded.values() if p.is_meta) and next(one._module(block).parameters()).is_meta


@pytest.mark.parametrize("kind", KINDS)
def test_read_as_the_dense_copy(kind: str, quantized_copy: Copy, wide_llama: Path) -> None:
    check_equal(*quantized_copy(wide_llama, kind, (32, 16)))


def test_blocks_cut_short_at_the_edges(quantized_copy: Copy, tiny_folder: Folder) -> None:
    """48 rows in blocks of 20: only the configuration tells the size."""
    check_equal(*quantized_copy(tiny_folder("llama"), "fp8-block", (20, 28)))


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe", "qwen2-moe", "llama-tied"])
def test_experts_and_tied_heads(family: str, quantized_copy: Copy, tiny_folder: Folder) -> None:
    check_equal(*quantized_copy(tiny_folder(family), "fp8-block", (16, 16)))


def test_deepseek(quantized_copy: Copy, deepseek: Path) -> None:
    quantized, dense = quantized_copy(deepseek, "fp8-block", (16, 20))
    check_equal(quantized, dense)
    assert open_source(quantized).stored_as == "48 tensors in FP8 e4m3"


def test_gpt_oss(quantized_copy: Copy, packable_folder: Callable[..., str]) -> None:
    folder = packable_folder("gpt-oss", intermediate_size=32)
    quantized, dense = quantized_copy(folder, "mxfp4")
    assert any(key.endswith("gate_up_proj_blocks") for key in load_file(quantized / "model.safetensors"))
    check_equal(quantized, dense)


@pytest.mark.parametrize(("family", "kind"), [("llama", "fp8-block"), ("qwen3-moe", "fp8-block"), ("gpt-oss", "mxfp4")])
def test_transformers_dequantizes_to_the_same(
    family: str, kind: str, quantized_copy: Copy, packable_folder: Callable[..., str]
) -> None:
    import transformers

    from auto_round.modeling.experts import unfuse_experts

    quantized, _ = quantized_copy(packable_folder(family), kind, (16, 16))
    wanted = {"fp8-block": transformers.FineGrainedFP8Config, "mxfp4": transformers.Mxfp4Config}[kind](dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        quantized, quantization_config=wanted, dtype=torch.bfloat16, device_map="cpu"
    )
    unfuse_experts(model)
    source = open_source(quantized)
    state = model.state_dict()
    assert set(state) == set(source.tensor_names())
    for name, tensor in state.items():
        assert torch.equal(source.read(name), tensor), name


def test_fused_experts_in_fp8(quantized_copy: Copy, tiny_folder: Folder, tmp_path: Path) -> None:
    """Transformers saves FP8 experts as one tensor with one grid of scales an expert."""
    quantized, dense = quantized_copy(tiny_folder("qwen3-moe"), "fp8-block", (8, 16))
    shutil.copytree(quantized, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    for layer in range(2):
        front = f"model.layers.{layer}.mlp.experts"
        parts: dict[tuple[str, str], list[torch.Tensor]] = {}
        for leaf in ("weight", "weight_scale_inv"):
            for proj in ("gate", "up", "down"):
                parts[proj, leaf] = [tensors.pop(f"{front}.{e}.{proj}_proj.{leaf}") for e in range(5)]
        for leaf, end in (("weight", ""), ("weight_scale_inv", "_scale_inv")):
            pairs = zip(parts["gate", leaf], parts["up", leaf], strict=True)
            tensors[f"{front}.gate_up_proj{end}"] = torch.stack([torch.cat(pair) for pair in pairs])
            tensors[f"{front}.down_proj{end}"] = torch.stack(parts["down", leaf])
    save_file(tensors, tmp_path / "model.safetensors")
    check_equal(tmp_path, dense)


def test_the_model_is_a_dense_one(quantized_copy: Copy, tiny_folder: Folder) -> None:
    quantized, _ = quantized_copy(tiny_folder("llama"), "fp8-block")
    source = open_source(quantized)
    assert not hasattr(source.config, "quantization_config")
    assert {type(m) for n, m in source.model.named_modules() if n.endswith("_proj")} == {torch.nn.Linear}
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in source.model.parameters())
    assert source.checkpoint_names("model.layers.0.mlp.up_proj.weight") == ("model.layers.0.mlp.up_proj.weight",)


def edited(folder: Path, to: Path, declared: dict[str, Any] | None, change: Callable[[Any], Any] | None = None) -> Path:
    shutil.copytree(folder, to, dirs_exist_ok=True)
    config = json.loads((to / "config.json").read_text())
    config.pop("quantization_config", None)
    (to / "config.json").write_text(
        json.dumps(config | ({} if declared is None else {"quantization_config": declared}))
    )
    if change is not None:
        tensors = load_file(to / "model.safetensors")
        change(tensors)
        save_file(tensors, to / "model.safetensors")
    return to


COMPRESSED = {"quant_method": "compressed-tensors", "quantization_status": "compressed"}
FLOAT8 = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "tensor"}}


@pytest.mark.parametrize(
    ("declared", "says"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq, 4 bits"),
        ({"quant_method": "awq", "w_bit": 4}, "awq, 4 bits"),
        ({"quant_method": "auto-round", "bits": 4}, "auto-round, 4 bits"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"bits": 4}, "quant_method not given, 4 bits"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt NVFP4"),
        ({"quant_method": "modelopt", "quantization": {"quant_algo": "W4A8_AWQ"}}, "modelopt W4A8_AWQ"),
        ({"quant_method": "fp8", "expert_dtype": "fp4"}, "experts in fp4"),
        ({**COMPRESSED, "format": "pack-quantized", "config_groups": {}}, "compressed-tensors pack-quantized"),
        (
            {**COMPRESSED, "format": "mixed-precision", "config_groups": {"a": {**FLOAT8, "format": "int-quantized"}}},
            "compressed-tensors int-quantized",
        ),
        (
            {**COMPRESSED, "format": "naive-quantized", "config_groups": {"a": {"weights": {"type": "int"}}}},
            "naive-quantized of integers",
        ),
        (
            {
                **COMPRESSED, "format": "float-quantized", "config_groups": {"a": FLOAT8},
                "transform_config": {"config_groups": {"r1": {}}},
            },
            "rotations",
        ),
        (
            {
                **COMPRESSED, "format": "float-quantized", "config_groups": {"a": FLOAT8},
                "sparsity_config": {"format": "sparse-24-bitmask"},
            },
            "sparse-24-bitmask",
        ),
    ],
)  # fmt: skip
def test_others_are_refused_by_name(
    declared: dict[str, Any], says: str, tiny_folder: Folder, tmp_path: Path
) -> None:  # fmt: skip
    folder = edited(tiny_folder("llama"), tmp_path, declared)
    with pytest.raises(UnsupportedError, match="quantized already") as caught:
        open_source(folder)
    assert says in str(caught.value) and READABLE in str(caught.value)


def test_modelopt_declares_in_a_file_of_its_own(quantized_copy: Copy, tiny_folder: Folder, tmp_path: Path) -> None:
    quantized, dense = quantized_copy(tiny_folder("llama"), "modelopt")
    folder = edited(quantized, tmp_path, None)
    check_equal(folder, dense)
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    check_equal(folder, dense)
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    with pytest.raises(UnsupportedError, match="modelopt NVFP4"):
        open_source(folder)


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(f"{UP}_scale_inv"), f"'{UP}' has no scale"),
        (lambda t: t.update({f"{UP}_scale_inv": torch.ones(7)}), "do not match"),
        (lambda t: t.update({f"{UP}_scale_inv": torch.ones(5, 5)}), "do not match"),
        (lambda t: [t.pop(k) for k in list(t) if k.startswith("model.layers.1.mlp.up_proj")], "is missing"),
    ],
)
def test_damaged_checkpoints(
    change: Any, says: str, quantized_copy: Copy, tiny_folder: Folder, tmp_path: Path
) -> None:  # fmt: skip
    quantized, _ = quantized_copy(tiny_folder("llama"), "fp8-block", (16, 16))
    folder = edited(quantized, tmp_path, {"quant_method": "fp8", "weight_block_size": [16, 16]}, change)
    with pytest.raises(ModelError, match=says):
        open_source(folder)


def test_a_declaration_without_quantized_tensors(tiny_folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"declares a quantization \(fp8\), but no quantized tensor"):
        open_source(edited(tiny_folder("llama"), tmp_path, {"quant_method": "fp8"}))


def test_scales_that_are_not_numbers_are_named(quantized_copy: Copy, tiny_folder: Folder, tmp_path: Path) -> None:
    from auto_round.errors import NumericsError

    quantized, _ = quantized_copy(tiny_folder("llama"), "fp8-block", (16, 16))

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{UP}_scale_inv"][0, 0] = torch.nan

    folder = edited(quantized, tmp_path, {"quant_method": "fp8", "weight_block_size": [16, 16]}, damage)
    source = open_source(folder)
    source.load("model.layers.0")
    with pytest.raises(NumericsError, match=f"'{UP}' holds 256 NaN"):
        source.load("model.layers.1")


def test_a_model_object_with_quantized_weights_is_refused(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    up = model.model.layers[0].mlp.up_proj
    up.weight = torch.nn.Parameter(up.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(UnsupportedError, match=r"up_proj.weight.*float8_e4m3fn.*Give its path"):
        open_source(model)


def test_no_more_than_one_block_is_in_memory(
    quantized_copy: Copy, tiny_model: Callable[..., Any], tmp_path: Path
) -> None:  # fmt: skip
    import psutil

    tiny_model("llama", hidden_size=256, intermediate_size=8192, num_hidden_layers=12).save_pretrained(tmp_path)
    quantized, _ = quantized_copy(tmp_path, "fp8-block")
    process = psutil.Process()
    source = open_source(quantized)
    block_bytes = sum(p.numel() * p.element_size() for p in source.load(source.blocks[0]).parameters())
    source.release(source.blocks[0])
    start = process.memory_info().rss
    after = []
    for _ in range(2):  # what is freed may stay with the allocator: it must not grow from block to block
        for name in source.blocks:
            source.load(name)
            assert process.memory_info().rss < start + 7 * block_bytes  # of twelve
            source.release(name)
        after.append(process.memory_info().rss)
    assert after[1] < after[0] + 3 * block_bytes
