from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from auto_round.errors import ModelError
from auto_round.modeling.files.safetensors import DTYPES, TensorFiles


def write(file: Path, header: Any, data: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def sharded(folder: Path, weight_map: Any, **shards: dict[str, torch.Tensor]) -> Path:
    for name, tensors in shards.items():
        save_file(tensors, folder / f"{name}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=str)
def test_every_dtype_is_read_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    raw = torch.arange(3 * 4 * dtype.itemsize, dtype=torch.uint8)
    tensor = raw.view(dtype).view(3, 4) if dtype != torch.bool else torch.eye(3, 4, dtype=torch.bool)
    save_file({"pad": torch.ones(3, dtype=torch.uint8), "x": tensor}, tmp_path / "model.safetensors")
    files = TensorFiles.open(tmp_path)
    assert files.read("x").dtype == dtype and tuple(files.read("x").shape) == (3, 4)
    assert torch.equal(files.read("x").view(torch.uint8), tensor.view(torch.uint8))
    assert torch.equal(files.read("x", row=2).view(torch.uint8), tensor[2].view(torch.uint8))


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    save_file({"s": torch.tensor(3.5), "e": torch.empty(0, 4)}, tmp_path / "model.safetensors")
    files = TensorFiles.open(tmp_path)
    assert files.read("s").item() == 3.5 and files.read("e").shape == (0, 4)


def test_equal_compares_bytes(tmp_path: Path) -> None:
    x = torch.randn(5, 3)
    tensors = {"a": x, "b": x.clone(), "c": x + 1, "d": x.clone().view(3, 5)}
    save_file(tensors, tmp_path / "model.safetensors")
    files = TensorFiles.open(tmp_path)
    assert files.equal("a", "b") and not files.equal("a", "c") and not files.equal("a", "d")


@pytest.mark.parametrize(
    "target",
    ["../out.safetensors", "/x.safetensors", "a/../../x.safetensors", "C:x.safetensors", "m.bin", "..\\x.safetensors"],
)
def test_an_index_cannot_leave_the_folder(target: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"w": torch.ones(1)}, tmp_path / "out.safetensors")
    with pytest.raises(ModelError, match="inside the folder"):
        TensorFiles.open(sharded(folder, {"w": target}))


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"part.safetensors is missing.*tensor 'w'"):
        TensorFiles.open(sharded(tmp_path, {"w": "part.safetensors"}))
    with pytest.raises(ModelError, match=r"tensor 'v' is missing from .*part.safetensors"):
        TensorFiles.open(sharded(tmp_path, {"v": "part.safetensors"}, part={"w": torch.ones(1)}))
    for broken in ([], None, {"w": 3}, "x"):
        with pytest.raises(ModelError):
            TensorFiles.open(sharded(tmp_path, broken))


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"w": ENTRY}, b"1234", "cut short: tensor 'w'"),
        ({"w": ENTRY | {"shape": [3]}}, b"x" * 8, "'w'.*does not fit"),
        ({"w": ENTRY | {"shape": [-2]}}, b"x" * 8, "'w'.*does not fit"),
        ({"w": ENTRY | {"dtype": "F13"}}, b"x" * 8, "'w' has dtype 'F13'"),
        ({"w": ENTRY | {"data_offsets": [-8, 0]}}, b"x" * 8, "'w'.*does not fit"),
        ({"w": {"dtype": "F32"}}, b"", "'w' is malformed"),
        ({"w": 3}, b"", "'w' is malformed"),
        ([1], b"", "not a JSON object"),
        (b"{nope", b"", "not JSON"),
        (b"\xff\xfe", b"", "not JSON"),
    ],
)
def test_damaged_headers_name_file_and_tensor(header: Any, data: bytes, message: str, tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", header, data)
    with pytest.raises(ModelError, match=message) as caught:
        TensorFiles.open(tmp_path)
    assert "model.safetensors" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"123", struct.pack("<Q", 10**15) + b"{}", struct.pack("<Q", 500) + b"{}"])
def test_not_safetensors_at_all(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="not a safetensors file"):
        TensorFiles.open(tmp_path)


def test_a_file_that_shrinks_or_goes_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(100)}, file)
    files = TensorFiles.open(tmp_path)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ModelError, match="ended while tensor 'w'"):
        files.read("w")
    file.unlink()
    with pytest.raises(ModelError, match="cannot read tensor 'w'"):
        files.read("w")


@pytest.mark.parametrize(
    ("name", "message"),
    [("pytorch_model.bin", "pickle.*save_pretrained"), ("x.safetensors", "neither"), ("readme.txt", "no weights")],
)
def test_folders_without_usable_weights(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ModelError, match=message):
        TensorFiles.open(tmp_path)
