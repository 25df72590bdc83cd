from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from auto_round.report.model_card import ModelCard, display_name, is_hub_id, render_model_card, write_model_card


def front_matter(text: str) -> dict[str, Any]:
    _, head, _ = text.split("---\n", 2)
    return yaml.safe_load(head)


def make_card(base: str = "Qwen/Qwen3-0.6B", **kw: object) -> ModelCard:
    facts: dict[str, object] = {
        "scheme": "W4A16",
        "bits_per_weight": 4.125,
        "size_bytes": 91_200_000,
        "settings": {"algorithm": "SignRound", "iters": 200, "lr": None, "sym": True},
        "data": "NeelNanda/pile-10k, 128 samples of 2048 tokens",
        "exceptions": {"lm_head": "full precision"},
        "files": {"model.safetensors": "ab" * 32},
    }
    return ModelCard(base_model=base, **{**facts, **kw})  # type: ignore[arg-type]


def test_front_matter_is_what_the_hub_reads() -> None:
    head = front_matter(render_model_card(make_card()))
    assert head["base_model"] == "Qwen/Qwen3-0.6B"
    assert head["base_model_relation"] == "quantized"
    assert head["library_name"] == "transformers"
    assert head["quantized_by"] == "auto-round"
    assert "auto-round" in head["tags"] and "w4a16" in head["tags"]  # type: ignore[operator]


def test_everything_known_is_told() -> None:
    text = render_model_card(make_card())
    for part in (
        "4.12 bits", "91.2 MB", "| iters | 200 |", "| lr | automatic |", "| sym | yes |", "128 samples of 2048",
        "| lm_head | full precision |", "AutoModelForCausalLM",
        "vllm serve", "transformers ", f"| model.safetensors | {'ab' * 32} |",
    ):  # fmt: skip
        assert part in text, part


def test_a_local_path_is_not_published(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    text = render_model_card(make_card(str(folder), files={}))
    assert str(tmp_path) not in text and "`my-model`" in text
    assert "base_model" not in front_matter(text)


@pytest.mark.parametrize("name", ["a: b #x", 'quote"d', "- item", "new\nline", "ünïcode | pipe"])
def test_odd_texts_neither_break_the_yaml_nor_the_tables(name: str) -> None:
    text = render_model_card(make_card(scheme=name, exceptions={name: "int8"}))
    assert front_matter(text)["tags"][-1] == name.split(" ")[0].lower()
    row = next(line for line in text.splitlines() if line.endswith("| int8 |"))
    assert row.replace("\\|", "").count("|") == 3


def test_nothing_known_leaves_no_empty_sections() -> None:
    text = render_model_card(ModelCard("org/m", "int4 g64 sym", "fake"))
    assert "## Quality" not in text and "## Files" not in text and "vllm" not in text
    assert "| calibration data | none |" in text


def test_many_exceptions_are_cut() -> None:
    text = render_model_card(make_card(exceptions={f"l.{i}": "int8" for i in range(100)}))
    assert "and 60 more" in text and "l.39 " in text and "l.40 " not in text


def test_names() -> None:
    assert is_hub_id("org/model-1.5B") and is_hub_id("gpt2")
    assert not is_hub_id("./here") and not is_hub_id("/a/b/c") and not is_hub_id("a/b/c")
    assert display_name("/data/models/Llama") == "Llama" and display_name("org/m") == "org/m"


def test_write(tmp_path: Path) -> None:
    assert write_model_card(tmp_path, make_card()).read_text(encoding="utf-8").startswith("---\n")
