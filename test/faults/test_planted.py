"""Faults planted in finished files, between writing and the check: all of them are found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from extent import FULL
from safetensors.torch import load_file, save_file

from auto_round import AutoRound
from auto_round.errors import VerifyError
from auto_round.gguf.reader import GgufTensors
from auto_round.run import folder_output
from auto_round.run.folder_output import verify_folder
from auto_round.run.gguf import GgufFileWriter

Tensors = dict[str, torch.Tensor]
FIRST, SECOND = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
ZEROS = ("qzeros", "biases", "weight_zero_point")
SCALES = ("scales", "weight_scale", "weight_scale_inv", "scale")

# format: (settings, whether zero points are stored)
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "auto_round": ("auto_round", {"sym": True}),
    "auto_round asymmetric": ("auto_round", {"sym": False, "bits": 3}),
    "auto_gptq": ("auto_gptq", {"sym": True}),
    "auto_awq": ("auto_awq", {"sym": False}),
    "llm_compressor": ("llm_compressor", {"sym": True}),
    "llm_compressor asymmetric": ("llm_compressor", {"sym": False}),
    "llm_compressor NVFP4": ("llm_compressor", {"scheme": "NVFP4", "group_size": None}),
    "auto_round MXFP4": ("auto_round", {"scheme": "MXFP4", "group_size": None}),
    "FP8 static": ("auto_round", {"scheme": "FP8_STATIC", "group_size": None}),
    "mlx": ("mlx", {"sym": True}),
    "fake": ("fake", {"sym": True}),
}
IN_SHORT = ("auto_round", "auto_awq", "mlx")


def layer(tensors: Tensors, name: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}


def codes_of(tensors: Tensors, name: str) -> str:
    """The tensor of a layer that holds its weights."""
    return f"{name}." + max(layer(tensors, name).items(), key=lambda item: item[1].nbytes)[0]


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8)


def swapped(t: Tensors) -> bool:
    for leaf in layer(t, FIRST):
        t[f"{FIRST}.{leaf}"], t[f"{SECOND}.{leaf}"] = t[f"{SECOND}.{leaf}"], t[f"{FIRST}.{leaf}"]
    return True


def missing(t: Tensors) -> bool:
    del t[codes_of(t, FIRST)]
    return True


def duplicated(t: Tensors) -> bool:
    for leaf, value in layer(t, FIRST).items():
        t[f"{SECOND}.{leaf}"] = value.clone()
    return True


def written_twice(t: Tensors) -> bool:
    t[f"{FIRST}.copy"] = t[codes_of(t, FIRST)].clone()
    return True


def zeroed(t: Tensors) -> bool:
    raw(t[codes_of(t, SECOND)]).zero_()
    return True


def zero_point_off_by_one(t: Tensors) -> bool:
    for leaf in ZEROS:
        key = f"{FIRST}.{leaf}"
        if key in t:
            scales = next(t[f"{FIRST}.{s}"] for s in SCALES if f"{FIRST}.{s}" in t)
            t[key] = t[key] - scales if leaf == "biases" else t[key] + 1
            return True
    return False


def scale_of_the_neighbour(t: Tensors) -> bool:
    for leaf in SCALES:
        key = f"{FIRST}.{leaf}"
        if key in t and t[key].numel() > 1:
            rolled = raw(t[key].reshape(-1).contiguous()).roll(t[key].element_size())
            if torch.equal(rolled.view(t[key].dtype), t[key].reshape(-1)):
                return False
            t[key] = rolled.view(t[key].dtype).reshape(t[key].shape).contiguous()
            return True
    return False


def row_shuffled(t: Tensors) -> bool:
    key = codes_of(t, FIRST)
    order = torch.arange(t[key].shape[0])
    order[0], order[1] = 1, 0
    t[key] = raw(t[key])[order].view(t[key].dtype).contiguous()
    return True


def wrong_dtype(t: Tensors) -> bool:
    key = next((f"{FIRST}.{leaf}" for leaf in (*SCALES, "weight") if f"{FIRST}.{leaf}" in t), None)
    if key is None or t[key].dtype == torch.uint8:
        key = "model.norm.weight"
    t[key] = t[key].to(torch.float64)
    return True


def one_bit_of_a_norm(t: Tensors) -> bool:
    raw(t["model.layers.1.input_layernorm.weight"])[5] ^= 1
    return True


FAULTS: list[Callable[[Tensors], bool]] = [
    swapped, missing, duplicated, written_twice, zeroed, zero_point_off_by_one, scale_of_the_neighbour, row_shuffled,
    wrong_dtype, one_bit_of_a_norm,
]  # fmt: skip


def number_of(node: Any, names: tuple[str, ...]) -> tuple[Any, str] | None:
    """The object in a configuration that says one of these, and which."""
    if isinstance(node, dict):
        for name in names:
            if isinstance(node.get(name), int) and not isinstance(node.get(name), bool):
                return node, name
        for value in node.values():
            found = number_of(value, names)
            if found is not None:
                return found
    return None


def plant_in_config(folder: Path, names: tuple[str, ...]) -> bool:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    parts = config.get("quantization_config") or config.get("quantization")
    found = None if parts is None else number_of(parts, names)
    if found is None:
        return False
    found[0][found[1]] += 1
    file.write_text(json.dumps(config))
    return True


@pytest.mark.parametrize("kind", FORMATS if FULL else IN_SHORT)
def test_folders(
    kind: str, packable_folder: Callable[..., str], token_ids: Any, tmp_path: Path, record: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    format, options = FORMATS[kind]
    whole, seen = tmp_path / "whole", []

    def keep(folder: Path, *expected: Any) -> Any:
        shutil.copytree(folder, whole)
        seen.append(expected)
        return verify_folder(folder, *expected)

    monkeypatch.setattr(folder_output, "verify_folder", keep)
    values = {"group_size": 32, "iters": 0, "disable_opt_rtn": True} | options
    AutoRound(packable_folder("llama"), dataset=token_ids, seqlen=24, nsamples=8, **values).quantize_and_save(
        tmp_path / "out", format
    )
    missed: list[str] = []
    injected = 0

    def check(what: str, folder: Path) -> None:
        nonlocal injected
        injected += 1
        try:
            verify_folder(folder, *seen[0])
        except VerifyError:
            pass
        else:
            missed.append(what)
        shutil.rmtree(folder)

    for fault in FAULTS:
        copy = tmp_path / fault.__name__
        shutil.copytree(whole, copy)
        tensors = {name: tensor.clone() for name, tensor in load_file(copy / "model.safetensors").items()}
        if fault(tensors):
            save_file(tensors, copy / "model.safetensors", {"format": "pt"})
            check(fault.__name__, copy)
    for names in (("bits", "num_bits"), ("group_size",)):
        copy = tmp_path / names[0]
        shutil.copytree(whole, copy)
        if plant_in_config(copy, names):
            check(f"wrong {names[0]}", copy)
    copy = tmp_path / "cut"
    shutil.copytree(whole, copy)
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[:-100])
    check("cut", copy)
    record(f"planted, {kind}", injected, injected - len(missed), 0, len(missed))
    assert not missed and injected >= 9, (missed, injected)


def test_gguf(
    gguf_folder: Callable[..., str], token_ids: Any, tmp_path: Path, record: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    seen: list[Any] = []

    verify = GgufFileWriter.verify
    monkeypatch.setattr(GgufFileWriter, "verify", lambda *args: (seen.append(args), verify(*args))[1])
    AutoRound(gguf_folder("llama"), iters=0, disable_opt_rtn=True, dataset=token_ids, seqlen=24).quantize_and_save(
        tmp_path / "out", "gguf:q4_k_m"
    )
    sink, made = seen[0]
    path = next((tmp_path / "out").glob("*.gguf"))
    sink.path = path
    verify(sink, made)
    whole = path.read_bytes()
    infos = GgufTensors(path).tensors
    q0, q1 = infos["blk.0.attn_q.weight"], infos["blk.1.attn_q.weight"]
    row = q0.nbytes // q0.shape[0]

    def put(data: bytearray, at: int, content: bytes) -> None:
        data[at : at + len(content)] = content

    def of(info: Any) -> bytes:
        return whole[info.start : info.start + info.nbytes]

    def swap(d: bytearray) -> None:
        put(d, q0.start, of(q1))
        put(d, q1.start, of(q0))

    def rows(d: bytearray) -> None:
        put(d, q0.start, of(q0)[row : 2 * row] + of(q0)[:row])

    def byte(at: int, by: int = 1) -> Callable[[bytearray], None]:
        def change(d: bytearray) -> None:
            d[at] = (d[at] + by) % 256

        return change

    def rename(d: bytearray) -> None:
        at = whole.index(b"blk.1.attn_q.weight")
        put(d, at, b"blk.7.attn_q.weight")

    def cut(d: bytearray) -> None:
        del d[-40:]

    norm = infos["output_norm.weight"]
    file_type = whole.index(b"general.file_type") + len(b"general.file_type") + 4
    faults: dict[str, Callable[[bytearray], None]] = {
        "swapped": swap,
        "duplicated": lambda d: put(d, q1.start, of(q0)),
        "zeroed": lambda d: put(d, q1.start, bytes(q1.nbytes)),
        "row shuffled": rows,
        "factor of the neighbour": lambda d: put(d, q0.start, of(q0)[144:146]),
        "minimum off by one": byte(q0.start + 2),
        "scale off by one": byte(q0.start + 4),
        "code off by one": byte(q0.start + 60),
        "norm": byte(norm.start),
        "embedding": byte(infos["token_embd.weight"].start + 3),
        "missing": rename,
        "cut": cut,
        "wrong file type": byte(file_type),
    }
    missed = []
    for what, fault in faults.items():
        data = bytearray(whole)
        fault(data)
        path.write_bytes(bytes(data))
        try:
            verify(sink, made)
        except VerifyError:
            continue
        missed.append(what)
    record("planted, gguf", len(faults), len(faults) - len(missed), 0, len(missed))
    assert not missed
