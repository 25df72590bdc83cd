"""The same model, data, seed, samples and steps with this package and with the peer, one after the other.

    python bench/vs_peer.py --model MODEL --peer_python /path/to/peer-venv/bin/python --text calib.txt \
        --eval_text wiki.txt web.txt --runs rtn:W4A16 opt:W4A16 20:W2A16 --out bench/results/NAME.json

A run is `steps:scheme`, with `rtn` and `opt` for no steps, and `gptq` for no steps with error feedback, where the peer
runs its `opt`. Wall time and peak memory are of the whole process, imports
and saving included. Quality is measured here, for both, on the files as saved: perplexity, mean KL divergence to the
full-precision model and top-1 agreement, with standard errors over windows. Linux only (peak memory from /proc).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from programs import run_script, variables

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from auto_round.eval.evaluate import EvalResult

HERE = Path(__file__).parent


def machine() -> str:
    name = next((x.split(":")[1].strip() for x in open("/proc/cpuinfo") if x.startswith("model name")), "?")
    flags = next((x for x in open("/proc/cpuinfo") if x.startswith("flags")), "")
    vector = next((f for f in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if f in flags), "no vectors")
    import torch

    gpu = f", {torch.cuda.get_device_name(0)}" if torch.cuda.is_available() else ""
    cores = len(os.sched_getaffinity(0))
    return f"{name} ({vector}), {cores} cores, Python {platform.python_version()}, torch {torch.__version__}{gpu}"


def pick_texts(path: str, count: int, tokens: int, seed: int = 0) -> list[str]:
    """`count` pieces of the file, each long enough for `tokens` tokens."""
    text = Path(path).read_text(encoding="utf-8")
    size = tokens * 8
    starts = random.Random(seed).sample(range(len(text) // size), count)
    return [text[s * size : (s + 1) * size] for s in starts]


def child(python: str, script: str, job: dict) -> dict:
    # scripts are run by path, so their own folder is on sys.path, and the repository is not
    command = [python, str(HERE / script), json.dumps(job)]
    return run_script(command, script, variables(script == "run_ours.py"), job["work"])


def _public(value: object) -> object:
    """Without the names of folders on this machine."""
    return (
        {k: v for k, v in value.items() if k not in ("folder", "model", "reference")}
        if isinstance(value, dict)
        else value
    )


def checkpoint(folder: str) -> str:
    """Where the model lies. Transformers refuses the group sizes that 0.16.1 writes for two types, a list and zero;
    what they mean is said in other keys there, so they are replaced to open the files at all."""
    config = next(Path(folder).rglob("config.json"))
    values = json.loads(config.read_text(encoding="utf-8"))
    found = values["quantization_config"]
    if isinstance(found["group_size"], list):
        found["group_size"] = found["group_size"][1]
    elif found["group_size"] == 0:
        found |= {"group_size": -1, "weight_strategy": "tensor", "packing_format": "auto_round:fp8"}
    config.write_text(json.dumps(values), encoding="utf-8")
    return str(config.parent)


def quantized_quality(
    peer_python: str | None, job: dict, evals: list[str], reference: PreTrainedModel
) -> tuple[dict, EvalResult]:
    """What a quantization costs, by the peer or (None) by this package, and how good the saved model is on windows of
    512 tokens of the texts, as many of each. The saved model is removed."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from auto_round.eval.evaluate import evaluate

    python, script = (peer_python, "run_peer.py") if peer_python else (sys.executable, "run_ours.py")
    result = child(python, script, job)
    quantized = AutoModelForCausalLM.from_pretrained(
        checkpoint(job["out"]), dtype=torch.float32, device_map=job["device"]
    )
    quality = evaluate(
        quantized.eval(), texts=evals, tokenizer=AutoTokenizer.from_pretrained(job["model"]), reference=reference,
        seqlen=512, max_windows=job["windows"] * len(evals), batch_size=4, device=job["device"],
    )  # fmt: skip
    shutil.rmtree(job["out"])
    return result, quality


