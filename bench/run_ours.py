"""One quantization with this package, for `vs_peer.py`. Prints one JSON line."""

from __future__ import annotations

import json
import sys
import time

start = time.monotonic()
job = json.loads(sys.argv[1])

from auto_round import AutoRound  # noqa: E402
from auto_round.report.memory import peak_rss_bytes, peak_vram_bytes  # noqa: E402

options = {} if job["group_size"] is None else {"group_size": job["group_size"]}
options |= {name: job[name] for name in ("algorithm", "sym") if job.get(name) is not None}
texts = json.load(open(job["texts"], encoding="utf-8"))
quantizer = AutoRound(
    job["model"], scheme=job["scheme"], dataset=texts, nsamples=job["nsamples"],
    seqlen=job["seqlen"], iters=job["iters"],
    batch_size=job["batch_size"], disable_opt_rtn=job["disable_opt_rtn"], seed=42,
    device_map=job["device"], verify=job["verify"], **options,
)  # fmt: skip
quantizer.quantize_and_save(job["out"], format=job.get("format", "auto_round"))
print("RESULT " + json.dumps({"wall": time.monotonic() - start, "rss": peak_rss_bytes(), "vram": peak_vram_bytes()}))
