"""Verification primitives: digests of tensors and quantized layers, and comparison of tokenizers and processors."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from auto_round.codecs.quantized_layer import QuantizedLayer
from auto_round.errors import VerifyError
from auto_round.files import bytes_of
from auto_round.logger import logger


def dense_digest(*parts: torch.Tensor | str) -> str:
    """BLAKE2b of the bytes of tensors, each in its own dtype, and of texts."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else bytes_of(part))
    return digest.hexdigest()


def layer_digest(layer: QuantizedLayer, dense: bool, dtype: torch.dtype) -> str:
    """Digest of what a file must hold of a layer: its codes, or with `dense` the dequantized weight in `dtype`."""
    return dense_digest(*((layer.dequantize(dtype),) if dense else layer.codes.digest_parts(layer, dtype)))


def shorten(value: Any, limit: int = 120) -> str:
    """`value` as text of at most `limit` characters, for an error message."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= limit else f"{text[:limit]}..."


def mismatch_error(where: Path, what: str) -> VerifyError:
    """The error for a tensor or layer with other content than what was quantized."""
    return VerifyError(f"{where}: {what} does not hold what was tuned; do not use it, and report this")


def compare_values(where: Path, planned: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    """Raise VerifyError when configuration values, by which a reader interprets the weights, differ."""
    planned = json.loads(json.dumps(planned))
    wrong = sorted(key for key in {*stored, *planned} if stored.get(key) != planned.get(key))
    if wrong:
        raise VerifyError(
            f"{where}: {wrong[0]} is {shorten(json.dumps(stored.get(wrong[0])), 200)}, planned was "
            f"{shorten(json.dumps(planned.get(wrong[0])), 200)}; do not use these files"
        )


def compare_names(where: Path, what: str, planned: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    """Raise VerifyError when names are missing or not planned. `what`: what they name."""
    for names, words in ((planned.keys() - stored.keys(), "missing"), (stored.keys() - planned.keys(), "not planned")):
        if names:
            raise VerifyError(f"{where}: {len(names)} {what} are {words}, such as {', '.join(sorted(names)[:3])}")


def compare_tensors(
    where: Path, planned: Mapping[str, tuple[Sequence[int], Any]], stored: Mapping[str, tuple[Sequence[int], Any]]
) -> None:
    """Raise VerifyError when names, shapes or types of tensors differ."""
    compare_names(where, "tensors", planned, stored)
    for name, (shape, kind) in planned.items():
        found, its_kind = stored[name]
        if (tuple(found), its_kind) != (tuple(shape), kind):
            raise VerifyError(f"{where}: tensor {name} is {its_kind} {list(found)}, planned was {kind} {list(shape)}")


# Tokenizer and processor of a written folder, compared with those of the source.

# Words, numbers, code, several scripts, signs and white space, which tokenizers treat differently.
SAMPLE = (
    "The quick brown fox — naïve café, 3.14159 and 1,000,000.\n\tdef f(x): return x ** 2  # ok\n"
    "Быстрая лиса. Η γρήγορη αλεπού. 敏捷的棕色狐狸。すばやい狐 재빠른 여우 "
    "الثعلب السريع तेज़ लोमड़ी สุนัขจิ้งจอก 🦊🚀\u200d <|user|> </s>"
)
_CHAT = [{"role": "user", "content": "Hello, 世界!"}, {"role": "assistant", "content": "Hi."}]
# A folder without any of these has no tokenizer, although Transformers creates an empty one of the model's type.
_TOKENIZER_FILES = re.compile(
    r"^(tokenizer|vocab|merges|spiece|sentencepiece|tekken|special_tokens|added_tokens)|\.(model|tiktoken)$"
)


def check_tokenizer(folder: Path, origin: Path | None, tokenizer: Any, trusted: bool) -> bool:
    """Compare the tokenizer and processor of a folder with those in `origin`, the source's folder, or with the object
    whose files were written. Returns whether there was a tokenizer; raises VerifyError when they differ."""
    wanted = tokenizer
    if origin is not None:
        has = any(_TOKENIZER_FILES.search(path.name) for path in origin.iterdir() if path.is_file())
        wanted = _open("AutoTokenizer", origin, trusted) if has else None
    if wanted is None or not callable(getattr(wanted, "encode", None)):
        return False
    before, after = _behaviour(wanted), _behaviour(_open("AutoTokenizer", folder, trusted, folder))
    for what, one in before.items():
        if one != after[what]:
            raise VerifyError(
                f"{folder}: its tokenizer gives other {what} than the source's: {shorten(after[what])} instead of "
                f"{shorten(one)}; do not use these files, and report this"
            )
    processors = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
    if origin is not None and any((origin / name).is_file() for name in processors):
        processor = _open("AutoProcessor", origin, trusted)
        found = processor if processor is None else _open("AutoProcessor", folder, trusted, folder)
        if type(processor) is not type(found) or _settings(processor) != _settings(found):
            raise VerifyError(f"{folder}: its processor is not the source's; do not use these files, and report this")
    return True


def _open(kind: str, folder: Path, trusted: bool, written: Path | None = None) -> Any:
    """Open a tokenizer or processor; None when the source's does not open. Raises VerifyError for the written one."""
    import transformers

    try:
        return getattr(transformers, kind).from_pretrained(folder, trust_remote_code=trusted, local_files_only=True)
    except Exception as error:  # missing files, missing packages, code that is not trusted
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if written is not None:
            raise VerifyError(f"{written}: the source's {kind} opens, and its own does not: {reason}") from error
        logger.debug("the source has no %s to compare with: %s", kind, reason)
        return None


def _behaviour(tokenizer: Any) -> dict[str, Any]:
    """What a tokenizer makes of samples; the name of an exception that it raises instead, as a chat template may."""

    def attempt(read: Callable[[], Any]) -> Any:
        try:
            return read()
        except Exception as error:
            return type(error).__name__

    def special() -> Any:
        named = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        return json.dumps(named, sort_keys=True), len(tokenizer)

    def chat(**options: Any) -> Any:
        return tokenizer.apply_chat_template(_CHAT, tokenize=False, **options)

    templates = getattr(tokenizer, "chat_template", None)
    names = () if templates is None else list(templates) if isinstance(templates, dict) else (None,)
    return {
        "ids of a text": attempt(lambda: [int(i) for i in tokenizer.encode(SAMPLE)]),
        "chat": [templates, *(attempt(partial(chat, chat_template=name)) for name in names)],
        "special tokens": attempt(special),
    }


def _settings(processor: Any) -> Any:
    made = processor.to_dict() if hasattr(processor, "to_dict") else {}
    return json.loads(
        json.dumps({k: v for k, v in made.items() if k not in ("name_or_path", "_name_or_path")}, default=str)
    )
