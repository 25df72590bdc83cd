"""The tokenizer in a GGUF file: the token list (text, type, score of every id) and the keys `tokenizer.*`.

Two kinds are written: SentencePiece BPE with byte fallback (llama.cpp's model "llama"), and byte-level BPE (its model
"gpt2"). The tokenizer is taken as Transformers runs it; `tokenizer.model` in the model's folder adds exact scores.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from auto_round.errors import ModelError, UnsupportedError
from auto_round.gguf.family import HfConfig
from auto_round.gguf.metadata import KeyValue, key_value
from auto_round.gguf.pre_tokenizer import WITHOUT_MARKS, flat_steps, pre_tokenizer_name

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_TOKEN_SPACE = "▁"
_ADDED_SCORE, _UNUSED_SCORE = -1000.0, -10000.0


@dataclass
class TokenList:
    """Tokens by id. `scores` stays empty for byte-level BPE."""

    texts: list[str]
    types: list[int]
    scores: list[float] = field(default_factory=list)

    def put(self, index: int, text: str, kind: int, score: float) -> None:
        self.texts[index], self.types[index] = text, kind
        if self.scores:
            self.scores[index] = score

    def require_unique(self) -> None:
        """Raise ModelError when two ids have the same text, which llama.cpp rejects."""
        seen: dict[str, int] = {}
        for index, text in enumerate(self.texts):
            if seen.setdefault(text, index) != index:
                raise ModelError(
                    f"tokens {seen[text]} and {index} are both {text!r}; llama.cpp cannot open such a vocabulary"
                )


def looks_special(text: str) -> bool:
    """Whether an added token looks like a control token that its tokenizer does not mark as special."""
    ends = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    return text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or any(
        text.startswith(start) and text.endswith(end) for start, end in ends
    )


def _tokens(model: Mapping[str, Any], added: Mapping[int, Any], rows: int, folder: str | Path | None) -> TokenList:
    """Tokens of the BPE model of a tokenizer.json; with scores where it is SentencePiece's (with byte fallback).

    SentencePiece merges the pair whose result has the best score, and tokenizer.json lists pairs by that score. So
    without a tokenizer.model, a token's score is minus the rank of the first pair that produces it; scores of other
    tokens are never used.
    """
    scored = bool(model.get("byte_fallback"))
    tokens = TokenList([f"[PAD{i}]" for i in range(rows)], [UNUSED] * rows, [_UNUSED_SCORE] * rows if scored else [])
    if scored and folder is not None and Path(folder, "tokenizer.model").is_file():
        _put_sentencepiece(tokens, Path(folder, "tokenizer.model"))
    else:
        scores: dict[str, float] = {}
        for rank, (left, right) in enumerate(merge_pairs(model["merges"]) if scored else ()):
            scores.setdefault(left + right, -float(rank))
        for text, index in model["vocab"].items():
            if index in added:
                continue
            if index >= rows:
                raise ModelError(
                    f"the tokenizer's token {index} ({text!r}) has no row in the embedding, which has {rows}"
                )
            is_byte = scored and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
            score = scores.get(text, 0.0 if is_byte else -float(len(scores)))
            tokens.put(index, text, BYTE if is_byte else NORMAL, score)
    for index, token in added.items():
        if index < rows:
            special = token.special or looks_special(token.content)
            # Added tokens are matched in the original text, which still has its spaces.
            text = token.content if special else token.content.replace(_TOKEN_SPACE, " ")
            tokens.put(index, text, CONTROL if special else USER_DEFINED, _ADDED_SCORE)
    tokens.require_unique()
    return tokens


def _put_sentencepiece(tokens: TokenList, path: Path) -> None:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise UnsupportedError("tokenizer.model needs the package sentencepiece: pip install sentencepiece") from error
    model = SentencePieceProcessor()
    model.LoadFromFile(str(path))
    kinds = (
        (UNKNOWN, model.IsUnknown), (CONTROL, model.IsControl), (UNUSED, model.IsUnused), (BYTE, model.IsByte),
    )  # fmt: skip
    for index in range(min(model.vocab_size(), len(tokens.texts))):
        kind = next((kind for kind, holds in kinds if holds(index)), NORMAL)
        tokens.put(index, model.IdToPiece(index), kind, model.GetScore(index))


def merge_pairs(merges: Sequence[Any]) -> list[tuple[str, str]]:
    """The merges of a tokenizer.json as pairs; old files have the string "left right"."""
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in merges)
    return [(left, right) for left, right in pairs]


def merge_lines(merges: Sequence[Any]) -> list[str]:
    """Merges as GGUF stores them: "left right", with spaces inside a part as byte-level BPE's character."""
    return [f"{left.replace(' ', 'Ġ')} {right.replace(' ', 'Ġ')}" for left, right in merge_pairs(merges)]


