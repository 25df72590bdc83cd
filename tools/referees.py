"""Let programs we did not write open the checkpoints that we write, and compare their logits with ours.

    python tools/referees.py                       all programs, in virtual environments under .referees/
    python tools/referees.py --programs gptqmodel --schemes W4A16,W8A16 --formats auto_gptq
    python tools/referees.py --model FOLDER        the same on a real model (nothing is recorded)
    python tools/referees.py --render              docs/compatibility.md from the recorded results, nothing else
    python tools/referees.py --programs compressed_tensors --twins      also what test/referees/*/test_*.py compare to

Tried are the cells (scheme, format, program) that `PROGRAMS` in referees_programs.py lists, with --all every one that
we write; what an earlier run recorded of the others stays. A program that refuses a file is recorded with its reason;
the exit status is 1 when a program differs from us by more than the limit, or refuses what is listed.

llama.cpp is built from its source package: that takes a C++ compiler and some minutes.

A program that quantizes inputs by rules of its own (`own_inputs`) is compared with `inputs.py` of its folder instead:

    inputs.py FOLDER IDS.npy OUT.npy DTYPE DENSE

runs in the same environment on DENSE, our weights of FOLDER dequantized, and computes what the program should.

To add a program: a folder `test/referees/NAME` with `requirements.txt` and `judge.py`, and a row in `PROGRAMS`.

    judge.py FOLDER IDS.npy OUT.npy DTYPE

runs inside the program's own environment. IDS.npy is int64 [samples, tokens]. It writes float32 [samples, positions,
vocabulary] to OUT.npy: either logits of every position, or log-probabilities of the tokens after the first
(`positions` = tokens - 1). Its last line of output is a JSON object of package versions. Any failure: a nonzero exit
status and the reason on the last line of standard error.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import referees_report
from referees_compare import difference
from referees_models import MODELS, get_model
from referees_programs import PROGRAMS, ROOT, SCHEMES, WEIGHTS_OF, Program

from auto_round.formats.base import get_format

LIMIT = 1e-2
TORCH = "torch==2.13.0"
_REQUIRES = """
import json, sys
from importlib.metadata import requires
print(json.dumps([r for name in sys.argv[1:] for r in requires(name) or () if "extra ==" not in r]))
"""


def prepare(program: Program, root: Path) -> Path:
    """The Python of the program's environment, made or brought up to date when its requirements changed."""
    folder = root / (program.home or program.name)
    python, stamp = folder / "bin" / "python", folder / ".installed"
    requirements = program.folder / "requirements.txt"
    wanted = hashlib.sha256(repr((requirements.read_text(), TORCH, program.without)).encode()).hexdigest()
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    print(f"making {folder}", flush=True)
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    # PyTorch first and alone, then as a constraint: otherwise some requirement brings a CUDA build.
    if program.torch:
        subprocess.run([*pip, TORCH, "numpy", "setuptools", "wheel"], check=True)
    constraint = folder / "constraint.txt"
    constraint.write_text(TORCH + "\n")
    install = [*pip, "-c", str(constraint), *program.pip_args]
    if not program.without:
        subprocess.run([*install, "-r", str(requirements)], check=True, env={**os.environ, **program.build})
    else:
        subprocess.run([*install, "--no-deps", "-r", str(requirements)], check=True)
        names = [line.split("==")[0].strip() for line in requirements.read_text().splitlines() if line.strip()]
        found = subprocess.run([str(python), "-c", _REQUIRES, *names], capture_output=True, text=True, check=True)
        left = [r for r in json.loads(found.stdout) if not r.startswith((*program.without, "torch=="))]
        subprocess.run([*install, *left], check=True)
    stamp.write_text(wanted)
    return python


def quantize(model: Path, scheme: str, fmt: str, folder: Path, dtype: str | None = None) -> None:
    """Plain rounding: what is judged is the file, and every format must be given the same integers."""
    from auto_round import AutoRound

    options = {key: value for key, value in SCHEMES[scheme].items() if key not in ("model", "dtype", "formats")}
    options |= {"model_dtype": dtype} if dtype else {}
    AutoRound(str(model), iters=0, disable_opt_rtn=True, **options).quantize_and_save(folder, format=fmt)


