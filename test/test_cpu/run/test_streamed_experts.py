"""Blocks whose experts do not fit into memory together: one at a time, and the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from auto_round.modeling.checkpoint import CheckpointSource
from auto_round.modeling.partial_loading import expert_of

IDS = [torch.randint(3, 250, (24,), generator=torch.Generator().manual_seed(i)) for i in range(8)]


@pytest.fixture(autouse=True)
def steady(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("auto_round.run.memory.rss_bytes", lambda: 100_000_000)
    monkeypatch.setenv("AR_WORK_SPACE", str(tmp_path / "space"))


@pytest.fixture
def many_experts(packable_folder: Callable[..., str]) -> Callable[[str], str]:
    """`many_experts(family)`: a folder whose experts are most of a block."""
    sizes = {
        "mixtral": dict(num_local_experts=24, intermediate_size=160),
        "qwen3-moe": dict(num_experts=24, moe_intermediate_size=160),
        "gpt-oss": dict(num_local_experts=24, intermediate_size=160),
    }
    return lambda family: packable_folder(family, **sizes[family])


def expert_bytes_held(source: Any) -> int:
    return sum(p.nbytes for n, p in source.model.named_parameters() if expert_of(n) and not p.is_meta)


@pytest.mark.parametrize(
    ("family", "kwargs"),
    [
        ("qwen3-moe", {}),
        ("qwen3-moe", {"disable_opt_rtn": True}),
        ("qwen3-moe", {"scheme": "NVFP4", "group_size": 16}),
        ("mixtral", {"sym": False}),
        ("gpt-oss", {}),
        ("qwen3-moe", {"alg_configs": "gptq"}),
    ],
    ids=str,
)
def test_one_expert_at_a_time_changes_no_byte(
    family: str, kwargs: dict[str, Any], many_experts: Callable[[str], str], make: Callable[..., Any],
    weights_hash: Any, read_json: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    given = {"iters": 0, "dataset": IDS, "format": None, **kwargs}
    fmt = given.pop("format") or ("llm_compressor" if kwargs.get("scheme") == "NVFP4" else "auto_round")
    folder = many_experts(family)
    plain = make(folder, **given)
    plain.quantize_and_save(tmp_path / "plain", fmt)
    planned = plain.plan(fmt)
    bounded = make(folder, **given, max_memory=planned.peak_ram - 200_000)
    job = bounded.plan(fmt)
    assert job.memory_plan.streams_experts and job.peak_ram < planned.peak_ram - 200_000
    assert "one at a time" in job.render()
    most: list[int] = []
    load = CheckpointSource.load

    def watched(self: CheckpointSource, name: str, device: Any = None) -> Any:
        module = load(self, name, device)
        most.append(expert_bytes_held(self))
        return module

    monkeypatch.setattr(CheckpointSource, "load", watched)
    bounded.quantize_and_save(tmp_path / "bounded", fmt)
    assert weights_hash(tmp_path / "plain") == weights_hash(tmp_path / "bounded")
    one = 3 * 160 * 64 * 4 + (4 * 160 + 64) * 4  # matrices and, where there are any, biases of one expert
    assert 0 < max(most) <= one
    reports = [read_json(tmp_path / name, "report.json") for name in ("plain", "bounded")]
    assert reports[0]["verify"] == reports[1]["verify"]
