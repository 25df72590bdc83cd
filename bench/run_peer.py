"""One quantization with the peer (`pip install auto-round==0.16.1` in its own venv), for `vs_peer.py`."""

from __future__ import annotations

import json
import sys
import time

start = time.monotonic()
job = json.loads(sys.argv[1])


def peak_rss() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))


if __name__ == "__main__":  # the peer starts worker processes that import this file again
    import torch
    from transformers import AutoTokenizer

    from auto_round import AutoRound

    sizes = {} if job["group_size"] is None else {"group_size": job["group_size"]}
    if job.get("sym") is not None:
        sizes["sym"] = job["sym"]
    texts = json.load(open(job["texts"], encoding="utf-8"))
    options = {} if job["peer_amp"] else {"amp": False}
    quantizer = AutoRound(
        job["model"], AutoTokenizer.from_pretrained(job["model"]), scheme=job["scheme"],
        dataset=texts, nsamples=job["nsamples"], seqlen=job["seqlen"], iters=job["iters"],
        batch_size=job["batch_size"], seed=42,
        disable_opt_rtn=job["disable_opt_rtn"], device_map=job["device"], **sizes, **options,
    )  # fmt: skip
    _, folder = quantizer.quantize_and_save(job["out"], format=job.get("format", "auto_round"))
    vram = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    print("RESULT " + json.dumps({"wall": time.monotonic() - start, "rss": peak_rss(), "vram": vram, "folder": folder}))
