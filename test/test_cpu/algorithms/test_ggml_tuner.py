"""Tuning of ggml types: gradients against autograd through the formula written anew, steps, states, final codes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from auto_round.algorithms.base import LayerTask
from auto_round.algorithms.quantization.rtn.quantizer import quantize_layer
from auto_round.algorithms.quantization.sign_round.learnable_group import LearnableGroup, TunableLinear, stack_tasks
from auto_round.codecs.ggml.types import GGML_TYPES, code_limits, ggml_scheme
from auto_round.codecs.quantized_layer import DenseWeight
from auto_round.errors import NumericsError

NAMES = sorted(GGML_TYPES)
COLUMNS = 256


def tasks_of(name: str, rows: list[int]) -> list[LayerTask]:
    generator = torch.Generator().manual_seed(1)
    tasks = []
    for index, out in enumerate(rows):
        weight = torch.randn(out, COLUMNS, generator=generator) * 0.1
        importance = torch.rand(COLUMNS, generator=generator)
        module = torch.nn.Linear(COLUMNS, out)
        tasks.append(
            LayerTask(f"l{index}", module, weight, ggml_scheme(name), importance, bias=torch.randn(out), ggml=name)
        )
    return tasks


def group_of(name: str, rows: list[int], **kw: Any) -> LearnableGroup:
    tasks = tasks_of(name, rows)
    return LearnableGroup(
        tasks,
        [task.start(True, torch.float16) for task in tasks],
        torch.float32,
        **kw,
    )


class Record:
    """A step rule that keeps the gradient and moves nothing."""

    def apply(self, value: torch.Tensor, gradient: torch.Tensor, lr: float) -> None:
        self.gradient = gradient.clone()


class Round(torch.autograd.Function):
    """Rounded and cut off; the gradient is one where nothing is cut."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, low: float, high: float) -> torch.Tensor:
        codes = x.round()
        ctx.save_for_backward((codes >= low) & (codes <= high))
        return codes.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return grads[0] * inside, None, None


