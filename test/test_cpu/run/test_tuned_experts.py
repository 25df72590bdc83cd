"""Tuning a mixture whose block does not fit into memory: around the experts first, then each of them alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import older_than
from torch import nn

from auto_round.algorithms.base import BlockTask, LayerTask
from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
from auto_round.algorithms.quantization.sign_round.loop import SignRoundQuantizer
from auto_round.errors import ConfigError, Stopped
from auto_round.modeling.checkpoint import CheckpointSource
from auto_round.modeling.experts import LinearExperts
from auto_round.modeling.partial_loading import expert_of
from auto_round.output.writer import parse_size
from auto_round.run import experts as tuned_experts
from auto_round.run.experts import PerExpertTuner

IDS = [torch.randint(3, 250, (24,), generator=torch.Generator().manual_seed(i)) for i in range(32)]
TUNED: dict[str, Any] = {"iters": 8, "bits": 3, "lr": 0.02, "dataset": IDS, "nsamples": 32, "seqlen": 24}
QUICK = {**TUNED, "iters": 2, "verify": False}
EXPERTS, WIDTH, INNER = 12, 64, 96
Make = Callable[..., Any]


@pytest.fixture(autouse=True)
def steady(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("auto_round.run.memory.rss_bytes", lambda: 100_000_000)
    monkeypatch.setenv("AR_WORK_SPACE", str(tmp_path / "space"))


@pytest.fixture
def folder(packable_folder: Callable[..., str]) -> str:
    return packable_folder("qwen3-moe", num_experts=EXPERTS, moe_intermediate_size=INNER)


@pytest.fixture
def alone(make: Make) -> Callable[..., Any]:
    """`alone(folder, **kwargs)`: with a limit that the experts of a block together do not keep."""

    def build(folder: str, short: int = 0, **kwargs: Any) -> Any:
        given = {**TUNED, **kwargs}
        fmt = given.pop("format", None)
        limit = make(folder, **given).plan(fmt).peak_ram  # then with activations in a file, then the next way
        for _ in range(2 + short):
            made = make(folder, **given, max_memory=limit - 1)
            limit = made.plan(fmt).peak_ram
        return made

    return build


def left_in(space: Path) -> list[str]:
    """All but compiled kernels, which later processes use again."""
    return sorted(path.name for path in space.glob("*") if path.name != "kernels")


def experts_held(source: Any) -> int:
    return sum(p.nbytes for n, p in source.model.named_parameters() if expert_of(n) and not p.is_meta)


def divergence(folder: Any, reference: torch.Tensor, logits: Any) -> float:
    """Mean KL divergence of the saved model from `reference` logits, in nats."""
    one, other = reference.log_softmax(-1), logits(folder).log_softmax(-1)
    return float((one.exp() * (one - other)).sum(-1).mean())


def test_limits_change_no_byte_and_the_result_beats_rounding(
    folder: str, make: Make, alone: Make, weights_hash: Any, logits: Any, read_json: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    in_ram, in_file = alone(folder), alone(folder, short=1)
    plans = in_ram.plan(), in_file.plan()
    assert [p.memory_plan.streams_experts for p in plans] == [True, True]
    assert [p.memory_plan.streams for p in plans] == ["ram", "file"]
    shown = plans[1].render()
    assert "tuned one at a time" in shown and "of codes of one block's experts" in shown
    # Two streams, what the experts are fed, and at most 4 * 2 / 12 of that for what one of them should give.
    assert plans[1].memory_plan.spilled == (3 * 32 * 24 + 512) * WIDTH * 4
    most: list[int] = []
    load, quantize = CheckpointSource.load, SignRoundQuantizer.quantize_block

    def watched(self: CheckpointSource, name: str, device: Any = None) -> Any:
        module = load(self, name, device)
        most.append(experts_held(self))
        return module

    def counted(self: SignRoundQuantizer, task: BlockTask) -> Any:
        assert len({expert_of(layer.name) for layer in task.layers}) == 1  # of one expert, or of none
        return quantize(self, task)

    monkeypatch.setattr(CheckpointSource, "load", watched)
    monkeypatch.setattr(SignRoundQuantizer, "quantize_block", counted)
    in_ram.quantize_and_save(tmp_path / "ram")
    threads = torch.get_num_threads()
    try:
        if not older_than("torch", "2.13"):  # products of 2.6 differ with the number of threads
            torch.set_num_threads(2 if threads == 1 else 1)
        in_file.quantize_and_save(tmp_path / "file")
    finally:
        torch.set_num_threads(threads)
    assert 0 < max(most) <= 3 * WIDTH * INNER * 4
    assert weights_hash(tmp_path / "ram") == weights_hash(tmp_path / "file")
    assert left_in(tmp_path / "space") == []
    monkeypatch.undo()
    make(folder, **TUNED | {"iters": 0}).quantize_and_save(tmp_path / "rounded")
    reports = [read_json(tmp_path / name, "report.json") for name in ("ram", "file")]
    assert all(report["verify"]["passed"] for report in reports)
    assert all(block["loss_after"] < 0.95 * block["loss_before"] for block in reports[0]["blocks"])
    reference = logits(folder)
    assert divergence(tmp_path / "ram", reference, logits) < divergence(tmp_path / "rounded", reference, logits)


class MLP(nn.Module):
    def __init__(self, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> None:
        super().__init__()
        for name, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
            self.add_module(name, nn.Linear(*reversed(weight.shape), bias=False))
            self.get_submodule(name).weight = nn.Parameter(weight.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def fed_to_experts(folder: str, layers: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Any]:
    """What Transformers feeds the experts of the first block whose other layers are the quantized ones: hidden states
    [tokens, H], the chosen experts and their weights [tokens, K]; and the experts."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, layer in layers.items():
        if name.startswith("model.layers.0.") and expert_of(name) is None:
            model.get_submodule(name).weight.data = layer.dequantize()
    experts = model.model.layers[0].mlp.experts
    seen: list[tuple[torch.Tensor, ...]] = []
    handle = experts.register_forward_pre_hook(lambda _module, args: seen.append(args))
    with torch.no_grad():
        for at in range(0, len(IDS), 4):
            model(torch.stack(IDS[at : at + 4]))
    handle.remove()
    hidden, index, weights = (torch.cat(parts) for parts in zip(*seen, strict=True))
    return hidden, index, weights, experts


