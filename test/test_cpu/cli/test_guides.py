"""The guides of docs/: each file that they show is run as a plugin, to a model that is saved and reopened."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import older_than
from safetensors.torch import load_file

from auto_round.cli import main

DOCS = Path(__file__).resolve().parents[3] / "docs"
IDS = torch.arange(3, 30).view(1, -1)


@pytest.fixture(autouse=True)
def forget(registries: None) -> Iterator[None]:
    yield


@pytest.fixture
def guide_file(tmp_path: Path) -> Callable[[str, str], str]:
    """`guide_file(page, name)`: the code block of a page that begins with the comment `# name`, as a file."""

    def write(page: str, name: str) -> str:
        blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
        (code,) = (block for block in blocks if block.startswith(f"# {name}\n"))
        path = tmp_path / name
        path.write_text(code, encoding="utf-8")
        return str(path)

    return write


def quantize(model: str, out: Path, plugins: list[str], *flags: str) -> None:
    words = [part for file in plugins for part in ("--plugin", file)]
    assert main.run([model, *words, "--output_dir", str(out), "--device", "cpu", *flags]) == 0


def logits(folder: Path | str, **options: Any) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)(IDS).logits


def test_a_data_type_is_one_file(packable_folder: Any, tmp_path: Path, guide_file: Any) -> None:
    file = guide_file("adding-a-data-type.md", "power2.py")
    flags = ("--data_type", "power2", "--bits", "4", "--group_size", "32", "--format", "fake", "--iters", "0")
    quantize(packable_folder("llama"), tmp_path / "out", [file], *flags)
    distance = (logits(tmp_path / "out") - logits(packable_folder("llama"))).norm()
    assert 0 < distance < 0.5 * logits(packable_folder("llama")).norm()


def test_a_data_type_with_codes_and_its_format_are_two_files(
    packable_folder: Any, tmp_path: Path, guide_file: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = packable_folder("qwen2"), tmp_path / "out"
    files = [guide_file("adding-a-data-type.md", "fp6.py"), guide_file("adding-a-format.md", "byte_codes.py")]
    flags = ("--scheme", "FP6", "--iters", "2", "--nsamples", "4", "--seqlen", "16", "--dataset", "builtin")
    quantize(model, out, files, *flags, "--format", "auto_round:bytes,fake")
    packed, dense = out / "auto-round-bytes", out / "fake"
    assert torch.equal(logits(packed), logits(dense))
    model_again = tmp_path / "again"
    save_again(packed, model_again)
    assert torch.equal(logits(model_again), logits(dense))
    prompt = ("--prompt", "A", "--max_new_tokens", "2", "--device", "cpu")
    assert main.run(["generate", str(packed), *(p for f in files for p in ("--plugin", f)), *prompt]) == 0


@pytest.mark.parametrize("flags", [("--iters", "2"), ("--iters", "0", "--disable_opt_rtn")], ids=["tuned", "rounded"])
def test_codes_on_scales_of_ones_own_are_one_file(
    packable_folder: Any, tmp_path: Path, guide_file: Any, flags: tuple[str, ...]
) -> None:
    files = [
        guide_file("adding-a-data-type.md", "power2_codes.py"), guide_file("adding-a-format.md", "byte_codes.py")
    ]  # fmt: skip
    data = ("--nsamples", "4", "--seqlen", "16", "--dataset", "builtin")
    chosen = ("--data_type", "power2_codes", "--bits", "4", "--group_size", "32", "--format", "auto_round:bytes,fake")
    quantize(packable_folder("llama"), tmp_path / "out", files, *chosen, *flags, *data)
    packed = tmp_path / "out" / "auto-round-bytes"
    assert torch.equal(logits(packed), logits(tmp_path / "out" / "fake"))
    scales = [t for name, t in load_file(packed / "model.safetensors").items() if name.endswith("weight_scale")]
    assert scales and all(bool((torch.frexp(scale.float())[0].abs() == 0.5).all()) for scale in scales)


def save_again(folder: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).save_pretrained(target)


def test_a_format_holds_mixed_schemes_and_leaves_what_does_not_fit(
    packable_folder: Any, tmp_path: Path, guide_file: Any
) -> None:
    from transformers import AutoModelForCausalLM

    from auto_round.inference.linear import PackedLinear

    files = [guide_file("adding-a-data-type.md", "fp6.py"), guide_file("adding-a-format.md", "byte_codes.py")]
    layers = "{k_proj:{bits:6,data_type:fp6_e3m2},v_proj:{bits:16},up_proj:{bits:3}}"
    flags = ("--bits", "5", "--group_size", "32", "--layer_config", layers, "--format", "auto_round:bytes")
    quantize(packable_folder("llama"), tmp_path / "out", files, *flags, "--iters", "0", "--disable_opt_rtn")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    block = model.model.layers[1]
    bits = {
        name: module.format.scheme.bits if isinstance(module, PackedLinear) else 16
        for name, module in block.named_modules() if name.endswith("_proj")
    }  # fmt: skip
    assert bits["self_attn.k_proj"] == 6 and bits["self_attn.v_proj"] == 16
    assert bits["mlp.up_proj"] == 3 and bits["mlp.down_proj"] == 5


def test_a_format_refuses_what_it_cannot_hold(
    packable_folder: Any, tmp_path: Path, guide_file: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    file = guide_file("adding-a-format.md", "byte_codes.py")
    words = [packable_folder("llama"), "--plugin", file, "--asym", "--format", "auto_round:bytes"]
    assert main.run([*words, "--output_dir", str(tmp_path / "out")]) != 0
    assert "format 'auto_round:bytes' cannot hold" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
def test_a_format_holds_experts(
    packable_folder: Any, tmp_path: Path, guide_file: Any, family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = guide_file("adding-a-format.md", "byte_codes.py")
    flags = ("--bits", "5", "--group_size", "32", "--iters", "0", "--format", "auto_round:bytes,fake")
    data = ("--nsamples", "4", "--seqlen", "16", "--dataset", "builtin")
    if family == "mixtral" and older_than("transformers", "5.24"):  # 5.20 joins every name that begins like a weight's
        words = [packable_folder(family), "--plugin", file, "--output_dir", str(tmp_path / "out"), *flags, *data]
        assert main.run(words) != 0 and "fuses the experts of mixtral" in capsys.readouterr().err
        return
    quantize(packable_folder(family), tmp_path / "out", [file], *flags, *data)
    packed, dense = logits(tmp_path / "out" / "auto-round-bytes"), logits(tmp_path / "out" / "fake")
    assert torch.allclose(packed, dense, atol=1e-5)


def test_a_gguf_family_is_one_file(
    gguf_folder: Any, tmp_path: Path, guide_file: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    gguf = pytest.importorskip("gguf")
    model = str(tmp_path / "model")
    save_arcee(gguf_folder("llama"), model)
    flags = ("--format", "gguf:q8_0", "--iters", "0", "--disable_opt_rtn")
    assert main.run([model, *flags, "--output_dir", str(tmp_path / "none")]) != 0
    assert "models of type 'arcee' cannot be written as GGUF" in capsys.readouterr().err
    quantize(model, tmp_path / "out", [guide_file("adding-a-gguf-family.md", "arcee.py")], *flags)
    (file,) = (tmp_path / "out").glob("*.gguf")
    reader = gguf.GGUFReader(file)
    assert reader.get_field("general.architecture").contents() == "arcee"
    names = {tensor.name for tensor in reader.tensors}
    assert {"blk.0.ffn_up.weight", "blk.1.attn_q.weight", "output.weight"} <= names
    assert "blk.0.ffn_gate.weight" not in names


def save_arcee(llama: str, folder: str) -> None:
    """A model of the sizes and with the tokenizer of `llama`."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    sizes = AutoConfig.from_pretrained(llama).to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "bos_token_id", "eos_token_id", "tie_word_embeddings")  # fmt: skip
    config = AutoConfig.for_model("arcee", **{name: sizes[name] for name in names})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(llama).save_pretrained(folder)


