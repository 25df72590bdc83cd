"""Whole runs that end in a GGUF file, judged by the `gguf` package and by Transformers' own loader of such files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from guide_matrix import GUIDE_MATRIX
from safetensors.torch import load_file

from auto_round import AutoRound
from auto_round.calibration.imatrix import read_imatrix, write_imatrix
from auto_round.codecs.ggml.search import search_blocks
from auto_round.errors import ConfigError, DataError, ModelError, OutputError, UnsupportedError, VerifyError

FILE_TYPES = sorted(name.partition(":")[2] for name in GUIDE_MATRIX if name.startswith("gguf:"))


def only(folder: str | Path) -> Path:
    """The one GGUF file of a folder."""
    (path,) = Path(folder).glob("*.gguf")
    return path


def types(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


def weights(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor, dequantized by the gguf package."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        found[tensor.name] = torch.from_numpy(values.copy()).reshape([int(n) for n in reversed(tensor.shape)])
    return found


def quantizer(folder: str, ids: list[torch.Tensor], **options: Any) -> AutoRound:
    return AutoRound(folder, dataset=ids, nsamples=4, seqlen=24, **{"iters": 0, **options})


def logits_of_file(path: Path, ids: torch.Tensor, config_from: str | None = None) -> torch.Tensor:
    """What Transformers makes of the file. It takes only a part of a configuration from a GGUF file (not the kind of
    attention of each layer, nor the width of experts), so that can be given."""
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

    given = {} if config_from is None else {"config": AutoConfig.from_pretrained(config_from)}
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **given
    )
    with torch.no_grad():
        return model.eval()(ids).logits


@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_every_file_type(
    file_type: str, gguf_folder: Callable[..., str], token_ids: list[torch.Tensor], tmp_path: Path
) -> None:
    """Transformers opens the file and computes what the dense model of the same rounding does."""
    from transformers import AutoModelForCausalLM

    ar = quantizer(gguf_folder("llama"), token_ids, disable_opt_rtn=True)
    _, (file_folder, fake_folder) = ar.quantize_and_save(tmp_path / "out", format=f"gguf:{file_type},fake")
    path = only(file_folder)
    assert path.name.endswith(f"-{file_type.upper()}.gguf")
    fake = AutoModelForCausalLM.from_pretrained(fake_folder, dtype=torch.float32).eval()
    # format fake leaves the embedding unquantized
    fake.get_input_embeddings().weight.data.copy_(weights(path)["token_embd.weight"])
    ids = token_ids[0].view(1, -1)
    with torch.no_grad():
        expected = fake(ids).logits
    found = logits_of_file(path, ids)
    assert float((found - expected).norm() / expected.norm()) < 1e-4


def test_a_mixture_by_the_rules(gguf_folder: Callable[..., str], token_ids: list[torch.Tensor], tmp_path: Path) -> None:
    ar = quantizer(gguf_folder("llama"), token_ids)
    ar.quantize_and_save(tmp_path / "out", format="gguf:q4_k_m")
    found = types(only(tmp_path / "out"))
    assert found["output.weight"] == "Q6_K" and found["token_embd.weight"] == "Q4_K"
    assert found["blk.0.attn_q.weight"] == "Q4_K" and found["blk.0.attn_norm.weight"] == "F32"
    assert {found[f"blk.{i}.ffn_down.weight"] for i in range(2)} == {"Q4_K", "Q6_K"}
    assert (tmp_path / "out" / "report.json").is_file() and not list((tmp_path / "out").glob("*.partial"))


def test_exceptions(gguf_folder: Callable[..., str], token_ids: list[torch.Tensor], tmp_path: Path) -> None:
    config = {"k_proj": {"bits": 8}, "layers.0.mlp.up_proj": "GGUF:Q2_K_S", "lm_head": "GGUF:Q8_0"}
    ar = quantizer(gguf_folder("llama"), token_ids, layer_config=config, ignore_layers="layers.1.self_attn.o_proj")
    ar.quantize_and_save(tmp_path / "out", format="gguf:q4_k_s")
    found = types(only(tmp_path / "out"))
    assert found["blk.0.attn_k.weight"] == found["blk.1.attn_k.weight"] == found["output.weight"] == "Q8_0"
    assert found["blk.0.ffn_up.weight"] == "Q2_K" and found["blk.1.ffn_up.weight"] == "Q4_K"
    assert found["blk.1.attn_output.weight"] == "F32"  # the model's own dtype
    with pytest.raises(ConfigError, match="no GGUF type has 7 bits; use one of 2, 3, 4, 5, 6, 8"):
        quantizer(gguf_folder("llama"), token_ids, layer_config={"k_proj": {"bits": 7}}).plan("gguf:q4_k_s")


def test_several_file_types_at_once(
    gguf_folder: Callable[..., str], token_ids: list[torch.Tensor], tmp_path: Path
) -> None:
    ar = quantizer(gguf_folder("llama-tied"), token_ids, iters=2)
    with pytest.raises(ConfigError, match="takes 3 runs"):
        ar.plan("auto_round,gguf:q2_k_s,gguf:q8_0")
    assert [job.formats for job in ar.plans("auto_round,gguf:q2_k_s,gguf:q8_0")] == [
        ("auto_round",), ("gguf:q2_k_s",), ("gguf:q8_0",)
    ]  # fmt: skip
    _, folders = ar.quantize_and_save(tmp_path / "out", format="gguf:q2_k_s,auto_round,gguf:q8_0")
    assert [Path(f).name for f in folders] == ["gguf-q2-k-s", "auto-round", "gguf-q8-0"]
    small, large = types(only(folders[0])), types(only(folders[2]))
    assert "output.weight" not in small and small["token_embd.weight"] == "Q6_K"  # the head shares it
    assert set(large.values()) == {"Q8_0", "F32"}


def test_the_scheme_names_the_format(
    gguf_folder: Callable[..., str], token_ids: list[torch.Tensor], tmp_path: Path
) -> None:
    ar = quantizer(gguf_folder("llama"), token_ids, scheme="GGUF:Q3_K_M", disable_opt_rtn=True)
    ar.quantize_and_save(tmp_path / "one")
    model, _ = ar.quantize()
    ar.save_quantized(tmp_path / "two")
    assert only(tmp_path / "one").read_bytes() == only(tmp_path / "two").read_bytes()
    down = weights(only(tmp_path / "two"))["blk.0.ffn_down.weight"]
    assert torch.equal(model.get_submodule("model.layers.0.mlp.down_proj").weight, down)
    with pytest.raises(UnsupportedError, match="stores .* as Q8_0, and it is quantized as"):
        ar.save_quantized(tmp_path / "three", format="gguf:q8_0")


@pytest.mark.parametrize("family", ["qwen3-moe", "qwen2", "gemma3", "gpt2"])
def test_families(family: str, gguf_folder: Callable[..., str], token_ids: list[torch.Tensor], tmp_path: Path) -> None:
    """Rotary rows, stacked experts, joined and transposed matrices: where the file has them, the same numbers are."""
    from transformers import AutoModelForCausalLM

    changes: dict[str, Any] = {
        "qwen2": {},
        "qwen3-moe": {"moe_intermediate_size": 256, "head_dim": 64, "norm_topk_prob": True},
        "gemma3": {"head_dim": 64, "query_pre_attn_scalar": 64, "layer_types": ["sliding_attention"] * 2},
        "gpt2": {"n_embd": 256, "n_head": 4},
    }[family]  # fmt: skip
    folder = gguf_folder(family, **changes)
    ar = quantizer(folder, token_ids, disable_opt_rtn=True)
    _, (file_folder, fake_folder) = ar.quantize_and_save(tmp_path / "out", format="gguf:q5_k_s,fake")
    path = only(file_folder)
    fake = AutoModelForCausalLM.from_pretrained(fake_folder, dtype=torch.float32).eval()
    fake.get_input_embeddings().weight.data.copy_(weights(path)["token_embd.weight"])
    ids = token_ids[0].view(1, -1)
    with torch.no_grad():
        expected = fake(ids).logits
    found = logits_of_file(path, ids, folder)
    assert float((found - expected).norm() / expected.norm()) < 1e-3


def test_stacked_experts(gguf_folder: Callable[..., str], token_ids: list[torch.Tensor], tmp_path: Path) -> None:
    """Transformers' loader of GGUF files does not know Mixtral's experts, so the numbers are compared by name."""
    ar = quantizer(gguf_folder("mixtral"), token_ids, disable_opt_rtn=True)
    _, (file_folder, fake_folder) = ar.quantize_and_save(tmp_path / "out", format="gguf:q4_k_m,fake")
    found, dense = weights(only(file_folder)), load_file(Path(fake_folder) / "model.safetensors")
    for block in range(2):
        prefix = f"model.layers.{block}.block_sparse_moe"
        for name, stored in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
            wanted = torch.stack([dense[f"{prefix}.experts.{expert}.{stored}.weight"] for expert in range(4)])
            assert torch.equal(found[f"blk.{block}.ffn_{name}_exps.weight"], wanted), name
        assert torch.equal(found[f"blk.{block}.ffn_gate_inp.weight"], dense[f"{prefix}.gate.weight"])
    with pytest.raises(ConfigError, match="parts of one GGUF tensor, blk.0.ffn_up_exps.weight"):
        quantizer(gguf_folder("mixtral"), token_ids, layer_config={"layers.0.mlp.experts.1.up_proj": {"bits": 8}}).plan(
            "gguf:q4_k_m"
        )


def test_importance_files(gguf_folder: Callable[..., str], token_ids: list[torch.Tensor], tmp_path: Path) -> None:
    """What calibration saw, saved and given back, makes a file without calibration data: on the same steps, but each
    code by itself, as the file has the importance of single channels only."""
    folder, saved = gguf_folder("llama"), tmp_path / "imatrix.gguf"
    quantizer(folder, token_ids, save_imatrix=saved).quantize_and_save(tmp_path / "one", format="gguf:q4_k_s")
    file = read_imatrix(saved)
    assert file.importance["blk.1.ffn_down.weight"].shape == (256,) and file.importance["blk.0.attn_q.weight"].any()
    again = AutoRound(folder, iters=0, imatrix=saved, dataset="no such data")
    assert not again.settings.needs_data
    again.quantize_and_save(tmp_path / "two", format="gguf:q4_k_s")
    first, second = weights(only(tmp_path / "one")), weights(only(tmp_path / "two"))
    dense = load_file(Path(folder) / "model.safetensors")
    for part, gguf_part in (("self_attn.o_proj", "attn_output"), ("mlp.down_proj", "ffn_down")):
        name, w = f"blk.1.{gguf_part}.weight", dense[f"model.layers.1.{part}.weight"]
        searched = search_blocks(w, types(only(tmp_path / "two"))[name][:4], file.importance[name]).dequantize()
        assert float((second[name] - searched).norm() / searched.norm()) < 1e-2, name
        # the sum over tokens is smaller with the correlations of the channels, that of single channels without
        h = file.importance[name]
        assert float(((first[name] - w).square() * h).sum()) > float(((second[name] - w).square() * h).sum())
    with pytest.raises(ConfigError, match="imatrix needs a GGUF format"):
        AutoRound(folder, iters=0, imatrix=saved).plan("auto_round")
    with pytest.raises(ConfigError, match="disable_opt_rtn turns off"):
        AutoRound(folder, iters=0, imatrix=saved, disable_opt_rtn=True).plan("gguf:q4_0")


def test_importance_files_are_looked_at_first(
    gguf_folder: Callable[..., str], token_ids: list[torch.Tensor], tmp_path: Path
) -> None:
    """One that is damaged, of another model or cannot be written stops the plan; no folder is made."""
    folder, saved, out = gguf_folder("llama"), tmp_path / "imatrix.gguf", tmp_path / "out"
    write_imatrix(saved, {"blk.0.ffn_down.weight": torch.ones(256)}, {"blk.0.ffn_down.weight": 8}, chunk_size=8)
    larger = gguf_folder("llama", intermediate_size=512)
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(saved.read_bytes()[:-40])
    for model, path in ((larger, saved), (folder, damaged), (folder, tmp_path / "absent.gguf")):
        for formats in ("gguf:q4_k_s", "gguf:q4_k_s,gguf:q8_0"):
            quantizing = AutoRound(model, iters=0, imatrix=path, dataset="no such data")
            with pytest.raises(DataError, match=r"made for another|sound|cannot read"):
                quantizing.quantize_and_save(out, format=formats)
            with pytest.raises(DataError):
                quantizing.plans(formats)
    with pytest.raises(DataError):
        AutoRound(folder, iters=0, scheme="GGUF:Q4_K_S", imatrix=damaged, dataset="no such data").quantize()
    for path, said in ((tmp_path / "absent" / "i.gguf", "does not exist; make it"), (tmp_path, "is a folder")):
        with pytest.raises(OutputError, match=said):
            quantizer(folder, token_ids, save_imatrix=path).quantize_and_save(out, format="gguf:q4_k_s")
    assert not out.exists()


def test_importance_decides_types(gguf_folder: Callable[..., str], tmp_path: Path) -> None:
    """ffn_down of the first eighth is Q4_1 in a q4_0 file whose rounding is weighed, by whatever says the weights."""
    folder, saved = gguf_folder("llama", num_hidden_layers=8), tmp_path / "imatrix.gguf"
    write_imatrix(saved, {"blk.0.ffn_down.weight": torch.ones(256)}, {"blk.0.ffn_down.weight": 8}, chunk_size=8)
    options: list[tuple[dict[str, Any], str]] = [
        ({}, "Q4_1"), ({"imatrix": saved}, "Q4_1"), ({"disable_opt_rtn": True}, "Q4_0"),
        ({"disable_opt_rtn": True, "save_imatrix": tmp_path / "out.gguf"}, "Q4_0"),
    ]  # fmt: skip
    for given, kind in options:
        plan = AutoRound(folder, iters=0, **given).plan("gguf:q4_0").gguf
        assert plan is not None
        assert [plan.types[f"blk.{i}.ffn_down.weight"] for i in (0, 1)] == [kind, "Q4_0"]


def test_refused_before_any_work(
    gguf_folder: Callable[..., str], packable_folder: Callable[..., str], token_ids: list[torch.Tensor], tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    out = tmp_path / "out"
    with pytest.raises(UnsupportedError, match=r"opt.*llama"):
        quantizer(packable_folder("opt"), token_ids).quantize_and_save(out, format="gguf:q4_0")
    with pytest.raises(UnsupportedError, match="pre-tokenizer"):
        quantizer(packable_folder("llama"), token_ids).quantize_and_save(out, format="gguf:q4_0")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(gguf_folder("llama")))
    model.name_or_path = model.config._name_or_path = ""
    with pytest.raises(ModelError, match="holds the tokenizer"):
        AutoRound(model, iters=0, dataset=token_ids).quantize_and_save(out, format="gguf:q4_0")
    with pytest.raises(ConfigError, match="unknown format 'gguf:q9_z'"):
        quantizer(gguf_folder("llama"), token_ids).quantize_and_save(out, format="gguf:q9_z")
    assert not out.exists()


def test_a_changed_byte_is_found(
    gguf_folder: Callable[..., str], token_ids: list[torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check after saving reads the file, and not what was meant to be in it."""
    from auto_round.output.gguf_writer import GgufFile

    finish = GgufFile.finish

    def damaged(self: GgufFile) -> str:
        digest = finish(self)
        with open(self.path, "r+b") as file:
            file.seek(-100, 2)
            byte = file.read(1)
            file.seek(-100, 2)
            file.write(bytes([byte[0] ^ 1]))
        return digest

    monkeypatch.setattr(GgufFile, "finish", damaged)
    with pytest.raises(VerifyError, match="do not use it"):
        quantizer(gguf_folder("llama"), token_ids, disable_opt_rtn=True).quantize_and_save(
            tmp_path / "out", format="gguf:q4_0"
        )


