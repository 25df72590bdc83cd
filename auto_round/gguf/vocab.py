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
from auto_round.gguf.family import read_hf_config
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

    @classmethod
    def unused(cls, rows: int, scored: bool) -> TokenList:
        """Placeholders for every row of the embedding."""
        return cls([f"[PAD{i}]" for i in range(rows)], [UNUSED] * rows, [_UNUSED_SCORE] * rows if scored else [])


def looks_special(text: str) -> bool:
    """Whether an added token looks like a control token that its tokenizer does not mark as special."""
    ends = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    return text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or any(
        text.startswith(start) and text.endswith(end) for start, end in ends
    )


def insert_added_tokens(tokens: TokenList, added: Mapping[int, Any]) -> None:
    """Insert a tokenizer's added tokens, in place, without ids beyond the embedding."""
    for index, token in added.items():
        if index >= len(tokens.texts):
            continue
        special = token.special or looks_special(token.content)
        # Added tokens are matched in the original text, which still has its spaces.
        tokens.texts[index] = token.content if special else token.content.replace(_TOKEN_SPACE, " ")
        tokens.types[index] = CONTROL if special else USER_DEFINED
        if tokens.scores:
            tokens.scores[index] = _ADDED_SCORE


def sentencepiece_tokens(path: Path, added: Mapping[int, Any], rows: int) -> TokenList:
    """Tokens of a SentencePiece model file. Raises UnsupportedError without the package sentencepiece."""
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise UnsupportedError("tokenizer.model needs the package sentencepiece: pip install sentencepiece") from error
    model = SentencePieceProcessor()
    model.LoadFromFile(str(path))
    tokens = TokenList.unused(rows, scored=True)
    kinds = (
        (UNKNOWN, model.IsUnknown), (CONTROL, model.IsControl), (UNUSED, model.IsUnused), (BYTE, model.IsByte),
    )  # fmt: skip
    for index in range(min(model.vocab_size(), rows)):
        tokens.texts[index], tokens.scores[index] = model.IdToPiece(index), model.GetScore(index)
        tokens.types[index] = next((kind for kind, holds in kinds if holds(index)), NORMAL)
    insert_added_tokens(tokens, added)
    return tokens


def bpe_tokens(model: Mapping[str, Any], added: Mapping[int, Any], rows: int) -> TokenList:
    """Tokens of the BPE model of a tokenizer.json; with scores where it is SentencePiece's (with byte fallback).

    SentencePiece merges the pair whose result has the best score, and tokenizer.json lists pairs by that score. So a
    token's score is minus the rank of the first pair that produces it; scores of other tokens are never used.

    Raises:
        ModelError: the vocabulary is larger than the embedding.
    """
    scored = bool(model.get("byte_fallback"))
    scores: dict[str, float] = {}
    for rank, (left, right) in enumerate(merge_pairs(model["merges"]) if scored else ()):
        scores.setdefault(left + right, -float(rank))
    tokens = TokenList.unused(rows, scored)
    for text, index in model["vocab"].items():
        if index in added:
            continue
        if index >= rows:
            raise ModelError(f"the tokenizer's token {index} ({text!r}) has no row in the embedding, which has {rows}")
        is_byte = scored and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        tokens.texts[index], tokens.types[index] = text, BYTE if is_byte else NORMAL
        if scored:
            tokens.scores[index] = scores.get(text, 0.0 if is_byte else -float(len(scores)))
    insert_added_tokens(tokens, added)
    return tokens


def merge_pairs(merges: Sequence[Any]) -> list[tuple[str, str]]:
    """The merges of a tokenizer.json as pairs; old files have the string "left right"."""
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in merges)
    return [(left, right) for left, right in pairs]


def merge_lines(merges: Sequence[Any]) -> list[str]:
    """Merges as GGUF stores them: "left right", with spaces inside a part as byte-level BPE's character."""
    return [f"{left.replace(' ', 'Ġ')} {right.replace(' ', 'Ġ')}" for left, right in merge_pairs(merges)]


