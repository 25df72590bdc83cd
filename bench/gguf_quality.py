"""GGUF files of one model made by llama.cpp and by this package, judged by llama.cpp alone.

    python bench/gguf_quality.py --model MODEL --llama_bin llama.cpp/build/bin --calib_text calib.txt \
        --eval_text wiki.txt web.txt --types q4_k_m q2_k_s --ours rtn opt 200 --out bench/results/NAME.json

llama.cpp's converter makes the 16-bit file; `llama-imatrix` reads the calibration text; `llama-quantize` makes each
type without an importance matrix (`plain`; it refuses some types so) and with it (`imatrix`). Ours is the command line
as a user calls it: `rtn` rounds only, `opt` searches (`--iters 0`), a number tunes for so many steps. Every file is
opened by `llama-perplexity`, whose mean KL divergence to the 16-bit file is on the same held-out tokens. A ratio's
standard error is over chunks of text, ours and llama.cpp's on the same ones. Time is of whole processes.

`--keep` takes llama.cpp's rows, and rows of ours that are not asked for, from `--out` as they stand there: for the same
model, texts and machine. `--prepared` takes the 16-bit file, its logits and the importance from the folder of a run
that was stopped.

The logits of the 16-bit file take vocabulary x context bytes for each chunk, on disk.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from programs import Cost, Failed, run, variables
from vs_peer import machine


def chunk_means(output: str) -> list[float]:
    """Mean KL of each chunk, from the running means that llama-perplexity prints (to 5 digits)."""
    running = []
    for line in output.splitlines():
        pairs = re.findall(r"(-?\d+\.\d+|-?nan)\s*±\s*(?:-?\d+\.\d+|-?nan)", line)
        if re.match(r"\s*\d+\s", line) and len(pairs) >= 5:
            running.append(float(pairs[2]))
    return [value * (i + 1) - (running[i - 1] * i if i else 0) for i, value in enumerate(running)]


def pooled(judged: list[dict]) -> dict:
    """One figure from several texts of equal weight."""
    count = len(judged)
    error = math.sqrt(sum(one["error"] ** 2 for one in judged)) / count
    return {
        "kl": statistics.fmean(one["kl"] for one in judged), "error": error,
        "same_top": statistics.fmean(one["same_top"] for one in judged),
        "chunks": [value for one in judged for value in one["chunks"]],
    }  # fmt: skip


def paired_ratio(ours: dict, theirs: dict) -> tuple[float, float]:
    """Ratio of the mean KL and its standard error (delta method on the differences by chunk)."""
    a, b = ours["chunks"], theirs["chunks"]
    ratio = statistics.fmean(a) / statistics.fmean(b)
    if len(a) < 3:
        return ratio, math.nan
    spread = statistics.stdev(x - ratio * y for x, y in zip(a, b, strict=True))
    return ratio, spread / math.sqrt(len(a)) / statistics.fmean(b)


class Bench:
    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self.args, self.work = args, work
        self.bin = Path(args.llama_bin).resolve()
        self.environment = {"LD_LIBRARY_PATH": str(self.bin)}
        self.results: dict = {"model": Path(args.model).name, "machine": machine(), "files": []}
        if args.keep and Path(args.out).exists():
            self.results = json.loads(Path(args.out).read_text(encoding="utf-8"))

    def llama(self, tool: str, *flags: object, threads: bool = True) -> tuple[str, Cost]:
        extra = ["-t", str(self.args.threads)] if threads else []
        return run([str(self.bin / tool), *map(str, flags), *extra], tool, variables(**self.environment))

    def prepare(self) -> None:
        a, root = self.args, self.bin.parents[1]
        converter = Path(a.converter) if a.converter else root / "convert_hf_to_gguf.py"
        ready = Path(a.prepared) if a.prepared else None
        self.base, self.imatrix = (ready or self.work) / "base.gguf", (ready or self.work) / "imatrix.gguf"
        self.logits = [(ready or self.work) / f"logits-{i}.dat" for i in range(len(a.eval_text))]
        if ready is not None:
            return
        flags = [str(Path(a.model).resolve()), "--outtype", a.base, "--outfile", str(self.base)]
        path = {"PYTHONPATH": str(converter.parent / "gguf-py")}
        _, cost = run([sys.executable, str(converter), *flags], "the converter", variables(**path))
        self.note("base", self.base, cost)
        for text, logits in zip(a.eval_text, self.logits, strict=True):
            self.llama(
                "llama-perplexity", "-m", self.base, "-f", text, "-c", a.ctx, "--chunks", a.eval_chunks,
                "--kl-divergence-base", logits,
            )  # fmt: skip
        _, cost = self.llama(
            "llama-imatrix", "-m", self.base, "-f", a.calib_text, "-o", self.imatrix, "-c", a.ctx,
            "--chunks", a.calib_chunks, "--no-ppl",
        )  # fmt: skip
        self.results["imatrix"] = cost
        print(f"imatrix: {cost['wall']:.1f} s", flush=True)

    def note(self, what: str, file: Path, cost: Cost) -> None:
        self.results[what] = {"bytes": file.stat().st_size, **cost}
        print(f"{what}: {file.stat().st_size / 1e6:.2f} MB, {cost['wall']:.1f} s", flush=True)

    def judge(self, file: Path) -> dict:
        judged = []
        for logits in self.logits:
            output, _ = self.llama(
                "llama-perplexity", "-m", file, "-c", self.args.ctx, "--kl-divergence", "--kl-divergence-base", logits
            )
            mean = re.search(r"Mean +KLD: +(-?[\d.]+) ± +([\d.]+)", output)
            top = re.search(r"Same top p: +([\d.]+)", output)
            if mean is None or top is None:
                raise Failed(f"llama-perplexity printed no mean KL:\n{output[-2000:]}")
            chunks = chunk_means(output)
            judged.append(
                {"kl": float(mean[1]), "error": float(mean[2]), "same_top": float(top[1]) / 100, "chunks": chunks}
            )
        return pooled(judged)

    def by_llama(self, kind: str, importance: bool) -> tuple[Path, Cost]:
        out = self.work / "theirs.gguf"
        extra = ["--imatrix", self.imatrix] if importance else []
        _, cost = self.llama("llama-quantize", *extra, self.base, out, kind.upper(), self.args.threads, threads=False)
        return out, cost

    def by_us(self, kind: str, how: str) -> tuple[Path, Cost]:
        out = self.work / "ours"
        a = self.args
        steps = ["--iters", "0" if how in ("rtn", "opt") else how, *(["--disable_opt_rtn"] if how == "rtn" else [])]
        data = [
            "--dataset",
            str(Path(a.calib_text).resolve()),
            "--seqlen",
            str(a.ctx),
            "--nsamples",
            str(a.calib_chunks),
        ]
        command = [
            sys.executable, "-m", "auto_round", "--model", a.model, "--format", f"gguf:{kind}", *steps, *data,
            "--output_dir", str(out), *shlex.split(a.ours_flags),
        ]  # fmt: skip
        _, cost = run(command, "auto-round")
        files = sorted(out.rglob("*.gguf"))
        if len(files) != 1:
            raise Failed(f"auto-round left {len(files)} .gguf files in its folder, not one")
        return files[0], cost

    def row(self, kind: str, how: str, make: Callable[[], tuple[Path, Cost]]) -> dict | None:
        files = self.results["files"]
        kept = [row for row in files if (row["type"], row["how"]) == (kind, how)]
        if kept and how.startswith("llama.cpp"):
            return kept[0]
        try:
            file, cost = make()
            row = {"type": kind, "how": how, "bytes": file.stat().st_size, **cost, **self.judge(file)}
        except Failed as error:
            refused = "requires an i" in str(error)
            print(f"{kind} {how}: {'refused without an importance matrix' if refused else error}", flush=True)
            return None
        file.unlink()
        shutil.rmtree(self.work / "ours", ignore_errors=True)
        files[:] = [row for row in files if row not in kept] + [row]
        print(
            f"{kind} {how}: KL {row['kl']:.5f} ± {row['error']:.5f}, same top {row['same_top']:.3f}, "
            f"{row['bytes'] / 1e6:.2f} MB, {row['wall']:.1f} s ({row['cpu']:.1f} s of processor)",
            flush=True,
        )
        return row

    def all(self) -> None:
        self.prepare()
        for kind in self.args.types:
            theirs: dict[str, dict | None] = {}
            if kind != "q2_k_mixed":  # which llama.cpp does not have
                theirs = {
                    how: self.row(kind, f"llama.cpp {how}", lambda k=kind, w=how: self.by_llama(k, w == "imatrix"))
                    for how in self.args.theirs
                }
            for how in self.args.ours:
                row = self.row(kind, f"ours {how}", lambda k=kind, h=how: self.by_us(k, h))
                for name, other in theirs.items():
                    if row is not None and other is not None:
                        ratio, error = paired_ratio(row, other)
                        row[f"to {name}"] = {
                            "kl": ratio, "error": error, "bytes": row["bytes"] / other["bytes"],
                            "wall": row["wall"] / other["wall"], "cpu": row["cpu"] / other["cpu"],
                        }  # fmt: skip
                        shown = ", ".join(f"{key} {value:.3f}" for key, value in row[f"to {name}"].items())
                        print(f"{kind} ours {how} / llama.cpp {name}: {shown}", flush=True)
            if self.args.out:
                Path(self.args.out).write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True)
    p.add_argument("--llama_bin", required=True, help="folder of llama-quantize, llama-imatrix and llama-perplexity")
    p.add_argument("--converter", help="convert_hf_to_gguf.py; default: two folders above --llama_bin")
    p.add_argument("--calib_text", required=True)
    p.add_argument("--eval_text", nargs="+", required=True)
    p.add_argument("--types", nargs="+", default=["q4_k_m", "q2_k_s"])
    p.add_argument("--theirs", nargs="*", default=["plain", "imatrix"], choices=["plain", "imatrix"])
    p.add_argument("--ours", nargs="*", default=["rtn", "opt"], help="rtn, opt, or a number of tuning steps")
    p.add_argument("--ours_flags", default="", help="more flags for auto-round, as one text")
    p.add_argument("--base", default="f16", choices=["f32", "f16", "bf16"], help="type of the file to compare with")
    p.add_argument("--ctx", type=int, default=512, help="tokens of a chunk, in calibration and in evaluation")
    p.add_argument("--calib_chunks", type=int, default=32)
    p.add_argument("--eval_chunks", type=int, default=16, help="of each text")
    p.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    p.add_argument("--work", help="folder for the large files in between; default: a temporary one")
    p.add_argument("--prepared", help="folder that a stopped run left in --work")
    p.add_argument("--out")
    p.add_argument("--keep", action="store_true", help="add to what --out holds")
    args = p.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        Bench(args, Path(work)).all()


if __name__ == "__main__":
    main()
