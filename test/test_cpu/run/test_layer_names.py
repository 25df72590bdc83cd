"""Names in layer_config and ignore_layers: what they mean, and what is said of those that mean nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from auto_round import QuantizationScheme
from auto_round.cli import main
from auto_round.errors import ConfigError

GUIDE = {
    "model.decoder.layers.6.self_attn.out_proj": {"bits": 8, "group_size": 32},
    "model.decoder.layers.*k_proj": {"bits": 2, "group_size": 32},
}
Q = "model.layers.0.self_attn.q_proj"


def test_the_guides_names_of_another_model(make: Callable[..., Any], caplog: Any, tmp_path: Path) -> None:
    ar = make("llama", layer_config=GUIDE, iters=0, disable_opt_rtn=True)
    with caplog.at_level("WARNING", logger="auto_round"):
        ar.quantize_and_save(tmp_path / "out", format="auto_round")
    said = [r.getMessage() for r in caplog.records if "matches no layer" in r.getMessage()]
    assert len(said) == 2 and "o_proj" in said[0]
    with pytest.raises(ConfigError, match="matches no layer of this model; did you mean"):
        make("llama", layer_config=GUIDE, strict=True, iters=0).quantize_and_save(tmp_path / "strict")
    assert not (tmp_path / "strict").exists()


def test_a_plan_is_strict_by_default(make: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="ignore_layers: 'k_porj' matches no layer"):
        make("llama", ignore_layers="k_porj").plan()
    job = make("llama", ignore_layers="k_porj", strict=False).plan()
    assert any("k_porj" in note for note in job.notes)


def test_strict_on_the_command_line(packable_folder: Callable[..., str], capsys: Any, tmp_path: Path) -> None:
    words = [packable_folder("llama"), "--group_size", "32", "--iters", "0", "--disable_opt_rtn"]
    words += ["--layer_config", "{k_porj:{bits:8}}", "--output_dir", str(tmp_path / "out"), "--device", "cpu"]
    assert main.run([*words, "--strict"]) == ConfigError.exit_code
    assert main.run([*words, "--dry_run"]) == ConfigError.exit_code
    assert "did you mean 'k_proj'" in capsys.readouterr().err
    assert main.run([*words, "--dry_run", "--no_strict"]) == 0
    assert not (tmp_path / "out").exists()
    assert main.run(words) == 0
    assert "'k_porj' matches no layer" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model.norm", "model.embed_tokens", "lm_head", "norm", "model.layers.0"])
@pytest.mark.parametrize("entry", [{"bits": 16}, {"bits": 32}, "BF16", "float16"])
def test_16_bits_may_be_said_of_any_module(name: str, entry: Any, make: Callable[..., Any]) -> None:
    job = make("llama", layer_config={name: entry}, strict=True).plan()
    assert not any("layer_config" in note for note in job.notes)


def test_quantizing_what_is_no_linear_layer(make: Callable[..., Any]) -> None:
    ar = make("llama", layer_config={"model.embed_tokens": {"bits": 4}})
    with pytest.raises(ConfigError, match="model.embed_tokens, which is not quantized here"):
        ar.plan()
    notes = make("llama", layer_config={"model.embed_tokens": {"bits": 4}}, strict=False).plan().notes
    assert any("its entry is ignored" in note for note in notes)


@pytest.mark.parametrize(
    ("entry", "want"),
    [
        ({"scheme": "W8A16"}, {"bits": 8, "group_size": 128}),
        ({"scheme": "w8a16", "group_size": 32}, {"bits": 8, "group_size": 32}),
        ({"scheme": {"bits": 3, "group_size": 64}}, {"bits": 3, "group_size": 64}),
        ({"scheme": QuantizationScheme(bits=2, group_size=64), "sym": False}, {"bits": 2, "sym": False}),
        (QuantizationScheme(bits=2, group_size=64), {"bits": 2, "group_size": 64}),
        ("W2A16G32", {"bits": 2, "group_size": 32}),
        ({"bits": 8}, {"bits": 8, "group_size": 32}),
        (3, {"bits": 3}),
    ],
)
def test_entries(entry: Any, want: dict[str, Any], make: Callable[..., Any]) -> None:
    found = make("llama", layer_config={"q_proj": entry}).layer_config[Q]
    assert {name: found[name] for name in want} == want


def test_a_symmetric_type_in_an_entry(make: Callable[..., Any]) -> None:
    ar = make("llama", layer_config={"q_proj": {"data_type": "mx_fp8", "group_size": 32, "sym": False}})
    assert ar.layer_config[Q]["bits"] == 8 and ar.layer_config[Q]["sym"]
    assert any("sym=False is not used" in note for note in ar.plan("fake").notes)


@pytest.mark.parametrize(
    ("entry", "kind"),
    [({"bits": 6, "group_size": 32, "super_bits": 6}, "Q6_K"), ("GGUF:Q5_0", "Q5_0"), ({"bits": 8}, "Q8_0"),
     ({"bits": 16}, "F32")],
)  # fmt: skip
def test_the_embedding_of_a_gguf_file(entry: Any, kind: str, gguf_folder: Callable[..., str], tmp_path: Path) -> None:
    from gguf import GGUFReader

    from auto_round import AutoRound

    given = {"scheme": "GGUF:Q4_K_S", "iters": 0, "disable_opt_rtn": True, "device_map": "cpu", "strict": True}
    ar = AutoRound(gguf_folder("llama"), layer_config={"model.embed_tokens": entry}, **given)
    _, out = ar.quantize_and_save(tmp_path / "out")
    (file,) = Path(out).glob("*.gguf")
    found = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(file).tensors}
    assert found["token_embd.weight"] == kind
