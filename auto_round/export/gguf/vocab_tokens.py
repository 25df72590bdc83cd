"""The list of tokens of a GGUF file: text, type and, for SentencePiece, score of every id."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from auto_round.errors import ModelError, UnsupportedError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_SPACE = "▁"
_ADDED_SCORE, _UNUSED_SCORE = -1000.0, -10000.0


@dataclass
class TokenList:
    """Tokens by id. `scores` stays empty for byte-level BPE."""

    texts: list[str]
    types: list[int]
    scores: list[float] = field(default_factory=list)


def looks_special(text: str) -> bool:
    """Whether an added token is a control token by its looks, although its tokenizer does not say so."""
    ends = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    return text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or any(
        text.startswith(start) and text.endswith(end) for start, end in ends
    )


def unused_tokens(rows: int) -> TokenList:
    """A list with a placeholder for every row of the embedding."""
    return TokenList([f"[PAD{i}]" for i in range(rows)], [UNUSED] * rows)


def put_added(tokens: TokenList, added: Mapping[int, Any]) -> None:
    """Enter a tokenizer's added tokens, in place. Ids beyond the embedding cannot be used and are left out."""
    for index, token in added.items():
        if index >= len(tokens.texts):
            continue
        special = token.special or looks_special(token.content)
        # What is matched in the text before anything else is compared with text that still has its spaces.
        tokens.texts[index] = token.content if special else token.content.replace(_SPACE, " ")
        tokens.types[index] = CONTROL if special else USER_DEFINED
        if tokens.scores:
            tokens.scores[index] = _ADDED_SCORE


def byte_level_tokens(vocab: Mapping[str, int], added: Mapping[int, Any], rows: int) -> TokenList:
    """Tokens of a byte-level BPE tokenizer. Raises ModelError for a vocabulary larger than the embedding."""
    tokens = unused_tokens(rows)
    for text, index in vocab.items():
        if index not in added:
            _check_row(index, text, rows)
            tokens.texts[index], tokens.types[index] = text, NORMAL
    put_added(tokens, added)
    return tokens


def sentencepiece_tokens(path: Path, added: Mapping[int, Any], rows: int) -> TokenList:
    """Tokens of a SentencePiece model file. Raises UnsupportedError when the package sentencepiece is not there."""
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise UnsupportedError("tokenizer.model needs the package sentencepiece: pip install sentencepiece") from error
    model = SentencePieceProcessor()
    model.LoadFromFile(str(path))
    tokens = unused_tokens(rows)
    tokens.scores = [_UNUSED_SCORE] * rows
    for index in range(min(model.vocab_size(), rows)):
        tokens.texts[index], tokens.scores[index] = model.IdToPiece(index), model.GetScore(index)
        tokens.types[index] = NORMAL
        for kind, holds in (
            (UNKNOWN, model.IsUnknown), (CONTROL, model.IsControl), (UNUSED, model.IsUnused), (BYTE, model.IsByte),
        ):  # fmt: skip
            if holds(index):
                tokens.types[index] = kind
                break
    put_added(tokens, added)
    return tokens


def merged_tokens(model: Mapping[str, Any], added: Mapping[int, Any], rows: int) -> TokenList:
    """Tokens of a SentencePiece BPE model of which only tokenizer.json is left.

    SentencePiece merges the pair whose result has the best score; tokenizer.json lists pairs, best first. So a token's
    score is minus the rank of the first pair that makes it. Tokens that nothing makes are never the result of a merge,
    and their score does not count.
    """
    scores: dict[str, float] = {}
    for rank, (left, right) in enumerate(pairs(model["merges"])):
        scores.setdefault(left + right, -float(rank))
    tokens = unused_tokens(rows)
    tokens.scores = [_UNUSED_SCORE] * rows
    for text, index in model["vocab"].items():
        if index in added:
            continue
        _check_row(index, text, rows)
        is_byte = len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        tokens.texts[index], tokens.types[index] = text, BYTE if is_byte else NORMAL
        tokens.scores[index] = scores.get(text, 0.0 if is_byte else -float(len(scores)))
    put_added(tokens, added)
    return tokens


def pairs(merges: Sequence[Any]) -> list[tuple[str, str]]:
    """The merges of a tokenizer.json as pairs: old files have "left right" for a pair."""
    made = []
    for merge in merges:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        made.append((left, right))
    return made


def merge_lines(merges: Sequence[Any]) -> list[str]:
    """Merges as GGUF stores them: "left right", spaces inside a part as byte-level BPE writes them."""
    return [f"{left.replace(' ', 'Ġ')} {right.replace(' ', 'Ġ')}" for left, right in pairs(merges)]


def require_unique(tokens: TokenList) -> None:
    """Raise ModelError when two ids have the same text: llama.cpp stops at such a file."""
    seen: dict[str, int] = {}
    for index, text in enumerate(tokens.texts):
        if text in seen:
            raise ModelError(
                f"tokens {seen[text]} and {index} are both {text!r}; llama.cpp cannot open such a vocabulary"
            )
        seen[text] = index


def backend_values(tokenizer: Any) -> dict[str, Any]:
    """The values of the tokenizer.json that a Transformers tokenizer stands for.

    Raises UnsupportedError for one that is not made by the package tokenizers.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedError(
            f"a tokenizer of class {type(tokenizer).__name__} cannot be written as GGUF; it needs a tokenizer.json or "
            "a SentencePiece model that Transformers loads as a fast tokenizer"
        )
    values: dict[str, Any] = json.loads(backend.to_str())
    return values


def _check_row(index: int, text: str, rows: int) -> None:
    if index >= rows:
        raise ModelError(f"the tokenizer's token {index} ({text!r}) has no row in the embedding, which has {rows}")
