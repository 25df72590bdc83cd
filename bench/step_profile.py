"""Where the time of one tuning step goes, against the floor of three plain matrix products for each linear layer.

    python bench/step_profile.py [--hidden 576 --intermediate 1536 --heads 9 --kv_heads 3 --samples 8 --seqlen 256]

Builds one random Llama block of that shape, runs the step of SignRound piece by piece, and prints a table: medians over
`--repeat` steps, in milliseconds and as a share of the whole.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from pathlib import Path

import torch
from vs_peer import machine

from auto_round.algorithms.base import LayerTask
from auto_round.algorithms.quantization.sign_round.learnable_group import LearnableGroup, TunableLinear, stack_tasks
from auto_round.inference.linear import compute_dtype_for
from auto_round.schemes import QuantizationScheme


class Stopwatch:
    def __init__(self, device: torch.device) -> None:
        self.device, self.laps = device, defaultdict(list)

    def lap(self, name: str, since: float) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.laps[name].append((now - since) * 1e3)
        return now


def build(a: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> tuple[torch.nn.Module, list, tuple]:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=a.hidden, intermediate_size=a.intermediate, num_attention_heads=a.heads,
        num_key_value_heads=a.kv_heads, num_hidden_layers=1, vocab_size=128, attn_implementation="sdpa",
    )  # fmt: skip
    block = LlamaDecoderLayer(config, 0).to(device, dtype).requires_grad_(False)
    positions = torch.arange(a.seqlen, device=device)[None]
    tables = LlamaRotaryEmbedding(config).to(device)(
        torch.zeros(1, a.seqlen, a.hidden, device=device, dtype=dtype), positions
    )
    scheme = QuantizationScheme(bits=a.bits, group_size=a.group_size)
    parents = {
        name: parent
        for parent in (block.self_attn, block.mlp)
        for name, module in parent.named_children()
        if isinstance(module, torch.nn.Linear)
    }
    tasks = [LayerTask(n, getattr(p, n), getattr(p, n).weight.detach(), scheme) for n, p in parents.items()]
    groups = []
    for stacked in stack_tasks(tasks):
        grids = [task.start(True, torch.float16) for task in stacked]
        group = LearnableGroup(stacked, grids, dtype, compile_step=a.compile)
        for index, task in enumerate(stacked):
            setattr(parents[task.name], task.name, TunableLinear(group, index))
        groups.append(group)
    return block, groups, tables


def floor(weights: list, tokens: int, device: torch.device, dtype: torch.dtype, repeat: int) -> float:
    """Milliseconds of x W^T, g W and g^T x for every layer, each the median of `repeat`."""
    total = 0.0
    for w in weights:
        out, columns = w.shape
        x = torch.randn(tokens, columns, device=device, dtype=dtype)
        g = torch.randn(tokens, out, device=device, dtype=dtype)
        for product in (lambda x=x, w=w: x @ w.t(), lambda g=g, w=w: g @ w, lambda g=g, x=x: g.t() @ x):
            watch = Stopwatch(device)
            for _ in range(repeat):
                product()
                watch.lap("warm", time.perf_counter())
                start = time.perf_counter()
                product()
                watch.lap("product", start)
            total += statistics.median(watch.laps["product"])
    return total


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("hidden", 576), ("intermediate", 1536), ("heads", 9), ("kv_heads", 3), ("samples", 8),
                        ("seqlen", 256), ("bits", 4), ("group_size", 64), ("repeat", 9)):  # fmt: skip
        p.add_argument(f"--{name}", type=int, default=value)
    p.add_argument("--device", default="cpu")
    p.add_argument("--compile", action="store_true", help="as enable_torch_compile does")
    p.add_argument("--out")
    a = p.parse_args()
    device = torch.device(a.device)
    dtype = compute_dtype_for(device, torch.bfloat16)
    block, groups, tables = build(a, device, dtype)
    inputs = torch.randn(a.samples, a.seqlen, a.hidden, device=device, dtype=dtype)
    target = torch.randn_like(inputs)
    watch = Stopwatch(device)
    for _ in range(a.repeat + 2):
        begin = now = time.perf_counter()
        output = block(inputs, position_embeddings=tables)
        now = watch.lap("forward", now)
        with torch.no_grad():
            difference = output - target
        now = watch.lap("loss", now)
        output.backward(difference)
        now = watch.lap("backward", now)
        refresh = [group.refresh for group in groups]
        for group in groups:
            group.refresh = lambda: None
            group.step(1e-3, 1e-3)
        now = watch.lap("update", now)
        for group, again in zip(groups, refresh, strict=True):
            group.refresh = again
            again()
        watch.lap("fake-quant", now)
        watch.lap("step", begin)
    medians = {name: statistics.median(laps[2:]) for name, laps in watch.laps.items()}
    weights = [group.weight(index) for group in groups for index in range(len(group.tasks))]
    least = floor(weights, a.samples * a.seqlen, device, dtype, a.repeat)
    print(machine())
    print(f"{'part':<12}{'ms':>9}{'share':>8}")
    for name in ("fake-quant", "forward", "loss", "backward", "update"):
        print(f"{name:<12}{medians[name]:>9.1f}{medians[name] / medians['step']:>8.1%}")
    print(f"{'step':<12}{medians['step']:>9.1f}")
    print(f"{'floor':<12}{least:>9.1f}{least / medians['step']:>8.1%}  (3 products a layer)")
    if a.out:
        record = {"machine": machine(), "settings": vars(a), "dtype": str(dtype), "ms": medians, "floor_ms": least}
        Path(a.out).write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
