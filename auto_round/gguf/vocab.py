"""The tokenizer in a GGUF file: the token list (text, type, score of every id) and the keys `tokenizer.*`.

Two kinds are written: SentencePiece BPE with byte fallback (llama.cpp's model "llama"), and byte-level BPE (its model
"gpt2"). The tokenizer is taken as Transformers runs it; `tokenizer.model` in the model's folder adds exact scores.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from auto_round import envs
from auto_round.errors import ModelError, UnsupportedError
from auto_round.gguf.family import HfConfig
from auto_round.gguf.metadata import KeyValue, key_value

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_TOKEN_SPACE = "▁"
# Steps of a normalizer that only replace spaces as SentencePiece does.
_SPACE_STEPS = (
    {"type": "Prepend", "prepend": _TOKEN_SPACE},
    {"type": "Replace", "pattern": {"String": " "}, "content": _TOKEN_SPACE},
)
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
    enclosed = any(text.startswith(start) and text.endswith(end) for start, end in ends)
    return enclosed or text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")


def _tokens(model: Mapping[str, Any], added: Mapping[int, Any], rows: int, folder: str | Path | None) -> TokenList:
    """Tokens of the BPE model of a tokenizer.json; with scores where it is SentencePiece's (with byte fallback), which
    lists pairs by score: without a tokenizer.model, minus the rank of the first pair that produces the token."""
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
    "bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "sep": "seperator_token_id",  # sic
    "pad": "padding_token_id", "mask": "mask_token_id",
}  # fmt: skip
SPACE_NOTE = (
    "llama.cpp adds a space before every text and after every special token, as SentencePiece does; this tokenizer "
    "does not where there is one already, or not after special tokens"
)
_MARKS_NOTE = "llama.cpp splits words at combining marks (Indic scripts, Thai, ...), and this tokenizer does not"


class Vocabulary(NamedTuple):
    """A tokenizer for a GGUF file: a token for every row of the embedding, keys, and differences for the user."""

    tokens: TokenList
    metadata: tuple[KeyValue, ...]
    notes: tuple[str, ...]


def vocabulary_for(tokenizer: Any, rows: int, config: Any = None, folder: str | Path | None = None) -> Vocabulary:
    """A Transformers tokenizer for a GGUF file whose embedding has `rows`; `config`: the model's, for special tokens
    missing in the tokenizer; `folder`: with its tokenizer.model. Raises UnsupportedError when llama.cpp has no such
    tokenizer, ModelError when a token has no row, or two have the same text."""
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
        if step not in _SPACE_STEPS
    ]
    # Whether a first or last token is added to a text, found by tokenizing one.
    whole, inner = list(tokenizer("a").input_ids), list(tokenizer("a", add_special_tokens=False).input_ids)
    start = next((i for i in range(len(whole)) if whole[i : i + len(inner)] == inner), 0)
    before, after = whole[:start], whole[start + len(inner) :]
    if not (before in ([], [tokenizer.bos_token_id]) and after in ([], [tokenizer.eos_token_id])):
        notes.append(f"the tokenizer adds {before} before and {after} after a text, and llama.cpp only one token each")
    flags = {"add_bos_token": bool(before), "add_eos_token": bool(after)}
    tokens = _tokens(model, backend.get_added_tokens_decoder(), rows, folder)
    merges: list[str] = []
    if tokens.scores:
        name, pre = "llama", "default"
        prefix = any(step["type"] == "Prepend" for step in flat_steps(values["normalizer"], "normalizers"))
        splits = values["pre_tokenizer"]
        if splits is not None and splits["type"] == "Metaspace" and not splits.get("split", True):
            prefix = prefix or splits.get("prepend_scheme", "always") != "never"
        elif splits is not None and (splits["type"] != "Split" or splits["pattern"] != {"String": " "}):
            raise UnsupportedError(
                "llama.cpp merges SentencePiece tokens across whole texts, and this tokenizer splits them: "
                f"{splits['type']}"
            )
        flags["add_space_prefix"] = prefix  # a space is added before a text
        if flags["add_space_prefix"] and (values["pre_tokenizer"] or {}).get("type") == "Metaspace":
            notes.append(SPACE_NOTE)
    else:
        name, pre = "gpt2", pre_tokenizer_name(values, bool(getattr(tokenizer, "clean_up_tokenization_spaces", False)))
        notes += [_MARKS_NOTE] if pre in WITHOUT_MARKS else []
        merges = merge_lines(model["merges"])
    own = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id", None) for name in _IDS}
    ids = {**HfConfig.of(config or {}).values, **{name: index for name, index in own.items() if index is not None}}
    special = {key: ids.get(f"{name}_token_id") for name, key in _IDS.items()}
    template = getattr(tokenizer, "chat_template", None) or {}
    templates = dict(template) if isinstance(template, Mapping) else {"default": template}
    others = sorted(name for name in templates if name != "default")
    ends = {"default": "", **{name: f".{name}" for name in others}}
    keys: list[tuple[str, Any, str]] = [
        ("ggml.model", name, "string"), ("ggml.pre", pre, "string"), ("ggml.tokens", tokens.texts, "string"),
        ("ggml.scores", tokens.scores, "float32"), ("ggml.token_type", tokens.types, "int32"),
        ("ggml.merges", merges, "string"),
        *((f"ggml.{key}", i, "uint32") for key, i in special.items() if isinstance(i, int) and 0 <= i < rows),
        *((f"ggml.{key}", flag, "bool") for key, flag in flags.items()),
        ("chat_templates", others, "string"),
        *((f"chat_template{end}", templates[name], "string") for name, end in ends.items() if name in templates),
    ]  # fmt: skip
    metadata = tuple(key_value(f"tokenizer.{key}", value, kind) for key, value, kind in keys if value != [])
    return Vocabulary(tokens, metadata, tuple(notes))


# llama.cpp's pre-tokenizers (`tokenizer.ggml.pre`), each a list of regular expressions in src/llama-vocab.cpp, written
# here as in tokenizer.json files. Names that share a list differ in whether a word that is a token skips merging, and
# whether decoding removes spaces before punctuation.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = _WORDS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
QWEN2 = _WORDS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
QWEN35 = _WORDS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}" + _CASED_TAIL
GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_WORDS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_WORDS}?"
    r"|\p{N}{1,3}" + _CASED_TAIL
)
DIGIT, DIGITS, UP_TO_THREE = r"\p{N}", r"\p{N}+", r"\p{N}{1,3}"
PUNCTUATION = "punctuation"
_HAN = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
DEEPSEEK_V3 = (
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\\r\\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
# Letters of cased alphabets in Unicode 12, as listed by DeepSeek's first models.
_CASED_LETTERS = (
    "A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_WIDE_PUNCTUATION = r"\s?[!-/:-~" + "\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
_DEEPSEEK_LLM = (r"[\r\n]", rf"\s?[{_CASED_LETTERS}]+", _WIDE_PUNCTUATION, r"\s+$", _CJK)
_TRIPLES = "[0-9][0-9][0-9]"

Steps = tuple[str, ...]
# steps -> name where decoding keeps spaces, and where it removes those before punctuation.
KNOWN_SPLITS: dict[Steps, tuple[str, str]] = {
    (GPT2,): ("gpt-2", "gpt-2"),
    (LLAMA3,): ("dbrx", "dbrx"),
    (QWEN2,): ("qwen2", "stablelm2"),
    (QWEN35,): ("qwen35", "qwen35"),
    (DIGIT, GPT2): ("smollm", "starcoder"),
    (PUNCTUATION, GPT2, DIGITS, _TRIPLES): ("falcon", "falcon"),
    (PUNCTUATION, GPT2, _TRIPLES): ("falcon", "falcon"),
    (GPT4O,): ("gpt-4o", "gpt-4o"),
    (UP_TO_THREE, _HAN, DEEPSEEK_V3): ("deepseek-v3", "deepseek-v3"),
    (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, DIGIT): ("deepseek-coder", "deepseek-coder"),
    (*_DEEPSEEK_LLM, DIGIT): ("deepseek-llm", "deepseek-llm"),
    (*_DEEPSEEK_LLM, DIGITS): ("deepseek-llm", "deepseek-llm"),
}  # fmt: skip
# The same for tokenizers with `ignore_merges`.
KNOWN_FULL_SPLITS: dict[Steps, tuple[str, str]] = {
    (LLAMA3,): ("llama-bpe", "llama-bpe"),
    (TEKKEN,): ("tekken", "tekken"),
}

# Names whose regular expressions in llama.cpp do not treat combining marks as part of a word.
WITHOUT_MARKS = ("tekken", "gpt-4o")


def flat_steps(step: Mapping[str, Any] | None, members: str) -> list[Mapping[str, Any]]:
    """The steps of a tokenizer.json's normalizer or pre-tokenizer, with sequences (of the key `members`) unrolled."""
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [inner for part in step[members] for inner in flat_steps(part, members)]
    return [step]


