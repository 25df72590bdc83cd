"""Files of a model that were damaged, or made to do harm."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from auto_round.errors import ConfigError, ModelError
from auto_round.modeling.build import load_config, read_config
from auto_round.modeling.checkpoint import CheckpointSource
from auto_round.modeling.files.folder import parse_object
from auto_round.modeling.files.safetensors import PickleFiles, TensorFiles
from auto_round.modeling.source import open_source


def header_file(folder: Path, header: dict[str, Any] | str, data: int) -> Path:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))
    return folder


def entry(first: int, last: int, **changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [(last - first) // 4], "data_offsets": [first, last]} | changes


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "'b' overlaps"),
        ({"a": entry(0, 8), "b": entry(0, 8)}, 8, "'b' overlaps"),
        ({"a": entry(0, 8), "b": entry(12, 20)}, 20, "'b' leaves a gap"),
        ({"a": entry(4, 12)}, 12, "'a' leaves a gap"),
        ({"a": entry(0, 8)}, 12, "4 bytes after its last tensor"),
        ({"a": entry(8, 0)}, 8, "'a'.*does not fit"),
        ({"a": entry(0, 8, shape=["2"])}, 8, "'a' is malformed"),
        ({"a": entry(0, 8, shape=[2.0])}, 8, "'a' is malformed"),
        ({"a": entry(0, 8, shape=[True, 2])}, 8, "'a' is malformed"),
        ({"a": entry(0, 8, shape="2")}, 8, "'a' is malformed"),
        ({"a": entry(0, 8, data_offsets=[0, 4, 8])}, 8, "'a' is malformed"),
        ({"a": entry(0, 8, dtype=["F32"])}, 8, "'a' has dtype"),
        ({"a": entry(0, 8, shape=[2**62, 2**62])}, 8, "'a'.*does not fit"),
        ('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "a": 3}', 8, "'a' twice"),
        ("[" * 100_000, 0, "nested too deeply|not JSON"),
    ],
)
def test_offsets_and_types_of_a_header(header: Any, data: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        TensorFiles.open(header_file(tmp_path, header, data))


def test_tensors_in_another_order_than_their_bytes(tmp_path: Path) -> None:
    """The header may name them in any order; only their bytes must follow each other."""
    header_file(tmp_path, {"b": entry(8, 16), "e": entry(8, 8, shape=[0, 3]), "a": entry(0, 8)}, 16)
    assert TensorFiles.open(tmp_path).read("b").tolist() == [0.0, 0.0]


def shards(folder: Path, weight_map: Any, **files: dict[str, torch.Tensor]) -> Path:
    for name, tensors in files.items():
        save_file(tensors, folder / f"{name}.safetensors")
    text = weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


def test_indexes(tmp_path: Path) -> None:
    one = torch.ones(2)
    both = {"a": "x.safetensors", "b": "y.safetensors"}
    with pytest.raises(ModelError, match="'a' is in both .*x.safetensors and .*y.safetensors"):
        TensorFiles.open(shards(tmp_path, both, x={"a": one}, y={"b": one, "a": one.clone()}))
    files = TensorFiles.open(shards(tmp_path, both, x={"a": one}, y={"b": one, "c": one.clone()}))
    assert files.notes == ("y.safetensors holds 1 tensors that the index does not name, such as c",)
    for text, message in (
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "'a' twice"),
        ('{"weight_map": {"a": 3}}', "no weight_map of file names"),
        ('{"weight_map": {}}', "is empty"),
        ("[]", "not a JSON object"),
        ("", "not JSON"),
    ):
        with pytest.raises(ModelError, match=message):
            TensorFiles.open(shards(tmp_path, text))


def test_links_that_leave_the_folder(tmp_path: Path, tiny_folder: Callable[..., Path]) -> None:
    outside, model = tmp_path / "outside", tmp_path / "model"
    shutil.copytree(tiny_folder("llama"), outside)
    shutil.copytree(outside, model)
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to(outside / "model.safetensors")
    with pytest.raises(ModelError, match="is a link to .*outside, outside of the|is a link to .*outside of the model"):
        open_source(model)
    (model / "model.safetensors").unlink()
    shutil.copy(outside / "model.safetensors", model / "inner.safetensors")
    (model / "model.safetensors").symlink_to("inner.safetensors")
    open_source(model)
    (model / "config.json").unlink()
    (model / "config.json").symlink_to(outside / "config.json")
    for read in (load_config, read_config):
        with pytest.raises(ModelError, match="is a link"):
            read(model)
    (tmp_path / "way").symlink_to(outside)
    open_source(tmp_path / "way")  # the folder itself may be one: the user named it


def test_links_of_the_hubs_cache(tmp_path: Path, tiny_folder: Callable[..., Path]) -> None:
    cache = tmp_path / "models--a--b"
    snapshot, blobs = cache / "snapshots" / "0123", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in tiny_folder("llama").iterdir():
        shutil.copy(file, blobs / f"hash-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/hash-{file.name}")
    assert open_source(snapshot).blocks
    other = tmp_path / "models--c--d" / "blobs"
    other.mkdir(parents=True)
    (blobs / "hash-model.safetensors").rename(other / "x")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(other / "x")
    with pytest.raises(ModelError, match="is a link"):
        open_source(snapshot)


def test_a_linked_secret_is_not_copied_beside_the_weights(
    tmp_path: Path, packable_folder: Callable[..., str], token_ids: Any
) -> None:
    from auto_round import AutoRound

    model = tmp_path / "model"
    shutil.copytree(packable_folder("llama"), model)
    (tmp_path / "secret").write_text("secret")
    (model / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match="LICENSE is a link"):
        AutoRound(str(model), iters=0, group_size=32, dataset=token_ids, seqlen=24).quantize_and_save(tmp_path / "out")
    assert not (tmp_path / "out" / "LICENSE").exists()


def with_config(source: Path, folder: Path, text: str | dict[str, Any]) -> Path:
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(text if isinstance(text, str) else json.dumps(config | text))
    return folder


@pytest.mark.parametrize(
    "text",
    [
        "[]", "3", "null", '"x"', "", "{", "[" * 100_000, '{"model_type": "llama", "model_type": "llama"}',
        {"model_type": 3}, {"model_type": "no such"}, {"hidden_size": "64"}, {"hidden_size": -1},
        {"hidden_size": 10**15}, {"num_hidden_layers": 10**9}, {"vocab_size": 10**18}, {"num_attention_heads": 0},
        {"num_attention_heads": 3}, {"num_hidden_layers": [1]}, {"rope_scaling": 3}, {"architectures": 3},
        {"max_position_embeddings": 10**18}, {"quantization_config": "x"}, {"quantization_config": {}},
        {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": 3}},
        {"text_config": {"hidden_size": 4}}, {"hidden_act": "no such"}, {"dtype": "int3"}, {"head_dim": 0},
    ],
)  # fmt: skip
def test_odd_configurations(text: Any, tmp_path: Path, tiny_folder: Callable[..., Path]) -> None:
    """Each is refused by name, or opens as what it says."""
    from auto_round.errors import AutoRoundError

    folder = with_config(tiny_folder("llama"), tmp_path / "m", text)
    try:
        source = open_source(folder)
    except AutoRoundError as error:
        assert str(error).strip() and "\n" not in str(error).strip()
    else:
        assert isinstance(text, dict) and len(source.blocks) == 3


@pytest.mark.parametrize(
    "values",
    [
        {"_attn_implementation": "kernels-community/flash-attn"},
        {"attn_implementation": "someone/kernel:run"},
        {"_attn_implementation": {"text_config": "someone/kernel"}},
        {"text_config": {"attn_implementation": "someone/kernel"}},
        {"use_kernels": True},
    ],
)
def test_kernels_from_a_hub_are_code(values: dict[str, Any], tmp_path: Path, tiny_folder: Callable[..., Path]) -> None:
    folder = with_config(tiny_folder("llama"), tmp_path / "m", values)
    with pytest.raises(ModelError, match="requests code from a repository by .*, which is not run unless you trust it"):
        open_source(folder)


def test_a_models_own_code_is_not_run(tmp_path: Path, tiny_folder: Callable[..., Path]) -> None:
    code = {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}, "model_type": "evil"}
    folder = with_config(tiny_folder("llama"), tmp_path / "m", code)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ModelError, match="not run unless you trust it"):
        open_source(folder)
    assert not (tmp_path / "ran").exists()


def test_tensors_that_no_module_takes_are_told(tmp_path: Path, tiny_folder: Callable[..., Path]) -> None:
    shutil.copytree(tiny_folder("llama"), tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"model.layers.0.extra.weight": torch.ones(2)}, file, {"format": "pt"})
    source = CheckpointSource(tmp_path / "m")
    assert len(source.notes) == 1 and "does not have: model.layers.0.extra.weight" in source.notes[0]
    assert CheckpointSource(tiny_folder("llama")).notes == ()


class Harm:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('it ran')",)


def as_pickle(source: Path, folder: Path, parts: int = 1) -> Path:
    """A copy of a model with its weights in pickles."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if parts == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return folder
    weight_map = {name: f"pytorch_model-{i % parts}.bin" for i, name in enumerate(tensors)}
    for part in set(weight_map.values()):
        torch.save({name: t for name, t in tensors.items() if weight_map[name] == part}, folder / part)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("parts", [1, 2])
