"""Two versions of this package against each other in one run: what a change of the code costs in time.

    git worktree add /tmp/before REVISION
    python bench/before_after.py --before /tmp/before --model MODEL --text calib.txt --work DIR [--repeat 3]
        [--jobs import help ...] [--save bench/results/before_after.json]

Jobs: `import` (`import auto_round.autoround`, less `import torch`), `help` (`auto-round --help`), `model_free` (a
made-up checkpoint of `--gb`), and of the model `gguf` (Q4_K_M with the search), `plain_gguf`, `rtn`, `gptq` and `tune`
(`--steps` steps). Each run is a process of its own; the two versions take turns, and the fewest seconds of each count.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from model_free import make_checkpoint, read_all
from programs import Cost, run, variables
from vs_peer import machine, pick_texts

CLI = ["-m", "auto_round"]
IMPORT = ["-c", "import auto_round.autoround"]
TUNED = """
import json, sys
from auto_round import AutoRound
model, texts, out, options = sys.argv[1:]
options = json.loads(options)
texts = json.load(open(texts, encoding="utf-8"))
AutoRound(model, dataset=texts, nsamples=len(texts), seqlen=256, **options).quantize_and_save(out)
"""


def jobs(a: argparse.Namespace) -> dict[str, list[str]]:
    """Arguments of Python for each job; OUT stands for the output folder."""
    texts, big = str(a.work / "texts.json"), str(a.work / "big")
    model = str(a.model.resolve())
    options = {
        "gguf": {"scheme": "GGUF:Q4_K_M", "iters": 0, "format": "gguf:q4_k_m"},
        "plain_gguf": {"scheme": "GGUF:Q4_K_M", "iters": 0, "disable_opt_rtn": True, "format": "gguf:q4_k_m"},
        "rtn": {"iters": 0, "disable_opt_rtn": True},
        "gptq": {"iters": 0, "algorithm": "gptq"},
        "tune": {"iters": a.steps},
    }
    return {
        "import": IMPORT,
        "help": [*CLI, "--help"],
        "model_free": [*CLI, "quantize", big, "--model_free", "--disable_opt_rtn", "--output_dir", "OUT"],
        **{name: ["-c", TUNED, model, texts, "OUT", json.dumps(given)] for name, given in options.items()},
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--before", type=Path, required=True, help="a work tree of the earlier version")
    p.add_argument("--model", type=Path, required=True)
    p.add_argument("--text", required=True)
    p.add_argument("--work", type=Path, required=True)
    p.add_argument("--jobs", nargs="+")
    p.add_argument("--repeat", type=int, default=3)
    p.add_argument("--gb", type=float, default=2.0)
    p.add_argument("--steps", type=int, default=5)
    p.add_argument("--save", type=Path)
    a = p.parse_args()
    a.work.mkdir(parents=True, exist_ok=True)
    (a.work / "texts.json").write_text(json.dumps(pick_texts(a.text, 16, 256)))
    trees = {"before": a.before.resolve(), "after": Path(__file__).resolve().parents[1]}
    chosen = {name: words for name, words in jobs(a).items() if name in (a.jobs or jobs(a))}
    if "model_free" in chosen and not (a.work / "big").exists():
        make_checkpoint(a.work / "big", "llama", int(a.gb * 1e9))
    rows: dict[str, Any] = {}
    for name, words in chosen.items():
        if name == "model_free":
            read_all(a.work / "big")
        costs: dict[str, list[Cost]] = {"torch": [], "before": [], "after": []}
        for _ in range(a.repeat):
            if name == "import":
                costs["torch"].append(run([sys.executable, "-c", "import torch"], "torch")[1])
            for which, tree in trees.items():
                out = a.work / "out"
                shutil.rmtree(out, ignore_errors=True)
                command = [sys.executable, *(str(out) if word == "OUT" else word for word in words)]
                env = variables(PYTHONPATH=str(tree), AR_WORK_SPACE=str(a.work / "space"))
                costs[which].append(run(command, f"{name} {which}", env, cwd=a.work)[1])
        least = {
            who: {kind: min(c[kind] for c in found) for kind in ("wall", "cpu")}
            for who, found in costs.items()
            if found
        }
        front = least.get("torch", {"wall": 0.0, "cpu": 0.0})
        rows[name] = least | {
            "ratio": {
                kind: (least["after"][kind] - front[kind]) / (least["before"][kind] - front[kind]) for kind in front
            }
        }
        shown = ", ".join(f"{who} {c['wall']:.2f} s wall, {c['cpu']:.2f} s cpu" for who, c in least.items())
        print(
            f"{name}: {shown}; ratio {rows[name]['ratio']['wall']:.3f}, cpu {rows[name]['ratio']['cpu']:.3f}",
            flush=True,
        )
        if a.save:
            settings = {"model": a.model.name, "repeat": a.repeat, "gb": a.gb, "steps": a.steps}
            a.save.write_text(json.dumps({"machine": machine(), "settings": settings, "jobs": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
