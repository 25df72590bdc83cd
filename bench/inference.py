"""Tokens a second and memory on a CPU: full precision, this package, auto-round 0.16.1 and llama.cpp, in one run.

    python bench/inference.py --model SmolLM2-135M --work /tmp/inference --threads 2 \
        --peer_python /path/to/peer-venv/bin/python --llama_bin llama.cpp/build/bin --out bench/results/inference.json

Two models: the one given, and one of TinyLlama's shape (1.1 billion weights) with random values, made here. Both are
rounded plainly to 2, 4 and 8 bits, and to GGUF's Q4_0 and Q4_K_M; what was made stays in `--work` for another run. Then
each side opens the same files in a process of its own, one after the other: bfloat16 and ours through Transformers, the
peer the same folders with its own choice of a back end, llama.cpp its GGUF files.

decode: tokens a second, one at a time, `--tokens` of them after a prompt of 32. prefill: tokens a second of a prompt of
`--prompt`. Of `--repeat` runs the fastest counts. peak: memory of the process, loading included; rss: after loading.
The head is not quantized in ours and the peer's, but in GGUF (Q6_K); where it is not tied, "head 8 bits" is ours at 4
bits with a head of 8. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from programs import failed, run, run_script, variables
from vs_peer import HERE, machine

_RANDOM = {
    "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
    "num_attention_heads": 32, "num_key_value_heads": 4, "tie_word_embeddings": False, "max_position_embeddings": 2048,
}  # fmt: skip
GGUF = ("q4_0", "q4_k_m")
HEAD = "ours 4 bits, head 8 bits"


def make_random(folder: Path, tokenizer: Path) -> None:
    """A Llama of TinyLlama's shape in bfloat16, with the first tokens of another model's tokenizer for llama.cpp."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**_RANDOM, dtype="bfloat16", bos_token_id=1, eos_token_id=2)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    gen = torch.Generator().manual_seed(0)
    model.to_empty(device="cpu")
    for name, weight in model.named_parameters():
        weight.data.fill_(1) if "norm" in name else weight.data.normal_(0, 0.02, generator=gen)
    model.save_pretrained(folder)
    values = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = {token: at for token, at in values["model"]["vocab"].items() if at < _RANDOM["vocab_size"]}
    pair = lambda merge: merge.split(" ") if isinstance(merge, str) else merge
    values["model"]["vocab"] = vocab
    values["model"]["merges"] = [m for m in values["model"]["merges"] if "".join(pair(m)) in vocab]
    (folder / "tokenizer.json").write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_bytes((tokenizer / "tokenizer_config.json").read_bytes())


def once(target: Path, make: Any) -> Path:
    """`target`, made if an earlier run has not."""
    done = target.with_name(target.name + ".done")
    if not done.exists():
        make(target)
        done.touch()
    return target


def quantize(source: Path, flags: tuple[str, ...], out: Path) -> None:
    command = [sys.executable, "-m", "auto_round", str(source), "--iters", "0", "--disable_opt_rtn", *flags]
    run([*command, "--output_dir", str(out)], " ".join(command))


def opened(folder: Path) -> str:
    return str(next(folder.rglob("config.json")).parent)


def transformers_run(python: str, folder: str, a: argparse.Namespace, own: bool, slow_prefill: bool = False) -> dict:
    job = {"folder": folder, "threads": a.threads, "tokens": a.tokens, "prompt": a.prompt, "repeat": a.repeat,
           "slow_prefill": slow_prefill}  # fmt: skip
    command = [python, str(HERE / "run_decode.py"), json.dumps(job)]
    return run_script(command, f"{python} on {folder}", variables(own), a.work)


def llama_run(file: Path, a: argparse.Namespace) -> dict[str, Any]:
    """The timings that llama-completion prints, for a short prompt with tokens after it and for a long prompt."""
    found: dict[str, Any] = {"decode": 0.0, "prefill": 0.0, "peak": 0}
    for words, count in ((28, a.tokens + 1), (a.prompt - 4, 1)):
        for _ in range(a.repeat):
            command = [
                str(Path(a.llama_bin) / "llama-completion"), "-m", str(file), "-p", " the" * words, "-n", str(count),
                "-t", str(a.threads), "-tb", str(a.threads), "-no-cnv", "--ignore-eos", "--temp", "0", "-c", "1024",
            ]  # fmt: skip
            began = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
                env=variables(LD_LIBRARY_PATH=a.llama_bin),
            )  # fmt: skip
            assert began.stderr is not None
            text = began.stderr.read().decode(errors="replace")
            _, code, used = os.wait4(began.pid, 0)
            if code:
                raise failed(" ".join(command[:3]), os.waitstatus_to_exitcode(code), "", text)
            speed = re.findall(r"(prompt eval|eval) time =\s*[\d.]+ ms /\s*(\d+) .*?([\d.]+) tokens per second", text)
            for what, tokens, rate in speed:
                if what == "eval" and count > 1:
                    found["decode"] = max(found["decode"], float(rate))
                if what == "prompt eval" and count == 1:
                    found["prefill"] = max(found["prefill"], float(rate))
                    found["prompt_tokens"] = int(tokens)
            found["peak"] = max(found["peak"], used.ru_maxrss * 1024)
    return found


