"""Tokens, scores, special tokens and pre-tokenizers, against llama.cpp's converter and SentencePiece itself."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from auto_round import envs
from auto_round.errors import ConfigError, ModelError, UnsupportedError
from auto_round.gguf import vocab as pre
from auto_round.gguf.vocab import (
    SPACE_NOTE,
    TokenList,
    Vocabulary,
    looks_special,
    merge_lines,
    vocabulary_for,
)

pytest.importorskip("gguf")
ROOT = Path(__file__).resolve().parents[3]
EXPECTED: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "gguf_families.json").read_text())
ROWS = 320


@pytest.fixture(scope="module")
def models() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        yield importlib.import_module("referee_gguf_models")


def values(vocabulary: Vocabulary) -> dict[str, Any]:
    return {key: value for key, value, *_ in vocabulary.metadata}


@pytest.mark.parametrize(("model", "kind"), [("llama3", "bytes"), ("llama2", "pieces"), ("gemma3", "bare pieces")])
def test_a_vocabulary_is_what_llama_cpp_writes(model: str, kind: str, models: Any, tmp_path: Path) -> None:
    if kind != "bytes":
        pytest.importorskip("sentencepiece")
        pytest.importorskip("google.protobuf")
    models.save_tokenizer(kind, tmp_path)
    ours = values(vocabulary_for(models.tokenizer(kind), ROWS, None, tmp_path))
    theirs = {k: v for k, v in EXPECTED[model]["metadata"].items() if k.startswith("tokenizer.")}
    for key, value in theirs.items():
        if key == "tokenizer.ggml.add_sep_token":
            assert value is False  # which is what llama.cpp does without the key
            continue
        found = ours[key]
        if isinstance(found, list) and len(found) > 100:
            assert hashlib.sha256(json.dumps(found).encode()).hexdigest() == value, key
        else:
            assert found == value, key
    explicit = {"tokenizer.ggml.add_space_prefix", "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token"}
    assert ours.keys() - theirs.keys() <= explicit
    assert ours["tokenizer.ggml.add_bos_token"] is True and ours["tokenizer.ggml.add_eos_token"] is False
    assert ours.get("tokenizer.ggml.add_space_prefix") == {"bytes": None, "pieces": True, "bare pieces": False}[kind]


def test_scores_from_merges_tokenize_as_sentencepiece_does(models: Any, tmp_path: Path) -> None:
    """Without tokenizer.model, scores come from the merges; SentencePiece with these scores must split as they do."""
    sentencepiece = pytest.importorskip("sentencepiece")
    proto = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    tokenizer = models.tokenizer("pieces")
    tokens = vocabulary_for(tokenizer, ROWS).tokens
    kinds = {1: proto.ModelProto.SentencePiece.NORMAL, 3: proto.ModelProto.SentencePiece.CONTROL, 6: 6}
    model = proto.ModelProto()
    model.ParseFromString(models.sentencepiece_model(tokenizer))
    for piece in model.pieces:
        index = tokenizer.convert_tokens_to_ids(piece.piece)
        piece.score = tokens.scores[index]
        assert piece.type == kinds[tokens.types[index]] or piece.piece == "<unk>"
    judge = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    for text in ("the quick brown fox", "then there were others", "weren't", "42 jumps", "overthe lazy dog, é 🚀"):
        assert judge.EncodeAsIds(text) == tokenizer(text, add_special_tokens=False).input_ids, text


def test_rows_without_a_token_get_a_placeholder(models: Any) -> None:
    tokens = vocabulary_for(models.tokenizer("bytes"), ROWS).tokens
    assert len(tokens.texts) == len(tokens.types) == ROWS and not tokens.scores
    assert tokens.texts[-1] == f"[PAD{ROWS - 1}]" and tokens.types[-1] == 5
    assert tokens.types[tokens.texts.index("<s>")] == 3
    assert tokens.types[tokens.texts.index("<|im_end|>")] == 3  # by its looks
    assert tokens.types[tokens.texts.index("custom word")] == 4


def test_a_vocabulary_larger_than_the_embedding_is_an_error(models: Any) -> None:
    with pytest.raises(ModelError, match="no row in the embedding, which has 100"):
        vocabulary_for(models.tokenizer("bytes"), 100)


def test_two_tokens_of_one_text_are_an_error() -> None:
    with pytest.raises(ModelError, match="tokens 0 and 2 are both 'a'"):
        TokenList(["a", "b", "a"], [1, 1, 1]).require_unique()


@pytest.mark.parametrize("text", ["<|im_end|>", "<｜end▁of▁sentence｜>", "<unused7>", "<pad>"])
def test_tokens_that_look_special(text: str) -> None:
    assert looks_special(text) and not looks_special(f"x{text}")


def test_merges_old_and_new() -> None:
    assert merge_lines(["Ġ t", "a b"]) == merge_lines([["Ġ", "t"], ["a", "b"]]) == ["Ġ t", "a b"]
    assert merge_lines([[" ", "a b"]]) == ["Ġ aĠb"]


def test_templates_by_name(models: Any) -> None:
    tokenizer = models.tokenizer("bytes")
    tokenizer.chat_template = {"default": "D", "tool_use": "T"}
    found = values(vocabulary_for(tokenizer, ROWS))
    assert found["tokenizer.chat_template"] == "D" and found["tokenizer.chat_template.tool_use"] == "T"
    assert found["tokenizer.chat_templates"] == ["tool_use"]


def test_the_configuration_names_what_the_tokenizer_does_not(models: Any) -> None:
    tokenizer = models.tokenizer("bytes")
    tokenizer.pad_token = None
    found = values(vocabulary_for(tokenizer, ROWS, {"pad_token_id": 7, "eos_token_id": [2, 9]}))
    assert found["tokenizer.ggml.padding_token_id"] == 7 and found["tokenizer.ggml.eos_token_id"] == 2


def test_a_unigram_tokenizer_is_refused() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0))
    with pytest.raises(UnsupportedError, match="Unigram"):
        vocabulary_for(PreTrainedTokenizerFast(tokenizer_object=backend), 4)


def test_what_llama_cpp_does_otherwise_is_said(models: Any) -> None:
    from tokenizers import normalizers, pre_tokenizers

    tokenizer = models.tokenizer("bytes")
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    assert any("NFC" in note for note in vocabulary_for(tokenizer, ROWS).notes)
    tokenizer = models.tokenizer("pieces")
    assert not vocabulary_for(tokenizer, ROWS).notes
    tokenizer.backend_tokenizer.normalizer = None
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    found = vocabulary_for(tokenizer, ROWS)
    assert SPACE_NOTE in found.notes and values(found)["tokenizer.ggml.add_space_prefix"] is True


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}


def sequence(*steps: Any) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


# As they stand in the models' tokenizer.json.
TOKENIZERS: list[tuple[str, Any, bool, bool]] = [
    ("gpt-2", {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}, False, False),
    ("gpt-2", {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}, False, True),
    ("llama-bpe", sequence(split(pre.LLAMA3), BYTES), True, True),
    ("dbrx", sequence(split(pre.LLAMA3), BYTES), False, False),
    ("qwen2", sequence(split(pre.QWEN2), BYTES), False, False),
    ("stablelm2", sequence(split(pre.QWEN2), BYTES), False, True),
    ("smollm", sequence({"type": "Digits", "individual_digits": True}, BYTES | {"use_regex": True}), False, False),
    ("starcoder", sequence({"type": "Digits", "individual_digits": True}, BYTES | {"use_regex": True}), False, True),
    (
        "falcon",
        sequence(
            {"type": "Punctuation", "behavior": "Contiguous"},
            BYTES | {"use_regex": True},
            {"type": "Digits", "individual_digits": False},
            split("[0-9][0-9][0-9]"),
        ),
        False,
        True,
    ),
    ("tekken", sequence(split(pre.TEKKEN), BYTES), True, False),
    (
        "deepseek-v3",
        sequence(
            split(r"\p{N}{1,3}"),
            split("[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"),
            split(pre.DEEPSEEK_V3.replace(r"\r\n", "\r\n")),
            BYTES,
        ),
        False,
        False,
    ),
]


@pytest.mark.parametrize(("name", "steps", "whole", "removes"), TOKENIZERS)
def test_pre_tokenizers_are_known_by_their_steps(name: str, steps: Any, whole: bool, removes: bool) -> None:
    tokenizer = {"pre_tokenizer": steps, "model": {"ignore_merges": whole}}
    assert pre.pre_tokenizer_name(tokenizer, removes) == name


def test_the_table_compiles_and_splits(byte_texts: Callable[[], list[str]]) -> None:
    """Every regular expression of the table is one that the package tokenizers takes, and loses no character."""
    from tokenizers import Regex, pre_tokenizers

    for steps in (*pre.KNOWN_SPLITS, *pre.KNOWN_FULL_SPLITS):
        for step in steps:
            if step != pre.PUNCTUATION:
                splitter = pre_tokenizers.Split(Regex(step), "isolated")
                for text in byte_texts():
                    assert "".join(part for part, _ in splitter.pre_tokenize_str(text)) == text


@pytest.fixture
def byte_texts() -> Callable[[], list[str]]:
    return lambda: ["I'VE 12345 words,  here\r\n\n", "我想在apple工作1314151天～", "x = {'a': 3.5e-7}\t# ünïcödé"]


@pytest.mark.parametrize(
    "steps",
    [
        sequence(split(r"\w+"), BYTES),
        {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True},
        {"type": "Whitespace"},
        None,
    ],
)
def test_an_unknown_pre_tokenizer_is_refused_with_advice(steps: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = {"pre_tokenizer": steps, "model": {}}
    with pytest.raises(UnsupportedError, match="AR_GGUF_PRE_TOKENIZER"):
        pre.pre_tokenizer_name(tokenizer, False)
    monkeypatch.setenv("AR_GGUF_PRE_TOKENIZER", "qwen2")
    assert pre.pre_tokenizer_name(tokenizer, False) == "qwen2"


def test_the_variable_is_declared() -> None:
    assert envs.get("AR_GGUF_PRE_TOKENIZER") is None
    with pytest.raises(ConfigError):
        envs.get("AR_GGUF_PRE_TOKENISER")
