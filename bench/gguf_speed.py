"""How long a GGUF file takes: this package, auto-round 0.16.1 and llama.cpp, one after the other in one run.

    python bench/gguf_speed.py --model MODEL --llama_bin llama.cpp/build/bin --text calib.txt \
        --peer_python /path/to/peer-venv/bin/python --out bench/results/gguf_speed.json

Every run goes from the folder of a Hugging Face model to a file:

* search: `--format gguf:q4_k_m --iters 0` here and with the peer, on the same texts, samples and tokens; and
  llama.cpp's converter, `llama-imatrix` on these texts and `llama-quantize` with what that found.
* plain: `--iters 0 --disable_opt_rtn` here, and llama.cpp's converter and `llama-quantize`, for each of `--types`.

Time is of whole processes: wall, and processor seconds of all their threads. What importing takes is measured beside
it, in processes of their own that do nothing else, and is a part of each time of the Python programs; without it a
second ratio is given. Ours reads each file back and checks it, which the others do not. Of `--repeat` runs the fastest
counts. The peer's environment needs two more packages (`pip install gguf==0.19.0 sentencepiece`).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from programs import Cost, Failed, run, variables
from vs_peer import HERE, machine, pick_texts

# What each side has loaded when it has made a file.
_IMPORTS = {
    "ours": "import torch, gguf, transformers, auto_round.autoround\nfrom transformers import AutoModelForCausalLM",
    "converter": "import torch, gguf, transformers\nfrom transformers import AutoConfig, AutoTokenizer",
    "peer": "import torch, gguf, transformers, auto_round\nfrom auto_round import AutoRound",
}


def plus(*costs: Cost) -> Cost:
    """The costs of runs that follow one another."""
    return {key: sum(cost[key] for cost in costs) for key in ("wall", "cpu")}


def less(cost: Cost, other: Cost) -> Cost:
    return {key: max(cost[key] - other[key], 0.0) for key in ("wall", "cpu")}


def ratio(ours: Cost, theirs: Cost) -> Cost:
    """Ours in units of theirs; NaN where theirs took no time that could be measured."""
    return {key: ours[key] / theirs[key] if theirs[key] else float("nan") for key in ("wall", "cpu")}


class Bench:
    """One run of the comparison.

    Attributes:
        results: what is written out.
    """

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self.args, self.work = args, work
        self.bin = Path(args.llama_bin).resolve()
        self.converter = Path(args.converter) if args.converter else self.bin.parents[1] / "convert_hf_to_gguf.py"
        self.model = str(Path(args.model).resolve())
        self.texts, self.joined = work / "texts.json", work / "texts.txt"
        texts = pick_texts(args.text, args.nsamples, args.seqlen)
        self.texts.write_text(json.dumps(texts), encoding="utf-8")
        self.joined.write_text("\n".join(texts), encoding="utf-8")
        self.results: dict = {
            "machine": machine(), "model": Path(args.model).name,
            "settings": {key: getattr(args, key) for key in ("nsamples", "seqlen", "threads", "repeat", "peer_amp")},
            "imports": {}, "steps": {}, "search": {}, "plain": {},
        }  # fmt: skip

    def run(self, what: str, command: list[str], own: bool = False, **environment: str) -> Cost:
        """Cost of a program, and a line about it. `own`: it may import this repository."""
        given = {"OMP_NUM_THREADS": str(self.args.threads), "TOKENIZERS_PARALLELISM": "false", **environment}
        _, cost = run(command, what, variables(own, **given), self.work)
        print(f"{what}: {cost['wall']:.1f} s, {cost['cpu']:.1f} s of processor", flush=True)
        return cost

    def best(self, what: str, make: Callable[[], Cost]) -> Cost:
        """The cheapest of several runs, kept by its name."""
        found = min((make() for _ in range(self.args.repeat)), key=lambda cost: cost["wall"])
        self.results["steps"][what] = found
        return found

    def imports(self) -> None:
        """What importing alone takes."""
        pythons = {"ours": sys.executable, "converter": sys.executable, "peer": self.args.peer_python}
        for who, python in pythons.items():
            if python:
                command = [python, "-c", _IMPORTS[who]]
                self.results["imports"][who] = self.best(
                    f"imports, {who}", lambda w=who, c=command: self.run(f"imports, {w}", c, own=w == "ours")
                )

    def quantized(self, who: str, kind: str, plain: bool) -> Cost:
        """One file by this package ("ours") or the peer."""
        args, out = self.args, self.work / who
        job = {
            "model": self.model, "scheme": f"GGUF:{kind.upper()}", "format": f"gguf:{kind}", "group_size": None,
            "texts": str(self.texts), "nsamples": args.nsamples, "seqlen": args.seqlen, "batch_size": 8, "iters": 0,
            "disable_opt_rtn": plain, "out": str(out), "device": "cpu", "verify": True, "peer_amp": args.peer_amp,
        }  # fmt: skip
        python = args.peer_python if who == "peer" else sys.executable
        script = HERE / ("run_peer.py" if who == "peer" else "run_ours.py")
        what = f"{who}, {kind}, {'plain' if plain else 'search'}"

        def once() -> Cost:
            shutil.rmtree(out, ignore_errors=True)
            return self.run(what, [python, str(script), json.dumps(job)], own=who == "ours")

        cost = self.best(what, once)
        cost["bytes"] = sum(path.stat().st_size for path in out.rglob("*.gguf"))
        shutil.rmtree(out)
        if not cost["bytes"]:
            raise Failed(f"{what}: no .gguf file was left in its folder")
        return cost

    def convert(self) -> Cost:
        """llama.cpp's converter, to bfloat16."""
        self.base = self.work / "base.gguf"
        command = [sys.executable, str(self.converter), self.model, "--outtype", "bf16", "--outfile", str(self.base)]
        return self.best(
            "converter",
            lambda: self.run("converter", command, PYTHONPATH=str(self.converter.parent / "gguf-py")),
        )

    def llama(self, what: str, tool: str, *flags: object) -> Cost:
        command = [str(self.bin / tool), *map(str, flags)]
        return self.best(what, lambda: self.run(what, command, LD_LIBRARY_PATH=str(self.bin)))

    def theirs(self, kind: str, imatrix: Path | None = None) -> Cost:
        """`llama-quantize` alone."""
        out = self.work / "theirs.gguf"
        flags = ["--imatrix", imatrix] if imatrix else []
        what = f"llama-quantize, {kind}, {'imatrix' if imatrix else 'plain'}"
        cost = self.llama(what, "llama-quantize", *flags, self.base, out, kind.upper(), self.args.threads)
        cost["bytes"] = out.stat().st_size
        out.unlink()
        return cost

    def search(self, kind: str) -> None:
        args, imports = self.args, self.results["imports"]
        ours, found = self.quantized("ours", kind, plain=False), self.results["search"]
        found["type"] = kind
        if args.peer_python:
            peer = self.quantized("peer", kind, plain=False)
            found["to peer"] = ratio(ours, peer)
            found["to peer, imports left out"] = ratio(less(ours, imports["ours"]), less(peer, imports["peer"]))
        imatrix = self.work / "imatrix.gguf"
        gathered = self.llama(
            "llama-imatrix", "llama-imatrix", "-m", self.base, "-f", self.joined, "-o", imatrix, "-c", args.seqlen,
            "--chunks", args.nsamples, "--no-ppl", "-t", args.threads,
        )  # fmt: skip
        theirs = plus(self.results["steps"]["converter"], gathered, self.theirs(kind, imatrix))
        found["to llama.cpp: converter, llama-imatrix and llama-quantize"] = ratio(ours, theirs)

    def plain(self, kind: str) -> None:
        imports, converter = self.results["imports"], self.results["steps"]["converter"]
        ours, quantize = self.quantized("ours", kind, plain=True), self.theirs(kind)
        self.results["plain"][kind] = {
            "to llama.cpp: converter and llama-quantize": ratio(ours, plus(converter, quantize)),
            "the same, imports left out": ratio(
                less(ours, imports["ours"]), plus(less(converter, imports["converter"]), quantize)
            ),
            "to llama-quantize alone, imports left out": ratio(less(ours, imports["ours"]), quantize),
            "bytes": ours["bytes"] / quantize["bytes"],
        }

    def all(self) -> None:
        print(self.results["machine"], flush=True)
        self.imports()
        self.convert()
        self.search(self.args.search_type)
        self.save()
        for kind in self.args.types:
            self.plain(kind)
            self.save()
        for name, values in [("search", self.results["search"]), *self.results["plain"].items()]:
            for what, found in values.items():
                if isinstance(found, dict):
                    print(f"{name}, ours {what}: {found['wall']:.2f} of the wall time, {found['cpu']:.2f} processor")

    def save(self) -> None:
        if self.args.out:
            Path(self.args.out).write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, help="a folder")
    p.add_argument("--llama_bin", required=True, help="folder of llama-quantize and llama-imatrix")
    p.add_argument("--converter", help="convert_hf_to_gguf.py; default: two folders above --llama_bin")
    p.add_argument("--peer_python", help="python of a venv with auto-round==0.16.1, gguf and sentencepiece")
    p.add_argument("--text", required=True, help="for calibration")
    p.add_argument("--nsamples", type=int, default=32)
    p.add_argument("--seqlen", type=int, default=512)
    p.add_argument("--search_type", default="q4_k_m")
    p.add_argument("--types", nargs="*", default=["q4_k_m", "q3_k_m", "q4_1", "q8_0"], help="of plain rounding")
    p.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    p.add_argument("--repeat", type=int, default=2)
    p.add_argument("--peer_amp", action="store_true", help="the peer's own default, bfloat16: slow without bf16 units")
    p.add_argument("--work", help="folder for the large files in between; default: a temporary one")
    p.add_argument("--out")
    args = p.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        Bench(args, Path(work)).all()


if __name__ == "__main__":
    main()
