"""Open a checkpoint for measuring, through Transformers' own loader."""

from __future__ import annotations

import warnings
from os import PathLike
from typing import Any

import torch

from auto_round.errors import AutoRoundError, ConfigError, ModelError
from auto_round.inference.compute import compute_dtype_for
from auto_round.modeling.build import load_config
from auto_round.modeling.checkpoint_source import load_dequantized
from auto_round.modeling.config_values import read_value, text_config
from auto_round.modeling.hub import model_folder
from auto_round.modeling.quantized_inputs import is_readable, quantization_of

_DTYPES = {
    "bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "fp16": torch.float16, "float16": torch.float16,
    "fp32": torch.float32, "float32": torch.float32,
}  # fmt: skip
# What Transformers raises for files that are missing or damaged, settings that it does not know, a package that a
# format asks for, and a kind of model or quantization that it does not load.
_UNREADABLE = (OSError, ValueError, KeyError, ImportError, NotImplementedError)


def parse_dtype(name: str) -> torch.dtype:
    """The dtype called `name`. Raises ConfigError with the allowed names."""
    if name not in _DTYPES:
        raise ConfigError(f"dtype {name!r} is not known; use {', '.join(_DTYPES)}")
    return _DTYPES[name]


def load_tokenizer(source: str | PathLike[str] | torch.nn.Module, trust_remote_code: bool = False) -> Any:
    """The tokenizer saved beside a model. Raises ConfigError for a model object that names no folder, ModelError
    when there is none."""
    from transformers import AutoTokenizer

    name = str(source)
    if isinstance(source, torch.nn.Module):
        name = str(getattr(getattr(source, "config", None), "_name_or_path", "") or "")
        if not name:
            raise ConfigError("the model object does not tell where it came from; give its tokenizer as tokenizer=")
    folder = model_folder(name, trust_remote_code=trust_remote_code)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as err:  # families' tokenizers raise whatever they like
        raise ModelError(
            f"no tokenizer could be opened in {name!r}: {_first_line(err)}; give one as tokenizer="
        ) from err


def load_model(
    source: str | PathLike[str] | torch.nn.Module,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    dequantized: bool = False,
    backend: str | None = None,
) -> torch.nn.Module:
    """A causal language model in evaluation mode; a model object is returned as it is.

    With `dequantized`, a checkpoint in FP8 or MXFP4 gets the dense weights that it stands for and full-precision
    activations: what quantization starts from. Without, it runs as Transformers runs it, and ours, GPTQ's and AWQ's
    with the back ends of this package.

    Args:
        device: one device, or "auto": spread over all that are here.
        backend: what runs the quantized layers; None is the best that can.

    Raises:
        ConfigError: `backend` is unknown, or the model has no layers that it could run.
        ModelError: the checkpoint does not open.
    """
    if isinstance(source, torch.nn.Module):
        return source
    from transformers import AutoModelForCausalLM

    name = str(source)
    folder = model_folder(name, trust_remote_code=trust_remote_code)
    try:
        config = load_config(folder, trust_remote_code=trust_remote_code)
        saved = read_value(text_config(config), "dtype") or torch.float32
        wanted = dtype or compute_dtype_for("cpu" if device == "auto" else device, saved)
        if dequantized and is_readable(quantization_of(config)):
            return load_dequantized(folder, wanted, device, trust_remote_code=trust_remote_code)
        ours = _ours(config, name, backend)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You passed `quantization_config`")
            model = AutoModelForCausalLM.from_pretrained(
                folder, config=config, dtype=wanted, device_map=device if device == "auto" else {"": str(device)},
                trust_remote_code=trust_remote_code, **ours,
            )  # fmt: skip
    except AutoRoundError:
        raise
    except _UNREADABLE as err:
        raise ModelError(f"{name!r} cannot be opened as a causal language model: {_first_line(err)}") from err
    return model.eval()


def _ours(config: Any, name: str, backend: str | None) -> dict[str, Any]:
    """What makes Transformers open a GPTQ or AWQ checkpoint with our layers, where it would ask for other packages, and
    with the back end that is asked for.

    It refuses configs of GPTQ with `meta`, where GPTQModel tells how it quantized; nothing in there is needed to run.
    """
    quantization = getattr(config, "quantization_config", None)
    values = quantization if isinstance(quantization, dict) else {}
    method = str(values.get("quant_method", ""))
    foreign = method in ("gptq", "awq")
    if backend is not None and not (foreign or "auto-round" in method or "auto_round" in method):
        what = f"in the format of {method!r}, which Transformers runs" if method else "not quantized"
        raise ConfigError(f"backend {backend!r} has nothing to run: {name!r} is {what}; leave the backend out")
    if not foreign and backend is None:
        return {}
    if method == "gptq" and "meta" in values:
        config.quantization_config = {key: value for key, value in values.items() if key != "meta"}
    from transformers import AutoRoundConfig

    return {"quantization_config": AutoRoundConfig(**({} if backend is None else {"backend": backend}))}


def _first_line(err: Exception) -> str:
    return (str(err).strip().splitlines() or [type(err).__name__])[0]
