"""Model-free mode against the speed of the disk and against the peer, on checkpoints made up here.

    python bench/model_free.py --work DIR [--gb 8] [--shape llama moe] [--parallelism 1 2] [--scheme W4A16]
        [--peer_python VENV/bin/python] [--save bench/results/model_free.json]

Needs free space for two and a half times `--gb` in `--work`. The checkpoints are bfloat16 in shards of 2 GB, streamed
to the disk; their weights are normal numbers out of one pool, turned a little further for every tensor. Each run is a
process of its own, started with the files in the page cache (they are read once before), and reports GB of input a
second of wall time (`gb_per_s`) and of processor time (`gb_per_cpu_s`, which other work changes less), the peak of its
resident memory (with all its children, sampled, for the peer), and its share of the limit:

    limit = input bytes / (seconds of `cp` of the output's bytes + reading the input + the arithmetic alone)

where the arithmetic is rounding and packing of a sample of the checkpoint's tensors in memory, divided by the workers.
`share_of_copy` is the same with `cp` of the input's bytes in place of the first two: what only copying the model takes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from programs import variables
from vs_peer import machine

SHARD = 2_000_000_000
SHAPES: dict[str, dict[str, Any]] = {
    "llama": dict(
        architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=4096, intermediate_size=14336,
        num_attention_heads=32, num_key_value_heads=8, vocab_size=128256, rms_norm_eps=1e-5,
    ),
    "moe": dict(
        architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", hidden_size=2048, intermediate_size=6144,
        moe_intermediate_size=768, num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128,
        num_experts_per_tok=8, vocab_size=151936, rms_norm_eps=1e-6, decoder_sparse_step=1, mlp_only_layers=[],
    ),
}  # fmt: skip


def block_tensors(shape: str, config: dict[str, Any], index: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of one block."""
    hidden = config["hidden_size"]
    head = config.get("head_dim", hidden // config["num_attention_heads"])
    queries, keys = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    front = f"model.layers.{index}"
    yield f"{front}.input_layernorm.weight", (hidden,)
    for name, size in (
        ("q", (queries, hidden)),
        ("k", (keys, hidden)),
        ("v", (keys, hidden)),
        ("o", (hidden, queries)),
    ):
        yield f"{front}.self_attn.{name}_proj.weight", size
    yield f"{front}.post_attention_layernorm.weight", (hidden,)
    mlps = [(f"{front}.mlp", config["intermediate_size"])]
    if shape == "moe":
        for name in ("q_norm", "k_norm"):
            yield f"{front}.self_attn.{name}.weight", (head,)
        yield f"{front}.mlp.gate.weight", (config["num_experts"], hidden)
        mlps = [(f"{front}.mlp.experts.{i}", config["moe_intermediate_size"]) for i in range(config["num_experts"])]
    for prefix, inner in mlps:
        yield f"{prefix}.gate_proj.weight", (inner, hidden)
        yield f"{prefix}.up_proj.weight", (inner, hidden)
        yield f"{prefix}.down_proj.weight", (hidden, inner)


def all_tensors(shape: str, config: dict[str, Any], goal: int) -> tuple[list[tuple[str, tuple[int, ...]]], int]:
    """(tensors of a checkpoint of about `goal` bytes, blocks)."""
    ends = [("model.embed_tokens.weight", (config["vocab_size"], config["hidden_size"])),
            ("model.norm.weight", (config["hidden_size"],)),
            ("lm_head.weight", (config["vocab_size"], config["hidden_size"]))]  # fmt: skip
    size = lambda tensors: sum(2 * torch.Size(s).numel() for _, s in tensors)
    one = list(block_tensors(shape, config, 0))
    blocks = max(1, round((goal - size(ends)) / size(one)))
    inside = [t for i in range(blocks) for t in block_tensors(shape, config, i)]
    return [ends[0], *inside, *ends[1:]], blocks


def make_checkpoint(folder: Path, shape: str, goal: int) -> int:
    """Write one; returns its bytes. Memory: the pool and one tensor's header."""
    config = dict(SHAPES[shape])
    tensors, blocks = all_tensors(shape, config, goal)
    config |= {"num_hidden_layers": blocks, "dtype": "bfloat16", "tie_word_embeddings": False, "hidden_act": "silu",
               "max_position_embeddings": 4096}  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    pool = (torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16().view(torch.uint8)
    raw = memoryview(pool.numpy())
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    used = 0
    for name, size in tensors:
        own = 2 * torch.Size(size).numel()
        if used and used + own > SHARD:
            shards.append([])
            used = 0
        shards[-1].append((name, size))
        used += own
    weight_map, turn, total = {}, 0, 0
    for number, members in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        header, at = {}, 0
        for name, size in members:
            end = at + 2 * torch.Size(size).numel()
            header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [at, end]}
            weight_map[name], at = file, end
        text = json.dumps(header).encode()
        text = text.ljust(-(-len(text) // 8) * 8)
        with open(folder / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for name, _ in members:
                first, last = header[name]["data_offsets"]
                left, turn = last - first, (turn + 2 * 77777) % len(raw)
                start = turn
                while left:
                    part = raw[start : start + left]
                    out.write(part)
                    left, start = left - len(part), 0
        total += at
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def read_all(folder: Path) -> float:
    """Seconds to read every weight file once."""
    buffer = bytearray(8 << 20)
    start = time.monotonic()
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb", buffering=0) as handle:
            while handle.readinto(buffer):
                pass
    return time.monotonic() - start


def copy_seconds(folder: Path, target: Path) -> float:
    """Seconds that `cp` and `sync` need for the weight files of a folder."""
    target.mkdir()
    start = time.monotonic()
    subprocess.run(["cp", *map(str, sorted(folder.glob("*.safetensors"))), str(target)], check=True)
    subprocess.run(["sync", "-d", *map(str, sorted(target.iterdir()))], check=True)
    seconds = time.monotonic() - start
    shutil.rmtree(target)
    return seconds


def arithmetic_seconds(folder: Path, scheme: str, sample: int = 6) -> float:
    """Seconds of rounding and packing alone, for all layers, by a sample of them, on the threads that PyTorch has."""
    from auto_round import AutoRound
    from auto_round.formats.base import get_format
    from auto_round.run.model_free.driver import ModelFree
    from auto_round.run.model_free.unit_processor import UnitProcessor
    from auto_round.run.model_free.units import plan_work

    free = AutoRound(str(folder), scheme=scheme, model_free=True, device_map="cpu")._runs
    assert isinstance(free, ModelFree)
    fmt = get_format("auto_round")
    job, source = free.plan_for([fmt]), free.source
    units, layout = plan_work(job, source, fmt)
    rounder = UnitProcessor(job, source, fmt, units, layout, free.settings)
    layers = [unit for unit in units if unit.layers]
    plans = lambda unit: [job.layers[name] for group in unit.layers for name in group]
    weights = lambda unit: sum(plan.out_features * plan.in_features for plan in plans(unit))
    seconds = done = 0.0
    for unit in layers[:: max(1, len(layers) // sample)]:
        tasks = [rounder._task(plan, source.read(f"{plan.name}.weight")) for plan in plans(unit)]
        start = time.monotonic()
        for task in tasks:
            fmt.pack(rounder._round(task), model_dtype=source.dtype)
        seconds += time.monotonic() - start
        done += weights(unit)
    return seconds / done * sum(map(weights, layers))


OURS = """
import sys, json, time
start = time.monotonic()
from auto_round import AutoRound
from auto_round.report.memory import peak_rss_bytes
model, out, scheme, workers = sys.argv[1:]
AutoRound(model, scheme=scheme, model_free=True, parallelism=int(workers), device_map="cpu").quantize_and_save(out)
print("RESULT " + json.dumps({"wall": time.monotonic() - start, "rss": peak_rss_bytes()}))
"""
PEER = """
import sys, json, os, time
if __name__ == "__main__":
    start = time.monotonic()
    model, out, scheme, workers = sys.argv[1:]
    os.environ["AR_MODEL_FREE_SHARD_PARALLELISM"] = workers
    from auto_round import AutoRound
    AutoRound(model=model, scheme=scheme, model_free=True, device_map="cpu").quantize_and_save(out)
    print("RESULT " + json.dumps({"wall": time.monotonic() - start}))
"""


def observe(pid: int, seconds: dict[int, float]) -> int:
    """Resident memory of a process and its children now; `seconds` gets the processor time of each."""
    import psutil

    total = 0
    try:
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            times = process.cpu_times()
            seconds[process.pid] = times.user + times.system
            total += process.memory_info().rss
    except psutil.Error:
        pass
    return total


def timed(python: str, program: Path, words: list[str], cwd: Path) -> dict[str, Any]:
    """Run one process; its own figures, the most memory that it and its children held at once, and the processor time
    of all of them."""
    log = program.with_suffix(".log")
    # Each side imports what is installed for it, or lies in its working folder.
    env = variables(PYTHONPATH=str(cwd))
    seconds: dict[int, float] = {}
    most = 0
    with open(log, "w") as output:
        process = subprocess.Popen([python, program, *words], stdout=output, stderr=subprocess.STDOUT, cwd=cwd, env=env)
        while process.poll() is None:
            most = max(most, observe(process.pid, seconds))
            time.sleep(0.2)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("RESULT ")]
    if not lines:
        return {"failed": log.read_text(errors="replace")[-2000:]}
    return json.loads(lines[-1][7:]) | {"tree_rss": most, "cpu": sum(seconds.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--gb", type=float, default=8.0)
    parser.add_argument("--shape", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--scheme", default="W4A16")
    parser.add_argument("--parallelism", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--peer_python")
    parser.add_argument("--save", type=Path)
    given = parser.parse_args()
    repository = Path(__file__).resolve().parents[1]
    given.work.mkdir(parents=True, exist_ok=True)
    programs = {"ours": given.work / "ours.py", "peer": given.work / "peer.py"}
    programs["ours"].write_text(OURS)
    programs["peer"].write_text(PEER)
    result: dict[str, Any] = {"machine": machine(), "gb": given.gb, "scheme": given.scheme, "runs": []}
    for shape in given.shape:
        model, out = given.work / shape, given.work / "out"
        shutil.rmtree(model, ignore_errors=True)
        size = make_checkpoint(model, shape, int(given.gb * 1e9))
        arithmetic = arithmetic_seconds(model, given.scheme)
        copying = copy_seconds(model, given.work / "copy")
        for workers in given.parallelism:
            for who, python in (("ours", sys.executable), ("peer", given.peer_python)):
                if python is None:
                    continue
                shutil.rmtree(out, ignore_errors=True)
                reading = read_all(model)
                cwd = repository if who == "ours" else given.work
                row = timed(python, programs[who], [str(model), str(out), given.scheme, str(workers)], cwd)
                row |= {"who": who, "shape": shape, "parallelism": workers, "input_bytes": size}
                if "wall" in row:
                    rounding = arithmetic / min(workers, torch.get_num_threads())
                    limit = reading + copy_seconds(out, given.work / "copy") + rounding
                    speed = size / 1e9
                    row |= {"gb_per_s": speed / row["wall"], "gb_per_cpu_s": speed / row["cpu"]}
                    row |= {"limit_gb_per_s": speed / limit, "share_of_limit": limit / row["wall"]}
                    row |= {"read_s": reading, "arithmetic_s": arithmetic, "copy_s": copying}
                    row |= {"share_of_copy": (copying + rounding) / row["wall"]}
                print(json.dumps(row), flush=True)
                result["runs"].append(row)
        shutil.rmtree(model)
    if given.save:
        given.save.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