def add_common_arguments(p: argparse.ArgumentParser) -> None:
    """The model, the peer, the texts, and the amount of data: what both programs are given alike."""
    p.add_argument("--model", required=True)
    p.add_argument("--peer_python", help="python of a venv with auto-round==0.16.1; without it only ours is run")
    p.add_argument("--text", required=True)
    p.add_argument("--eval_text", nargs="+", required=True)
    p.add_argument("--nsamples", type=int, default=16)
    p.add_argument("--seqlen", type=int, default=256)
    p.add_argument("--batch_size", type=int, default=8)
    p.add_argument("--windows", type=int, default=16, help="evaluation windows of 512 tokens from each text")
    p.add_argument("--device", default="cpu")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(p)
    p.add_argument("--runs", nargs="+", default=["rtn:W4A16", "opt:W4A16", "20:W4A16", "20:W2A16"])
    p.add_argument("--group_size", type=int, help="64 in the integer types' figures; default: the scheme's own")
    p.add_argument("--peer_no_amp", action="store_true", help="float32 for the peer: its bf16 is emulated on this CPU")
    p.add_argument("--no_verify", action="store_true", help="leave out our check after saving, which the peer has not")
    p.add_argument("--only_peer", action="store_true")
    p.add_argument("--out")
    a = p.parse_args()

    import torch
    from transformers import AutoModelForCausalLM

    results = []
    evals = [Path(e).read_text(encoding="utf-8")[: a.windows * 512 * 7] for e in a.eval_text]
    reference = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32).eval().to(a.device)
    print(machine(), flush=True)
    with tempfile.TemporaryDirectory() as work:
        texts = os.path.join(work, "texts.json")
        json.dump(pick_texts(a.text, a.nsamples, a.seqlen), open(texts, "w", encoding="utf-8"))
        for run in a.runs:
            steps, scheme = run.split(":")
            row: dict = {"run": run}
            for who in ("peer", "ours"):
                if (who == "peer" and not a.peer_python) or (who == "ours" and a.only_peer):
                    continue
                out = os.path.join(work, f"{who}-{steps}-{scheme}")
                job = {
                    "model": os.path.abspath(a.model), "scheme": scheme, "group_size": a.group_size, "texts": texts,
                    "nsamples": a.nsamples, "seqlen": a.seqlen, "batch_size": a.batch_size,
                    "iters": 0 if steps in ("rtn", "opt", "gptq") else int(steps),
                    "algorithm": "gptq" if steps == "gptq" else None,
                    "disable_opt_rtn": steps == "rtn", "out": out, "device": a.device, "work": work,
                    "windows": a.windows, "verify": not a.no_verify, "peer_amp": not a.peer_no_amp,
                }  # fmt: skip
                result, quality = quantized_quality(a.peer_python if who == "peer" else None, job, evals, reference)
                row[who] = {**result, **quality.to_dict()}
                shown = ", ".join(f"{name} {value}" for name, value in quality.rows())
                print(
                    f"{run} {who}: wall {result['wall']:.1f} s, peak {result['rss'] / 1e6:.0f} MB, {shown}", flush=True
                )
            if "peer" in row and "ours" in row:
                ours, peer = row["ours"], row["peer"]
                row["ratio"] = {
                    "wall": ours["wall"] / peer["wall"], "rss": ours["rss"] / peer["rss"],
                    "kl": ours["kl"]["value"] / peer["kl"]["value"],
                }  # fmt: skip
                if ours.get("vram") and peer.get("vram"):
                    row["ratio"]["vram"] = ours["vram"] / peer["vram"]
                print(run, "ratio ours/peer:", ", ".join(f"{k} {v:.3f}" for k, v in row["ratio"].items()), flush=True)
            results.append(row)
            if a.out:
                hidden = ("out", "peer_python", "model", "text", "eval_text")
                settings = {k: v for k, v in vars(a).items() if k not in hidden}
                found = [{key: _public(value) for key, value in row.items()} for row in results]
                record = {"machine": machine(), "model": Path(a.model).name, "settings": settings, "results": found}
                Path(a.out).write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