@dataclass
class Made:
    """The files of one model, by bits and by GGUF type."""

    source: Path
    group_size: int
    folders: dict[int, Path]
    head: Path | None
    files: dict[str, Path]
    slow: bool


def prepare(which: str, a: argparse.Namespace) -> Made:
    """Make what is not in `--work` yet."""
    work, small = Path(a.work), Path(a.model).resolve()
    source = small if which == "small" else once(work / "llama-1.1b", lambda f: make_random(f, small))
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    size = 64 if config["hidden_size"] % 128 else 128
    made = Made(source, size, {}, None, {}, which == "random")
    for bits in dict.fromkeys([*a.bits, *a.peer_bits]):
        flags = ("--scheme", f"W{bits}A16", "--group_size", str(size))
        made.folders[bits] = once(work / f"{which}-w{bits}", partial(quantize, source, flags))
    if not config.get("tie_word_embeddings", True) and 4 in a.bits:
        flags = ("--scheme", "W4A16", "--group_size", str(size), "--layer_config", '{"lm_head": {"bits": 8}}')
        made.head = once(work / f"{which}-w4-head8", partial(quantize, source, flags))
    for kind in GGUF if a.llama_bin else ():
        made.files[kind] = once(work / f"{which}-{kind}", partial(quantize, source, ("--format", f"gguf:{kind}")))
    return made


def runs(made: Made, a: argparse.Namespace) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Each side's name, and what measures it."""
    if not a.no_dense:
        yield "bfloat16", partial(transformers_run, sys.executable, str(made.source), a, True, made.slow)
    for bits in a.bits:
        yield f"ours {bits} bits", partial(transformers_run, sys.executable, opened(made.folders[bits]), a, True)
    if made.head is not None:
        yield HEAD, partial(transformers_run, sys.executable, opened(made.head), a, True)
    for bits in a.peer_bits if a.peer_python else ():
        yield f"peer {bits} bits", partial(transformers_run, a.peer_python, opened(made.folders[bits]), a, False)
    for kind, folder in made.files.items():
        yield f"llama.cpp {kind}", partial(llama_run, next(folder.rglob("*.gguf")), a)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, help="folder of SmolLM2-135M or another small model")
    p.add_argument("--work", required=True, help="where models are made and kept")
    p.add_argument("--peer_python", help="python of a venv with auto-round==0.16.1 and auto-round-lib==0.16.0")
    p.add_argument("--llama_bin", help="folder with llama-completion")
    p.add_argument("--only", nargs="+", choices=("small", "random"), default=["small", "random"])
    p.add_argument("--bits", type=int, nargs="+", default=[2, 4, 8])
    p.add_argument("--peer_bits", type=int, nargs="+", default=[4])
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--tokens", type=int, default=32)
    p.add_argument("--prompt", type=int, default=512)
    p.add_argument("--repeat", type=int, default=2)
    p.add_argument("--no_dense", action="store_true", help="leave bfloat16 out")
    p.add_argument("--prepare", action="store_true", help="only make the models")
    p.add_argument("--out")
    a = p.parse_args()

    work = Path(a.work).resolve()
    work.mkdir(parents=True, exist_ok=True)
    a.work = str(work)
    os.environ["OMP_NUM_THREADS"] = str(a.threads)
    print(machine(), flush=True)
    results: dict[str, Any] = {}
    for which in a.only:
        made = prepare(which, a)
        if a.prepare:
            continue
        rows = results[which] = {"group_size": made.group_size}
        for name, measure in runs(made, a):
            began = time.monotonic()
            row = rows[name] = measure()
            print(
                f"{which} {name}: decode {row['decode']:.2f} tokens/s, prefill {row['prefill']:.1f} tokens/s, peak "
                f"{row['peak'] / 1e6:.0f} MB ({time.monotonic() - began:.0f} s) {row.get('layers', '')}", flush=True,
            )  # fmt: skip
        for best in ("ours 4 bits", HEAD):
            others = [name for name in rows if name not in ("group_size", "ratio", best)] if best in rows else ()
            for name in others:
                ratio = {what: rows[best][what] / rows[name][what] for what in ("decode", "prefill", "peak")}
                rows.setdefault("ratio", {})[f"{best} / {name}"] = ratio
                shown = ", ".join(f"{what} {value:.2f}" for what, value in ratio.items())
                print(f"{which}: {best} / {name}: {shown}", flush=True)
        if a.out:
            found = {"machine": machine(), "threads": a.threads, "tokens": a.tokens, "prompt": a.prompt}
            Path(a.out).write_text(json.dumps({**found, "models": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
