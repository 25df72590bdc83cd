"""From a folder's config.json to a model on the meta device."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from auto_round.errors import ModelError
from auto_round.modeling.config_checks import check_code
from auto_round.modeling.config_values import read_value, text_config
from auto_round.modeling.json_text import read_object
from auto_round.modeling.links import inside
from auto_round.modeling.tensor_files import TensorFiles
from auto_round.modeling.towers import MODEL_FREE, reads_more_than_text

_OTHER_TASKS = re.compile(r"For(MaskedLM|SequenceClassification|TokenClassification|QuestionAnswering|MultipleChoice)$")


def load_config(folder: Path, *, trust_remote_code: bool = False, causal: bool = True) -> Any:
    """The Transformers configuration of a folder.

    Raises ModelError when there is none, or with `causal` when it is not one of a causal language model.
    """
    from transformers import AutoConfig

    file = folder / "config.json"
    if not file.is_file():
        if (folder / ".partial").is_dir():
            raise ModelError(
                f"{folder} holds a quantization that is not finished; give the command that began it once more, which "
                "goes on with it"
            )
        raise ModelError(f"{folder} has no config.json; give the folder of a Transformers model")
    try:
        raw = read_object(inside(folder, file))
        if not trust_remote_code:
            check_code(raw, file)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except ModelError:
        raise
    except Exception as error:  # Transformers raises whatever the values lead to: attribute, type, validation errors
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{folder} brings Python code of its own, which is not run unless you trust it: "
                "read it, then pass trust_remote_code=True (--trust_remote_code)"
            ) from error
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"{file} cannot be used: {lines[0]}") from error
    remote = isinstance(raw.get("auto_map"), dict) and "AutoModelForCausalLM" in raw["auto_map"]
    if causal:
        _check_causal(config, folder, remote and trust_remote_code)
    return config


def _check_causal(config: Any, folder: Path, remote: bool) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    kind, reason = type(config), ""
    named = getattr(config, "architectures", None) or ()
    if not isinstance(named, (list, tuple)) or not all(isinstance(name, str) for name in named):
        raise ModelError(f"config.json of {folder} has architectures={named!r}, not a list of names; fetch it again")
    other = next((name for name in named if _OTHER_TASKS.search(name)), None)
    if getattr(config, "is_encoder_decoder", False):
        reason = "it is an encoder-decoder model"
    elif other is not None:
        reason = f"its config.json says {other}"
    elif remote:
        return
    elif kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        reason = f"AutoModelForCausalLM knows no model for its {kind.__name__}"
    elif kind in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", True):
        reason = f"its {kind.__name__} describes an encoder (is_decoder is false)"
    if reason and reads_more_than_text(config):
        raise ModelError(f"{folder} reads more than text, and is not tuned: {reason}; {MODEL_FREE}")
    if reason:
        raise ModelError(
            f"{folder} is not a causal language model: {reason}; only decoder-only language models can be quantized"
        )


class _EmptyOnMeta(TorchFunctionMode):
    """`torch.empty` gives tensors on meta, unless a device is named.

    Weights begin so, and are put on meta as they become parameters. Without this each is allocated first, and though it
    is never touched its place in the heap is lost to others: two gigabytes of addresses for a model of three.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def build_on_meta(
    config: Any, dtype: torch.dtype, trust_remote_code: bool, kind: type[Any] | None = None
) -> nn.Module:  # fmt: skip
    """The model with parameters on meta and real buffers, in eval mode. `kind`: its class, where it is known."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    def build() -> nn.Module:
        with init_empty_weights(include_buffers=False):
            if kind is not None:
                return kind._from_config(config, dtype=dtype)
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)

    model = None
    with suppress(Exception), _EmptyOnMeta():
        model = build()
    try:
        if model is None or any(buffer.is_meta for buffer in model.buffers()):
            model = build()  # something else than a weight began as `torch.empty`, and was used
    except Exception as error:  # a model's constructor raises whatever odd values lead to
        raise ModelError(
            f"cannot build a model from {type(config).__name__}: {type(error).__name__}: {error}"
        ) from error
    return model.eval()


def config_dtype(config: Any) -> torch.dtype | None:
    """The floating dtype (16 bits or more) that a configuration names, or None."""
    for part in (config, text_config(config)):
        found = read_value(part, "dtype")
        if isinstance(found, str):
            found = getattr(torch, found.removeprefix("torch."), None)
        if isinstance(found, torch.dtype) and found.is_floating_point and found.itemsize >= 2:
            return found
    return None


def dominant_dtype(files: TensorFiles) -> torch.dtype:
    """The floating-point dtype of most weights in the files; float32 when there is none."""
    sizes: dict[torch.dtype, int] = {}
    for stored in files.tensors.values():
        if stored.dtype.is_floating_point and stored.dtype.itemsize >= 2:
            sizes[stored.dtype] = sizes.get(stored.dtype, 0) + (stored.end - stored.start) // stored.dtype.itemsize
    return max(sizes, key=lambda d: sizes[d], default=torch.float32)


def kept_in_float32(model: nn.Module, dtype: torch.dtype) -> Callable[[str], bool]:
    """Which parameters the family keeps in float32: one list holds for float16, a stricter one for bfloat16 too."""
    patterns: set[str] = set()
    if dtype in (torch.float16, torch.bfloat16):
        patterns |= set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        patterns |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    search = re.compile("|".join(p.replace("*", ".*") for p in patterns)).search if patterns else None
    return lambda name: search is not None and search(name) is not None
