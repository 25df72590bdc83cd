"""Quality for bits and time against the peer: KL divergence of each cell, ours as a ratio of the peer's, and the bound.

    python bench/frontier.py --model MODEL --peer_python /path/to/peer-venv/bin/python --text calib.txt \
        --eval_text wiki.txt web.txt --out bench/results/frontier.json

A cell is `steps:scheme`, with `opt` for no steps, and `:asym` for zero points. Both get the same texts, samples, steps
and seed. What `--out` holds already with these settings is not measured again, so a long table can be made in several
runs; one with nothing left to measure prints it. Wall time is of the whole process, imports and saving included. Linux
only.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

from vs_peer import add_common_arguments, machine, pick_texts, quantized_quality

CELLS = (
    *(f"opt:W{bits}A16{kind}" for bits in (4, 3, 2) for kind in ("", ":asym")), "opt:MXFP4", "opt:NVFP4",
    "20:W4A16", "20:W3A16", "20:W2A16", "200:W4A16", "200:W3A16", "200:W2A16",
)  # fmt: skip
OWN_GROUPS = ("MXFP4", "NVFP4")  # schemes whose group size is their own
# Largest ratio of KL divergence wanted, by steps (or "opt") and scheme.
BOUNDS = {
    "opt": {"W4A16": 0.5, "W3A16": 0.45, "W2A16": 0.4, "MXFP4": 0.75, "NVFP4": 0.75},
    "steps": {"W4A16": 0.62, "W3A16": 0.5, "W2A16": 0.35},
}
OPT_TIME = 0.3  # largest ratio of wall time wanted without steps


def render(rows: dict[str, dict]) -> str:
    """The table of a results file: a line for each cell."""
    lines = ["| cell | KL peer | KL ours | ratio | bound | seconds peer | ours | ratio |", "|" + "---|" * 8]
    for cell, row in rows.items():
        steps, scheme, *_ = cell.split(":")
        bound = BOUNDS["opt" if steps == "opt" else "steps"].get(scheme)
        kl = {who: row[who]["kl"] for who in ("peer", "ours") if who in row}
        shown = [f"{kl[who]['value']:.4f} ± {kl[who]['stderr']:.4f}" if who in kl else "" for who in ("peer", "ours")]
        wall = [f"{row[who]['wall']:.0f}" if who in row else "" for who in ("peer", "ours")]
        ratios = ["", ""]
        if len(kl) == 2:
            ours, peer = row["ours"], row["peer"]
            ratios = [f"{kl['ours']['value'] / kl['peer']['value']:.3f}", f"{ours['wall'] / peer['wall']:.3f}"]
        lines.append(f"| {' | '.join([cell, *shown, ratios[0], str(bound or ''), *wall, ratios[1]])} |")
    return "\n".join([*lines, "", f"Wanted without steps: a ratio of seconds of at most {OPT_TIME}."])


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(p)
    p.add_argument("--cells", nargs="+", default=CELLS)
    p.add_argument("--group_size", type=int, default=64)
    p.add_argument("--again", action="store_true", help="measure ours again in the given cells")
    p.add_argument("--out", type=Path, required=True)
    a = p.parse_args()
    record = json.loads(a.out.read_text()) if a.out.exists() else {}

    import torch
    from transformers import AutoModelForCausalLM

    names = ("group_size", "nsamples", "seqlen", "batch_size", "windows", "device")
    settings = {"model": Path(a.model).name, **{name: getattr(a, name) for name in names}}
    if record.get("settings", settings) != settings:
        raise SystemExit(f"{a.out} was made with {record['settings']}; these settings are {settings}: choose another")
    rows: dict[str, dict] = record.get("cells", {})
    evals = [Path(e).read_text(encoding="utf-8")[: a.windows * 512 * 7] for e in a.eval_text]
    reference = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32).eval().to(a.device)
    with tempfile.TemporaryDirectory() as work:
        texts = os.path.join(work, "texts.json")
        json.dump(pick_texts(a.text, a.nsamples, a.seqlen), open(texts, "w", encoding="utf-8"))
        for cell in a.cells:
            steps, scheme, *kind = cell.split(":")
            for who in ("peer", "ours"):
                if (who == "peer" and not a.peer_python) or (
                    who in rows.get(cell, {}) and not (a.again and who == "ours")
                ):
                    continue
                job = {
                    "model": os.path.abspath(a.model), "scheme": scheme, "texts": texts, "work": work,
                    "group_size": None if scheme in OWN_GROUPS else a.group_size, "sym": False if kind else None,
                    "nsamples": a.nsamples, "seqlen": a.seqlen, "batch_size": a.batch_size, "windows": a.windows,
                    "iters": 0 if steps == "opt" else int(steps), "disable_opt_rtn": False,
                    "out": os.path.join(work, who), "device": a.device, "verify": True, "peer_amp": True,
                }  # fmt: skip
                cost, quality = quantized_quality(a.peer_python if who == "peer" else None, job, evals, reference)
                values = {k: v for k, v in quality.to_dict().items() if k not in ("model", "reference")}
                rows.setdefault(cell, {})[who] = {k: v for k, v in {**cost, **values}.items() if k != "folder"}
                print(f"{cell} {who}: {cost['wall']:.0f} s, KL {values['kl']['value']:.4f}", flush=True)
                record = {"machine": machine(), "settings": settings, "cells": rows}
                a.out.write_text(json.dumps(record, indent=2) + "\n")
    print(machine(), render(rows), sep="\n\n")


if __name__ == "__main__":
    main()
