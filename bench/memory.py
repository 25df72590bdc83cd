"""What `--dry_run` predicts against what a run then takes: peak memory and file sizes.

    python bench/memory.py --work DIR [--only NAME ...] [--save bench/results/memory.json]

Every row is a process of its own: it plans, then does what it planned, and reads its peak of resident memory (VmHWM)
and the sizes of its files. The models are Llama-shaped with random weights. Linux only.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from model_free import SHAPES, make_checkpoint
from programs import Failed, run_script, variables
from vs_peer import machine

_LLAMA = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", num_attention_heads=16, num_key_value_heads=4,
    rms_norm_eps=1e-5,
)  # fmt: skip
MODELS: dict[str, tuple[dict[str, Any], int]] = {  # configuration, bytes
    "small": (_LLAMA | dict(hidden_size=768, intermediate_size=2048, vocab_size=8192), 52_000_000),
    "wide": (_LLAMA | dict(hidden_size=2048, intermediate_size=5632, vocab_size=8192), 150_000_000),
    "words": (_LLAMA | dict(hidden_size=768, intermediate_size=2048, vocab_size=65536), 225_000_000),
    "moe": (
        SHAPES["moe"] | dict(
            hidden_size=768, moe_intermediate_size=512, num_attention_heads=12, num_key_value_heads=4, head_dim=64,
            num_experts=32, num_experts_per_tok=4, vocab_size=8192),
        180_000_000),
}  # fmt: skip
TUNED = {"iters": 3, "lr": 0.001}
SHORT, LONG = {"nsamples": 4, "seqlen": 128}, {"nsamples": 24, "seqlen": 1024}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {  # model, format, keywords
    "W4A16 tuned": ("wide", "auto_round", {"scheme": "W4A16", **TUNED, **SHORT}),
    "W4A16 tuned, long samples": ("small", "auto_round", {"scheme": "W4A16", **TUNED, **LONG}),
    "W4A16 tuned, long samples, spilled": (
        "small", "auto_round", {"scheme": "W4A16", **TUNED, **LONG, "max_memory": 0}),
    "W2A16 asymmetric, tuned by AdamW": (
        "small", "auto_round", {"scheme": "W2A16", "sym": False, **TUNED, **SHORT, "enable_adam": True}),
    "MXFP4 tuned": ("wide", "llm_compressor", {"scheme": "MXFP4", **TUNED, **SHORT}),
    "gguf:q4_k_m tuned": ("words", "gguf:q4_k_m", {"scheme": "gguf:q4_k_m", **TUNED, **SHORT}),
    "W4A16 opt-RTN": ("wide", "auto_round", {"scheme": "W4A16", "iters": 0, **SHORT}),
    "W4A16 opt-RTN, long samples": ("small", "auto_round", {"scheme": "W4A16", "iters": 0, **LONG}),
    "W4A16 opt-RTN, long samples, spilled": (
        "small", "auto_round", {"scheme": "W4A16", "iters": 0, **LONG, "max_memory": 0}),
    "W4A16 RTN": ("wide", "auto_round", {"scheme": "W4A16", "iters": 0, "disable_opt_rtn": True}),
    "W4A16 RTN, many words": ("words", "auto_round", {"scheme": "W4A16", "iters": 0, "disable_opt_rtn": True}),
    "W4A16 tuned, head too": (
        "words", "auto_round", {"scheme": "W4A16", **TUNED, **SHORT, "quant_lm_head": True}),
    "W4A16 tuned, mixture": ("moe", "auto_round", {"scheme": "W4A16", **TUNED, **SHORT}),
    "W4A16 GPTQ, mixture, experts alone": ("moe", "auto_round", {"scheme": "W4A16", **TUNED, **SHORT, "max_memory": 1}),
}  # fmt: skip

CHILD = """
import json, sys
import torch
given = json.loads(sys.argv[1])
from auto_round import AutoRound
from auto_round.errors import ConfigError
from auto_round.report.memory import peak_rss_bytes
keywords = dict(given["keywords"])
count, length = keywords.get("nsamples", 1), keywords.get("seqlen", 128)
ids = [torch.randint(3, 8000, (length,), generator=torch.Generator().manual_seed(i)) for i in range(count)]
lowered = keywords.pop("max_memory", -1) + 1
def make(**more):
    return AutoRound(given["model"], dataset=ids, device_map="cpu", batch_size=4, **keywords, **more)
tuner = make()
job = tuner.plan(given["format"])
for _ in range(lowered):  # a byte less than what it takes: the next way that takes less memory
    tuner = make(max_memory=job.peak_ram - 1)
    job = tuner.plan(given["format"])
tuner.quantize_and_save(given["out"], given["format"])
print("RESULT " + json.dumps({
    "predicted": job.peak_ram, "measured": peak_rss_bytes(), "streams": job.memory_plan.streams,
    "spilled": job.memory_plan.spilled, "alone": job.memory_plan.streams_experts,
    "phases": dict(job.memory_plan.phases), "predicted_files": sum(job.bytes_on_disk.values())}))
"""


def save_tokenizer(folder: Path) -> None:
    """One id a byte, words split as GPT-2's are: a GGUF file holds a tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab={**vocab, "<eos>": 256}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)


def run(name: str, work: Path) -> dict[str, Any]:
    model, fmt, keywords = CASES[name]
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    job = {"model": str(work / model), "format": fmt, "keywords": keywords, "out": str(out)}
    env = variables(AR_WORK_SPACE=str(work / "space"), PYTHONPATH=str(Path(__file__).resolve().parents[1]))
    try:
        found = run_script([sys.executable, "-c", CHILD, json.dumps(job)], name, env)
    except Failed as error:
        return {"name": name, "failed": str(error)}
    row = {"name": name, "model": model, "format": fmt, "keywords": keywords, **found}
    files = sum(f.stat().st_size for f in out.rglob("*") if f.suffix in (".safetensors", ".gguf"))
    shutil.rmtree(out)
    return row | {
        "measured_files": files, "ratio": row["predicted"] / row["measured"],
        "files_ratio": row["predicted_files"] / files,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--save", type=Path)
    given = parser.parse_args()
    work = given.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    for model in {CASES[name][0] for name in given.only}:
        SHAPES[model], size = MODELS[model]
        shutil.rmtree(work / model, ignore_errors=True)
        make_checkpoint(work / model, model, size)
        save_tokenizer(work / model)
    rows = []
    for name in given.only:
        rows.append(row := run(name, work))
        if "failed" in row:
            print(f"{name}: failed\n{row['failed']}", flush=True)
            continue
        print(
            f"{name:<40} predicted {row['predicted'] / 1e6:6.0f} MB, measured {row['measured'] / 1e6:6.0f} MB "
            f"({row['ratio'] - 1:+.1%}); files {row['files_ratio'] - 1:+.2%}; streams in {row['streams']}",
            flush=True,
        )
    if given.save:
        before = json.loads(given.save.read_text())["runs"] if given.save.exists() else []
        found = {row["name"]: row for row in [*before, *rows]}  # with --only, others stay
        result = {"machine": machine(), "runs": [found[name] for name in CASES if name in found]}
        given.save.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
