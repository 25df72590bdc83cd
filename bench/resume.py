"""What the journal costs: the same tuning run with and without it, in turns, and how long going on takes.

    python bench/resume.py --model .demo/smollm2 [--iters 200 --nsamples 64 --seqlen 512 --blocks 4 --pairs 5]

A pair is one run with the journal and one without, the order changing from pair to pair. Compared is the wall time from
the first block to the last (`seconds.quantization` of report.json), that of the whole call, and the processor time of
the process with all its threads, which other work on the machine disturbs least. Besides, the journal's own share is
measured inside the runs that have one: what the main thread spends in it (waiting included), and what its thread
computes, each as a part of the whole call.

The last lines tell the bytes of the journal, and the time that a run takes that was stopped after its last block:
nothing is tuned again there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vs_peer import machine

from auto_round import AutoRound
from auto_round.run.journal import Journal

MAIN = (
    "check_compatible", "open", "checksum", "submit_streams", "add", "wait_until_written", "complete", "finish",
    "close",
)  # fmt: skip
BESIDE = ("write_unit", "write_stream")


def shortened(model: str, blocks: int, folder: Path) -> str:
    """The model with its first blocks alone, so that a pair takes minutes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    whole = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    whole.model.layers = whole.model.layers[:blocks]
    whole.config.num_hidden_layers = blocks
    if getattr(whole.config, "layer_types", None):
        whole.config.layer_types = whole.config.layer_types[:blocks]
    whole.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return str(folder)


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Seconds that the main thread is in the journal, and processor seconds of the journal's thread."""
    spent = {"journal, main thread": 0.0, "journal, its thread": 0.0}
    patched: list[tuple[Any, str, Any]] = []
    inside = [0]

    def patch(owner: Any, name: str) -> None:
        real = getattr(owner, name)
        patched.append((owner, name, real))

        def timed(*args: Any, **kwargs: Any) -> Any:
            main = threading.current_thread() is threading.main_thread()
            clock = time.perf_counter if main else time.thread_time
            outermost = not main or inside[0] == 0
            inside[0] += main
            started = clock()
            try:
                return real(*args, **kwargs)
            finally:
                inside[0] -= main
                if outermost:
                    spent["journal, main thread" if main else "journal, its thread"] += clock() - started

        setattr(owner, name, timed)

    for name in (*MAIN, *BESIDE):
        patch(Journal, name)
    try:
        yield spent
    finally:
        for owner, name, real in patched:
            setattr(owner, name, real)


def run(a: argparse.Namespace, model: str, out: Path, resume: bool) -> dict[str, float]:
    with watched() as spent:
        started, computed = time.perf_counter(), time.process_time()
        AutoRound(
            model, scheme=a.scheme, iters=a.iters, nsamples=a.nsamples, seqlen=a.seqlen, dataset=a.dataset,
            device_map=a.device, low_gpu_mem_usage=a.low_gpu_mem_usage,
        ).quantize_and_save(out, a.format, resume=resume)  # fmt: skip
        total, processor = time.perf_counter() - started, time.process_time() - computed
    seconds = json.loads((out / "report.json").read_text())["seconds"]
    return {"quantization": seconds["quantization"], "total": total, "processor": processor, **spent}


def stopped_after_the_blocks(a: argparse.Namespace, model: str, out: Path) -> int:
    """Leave a run whose blocks are all done. Bytes of its journal then."""
    size = 0
    real = Journal.complete

    def complete(self: Journal, *_: Any) -> None:
        nonlocal size
        size = sum(path.stat().st_size for path in self.folder.iterdir())
        raise KeyboardInterrupt

    Journal.complete = complete  # type: ignore[method-assign]
    try:
        run(a, model, out, True)
    except KeyboardInterrupt:
        return size
    finally:
        Journal.complete = real  # type: ignore[method-assign]
    raise SystemExit("the run was not stopped")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--blocks", type=int, default=4, help="blocks that are kept; 0: all")
    parser.add_argument("--scheme", default="W4A16")
    parser.add_argument("--format", default="auto_round")
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--nsamples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--dataset", default="builtin")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--low_gpu_mem_usage", action="store_true")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--output", type=Path, help="write the result to this JSON file")
    a = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {"with": [], "without": []}
    with tempfile.TemporaryDirectory(prefix="journal-") as work:
        os.environ["AR_WORK_SPACE"] = str(Path(work) / "space")
        model = shortened(a.model, a.blocks, Path(work) / "model") if a.blocks else a.model
        for pair in range(a.pairs):
            for kind in ("with", "without")[:: 1 if pair % 2 else -1]:
                out = Path(work) / f"{kind}-{pair}"
                found[kind].append(run(a, model, out, kind == "with"))
                said = ", ".join(f"{what} {value:.2f} s" for what, value in found[kind][-1].items())
                print(f"pair {pair + 1}, {kind} journal: {said}", flush=True)
        size = stopped_after_the_blocks(a, model, Path(work) / "stopped")
        resume_message = run(a, model, Path(work) / "stopped", True)["total"]
        weights = sum(p.stat().st_size for p in (Path(work) / "stopped").glob("*.safetensors"))
    result: dict[str, Any] = {
        "machine": machine(),
        "settings": {k: Path(str(v)).name for k, v in vars(a).items()},
        "runs": found,
    }
    for what in ("quantization", "total", "processor"):
        ratios = [w[what] / o[what] for w, o in zip(found["with"], found["without"], strict=True)]
        result[f"{what}_overhead"] = statistics.median(ratios) - 1
        spread = ", ".join(f"{r - 1:+.1%}" for r in sorted(ratios))
        print(f"{what}: journal costs {result[f'{what}_overhead']:+.1%} (median of {len(ratios)} pairs: {spread})")
    for what in ("journal, main thread", "journal, its thread"):
        result[what] = statistics.median(w[what] / w["total"] for w in found["with"])
        print(f"{what}: {result[what]:.2%} of the call")
    result |= {"journal_bytes": size, "weights_bytes": weights, "going_on_seconds": resume_message}
    print(
        f"journal {size / 1e6:.1f} MB with the weights' {weights / 1e6:.1f} MB; going on at the end "
        f"{resume_message:.1f} s"
    )
    if a.output:
        a.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
