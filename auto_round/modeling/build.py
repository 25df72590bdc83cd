"""Load and validate config.json, and build the model on the meta device."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from auto_round.errors import ModelError, UnsupportedError, first_line
from auto_round.modeling.config import LAYER_COUNTS, TEXT_PARTS, read_value, text_config
from auto_round.modeling.files.folder import check_inside, read_object
from auto_round.modeling.files.safetensors import TensorFiles

# Keys where Transformers accepts a hub id, whose kernel it fetches and runs.
_IMPLEMENTATIONS = (
    "attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation",
    "_experts_implementation", "_experts_implementation_internal", "use_kernels", "kernel_config",
)  # fmt: skip
_MAX_SIZES = {
    "hidden_size": 1 << 20, "n_embd": 1 << 20, "d_model": 1 << 20, "intermediate_size": 1 << 24, "ffn_dim": 1 << 24,
    "vocab_size": 1 << 24, "num_attention_heads": 1 << 16, "n_head": 1 << 16, "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 16, "num_experts": 1 << 16, "num_local_experts": 1 << 16, "n_routed_experts": 1 << 16,
    "max_position_embeddings": 1 << 28, "n_positions": 1 << 28,
}  # fmt: skip
# Modules outside the language model; "vq" are image tokenizers.
_TOWER = re.compile(
    r"(?:^|\.)(?:\w*(?:vision|visual|image|video|audio|speech|sound)\w*|vqmodel|vq_model|multi_modal_projector"
    r"|mm_projector|multimodal_projector)\."
)
_PARTS = ("vision_config", "audio_config", "vq_config", "vision_tower_config", "speech_config", "sound_config")
MODEL_FREE_ADVICE = (
    "leave tuning out and use model-free mode, which keeps all its tensors and rounds the language layers: "
    "model_free=True (--model_free)"
)
_OTHER_TASKS = re.compile(r"For(MaskedLM|SequenceClassification|TokenClassification|QuestionAnswering|MultipleChoice)$")


class RawConfig(SimpleNamespace):
    """The values of a config.json as attributes, without Transformers. Only nested text parts are `RawConfig` too."""

    def __init__(self, values: dict[str, Any]) -> None:
        parts = {key: RawConfig(values[key]) for key in TEXT_PARTS if isinstance(values.get(key), dict)}
        dtype = {"dtype": values["torch_dtype"]} if "torch_dtype" in values and "dtype" not in values else {}
        super().__init__(**copy.deepcopy(values), **dtype)
        self.__dict__.update(parts)

    def get_text_config(self) -> RawConfig:
        """The part that describes the language model; the whole configuration if there is only one part."""
        parts = (part for key in TEXT_PARTS if isinstance(part := self.__dict__.get(key), RawConfig))
        return next((part.get_text_config() for part in parts), self)


def read_config(folder: Path) -> RawConfig:
    """Read the config.json of a folder. Raises ModelError when it is missing or not a JSON object."""
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(f"{folder} has no config.json; give the folder of a model with config.json and safetensors")
    return RawConfig(read_object(check_inside(folder, file)))


def check_code(values: Mapping[str, Any], file: Path) -> None:
    """Raise ModelError when a configuration makes Transformers run foreign code (it refuses `auto_map` itself)."""
    for key in _IMPLEMENTATIONS:
        value = values.get(key)
        foreign = value not in (None, False, {}) if key in ("use_kernels", "kernel_config") else _is_repository(value)
        if foreign:
            raise ModelError(
                f"{file} requests code from a repository by {key}={value!r}, which is not run unless you trust it: "
                "remove the key, or pass trust_remote_code=True (--trust_remote_code)"
            )
    for value in values.values():
        if isinstance(value, Mapping):
            check_code(value, file)


def _is_repository(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_is_repository, value.values()))
    return isinstance(value, str) and ("/" in value or ":" in value)


def check_sizes(file: Path, config: Any, tensors: int) -> None:
    """Raise ModelError for a size that no model has; the number of layers is limited by that of stored `tensors`."""
    text = text_config(config)
    for key, most in {**_MAX_SIZES, **dict.fromkeys(LAYER_COUNTS, tensors)}.items():
        value = read_value(text, key)
        each = value if isinstance(value, (list, tuple)) else [value]  # some families have a size per layer
        unlimited = -1 if key == "max_position_embeddings" else None  # no limit, in XLNet
        numbers = [number for number in each if number is not None and number != unlimited]
        if any(not isinstance(n, int) or isinstance(n, bool) or not 0 <= n <= most for n in numbers):
            allowed = f"the {tensors} tensors of the files allow" if key in LAYER_COUNTS else "a model can have"
            raise ModelError(f"{file} has {key}={value!r}; {allowed} at most {most}; fetch it again")


def tower_tensors(names: Iterable[str]) -> list[str]:
    """Names of a checkpoint's tensors that belong to vision or audio parts."""
    return [name for name in names if _TOWER.search(name)]