def require_unique(tokens: TokenList) -> None:
    """Raise ModelError when two ids have the same text, which llama.cpp rejects."""
    seen: dict[str, int] = {}
    for index, text in enumerate(tokens.texts):
        if text in seen:
            raise ModelError(
                f"tokens {seen[text]} and {index} are both {text!r}; llama.cpp cannot open such a vocabulary"
            )
        seen[text] = index


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
        model: "llama" or "gpt2".
        pre: llama.cpp's name of its pre-tokenizer.
        tokens: one for every row of the embedding.
        merges: of byte-level BPE; empty otherwise.
        ids: (key, id) of special tokens.
        flags: (key, value): whether tokens or a space are added to a text.
        templates: chat templates by name; "default" is the main one.
        notes: where llama.cpp tokenizes differently from Transformers, for the user.
    """

    model: str
    pre: str
    tokens: TokenList
    merges: tuple[str, ...]
    ids: tuple[tuple[str, int], ...]
    flags: tuple[tuple[str, bool], ...]
    templates: Mapping[str, str]
    notes: tuple[str, ...]

    def metadata(self) -> list[KeyValue]:
        """The keys tokenizer.*, with their types."""
        rows: list[tuple[str, Any, str]] = [
            ("model", self.model, "string"), ("pre", self.pre, "string"), ("tokens", self.tokens.texts, "string"),
            ("scores", self.tokens.scores, "float32"), ("token_type", self.tokens.types, "int32"),
            ("merges", self.merges, "string"),
            *((key, value, "uint32") for key, value in self.ids), *((key, value, "bool") for key, value in self.flags),
        ]  # fmt: skip
        made = [
            key_value(f"tokenizer.ggml.{key}", value, kind)
            for key, value, kind in rows
            if value or key not in ("scores", "merges")
        ]
        others = sorted(name for name in self.templates if name != "default")
        if others:
            made.append(key_value("tokenizer.chat_templates", others, "string"))
        for name in ("default", *others):
            if name in self.templates:
                end = "" if name == "default" else f".{name}"
                made.append(key_value(f"tokenizer.chat_template{end}", self.templates[name], "string"))
        return made


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
    model, added = values["model"], backend.get_added_tokens_decoder()
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
    merges: tuple[str, ...] = ()
    if model.get("byte_fallback"):
        name, pre = "llama", "default"
        prefix = _space_prefix(values)
        flags.append(("add_space_prefix", prefix))
        if prefix and (values["pre_tokenizer"] or {}).get("type") == "Metaspace":
            notes.append(SPACE_NOTE)
        path = Path(folder, "tokenizer.model") if folder is not None else None
        exact = path is not None and path.is_file()
        tokens = sentencepiece_tokens(path, added, rows) if path and exact else bpe_tokens(model, added, rows)
    else:
        name, pre = "gpt2", pre_tokenizer_name(values, bool(getattr(tokenizer, "clean_up_tokenization_spaces", False)))
        notes += [_MARKS_NOTE] if pre in WITHOUT_MARKS else []
        tokens = bpe_tokens(model, added, rows)
        merges = tuple(merge_lines(model["merges"]))
    require_unique(tokens)
    template = getattr(tokenizer, "chat_template", None)
    templates = dict(template) if isinstance(template, Mapping) else {"default": template} if template else {}
    ids = _special_ids(tokenizer, config, rows)
    return Vocabulary(name, pre, tokens, merges, ids, tuple(flags), templates, tuple(notes))


def _special_ids(tokenizer: Any, config: Any, rows: int) -> tuple[tuple[str, int], ...]:
    settings = read_hf_config(config) if config is not None else None
    found = []
    for name, key in _IDS.items():
        value = getattr(tokenizer, f"{name}_token_id", None)
        if value is None and settings is not None:
            value = settings.get(f"{name}_token_id")
        if isinstance(value, int) and 0 <= value < rows:
            found.append((key, value))
    return tuple(found)


def _added_bos_eos(tokenizer: Any, notes: list[str]) -> list[tuple[str, bool]]:
    """Whether a first or last token is added to a text, found by tokenizing one."""
    whole = list(tokenizer("a").input_ids)
    inner = list(tokenizer("a", add_special_tokens=False).input_ids)
    start = next((i for i in range(len(whole)) if whole[i : i + len(inner)] == inner), 0)
    before, after = whole[:start], whole[start + len(inner) :]
    usual = before in ([], [tokenizer.bos_token_id]) and after in ([], [tokenizer.eos_token_id])
    if not usual:
        notes.append(f"the tokenizer adds {before} before and {after} after a text, and llama.cpp only one token each")
    return [("add_bos_token", bool(before)), ("add_eos_token", bool(after))]


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
