"""Every reader on cut and flipped files: a typed error, or what the file held before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import Outcome, around_tensors, flips, judge, report, safetensors_head, truncations
from safetensors.torch import save_file

from auto_round import AutoRound
from auto_round.calibration.imatrix import read_imatrix, write_imatrix
from auto_round.cli.verify import check
from auto_round.errors import AutoRoundError, VerifyError
from auto_round.gguf.metadata import key_value
from auto_round.gguf.reader import GgufTensors
from auto_round.gguf.reader import read_header as read_gguf_header
from auto_round.inference.config import read_config
from auto_round.inference.convert_model import convert_hf_model
from auto_round.inference.linear import PackedLinear
from auto_round.layer_config import parse_layer_config
from auto_round.modeling.build import read_config as read_raw_config
from auto_round.modeling.checkpoint import CheckpointSource
from auto_round.modeling.files.folder import read_object
from auto_round.modeling.files.safetensors import PickleFiles, TensorFiles
from auto_round.output.gguf_writer import GgufFile
from auto_round.output.verify import dense_digest, layer_digest
from auto_round.run.model_free.inputs import Inputs

Record = Callable[..., None]
pytestmark = pytest.mark.timeout(5400)


@pytest.fixture
def counts(full: bool) -> tuple[int, int]:
    """Truncations and flips a reader gets."""
    return (64, 1000) if full else (10, 60)


def both(
    file: Path, head: Callable[[bytes], int], read: Callable[[], Any], counts: tuple[int, int],
    confirm: Callable[[Any], None] | None = None,
) -> dict[str, list[Outcome]]:  # fmt: skip
    data, right = file.read_bytes(), read()
    cut = judge(truncations(data, head(data), counts[0]), file, read, right, confirm)
    flipped = judge(flips(data, range(head(data)), counts[1]), file, read, right, confirm)
    file.write_bytes(data)
    assert read() == right
    return {"cut": [cut], "bit turned over": [flipped]}


def contents(files: TensorFiles) -> dict[str, str]:
    return {name: f"{files.tensors[name].dtype}{dense_digest(files.read(name))}" for name in files}


@pytest.fixture
def model(packable_folder: Callable[..., str], tmp_path: Path) -> Path:
    shutil.copytree(packable_folder("llama"), tmp_path / "model")
    return tmp_path / "model"


def opens_as_before(folder: Path, **options: Any) -> Callable[[Any], None]:
    """Opening the model must refuse it, or say what it does not know, or give the same tensors."""
    right = _state(CheckpointSource(folder, **options))

    def confirm(_: Any) -> None:
        source = CheckpointSource(folder, **options)
        if source.notes:
            raise VerifyError("; ".join(source.notes))  # the run says so
        if _state(source) == right:
            raise VerifyError("the same model")

    return confirm


def _state(source: CheckpointSource) -> dict[str, str]:
    return {name: dense_digest(source.read(name)) for name in source.tensor_names()}


def test_safetensors(model: Path, record: Record, counts: tuple[int, int]) -> None:
    file = model / "model.safetensors"
    parts = both(file, safetensors_head, lambda: contents(TensorFiles.open(model)), counts, opens_as_before(model))
    report(record, "safetensors", parts)


def test_shards(model: Path, record: Record, counts: tuple[int, int]) -> None:
    """As model-free mode opens them."""
    files = TensorFiles.open(model)
    names = list(files)
    parts = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    tensors = {name: files.read(name) for name in names}
    for part, inside in parts.items():
        save_file({name: tensors[name] for name in inside}, model / part, {"format": "pt"})
    weight_map = {name: part for part, inside in parts.items() for name in inside}
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=1))
    (model / "model.safetensors").unlink()

    def read() -> Any:
        inputs = Inputs(model, TensorFiles.open(model))
        if inputs.files.notes:
            raise VerifyError("; ".join(inputs.files.notes))  # shown to the user
        return contents(inputs.files)

    confirm = opens_as_before(model)
    report(record, "shards", both(next(iter(sorted(model.glob("*1-of*")))), safetensors_head, read, counts, confirm))
    report(record, "index", both(index, len, read, counts, confirm))


def gguf_tensors(path: Path) -> dict[str, str]:
    file = GgufTensors(path)
    return {name: f"{info.kind}{info.shape}{dense_digest(file.stored(name))}" for name, info in file.tensors.items()}


def test_gguf(tmp_path: Path, record: Record, counts: tuple[int, int]) -> None:
    path = tmp_path / "m.gguf"
    generator = torch.Generator().manual_seed(0)
    shapes = {"token_embd.weight": (8, 32), "blk.0.attn_q.weight": (4, 256), "output_norm.weight": (5,)}
    infos = [(name, shape, "Q4_K" if shape[-1] == 256 else "F32") for name, shape in shapes.items()]
    keys = [key_value("llama.block_count", 1, "uint32"), key_value("tokenizer.ggml.tokens", ["a", "b"], "string")]
    with GgufFile(path, "llama", keys, infos) as file:
        for name, shape, kind in infos:
            if kind == "F32":
                file.write(name, torch.randn(shape, generator=generator))
            else:
                file.write(name, torch.randint(0, 255, (4, 144), generator=generator).to(torch.uint8))

    def read() -> Any:
        file = GgufTensors(path)
        stored = {name: (info.shape, info.kind) for name, info in file.tensors.items()}
        if stored != {name: (shape, kind) for name, shape, kind in infos}:  # as the check after saving does
            raise VerifyError("not as planned")
        return gguf_tensors(path)

    parts = both(path, lambda data: read_gguf_header(path).tensors["token_embd.weight"].start, read, counts)
    report(record, "GGUF", parts)


def test_imatrix(tmp_path: Path, record: Record, counts: tuple[int, int]) -> None:
    path = tmp_path / "imatrix.gguf"
    sums = {f"blk.{i}.attn_q.weight": torch.rand(32) + 0.1 for i in range(3)}
    write_imatrix(path, sums, dict.fromkeys(sums, 24), 24)

    def read() -> Any:
        found = read_imatrix(path)
        if set(found.importance) != set(sums):  # said when a run uses it: layers it has nothing of
            raise VerifyError("another name")
        return {name: dense_digest(value) for name, value in found.importance.items()}

    start = min(info.start for info in read_gguf_header(path).tensors.values())
    report(record, "importance file", both(path, lambda data: start, read, counts))


def test_imatrix_of_old(tmp_path: Path, record: Record, counts: tuple[int, int]) -> None:
    """This form has no marks of its own: turned bits of a name or a value cannot be told, a bare error may not be."""
    import struct

    path = tmp_path / "imatrix.dat"
    data = struct.pack("<i", 2)
    for name in (b"blk.0.attn_q.weight", b"blk.1.attn_q.weight"):
        data += struct.pack("<i", len(name)) + name + struct.pack("<2i8f", 3, 8, *range(1, 9))
    path.write_bytes(data + struct.pack("<2i", 4, 3) + b"txt")

    def accepted(found: Any) -> None:
        raise VerifyError("of another model, or other weights: not to be told from this form")

    def read() -> Any:
        return {name: dense_digest(value) for name, value in read_imatrix(path).importance.items()}

    report(record, "old importance file", both(path, len, read, counts, accepted))


def test_model_configuration(model: Path, record: Record, counts: tuple[int, int]) -> None:
    file = model / "config.json"
    confirm = opens_as_before(model)

    def usable(found: Any) -> None:
        """A flip that leaves a valid value (a norm's epsilon) is another model, which no reader can tell."""
        try:
            confirm(found)
        except AutoRoundError:
            raise
        raise VerifyError("a valid configuration of the same shapes")

    parts = both(file, len, lambda: read_raw_config(model), counts, usable)
    report(record, "config.json", parts)


def test_quantization_config(
    packable_folder: Callable[..., str], token_ids: Any, tmp_path: Path, record: Record, counts: tuple[int, int]
) -> None:
    """A configuration that reads differently must not give other weights."""
    out = tmp_path / "out"
    ar = AutoRound(packable_folder("llama"), iters=0, disable_opt_rtn=True, bits=8, group_size=32, dataset=token_ids)
    ar.quantize_and_save(out)
    file = out / "quantization_config.json"
    file.write_text(json.dumps(read_object(file)))
    whole = read_object(out / "config.json")

    def layers() -> dict[str, str]:
        source = CheckpointSource(out, prepare=lambda meta: convert_hf_model(meta, "cpu") and None)
        found = {}
        for block in source.blocks:
            for name, module in source.load(block).named_modules():
                if isinstance(module, PackedLinear):
                    found[f"{block}.{name}"] = layer_digest(module.layer(name), True, torch.float32)
            source.release(block)
        return found

    right = layers()

    def confirm(_: Any) -> None:
        (out / "config.json").write_text(json.dumps(whole | {"quantization_config": json.loads(file.read_bytes())}))
        if layers() == right:
            raise VerifyError("the same weights")
        size = json.loads(file.read_bytes())["group_size"]
        if size != 32 and -(-64 // size) == 2 and -(-96 // size) == 3 and check(out):
            # Such groups fill rows of 64 and 96 as groups of 32 do: the digest in report.json tells them apart.
            raise VerifyError("auto-round verify names config.json")

    report(
        record, "quantization_config", both(file, len, lambda: vars(read_config(read_object(file))), counts, confirm)
    )


def test_layer_configuration(tmp_path: Path, record: Record, counts: tuple[int, int]) -> None:
    """What a user wrote: another valid text means something else, and only an error without words is a fault."""
    file = tmp_path / "layers.json"
    file.write_text(
        '{"k_proj": {"bits": 8, "group_size": 32}, "lm_head": "W4A16", "q.*proj": {"sym": false}, '
        '"model.layers.1.mlp.down_proj": {"bits": 2, "group_size": 64, "data_type": "int"}}'
    )

    def accepted(found: Any) -> None:
        if not isinstance(found, dict):
            raise TypeError(found)
        raise VerifyError("another configuration")

    report(record, "layer_config", both(file, len, lambda: parse_layer_config(str(file)), counts, accepted))


@pytest.mark.parametrize("form", ["pickle", "old pickle"])
def test_pickles(form: str, model: Path, record: Record, counts: tuple[int, int]) -> None:
    """Archives have a checksum for each record; the form before PyTorch 1.6 has none."""
    files = TensorFiles.open(model)
    tensors = {name: files.read(name) for name in files}
    file = model / "pytorch_model.bin"
    torch.save(tensors, file, _use_new_zipfile_serialization=form == "pickle")
    (model / "model.safetensors").unlink()

    def read() -> Any:
        return contents(PickleFiles.open_pickles(model))

    data, right, places = file.read_bytes(), read(), around_tensors(file)
    confirm = opens_as_before(model, allow_pickle=True)
    cut = judge(truncations(data, 4000, counts[0]), file, read, right, confirm)
    flipped = judge(flips(data, places, counts[1]), file, read, right, confirm)
    report(record, form, {"cut": [cut], "bit turned over": [flipped]})