def test_pickles_are_refused_and_read_when_asked(parts: int, tmp_path: Path, tiny_folder: Callable[..., Path]) -> None:
    folder = as_pickle(tiny_folder("llama"), tmp_path / "m", parts)
    with pytest.raises(ModelError, match="pickle.*allow_pickle"):
        open_source(folder)
    source, usual = open_source(folder, allow_pickle=True), open_source(tiny_folder("llama"))
    assert source.tensor_names() == usual.tensor_names()
    for name in usual.tensor_names():
        assert torch.equal(source.read(name), usual.read(name))
    assert isinstance(source, CheckpointSource)
    assert source.files.read_bytes("lm_head.weight", 4, 8).tolist() == (
        usual.files.read_bytes("lm_head.weight", 4, 8).tolist()  # type: ignore[attr-defined]
    )
    block = source.reopen().load(source.blocks[0])
    assert torch.equal(block.mlp.up_proj.weight, usual.read("model.layers.0.mlp.up_proj.weight"))


def test_pickles_that_do_harm_or_are_none(tmp_path: Path, tiny_folder: Callable[..., Path]) -> None:
    folder = as_pickle(tiny_folder("llama"), tmp_path / "m")
    file = folder / "pytorch_model.bin"
    whole = file.read_bytes()
    torch.save({"model.norm.weight": Harm()}, tmp_path / "harm")
    torch.save([1, 2], tmp_path / "list")
    torch.save({"a": {"b": torch.ones(1)}}, tmp_path / "nested")
    for content in (
        (tmp_path / "harm").read_bytes(), (tmp_path / "list").read_bytes(), (tmp_path / "nested").read_bytes(),
        pickle.dumps({"a": Harm()}), b"", b"PK\x03\x04", whole[: len(whole) // 2], b"\x80\x02}q\x00.",
    ):  # fmt: skip
        file.write_bytes(content)
        with pytest.raises(ModelError, match="pytorch_model.bin"):
            open_source(folder, allow_pickle=True)
    torch.save({"model.norm.weight": torch.ones(1).expand(64)}, file)
    with pytest.raises(ModelError, match="'model.norm.weight' overlap in memory"):
        open_source(folder, allow_pickle=True)
    index = {"weight_map": {"a": "../pytorch_model.bin"}}
    file.unlink()
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="only .bin files inside the folder"):
        open_source(folder, allow_pickle=True)


