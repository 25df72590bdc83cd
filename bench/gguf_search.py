"""The search over ggml types beside ggml's own quantizer with the same importance: weighted error and time.

    python bench/gguf_search.py MODEL --text calib.txt [--tokens 4096] [--blocks 0 7 20 29] [--rows 128]
                                [--types Q4_K Q6_K] [--out gguf_search.json]

Of some layers of each block the first `--rows` rows are quantized; the importance is the second moment of each input
channel over the text. `error` is our `sum h (w - W)^2` over that of `libgguf.quantize_rows(..., imatrix=h)`, the mean
and the largest over layers (ggml itself minimises the error with more weight on larger weights); `none` is the same
with no importance given to us, so it says what heeding it brings. Times are nanoseconds of the process's CPU time for a
weight, on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import gguf
import libgguf
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from vs_peer import machine

from auto_round.codecs.ggml.search import search_blocks
from auto_round.codecs.ggml.types import GGML_TYPES

LAYERS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
WINDOW = 256

Sample = tuple[str, torch.Tensor, torch.Tensor]


@torch.no_grad()
def samples(model: str, text: Path, tokens: int, blocks: list[int], rows: int) -> list[Sample]:
    """(name, weight [rows, in], importance [in]) of the layers."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(model)(text.read_text()[: 8 * tokens], return_tensors="pt").input_ids[0]
    moments: dict[str, torch.Tensor] = {}

    def watch(name: str, inputs: torch.Tensor) -> None:
        flat = inputs.reshape(-1, inputs.shape[-1])
        moments[name] = moments.get(name, torch.zeros(flat.shape[1])) + flat.square().sum(0) / tokens

    found = []
    for block in blocks:
        for layer in LAYERS:
            name = f"model.layers.{block}.{layer}"
            module = loaded.get_submodule(name)
            module.register_forward_pre_hook(lambda _, args, name=name: watch(name, args[0]))
            found.append((name, module.weight[:rows].clone()))
    for window in ids[: tokens - tokens % WINDOW].view(-1, WINDOW):
        loaded.model(window.unsqueeze(0))
    return [(name, weight, moments[name]) for name, weight in found]


def measure(kind: str, layers: list[Sample], repeat: int) -> dict[str, object]:
    ratios, plain, ours, theirs = [], [], 0.0, 0.0
    type_ = gguf.GGMLQuantizationType[kind]
    for _, weight, importance in layers:
        best = [float("inf")] * 2
        for _ in range(repeat):
            start = time.process_time()
            found = search_blocks(weight, kind, importance)
            middle = time.process_time()
            data = libgguf.quantize_rows(weight.numpy(), type_, imatrix=importance.numpy())
            best = [min(best[0], middle - start), min(best[1], time.process_time() - middle)]
        ours, theirs = ours + best[0], theirs + best[1]
        values = (
            found.dequantize(),
            search_blocks(weight, kind).dequantize(),
            torch.from_numpy(gguf.dequantize(data, type_)),
        )
        errors = [float(((value - weight).double().square() * importance).sum()) for value in values]
        ratios.append(errors[0] / errors[2])
        plain.append(errors[1] / errors[2])
    count = sum(weight.numel() for _, weight, _ in layers)
    return {
        "type": kind, "error": round(sum(ratios) / len(ratios), 4), "largest": round(max(ratios), 4),
        "none": round(sum(plain) / len(plain), 4), "ns": round(ours / count * 1e9),
        "ggml_ns": round(theirs / count * 1e9),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--blocks", type=int, nargs="+", default=[0, 7, 20, 29])
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--types", nargs="+", default=list(GGML_TYPES), choices=list(GGML_TYPES))
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    layers = samples(a.model, a.text, a.tokens, a.blocks, a.rows)
    rows = []
    for kind in a.types:
        rows.append(measure(kind, layers, a.repeat))
        print(json.dumps(rows[-1]), flush=True)
    if a.out:
        result = {"machine": machine(), "rows": a.rows, "blocks": a.blocks, "tokens": a.tokens, "types": rows}
        a.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
