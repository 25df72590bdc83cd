"""Layers that are unquantized by default, overrides, and models of which too much would be unquantized."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import known_families, sample_ids
from torch import nn

from auto_round.errors import UnsupportedError
from auto_round.modeling.layer_rules import ROUTER

Plan = Callable[..., Any]
SERVED = "serving engines keep it unquantized: "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """A saved tiny model of a family."""
    made: dict[str, str] = {}

    def save(name: str) -> str:
        if name not in made:
            made[name] = str(known_families()[name].save(tmp_path_factory.mktemp(name)))
        return made[name]

    return save


@pytest.fixture
def plan(folder: Callable[[str], str]) -> Plan:
    """`plan(family or model, format, **options)`: the job."""
    from auto_round import AutoRound

    def make(model: Any, fmt: str = "auto_round", **options: Any) -> Any:
        model = folder(model) if isinstance(model, str) else model
        given = {"group_size": 32, "dataset": sample_ids(4), "nsamples": 4, "seqlen": 16, "iters": 0, **options}
        return AutoRound(model, **given).plan(fmt)

    return make


def reasons(job: Any, part: str) -> set[str | None]:
    found = {p.reason for n, p in job.layers.items() if part in n}
    assert found, part
    return found


@pytest.mark.parametrize(
    ("family", "part"),
    [
        ("qwen3_next", "in_proj_ba"), ("qwen3_5_text", "in_proj_a"), ("deepseek_v32", "indexer.weights_proj"),
        ("glm_moe_dsa", "indexer.wk"), ("jamba", "x_proj"),
    ],
)  # fmt: skip
def test_what_engines_keep_dense(family: str, part: str, plan: Plan) -> None:
    for fmt in ("auto_round", "auto_round:auto_gptq", "llm_compressor"):
        job = plan(family, fmt)
        (reason,) = reasons(job, part)
        assert reason is not None and reason.startswith(SERVED), fmt
    (reason,) = reasons(plan(family, "fake"), part)
    assert reason is None, "no engine reads this format"


def test_entries_of_layer_config_override_it(plan: Plan) -> None:
    for pattern in ("in_proj_ba", "model.layers.0.linear_attn.in_proj_ba", r"in_proj_ba$"):
        job = plan("qwen3_next", "fake,auto_round", layer_config={pattern: {"bits": 8, "group_size": 32}})
        assert None in reasons(job, "in_proj_ba") or any("in_proj_ba" in n for n in job.notes)
        assert any("quantized because layer_config asks for it" in note for note in job.notes)
    job = plan("qwen3_next", layer_config={"linear_attn": {"bits": 8}})
    (reason,) = reasons(job, "in_proj_ba")
    assert reason is not None and reason.startswith(SERVED), "a pattern that means other layers too"
    assert not any("layer_config asks" in note for note in job.notes)


def test_routers_in_every_format_and_against_them(plan: Plan) -> None:
    for fmt in ("auto_round", "fake"):
        assert reasons(plan("jetmoe", fmt), ".router.") == {ROUTER}
        assert reasons(plan("zaya", fmt), "router_mlp") == {ROUTER}
    job = plan("zaya", "fake", layer_config={r"mlp\.gate\.": {"bits": 8}})
    assert reasons(job, "router_mlp") == {None}
    assert any(f"against the default: {ROUTER}" in note for note in job.notes)


def test_every_matrix_is_in_the_plan_and_in_the_report(plan: Plan, folder: Any, tmp_path: Path) -> None:
    from auto_round import AutoRound

    job = plan("nemotron_h", ignore_layers="k_proj")
    assert job.skipped and all(job.skipped.values())
    text = job.render()
    assert "other weights in the blocks, unquantized: it chooses experts" in text
    assert "other weights in the blocks, unquantized: a convolution" in text
    assert all(r is not None and "ask for full precision" in r for r in reasons(job, "k_proj"))
    out = tmp_path / "out"
    AutoRound(
        folder("nemotron_h"), group_size=32, iters=0, disable_opt_rtn=True, ignore_layers="k_proj", nsamples=4,
        seqlen=16, dataset=sample_ids(4),
    ).quantize_and_save(out)  # fmt: skip
    report = json.loads((out / "report.json").read_text())
    model = known_families()["nemotron_h"].build()
    records = {record["name"]: record for record in report["layers"]}
    for name, parameter in model.named_parameters():
        if ".layers." in name and parameter.dim() >= 2 and ".experts." not in name:
            record = records[name if name in records else name.removesuffix(".weight")]
            assert record["bits"] is not None or record["reason"], name


class Mystery(nn.Module):
    """A projection that no rule knows, beside layers that are known."""

    def __init__(self, inner: nn.Module, rows: int) -> None:
        super().__init__()
        self.inner = inner
        self.table = nn.Parameter(torch.randn(rows, 64) * 0.01)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + (x @ self.table.T)[..., :1] * 0


@pytest.mark.parametrize(("rows", "share"), [(1, None), (150, "warning"), (3000, "error")])
def test_weights_without_a_rule(rows: int, share: str | None, plan: Plan) -> None:
    model = known_families()["llama"].build()
    for layer in model.model.layers:
        layer.mlp = Mystery(layer.mlp, rows)
    if share == "error":
        with pytest.raises(
            UnsupportedError, match=r"of the weights .* would be left unquantized .*layers\.\*\.mlp\.table"
        ):
            plan(model)
        return
    notes = [note for note in plan(model).notes if "no rule recognises them" in note]
    assert len(notes) == (share == "warning") and all("layers.*.mlp.table" in note for note in notes)