def _is_multimodal(config: Any) -> bool:
    return any(getattr(config, part, None) is not None for part in _PARTS)


def check_towers(config: Any, names: Iterable[str], model: str) -> None:
    """Raise UnsupportedError if `names`, a checkpoint's tensors, have an encoder that its causal class does not load.

    `AutoModelForCausalLM` drops it silently for families such as Qwen3.5, Llama 4 and Mllama.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    named = tuple(getattr(config, "architectures", None) or ())
    if not _is_multimodal(config) or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return
    found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    classes = [kind.__name__ for kind in (found if isinstance(found, (tuple, list)) else (found,))]
    lost = [] if set(classes) & set(named) else tower_tensors(names)
    if lost:
        what = f"config.json names {named[0]}" if named else "config.json names no class"
        raise UnsupportedError(
            f"{model} reads more than text: {what}, and {classes[0]}, which is tuned, does not use {len(lost)} of "
            f"its tensors, such as {lost[0]}; {MODEL_FREE_ADVICE}"
        )


def load_config(folder: Path, *, trust_remote_code: bool = False, causal: bool = True) -> Any:
    """Load the Transformers configuration of a folder: with `causal`, that of a causal language model or ModelError."""
    from transformers import AutoConfig

    file = folder / "config.json"
    if not file.is_file():
        if (folder / ".partial").is_dir():
            raise ModelError(f"{folder} contains an unfinished quantization; run the same command again to resume it")
        raise ModelError(f"{folder} has no config.json; give the folder of a Transformers model")
    raw = read_object(check_inside(folder, file))
    if not trust_remote_code:
        check_code(raw, file)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # Transformers raises attribute, type and validation errors
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{folder} contains Python code, which is not run unless you trust it: "
                "read it, then pass trust_remote_code=True (--trust_remote_code)"
            ) from error
        raise ModelError(f"{file} cannot be used: {first_line(error)}") from error
    if causal:
        remote = isinstance(raw.get("auto_map"), dict) and "AutoModelForCausalLM" in raw["auto_map"]
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
    if reason and _is_multimodal(config):
        raise ModelError(f"{folder} reads more than text, and is not tuned: {reason}; {MODEL_FREE_ADVICE}")
    if reason:
        raise ModelError(
            f"{folder} is not a causal language model: {reason}; only decoder-only language models can be quantized"
        )


class _EmptyOnMeta(TorchFunctionMode):
    """Makes `torch.empty`, by which weights are created, allocate on meta unless a device is given.

    Without it each weight is allocated before it is moved to meta, which fragments the heap: 2 GB for a model of 3 GB.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def build_on_meta(config: Any, dtype: torch.dtype, trust_remote_code: bool, kind: type[Any] | None = None) -> nn.Module:
    """Build the model with parameters on meta and real buffers, in eval mode. `kind`: its class, if known."""
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
            model = build()  # a value other than a weight was created by `torch.empty`
    except Exception as error:  # a model's constructor can raise anything on odd values
        name = type(config).__name__
        raise ModelError(f"cannot build a model from {name}: {type(error).__name__}: {error}") from error
    return model.eval()


def float_dtype(value: object) -> torch.dtype | None:
    """The floating-point dtype (16 bits or more) of this name, such as "torch.bfloat16"; None for anything else."""
    found = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    return found if isinstance(found, torch.dtype) and found.is_floating_point and found.itemsize >= 2 else None


def config_dtype(config: Any) -> torch.dtype | None:
    """The floating-point dtype (16 bits or more) of a configuration, or None."""
    return float_dtype(read_value(config, "dtype")) or float_dtype(read_value(text_config(config), "dtype"))


def dominant_dtype(files: TensorFiles) -> torch.dtype:
    """The floating-point dtype of most weights in the files; float32 when there is none."""
    sizes = Counter[torch.dtype]()
    for stored in files.tensors.values():
        if float_dtype(stored.dtype) is not None:
            sizes[stored.dtype] += (stored.end - stored.start) // stored.dtype.itemsize
    return max(sizes, key=lambda d: sizes[d], default=torch.float32)


def float32_filter(model: nn.Module, dtype: torch.dtype) -> Callable[[str], bool]:
    """A predicate for the parameters that the family keeps in float32; bfloat16 models use a shorter list."""
    names = ["_keep_in_fp32_modules_strict"] if dtype in (torch.float16, torch.bfloat16) else []
    names += ["_keep_in_fp32_modules"] if dtype == torch.float16 else []
    patterns = [pattern for name in names for pattern in getattr(model, name, None) or ()]
    search = re.compile("|".join(p.replace("*", ".*") for p in patterns)).search if patterns else None
    return lambda name: search is not None and search(name) is not None
