from __future__ import annotations

import pytest
import torch

from auto_round.algorithms.quantization.sign_round.config import AdamRoundConfig, SignRoundConfig
from auto_round.algorithms.quantization.sign_round.learnable_group import AdamStep, SignStep
from auto_round.algorithms.quantization.sign_round.loop import micro_batch_size, shuffled_batches, split_samples
from auto_round.errors import ConfigError


def test_the_sign() -> None:
    value = torch.tensor([1.0, 1.0, 1.0])
    SignStep().apply(value, torch.tensor([3.0, -1e-9, 0.0]), 0.25)
    assert value.tolist() == [0.75, 1.25, 1.0]


def test_momentum_against_the_formula() -> None:
    rule, value, expected = SignStep(0.9), torch.zeros(5), torch.zeros(5)
    buffer = torch.zeros(5)
    for step in range(6):
        gradient = torch.randn(5, generator=torch.Generator().manual_seed(step))
        buffer = 0.9 * buffer + gradient
        expected -= 0.1 * buffer.sign()
        rule.apply(value, gradient.clone(), 0.1)
    assert torch.allclose(value, expected)


def test_adam_against_torch() -> None:
    value = torch.randn(50, generator=torch.Generator().manual_seed(0))
    theirs = value.clone().requires_grad_()
    optimizer = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.0, eps=1e-30)
    rule = AdamStep()
    for step in range(8):
        gradient = torch.randn(50, generator=torch.Generator().manual_seed(step + 1))
        theirs.grad = gradient.clone()
        optimizer.step()
        rule.apply(value, gradient.clone(), 0.01)
    assert torch.allclose(value, theirs.detach(), atol=2e-4)


def test_adam_does_not_depend_on_the_size_of_the_gradient() -> None:
    small, large = torch.zeros(20), torch.zeros(20)
    for value, factor in ((small, 1e-12), (large, 1e6)):
        rule = AdamStep()
        for step in range(4):
            rule.apply(value, torch.randn(20, generator=torch.Generator().manual_seed(step)) * factor, 0.01)
    assert torch.allclose(small, large, atol=1e-6)


@pytest.mark.parametrize("count", [1, 3, 4, 8, 32, 128, 500])
def test_samples_are_held_out(count: int) -> None:
    tuned, held = split_samples(count, 42)
    assert (tuned, held) == split_samples(count, 42)
    if count < 4:
        assert tuned == held == list(range(count))
    else:
        assert sorted(tuned + held) == list(range(count)) and 1 <= len(held) <= count // 4
        assert count < 8 or split_samples(count, 42) != split_samples(count, 43)


def test_batches_use_every_sample_equally_and_repeat_with_the_seed() -> None:
    first = shuffled_batches(list(range(10)), 4, 3)
    again = shuffled_batches(list(range(10)), 4, 3)
    batches = [next(first) for _ in range(25)]
    assert batches == [next(again) for _ in range(25)]
    assert all(len(set(batch)) == 4 for batch in batches[:2])
    counts = [sum(batch.count(i) for batch in batches) for i in range(10)]
    assert counts == [10] * 10
    assert len(next(shuffled_batches([4, 7], 8, 0))) == 2


@pytest.mark.parametrize(
    "values",
    [{"iters": -1}, {"iters": 1.5}, {"batch_size": 0}, {"lr": 0.0}, {"lr": -1.0}, {"minmax_lr": 99.0},
     {"momentum": 1.0}, {"gradient_accumulate_steps": True}],
)  # fmt: skip
def test_wrong_settings(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        SignRoundConfig(**values)  # type: ignore[arg-type]


def test_rates() -> None:
    assert SignRoundConfig(iters=200).learning_rates(4)[0] == pytest.approx(1 / 200)
    assert SignRoundConfig(iters=50, lr=0.01, minmax_lr=0.002).learning_rates(4) == (0.01, 0.002)
    assert AdamRoundConfig().enable_adam


def test_samples_at_once() -> None:
    cpu = torch.device("cpu")
    assert micro_batch_size(8, 256, 7, cpu) == 3
    assert micro_batch_size(8, 2048, 7, cpu) == 1  # never less than one
    assert micro_batch_size(8, 256, 100, cpu) == 8  # a mixture of experts: the whole batch, and no more
    assert micro_batch_size(8, 2048, 7, torch.device("cuda")) == 8


def test_passes_of_a_step_add_up() -> None:
    """One sample at a time gives the gradient of the whole batch."""
    from auto_round.algorithms.base import BlockTask, LayerTask
    from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
    from auto_round.algorithms.quantization.sign_round.loop import SignRoundQuantizer
    from auto_round.schemes import QuantizationScheme

    torch.manual_seed(0)
    block = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.SiLU(), torch.nn.Linear(48, 32))
    scheme = QuantizationScheme(4, 16)
    found = []
    for micro_batch in (1, 2, 8):
        layers = [
            LayerTask(name, block.get_submodule(name), block.get_submodule(name).weight.detach(), scheme)
            for name in ("0", "2")
        ]
        inputs = torch.randn(8, 5, 32, generator=torch.Generator().manual_seed(1))
        quantizer = SignRoundQuantizer(SignRoundConfig(iters=1), optimized_start=False)
        task = BlockTask(
            "block", block, layers, lambda x, _: block(x), torch.float32, 0, inputs, torch.zeros_like(inputs)
        )
        tunables, replacements = quantizer._tunables(task)
        for layer in layers:
            block[int(layer.name)] = replacements[layer.name]
        quantizer._backward(task, list(range(8)), None, micro_batch)
        found.append([bank.gradient.clone() for bank in tunables])
        for layer in layers:
            block[int(layer.name)] = layer.module
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b)
