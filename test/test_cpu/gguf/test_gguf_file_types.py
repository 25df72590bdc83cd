"""Which tensor gets which type: against what llama-quantize said for the same tensors (`tools/make_gguf_types.py`)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import pytest

from auto_round.codecs.ggml.types import GGML_TYPES
from auto_round.gguf.file_types import FILE_TYPES, ModelDimensions, fallback_notes, quantizable, tensor_types

EXPECTED: dict[str, Any] = json.loads(Path(__file__).with_name("llama_types.json").read_text(encoding="utf-8"))
LETTERS: dict[str, str] = EXPECTED.pop("letters")


def tensors_of(model: dict[str, Any]) -> list[tuple[str, list[int]]]:
    found, first = list(model["outside"].items()), 0
    for count, block in model["blocks"]:
        for suffix, shape in block.items():
            found += [(f"blk.{first + i}.{suffix}", shape) for i in range(count)]
        first += count
    return found


def unpacked(runs: str) -> list[str]:
    return [LETTERS[letter] for count, letter in re.findall(r"(\d*)([a-z])", runs) for _ in range(int(count or 1))]


@pytest.mark.parametrize("name", EXPECTED)
def test_types_are_those_of_llama_quantize(name: str) -> None:
    model = EXPECTED[name]
    tensors = tensors_of(model)
    facts = ModelDimensions(**model["facts"])
    assert set(model["types"]) >= set(FILE_TYPES) - {"q2_k_mixed"}
    for kind in set(FILE_TYPES) - {"q2_k_mixed"}:
        for importance in (False, True):
            runs = model["types"].get(kind + "+importance" * importance, model["types"][kind])
            want = dict(zip([tensor for tensor, _ in tensors], unpacked(runs), strict=True))
            for order in (tensors, tensors[::-1]):
                found, fallbacks = tensor_types(kind, model["arch"], order, facts, importance)
                assert found == want, f"{kind}, importance {importance}"
                assert list(found) == [tensor for tensor, _ in order]
            for tensor, meant in fallbacks.items():
                assert dict(tensors)[tensor][-1] % GGML_TYPES[meant].block


def test_the_expectations_hold_something() -> None:
    kinds = {kind for model in EXPECTED.values() for runs in model["types"].values() for kind in unpacked(runs)}
    assert kinds == set(LETTERS.values()) - {"BF16"}
    assert any("+importance" in key for model in EXPECTED.values() for key in model["types"])


def test_numbers_are_those_of_the_package() -> None:
    for name, kind in FILE_TYPES.items():
        known = {"q2_k_mixed": "MOSTLY_Q2_K"}.get(name, f"MOSTLY_{name.upper()}")
        assert kind.number == gguf.LlamaFileType[known]
        assert kind.base in GGML_TYPES


FACTS = ModelDimensions(2, 4, 2)
TENSORS = [
    ("token_embd.weight", (9, 256)), ("output.weight", (9, 256)), ("output_norm.weight", (256,)),
    *((f"blk.{i}.{name}.weight", (2, 256))
      for i in range(2) for name in ("attn_q", "attn_v", "ffn_down", "ffn_gate_inp")),
]  # fmt: skip


def test_the_mixture_for_experts() -> None:
    tensors = [
        ("token_embd.weight", (9, 256)), ("output.weight", (9, 256)), ("blk.0.attn_v.weight", (2, 256)),
        ("blk.0.ffn_down_exps.weight", (4, 2, 256)), ("blk.0.ffn_down_shexp.weight", (2, 256)),
        ("blk.0.ffn_gate_inp.weight", (4, 256)), ("blk.0.attn_norm.weight", (256,)),
    ]  # fmt: skip
    found, _ = tensor_types("q2_k_mixed", "qwen3moe", tensors, ModelDimensions(1, 4, 2, 4))
    assert list(found.values()) == ["Q8_0", "Q8_0", "Q4_K", "Q2_K", "Q4_K", "F32", "F32"]


def test_notes_say_what_fell_back() -> None:
    tensors = [(f"blk.{i}.attn_q.weight", (2, 96)) for i in range(3)] + [("blk.0.ffn_down.weight", (2, 70))]
    assert fallback_notes(*tensor_types("q4_k_s", "llama", tensors, ModelDimensions(3, 4, 4))) == [
        "3 tensors (blk.0.attn_q.weight, ...) are Q5_0 instead of Q4_K: their rows are no multiple of 256",
        "1 tensor (blk.0.ffn_down.weight) is F16 instead of Q4_K: its rows are no multiple of 256",
    ]
    assert fallback_notes(*tensor_types("q4_k_s", "llama", TENSORS, FACTS)) == []


@pytest.mark.parametrize(
    ("name", "shape", "can"),
    [
        ("blk.0.attn_q.weight", (2, 3), True),
        ("blk.0.attn_q.weight", (1, 3), False),  # a vector, to ggml
        ("blk.0.attn_q.weight", (1, 2, 3), True),
        ("blk.0.attn_q.bias", (2, 3), False),
        ("blk.0.attn_q_norm.weight", (2, 3), False),
        ("blk.0.ffn_gate_inp.weight", (2, 3), False),
        ("blk.0.ssm_conv1d.weight", (2, 3), False),
        ("position_embd.weight", (2, 3), False),
        ("token_embd.weight", (2, 3), True),
    ],
)
def test_what_can_be_quantized(name: str, shape: tuple[int, ...], can: bool) -> None:
    assert quantizable(name, shape) is can