def test_each_expert_is_what_tuning_its_own_mlp_gives(folder: str, alone: Make) -> None:
    tuner = alone(folder, disable_opt_rtn=True)
    tuner.quantize()
    layers = tuner._result[1]
    hidden, index, weights, experts = fed_to_experts(folder, layers)
    config = SignRoundConfig(iters=8, lr=0.02, batch_size=4)
    tuned = 0
    for number in range(EXPERTS):
        rows, slots = (index == number).nonzero(as_tuple=True)
        gate, up = experts.gate_up_proj[number].detach().chunk(2)
        mlp = MLP(gate, up, experts.down_proj[number].detach())
        prefix = f"model.layers.0.mlp.experts.{number}."
        tasks = [
            LayerTask(f"{prefix}{leaf}", module, module.weight.detach(), layers[f"{prefix}{leaf}"].scheme)
            for leaf, module in mlp.named_children()
        ]
        if len(rows) < 32:
            continue
        tuned += 1
        each = -(-len(rows) // 32)
        pieces = -(-len(rows) // each)
        shares, x = torch.zeros(pieces * each, 1), torch.zeros(pieces * each, WIDTH)
        shares[: len(rows), 0], x[: len(rows)] = weights[rows, slots], hidden[rows]
        present = (torch.arange(pieces * each) < len(rows)).view(pieces, each)
        x, shares = x.view(pieces, each, WIDTH), shares.view(pieces, each, 1)
        with torch.no_grad():
            targets = mlp(x) * shares
        task = BlockTask(
            prefix, mlp, tasks, lambda part, which, mlp=mlp, shares=shares: mlp(part) * shares[list(which)],
            torch.float32, 42 + 1_000_003 * (number + 1), x, targets, None if bool(present.all()) else present,
        )  # fmt: skip
        for layer in SignRoundQuantizer(config, optimized_start=False).quantize_block(task).layers:
            assert torch.equal(layer.codes.codes, layers[layer.name].codes.codes), layer.name
            assert torch.equal(layer.codes.scale, layers[layer.name].codes.scale), layer.name
    assert tuned > EXPERTS // 2


def test_a_full_device_means_smaller_passes_and_the_same_codes(
    packable_folder: Callable[..., str], alone: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out at the first pass of every expert, and then again: what it should give stays the same."""
    folder = packable_folder("qwen3-moe", num_experts=4, moe_intermediate_size=INNER, num_hidden_layers=1)
    plain, tight = (alone(folder, iters=3, verify=False) for _ in range(2))
    plain.quantize()
    real = LinearExperts.run_expert
    tried: list[int] = []

    def full(self: LinearExperts, index: int, hidden: torch.Tensor) -> torch.Tensor:
        if len(tried) < 2:
            tried.append(hidden.shape[0])
            raise torch.OutOfMemoryError
        return real(self, index, hidden)

    tune = PerExpertTuner._tune

    def under_pressure(self: Any, *args: Any) -> Any:
        tried.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LinearExperts, "run_expert", full)
            return tune(self, *args)

    monkeypatch.setattr(PerExpertTuner, "_tune", under_pressure)
    tight.quantize()
    assert len(tried) == 2 and tried[1] < tried[0]
    one, other = plain._result[1], tight._result[1]
    assert all(torch.equal(one[name].codes.codes, other[name].codes.codes) for name in one)


def test_few_tokens_leave_an_expert_at_its_start(folder: str, make: Make, alone: Make) -> None:
    """Of two short samples no expert gets 32 tokens: all are what rounding gives."""
    few = {"dataset": [ids[:6] for ids in IDS[:2]], "nsamples": 2, "seqlen": 6, "disable_opt_rtn": True}
    tuned, rounded = alone(folder, **few), make(folder, **TUNED | few | {"iters": 0})
    for tuner in (tuned, rounded):
        tuner.quantize()
    one, other = tuned._result[1], rounded._result[1]
    experts = [name for name in one if expert_of(name)]
    assert len(experts) == 2 * EXPERTS * 3
    assert all(torch.equal(one[name].codes.codes, other[name].codes.codes) for name in experts)
    assert any(not torch.equal(one[name].codes.codes, other[name].codes.codes) for name in one)


@pytest.mark.parametrize(
    ("family", "kwargs"),
    [
        ("gpt-oss", {"sym": False}),
        ("qwen2-moe", {"enable_quanted_input": False, "batch_size": 3}),
        ("qwen3-moe", {"scheme": "NVFP4", "group_size": 16, "format": "llm_compressor"}),
        ("qwen3-moe", {"scheme": "FP8_STATIC", "group_size": None, "format": "llm_compressor"}),
        ("qwen3-moe", {"bits": 3, "alg_configs": "gptq"}),
        ("gguf", {"scheme": "gguf:q4_k_m", "group_size": None, "format": "gguf:q4_k_m"}),
    ],
    ids=str,
)
def test_kinds(
    family: str, kwargs: dict[str, Any], alone: Make, packable_folder: Any, gguf_folder: Any, read_json: Any,
    tmp_path: Path,
) -> None:  # fmt: skip
    sizes = {"gpt-oss": dict(num_local_experts=8), "gguf": dict(num_experts=6, moe_intermediate_size=256)}
    many = sizes.get(family, dict(num_experts=8))
    model = (
        gguf_folder("qwen3-moe", norm_topk_prob=True, **many) if family == "gguf" else packable_folder(family, **many)
    )
    given = {"iters": 3, "bits": None, "format": "auto_round", **kwargs}
    tuner = alone(model, **given)
    assert tuner.plan(given["format"]).memory_plan.streams_experts
    tuner.quantize_and_save(tmp_path / "out", given["format"])
    report = read_json(tmp_path / "out", "report.json")
    assert report["verify"] and all(b["loss_after"] <= b["loss_before"] for b in report["blocks"])


def test_a_run_stopped_in_an_expert_is_resumed(
    folder: str, make: Make, alone: Make, stop_at: Any, weights_hash: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    alone(folder, **QUICK).quantize_and_save(tmp_path / "whole")
    with pytest.raises(Stopped, match="block 2 of 2; run the same command again to resume"):
        with stop_at(PerExpertTuner, "_quantize", EXPERTS + 5):
            alone(folder, **QUICK).quantize_and_save(tmp_path / "out")
    # What was taken before is taken again, though the block would fit now: less is in memory, or there is no limit.
    limited = alone(folder, **QUICK)
    monkeypatch.setattr("auto_round.run.memory.rss_bytes", lambda: 50_000_000)
    assert not limited.plan().memory_plan.streams_experts
    assert limited.plan(output_dir=str(tmp_path / "out")).memory_plan.streams_experts
    # Another run, though, is not held to it.
    other = make(folder, **QUICK | {"seed": 7})
    assert not other.plan(output_dir=str(tmp_path / "out")).memory_plan.streams_experts
    with pytest.raises(ConfigError, match="seed: 42 then, 7 now"):
        other.quantize_and_save(tmp_path / "out")
    begun: list[str] = []
    real = tuned_experts.PerExpertTuner.quantize_block
    monkeypatch.setattr(
        tuned_experts.PerExpertTuner, "quantize_block", lambda self, task: begun.append(task.name) or real(self, task)
    )
    make(folder, **QUICK).quantize_and_save(tmp_path / "out")
    assert begun == ["model.layers.1"]
    assert weights_hash(tmp_path / "whole") == weights_hash(tmp_path / "out")
    assert left_in(tmp_path / "space") == []


def test_what_was_tuned_with_its_block_stays_so(
    folder: str, make: Make, stop_at: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start that finds a little more in memory resumes; one that finds much more is refused, with the reason."""
    needed = make(folder, **QUICK).plan().peak_ram
    given = {**QUICK, "max_memory": needed}
    out = tmp_path / "out"
    with pytest.raises(Stopped), stop_at(SignRoundQuantizer, "quantize_block", 2):
        make(folder, **given).quantize_and_save(out)
    monkeypatch.setattr("auto_round.run.memory.rss_bytes", lambda: 101_000_000)
    assert make(folder, **given).plan().memory_plan.streams_experts
    assert not make(folder, **given).plan(output_dir=str(out)).memory_plan.streams_experts
    with pytest.raises(ConfigError, match="experts: .*tuned with their block.* then, .*tuned one at a time.* now"):
        make(folder, **{**QUICK, "max_memory": needed - 4_000_000}).quantize_and_save(out)
    make(folder, **given).quantize_and_save(out)


def test_what_cannot_be_tuned_so_is_refused(
    folder: str, make: Make, alone: Make, packable_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = alone(folder).plan().peak_ram
    with pytest.raises(ConfigError, match="cannot be tuned one at a time: on_nan=rtn needs them together"):
        make(folder, **TUNED, on_nan="rtn", max_memory=limit).quantize_and_save(tmp_path / "out")
    with pytest.raises(ConfigError, match="experts are tuned one at a time already") as refused:
        make(folder, **TUNED, max_memory=120_000_000).quantize_and_save(tmp_path / "out")
    needed = re.search(r"and ([\d.]+GB) is needed", str(refused.value))
    assert needed is not None and make(folder, **TUNED, max_memory=needed[1]).plan().peak_ram <= parse_size(needed[1])
    assert not (tmp_path / "out").exists() and not (tmp_path / "space").exists()
    with pytest.raises(ConfigError, match="one at a time: the model is in memory already"):
        make(packable_model("qwen3-moe"), **TUNED, max_memory=120_000_000).plan()
    monkeypatch.setattr("auto_round.run.memory_policy.routed_experts", lambda _block: {})
    with pytest.raises(ConfigError, match=r"runs the experts of model\.layers\.0 in an unsupported way"):
        make(folder, **TUNED, max_memory=limit).plan()
