#!/usr/bin/env python3
"""Quantize a small real model to 4 bits in two ways, open the result in Transformers, and show what was lost.

`make demo` runs this on SmolLM2-135M-Instruct. Any causal language model works:

    python examples/demo.py --model Qwen/Qwen3-0.6B --group_size 128 --work ./demo
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from auto_round import AutoRound
from auto_round.calibration.data.sources import held_out_documents
from auto_round.eval import EvalResult, evaluate, window_logits
from auto_round.eval.evaluate import HELD_OUT, load_model, load_tokenizer
from auto_round.eval.measures import make_windows, read_text
from auto_round.run.settings import resolve_device

EVAL_SEQLEN = 256

# Run in a process of its own, with Transformers alone: nothing of this package is imported by name.
OPEN = """
import sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
transformers.utils.logging.disable_progress_bar()
folder, prompt = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer(prompt, return_tensors="pt")
out = model.generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)
print(tokenizer.decode(out[0], skip_special_tokens=True))
"""


@dataclass(frozen=True)
class Row:
    """One line of the table: a folder of weights and how the model in it does."""

    name: str
    megabytes: float
    bits: float
    quality: EvalResult
    seconds: float | None


def quantize(arguments: argparse.Namespace, folder: Path, **settings: Any) -> float:
    """Quantize the model into `folder`. Returns wall seconds, with reading, writing and the check."""
    start = time.perf_counter()
    job = AutoRound(
        arguments.model, scheme="W4A16", group_size=arguments.group_size, device_map=arguments.device, **settings
    )
    job.quantize_and_save(folder, format="auto_round", overwrite=True)
    return time.perf_counter() - start


def size_and_bits(folder: Path) -> tuple[float, float]:
    """Megabytes of all weight files, and bits per weight of the quantized layers (16 in a folder without a report)."""
    megabytes = sum(f.stat().st_size for f in folder.glob("*.safetensors")) / 1e6
    report = folder / "report.json"
    if not report.exists():
        return megabytes, 16.0
    layers = json.loads(report.read_text(encoding="utf-8"))["layers"]
    bits = [layer["bits"] for layer in layers if layer["bits"]]
    return megabytes, sum(bits) / len(bits)


def generate(folder: Path, prompt: str) -> str:
    """The model's continuation of `prompt`, from a fresh process that imports only Transformers."""
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(folder), prompt], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"Transformers could not open {folder}:\n{done.stderr}")
    return done.stdout.strip()


class Judge:
    """Measures models on one text against the full-precision model, whose logits are computed once."""

    def __init__(self, model: str, text: Path | None, device: str, max_windows: int) -> None:
        if text is not None:
            self.documents, self.what = [read_text(text)], text.name
        else:
            self.documents, self.what = held_out_documents(), HELD_OUT
        self.device, self.max_windows = device, max_windows
        self.tokenizer = load_tokenizer(model)
        windows, _ = make_windows(self.documents, self.tokenizer, seqlen=EVAL_SEQLEN, max_windows=max_windows)
        reference = load_model(model, device=device)
        self.logits: Sequence[torch.Tensor] = window_logits(reference, windows)
        self.reference = self._evaluate(reference, None)

    def __call__(self, folder: Path) -> EvalResult:
        """Quality of the model in `folder`."""
        return self._evaluate(folder, self.logits)

    def _evaluate(self, model: Any, logits: Sequence[torch.Tensor] | None) -> EvalResult:
        return evaluate(
            model, texts=self.documents, tokenizer=self.tokenizer, reference_logits=logits, seqlen=EVAL_SEQLEN,
            max_windows=self.max_windows, device=self.device,
        )  # fmt: skip


