"""SignRound on a small block: what it promises, whatever the loss it uses inside."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from auto_round.algorithms.base import BlockResult, BlockTask, LayerTask
from auto_round.algorithms.quantization.rtn.config import RTNConfig
from auto_round.algorithms.quantization.rtn.quantizer import RTNQuantizer
from auto_round.algorithms.quantization.sign_round.config import AdamRoundConfig, SignRoundConfig
from auto_round.algorithms.quantization.sign_round.loop import SignRoundQuantizer
from auto_round.codecs.quantized_layer import DenseWeight
from auto_round.codecs.registry import reshape_pad_tensor_by_group_size, revert_tensor_by_pad, round_ste
from auto_round.data_type import QUANT_FUNC_WITH_DTYPE, register_dtype
from auto_round.errors import NumericsError
from auto_round.schemes import QuantizationScheme


class Block(torch.nn.Module):
    def __init__(self, conv1d: bool = False) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.up: Any = Conv1D(48, 32) if conv1d else torch.nn.Linear(32, 48)
        self.down = torch.nn.Linear(48, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


def make_task(
    scheme: QuantizationScheme, conv1d: bool = False, samples: int = 12, mask: torch.Tensor | None = None
) -> BlockTask:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block = Block(conv1d)
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.2)
        mixing = torch.randn(32, 32) * 0.3  # correlated inputs: rounding errors can be made to cancel
        inputs = torch.randn(samples, 16, 32) @ mixing
    with torch.no_grad():
        targets = block(inputs)
    layers = []
    for name, module in (("up", block.up), ("down", block.down)):
        weight = module.weight.detach()
        bias = None if module.bias is None else module.bias.detach()
        transposed = conv1d and name == "up"
        layers.append(
            LayerTask(f"b.{name}", module, weight.t() if transposed else weight, scheme, None, bias, transposed)
        )

    def run(hidden: torch.Tensor, samples: Sequence[int]) -> torch.Tensor:
        return block(hidden)

    return BlockTask("b", block, layers, run, torch.float32, 5, inputs, targets, mask)


def output_error(task: BlockTask, result: BlockResult) -> float:
    """Mean squared error of the block's output with the decided weights, over all samples."""
    from auto_round.modeling.blocks import set_weight_2d

    assert task.inputs is not None and task.targets is not None
    before = {k: v.clone() for k, v in task.block.state_dict().items()}
    for layer, decided in zip(task.layers, result.layers, strict=True):
        set_weight_2d(layer.module, decided.dequantize())
    with torch.no_grad():
        error = float((task.block(task.inputs) - task.targets).square().mean())
    task.block.load_state_dict(before)
    return error


def tune(task: BlockTask, **config: Any) -> BlockResult:
    return SignRoundQuantizer(SignRoundConfig(**{"iters": 30, "batch_size": 4, **config})).quantize_block(task)


W3 = QuantizationScheme(3, 16)


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize(
    "scheme", [W3, QuantizationScheme(3, 16, False), QuantizationScheme(3, 20), QuantizationScheme(4, 0)]
)
def test_tuning_lowers_the_error_of_the_output(scheme: QuantizationScheme, conv1d: bool) -> None:
    task = make_task(scheme, conv1d)
    rounded = RTNQuantizer(RTNConfig()).quantize_block(task)
    result = tune(task)
    assert result.loss_before is not None and result.loss_after is not None
    assert result.loss_after < result.loss_before
    assert output_error(task, result) < 0.95 * output_error(task, rounded)
    assert result.steps == 30 and [layer.name for layer in result.layers] == ["b.up", "b.down"]


@pytest.mark.parametrize("config", [AdamRoundConfig(iters=30, batch_size=4), SignRoundConfig(iters=30, momentum=0.5)])
def test_other_steps_lower_it_too(config: SignRoundConfig) -> None:
    task = make_task(W3)
    result = SignRoundQuantizer(config).quantize_block(task)
    assert result.loss_after is not None and result.loss_before is not None and result.loss_after < result.loss_before


@pytest.mark.parametrize("sym", [True, False])
def test_steps_that_ruin_it_leave_the_start(sym: bool) -> None:
    task = make_task(QuantizationScheme(4, 16, sym))
    result = tune(task, iters=4, lr=5.0, minmax_lr=5.0)
    start = RTNQuantizer(RTNConfig()).quantize_block(task)
    assert result.loss_after == result.loss_before
    for tuned, plain in zip(result.layers, start.layers, strict=True):
        assert (
            tuned.codes.codes is not None
            and plain.codes.codes is not None
            and torch.equal(tuned.codes.codes, plain.codes.codes)
        )
        assert torch.equal(tuned.codes.scale, plain.codes.scale)


def test_without_the_best_state_the_last_one_is_kept() -> None:
    result = tune(make_task(W3), iters=4, lr=5.0, minmax_lr=5.0, not_use_best_mse=True)
    assert result.loss_after is not None and result.loss_before is not None and result.loss_after > result.loss_before