def our_logits(folder: Path, ids: np.ndarray, dtype: str) -> np.ndarray:
    """float32 logits of our loader, or of Transformers alone for a dense checkpoint."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoRoundConfig

    quantized = getattr(AutoConfig.from_pretrained(folder), "quantization_config", None) is not None
    options = {"quantization_config": AutoRoundConfig()} if quantized else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **options).eval()
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.float().numpy()


@dataclass
class Bench:
    """Folders and what has been computed so far.

    Attributes:
        root: of the models that are made.
        work: of the checkpoints and logits.
        writable: the (scheme, format) pairs that can be made.
        only: a model to use for every scheme.
        twins: also write the weights of every cell dequantized, as format `fake` in float32.
    """

    root: Path
    work: Path
    ids: np.ndarray
    writable: set[tuple[str, str]] = field(default_factory=set)
    only: Path | None = None
    twins: bool = False
    logits: dict[tuple[str, ...], np.ndarray] = field(default_factory=dict)
    files: dict[tuple[str, str], tuple[Path, np.ndarray]] = field(default_factory=dict)

    def model(self, scheme: str) -> Path:
        return self.only or get_model(SCHEMES[scheme].get("model", next(iter(MODELS))), self.root)

    def gguf_file(self, scheme: str, fmt: str) -> tuple[Path, np.ndarray]:
        """The folder of a GGUF file, and logits of the model that holds its numbers."""
        from referee_gguf_files import Cell

        if (scheme, fmt) not in self.files:
            folder = self.work / f"{scheme}-{fmt}".replace(" ", "_").replace(":", "-")
            made = Cell(self.model(scheme), fmt.partition(":")[2], folder)
            if made.notes:
                raise SystemExit(f"{made.file}: {'; '.join(made.notes)}")
            self.files[scheme, fmt] = made.file.parent, made.logits(self.ids)
        return self.files[scheme, fmt]

    def checkpoint(self, scheme: str, fmt: str, dtype: str | None = None) -> Path:
        if fmt.startswith("gguf:"):
            return self.gguf_file(scheme, fmt)[0]
        folder = self.work / f"{scheme}-{fmt}{'-' + dtype if dtype else ''}".replace(" ", "_").replace(":", "-")
        if not (folder / "report.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            quantize(self.model(scheme), scheme, fmt, folder, dtype)
        return folder

    def reference(self, scheme: str, fmt: str, dtype: str, weights_only: bool = False) -> np.ndarray:
        """Our logits in `dtype`: of the file itself where our loader opens it; else of a file that it opens and that
        was made from the same integers; else of format `fake` in float32, which holds the dequantized weights exactly.
        Of a GGUF file, of the model with all of its tensors, dequantized by the `gguf` package.
        Weights alone in bfloat16 are always of the latter: our loader does not round them to that, dense ones are.

        Args:
            weights_only: leave activations in full precision.
        """
        if fmt.startswith("gguf:"):
            return self.gguf_file(scheme, fmt)[1]
        if weights_only:
            scheme = WEIGHTS_OF.get(scheme, scheme)
        alike = [fmt] if get_format(fmt).loadable_here else [f"auto_round:{fmt}", "auto_round", "auto_round:mlx"]
        opened = next((name for name in alike if (scheme, name) in self.writable), "fake")
        if dtype == "bfloat16" and (weights_only or SCHEMES[scheme].get("act_bits") == 16):
            opened = "fake"
        key = (scheme, opened, dtype)
        if key not in self.logits:
            folder = self.checkpoint(scheme, opened, "float32" if opened == "fake" else None)
            self.logits[key] = our_logits(folder, self.ids, dtype)
        return self.logits[key]

    def dense(self, scheme: str, dtype: str) -> np.ndarray:
        model = self.model(scheme)
        key = ("dense", str(model), dtype)
        if key not in self.logits:
            self.logits[key] = our_logits(model, self.ids, dtype)
        return self.logits[key]


def judge(
    program: Program, python: Path, folder: Path, ids: Path, out: Path, dtype: str, script: str = "", *more: str
) -> tuple[dict | None, str]:
    """(versions, "") when the program opened the folder, else (None, the reason).

    Args:
        script: another than its judge, with `more` arguments.
    """
    out.unlink(missing_ok=True)
    script = str(program.folder / (script or program.judge))
    command = [str(python), script, str(folder), str(ids), str(out), dtype, *more]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | program.environment
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    except subprocess.TimeoutExpired:
        return None, "did not finish in 15 minutes"
    if done.returncode != 0 or not out.exists():
        return None, _reason(f"{done.stdout}\n{done.stderr}") or f"exit status {done.returncode}"
    return json.loads(done.stdout.strip().splitlines()[-1]), ""


# What an engine says about its own processes when one of them failed for another reason.
_CONSEQUENCES = ("Engine core initialization failed", "WorkerProc initialization failed")


def _reason(output: str) -> str:
    """The last line that names an exception and is no consequence of another; else the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    found = []
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if match := re.search(r"\b((?:\w+\.)*\w*(?:Error|Exception): .+)", line):
            found.append(f"{match[1]}: {following}" if "validation error" in line else match[1])
    found = [text for text in found if not any(c in text for c in _CONSEQUENCES)]
    return (found or lines or [""])[-1][:300]


