"""Files have the names of the source's checkpoint, and what is not quantized is there byte for byte."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import older_than
from safetensors.torch import load_file, save_file
from torch import nn

from auto_round import AutoRound
from auto_round.errors import UnsupportedError
from auto_round.formats.base import get_format

RTN: dict[str, Any] = dict(scheme="W4A16", group_size=32, iters=0, disable_opt_rtn=True, device_map="cpu")
SIZES: dict[str, Any] = dict(
    vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(
        one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)
    )  # fmt: skip


def quantize(folder: Path, out: Path, fmt: str = "auto_round", **options: Any) -> dict[str, torch.Tensor]:
    AutoRound(str(folder), tokenizer=options.pop("tokenizer", None), **(RTN | options)).quantize_and_save(out, fmt)
    return load_file(out / "model.safetensors")


@pytest.fixture(scope="module")
def invented(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A family that no version of this package knows: Mixtral under a new type, whose files call blocks `stack`, the
    attention's output `wo`, and store experts one by one as `left`, `right` and `out`."""
    from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming

    class InventedConfig(MixtralConfig):
        model_type = "invented_moe"

    class InventedForCausalLM(MixtralForCausalLM):
        config_class = InventedConfig

    AutoConfig.register("invented_moe", InventedConfig, exist_ok=True)
    AutoModelForCausalLM.register(InventedConfig, InventedForCausalLM, exist_ok=True)
    mapping = [
        WeightRenaming(r"^stack\.", "model.layers."),
        WeightRenaming(r"\.wo\.", ".o_proj."),
        WeightConverter(
            [".mlp.experts.*.left.weight", ".mlp.experts.*.right.weight"], ".mlp.experts.gate_up_proj",
            [MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(".mlp.experts.*.out.weight", ".mlp.experts.down_proj", [MergeModulelist(dim=0)]),
    ]  # fmt: skip
    register_checkpoint_conversion_mapping("invented_moe", mapping, overwrite=True)
    torch.manual_seed(5)
    config = InventedConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False)
    model = InventedForCausalLM(config)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        stored = name.replace("model.layers.", "stack.").replace(".o_proj.", ".wo.")
        if name.endswith("gate_up_proj"):
            for index, both in enumerate(tensor):
                for leaf, half in zip(("left", "right"), both.chunk(2), strict=True):
                    tensors[stored.replace("gate_up_proj", f"{index}.{leaf}.weight")] = half.contiguous()
        elif name.endswith("experts.down_proj"):
            for index, one in enumerate(tensor):
                tensors[stored.replace("down_proj", f"{index}.out.weight")] = one.contiguous()
        else:
            tensors[stored] = tensor
    tensors["mtp.fc.weight"] = torch.randn(64, 128)
    folder = tmp_path_factory.mktemp("invented")
    config.architectures = ["InventedForCausalLM"]
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    yield folder


@pytest.mark.parametrize("model_free", [False, True])
def test_a_family_of_tomorrow(model_free: bool, invented: Path, tmp_path: Path) -> None:
    """Its mapping is registered with Transformers only."""
    from transformers import AutoModelForCausalLM

    before = load_file(invented / "model.safetensors")
    after = quantize(invented, tmp_path / "out", model_free=model_free)
    packed = {name.removesuffix(".qweight") for name in after if name.endswith(".qweight")}
    matrices = ("q_proj", "k_proj", "v_proj", "wo", "left", "right", "out")
    wanted = {n.removesuffix(".weight") for n in before if n.split(".")[-2] in matrices}
    assert packed == wanted and "stack.1.mlp.experts.3.left" in packed and "stack.0.self_attn.wo" in packed
    plain = {name for name in before if name.removesuffix(".weight") not in packed}
    assert plain <= set(after) and all(same_bytes(before[name], after[name]) for name in plain)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["block_name_to_quantize"] == "stack"
    assert {"stack.0.mlp.gate", "mtp.fc"} <= set(config["extra_config"])
    fake = quantize(invented, tmp_path / "fake", "fake", model_free=model_free)
    assert set(fake) == set(before)
    ids = torch.arange(24).view(1, 24)
    logits = [
        AutoModelForCausalLM.from_pretrained(tmp_path / n, dtype=torch.float32)(ids).logits for n in ("out", "fake")
    ]
    assert torch.allclose(*logits, atol=1e-4)


def test_bases_of_names_and_dtypes(tmp_path: Path, byte_tokenizer: Any) -> None:
    """Files saved without the base model's prefix, with float32 norms in a bfloat16 model."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(2)
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)).bfloat16()
    folder = tmp_path / "source"
    model.save_pretrained(folder)
    stored = {
        name.removeprefix("model."): t.contiguous() for name, t in load_file(folder / "model.safetensors").items()
    }
    stored |= {name: t.float() for name, t in stored.items() if "norm" in name or name.endswith(".bias")}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    byte_tokenizer.save_pretrained(folder)
    for name, options in (("rtn", {}), ("free", {"model_free": True}), ("llmc", {}), ("mlx", {})):
        fmt = {"llmc": "llm_compressor", "mlx": "mlx"}.get(name, "auto_round")
        after = quantize(folder, tmp_path / name, fmt, **options)
        plain = [n for n in stored if not n.endswith("_proj.weight")]
        prefix = "model." if fmt == "mlx" else ""
        assert all(same_bytes(stored[n], after[prefix + n]) for n in plain), name
        assert any(n.startswith(f"{prefix}layers.0.self_attn.q_proj.") and "weight" in n for n in after) or any(
            n == f"{prefix}layers.0.self_attn.q_proj.qweight" for n in after
        )
    cast = quantize(folder, tmp_path / "cast", model_dtype="float16")
    assert {t.dtype for t in cast.values() if t.is_floating_point()} == {torch.float16}


@pytest.mark.parametrize("fmt", ["auto_round", "auto_gptq", "auto_awq", "llm_compressor", "fake"])
def test_tensors_that_no_module_reads_are_copied(fmt: str, tiny_folder: Any, tmp_path: Path) -> None:
    """A further layer for multi-token prediction, named as dense in every format's words."""
    source = tmp_path / "source"
    source.mkdir()
    for file in tiny_folder("llama").iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    before = load_file(source / "model.safetensors")
    before["model.layers.3.mlp.up_proj.weight"] = torch.randn(64, 32)
    before["model.layers.3.enorm.weight"] = torch.randn(32)
    before["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.randn(4)
    save_file(before, source / "model.safetensors", {"format": "pt"})
    after = quantize(source, tmp_path / "out", fmt)
    for name in ("model.layers.3.mlp.up_proj.weight", "model.layers.3.enorm.weight"):
        assert same_bytes(before[name], after[name])
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" not in after  # a table that every version computes
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["job"]["copied"]["model.layers.3.enorm.weight"] == "it belongs to multi-token prediction"
    config = json.loads((tmp_path / "out" / "config.json").read_text()).get("quantization_config", {})
    named = [*config.get("ignore", ()), *(config.get("modules_to_not_convert") or ()), *config.get("extra_config", ())]
    patterns = [rule[2:] for rule in config.get("dynamic", ()) if rule.startswith("-:")]
    patterns += [name.removeprefix("re:") for name in named if name.startswith("re:")]
    dense = "model.layers.3.mlp.up_proj"
    assert fmt == "fake" or dense in named or any(re.match(pattern, dense) for pattern in patterns)


def test_a_model_object_is_saved_under_its_checkpoints_names(tmp_path: Path, byte_tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

    torch.manual_seed(3)
    config = MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "source")
    before = load_file(tmp_path / "source" / "model.safetensors")
    for kind in ("loaded", "made"):
        model: nn.Module = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
        if kind == "made":
            fresh = MixtralForCausalLM(config)
            fresh.load_state_dict(model.state_dict())
            model = fresh
        ar = AutoRound(model, byte_tokenizer, **RTN)
        ar.quantize()
        ar.save_quantized(tmp_path / kind / "packed", "auto_round")
        ar.save_quantized(tmp_path / kind / "fake", "fake")
        packed = load_file(tmp_path / kind / "packed" / "model.safetensors")
        assert "model.layers.1.block_sparse_moe.experts.3.w2.qweight" in packed
        assert {n for n in before if not n.endswith((".w1.weight", ".w2.weight", ".w3.weight", "_proj.weight"))} <= set(
            packed
        )
        assert set(load_file(tmp_path / kind / "fake" / "model.safetensors")) == set(before)


def test_mlx_files_promise_no_layers_that_they_lack(tiny_folder: Any, tmp_path: Path) -> None:
    """mlx-lm refuses tensors of layers for multi-token prediction, so config.json counts none."""
    source = tmp_path / "source"
    source.mkdir()
    for file in tiny_folder("llama").iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    values = json.loads((source / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (source / "config.json").write_text(json.dumps(values))
    before = load_file(source / "model.safetensors") | {"model.layers.3.eh_proj.weight": torch.randn(32, 64)}
    save_file(before, source / "model.safetensors", {"format": "pt"})
    after = quantize(source, tmp_path / "mlx", "mlx")
    assert not any(".layers.3." in name for name in after)
    assert json.loads((tmp_path / "mlx" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    quantize(source, tmp_path / "plain")
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["num_nextn_predict_layers"] == 1


def test_experts_in_configurations_of_compressed_tensors(packable_folder: Any, tmp_path: Path) -> None:
    """Mixtral's names in every list; stacked experts are left unquantized: no reader would find them."""
    options = RTN | {"layer_config": {"self_attn": {"bits": 8}}}
    ar = AutoRound(packable_folder("mixtral"), **options)
    fmt = get_format("llm_compressor")
    config = fmt.config(ar.plan("llm_compressor").export_plan(fmt))
    assert config is not None
    assert r"re:.*model\.layers\.\d+\.block_sparse_moe\.gate$" in config["ignore"] and "lm_head" in config["ignore"]
    targets = [target for group in config["config_groups"].values() for target in group["targets"]]
    assert r"re:.*model\.layers\.\d+\.block_sparse_moe\.experts\.\d+\.w3$" in targets
    stacked = AutoRound(packable_folder("gpt-oss"), **RTN).plan("llm_compressor")
    experts = [layer for name, layer in stacked.layers.items() if ".experts." in name]
    assert experts and all("store all experts of a block in one tensor" in str(layer.reason) for layer in experts)


def test_experts_that_transformers_would_join_are_refused(packable_folder: Any) -> None:
    """Mixtral's are called w1, w2 and w3 in files, and Transformers joins every `experts.*.w1.weight`."""
    options = {"iters": 0, "disable_opt_rtn": True, "device_map": "cpu"}
    ar = AutoRound(packable_folder("mixtral"), scheme="MXFP8", **options)
    with pytest.raises(UnsupportedError, match="fuses the experts of mixtral"):
        ar.plan("auto_round")
    assert ar.plan("llm_compressor").quantized()
    if not older_than("transformers", "5.24"):  # 5.20 joins every name that begins like that, weight_packed too
        assert AutoRound(packable_folder("mixtral"), scheme="MXFP4", **options).plan("auto_round").quantized()
    assert AutoRound(packable_folder("qwen3-moe"), scheme="MXFP8", **options).plan("auto_round").quantized()


@pytest.mark.parametrize("fmt", ["auto_round", "auto_gptq", "llm_compressor", "fake"])
@pytest.mark.parametrize("only", ["embedding", "head"])
def test_a_tied_head_that_is_quantized_has_a_name_of_its_own(
    only: str, fmt: str, packable_folder: Any, tmp_path: Path
) -> None:
    """The checkpoint holds one tensor for the head and the embedding, under either's name; the files hold both."""
    folder = Path(packable_folder("llama-tied"))
    source = tmp_path / "source"
    source.mkdir()
    for file in folder.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    before = load_file(source / "model.safetensors")
    shared = before.pop("model.embed_tokens.weight")
    before["model.embed_tokens.weight" if only == "embedding" else "lm_head.weight"] = shared
    save_file(before, source / "model.safetensors", {"format": "pt"})
    after = quantize(source, tmp_path / "out", fmt, quant_lm_head=True)
    assert same_bytes(after["model.embed_tokens.weight"], shared)
    packed = {n for n in after if n.startswith("lm_head.")}
    assert packed if fmt != "fake" else packed == {"lm_head.weight"}
    assert not {n for n in after if n.startswith("model.embed_tokens.")} - {"model.embed_tokens.weight"}
    assert fmt != "fake" or not torch.equal(after["lm_head.weight"], shared)
