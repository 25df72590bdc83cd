"""Verification primitives: digests of quantized layers, and comparison of tokenizers and processors."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch

from auto_round.codecs.ggml.types import GgmlBlocks
from auto_round.codecs.quantized_layer import QuantizedLayer
from auto_round.errors import VerifyError
from auto_round.logger import logger


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The raw bytes of a tensor."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def codes_digest(
    codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | int,
    inputs: tuple[float | None, int | None] = (None, None),
) -> str:  # fmt: skip
    """Of codes [out, in], scales and zero points [out, groups]; one zero point stands for all groups. `inputs`: scale
    and zero point of static activations."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(bytes_of(codes))
    digest.update(bytes_of(scale))
    zero = zero_point if isinstance(zero_point, torch.Tensor) else torch.full(scale.shape, zero_point)
    digest.update(bytes_of(zero.to(torch.uint8)))
    if inputs != (None, None):
        digest.update(repr(inputs).encode())
    return digest.hexdigest()


def element_digest(layer: QuantizedLayer) -> str:
    """Of a layer of a small float type: codes, scales in float32, and the scales above them and of its inputs."""
    assert layer.codes is not None and layer.scale is not None
    digest = hashlib.blake2b(digest_size=16)
    digest.update(str(layer.element).encode())
    digest.update(bytes_of(layer.codes))
    digest.update(bytes_of(layer.scale.float()))
    for scalar in (layer.global_scale, layer.act_scale, layer.act_global_scale):
        digest.update(repr(None if scalar is None else float(scalar)).encode())
    return digest.hexdigest()


def bytes_digest(data: torch.Tensor) -> str:
    """Of the raw bytes of a tensor."""
    return hashlib.blake2b(bytes_of(data), digest_size=16).hexdigest()


def blocks_digest(blocks: GgmlBlocks) -> str:
    """Of a layer in a ggml type: everything that is stored."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(blocks.kind.name.encode())
    for part in (blocks.codes, blocks.d, blocks.scales, blocks.dmin, blocks.mins):
        if part is not None:
            digest.update(bytes_of(part))
    return digest.hexdigest()


def dense_digest(weight: torch.Tensor) -> str:
    """Of a dense weight in its own dtype."""
    return hashlib.blake2b(bytes_of(weight), digest_size=16).hexdigest()


def layer_digest(layer: QuantizedLayer, dense: bool, dtype: torch.dtype) -> str:
    """What a reader must find: codes and all scales and zero points, or with `dense` the weight in `dtype`."""
    if layer.blocks is not None and not dense:
        return blocks_digest(layer.blocks)
    if dense or layer.codes is None or layer.scale is None or layer.zero_point is None:
        return dense_digest(layer.dequantize(dtype))
    if layer.element is not None:
        return element_digest(layer)
    act_scale = None if layer.act_scale is None else float(layer.act_scale)
    return codes_digest(layer.codes, layer.scale, layer.zero_point, (act_scale, layer.act_zero_point))


# Hold the tokenizer and the processor of a written folder against those of the source.

# Words, numbers, code, several scripts, signs and white space: what tokenizers treat each in their own way.
SAMPLE = (
    "The quick brown fox — naïve café, 3.14159 and 1,000,000.\n\tdef f(x): return x ** 2  # ok\n"
    "Быстрая лиса. Η γρήγορη αλεπού. 敏捷的棕色狐狸。すばやい狐 재빠른 여우 "
    "الثعلب السريع तेज़ लोमड़ी สุนัขจิ้งจอก 🦊🚀\u200d <|user|> </s>"
)
_CHAT = [{"role": "user", "content": "Hello, 世界!"}, {"role": "assistant", "content": "Hi."}]
# A folder without any of these has none, though Transformers makes an empty one of the model's type.
_FILES = re.compile(
    r"^(tokenizer|vocab|merges|spiece|sentencepiece|tekken|special_tokens|added_tokens)|\.(model|tiktoken)$"
)
_PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def check_tokenizer(folder: Path, origin: Path | None, tokenizer: Any, trusted: bool) -> bool:
    """Whether the folder's tokenizer was compared: it gives the ids and the chat of the source's.

    Args:
        folder: that was written.
        origin: the source's folder, None for a model object.
        tokenizer: the object whose files were written where there is no folder.
        trusted: their own Python code may run.

    Raises VerifyError when the source's opens and the folder's does not, or gives something else.
    """
    if origin is None:
        wanted = tokenizer
    else:
        has = any(_FILES.search(path.name) for path in origin.iterdir() if path.is_file())
        wanted = _open("AutoTokenizer", origin, trusted) if has else None
    if wanted is None or not callable(getattr(wanted, "encode", None)):
        return False
    found = _open("AutoTokenizer", folder, trusted, folder)
    for what, read in (("ids of a text", _ids), ("chat", _chat), ("special tokens", _special)):
        one, other = _read(read, wanted), _read(read, found)
        if one != other:
            raise VerifyError(
                f"{folder}: its tokenizer gives other {what} than the source's: {_short(other)} instead of "
                f"{_short(one)}; do not use these files, and report this"
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
    """A tokenizer or processor; None where the source has none that opens. Raises VerifyError for a written one."""
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
    """What `read` gives, or the kind of error: a template may refuse what it is given."""
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
    return [templates, *(_read(lambda t, n=name: _rendered(t, n), tokenizer) for name in names)]


def _rendered(tokenizer: Any, name: str | None) -> Any:
    return tokenizer.apply_chat_template(_CHAT, chat_template=name, tokenize=False)


def _special(tokenizer: Any) -> Any:
    return json.dumps({k: str(v) for k, v in tokenizer.special_tokens_map.items()}, sort_keys=True), len(tokenizer)


def _settings(processor: Any) -> Any:
    made = processor.to_dict() if hasattr(processor, "to_dict") else {}
    return json.loads(
        json.dumps({k: v for k, v in made.items() if k not in ("name_or_path", "_name_or_path")}, default=str)
    )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:120]}..."
