"""Compare this repository's conversion to GGUF with llama.cpp's own converter, and the files with Transformers.

    python tools/referee_gguf.py --llama-cpp FOLDER [--judge PYTHON] [--models llama2,qwen3] [--record]

FOLDER is a llama.cpp source tree (its convert_hf_to_gguf.py and gguf-py are used). For every model of
referee_gguf_models.py two float32 files are made, and every key and every tensor compared. With `--judge`, a Python
that has llama-cpp-python, the file's logits are compared with those of Transformers. `--record` writes what llama.cpp's
converter said to test/test_cpu/gguf/data/gguf_families.json, which the tests compare with.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from referee_gguf_models import MODELS, save
from safetensors.torch import load_file

from auto_round.gguf.conversion import Conversion, conversion_for
from auto_round.gguf.metadata import general_metadata
from auto_round.gguf.vocab import vocabulary_for

ROOT = Path(__file__).resolve().parents[1]
EXPECTED = ROOT / "test" / "test_cpu" / "gguf" / "data" / "gguf_families.json"
LIMIT = 1e-2
# Keys that we always write, and llama.cpp's converter only when the tokenizer's files say so.
EXPLICIT = {"tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token", "tokenizer.ggml.add_space_prefix"}
# Models that llama.cpp's converter cannot convert, and why; llama.cpp itself runs our files of them.
UNCONVERTED = {"stablelm-12b": "it loses the norms of heads in a generator that returns instead of yielding"}
# Keys of theirs that say what llama.cpp does anyway.
DEFAULTS = {"tokenizer.ggml.add_sep_token"}
_JUDGE = ROOT / "test" / "referees" / "llama_cpp" / "judge.py"
_CONVERT = """
import json, runpy, sys, traceback
from conversion.base import TextModel
# Its converter knows tokenizers by hashes of what they give for a text; these tiny ones it cannot know.
# (Transformers makes every tokenizer of a Qwen2 model a Qwen2 tokenizer.)
TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2" if self.hparams["model_type"] == "qwen2" else "gpt-2"
script = sys.argv[1]
for folder, out in json.loads(sys.argv[2]):
    sys.argv = [script, folder, "--outfile", out, "--outtype", "f32"]
    try:
        runpy.run_path(script, run_name="__main__")
    except BaseException:
        open(out + ".error", "w").write(traceback.format_exc())
