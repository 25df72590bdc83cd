from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from auto_round.errors import ConfigError, ModelError, NumericsError, UnsupportedError
from auto_round.modeling.checkpoint import CheckpointSource
from auto_round.modeling.source import open_source

Folder = Callable[..., Path]
FAMILIES = ["llama", "llama-tied", "opt", "gpt2", "gemma3", "falcon-alibi", "mixtral", "qwen3-moe", "olmo-hybrid"]


def copy(folder: Path, to: Path, change: Callable[[dict[str, torch.Tensor]], Any] | None = None) -> Path:
    """A writable copy whose tensors went through `change` (in place, or returned)."""
    shutil.copytree(folder, to, dirs_exist_ok=True)
    if change is not None:
        tensors = load_file(to / "model.safetensors")
        tensors = change(tensors) or tensors
        save_file({k: v.contiguous() for k, v in tensors.items()}, to / "model.safetensors", metadata={"format": "pt"})
    return to


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def reference_state(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors as Transformers itself loads them, experts cut into linear layers."""
    from transformers import AutoModelForCausalLM

    from auto_round.modeling.experts import unfuse_experts

    model = AutoModelForCausalLM.from_pretrained(folder)
    unfuse_experts(model)
    return model.state_dict()


@pytest.mark.parametrize("family", FAMILIES)
def test_reads_what_transformers_reads(family: str, tiny_folder: Folder) -> None:
    folder = tiny_folder(family)
    source, wanted = open_source(folder), reference_state(folder)
    assert sorted(source.tensor_names()) == sorted(wanted)
    for name, tensor in wanted.items():
        got = source.read(name)
        assert torch.equal(got, tensor), name
        assert source.tensor_meta(name) == (tuple(got.shape), got.dtype)
    for name in (*source.non_block_module_names(), *source.blocks):
        for leaf, parameter in source.load(name).named_parameters():
            assert torch.equal(parameter, wanted[f"{name}.{leaf}"]) and not parameter.requires_grad
        source.release(name)
    assert all(p.is_meta for p in source.model.parameters())
    assert not any(b.is_meta for b in source.model.buffers())


def test_shards_are_read_by_their_index(tiny_folder: Folder) -> None:
    folder = tiny_folder("llama", max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    source, wanted = open_source(folder), reference_state(folder)
    assert all(torch.equal(source.read(n), wanted[n]) for n in wanted)


def test_blocks_and_outside_modules(tiny_folder: Folder) -> None:
    source = open_source(tiny_folder("opt"))
    assert source.blocks == tuple(f"model.decoder.layers.{i}" for i in range(3))
    assert {m.rpartition(".")[2] for m in source.non_block_module_names()} >= {
        "embed_tokens",
        "project_in",
        "project_out",
    }
    assert open_source(tiny_folder("gpt2")).blocks == tuple(f"transformer.h.{i}" for i in range(3))


def test_tied_head_gives_the_canonical_tensor(tiny_folder: Folder) -> None:
    source = open_source(tiny_folder("llama-tied"))
    assert source.tied() == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" in source.tensor_names()
    assert torch.equal(source.read("lm_head.weight"), source.read("model.embed_tokens.weight"))
    head = source.load("lm_head")
    embedding = source.load("model.embed_tokens")
    assert head.weight is embedding.weight, "one copy in memory"
    source.release("lm_head")
    assert head.weight.is_meta and not embedding.weight.is_meta


def test_tie_follows_the_checkpoint(tiny_folder: Folder, tmp_path: Path) -> None:
    tied = tiny_folder("llama-tied")

    def only_alias(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    def both_equal(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    def both_different(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    for change, is_tied in ((only_alias, True), (both_equal, True), (both_different, False)):
        folder = copy(tied, tmp_path / change.__name__, change)
        source, wanted = open_source(folder), reference_state(folder)
        assert bool(source.tied()) is is_tied, change.__name__
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            assert torch.equal(source.read(name), wanted[name]), change.__name__


def test_base_model_prefix_may_be_missing(tiny_folder: Folder, tmp_path: Path) -> None:
    """GPT-2's own checkpoint has no `transformer.` before its names."""
    folder = copy(
        tiny_folder("gpt2"), tmp_path, lambda t: {k.removeprefix("transformer."): v for k, v in t.items()}
    )  # fmt: skip
    source = open_source(folder)
    assert torch.equal(
        source.read("transformer.h.1.attn.c_attn.weight"), reference_state(folder)["transformer.h.1.attn.c_attn.weight"]
    )
    assert source.checkpoint_names("transformer.h.1.attn.c_attn.weight") == ("h.1.attn.c_attn.weight",)


def test_experts_keep_their_checkpoint_names(tiny_folder: Folder) -> None:
    source = open_source(tiny_folder("mixtral"))
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    assert source.checkpoint_names(name) == ("model.layers.1.block_sparse_moe.experts.3.w3.weight",)
    assert source.tensor_meta(name)[0] == (48, 32)


def test_fused_experts_in_the_checkpoint_are_cut(tiny_folder: Folder, tmp_path: Path) -> None:
    def fuse(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        out = {k: v for k, v in tensors.items() if ".experts." not in k}
        for layer in range(2):
            old = f"model.layers.{layer}.block_sparse_moe.experts"
            new = f"model.layers.{layer}.mlp.experts"
            pairs = [torch.cat([tensors[f"{old}.{e}.{w}.weight"] for w in ("w1", "w3")]) for e in range(5)]
            out[f"{new}.gate_up_proj"] = torch.stack(pairs)
            out[f"{new}.down_proj"] = torch.stack([tensors[f"{old}.{e}.w2.weight"] for e in range(5)])
        return out

    folder = tiny_folder("mixtral")
    one_by_one, fused = open_source(folder), open_source(copy(folder, tmp_path, fuse))
    for name in one_by_one.tensor_names():
        assert torch.equal(one_by_one.read(name), fused.read(name)), name
    block = fused.load("model.layers.0")
    experts = block.mlp.experts
    for name, parameter in block.named_parameters():
        assert torch.equal(parameter, one_by_one.read(f"model.layers.0.{name}")), name
    where = lambda e, leaf: getattr(getattr(experts, str(e)), leaf).weight.untyped_storage().data_ptr()
    assert all(where(e, "gate_proj") == where(e, "up_proj") for e in range(5)), "halves of the one row that was read"
    assert len({where(e, "gate_proj") for e in range(5)}) == 5, "an expert's memory is its own"


def test_names_of_our_own_unfused_layout_are_read(tiny_folder: Folder, tmp_path: Path) -> None:
    original = open_source(tiny_folder("mixtral"))
    tensors = {n: original.read(n) for n in original.tensor_names()}
    ours = open_source(copy(tiny_folder("mixtral"), tmp_path, lambda _t: tensors))
    assert all(torch.equal(ours.read(n), t) for n, t in tensors.items())


def test_one_checkpoint_tensor_may_give_several(tiny_folder: Folder) -> None:
    """HRM stores gate, q, k and v as one matrix; Transformers splits it."""
    import transformers
    from accelerate import init_empty_weights

    from auto_round.modeling.files.safetensors import TensorFiles
    from auto_round.modeling.tensor_map import plan_tensors, read_origin

    folder = tiny_folder("hrm-text")
    files, wanted = TensorFiles.open(folder), reference_state(folder)
    assert any("gqkv_proj" in key for key in files)
    with init_empty_weights(include_buffers=False):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    plans = plan_tensors(files, model, list(wanted), dict(model.state_dict()))
    for name, tensor in wanted.items():
        assert torch.equal(read_origin(plans[name].origin, files, model)[plans[name].name], tensor), name


def test_dtype_of_config_argument_and_majority(tiny_folder: Folder, tmp_path: Path) -> None:
    half = copy(tiny_folder("llama"), tmp_path / "half", lambda t: {k: v.bfloat16() for k, v in t.items()})
    assert open_source(half).dtype == torch.float32, "config.json says float32"
    assert open_source(half).read("model.norm.weight").dtype == torch.float32
    edit_config(half, dtype=None)
    assert open_source(half).dtype == torch.bfloat16, "most weights are"
    source = open_source(tiny_folder("llama"), dtype="float16")
    assert {p.dtype for p in source.load("model.layers.0").parameters()} == {torch.float16}
    assert source.read("lm_head.weight").dtype == source.tensor_meta("lm_head.weight")[1] == torch.float16
    with pytest.raises(ConfigError, match="int8"):
        open_source(tiny_folder("llama"), dtype="int8")


def test_loading_again_keeps_changed_weights_and_release_drops_them(tiny_folder: Folder) -> None:
    source = open_source(tiny_folder("llama"))
    block = source.load("model.layers.0")
    with torch.no_grad():
        block.mlp.up_proj.weight.zero_()
    assert source.load("model.layers.0").mlp.up_proj.weight.abs().sum() == 0
    source.release("model.layers.0")
    assert source.load("model.layers.0").mlp.up_proj.weight.abs().sum() > 0


def test_release_frees_replaced_modules_too(tiny_folder: Folder) -> None:
    source = open_source(tiny_folder("llama"))
    block = source.load("model.layers.0")
    block.mlp.up_proj = torch.nn.Sequential(block.mlp.up_proj)
    source.release("model.layers.0")
    assert all(p.is_meta for p in block.parameters())


def test_nothing_of_the_files_stays_mapped_or_resident(tmp_path: Path, tiny_model: Callable[..., Any]) -> None:
    import psutil

    model = tiny_model("llama", hidden_size=256, intermediate_size=8192, num_hidden_layers=6)
    model.save_pretrained(tmp_path)
    block_bytes = sum(p.numel() * p.element_size() for p in model.model.layers[0].parameters())
    del model
    process = psutil.Process()
    source = open_source(tmp_path)
    source.load(source.blocks[0])
    source.release(source.blocks[0])
    before = process.memory_info().rss
    for name in source.blocks:
        source.load(name)
        assert process.memory_info().rss < before + 1.5 * block_bytes
        source.release(name)
    assert process.memory_info().rss < before + 0.5 * block_bytes
    assert not any("safetensors" in m.path and str(tmp_path) in m.path for m in process.memory_maps())


def test_persistent_buffers_come_from_the_checkpoint(tiny_folder: Folder, tmp_path: Path) -> None:
    """A buffer that Transformers saves, here added to a block by `prepare`, keeps the model's or the files' dtype."""

    def prepare(model: torch.nn.Module) -> None:
        norm = model.model.layers[0].input_layernorm
        norm.register_buffer("bias_correction", torch.zeros(4))
        norm.register_buffer("lazy", torch.empty(4, dtype=torch.float16, device="meta"))
        norm.register_buffer("table", torch.ones(3), persistent=False)

    prefix = "model.layers.0.input_layernorm"
    folder = copy(
        tiny_folder("llama"),
        tmp_path,
        lambda t: t | {f"{prefix}.bias_correction": torch.arange(4).half(), f"{prefix}.lazy": torch.arange(4).half()},
    )
    source = CheckpointSource(folder, prepare=prepare)
    norm = source.model.model.layers[0].input_layernorm
    assert torch.equal(norm.bias_correction, torch.arange(4).float())
    assert norm.lazy.is_meta
    source.load("model.layers.0")
    assert norm.lazy.tolist() == [0, 1, 2, 3] and norm.lazy.dtype == torch.float16
    source.release("model.layers.0")
    assert norm.lazy.is_meta and not norm.bias_correction.is_meta and norm.table.tolist() == [1, 1, 1]
    assert f"{prefix}.table" not in source.tensor_names()


class Packed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.empty(4, 48, dtype=torch.int32, device="meta"))
        self.register_buffer("scales", torch.empty(1, 48, dtype=torch.float16, device="meta"))


def test_quantized_checkpoint_needs_prepare(tiny_folder: Folder, tmp_path: Path) -> None:
    codes = torch.arange(4 * 48, dtype=torch.int32).view(4, 48)

    def pack(tensors: dict[str, torch.Tensor]) -> None:
        for i in range(3):
            del tensors[f"model.layers.{i}.mlp.up_proj.weight"]
            tensors[f"model.layers.{i}.mlp.up_proj.qweight"] = codes + i
            tensors[f"model.layers.{i}.mlp.up_proj.scales"] = torch.full((1, 48), 0.5, dtype=torch.float16)

    def prepare(model: torch.nn.Module) -> None:
        for layer in model.model.layers:
            layer.mlp.up_proj = Packed()

    folder = copy(tiny_folder("llama"), tmp_path, pack)
    edit_config(folder, quantization_config={"quant_method": "auto-round", "bits": 4, "group_size": 32})
    with pytest.raises(UnsupportedError, match="quantized already"):
        open_source(folder)
    source = CheckpointSource(folder, prepare=prepare)
    assert source.tensor_meta("model.layers.2.mlp.up_proj.qweight") == ((4, 48), torch.int32)
    packed = source.load("model.layers.2").mlp.up_proj
    assert torch.equal(packed.qweight, codes + 2) and packed.scales.dtype == torch.float16
    source.release("model.layers.2")
    assert packed.qweight.is_meta


def test_missing_and_misshapen_tensors_are_named(tiny_folder: Folder, tmp_path: Path) -> None:
    lacking = copy(
        tiny_folder("llama"),
        tmp_path / "a",
        lambda t: {k: v for k, v in t.items() if k != "model.layers.1.mlp.up_proj.weight"},
    )
    with pytest.raises(ModelError, match=r"'model.layers.1.mlp.up_proj.weight'.*missing"):
        open_source(lacking)
    bent = copy(tiny_folder("llama"), tmp_path / "b", lambda t: t.update({"model.norm.weight": torch.ones(31)}))
    with pytest.raises(ModelError, match=r"model.safetensors: tensor 'model.norm.weight' has shape \[31\].*\[32\]"):
        open_source(bent)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_damaged_weights_are_named(bad: float, tiny_folder: Folder, tmp_path: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = bad

    source = open_source(copy(tiny_folder("llama"), tmp_path, damage))
    source.load("model.layers.0")
    with pytest.raises(NumericsError, match=r"'model.layers.1.mlp.up_proj.weight' holds"):
        source.load("model.layers.1")


def test_unknown_names(tiny_folder: Folder) -> None:
    source = open_source(tiny_folder("llama"))
    with pytest.raises(ModelError, match="no module 'model.layers.9'"):
        source.load("model.layers.9")
    with pytest.raises(ModelError, match="no tensor 'model.what'"):
        source.read("model.what")


def test_loading_the_root_loads_no_block(tiny_folder: Folder) -> None:
    source = open_source(tiny_folder("llama"))
    source.load("")
    source.load("model")
    assert all(p.is_meta for p in source.model.parameters())


class TestRefused:
    def test_not_a_causal_model(self, tmp_path: Path) -> None:
        import transformers

        small = dict(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        transformers.BertConfig(**small, architectures=["BertForMaskedLM"]).save_pretrained(tmp_path / "bert")
        with pytest.raises(ModelError, match="not a causal language model.*BertForMaskedLM"):
            open_source(tmp_path / "bert")
        transformers.RobertaConfig(**small).save_pretrained(tmp_path / "roberta")
        with pytest.raises(ModelError, match="not a causal language model.*RobertaConfig"):
            open_source(tmp_path / "roberta")
        transformers.T5Config(d_model=16).save_pretrained(tmp_path / "t5")
        with pytest.raises(ModelError, match="encoder-decoder"):
            open_source(tmp_path / "t5")
        transformers.ViTConfig(**{k: v for k, v in small.items() if k != "vocab_size"}).save_pretrained(
            tmp_path / "vit"
        )
        with pytest.raises(ModelError, match="knows no model for its ViTConfig"):
            open_source(tmp_path / "vit")

    def test_blocks_that_run_in_turns(self, tiny_folder: Folder) -> None:
        with pytest.raises(
            UnsupportedError, match=r"several stacks.*H_module.layers.*L_module|several stacks.*L_module"
        ):
            open_source(tiny_folder("hrm-text"))

    def test_config_problems(self, tiny_folder: Folder, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        with pytest.raises(ModelError, match="no config.json"):
            open_source(tmp_path / "empty")
        folder = copy(tiny_folder("llama"), tmp_path / "broken")
        (folder / "config.json").write_text("{")
        with pytest.raises(ModelError, match="config.json is not JSON"):
            open_source(folder)
        (folder / "config.json").write_text(json.dumps({"model_type": "no-such-type"}))
        with pytest.raises(ModelError, match="config.json cannot be used.*no-such-type"):
            open_source(folder)

    def test_remote_code_is_not_run(self, tiny_folder: Folder, tmp_path: Path) -> None:
        folder = copy(tiny_folder("llama"), tmp_path)
        auto = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
        edit_config(folder, model_type="evil", auto_map=auto)
        (folder / "evil.py").write_text("raise SystemExit('remote code ran')")
        with pytest.raises(ModelError, match="trust_remote_code"):
            open_source(folder)