def test_scales_stay_when_they_are_not_tuned() -> None:
    task = make_task(W3)
    start = RTNQuantizer(RTNConfig()).quantize_block(task)
    for tuned, plain in zip(tune(task, enable_minmax_tuning=False).layers, start.layers, strict=True):
        assert torch.equal(tuned.codes.scale, plain.codes.scale)
        assert not torch.equal(tuned.codes.codes, plain.codes.codes)


def test_masked_positions_change_nothing() -> None:
    mask = torch.ones(12, 16, dtype=torch.bool)
    mask[:, 12:] = False
    mask[3, :5] = False
    one, other = make_task(W3, mask=mask), make_task(W3, mask=mask)
    assert other.targets is not None
    other.targets = torch.where(mask.unsqueeze(-1), other.targets, torch.randn_like(other.targets) * 50)
    without = make_task(W3)
    results = [tune(task) for task in (one, other, without)]
    for first, second, third in zip(*(r.layers for r in results), strict=True):
        assert torch.equal(first.codes.codes, second.codes.codes) and torch.equal(first.codes.scale, second.codes.scale)
        assert not torch.equal(first.codes.codes, third.codes.codes)
    assert results[0].loss_after == results[1].loss_after


def test_passes_of_a_step_equal_one_batch() -> None:
    one = tune(make_task(W3), iters=6, batch_size=8)
    split = tune(make_task(W3), iters=6, batch_size=2, gradient_accumulate_steps=4)
    for first, second in zip(one.layers, split.layers, strict=True):
        assert (first.codes.codes != second.codes.codes).float().mean() < 0.01
    assert one.loss_after == pytest.approx(split.loss_after, rel=0.05)


def test_twice_gives_the_same_and_the_global_random_state_is_left_alone() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = tune(make_task(W3))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = tune(make_task(W3))
    for one, two in zip(first.layers, second.layers, strict=True):
        assert torch.equal(one.codes.codes, two.codes.codes) and torch.equal(one.codes.scale, two.codes.scale)


def test_the_block_is_put_back() -> None:
    task = make_task(W3)
    task.block.down.weight.requires_grad_(False)  # type: ignore[operator, union-attr]
    wanted = {n: p.requires_grad for n, p in task.block.named_parameters()}
    modules, weights = dict(task.block.named_modules()), {k: v.clone() for k, v in task.block.state_dict().items()}
    tune(task, iters=3)
    assert dict(task.block.named_modules()) == modules
    assert {n: p.requires_grad for n, p in task.block.named_parameters()} == wanted
    assert all(torch.equal(v, weights[k]) for k, v in task.block.state_dict().items())
    assert all(p.grad is None for p in task.block.parameters())


def test_a_loss_that_is_no_number_names_the_block_and_the_block_is_put_back() -> None:
    task = make_task(W3)
    modules = dict(task.block.named_modules())
    assert task.targets is not None
    task.targets = task.targets.clone()
    task.targets[:] = float("nan")
    with pytest.raises(NumericsError, match="block b"):
        tune(task)
    assert dict(task.block.named_modules()) == modules


@pytest.fixture
def ternary() -> Iterator[str]:
    @register_dtype("ternary_probe")
    def quantize(tensor: Any, bits: int = 2, group_size: Any = -1, v: Any = 0, min_scale: Any = 1.0,
                 max_scale: Any = 1.0, **kwargs: Any) -> Any:  # fmt: skip
        groups, columns = reshape_pad_tensor_by_group_size(tensor + v, group_size)
        scale = groups.abs().mean(-1, keepdim=True) * 1.5 * max_scale
        qdq = round_ste(groups / scale).clamp(-1, 1) * scale
        return revert_tensor_by_pad(qdq, columns, tensor.shape), scale, None

    yield "ternary_probe"
    del QUANT_FUNC_WITH_DTYPE["ternary_probe"]


@pytest.mark.parametrize("size", [16, 20, -1, 0])
def test_any_registered_data_type_is_tuned(ternary: str, size: int) -> None:
    task = make_task(QuantizationScheme(2, size, data_type=ternary))
    rounded = RTNQuantizer(RTNConfig()).quantize_block(task)
    result = tune(task, iters=40)
    assert result.loss_after is not None and result.loss_before is not None
    assert result.loss_after < result.loss_before
    assert output_error(task, result) < output_error(task, rounded)
    assert all(isinstance(layer.codes, DenseWeight) for layer in result.layers)


def test_a_data_type_that_gives_nan_is_named() -> None:
    register_dtype("nan_probe")(lambda tensor, **kwargs: (tensor * float("nan"), torch.ones(1), None))
    try:
        with pytest.raises(NumericsError, match="layer b.up.*nan_probe"):
            RTNQuantizer(RTNConfig()).quantize_block(make_task(QuantizationScheme(4, 16, data_type="nan_probe")))
    finally:
        del QUANT_FUNC_WITH_DTYPE["nan_probe"]