def test_an_algorithm_is_one_file(packable_folder: Any, tmp_path: Path, guide_file: Any) -> None:
    model, file = packable_folder("llama"), guide_file("adding-an-algorithm.md", "clip.py")
    reference = dense_weights(model)
    errors = {}
    for name, extra in (("clip", ()), ("rtn", ("--disable_opt_rtn",))):
        out = tmp_path / name
        quantize(model, out, [file], "--algorithm", name, "--bits", "3", "--group_size", "32", *extra)
        found = dense_weights(str(out))
        errors[name] = sum(float((found[key] - reference[key]).square().sum()) for key in reference)
    assert errors["clip"] < 0.99 * errors["rtn"]
    assert '"algorithm": "clip"' in (tmp_path / "clip" / "report.json").read_text()


def dense_weights(folder: str) -> dict[str, torch.Tensor]:
    """Weights of the linear layers in the blocks, dequantized."""
    from transformers import AutoModelForCausalLM

    from auto_round.inference.linear import PackedLinear

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {
        name: (module.dequantize() if isinstance(module, PackedLinear) else module.weight).detach()
        for name, module in model.model.layers.named_modules() if name.endswith("_proj")
    }  # fmt: skip


def test_an_algorithm_is_resumed_with_the_same_bytes(
    packable_folder: Any, tmp_path: Path, guide_file: Any, stop_at: Any
) -> None:
    from auto_round import AutoRound
    from auto_round.run import blocks

    options: dict[str, Any] = dict(
        algorithm="clip",
        bits=4,
        group_size=32,
        device_map="cpu",
        plugins=guide_file("adding-an-algorithm.md", "clip.py"),
    )
    model = packable_folder("llama")
    AutoRound(model, **options).quantize_and_save(tmp_path / "whole")
    with stop_at(blocks, "_quantize_block", call=2), pytest.raises(KeyboardInterrupt):
        AutoRound(model, **options).quantize_and_save(tmp_path / "halves")
    AutoRound(model, **options).quantize_and_save(tmp_path / "halves")
    name = "model.safetensors"
    assert (tmp_path / "halves" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_backend_is_one_file(
    packable_folder: Any, tmp_path: Path, guide_file: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoRoundConfig

    file = guide_file("adding-a-backend.md", "int8_rows.py")
    flags = ("--bits", "4", "--group_size", "32", "--iters", "0", "--disable_opt_rtn")
    quantize(packable_folder("llama"), tmp_path / "out", [], *flags)
    plain = logits(tmp_path / "out", quantization_config=AutoRoundConfig(backend="torch"))
    assert main.run(["list", "backend", "--plugin", file]) == 0
    assert "int8_rows" in capsys.readouterr().out
    own = logits(tmp_path / "out", quantization_config=AutoRoundConfig(backend="int8_rows"))
    assert torch.allclose(own, plain, atol=1e-5)


def test_a_backend_is_exact(guide_file: Any) -> None:
    """As the rows of the table are tested: codes are given back, and products are near those in float64."""
    from backend_matrix import BOUNDS, build, cases
    from integer_weights import arrays

    from auto_round.inference.kernels import kernel_class
    from auto_round.inference.table import BACKENDS
    from auto_round.plugins import load_plugins

    load_plugins(guide_file("adding-a-backend.md", "int8_rows.py"))
    row = next(row for row in BACKENDS if row.name == "int8_rows")
    for case in list(cases(row, torch.float32))[::7]:
        module, weight = build(case, "cpu")
        before = arrays(module)[0]
        module.prepare()
        module.use_kernel(kernel_class(row.kernel))
        assert torch.equal(arrays(module)[0], before)
        x = torch.randn(7, case.inputs)
        expected = x.double() @ weight.T + module.bias.double()
        assert (module(x).double() - expected).norm() <= BOUNDS[torch.float32] * expected.norm()


def test_a_transform_is_one_file(packable_folder: Any, tmp_path: Path, guide_file: Any) -> None:
    from auto_round.modeling.files.safetensors import TensorFiles

    model, out = packable_folder("llama"), tmp_path / "out"
    flags = ("--scheme", "W4A16", "--group_size", "32", "--format", "fake", "--nsamples", "4", "--seqlen", "16")
    file = guide_file("adding-a-transform.md", "smooth.py")
    quantize(model, out, [file], *flags, "--algorithm", "smooth,rtn", "--dataset", "builtin")
    norm = "model.layers.1.input_layernorm.weight"
    assert not torch.equal(TensorFiles.open(out).read(norm), TensorFiles.open(Path(model)).read(norm))
    distance = (logits(out) - logits(model)).norm()
    assert 0 < distance < 0.5 * logits(model).norm()