def show(rows: Sequence[Row], note: str) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Size and quality", caption=note, caption_justify="left")
    for head in ("model", "MB", "bits/weight", "perplexity ↓", "mean KL (nats) ↓", "same first token ↑", "seconds"):
        table.add_column(head, justify="left" if head == "model" else "right")
    for row in rows:
        quality = row.quality
        table.add_row(
            row.name, f"{row.megabytes:.0f}", f"{row.bits:.2f}", words(quality.perplexity, 2), words(quality.kl, 4),
            words(quality.agreement, 3), "" if row.seconds is None else f"{row.seconds:.0f}",
        )  # fmt: skip
    # Wide enough that no column is cut where the output is not a terminal.
    console = Console()
    if not console.is_terminal or console.width < 110:
        console = Console(width=112)
    console.print(table)


def words(estimate: Any, digits: int) -> str:
    """`12.34 ± 0.56`, or a dash for what was not measured."""
    if estimate is None:
        return "–"
    error = "" if estimate.stderr is None else f" ± {estimate.stderr:.{digits}f}"
    return f"{estimate.value:.{digits}f}{error}"


def step(text: str) -> None:
    """Say what comes next."""
    from rich.console import Console

    Console(highlight=False).print(f"\n[bold]{text}[/bold]")


def run(arguments: argparse.Namespace) -> None:
    """The whole demo."""
    work: Path = arguments.work
    start = time.perf_counter()

    step("1/5 Plain rounding to nearest, W4A16")
    if arguments.group_size == 64 and "smollm2" in str(arguments.model).lower():
        print("    (64 weights per scale: the usual 128 does not divide this model's width, 576)")
    rtn = quantize(arguments, work / "rtn", iters=0, disable_opt_rtn=True)

    step(f"2/5 SignRound, W4A16: {arguments.iters} steps a block on {arguments.nsamples} samples of {arguments.seqlen} "
         "tokens of the bundled text")  # fmt: skip
    tuning = {"iters": arguments.iters, "nsamples": arguments.nsamples, "seqlen": arguments.seqlen}
    tuned = quantize(arguments, work / "signround", dataset="builtin", **tuning)

    step("3/5 Opening it again with Transformers, in a new process")
    print(f"    {generate(work / 'signround', arguments.prompt)!r}")

    step("4/5 Measuring against the full-precision model")
    judge = Judge(arguments.model, arguments.text, str(resolve_device(arguments.device)), arguments.windows)
    rows = [Row("full precision", *size_and_bits(Path(arguments.model)), judge.reference, None)]
    for name, folder, seconds in (("RTN", work / "rtn", rtn), ("SignRound", work / "signround", tuned)):
        rows.append(Row(name, *size_and_bits(folder), judge(folder), seconds))

    step("5/5 Result")
    quality = rows[-1].quality
    show(rows, f"{quality.windows} windows of {quality.seqlen} tokens of {judge.what}; ± is one standard error. "
               "MB includes the embedding, which stays in 16 bits.")  # fmt: skip
    minutes = (time.perf_counter() - start) / 60
    print(f"\nThe SignRound model is in {work / 'signround'} ({minutes:.1f} minutes in all). Quantize your own:\n")
    print(f"    {Path(sys.executable).parent / 'auto-round'} --model Qwen/Qwen3-0.6B --scheme W4A16 --output_dir ./out")


def main() -> None:
    """Read the command line and run the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub id of the model")
    parser.add_argument("--work", type=Path, default=Path(".demo"), help="folder for the results")
    parser.add_argument("--device", default="0", help="0: the first GPU, else the CPU; or cpu, cuda:1")
    parser.add_argument("--group_size", type=int, default=64, help="weights per scale")
    parser.add_argument("--iters", type=int, default=12, help="tuning steps per block")
    parser.add_argument("--nsamples", type=int, default=16, help="calibration samples")
    parser.add_argument("--seqlen", type=int, default=256, help="tokens per sample")
    parser.add_argument("--windows", type=int, default=32, help="windows to measure on")
    parser.add_argument("--text", type=Path, help="text to measure on, instead of what is in the package")
    parser.add_argument("--prompt", default="The capital of France is", help="what the model continues")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