def split_steps(pre_tokenizer: Mapping[str, Any] | None) -> Steps | None:
    """The regular expressions of a tokenizer.json's `pre_tokenizer`, in order; None for an unsupported one."""
    steps: list[str] = []
    found = flat_steps(pre_tokenizer, "pretokenizers")
    if not any(step["type"] == "ByteLevel" for step in found):
        return None
    for step in found:
        kind = step["type"]
        if kind == "ByteLevel" and not step.get("add_prefix_space", False):
            steps += [GPT2] if step.get("use_regex", True) else []
        elif kind == "Split" and "Regex" in step["pattern"]:
            # Matches become words: isolated ones, or all that is left when the rest is removed.
            if (step["behavior"], step.get("invert", False)) not in (("Isolated", False), ("Removed", True)):
                return None
            steps.append(step["pattern"]["Regex"].replace("\r", r"\r").replace("\n", r"\n"))
        elif kind == "Digits":
            steps.append(DIGIT if step.get("individual_digits") else DIGITS)
        elif kind == "Punctuation" and step.get("behavior") == "Contiguous":
            steps.append(PUNCTUATION)
        else:
            return None
    return tuple(steps)


def pre_tokenizer_name(tokenizer: Mapping[str, Any], removes_spaces: bool) -> str:
    """llama.cpp's pre-tokenizer for a tokenizer.json, or AR_GGUF_PRE_TOKENIZER. Raises UnsupportedError without one."""
    if chosen := envs.get("AR_GGUF_PRE_TOKENIZER"):
        return str(chosen)
    steps = split_steps(tokenizer.get("pre_tokenizer"))
    merges_ignored = bool(tokenizer["model"].get("ignore_merges"))
    names = (KNOWN_FULL_SPLITS if merges_ignored else KNOWN_SPLITS).get(steps or ())
    if names is None:
        what = "its steps are " + repr(steps) if steps else f"its pre_tokenizer is {tokenizer.get('pre_tokenizer')!r}"
        raise UnsupportedError(
            f"llama.cpp has no pre-tokenizer that splits text as this tokenizer does ({what[:600]}, ignore_merges "
            f"{merges_ignored}); if you know better, set AR_GGUF_PRE_TOKENIZER to llama.cpp's name for it"
        )
    return names[removes_spaces]