@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_autograd(name: str) -> None:
    learnable_group = group_of(name, [9])
    kind = learnable_group.grid.kind
    torch.manual_seed(2)
    learnable_group.rounding_delta = torch.rand_like(learnable_group.rounding_delta) - 0.5
    learnable_group.refresh()
    rules = [Record() for _ in learnable_group.rules]
    learnable_group.rules, learnable_group.fuse_update = rules, False  # type: ignore[assignment]
    x, target = torch.randn(2, 7, COLUMNS), torch.randn(2, 7, 9)
    seen = x.clone().requires_grad_()
    loss = (TunableLinear(learnable_group, 0)(seen) - target).square().sum()
    loss.backward()
    learnable_group.step(0.1, 0.1)

    task, blocks = learnable_group.tasks[0], learnable_group.grid.stored
    rounding_delta = learnable_group.rounding_delta.clone().requires_grad_()
    scale_factors = [torch.ones(9, COLUMNS // kind.block, 1, requires_grad=True) for _ in rules[1:]]
    per = kind.block // kind.group
    spread = lambda t: t.view(9, -1, per)  # noqa: E731
    step = blocks.d.float().unsqueeze(-1) * scale_factors[0]
    step = step * (spread(blocks.scales).float() if blocks.scales is not None else 1)
    minimum = torch.zeros_like(step)
    if blocks.dmin is not None:
        minimum = blocks.dmin.float().unsqueeze(-1) * scale_factors[1] * kind.min_sign
        minimum = minimum * (spread(blocks.mins).float() if blocks.mins is not None else 1)
    step, minimum = step.reshape(9, 1, -1, 1), minimum.reshape(9, 1, -1, 1)
    codes = Round.apply((task.weight.view_as(rounding_delta) - minimum) / step + rounding_delta, *code_limits(kind))
    weight = (codes * step + minimum).view(9, COLUMNS)
    own = x.clone().requires_grad_()
    expected = (torch.nn.functional.linear(own, weight, task.bias) - target).square().sum()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(seen.grad, own.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(rules[0].gradient, rounding_delta.grad, rtol=1e-3, atol=1e-4)
    for rule, factor in zip(rules[1:], scale_factors, strict=True):
        assert factor.grad is not None
        size = float(factor.grad.abs().max())
        torch.testing.assert_close(rule.gradient, factor.grad.squeeze(-1), rtol=1e-3, atol=1e-4 * size)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("adam", [False, True])
def test_what_is_tuned_is_what_is_stored(name: str, adam: bool) -> None:
    learnable_group = group_of(name, [10, 17], adam=adam)
    untuned = [quantize_layer(task, True, torch.float16).dequantize() for task in learnable_group.tasks]
    for index, values in enumerate(untuned):
        assert torch.equal(learnable_group.weight(index), values)
    layers = [TunableLinear(learnable_group, index) for index in range(2)]
    x = torch.randn(40, COLUMNS)
    for _ in range(4):
        loss = sum(
            (layer(x) - torch.nn.functional.linear(x, layer.learnable_group.tasks[i].weight)).square().sum()
            for i, layer in enumerate(layers)
        )
        loss.backward()  # type: ignore[union-attr]
        learnable_group.step(0.2, 0.05)
    for index, layer in enumerate(learnable_group.finish()):
        assert torch.equal(layer.dequantize(), learnable_group.weight(index))
        assert not torch.equal(learnable_group.weight(index), untuned[index])
    learnable_group.restart()
    for index, layer in enumerate(learnable_group.finish()):
        assert torch.equal(layer.dequantize(), untuned[index])


def test_without_scales_only_codes_move() -> None:
    learnable_group = group_of("Q2_K", [12], tune_scale=False)
    start = quantize_layer(learnable_group.tasks[0], True, torch.float16).codes
    TunableLinear(learnable_group, 0)(torch.randn(30, COLUMNS)).square().sum().backward()
    learnable_group.step(0.4, 0.4)
    found = learnable_group.finish()[0].codes
    assert start is not None and found is not None and start.scales is not None and found.scales is not None
    assert torch.equal(start.d, found.d) and torch.equal(start.scales, found.scales)
    assert not torch.equal(start.codes, found.codes)
    assert bool(((start.codes.int() - found.codes.int()).abs() <= 1).all())


def test_a_step_of_zero_stays_zero() -> None:
    tasks = tasks_of("Q4_K", [4])
    tasks[0].weight[1] = 0
    tasks[0].weight[2, :32] = 0
    learnable_group = LearnableGroup(tasks, [task.start(True, torch.float16) for task in tasks], torch.float32)
    for _ in range(3):
        TunableLinear(learnable_group, 0)(torch.randn(30, COLUMNS)).square().sum().backward()
        learnable_group.step(0.4, 0.2)
    assert bool(torch.isfinite(learnable_group.weight(0)).all()) and bool((learnable_group.weight(0)[1] == 0).all())
    assert torch.equal(learnable_group.finish()[0].dequantize(), learnable_group.weight(0))


def test_tuning_lowers_the_error_of_the_outputs() -> None:
    learnable_group = group_of("Q2_K", [32], tune_scale=False)
    torch.manual_seed(4)
    layer = TunableLinear(learnable_group, 0)
    x = torch.randn(512, 16) @ torch.randn(16, COLUMNS) + 0.3 * torch.randn(512, COLUMNS)  # inputs have few directions
    target = torch.nn.functional.linear(x, learnable_group.tasks[0].weight, learnable_group.tasks[0].bias)
    errors = []
    for step in range(40):
        error = (layer(x) - target).square().mean()
        error.backward()
        errors.append(float(error.detach()))
        learnable_group.step(0.03 * (1 - step / 40), 0.0)
    assert errors[-1] < 0.6 * errors[0]


def test_only_layers_of_one_stored_type_share_a_group() -> None:
    mixed = [*tasks_of("Q4_K", [4, 5]), *tasks_of("Q6_K", [4]), *tasks_of("Q4_0", [3])]
    plain = tasks_of("Q4_0", [3])[0]
    plain.ggml = None  # the same scheme for a format of integers
    assert [len(stack) for stack in stack_tasks([*mixed, plain])] == [2, 1, 1, 1]


def test_a_scheme_alone_is_enough() -> None:
    task = tasks_of("Q4_K", [6])[0]
    task.ggml = None
    layer = quantize_layer(task, True, torch.float16)
    assert layer.codes.kind.name == "Q4_K" and layer.in_features == COLUMNS
    task.weight = task.weight[:, :200]  # does not fill a block: through the registered function
    task.importance = None
    assert isinstance(quantize_layer(task, True, torch.float16).codes, DenseWeight)


def test_weights_that_are_not_finite_are_refused() -> None:
    task = tasks_of("Q3_K", [6])[0]
    task.weight[2, 3] = float("nan")
    with pytest.raises(NumericsError, match="l0"):
        quantize_layer(task, True, torch.float16)


@pytest.mark.parametrize("name", NAMES)
def test_tuning_starts_at_the_codes_it_is_given(name: str) -> None:
    """Whatever they are; where they are the nearest ones, all offsets are zero."""
    (task,) = tasks_of(name, [9])
    nearest = task.start(True, torch.float16)
    assert not bool(LearnableGroup([task], [nearest], torch.float32).rounding_delta.any())
    generator = torch.Generator().manual_seed(4)
    least = 1 if name == "Q8_0" else 0  # -128 is not used
    codes = torch.randint(least, nearest.kind.codes, nearest.codes.shape, generator=generator).to(torch.uint8)
    given = replace(nearest, codes=codes)
    learnable_group = LearnableGroup([task], [given], torch.float32)
    assert torch.allclose(learnable_group.quantized.float(), given.dequantize(), atol=1e-6)
    learnable_group.rounding_delta.zero_()
    learnable_group.restart()
    (layer,) = learnable_group.finish()
    moved = nearest.step().repeat_interleave(nearest.kind.group, dim=1) != 0
    assert torch.equal(layer.codes.codes[moved], codes[moved])