def test_a_pickle_whose_bits_changed(tmp_path: Path, tiny_folder: Callable[..., Path]) -> None:
    """Archives hold a checksum of each record, which PyTorch does not look at, unless they were written without."""
    folder = as_pickle(tiny_folder("llama"), tmp_path / "m")
    file = folder / "pytorch_model.bin"
    whole, weight = (
        bytearray(file.read_bytes()),
        load_file(tiny_folder("llama") / "model.safetensors")["lm_head.weight"],
    )
    whole[whole.index(weight.numpy().tobytes()) + 1] ^= 4
    file.write_bytes(whole)
    with pytest.raises(ModelError, match=r"pytorch_model.bin.*record .*data/\d+ is damaged"):
        open_source(folder, allow_pickle=True)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"lm_head.weight": weight.t()[::2]}, file)
    finally:
        torch.serialization.set_crc32_options(True)
    found = PickleFiles.open_pickles(folder)
    assert torch.equal(found.read("lm_head.weight"), weight.t()[::2])


def test_the_quantization_config_of_a_checkpoint() -> None:
    from auto_round.inference.config import read_config as read_quantization

    good = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True}
    assert read_quantization(good).default.scheme.bits == 4
    for change in (
        {"extra_config": {"a.b": 3}}, {"dynamic": {"+:(": {}}}, {"extra_config": {"(": {"bits": 8}}},
        {"bits": "4"}, {"bits": None}, {"act_bits": "x"}, {"group_size": [1, 2]},
        {"block_name_to_quantize": 7}, {"packing_format": ["x"]}, {"data_type": 3},
    ):  # fmt: skip
        with pytest.raises((ConfigError, NotImplementedError)):
            read_quantization(good | change)
    with pytest.raises(ConfigError):
        read_quantization(3)


def test_json_of_other_encodings() -> None:
    with pytest.raises(ModelError, match="not JSON"):
        parse_object('{"a": 1}'.encode("utf-16"), "it")
    assert parse_object(b'{"a": 1}  ', "it") == {"a": 1}
