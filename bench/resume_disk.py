"""Largest disk use of a run, output and work space together, while it can be resumed.

    python bench/resume_disk.py [--layers 6 --hidden 1024 --save bench/results/resume_disk.json]

A model with random weights is tuned for one step into one format and into two. A thread adds up the blocks of all files
below the output folder and the work space every few milliseconds.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from vs_peer import machine

from auto_round import AutoRound

FORMATS = ("auto_round", "auto_round,auto_gptq", "gguf:q4_0")


def disk_use(folders: list[Path]) -> int:
    """Bytes that the files below these folders take on the disk."""
    total = 0
    for path, _, names in (entry for folder in folders for entry in os.walk(folder)):
        for name in names:
            with suppress(OSError):  # removed meanwhile
                total += os.lstat(os.path.join(path, name)).st_blocks * 512
    return total


@contextmanager
def watched(folders: list[Path]) -> Iterator[list[int]]:
    """Sample `disk_use` until the context ends; the list holds the peak."""
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.003):
            peak[0] = max(peak[0], disk_use(folders))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def make_model(folder: Path, layers: int, hidden: int) -> str:
    """A Llama model with random bfloat16 weights and a byte tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=512, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, max_position_embeddings=64,
        tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    vocab |= {"<eos>": len(vocab)}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--save", type=Path, help="write the result to this JSON file")
    given = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory(prefix="resume-disk-") as work:
        space = Path(work) / "space"
        os.environ["AR_WORK_SPACE"] = str(space)
        model = make_model(Path(work) / "model", given.layers, given.hidden)
        samples = [[(7 * i + 3 * j) % 240 + 3 for j in range(16)] for i in range(8)]
        for number, formats in enumerate(FORMATS):
            out = Path(work) / f"out-{number}"
            options = {"group_size": 128} if "gguf" not in formats else {}
            with watched([space, out]) as peak:
                AutoRound(model, iters=1, dataset=samples, nsamples=8, seqlen=16, **options).quantize_and_save(
                    out, formats
                )
            result = disk_use([out])
            rows[formats] = {"result": result, "peak": peak[0], "peak / result": round(peak[0] / result, 2)}
            print(f"{formats}: result {result / 1e6:.1f} MB, peak {peak[0] / 1e6:.1f} MB", flush=True)
    if given.save:
        settings = {"layers": given.layers, "hidden": given.hidden}
        given.save.write_text(json.dumps({"machine": machine(), "settings": settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