"""


def assemble(conversion: Conversion, sources: dict[str, torch.Tensor], transposed: set[str]) -> dict[str, np.ndarray]:
    """All tensors of the file in float32, in memory."""
    made = {name: torch.full(shape, torch.nan) for name, shape in conversion.tensors.items()}
    for name, tensor in conversion.extras().items():
        made[name].copy_(tensor)
    for name, tensor in sources.items():
        tensor = tensor.t() if name in transposed else tensor
        for placement in conversion.place(name):
            piece, target = placement.cut(tensor.float()), made[placement.tensor]
            if placement.slot is not None:
                target[placement.slot] = piece
            else:
                target[placement.at_row : placement.at_row + len(piece)] = piece
    return {name: tensor.numpy() for name, tensor in made.items()}


def write_ours(folder: Path, out: Path, tensors: dict[str, torch.Tensor] | None = None) -> None:
    """The model in `folder` as a float32 GGUF file, by `gguf.GGUFWriter`."""
    import gguf
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(folder)
    sources = tensors if tensors is not None else load_file(folder / "model.safetensors")
    conv1d = {
        n
        for n in sources
        if config.model_type == "gpt2" and n.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
    }
    shapes = {n: tuple(reversed(t.shape)) if n in conv1d else tuple(t.shape) for n, t in sources.items()}
    conversion = conversion_for(config, shapes)
    arrays = assemble(conversion, sources, conv1d)
    writer = gguf.GGUFWriter(out, conversion.arch)
    rows = conversion.tensors["token_embd.weight"][0]
    vocabulary = vocabulary_for(AutoTokenizer.from_pretrained(folder), rows, config, folder)
    general = general_metadata(conversion.arch, conversion.tensors, gguf.LlamaFileType.ALL_F32, folder=folder)
    for entry in (*general, *conversion.metadata(), *vocabulary.metadata):
        if entry.key != "general.architecture":
            writer.add_key_value(*entry)
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_theirs(cells: list[tuple[Path, Path]], llama_cpp: Path) -> None:
    """The same by llama.cpp's converter, for all (folder, file); a failed one leaves a file with the ending .error."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(llama_cpp / "gguf-py"), str(llama_cpp)])}
    names = json.dumps([(str(folder), str(out)) for folder, out in cells])
    command = [sys.executable, "-c", _CONVERT, str(llama_cpp / "convert_hf_to_gguf.py"), names]
    subprocess.run(command, env=environment, capture_output=True, check=True)


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(key values, tensors) of a file."""
    import gguf

    reader = gguf.GGUFReader(path)
    keys = {
        name: (f.contents(), [int(t) for t in f.types])
        for name, f in reader.fields.items()
        if not name.startswith("GGUF.")
    }
    return keys, {t.name: np.array(t.data).reshape([int(n) for n in reversed(t.shape)]) for t in reader.tensors}


def differences(ours: Path, theirs: Path) -> list[str]:
    """Everything in which two files differ, in words."""
    (our_keys, our_tensors), (their_keys, their_tensors) = read(ours), read(theirs)
    their_keys = {k: v for k, v in their_keys.items() if v[0] is not False or k not in DEFAULTS}
    found = [
        f"key {k}: ours {our_keys.get(k)!s:.120}, theirs {v!s:.120}"
        for k, v in their_keys.items()
        if our_keys.get(k) != v
    ]
    found += [f"key {k} only ours: {our_keys[k]}" for k in our_keys if k not in their_keys and k not in EXPLICIT]
    found += [f"tensor {n} only on one side" for n in our_tensors.keys() ^ their_tensors.keys()]
    for name in our_tensors.keys() & their_tensors.keys():
        if not np.array_equal(our_tensors[name], their_tensors[name]):
            found.append(f"tensor {name} differs: {our_tensors[name].shape} {their_tensors[name].shape}")
    return found


def judge_all(cells: list[tuple[str, Path, Path]], judge: str, work: Path) -> dict[str, str | float]:
    """By model, the largest relative difference of any position between llama.cpp's logits and those of Transformers.

    `cells`: (name, folder, file). A text instead of a number is why llama.cpp did not open the file.
    """
    from referees_compare import difference
    from transformers import AutoModelForCausalLM

    ids = np.random.default_rng(0).integers(3, 300, (2, 48))
    np.save(work / "ids.npy", ids)
    asked = [[str(file), str(work / "ids.npy"), str(work / f"{name}.npy")] for name, _, file in cells]
    (work / "cells.json").write_text(json.dumps(asked))
    subprocess.run([*judge.split(), str(_JUDGE), "--many", str(work / "cells.json")], check=True, capture_output=True)
    found: dict[str, str | float] = {}
    for name, folder, _ in cells:
        error = work / f"{name}.error"
        if error.is_file():
            found[name] = error.read_text()
            error.unlink()
            continue
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            ours = model(torch.from_numpy(ids)).logits.numpy()
        found[name] = difference(np.load(work / f"{name}.npy"), ours)
    return found


def digest(array: np.ndarray) -> str:
    """Of an array's shape and values."""
    return hashlib.sha256(repr(array.shape).encode() + np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def recorded(path: Path) -> dict[str, Any]:
    """What the tests compare with: the keys of the architecture and vocabulary, and a digest of every tensor."""
    keys, tensors = read(path)
    kept = {k: v for k, (v, _) in keys.items() if not k.startswith("general.")}
    for name, value in kept.items():
        if isinstance(value, list) and len(value) > 100:
            kept[name] = hashlib.sha256(json.dumps(value).encode()).hexdigest()
    made = {name: digest(array) for name, array in sorted(tensors.items())}
    return {"metadata": kept, "tensors": made}


def main() -> int:
    """Run the comparison; 1 when anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=Path, required=True)
    parser.add_argument("--judge", help="Python with llama-cpp-python, for logits")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--work", type=Path, default=ROOT / ".referees" / "gguf")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    expected = json.loads(EXPECTED.read_text()) if EXPECTED.is_file() else {}
    found: dict[str, list[str]] = {}
    names = options.models.split(",")
    file = {(name, who): options.work / f"{name}-{who}.gguf" for name in names for who in ("ours", "theirs")}
    folders = {name: save(name, options.work) for name in names}
    for path in file.values():
        path.unlink(missing_ok=True)
    write_theirs([(folders[name], file[name, "theirs"]) for name in names], options.llama_cpp)
    for name in names:
        try:
            write_ours(folders[name], file[name, "ours"])
            alone = name in UNCONVERTED and not file[name, "theirs"].is_file()
            found[name] = [] if alone else differences(file[name, "ours"], file[name, "theirs"])
            expected[name] = recorded(file[name, "ours" if alone else "theirs"])
        except Exception as error:  # a failed model must not end the run
            found[name] = [f"{type(error).__name__}: {error}"]
    far: dict[str, str | float] = {}
    if options.judge:
        made = [name for name in names if file[name, "ours"].is_file()]
        far = judge_all([(name, folders[name], file[name, "ours"]) for name in made], options.judge, options.work)
    for name in names:
        logits = far.get(name, "")
        verdict = "not converted there" if name in UNCONVERTED else "same"
        shown = f"logits {logits:.1e}" if isinstance(logits, float) else logits
        print(f"{name:20} {'DIFFERS' if found[name] else verdict}  {shown}", *found[name], sep="\n    ", flush=True)
    wrong = any(found.values()) or any(not isinstance(v, float) or v > LIMIT for v in far.values())
    if options.record:
        EXPECTED.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"{json.dumps(name)}: {json.dumps(expected[name], sort_keys=True)}" for name in sorted(expected)]
        EXPECTED.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return int(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
