"""Loads one model as Transformers does and times a prompt and the tokens after it, for `inference.py`: full precision,
this package and the peer alike. Prints one JSON line."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter

start = time.monotonic()
job = json.loads(sys.argv[1])

import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

torch.set_num_threads(job["threads"])


def status(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    line = next(x for x in open("/proc/self/status", encoding="utf-8") if x.startswith(key))
    return int(line.split()[1]) * 1024


@torch.inference_mode()
def decode(model: torch.nn.Module, ids: torch.Tensor, count: int) -> float:
    """Seconds a token, of `count` after the prompt; each token goes through the model alone."""
    out = model(ids, use_cache=True)
    name = next(name for name in ("cache", "past_key_values") if name in out)  # Transformers 5.24 says the first
    times = []
    for _ in range(count):
        began = time.perf_counter()
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        out = model(token, **{name: out[name]}, use_cache=True)
        times.append(time.perf_counter() - began)
    return sum(times) / len(times)


@torch.inference_mode()
def prefill(model: torch.nn.Module, ids: torch.Tensor) -> float:
    began = time.perf_counter()
    model(ids, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - began


model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype="auto", device_map="cpu").eval()
loaded = time.monotonic() - start
rss = status("VmRSS")
ids = torch.randint(10, 30000, (1, job["prompt"]), generator=torch.Generator().manual_seed(0))
decode(model, ids[:, :32], 2)
steps = [decode(model, ids[:, :32], job["tokens"]) for _ in range(job["repeat"])]
prompts = [prefill(model, ids) for _ in range(1 if job["slow_prefill"] else job["repeat"])]
kinds = Counter(type(getattr(m, "kernel", None) or m).__name__ for m in model.modules() if hasattr(m, "in_features"))
result = {
    "decode": 1 / min(steps), "prefill": job["prompt"] / min(prompts), "load_s": loaded, "rss": rss,
    "peak": status("VmHWM"), "layers": dict(kinds),
}  # fmt: skip
print("RESULT " + json.dumps(result))