def run(bench: Bench, program: Program, python: Path, cells: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """The program's results for (format, scheme) pairs."""
    from auto_round.errors import AutoRoundError

    ids_file, out = bench.work / "ids.npy", bench.work / f"{program.name}.npy"
    np.save(ids_file, bench.ids)
    rows: list[dict[str, Any]] = []
    for fmt, scheme in cells:
        dtype = program.dtype(fmt, scheme)
        try:
            folder = bench.checkpoint(scheme, fmt)
            if bench.twins:
                bench.checkpoint(scheme, "fake", "float32")
        except AutoRoundError as error:
            print(f"{fmt}: {scheme}: not written ({error})", flush=True)
            continue
        versions, reason = judge(program, python, folder, ids_file, out, dtype)
        row: dict[str, Any] = {"scheme": scheme, "format": fmt, "dtype": dtype, "opened": versions is not None}
        if versions is None:
            row["reason"] = reason.replace(str(bench.work), "")
        else:
            ours = bench.reference(scheme, fmt, dtype, program.weights_only)
            if scheme in program.own_inputs:
                row["to_ours"] = float(f"{difference(np.load(out), ours):.2e}")
                ours = by_own_rules(bench, program, python, scheme, folder, dtype)
            row["difference"] = float(f"{difference(np.load(out), ours):.2e}")
            row["effect"] = float(f"{difference(bench.dense(scheme, dtype), ours):.2e}")
            row["versions"] = versions
        rows.append(row)
        print(json.dumps({"program": program.name, **row}), flush=True)
    return rows


def by_own_rules(bench: Bench, program: Program, python: Path, scheme: str, folder: Path, dtype: str) -> np.ndarray:
    """Logits of our weights with inputs quantized by the program's own rules."""
    out = bench.work / f"{program.name}-inputs.npy"
    dense = bench.checkpoint(WEIGHTS_OF.get(scheme, scheme), "fake", "float32")
    done, reason = judge(program, python, folder, bench.work / "ids.npy", out, dtype, "inputs.py", str(dense))
    if done is None:
        raise SystemExit(f"{program.folder / 'inputs.py'}: {reason}")
    return np.load(out)


def failures(rows: list[dict[str, Any]], opens: dict[str, tuple[str, ...]]) -> list[str]:
    """What should not be: a cell of `opens` that did not open, and any that opened and differs."""
    closed = [r for r in rows if not r["opened"] and r["scheme"] in opens.get(r["format"], ())]
    bad = [f"{r['format']} {r['scheme']}: not opened ({r['reason']})" for r in closed]
    wrong = [r for r in rows if r["opened"] and not r["difference"] <= LIMIT]
    return bad + [f"{r['format']} {r['scheme']}: differs by {r['difference']}" for r in wrong]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", default=",".join(PROGRAMS))
    parser.add_argument("--schemes", default="", help="separated by semicolons")
    parser.add_argument("--formats", default="")
    parser.add_argument("--all", action="store_true", help="also cells that the program does not claim")
    parser.add_argument("--model", type=Path, help="a model folder for all schemes; results are only printed")
    parser.add_argument("--root", type=Path, default=ROOT / ".referees", help="environments and checkpoints")
    parser.add_argument("--twins", action="store_true", help="also write the weights of each cell dequantized")
    parser.add_argument("--render", action="store_true", help="write docs/compatibility.md and stop")
    a = parser.parse_args()
    if a.render:
        referees_report.render(ROOT, PROGRAMS, SCHEMES)
        return 0
    names = a.programs.split(",")
    unknown = [n for n in names if n not in PROGRAMS]
    if unknown:
        parser.error(f"unknown program {unknown[0]!r}; known: {', '.join(PROGRAMS)}")
    schemes = [s for s in a.schemes.split(";") if s] or list(SCHEMES)
    unknown = [s for s in schemes if s not in SCHEMES]
    if unknown:
        parser.error(f"unknown scheme {unknown[0]!r}; known: {'; '.join(SCHEMES)}")
    work = a.root / "work" / (a.model.name if a.model else "tiny")
    work.mkdir(parents=True, exist_ok=True)
    writable = referees_report.writable_cells(SCHEMES)
    bench = Bench(a.root, work, np.random.default_rng(5).integers(0, 250, (2, 48)), writable, a.model, a.twins)
    failed: list[str] = []
    for name in names:
        program = PROGRAMS[name]
        python = prepare(program, a.root)
        formats = a.formats.split(",") if a.formats else list(program.opens)
        cells = [
            (fmt, scheme) for fmt in formats for scheme in schemes
            if (scheme in program.opens.get(fmt, ()) or (a.all and (scheme, fmt) in writable))
            and SCHEMES[scheme].get("dtype", program.dtype(fmt, scheme)) == program.dtype(fmt, scheme)
        ]  # fmt: skip
        rows = run(bench, program, python, cells)
        failed += [f"{name}: {text}" for text in failures(rows, program.opens)]
        if not a.model:
            referees_report.record(ROOT, program.name, program.version, rows)
    if not a.model:
        referees_report.render(ROOT, PROGRAMS, SCHEMES)
    for text in failed:
        print(text, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
