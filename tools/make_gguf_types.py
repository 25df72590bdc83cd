"""Ask llama.cpp which type each tensor gets in each file type, and write the answers down for the tests.

    python tools/make_gguf_types.py path/to/llama-quantize [--out FILE]

The models are shells: real names, depths and widths of rows, but two rows a matrix, so that each takes a few MB at
most. `llama-quantize --dry-run` prints the types it would make of them, without and with an importance matrix. The
answers are kept as runs of letters, `12a3b`, over the tensors in the order of `tensors_of`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np

FILE_TYPES = (
    "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k_s", "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m",
    "q5_k_s", "q5_k_m", "q6_k",
)  # fmt: skip
LETTERS = dict(zip("abcdefghijklm", (
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"
), strict=True))  # fmt: skip
ROWS = 2
DEFAULT = Path(__file__).resolve().parent.parent / "test" / "test_cpu" / "export" / "gguf" / "llama_types.json"


def dense(columns: int = 256, hidden: int = 512) -> dict[str, list[int]]:
    """Suffixes and shapes of a Llama block."""
    return {
        "attn_norm.weight": [columns],
        **{f"attn_{part}.weight": [ROWS, columns] for part in ("q", "k", "v", "output")},
        **{f"ffn_{part}.weight": [ROWS, columns] for part in ("gate", "up")},
        "ffn_down.weight": [ROWS, hidden],
    }


def experts(count: int, columns: int = 256, hidden: int = 512) -> dict[str, list[int]]:
    """The same with stacked experts and a router."""
    block = {name: shape for name, shape in dense(columns, hidden).items() if not name.startswith("ffn")}
    stacked = {
        f"ffn_{part}_exps.weight": [count, ROWS, hidden if part == "down" else columns]
        for part in ("gate", "up", "down")
    }
    return {**block, "ffn_gate_inp.weight": [count, columns], **stacked}


def fused(columns: int = 256, bias: bool = False) -> dict[str, list[int]]:
    """A block with one matrix for queries, keys and values."""
    names = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
    block = {"attn_norm.weight": [columns], **{f"{name}.weight": [ROWS, columns] for name in names}}
    return {**block, **({f"{name}.bias": [ROWS] for name in names} if bias else {})}


def model(
    arch: str, blocks: list[tuple[int, dict[str, list[int]]]], heads: int, kv: int, tied: bool = False, **more: Any
) -> dict[str, Any]:
    columns = blocks[0][1]["attn_norm.weight"][0]
    outside = {"token_embd.weight": [8, columns], "output_norm.weight": [columns], **more.get("outside", {})}
    if not tied:
        outside["output.weight"] = [8, columns]
    depth = sum(count for count, _ in blocks)
    facts = {"n_layer": depth, "n_head": heads, "n_head_kv": kv, "n_expert": more.get("experts", 0)}
    return {"arch": arch, "facts": facts, "outside": outside, "blocks": blocks}


def models() -> dict[str, dict[str, Any]]:
    down = {"ffn_down_shexp.weight": [ROWS, 512]}
    shared = {"ffn_gate_inp_shexp.weight": [256], **down, "ffn_up_shexp.weight": [ROWS, 256]}
    latent = {
        "attn_norm.weight": [256], "attn_q.weight": [ROWS, 256], "attn_kv_a_mqa.weight": [ROWS, 256],
        "attn_kv_a_norm.weight": [256], "attn_output.weight": [ROWS, 256],
    }  # fmt: skip
    whole = {**latent, "attn_kv_b.weight": [ROWS, 256]}
    split = {"attn_k_b.weight": [4, ROWS, 128], "attn_v_b.weight": [4, ROWS, 256]}
    routed = {name: shape for name, shape in experts(6).items() if name.startswith("ffn")}
    mlp = {name: shape for name, shape in dense().items() if name.startswith("ffn")}
    norms = {"attn_q_norm.weight": [32], "attn_k_norm.weight": [32]}
    bias = {"attn_q.bias": [ROWS], "attn_v.bias": [ROWS]}
    return {
        "grouped": model("llama", [(32, dense())], 8, 2),
        "ungrouped": model("llama", [(22, dense())], 8, 8),
        "tied": model("llama", [(16, dense())], 8, 2, tied=True),
        "narrow-tied": model("llama", [(30, dense(96, 1536))], 9, 3, tied=True),
        "narrow": model("llama", [(7, dense(576, 1536))], 9, 3),
        "odd": model("llama", [(5, dense(100, 70))], 10, 10),
        "one-block": model("llama", [(1, dense())], 4, 1),
        "70b": model("llama", [(80, dense())], 64, 8),
        "65b": model("llama", [(80, dense())], 64, 64),
        "qwen2-72b": model("qwen2", [(80, {**dense(), **bias})], 64, 64),
        "eight-experts": model("llama", [(32, experts(8))], 8, 2, experts=8),
        "qwen3moe": model("qwen3moe", [(24, {**experts(16), **norms})], 8, 1, experts=16),
        "qwen2moe": model("qwen2moe", [(12, {**experts(4), **bias, **shared})], 8, 8, experts=4),
        "deepseek2": model(
            "deepseek2", [(1, {**whole, **mlp}), (26, {**whole, **routed, **down})], 16, 1, experts=6
        ),
        "deepseek2-split": model(
            "deepseek2", [(1, {**latent, **split, **mlp}), (11, {**latent, **split, **routed})], 16, 1, experts=6
        ),
        "falcon": model("falcon", [(32, fused())], 71, 1),
        "gpt2": model(
            "gpt2", [(12, fused(768, bias=True))], 12, 12, tied=True, outside={"position_embd.weight": [8, 768]}
        ),
        "phi3": model("phi3", [(32, fused())], 32, 32),
        "gemma3": model("gemma3", [(18, {**dense(640, 2048), **norms})], 4, 1, tied=True),
    }  # fmt: skip


def tensors_of(described: dict[str, Any]) -> list[tuple[str, list[int]]]:
    """Names and shapes: those outside the blocks, then for each run of equal blocks suffix by suffix."""
    found, first = list(described["outside"].items()), 0
    for count, block in described["blocks"]:
        for suffix, shape in block.items():
            found += [(f"blk.{first + i}.{suffix}", shape) for i in range(count)]
        first += count
    return found


def write_shell(path: Path, described: dict[str, Any]) -> None:
    arch, facts = described["arch"], described["facts"]
    writer = gguf.GGUFWriter(path, arch)
    numbers = {
        "context_length": 128, "embedding_length": 256, "feed_forward_length": 512, "block_count": facts["n_layer"],
        "attention.head_count": facts["n_head"], "attention.head_count_kv": facts["n_head_kv"], "vocab_size": 8,
        "attention.key_length": 32, "attention.value_length": 32, "rope.dimension_count": 32,
    }  # fmt: skip
    if facts["n_expert"]:
        numbers |= {
            "expert_count": facts["n_expert"], "expert_used_count": 2, "expert_feed_forward_length": 512,
            "expert_shared_count": 1, "leading_dense_block_count": 1, "attention.kv_lora_rank": 32,
            "attention.q_lora_rank": 32,
        }  # fmt: skip
    for key, number in numbers.items():
        writer.add_uint32(f"{arch}.{key}", number)
    for key in ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"):
        writer.add_float32(f"{arch}.{key}", 1e-5)
    for name, shape in tensors_of(described):
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_importance(path: Path) -> None:
    """A file with one matrix that no model has: only that there is a file matters."""
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_array("imatrix.datasets", ["none"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 1)
    for end in ("in_sum2", "counts"):
        writer.add_tensor(f"none.{end}", np.ones((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def ask(program: str, shell: Path, file_type: str, importance: Path | None) -> dict[str, str]:
    """{tensor: type} as `llama-quantize --dry-run` prints it."""
    extra = [] if importance is None else ["--imatrix", str(importance)]
    done = subprocess.run(
        [program, "--dry-run", *extra, str(shell), file_type.upper()], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{program} failed on {shell.name} {file_type}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    found = {}
    for name, rest in re.findall(r"\[ *\d+/ *\d+\] +(\S+) +- \[[^]]*\], type = +f32, (.*)", done.stdout + done.stderr):
        made = re.search(r"-> .*\((\w+)\)", rest)
        found[name] = made[1].upper() if made else "F32"
    return found


def packed(types: list[str]) -> str:
    letters = {kind: letter for letter, kind in LETTERS.items()}
    runs = ((letter, len(list(run))) for letter, run in itertools.groupby(letters[kind] for kind in types))
    return "".join(f"{count if count > 1 else ''}{letter}" for letter, count in runs)


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Write down which types llama-quantize gives to tensors.")
    parser.add_argument("llama_quantize")
    parser.add_argument("--out", type=Path, default=DEFAULT)
    args = parser.parse_args()
    described = models()
    with tempfile.TemporaryDirectory() as work:
        importance = Path(work) / "importance.gguf"
        write_importance(importance)
        for name, one in described.items():
            shell = Path(work) / f"{name}.gguf"
            write_shell(shell, one)
            names = [tensor for tensor, _ in tensors_of(one)]
            one["types"] = {}
            for kind in FILE_TYPES:
                plain = ask(args.llama_quantize, shell, kind, None)
                weighed = ask(args.llama_quantize, shell, kind, importance)
                one["types"][kind] = packed([plain[tensor] for tensor in names])
                if weighed != plain:
                    one["types"][kind + "+importance"] = packed([weighed[tensor] for tensor in names])
            shell.unlink()
            print(f"{name}: {len(names)} tensors")
    lines = [f"{json.dumps(name)}: {json.dumps(one)}" for name, one in described.items()]
    text = ",\n".join([f'"letters": {json.dumps(LETTERS)}', *lines])
    args.out.write_text("{\n" + text + "\n}\n", encoding="utf-8")
    print(f"wrote {args.out}, {args.out.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
