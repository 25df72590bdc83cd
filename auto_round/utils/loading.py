"""Loading a whole model with its tokenizer."""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from auto_round.errors import ModelError, UnsupportedError
from auto_round.later import DIFFUSION, MULTIMODAL
from auto_round.modeling.hub import model_folder
from auto_round.modeling.source import resolve_dtype
from auto_round.utils.modules import get_major_device


def llm_load_model(
    pretrained_model_name_or_path: str, platform: str = "hf", trust_remote_code: bool = False,
    model_dtype: str | None = None, device: Any = "cpu", **kwargs: Any,
) -> tuple[torch.nn.Module, Any]:  # fmt: skip
    """A causal language model with its tokenizer, whole in memory, in evaluation mode.

    `AutoRound` takes the name itself and reads one block at a time; load a model like this to look at it or change it.

    Args:
        pretrained_model_name_or_path: a folder or hub id.
        platform: "hf" or "model_scope".
        trust_remote_code: run the model's own code. Unlike the incumbent's, off unless asked for.
        model_dtype: such as "bf16"; None: as the files say.
        device: where to put it.
        **kwargs: for `from_pretrained`.

    Raises:
        ModelError: there is no such model, or it cannot be opened.
        DeviceError: there is no such device.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = get_major_device(device)
    folder = model_folder(pretrained_model_name_or_path, trust_remote_code=trust_remote_code, platform=platform)
    dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None)) or resolve_dtype(model_dtype) or "auto"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=trust_remote_code, **kwargs)
    except (OSError, ValueError, KeyError, ImportError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{pretrained_model_name_or_path!r} cannot be opened: {first}") from error
    return model.to(place).eval(), tokenizer


def mllm_load_model(*args: Any, **kwargs: Any) -> NoReturn:
    """Raises UnsupportedError: this version has no multimodal models."""
    raise UnsupportedError(MULTIMODAL.sentence("mllm_load_model"))


def diffusion_load_model(*args: Any, **kwargs: Any) -> NoReturn:
    """Raises UnsupportedError: this version has no diffusion models."""
    raise UnsupportedError(DIFFUSION.sentence("diffusion_load_model"))
