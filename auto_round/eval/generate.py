"""Continue a prompt with a causal language model, and report the tokens per second and the backends used."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from auto_round.errors import ConfigError, ModelError
from auto_round.inference.linear import TORCH_BACKEND, PackedLinear, QuantLinear
from auto_round.report.memory import format_peak_memory


@dataclass(frozen=True)
class Generation:
    """A continuation, with speed and backends."""

    text: str  # without the prompt
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float  # time to the first new token
    decode_seconds: float  # time for the others
    backends: dict[str, int]  # backend -> number of linear layers; "dense" for layers that are not quantized

    def describe(self) -> str:
        """One line: speeds, backends, memory."""
        steps = [("prefill", self.prompt_tokens, self.prefill_seconds)]
        if self.new_tokens > 1:
            steps.append(("decode", self.new_tokens - 1, self.decode_seconds))
        speeds = ", ".join(
            f"{step} {tokens} tokens in {seconds:.2f} s ({tokens / max(seconds, 1e-9):.1f} tokens/s)"
            for step, tokens, seconds in steps
        )
        layers = ", ".join(f"{name} ({count})" for name, count in self.backends.items())
        return f"{speeds}; layers run with {layers}; peak {format_peak_memory()}"


def generate(
    model: Any, tokenizer: Any, prompt: str, *, max_new_tokens: int = 64, do_sample: bool = False,
    temperature: float | None = None, chat: bool | None = None, seed: int = 42,
    on_text: Callable[[str], None] | None = None,
) -> Generation:  # fmt: skip
    """Continue `prompt`: greedily, or by tokens drawn with `seed` (`do_sample`; `temperature` None takes the model's).

    `chat`: apply the chat template; None: if there is one. `on_text` is called with each piece of new text.

    Raises ConfigError for an invalid setting or `chat` without a template, ModelError for another model's tokenizer.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens} is not allowed; use 1 or more")
    if temperature is not None and not temperature > 0:
        raise ConfigError(f"temperature={temperature} is not allowed; use a number above 0, or leave sampling out")
    template = bool(getattr(tokenizer, "chat_template", None))
    if chat and not template:
        raise ConfigError("the tokenizer has no chat template; leave --chat out")
    if template and chat is not False:
        messages = [{"role": "user", "content": prompt}]
        options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
        encoded = tokenizer.apply_chat_template(messages, **options)
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    ids, embedding = encoded["input_ids"].long(), model.get_input_embeddings().weight
    if not ids.numel():
        raise ConfigError("the prompt gives no token; write a longer one")
    if int(ids.max()) >= len(embedding):
        raise ModelError(
            f"the tokenizer produced token {int(ids.max())}, but the model has a vocabulary of {len(embedding)}; "
            "use the model's own tokenizer"
        )
    inputs = {k: encoded[k].long().to(embedding.device) for k in ("input_ids", "attention_mask") if k in encoded}
    sampling: dict[str, Any] = {"do_sample": do_sample}
    if not do_sample:
        sampling |= dict.fromkeys(("temperature", "top_p", "top_k"))
    elif temperature is not None:
        sampling["temperature"] = temperature
    from transformers import TextStreamer

    times: list[float] = []  # of the prompt and of each token

    class Streamer(TextStreamer):
        def put(self, value: torch.Tensor) -> None:
            times.append(time.perf_counter())
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if on_text is not None and text:
                on_text(text)

    streamer: Any = Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        start = time.perf_counter()
        out = model.generate(**inputs, max_new_tokens=max_new_tokens, pad_token_id=pad, streamer=streamer, **sampling)
    new = out[0, ids.shape[1] :]
    return Generation(
        text=tokenizer.decode(new, skip_special_tokens=True), prompt_tokens=ids.shape[1], new_tokens=len(new),
        prefill_seconds=times[1] - start, decode_seconds=times[-1] - times[1], backends=count_backends(model),
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
