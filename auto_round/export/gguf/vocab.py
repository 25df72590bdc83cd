"""The tokenizer in a GGUF file: the keys tokenizer.*.

Two kinds are written: SentencePiece BPE with bytes for unknown characters (llama.cpp's model "llama"), and byte-level
BPE (its model "gpt2"). What counts is the tokenizer as Transformers runs it; `tokenizer.model` in the model's folder
adds the exact scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from auto_round.errors import UnsupportedError
from auto_round.export.gguf.key_values import KeyValue, key_value
from auto_round.export.gguf.pre_tokenizer import WITHOUT_MARKS, pre_tokenizer_name
from auto_round.export.gguf.settings import settings_of
from auto_round.export.gguf.vocab_tokens import (
    TokenList,
    backend_values,
    byte_level_tokens,
    merge_lines,
    merged_tokens,
    require_unique,
    sentencepiece_tokens,
)

_IDS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",  # spelt so in the format
    "pad": "padding_token_id",
    "mask": "mask_token_id",
}
_SPACE = "▁"
_SPACES = (
    "llama.cpp puts a space in front of every text and after every special token, as SentencePiece does; this "
    "tokenizer not where one is already, or not after special tokens"
)
_MARKS = "llama.cpp splits words at combining marks (Indic scripts, Thai, ...), and this tokenizer does not"


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer, as a GGUF file holds it. Made by `vocabulary_for`.

    Attributes:
        model: "llama" or "gpt2".
        pre: llama.cpp's name of its pre-tokenizer.
        tokens: one for every row of the embedding.
        merges: of byte-level BPE; empty otherwise.
        ids: (key, id) of special tokens.
        flags: (key, value): whether tokens or a space are added to a text.
        templates: chat templates by name; "default" is the model's own.
        notes: where llama.cpp tokenizes otherwise than Transformers, in words for the user.
        leading_spaces_differ: one of these notes: spaces at the start of a text and after special tokens.
    """

    model: str
    pre: str
    tokens: TokenList
    merges: tuple[str, ...]
    ids: tuple[tuple[str, int], ...]
    flags: tuple[tuple[str, bool], ...]
    templates: Mapping[str, str]
    notes: tuple[str, ...]
    leading_spaces_differ: bool = False

    def metadata(self) -> list[KeyValue]:
        """The keys tokenizer.*, with their types."""
        front = "tokenizer.ggml."
        made = [
            key_value(front + "model", self.model, "string"),
            key_value(front + "pre", self.pre, "string"),
            key_value(front + "tokens", self.tokens.texts, "string"),
        ]
        if self.tokens.scores:
            made.append(key_value(front + "scores", self.tokens.scores, "float32"))
        made.append(key_value(front + "token_type", self.tokens.types, "int32"))
        if self.merges:
            made.append(key_value(front + "merges", self.merges, "string"))
        made += [key_value(front + key, value, "uint32") for key, value in self.ids]
        made += [key_value(front + key, value, "bool") for key, value in self.flags]
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
        tokenizer: as `AutoTokenizer.from_pretrained` gives it.
        rows: of the embedding; ids without a token get a placeholder.
        config: the model's configuration or its values, for special tokens that the tokenizer does not name.
        folder: of the model, for its tokenizer.model.

    Raises:
        UnsupportedError: llama.cpp has no such tokenizer.
        ModelError: a token has no row, or two have the same text.
    """
    values = backend_values(tokenizer)
    model = values["model"]
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    if model["type"] != "BPE":
        raise UnsupportedError(
            f"a tokenizer of type {model['type']} cannot be written as GGUF; those that can: byte-level BPE, "
            "SentencePiece BPE"
        )
    notes = [f"llama.cpp does not apply the tokenizer's normalization {kind}" for kind in _lost(values["normalizer"])]
    flags = _added_around(tokenizer, notes)
    merges: tuple[str, ...] = ()
    spaces_differ = False
    if model.get("byte_fallback"):
        name, pre = "llama", "default"
        prefix = _space_prefix(values)
        flags.append(("add_space_prefix", prefix))
        spaces_differ = prefix and (values["pre_tokenizer"] or {}).get("type") == "Metaspace"
        notes += [_SPACES] if spaces_differ else []
        path = Path(folder) / "tokenizer.model" if folder is not None else None
        has_file = path is not None and path.is_file()
        tokens = sentencepiece_tokens(path, added, rows) if has_file and path else merged_tokens(model, added, rows)
    else:
        name, pre = "gpt2", pre_tokenizer_name(values, bool(getattr(tokenizer, "clean_up_tokenization_spaces", False)))
        notes += [_MARKS] if pre in WITHOUT_MARKS else []
        tokens = byte_level_tokens(model["vocab"], added, rows)
        merges = tuple(merge_lines(model["merges"]))
    require_unique(tokens)
    return Vocabulary(
        name,
        pre,
        tokens,
        merges,
        _special_ids(tokenizer, config, rows),
        tuple(flags),
        _templates(tokenizer),
        tuple(notes),
        spaces_differ,
    )


def _special_ids(tokenizer: Any, config: Any, rows: int) -> tuple[tuple[str, int], ...]:
    settings = settings_of(config) if config is not None else None
    found = []
    for name, key in _IDS.items():
        value = getattr(tokenizer, f"{name}_token_id", None)
        if value is None and settings is not None:
            value = settings.get(f"{name}_token_id")
        if isinstance(value, int) and 0 <= value < rows:
            found.append((key, value))
    return tuple(found)


def _added_around(tokenizer: Any, notes: list[str]) -> list[tuple[str, bool]]:
    """Whether a text gets a first or last token: seen from what the tokenizer does with one."""
    whole = list(tokenizer("a").input_ids)
    inner = list(tokenizer("a", add_special_tokens=False).input_ids)
    start = next((i for i in range(len(whole)) if whole[i : i + len(inner)] == inner), 0)
    before, after = whole[:start], whole[start + len(inner) :]
    usual = before in ([], [tokenizer.bos_token_id]) and after in ([], [tokenizer.eos_token_id])
    if not usual:
        notes.append(f"the tokenizer puts {before} before and {after} after a text, and llama.cpp only one token each")
    return [("add_bos_token", bool(before)), ("add_eos_token", bool(after))]


def _steps(normalizer: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if normalizer is None:
        return []
    if normalizer["type"] == "Sequence":
        return [step for inner in normalizer["normalizers"] for step in _steps(inner)]
    return [normalizer]


def _is_space(step: Mapping[str, Any]) -> bool:
    """Whether a step only writes spaces as SentencePiece does."""
    if step["type"] == "Prepend":
        return step["prepend"] == _SPACE
    return step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == _SPACE


def _lost(normalizer: Mapping[str, Any] | None) -> list[str]:
    return [step["type"] for step in _steps(normalizer) if not _is_space(step)]


def _space_prefix(values: Mapping[str, Any]) -> bool:
    """Whether a space is put in front of a text. Raises UnsupportedError when text is split before it is merged."""
    prefix = any(step["type"] == "Prepend" for step in _steps(values["normalizer"]))
    splits = values["pre_tokenizer"]
    kind = splits["type"] if splits else None
    if kind == "Metaspace" and not splits.get("split", True):
        prefix = prefix or splits.get("prepend_scheme", "always") != "never"
    elif not (kind is None or (kind == "Split" and splits["pattern"] == {"String": " "})):
        raise UnsupportedError(
            f"llama.cpp merges SentencePiece tokens across whole texts, and this tokenizer splits them: {kind}"
        )
    return prefix


def _templates(tokenizer: Any) -> dict[str, str]:
    found = getattr(tokenizer, "chat_template", None)
    return dict(found) if isinstance(found, Mapping) else {"default": found} if isinstance(found, str) else {}
