"""Verification primitives: digests of tensors and quantized layers, and comparison of tokenizers and processors."""

from __future__ import annotations

import hashlib
import json
import re
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
    """Digest of what a file must hold of a layer: codes, all scales and zero points, or with `dense` the dequantized
    weight in `dtype`."""
    return dense_digest(*((layer.dequantize(dtype),) if dense else layer.codes.digest_parts(layer, dtype)))


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
_PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def check_tokenizer(folder: Path, origin: Path | None, tokenizer: Any, trusted: bool) -> bool:
    """Compare the tokenizer (token ids, chat template, special tokens) and processor of a folder with the source's.

    Args:
        folder: the written folder.
        origin: the source's folder, None for a model object.
        tokenizer: the object whose files were written when there is no source folder.
        trusted: trust_remote_code.

    Returns whether there was a tokenizer to compare. Raises VerifyError when they differ or the written one does not
    open.
    """
    if origin is None:
        wanted = tokenizer
    else:
        has = any(_TOKENIZER_FILES.search(path.name) for path in origin.iterdir() if path.is_file())
        wanted = _open("AutoTokenizer", origin, trusted) if has else None
    if wanted is None or not callable(getattr(wanted, "encode", None)):
        return False
    found = _open("AutoTokenizer", folder, trusted, folder)
    for what, read in (("ids of a text", _ids), ("chat", _chat), ("special tokens", _special)):
        one, other = _read(read, wanted), _read(read, found)
        if one != other:
            raise VerifyError(
                f"{folder}: its tokenizer gives other {what} than the source's: {shorten(other)} instead of "
                f"{shorten(one)}; do not use these files, and report this"
            )
    if origin is not None and any((origin / name).is_file() for name in _PROCESSORS):
        _check_processor(folder, origin, trusted)
    return True


def _check_processor(folder: Path, origin: Path, trusted: bool) -> None:
    wanted = _open("AutoProcessor", origin, trusted)
    if wanted is None:
        return
    found = _open("AutoProcessor", folder, trusted, folder)
    one, other = (_settings(processor) for processor in (wanted, found))
    if type(wanted) is not type(found) or one != other:
        raise VerifyError(f"{folder}: its processor is not the source's; do not use these files, and report this")


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


def _read(read: Any, tokenizer: Any) -> Any:
    """The value of `read`, or the name of the exception that a chat template may raise."""
    try:
        return read(tokenizer)
    except Exception as error:
        return type(error).__name__


def _ids(tokenizer: Any) -> list[int]:
    return [int(i) for i in tokenizer.encode(SAMPLE)]


def _chat(tokenizer: Any) -> Any:
    templates = getattr(tokenizer, "chat_template", None)
    if templates is None:
        return None
    names = list(templates) if isinstance(templates, dict) else [None]
    render = lambda t, name: t.apply_chat_template(_CHAT, chat_template=name, tokenize=False)
    return [templates, *(_read(lambda t, n=name: render(t, n), tokenizer) for name in names)]


def _special(tokenizer: Any) -> Any:
    return json.dumps({k: str(v) for k, v in tokenizer.special_tokens_map.items()}, sort_keys=True), len(tokenizer)


def _settings(processor: Any) -> Any:
    made = processor.to_dict() if hasattr(processor, "to_dict") else {}
    return json.loads(
        json.dumps({k: v for k, v in made.items() if k not in ("name_or_path", "_name_or_path")}, default=str)
    )


def shorten(value: Any, limit: int = 120) -> str:
    """`value` as text of at most `limit` characters, for an error message."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= limit else f"{text[:limit]}..."