_IDS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",  # sic
    "pad": "padding_token_id",
    "mask": "mask_token_id",
}
SPACE_NOTE = (
    "llama.cpp adds a space before every text and after every special token, as SentencePiece does; this tokenizer "
    "does not where there is one already, or not after special tokens"
)
_MARKS_NOTE = "llama.cpp splits words at combining marks (Indic scripts, Thai, ...), and this tokenizer does not"


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer in the form of a GGUF file. Made by `vocabulary_for`.

    Attributes:
        tokens: one for every row of the embedding.
        metadata: the keys tokenizer.*, with their types.
        notes: where llama.cpp tokenizes differently from Transformers, for the user.
    """

    tokens: TokenList
    metadata: tuple[KeyValue, ...]
    notes: tuple[str, ...]


def vocabulary_for(tokenizer: Any, rows: int, config: Any = None, folder: str | Path | None = None) -> Vocabulary:
    """A Transformers tokenizer for a GGUF file.

    Args:
        tokenizer: as returned by `AutoTokenizer.from_pretrained`.
        rows: of the embedding; ids without a token get a placeholder.
        config: the model's configuration or its values, for special tokens missing in the tokenizer.
        folder: of the model, for its tokenizer.model.

    Raises:
        UnsupportedError: llama.cpp has no such tokenizer.
        ModelError: a token has no row, or two have the same text.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedError(
            f"a tokenizer of class {type(tokenizer).__name__} cannot be written as GGUF; it needs a tokenizer.json or "
            "a SentencePiece model that Transformers loads as a fast tokenizer"
        )
    values = json.loads(backend.to_str())
    model = values["model"]
    if model["type"] != "BPE":
        raise UnsupportedError(
            f"a tokenizer of type {model['type']} cannot be written as GGUF, only byte-level BPE and SentencePiece BPE"
        )
    notes = [
        f"llama.cpp does not apply the tokenizer's normalization {step['type']}"
        for step in flat_steps(values["normalizer"], "normalizers")
        if not _is_space(step)
    ]
    flags = _added_bos_eos(tokenizer, notes)
    tokens = _tokens(model, backend.get_added_tokens_decoder(), rows, folder)
    merges: list[str] = []
    if tokens.scores:
        name, pre = "llama", "default"
        flags["add_space_prefix"] = _space_prefix(values)
        if flags["add_space_prefix"] and (values["pre_tokenizer"] or {}).get("type") == "Metaspace":
            notes.append(SPACE_NOTE)
    else:
        name, pre = "gpt2", pre_tokenizer_name(values, bool(getattr(tokenizer, "clean_up_tokenization_spaces", False)))
        notes += [_MARKS_NOTE] if pre in WITHOUT_MARKS else []
        merges = merge_lines(model["merges"])
    keys: list[tuple[str, Any, str]] = [
        ("ggml.model", name, "string"), ("ggml.pre", pre, "string"), ("ggml.tokens", tokens.texts, "string"),
        *([("ggml.scores", tokens.scores, "float32")] if tokens.scores else []),
        ("ggml.token_type", tokens.types, "int32"),
        *([("ggml.merges", merges, "string")] if merges else []),
        *((f"ggml.{key}", index, "uint32") for key, index in _special_ids(tokenizer, HfConfig.of(config or {}), rows)),
        *((f"ggml.{key}", flag, "bool") for key, flag in flags.items()),
    ]  # fmt: skip
    template = getattr(tokenizer, "chat_template", None)
    templates = dict(template) if isinstance(template, Mapping) else {"default": template} if template else {}
    if others := sorted(name for name in templates if name != "default"):
        keys.append(("chat_templates", others, "string"))
    ends = {"default": "", **{name: f".{name}" for name in others}}
    keys += [(f"chat_template{end}", templates[name], "string") for name, end in ends.items() if name in templates]
    metadata = tuple(key_value(f"tokenizer.{key}", value, kind) for key, value, kind in keys)
    return Vocabulary(tokens, metadata, tuple(notes))


def _special_ids(tokenizer: Any, settings: HfConfig, rows: int) -> list[tuple[str, int]]:
    found = []
    for name, key in _IDS.items():
        value = getattr(tokenizer, f"{name}_token_id", None)
        if value is None:
            value = settings.get(f"{name}_token_id")
        if isinstance(value, int) and 0 <= value < rows:
            found.append((key, value))
    return found


def _added_bos_eos(tokenizer: Any, notes: list[str]) -> dict[str, bool]:
    """Whether a first or last token is added to a text, found by tokenizing one."""
    whole = list(tokenizer("a").input_ids)
    inner = list(tokenizer("a", add_special_tokens=False).input_ids)
    start = next((i for i in range(len(whole)) if whole[i : i + len(inner)] == inner), 0)
    before, after = whole[:start], whole[start + len(inner) :]
    if not (before in ([], [tokenizer.bos_token_id]) and after in ([], [tokenizer.eos_token_id])):
        notes.append(f"the tokenizer adds {before} before and {after} after a text, and llama.cpp only one token each")
    return {"add_bos_token": bool(before), "add_eos_token": bool(after)}


def _is_space(step: Mapping[str, Any]) -> bool:
    """Whether a step only replaces spaces as SentencePiece does."""
    if step["type"] == "Prepend":
        return step["prepend"] == _TOKEN_SPACE
    return step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == _TOKEN_SPACE


def _space_prefix(values: Mapping[str, Any]) -> bool:
    """Whether a space is added before a text. Raises UnsupportedError when text is split before it is merged."""
    prefix = any(step["type"] == "Prepend" for step in flat_steps(values["normalizer"], "normalizers"))
    splits = values["pre_tokenizer"]
    kind = splits["type"] if splits else None
    if kind == "Metaspace" and not splits.get("split", True):
        prefix = prefix or splits.get("prepend_scheme", "always") != "never"
    elif not (kind is None or (kind == "Split" and splits["pattern"] == {"String": " "})):
        raise UnsupportedError(
            f"llama.cpp merges SentencePiece tokens across whole texts, and this tokenizer splits them: {kind}"
        )
    return prefix
