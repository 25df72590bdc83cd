"""No block is kept worse than its rounding start, whatever the steps do: judged from outside, on held-out samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from auto_round.algorithms.base import BlockTask, LayerTask
from auto_round.algorithms.gptq import GPTQConfig, gptq_layer
from auto_round.algorithms.quantization.rtn.quantizer import quantize_layer
from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
from auto_round.algorithms.quantization.sign_round.loop import SignRoundQuantizer, split_samples
from auto_round.modeling.blocks import set_weight_2d
from auto_round.schemes import QuantizationScheme, preset_name_to_scheme

# Rates at which tuning destroys what it tunes, and losses that jump: few samples, a steep activation.
WILD: list[dict[str, Any]] = [
    {"lr": 9.9, "minmax_lr": 9.9, "iters": 9},
    {"lr": 1.0, "iters": 16},
    {"lr": 3.0, "minmax_lr": 0.5, "iters": 1},
    {"lr": 5.0, "iters": 12, "enable_adam": True},
    {"lr": 5.0, "minmax_lr": 5.0, "iters": 12, "momentum": 0.95},
]
BANKS: dict[str, tuple[QuantizationScheme, str | None]] = {
    "int2": (QuantizationScheme(2, 32, True, "int"), None),
    "int4 asymmetric": (QuantizationScheme(4, 32, False, "int"), None),
    "MXFP4": (preset_name_to_scheme("MXFP4"), None),
    "NVFP4": (QuantizationScheme(4, 16, True, "nv_fp"), None),
    "Q2_K": (QuantizationScheme(2, 16, False, "int_asym_dq"), "Q2_K"),
    "Q4_0": (QuantizationScheme(4, 32, True, "int"), "Q4_0"),
    "by its function": (QuantizationScheme(4, (8, 8), True, "int"), None),
}


class Steep(torch.nn.Module):
    """Two layers with a steep curve between them: a small change of the first may change everything."""

    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Linear(256, 32, bias=False)
        self.two = torch.nn.Linear(32, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(torch.tanh(40 * self.one(x)) * 8)


def block_task(scheme: QuantizationScheme, ggml: str | None, seed: int) -> tuple[Steep, BlockTask]:
    torch.manual_seed(seed)
    block = Steep()
    kinds = {"one": ggml, "two": None if ggml in (None, "Q2_K") else ggml}
    second = QuantizationScheme(4, 32, True, "int") if ggml == "Q2_K" else scheme
    layers = [
        LayerTask("one", block.one, block.one.weight.detach().clone(), scheme, torch.ones(256), ggml=kinds["one"]),
        LayerTask("two", block.two, block.two.weight.detach().clone(), second, torch.ones(32), ggml=kinds["two"]),
    ]
    inputs = torch.randn(20, 6, 256)
    inputs[::7] *= 30  # some samples weigh more than all others together
    with torch.no_grad():
        targets = block(inputs)
    run = lambda hidden, samples: block(hidden)  # noqa: E731
    task = BlockTask("block", block, layers, run, torch.float32, seed, inputs=inputs, targets=targets)
    return block, task


@torch.no_grad()
def loss_of(block: Steep, task: BlockTask, layers: list[Any]) -> float:
    """Of these layers in the block, on the samples that judge, computed here."""
    assert task.inputs is not None and task.targets is not None
    _, held_out = split_samples(task.inputs.shape[0], task.seed)
    modules = {"one": block.one, "two": block.two}
    before = {name: module.weight.detach().clone() for name, module in modules.items()}
    for layer in layers:
        set_weight_2d(modules[layer.name], layer.dequantize())
    loss = float((block(task.inputs[held_out]) - task.targets[held_out]).double().square().mean())
    for name, weight in before.items():
        set_weight_2d(modules[name], weight)
    return loss


@pytest.mark.parametrize("wild", WILD, ids=str)
@pytest.mark.parametrize("bank", BANKS)
def test_no_block_is_kept_worse_than_its_start(bank: str, wild: dict[str, Any]) -> None:
    for seed in range(2):
        block, task = block_task(*BANKS[bank], seed)
        optimized = bank != "by its function"
        start = loss_of(block, task, [quantize_layer(layer, optimized, torch.float16) for layer in task.layers])
        result = SignRoundQuantizer(SignRoundConfig(**wild, batch_size=4)).quantize_block(task)
        found = loss_of(block, task, result.layers)
        assert found <= start * (1 + 1e-5), (seed, found, start)
        assert result.loss_after is not None and result.loss_before is not None
        assert result.loss_after <= result.loss_before
        assert result.loss_before == pytest.approx(start, rel=1e-3)
        assert result.loss_after == pytest.approx(found, rel=1e-3)


@pytest.mark.parametrize("bank", [name for name in BANKS if name != "by its function"])
def test_tuning_starts_from_the_better_of_two(bank: str) -> None:
    """Error feedback or the nearest codes, by the held-out samples; the Hessian may be of no help there."""
    for seed in range(4):
        block, task = block_task(*BANKS[bank], seed)
        wide = torch.randn(300, 256, generator=torch.Generator().manual_seed(seed))
        for layer in task.layers:
            x = wide[:, : layer.weight.shape[1]] * (1 + seed % 2 * 8 * torch.rand(layer.weight.shape[1]))
            layer.input_hessians = [x.t() @ x]
        nearest = [quantize_layer(layer, True, torch.float16) for layer in task.layers]
        feedback = [gptq_layer(layer, True, torch.float16) for layer in task.layers]
        losses = [loss_of(block, task, layers) for layers in (nearest, feedback)]
        quantizer = SignRoundQuantizer(SignRoundConfig(iters=1, lr=9.9, batch_size=4), gptq=GPTQConfig())
        result = quantizer.quantize_block(task)
        if BANKS[bank][1] is None:  # ggml types search other steps with feedback
            assert result.loss_before == pytest.approx(min(losses), rel=1e-3)
        found = loss_of(block, task, result.layers)
        assert result.loss_before is not None and found <= result.loss_before * (1 + 1e-5)


def test_the_last_state_is_kept_only_when_asked_for() -> None:
    block, task = block_task(*BANKS["int2"], 0)
    wild = SignRoundConfig(lr=9.9, minmax_lr=9.9, iters=3, batch_size=4, not_use_best_mse=True)
    result = SignRoundQuantizer(wild).quantize_block(task)
    assert result.loss_after is not None and result.loss_before is not None
    assert result.loss_after > result.loss_before
