"""Compare what llama.cpp computes from our GGUF files with Transformers on the weights that the files hold.

    python tools/referee_gguf_files.py --judge PYTHON [--cells llama2:q4_k_m,FOLDER:q8_0] [--text FILE] [--work FOLDER]
    python tools/referee_gguf_files.py        a table of the results so far

PYTHON has llama-cpp-python. Without `--cells`: a tiny model of every family in three file types, and Llama in all of
them. For each cell the file is written (plain rounding), all its tensors are dequantized by the `gguf` package and put
into the model, and Transformers computes in float32. Figures are relative differences of the logits, each row centred,
over the whole batch:

* float32: llama.cpp on the file, which it dequantizes itself before it runs it: its reading of our bytes, its graph,
  our names, metadata and order. This is what the limit holds for.
* file: llama.cpp on the file as it is. It rounds the inputs of every quantized matrix to 8 bits, which Transformers
  does not do.
* inputs: what changes in Transformers when it rounds the inputs as llama.cpp does, without llama.cpp: how large the
  second figure should be. All but those of DeepSeek's `kv_b_proj`, which llama.cpp splits and multiplies elsewhere.
* both: llama.cpp on the file as it is against Transformers with its inputs rounded so.

`quantization` is what the rounding of weights changes. Results go to bench/results/gguf_files.json, cell by cell.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from referee_gguf_models import MODELS, save_wide
from referees_compare import difference
from torch.overrides import TorchFunctionMode

from auto_round import AutoRound
from auto_round.codecs.ggml.types import GGML_TYPES
from auto_round.errors import AutoRoundError
from auto_round.gguf.conversion import GgufPlan, conversion_for
from auto_round.gguf.file_types import FILE_TYPES
from auto_round.gguf.reader import GgufTensors
from auto_round.modeling.blocks import is_conv1d

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "gguf_files.json"
LIMIT = 2e-2
# Where llama.cpp's 8 bits make more than that, how much more than in Transformers with the same 8 bits.
_AS_INPUTS = 1.25
_JUDGE = ROOT / "test" / "referees" / "llama_cpp" / "judge.py"
FAMILY_TYPES = ("q4_k_m", "q2_k_s", "q8_0")


def all_cells() -> list[tuple[str, str]]:
    """Of tiny models: every family in three file types, Llama in every one."""
    families = [(name, kind) for name in MODELS for kind in FAMILY_TYPES]
    return families + [("llama3", kind) for kind in FILE_TYPES if kind not in FAMILY_TYPES]


class Cell:
    """One file, and the model that holds its numbers.

    Attributes:
        plan: of the file.
        file: where it is.
        model: Transformers' model with the file's weights, in float32.
        kinds: by parameter of the model, its type in the file.
        notes: what is wrong with the file, in words.
    """

    def __init__(self, folder: Path, file_type: str, work: Path) -> None:
        shutil.rmtree(work, ignore_errors=True)
        # What is in the file is compared below.
        ar = AutoRound(str(folder), iters=0, disable_opt_rtn=True, verify=False)
        formats = f"gguf:{file_type},fake"
        job = ar.plan(formats)
        assert job.gguf is not None
        self.plan: GgufPlan = job.gguf
        _, (file_folder, self.fake) = ar.quantize_and_save(work, format=formats)
        (self.file,) = Path(file_folder).glob("*.gguf")
        self.model = load(self.fake)
        self.notes: list[str] = []
        self.kinds = self._take_weights(folder, {n for n, layer in job.layers.items() if layer.ggml is not None})

    def _take_weights(self, folder: Path, walked: set[str]) -> dict[str, str]:
        """Put the file's numbers into the model. `walked`: layers whose dense weights are in the fake model already,
        and must be the same."""
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(folder)
        own = AutoConfig.from_pretrained(self.fake).dtype  # of the fake model's folder
        tensors = GgufTensors(self.file)
        state = self.model.state_dict(keep_vars=True)
        conv1d = {f"{name}.weight" for name, module in self.model.named_modules() if is_conv1d(module)}
        given = {name: tensor.t() if name in conv1d else tensor for name, tensor in state.items()}
        head = given.pop("lm_head.weight") if config.tie_word_embeddings else None
        conversion = conversion_for(config, {name: tuple(tensor.shape) for name, tensor in given.items()})
        weights = {name: stored_weight(tensors, name) for name in tensors}
        kinds: dict[str, str] = {}
        with torch.no_grad():
            if head is not None:  # stored as the embedding
                self._compare("lm_head", head, weights["token_embd.weight"].to(own).float())
                head.copy_(weights["token_embd.weight"])
                kinds["lm_head.weight"] = self.plan.types["token_embd.weight"]
            for name, tensor in given.items():
                layer = name.removesuffix(".weight")
                for place in conversion.place(name):
                    kind = self.plan.types[place.tensor]
                    stored = at_place(weights[place.tensor], place)
                    if kind == "F32":
                        self._compare(name, place.cut(tensor), stored)
                        continue
                    if layer in walked and kind in GGML_TYPES:
                        self._compare(name, place.cut(tensor), stored.to(own).float())
                    if place.edit is None or tensor.ndim == 3:
                        kinds[name] = kind
                    index = place.cut(torch.arange(tensor.numel()).view(tensor.shape))
                    changed = tensor.detach().clone(memory_format=torch.contiguous_format)
                    changed.view(-1)[index.reshape(-1)] = stored.reshape(-1)
                    tensor.copy_(changed)
                    self._compare(name, place.cut(tensor), stored)
        return kinds

    def _compare(self, name: str, ours: torch.Tensor, stored: torch.Tensor) -> None:
        if not torch.equal(ours.detach().float().reshape(-1), stored.reshape(-1)):
            self.notes.append(f"{name}: the dense model and the file differ")

    def logits(self, ids: np.ndarray, rounded: bool = False) -> np.ndarray:
        """float32 [samples, positions, vocabulary]; `rounded`: with inputs in 8 bits as llama.cpp has them."""
        if not rounded:
            return logits_of(self.model, ids)
        named = dict(self.model.named_parameters(remove_duplicate=False))
        with RoundedInputs({named[name].untyped_storage().data_ptr(): kind for name, kind in self.kinds.items()}):
            return logits_of(self.model, ids)


def stored_weight(file: GgufTensors, name: str) -> torch.Tensor:
    """A tensor in float32."""
    stored = file.stored(name)
    if stored.dtype != torch.uint8:
        return stored.float()
    values = gguf.dequantize(stored.numpy(), gguf.GGMLQuantizationType[file.tensors[name].kind])
    return torch.from_numpy(values).reshape(file.tensors[name].shape)


class RoundedInputs(TorchFunctionMode):
    """Rounds what is multiplied with the weights of a model, also with single experts of a stacked one.

    `kinds`: types of weights by the address of their storage.
    """

    def __init__(self, kinds: Mapping[int, str]) -> None:
        super().__init__()
        self._kinds = kinds

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        at = {torch.nn.functional.linear: 0, torch.addmm: 1}.get(func)
        if at is not None:
            kind = self._kinds.get(args[at + 1].untyped_storage().data_ptr(), "F32")
            args = (*args[:at], rounded_input(args[at], kind), *args[at + 1 :])
        return func(*args, **(kwargs or {}))


def at_place(weight: torch.Tensor, place: Any) -> torch.Tensor:
    """The part of a tensor of the file that a placement put there."""
    if place.slot is not None:
        return weight[place.slot]
    rows = None if place.rows is None else len(place.rows)
    return weight[place.at_row :] if rows is None else weight[place.at_row : place.at_row + rows]


def load(folder: str | Path) -> torch.nn.Module:
    """The model in a folder, in float32."""
    from transformers import AutoModelForCausalLM

    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    )
    return model.eval()


def logits_of(model: torch.nn.Module, ids: np.ndarray) -> np.ndarray:
    """float32 [samples, positions, vocabulary]"""
    with torch.no_grad():
        found: np.ndarray = model(torch.from_numpy(ids)).logits.float().numpy()
    return found


def rounded_input(x: torch.Tensor, kind: str) -> torch.Tensor:
    """Activations [..., n] as ggml's vec_dot takes them: 8 bits for 256 values (K types, float32 step) or for 32 (the
    other types, float16 step); float16 for float16 weights."""
    if kind == "F16":
        return x.half().float()
    if kind not in GGML_TYPES:
        return x
    block = GGML_TYPES[kind].block
    blocks = x.reshape(-1, block)
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    if block == 256:  # the largest becomes -127
        step = -largest / 127
        codes = torch.where(step == 0, 0, torch.round(blocks / step)).clamp(max=127)
    else:
        step = largest.abs() / 127
        codes = torch.where(step == 0, 0, torch.round(blocks / step))
        step = step.half().float()
    return (codes * step).reshape(x.shape)


def relative(theirs: np.ndarray, ours: np.ndarray) -> float:
    """Norm of the difference over that of `ours`, every position centred over the vocabulary."""
    a, b = (x - x.mean(-1, keepdims=True) for x in (theirs.astype(np.float64), ours.astype(np.float64)))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def over_all(theirs: np.ndarray, ours: np.ndarray) -> list[float]:
    """[over the whole batch, of the worst position]"""
    theirs = theirs[..., : ours.shape[-1]]
    return [float(f"{value:.3g}") for value in (relative(theirs, ours), difference(theirs, ours))]


def token_ids(folder: Path, text: Path | None, samples: int = 2, tokens: int = 48) -> np.ndarray:
    """int64 [samples, tokens]: of the text, or random ones for tiny models."""
    if text is None:
        return np.random.default_rng(0).integers(3, 300, (samples, tokens))
    from transformers import AutoTokenizer

    with text.open(encoding="utf-8") as file:
        start = file.read(samples * tokens * 20)
    found = AutoTokenizer.from_pretrained(folder)(start).input_ids[: samples * tokens]
    return np.array(found, np.int64).reshape(samples, tokens)


def judge(command: str, work: Path, file: Path) -> dict[str, np.ndarray | str]:
    """llama.cpp's logits of the file for `ids.npy` in `work`, or why there are none: as it is ("file"), and dequantized
    by llama.cpp ("float32")."""
    ways = {"file": "", "float32": "float32"}
    asked = [[str(file), str(work / "ids.npy"), str(work / f"{name}.npy"), how] for name, how in ways.items()]
    (work / "cells.json").write_text(json.dumps(asked))
    subprocess.run([*command.split(), str(_JUDGE), "--many", str(work / "cells.json")], check=True, capture_output=True)
    errors = {name: work / f"{name}.error" for name in ways}
    return {n: e.read_text() if e.is_file() else np.load(work / f"{n}.npy") for n, e in errors.items()}


def run_cell(name: str, file_type: str, folder: Path, text: Path | None, work: Path, command: str) -> dict[str, Any]:
    """The figures of one cell."""
    ids = token_ids(folder, text, tokens=48 if text is None else 24)
    cell = Cell(folder, file_type, work)
    np.save(work / "ids.npy", ids)
    found = judge(command, work, cell.file)
    ours, rounded = cell.logits(ids), cell.logits(ids, rounded=True)
    result: dict[str, Any] = {"model": name, "file_type": file_type, "types": sorted(set(cell.plan.types.values()))}
    for key, theirs in found.items():
        result[key] = theirs if isinstance(theirs, str) else over_all(theirs, ours)
    result["inputs"] = over_all(rounded, ours)
    if not isinstance(theirs := found["file"], str):
        result["both"] = over_all(theirs, rounded)
    result["quantization"] = over_all(ours, logits_of(load(folder), ids))
    if cell.notes:
        result["wrong"] = cell.notes
    shutil.rmtree(work)
    return result


def is_good(cell: dict[str, Any]) -> bool:
    """Whether the file holds what it should, llama.cpp's logits of its numbers are within the limit, and those of the
    file as it is are, or are no further than 8-bit inputs explain."""
    if "wrong" in cell or any(isinstance(cell[key], str) for key in ("file", "float32")):
        return False
    as_it_is: float = cell["file"][0]
    return cell["float32"][0] <= LIMIT and as_it_is <= max(LIMIT, _AS_INPUTS * cell["inputs"][0])


def record(cell: dict[str, Any]) -> None:
    """Put a cell into the results, in place of an older one."""
    kept = json.loads(RESULTS.read_text())["cells"] if RESULTS.is_file() else []
    key = (cell["model"], cell["file_type"])
    kept = [old for old in kept if (old["model"], old["file_type"]) != key] + [cell]
    kept.sort(key=lambda c: (c["model"], c["file_type"]))
    lines = ",\n".join(" " + json.dumps(c) for c in kept)
    partial = RESULTS.with_suffix(".partial")
    partial.write_text(f'{{"limit": {LIMIT}, "cells": [\n{lines}\n]}}\n')
    partial.replace(RESULTS)


def table(cells: Sequence[Mapping[str, Any]]) -> str:
    """Markdown with the figures of cells that have them."""
    names = ("float32", "file", "inputs", "both", "quantization")
    lines = [f"| model | file type | {' | '.join(names)} |", "|---|---|" + "---|" * len(names)]
    for c in cells:
        shown = (f"{c[name][0]:.1e}" if name == "float32" else f"{c[name][0]:.4f}" for name in names)
        lines.append("| " + " | ".join((c["model"], f"`{c['file_type']}`", *shown)) + " |")
    return "\n".join(lines)


def main() -> int:
    """Run the cells; 1 when one is not good."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judge", help="Python with llama-cpp-python; without it the results so far are shown")
    parser.add_argument("--cells", help="MODEL:TYPE,...; a model is a name of referee_gguf_models.py or a folder")
    parser.add_argument("--text", type=Path, help="for models in folders; needed with them")
    parser.add_argument("--work", type=Path, default=ROOT / ".referees" / "gguf_files")
    options = parser.parse_args()
    if options.judge is None:
        print(table([c for c in json.loads(RESULTS.read_text())["cells"] if isinstance(c["file"], list)]))
        return 0
    cells = [tuple(c.rsplit(":", 1)) for c in options.cells.split(",")] if options.cells else all_cells()
    good = True
    for model, file_type in cells:
        tiny = model in MODELS
        name = model if tiny else f"{Path(model).name}/"
        folder = save_wide(model, options.work / "models") if tiny else Path(model)
        text = None if tiny else options.text
        try:
            found = run_cell(name, file_type, folder, text, options.work / "cell", options.judge)
        except (AutoRoundError, subprocess.CalledProcessError) as error:
            found = {"model": name, "file_type": file_type, "file": f"{type(error).__name__}: {error}"}
            found["float32"] = found["file"]
        record(found)
        good &= is_good(found)
        print("" if is_good(found) else "NOT", json.dumps(found), flush=True)
    return int(not good)


if __name__ == "__main__":
    raise SystemExit(main())
