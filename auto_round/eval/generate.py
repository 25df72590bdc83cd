"""Continue a prompt with a causal language model, and report the tokens per second and the backends used."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from auto_round.errors import ConfigError, ModelError
from auto_round.inference.linear import TORCH_BACKEND, PackedLinear
from auto_round.inference.qlinear import QuantLinear
from auto_round.report.memory import format_peak_memory


@dataclass(frozen=True)
class Generation:
    """A continuation, with speed and backends.

    Attributes:
        text: without the prompt.
        prompt_tokens, new_tokens: counts.
        prefill_seconds: time to the first new token.
        decode_seconds: time for the others.
        backends: backend -> number of linear layers; "dense" for layers that are not quantized.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    backends: dict[str, int]

    def describe(self) -> str:
        """One line: speeds, backends, memory."""
        parts = [f"prefill {_format_speed(self.prompt_tokens, self.prefill_seconds)}"]
        if self.new_tokens > 1:
            parts.append(f"decode {_format_speed(self.new_tokens - 1, self.decode_seconds)}")
        layers = ", ".join(f"{name} ({count})" for name, count in self.backends.items())
        return f"{', '.join(parts)}; layers run with {layers}; peak {format_peak_memory()}"


def generate(
    model: Any, tokenizer: Any, prompt: str, *, max_new_tokens: int = 64, do_sample: bool = False,
    temperature: float | None = None, chat: bool | None = None, seed: int = 42,
    on_text: Callable[[str], None] | None = None,
) -> Generation:  # fmt: skip
    """Continue `prompt`.

    Args:
        do_sample: sample tokens, seeded with `seed`; else greedy decoding.
        temperature: of sampling; None takes the model's.
        chat: apply the chat template; None: if there is one.
        on_text: called with each piece of new text.

    Raises:
        ConfigError: an invalid setting, or `chat` without a template.
        ModelError: the tokenizer does not fit the model.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens} is not allowed; use 1 or more")
    if temperature is not None and not temperature > 0:
        raise ConfigError(f"temperature={temperature} is not allowed; use a number above 0, or leave sampling out")
    inputs = _encode(tokenizer, prompt, chat)
    ids, embedding = inputs["input_ids"], model.get_input_embeddings().weight
    if not ids.numel():
        raise ConfigError("the prompt gives no token; write a longer one")
    if int(ids.max()) >= len(embedding):
        raise ModelError(
            f"the tokenizer produced token {int(ids.max())}, but the model has a vocabulary of {len(embedding)}; "
            "use the model's own tokenizer"
        )
    streamer = _streamer(tokenizer, on_text)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    sampling: dict[str, Any] = {"do_sample": True} if do_sample else {
        "do_sample": False, "temperature": None, "top_p": None, "top_k": None
    }  # fmt: skip
    if do_sample and temperature is not None:
        sampling["temperature"] = temperature
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        streamer.times.append(time.perf_counter())
        out = model.generate(
            **{key: value.to(embedding.device) for key, value in inputs.items()}, max_new_tokens=max_new_tokens,
            pad_token_id=pad, streamer=streamer, **sampling,
        )  # fmt: skip
    start, first, last = streamer.times[0], streamer.times[1], streamer.times[-1]
    new = out[0, ids.shape[1] :]
    return Generation(
        text=tokenizer.decode(new, skip_special_tokens=True), prompt_tokens=ids.shape[1], new_tokens=len(new),
        prefill_seconds=first - start, decode_seconds=last - first, backends=count_backends(model),
    )  # fmt: skip


def count_backends(model: torch.nn.Module) -> dict[str, int]:
    """The number of linear layers that each backend runs, in descending order; "dense" for full precision."""
    found: Counter[str] = Counter()
    for module in model.modules():
        if isinstance(module, QuantLinear) and module.kernel_path and module.kernel is None:
            found[TORCH_BACKEND] += 1  # moved from the kernel's device, or offloaded
        elif isinstance(module, PackedLinear):
            found[module.backend] += 1
        elif isinstance(module, torch.nn.Linear):
            found["dense"] += 1
    return dict(found.most_common())


def _encode(tokenizer: Any, prompt: str, chat: bool | None) -> dict[str, torch.Tensor]:
    """`input_ids` and, if the tokenizer returns one, `attention_mask`, both int64 [1, tokens]."""
    template = bool(getattr(tokenizer, "chat_template", None))
    if chat and not template:
        raise ConfigError("the tokenizer has no chat template; leave --chat out")
    if template and chat is not False:
        messages = [{"role": "user", "content": prompt}]
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    return {key: encoded[key].long() for key in ("input_ids", "attention_mask") if key in encoded}


def _streamer(tokenizer: Any, on_text: Callable[[str], None] | None) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        """Passes text to `on_text` and records the time of each token."""

        def __init__(self) -> None:
            super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
            self.times: list[float] = []
            self.prompt_seen = False

        def put(self, value: torch.Tensor) -> None:
            if self.prompt_seen:
                self.times.append(time.perf_counter())
            self.prompt_seen = True
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if on_text is not None and text:
                on_text(text)

    return Streamer()


def _format_speed(tokens: int, seconds: float) -> str:
    return f"{tokens} tokens in {seconds:.2f} s ({tokens / max(seconds, 1e-9):.1f} tokens/s)"
