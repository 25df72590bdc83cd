from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from auto_round.cli import main


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, dtype=torch.bfloat16,
    )  # fmt: skip
    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(31)} | {"<unk>": 31}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "tiny")
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>").save_pretrained(tmp_path / "tiny")
    (tmp_path / "text.txt").write_text(" ".join(f"w{i * 7 % 31}" for i in range(100)))
    return tmp_path


@pytest.mark.parametrize("start", [["eval"], ["--eval"], None])
def test_evaluation_from_the_command_line(
    tiny: Path, capsys: pytest.CaptureFixture[str], start: list[str] | None
) -> None:
    words = [
        str(tiny / "tiny"), "--reference", str(tiny / "tiny"), "--eval_text", str(tiny / "text.txt"), "--seqlen", "20",
        "--device", "cpu", "--eval_output", str(tiny / "out.json"), "--bs", "2", "--eval_model_dtype", "fp32",
    ]  # fmt: skip
    assert (main.run_eval(words) if start is None else main.run([*start, *words])) == 0
    out = capsys.readouterr().out
    for part in ("perplexity", "mean KL divergence", "top-1 agreement", "5 windows of 20 tokens"):
        assert part in out
    got = json.loads((tiny / "out.json").read_text())
    assert abs(got["kl"]["value"]) < 1e-9 and got["agreement"]["value"] == 1.0 and got["tokens"] == 95


def test_bad_places_are_found_before_any_work(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(tiny / "tiny")
    cases: list[tuple[list[str], int, str]] = [
        ([model, "--eval_output", str(tiny / "no" / "out.json")], 6, "existing folder"),
        ([model, "--eval_text", str(tiny / "no.txt"), "--device", "cpu"], 4, "is not a file"),
        ([str(tiny / "nothing")], 3, "no model folder"),
        ([model, "--device", "0,1"], 7, "several devices"),
        ([model, "--device", "toaster"], 5, "toaster"),
    ]
    for words, code, says in cases:
        assert main.run(["eval", *words]) == code, words
        assert says in capsys.readouterr().err


def test_quantize_flags_do_not_belong_to_eval(tiny: Path, capsys: pytest.CaptureFixture[str], job: Any) -> None:
    assert main.run(["eval", str(tiny / "tiny"), "--bits", "4"]) == 2
    assert "unknown flag '--bits'" in capsys.readouterr().err
