"""Changed settings, and a damaged journal, in front of a run that was stopped: refused by name, or begun anew."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import Outcome, flips, judge, report, truncations
from safetensors.torch import load_file, save_file

from auto_round import AutoRound
from auto_round.errors import ConfigError, OutputError, Stopped
from auto_round.output.gguf_writer import GgufFile
from auto_round.output.writer import ShardWriter
from auto_round.run import blocks as blockwise

CHANGES: dict[str, dict[str, Any]] = {
    "bits": {"bits": 3}, "group_size": {"group_size": 16}, "sym": {"sym": False}, "iters": {"iters": 3},
    "seed": {"seed": 7}, "lr": {"lr": 0.03}, "batch_size": {"batch_size": 2}, "seqlen": {"seqlen": 20},
    "nsamples": {"nsamples": 6}, "amp": {"amp": False}, "model_dtype": {"model_dtype": "bf16"},
    "enable_quanted_input": {"enable_quanted_input": False}, "enable_minmax_tuning": {"enable_minmax_tuning": False},
    "algorithm": {"enable_adam": True},
    "calibration data": {"dataset": [torch.arange(n, n + 24) for n in range(4, 12)]},
    "layers.model.layers.1.mlp.up_proj": {"layer_config": {"1.mlp.up_proj": {"bits": 8}}},
    "quant_lm_head": {"quant_lm_head": True}, "formats": {"formats": "auto_gptq"},
}  # fmt: skip
Quantize = Callable[..., dict[str, bytes]]


@pytest.fixture
def model(packable_folder: Callable[..., str], tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(packable_folder("llama"), tmp_path / "model"))


@pytest.fixture
def quantize(model: Path, token_ids: list[torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Quantize:
    """Quantize into a folder; its files but the report."""
    monkeypatch.setenv("AR_WORK_SPACE", str(tmp_path / "space"))
    fixed = {"group_size": 32, "nsamples": 8, "seqlen": 24, "batch_size": 4, "iters": 2, "bits": 2, "lr": 0.02}

    def run(name: str, formats: str = "auto_round", overwrite: bool = False, **kwargs: Any) -> dict[str, bytes]:
        job = AutoRound(str(model), **{"dataset": token_ids, **fixed, **kwargs})
        job.quantize_and_save(tmp_path / name, formats, overwrite=overwrite)
        files = [path for path in (tmp_path / name).rglob("*") if path.is_file() and path.name != "report.json"]
        return {path.name: path.read_bytes() for path in files}

    return run


@pytest.fixture
def wanted(quantize: Quantize) -> dict[str, bytes]:
    """What a run that nobody stops gives; and one that was stopped in its second block is there to go on with."""
    whole = quantize("whole")
    real = blockwise._quantize_block

    def stopping(index: int, *rest: Any) -> Any:
        if index == 1:
            raise KeyboardInterrupt
        return real(index, *rest)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(blockwise, "_quantize_block", stopping)
        quantize("out")
    return whole


def test_changed_settings(quantize: Quantize, wanted: dict[str, bytes], record: Callable[..., None]) -> None:
    detected, silent = 0, []
    for name, change in CHANGES.items():
        try:
            quantize("out", **change)
        except ConfigError as error:
            detected += name in str(error)
        else:
            silent.append(name)
    record("changed settings", len(CHANGES), detected, 0, len(silent))
    assert detected == len(CHANGES), silent
    assert quantize("out") == wanted


def test_changed_weights(
    quantize: Quantize, wanted: dict[str, bytes], model: Path, full: bool, record: Callable[..., None]
) -> None:
    """One value of one tensor of a finished block, or of the embedding that it was fed from."""
    weights = load_file(model / "model.safetensors")
    names = [name for name in weights if name.startswith("model.layers.0.")]
    choose = random.Random(1)
    chosen = names if full else choose.sample(names, 3)
    detected = 0
    for name in chosen:
        changed = {**weights, name: weights[name].clone()}
        changed[name].view(-1)[choose.randrange(weights[name].numel())] += 0.5
        save_file(changed, model / "model.safetensors", {"format": "pt"})
        with pytest.raises(ConfigError, match="weights of model.layers.0"):
            quantize("out")
        detected += 1
    record("changed weights", len(chosen), detected, 0, len(chosen) - detected)
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    assert quantize("out") == wanted


def test_damaged_journal(
    quantize: Quantize, wanted: dict[str, bytes], full: bool, tmp_path: Path, record: Callable[..., None]
) -> None:
    """A flipped bit, or an end that is missing, anywhere in any of its files."""
    (journal,) = (tmp_path / "space" / "resume").iterdir()
    paths = sorted(journal.iterdir())
    found: dict[str, list[Outcome]] = {"cut": [], "bit turned over": []}
    for path in paths:
        data = path.read_bytes()
        cuts = truncations(data, len(data), 64 if full else 3)
        flipped = flips(data, range(len(data)), -(-1000 // len(paths)) if full else 3)
        for kind, damage in zip(found, (cuts, flipped), strict=True):

            def read(path: Path = path) -> Any:
                with pytest.raises(OutputError, match=f"damaged: .*{path.name}") as caught:
                    quantize("out")
                raise caught.value

            found[kind].append(judge(damage, path, read, None))
        path.write_bytes(data)
    report(record, "journal", found)
    assert quantize("out") == wanted


def test_damaged_output(
    quantize: Quantize, wanted: dict[str, bytes], full: bool, tmp_path: Path, record: Callable[..., None]
) -> None:
    """The same in the unfinished shard: behind its header, which is written last, everything counts."""
    (path,) = (tmp_path / "out" / ".partial").iterdir()
    data = path.read_bytes()
    start = len(data) - len(data[8:].lstrip(b"\0"))
    found: dict[str, list[Outcome]] = {
        "cut": [judge(truncations(data, len(data), 64 if full else 3), path, lambda: quantize("out"), wanted)],
        "bit turned over": [
            judge(flips(data, range(start, len(data)), 200 if full else 3), path, lambda: quantize("out"), wanted)
        ],
    }
    report(record, "unfinished shard", found)
    path.write_bytes(data)
    assert quantize("out") == wanted


@pytest.mark.parametrize("kind", ["shard", "GGUF file"])
def test_damaged_output_as_a_writer_sees_it(kind: str, full: bool, tmp_path: Path, record: Callable[..., None]) -> None:
    """More of that, without a run around it."""
    tensors = {f"blk.{i}.weight": torch.randn(16, 32, generator=torch.Generator().manual_seed(i)) for i in range(8)}
    infos = [(name, (16, 32), "F32") for name in tensors]

    def writer(records: Any = None) -> Any:
        if kind == "GGUF file":
            return GgufFile(tmp_path / "m.gguf", "llama", [], infos, records)
        made = ShardWriter(tmp_path, "5KB")
        if records is not None:
            made.restore(records, {})
        return made

    first = writer()
    for name, tensor in tensors.items():
        first.add(name, tensor) if kind == "shard" else first.write(name, tensor)
    first.close()
    records = first.take_records()
    for file in first.partial:
        data = file.path.read_bytes()
        where = [at for tensor in tensors.values() for at in range(len(data)) if data.startswith(tobytes(tensor), at)]
        where = [at + i for at in where for i in range(16 * 32 * 4)]
        count = len(first.partial)
        for what, damage in (
            ("cut", truncations(data, len(data), 64 // count if full else 3)),
            ("bit turned over", flips(data, where, 1000 // count if full else 3)),
        ):

            def read() -> Any:
                again = writer(records)
                again.close()
                return "unharmed"

            report(record, f"unfinished {kind} as its writer sees it", {what: [judge(damage, file.path, read, None)]})
        file.path.write_bytes(data)


def tobytes(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().tobytes()
