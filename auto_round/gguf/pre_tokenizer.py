"""Find llama.cpp's pre-tokenizer that splits text like a byte-level BPE tokenizer.

llama.cpp selects a pre-tokenizer by name (`tokenizer.ggml.pre`); each is a list of regular expressions in
src/llama-vocab.cpp. Here they are written as in tokenizer.json files, and looked up by the steps of a tokenizer's
`pre_tokenizer`. Names that share one list differ in whether a word that is a token skips merging (`ignore_merges`), and
in whether decoding removes spaces before punctuation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from auto_round import envs
from auto_round.errors import UnsupportedError

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
    """llama.cpp's name of the pre-tokenizer that equals a byte-level BPE tokenizer's, or AR_GGUF_PRE_TOKENIZER.

    Args:
        tokenizer: the values of its tokenizer.json.
        removes_spaces: whether decoding removes spaces before punctuation (`clean_up_tokenization_spaces`).

    Raises UnsupportedError when llama.cpp has none.
    """
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
