"""Open a GGUF file by llama.cpp, through llama-cpp-python, and write its logits or its token ids.

judge.py FOLDER IDS.npy OUT.npy DTYPE [float32]
judge.py --many CELLS.json        [[file, IDS.npy, OUT.npy], [file, IDS.npy, OUT.npy, "float32"], ...]: of several files
judge.py --tokens FILE TEXTS.json OUT.json        ids of every text, special tokens recognised and added

FOLDER holds one .gguf file. llama.cpp decides itself in which precision it computes; DTYPE is not used. With "float32"
it first dequantizes the file by its own quantizer, as `llama-quantize --allow-requantize FILE OUT F32` does, and runs
the result: the same bytes read by the same program, without the rounding of inputs to 8 bits that its products with
quantized matrices begin with.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

# What llama.cpp says. It calls `note` for as long as the process lives, so neither may be a local.
said: list[str] = []


@llama_cpp.llama_log_callback
def note(level: int, text: bytes, data: Any) -> None:
    said.append(text.decode("utf-8", "replace"))


def open_model(file: str, vocab_only: bool = False) -> Any:
    """The model, memory-mapped. Exits with the file's name when llama.cpp refuses it."""
    said.clear()
    llama_cpp.llama_log_set(note, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    options = llama_cpp.llama_model_default_params()
    options.vocab_only = vocab_only
    model = llama_cpp.llama_model_load_from_file(file.encode(), options)
    if not model:
        reasons = [line.strip() for line in said if "error" in line.lower()] or said[-3:]
        raise SystemExit(f"llama.cpp does not open {file}: {' '.join(reasons)[:500]}")
    return model


def logits(file: str, ids: np.ndarray, how: str = "") -> np.ndarray:
    """float32 [samples, positions, vocabulary] for int64 ids [samples, tokens]; `how`: "float32" as above."""
    if how == "float32":
        with tempfile.TemporaryDirectory(dir=Path(file).parent) as work:
            dense = str(Path(work) / "float32.gguf")
            write_float32(file, dense)
            return logits(dense, ids)
    model = open_model(file)
    samples, tokens = ids.shape
    rows = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    options = llama_cpp.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = max(tokens, 64)
    options.type_k = options.type_v = 0  # a cache in float32
    options.flash_attn_type = 0
    # Its threads wait for each other by spinning, so more of them than cores are very slow.
    options.n_threads = options.n_threads_batch = len(os.sched_getaffinity(0))
    context = llama_cpp.llama_init_from_model(model, options)
    if not context:
        raise SystemExit(f"llama.cpp makes no context for {file}")
    out = np.empty((samples, tokens, rows), np.float32)
    for number, sample in enumerate(ids):
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        batch = llama_cpp.llama_batch_init(tokens, 0, 1)
        batch.n_tokens = tokens
        for position, token in enumerate(sample.tolist()):
            batch.token[position], batch.pos[position] = token, position
            batch.n_seq_id[position], batch.seq_id[position][0], batch.logits[position] = 1, 0, True
        if llama_cpp.llama_decode(context, batch):
            raise SystemExit(f"llama.cpp cannot run {file}")
        found = llama_cpp.llama_get_logits(context)
        out[number] = np.ctypeslib.as_array(found, (tokens, rows))
        llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return out


def write_float32(file: str, out: str) -> None:
    """All of a file's tensors in float32, by llama.cpp's quantizer."""
    llama_cpp.llama_backend_init()
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.allow_requantize = llama_cpp.LLAMA_FTYPE_ALL_F32, True
    options.nthread = len(os.sched_getaffinity(0))
    options.max_buf_size = 1 << 27  # bytes at a time
    if llama_cpp.llama_model_quantize(file.encode(), out.encode(), ctypes.byref(options)):
        raise SystemExit(f"llama.cpp does not dequantize {file}")


def token_ids(file: str, texts: list[str]) -> list[list[int]]:
    """Ids of each text, as a prompt is tokenized."""
    vocab = llama_cpp.llama_model_get_vocab(open_model(file, vocab_only=True))
    found = []
    for text in texts:
        data = text.encode("utf-8")
        room = (llama_cpp.llama_token * (len(data) + 16))()
        count = llama_cpp.llama_tokenize(vocab, data, len(data), room, len(room), True, True)
        if count < 0:
            raise SystemExit(f"llama.cpp cannot tokenize {text!r}")
        found.append(list(room[:count]))
    return found


def main(arguments: list[str]) -> None:
    if arguments[0] == "--tokens":
        file, texts, out = arguments[1:]
        Path(out).write_text(json.dumps(token_ids(file, json.loads(Path(texts).read_text()))))
    elif arguments[0] == "--many":
        for file, ids, out, *how in json.loads(Path(arguments[1]).read_text()):
            try:
                np.save(out, logits(file, np.load(ids), *how))
            except SystemExit as error:
                Path(out).with_suffix(".error").write_text(str(error))
    else:
        folder, ids, out, _, *how = arguments
        (file,) = Path(folder).glob("*.gguf")
        np.save(out, logits(str(file), np.load(ids), *how))
    try:
        print(json.dumps({"llama-cpp-python": version("llama-cpp-python")}))
    except PackageNotFoundError:  # run from its source tree
        print(json.dumps({"llama-cpp-python": llama_cpp.__version__}))


if __name__ == "__main__":
    main(sys.argv[1:])