def test_a_model_object(gguf_folder: Callable[..., str], token_ids: list[torch.Tensor], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = gguf_folder("llama")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ar = AutoRound(model, tokenizer, iters=0, disable_opt_rtn=True, dataset=token_ids)
    with pytest.raises(ConfigError, match="take 2 runs, and a model object"):
        ar.quantize_and_save(tmp_path / "out", format="gguf:q4_0,gguf:q8_0")
    ar.quantize_and_save(tmp_path / "out", format="gguf:q4_0,fake")
    found = weights(only(tmp_path / "out" / "gguf-q4-0"))["blk.1.ffn_gate.weight"]
    assert torch.equal(
        found, load_file(tmp_path / "out" / "fake" / "model.safetensors")["model.layers.1.mlp.gate_proj.weight"]
    )


def test_codes_follow_the_outputs(
    gguf_folder: Callable[..., str], token_ids: list[torch.Tensor], tmp_path: Path
) -> None:
    """Of the layers' outputs on the calibration tokens, more is kept than when each code is the nearest; whatever the
    number of threads."""
    from transformers import AutoModelForCausalLM

    folder = gguf_folder("llama")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    name, inputs = "model.layers.1.mlp.down_proj", []
    model.get_submodule(name).register_forward_pre_hook(lambda module, args: inputs.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for ids in token_ids[:4]:
            model(ids[:24].view(1, -1))
    x, w = torch.cat(inputs), model.get_submodule(name).weight.detach()
    threads, files = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            quantizer(folder, token_ids).quantize_and_save(tmp_path / str(count), format="gguf:q3_k_s")
            files.append(only(tmp_path / str(count)))
    finally:
        torch.set_num_threads(threads)
    assert files[0].read_bytes() == files[1].read_bytes()
    error = lambda found: float((x @ (found - w).t()).norm())  # noqa: E731
    nearest = search_blocks(w, "Q3_K", x.square().sum(0)).dequantize()
    assert error(weights(files[0])["blk.1.ffn_down.weight"]) < 0.9 * error(nearest)


@pytest.mark.parametrize("family, iters", [("qwen3-moe", 0), ("qwen3-moe", 2), ("gpt2", 0)])
def test_codes_follow_the_outputs_of_experts_too(
    family: str, iters: int, gguf_folder: Callable[..., str], token_ids: list[torch.Tensor], tmp_path: Path
) -> None:
    """Few tokens reach an expert, and none some; they are stored as the others are."""
    changes: dict[str, dict[str, Any]] = {
        "qwen3-moe": {"moe_intermediate_size": 256, "head_dim": 64, "norm_topk_prob": True},
        "gpt2": {"n_embd": 256, "n_head": 4},
    }
    folder = gguf_folder(family, **changes[family])
    found = []
    for name, options in (("searched", {"iters": iters}), ("plain", {"disable_opt_rtn": True})):
        quantizer(folder, token_ids, **options).quantize_and_save(tmp_path / name, format="gguf:q2_k_s")
        found.append(logits_of_file(only(tmp_path / name), token_ids[0].view(1, -1), folder))
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(token_ids[0].view(1, -1))
    errors = [float((logits - expected.logits).norm()) for logits in found]
    assert errors[0] < errors[1]


def test_the_planned_size_is_that_of_the_file(gguf_folder: Callable[..., str], tmp_path: Path) -> None:
    """With its header, most of which are the tokenizer's words in so small a model."""
    ar = AutoRound(gguf_folder("llama"), iters=0, disable_opt_rtn=True)
    planned = ar.plan("gguf:q4_0").bytes_on_disk["gguf:q4_0"]
    ar.quantize_and_save(tmp_path / "out", "gguf:q4_0")
    (file,) = (tmp_path / "out").glob("*.gguf")
    assert abs(file.stat().st_size - planned) <= 64
