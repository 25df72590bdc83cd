"""A checkpoint twice as large as the memory it is tuned in, and the peer on the same one.

    python bench/bounded_memory.py --work DIR [--gb 3] [--limit 1.5] [--peer_python VENV/bin/python]
        [--only ours|peer] [--keep] [--save bench/results/bounded_memory.json]

Needs two and a half times `--gb` of disk in `--work`. The checkpoint has Llama's shape (hidden size 2048, 32000 words)
with random weights. Ours runs under a hard limit of the system on private writable memory (RLIMIT_DATA: heap and
anonymous maps, touched or not; `--limit` GB), the peer without one: it would end at once. Both take two steps a block
on the same few short samples and save in the same format; ours checks what it saved. Reported are the peaks of resident
memory, the whole process included. With `--keep` the checkpoint stays, and is used again; `--only` adds one side to
what is saved already. Linux only.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from model_free import SHAPES, make_checkpoint
from programs import result_in, variables
from vs_peer import machine

SHAPES["bounded"] = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=2048, intermediate_size=5632,
    num_attention_heads=32, num_key_value_heads=4, vocab_size=32000, rms_norm_eps=1e-5,
)  # fmt: skip

COMMON = """
import json, sys, time
import torch
start = time.monotonic()
given = json.loads(sys.argv[1])
ids = [torch.randint(3, 32000, (given["seqlen"],), generator=torch.Generator().manual_seed(i))
       for i in range(given["nsamples"])]
def peak():
    return next(int(x.split()[1]) * 1024 for x in open("/proc/self/status") if x.startswith("VmHWM:"))
"""
OURS = (
    COMMON
    + """
import resource
resource.setrlimit(resource.RLIMIT_DATA, (given["limit"], given["limit"]))
from auto_round import AutoRound
tuner = AutoRound(given["model"], scheme="W4A16", iters=2, dataset=ids, nsamples=len(ids), seqlen=given["seqlen"],
                  batch_size=len(ids), device_map="cpu", max_memory=given["limit"])
plan = tuner.plan()
tuner.quantize_and_save(given["out"])
report = json.load(open(given["out"] + "/report.json"))
print("RESULT " + json.dumps({
    "wall": time.monotonic() - start, "rss": peak(), "planned": plan.peak_ram, "verified": report["verify"],
    "streams": plan.memory_plan.streams, "limit": given["limit"], "blocks": len(report["blocks"]),
    "steps": sum(b["steps"] for b in report["blocks"]), "sizes": report["sizes"],
    "planned_size": plan.bytes_on_disk}))
"""
)
PEER = (
    COMMON
    + """
if __name__ == "__main__":
    import transformers
    from auto_round import AutoRound
    model = transformers.AutoModelForCausalLM.from_pretrained(given["model"], dtype="auto")
    from tokenizers import Tokenizer as Raw
    from tokenizers.models import WordLevel
    words = WordLevel({str(i): i for i in range(32000)}, unk_token="0")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Raw(words), unk_token="0", pad_token="0")
    samples = [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in ids]
    data = torch.utils.data.DataLoader(samples, batch_size=1)
    tuner = AutoRound(model, tokenizer, scheme="W4A16", iters=2, dataset=data, nsamples=len(ids),
                      seqlen=given["seqlen"], batch_size=len(ids), device_map="cpu")
    tuner.quantize_and_save(given["out"], format="auto_round")
    print("RESULT " + json.dumps({"wall": time.monotonic() - start, "rss": peak()}))
"""
)


def run(python: str, program: str, job: dict[str, Any], work: Path, who: str) -> dict[str, Any]:
    """One process; its figures."""
    script, log = work / f"{who}.py", work / f"{who}.log"
    script.write_text(program)
    own = str(Path(__file__).resolve().parents[1])
    env = variables(own=False, AR_WORK_SPACE=str(work / "space"))
    env |= {"PYTHONPATH": own} if who == "ours" else {}
    shutil.rmtree(job["out"], ignore_errors=True)
    with open(log, "w") as output:
        subprocess.run([python, script, json.dumps(job)], stdout=output, stderr=subprocess.STDOUT, cwd=work, env=env)
    text = log.read_text(errors="replace")
    found = result_in(text)
    return {"failed": text[-3000:]} if found is None else found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--gb", type=float, default=3.0)
    parser.add_argument("--limit", type=float, default=1.5)
    parser.add_argument("--nsamples", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=32)
    parser.add_argument("--peer_python")
    parser.add_argument("--only", choices=["ours", "peer"])
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--save", type=Path)
    given = parser.parse_args()
    work = given.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    model = work / "model"
    if not (given.keep and model.exists()):
        shutil.rmtree(model, ignore_errors=True)
        make_checkpoint(model, "bounded", int(given.gb * 1e9))
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    job = {"model": str(model), "out": str(work / "out"), "nsamples": given.nsamples, "seqlen": given.seqlen,
           "limit": int(given.limit * 1e9)}  # fmt: skip
    saved = given.save is not None and given.only is not None and given.save.exists()
    result: dict[str, Any] = json.loads(given.save.read_text()) if saved else {}
    result |= {"machine": machine(), "input_bytes": size}
    result |= {key: job[key] for key in ("nsamples", "seqlen", "limit")}
    for who, python, program in (("ours", sys.executable, OURS), ("peer", given.peer_python, PEER)):
        if python is not None and given.only in (None, who):
            result[who] = run(python, program, job, work, who)
            print(who, json.dumps(result[who]), flush=True)
    if "rss" in result.get("ours", {}) and "rss" in result.get("peer", {}):
        result["ratio"] = result["ours"]["rss"] / result["peer"]["rss"]
        print(f"peak resident memory: {result['ratio']:.2f} of the peer's")
    if given.save:
        given.save.write_text(json.dumps(result, indent=2) + "\n")
    if not given.keep:
        shutil.rmtree(model)
    shutil.rmtree(work / "out", ignore_errors=True)


if __name__ == "__main__":
    main()
