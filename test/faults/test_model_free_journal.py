"""A damaged journal of a model-free run that was stopped: named, or of no matter for the result."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from damage import Outcome, flips, judge, report, truncations

from auto_round import AutoRound
from auto_round.errors import Stopped
from auto_round.output import staging
from auto_round.output.folders import PARTIAL
from auto_round.run.model_free import workers as shard_run

pytestmark = pytest.mark.timeout(3600)
Quantize = Callable[[Path], dict[str, bytes]]


@pytest.fixture
def quantize(packable_folder: Callable[..., str]) -> Quantize:
    """Quantize into a folder; its files but the report."""

    def run(out: Path) -> dict[str, bytes]:
        job = AutoRound(packable_folder("llama"), "W4A16", model_free=True, device_map="cpu", group_size=32)
        job.quantize_and_save(out, max_shard_size=60_000)
        return {path.name: path.read_bytes() for path in out.iterdir() if path.name != "report.json"}

    return run


PLACES = {"half way": (shard_run.ShardFile, "write", 12), "before its files are shown": (staging, "publish_files", 1)}
# One file of each kind; what lies beside weights (configuration, tokenizer) is written again in any case.
KINDS = {
    "half way": ("run.json", "0*.json", "*.partial", "*.safetensors"),
    "before its files are shown": ("run.json", "0*.json", "complete.json", "*.safetensors"),
}


@pytest.mark.parametrize("place", PLACES)
def test_damaged_journal(
    place: str, quantize: Quantize, stop_at: Any, full: bool, tmp_path: Path, record: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    wanted = quantize(tmp_path / "whole")
    monkeypatch.setattr(shard_run, "SYNC_BYTES", 2_000)
    stopped, out = tmp_path / "stopped", tmp_path / "out"
    with pytest.raises(Stopped), stop_at(*PLACES[place]):
        quantize(stopped)
    files = sorted(path.relative_to(stopped) for path in (stopped / PARTIAL).rglob("*") if path.is_file())
    names = [next(name for name in files if name.match(kind)) for kind in KINDS[place]]

    found: dict[str, list[Outcome]] = {"cut": [], "bit turned over": []}
    for name in names:
        data = (stopped / name).read_bytes()
        cuts = truncations(data, len(data), 32 if full else 2)
        flipped = flips(data, range(len(data)), -(-500 // len(names)) if full else 2)
        for kind, damage in zip(found, (cuts, flipped), strict=True):

            def read(name: Path = name) -> Any:
                content = (tmp_path / "damaged").read_bytes()
                shutil.rmtree(out, ignore_errors=True)
                shutil.copytree(stopped, out)
                (out / name).write_bytes(content)
                return quantize(out)

            found[kind].append(judge(damage, tmp_path / "damaged", read, wanted))
    report(record, f"model-free journal, {place}", found)
