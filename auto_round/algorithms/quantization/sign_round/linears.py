"""Linear layers that replace those of a block while it is tuned: fused gradients, or autograd for user types."""

from __future__ import annotations

from typing import Any

import torch

from auto_round.algorithms.base import LayerTask
from auto_round.algorithms.quantization.sign_round.learnable_group import LearnableGroup, State, copy_state, make_rule
from auto_round.codecs.kinds import FunctionCodec
from auto_round.codecs.quantized_layer import QuantizedLayer
from auto_round.codecs.registry import reshape_pad_tensor_by_group_size


class _FusedLinear(torch.autograd.Function):
    """`x @ W.T + bias` whose backward gives dL/dW to the group instead of to autograd."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, anchor: torch.Tensor, layer: TunableLinear) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.layer = layer
        return torch.nn.functional.linear(x, layer.quantized, layer.bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        (grad,) = grad_outputs
        (x,) = ctx.saved_tensors
        layer = ctx.layer
        flat = grad.reshape(-1, grad.shape[-1])
        layer.learnable_group.add_weight_gradient(layer.index, flat, x.reshape(-1, x.shape[-1]))
        grad_x = (flat @ layer.quantized).view_as(x) if ctx.needs_input_grad[0] else None
        return grad_x, None, None


class TunableLinear(torch.nn.Module):
    """Replaces the linear of `learnable_group.tasks[index]` while its block is tuned."""

    anchor: torch.Tensor

    def __init__(self, learnable_group: LearnableGroup, index: int) -> None:
        super().__init__()
        task = learnable_group.tasks[index]
        self.learnable_group, self.index = learnable_group, index
        self.bias = None if task.bias is None else task.bias.to(learnable_group.compute_dtype)
        # autograd calls backward only if some input requires a gradient, and the block's input does not
        self.anchor = torch.zeros(1, requires_grad=True, device=task.weight.device)
        self.quantized = learnable_group.weight(index)
        self.activation = task.activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.quantized.dtype)
        if self.activation is not None:
            x = self.activation(x)
        return _FusedLinear.apply(x, self.anchor, self)


class AutogradTunableLinear(torch.nn.Module):
    """Replaces a linear while its block is tuned with autograd through the function of any registered data type.

    The function's `v` is in units of the weight and steps are in units of one code, so `v = u * unit`, with `unit` the
    scale that the untuned function returned, expanded to one value per weight.
    """

    def __init__(
        self, task: LayerTask, compute_dtype: torch.dtype, scale_dtype: torch.dtype,
        tune_scale: bool = True, adam: bool = False, momentum: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.task, self.compute_dtype = task, compute_dtype
        self.scheme = scheme = task.scheme
        self.codec = FunctionCodec(scheme)
        self.options = task.start_options(True, scale_dtype)
        self.weight_value = task.weight.float()
        self.bias = None if task.bias is None else task.bias.to(compute_dtype)
        with torch.no_grad():
            start, scale, _ = self.codec.call(self.weight_value, self.options)
        self.unit = self._expand(scale)
        groups, _ = reshape_pad_tensor_by_group_size(self.weight_value, scheme.group_size)
        count = groups.shape[0] * groups.shape[1] if groups.dim() == 4 else groups.shape[0]
        device = task.weight.device
        self.u = torch.zeros_like(self.weight_value, requires_grad=True)
        self.scale_factors = [torch.ones(count, 1, device=device, requires_grad=tune_scale) for _ in range(2)]
        self.rules = [make_rule(adam, momentum) for _ in range(3)]
        self.quantized = start.to(compute_dtype)
        self.is_current = False

    def _expand(self, scale: object) -> torch.Tensor:
        """The scale as one positive value per weight; estimated from the row's range for a scale of unknown shape."""
        weight = self.weight_value
        fallback = weight.abs().amax(-1, keepdim=True) / 2 ** (self.task.scheme.bits - 1)
        if not isinstance(scale, torch.Tensor) or scale.numel() == 0 or isinstance(self.task.scheme.group_size, tuple):
            return fallback.clamp(min=1e-9).expand_as(weight)
        if scale.numel() == 1:
            return scale.detach().abs().float().reshape(1, 1).expand_as(weight)
        if scale.numel() % weight.shape[0]:
            return fallback.clamp(min=1e-9).expand_as(weight)
        rows = scale.detach().abs().float().reshape(weight.shape[0], -1)
        size = -(-weight.shape[1] // rows.shape[1])
        return rows.repeat_interleave(size, dim=1)[:, : weight.shape[1]]

    def _learned_parameters(self) -> dict[str, torch.Tensor]:
        return {"v": self.u * self.unit, "min_scale": self.scale_factors[0], "max_scale": self.scale_factors[1]}

    def _values(self) -> torch.Tensor:
        quantized: torch.Tensor = self.codec.call(self.weight_value, self.options, **self._learned_parameters())[0]
        return quantized.to(self.compute_dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            weight = self._values()
        else:
            if not self.is_current:
                self.quantized = self._values()
                self.is_current = True
            weight = self.quantized
        x = x.to(self.compute_dtype)
        if self.task.activation is not None:
            x = self.task.activation(x)
        return torch.nn.functional.linear(x, weight, self.bias)

    @torch.no_grad()
    def step(self, lr: float, scale_lr: float) -> None:
        """Update the learnables from the accumulated gradients."""
        for value, rule, rate in zip([self.u, *self.scale_factors], self.rules, (lr, scale_lr, scale_lr), strict=True):
            if value.grad is not None:
                rule.apply(value, value.grad, rate)
                value.grad = None
        for factor in self.scale_factors:
            factor.clamp_(0.0, 1.0)
        self.is_current = False

    @torch.no_grad()
    def restart(self) -> None:
        """Restore the state before the first step."""
        self.u.zero_()
        for factor in self.scale_factors:
            factor.fill_(1.0)
        self.is_current = False

    def snapshot(self, into: State | None = None) -> State:
        return copy_state(tuple(value.detach() for value in (self.u, *self.scale_factors)), into)

    def drop_gradient(self) -> None:
        """Discard the gradient accumulated since the last step."""
        for value in (self.u, *self.scale_factors):
            value.grad = None

    @torch.no_grad()
    def restore(self, state: tuple[torch.Tensor, ...]) -> None:
        for value, saved in zip((self.u, *self.scale_factors), state, strict=True):
            value.copy_(saved)
        self.is_current = False

    def finish(self) -> list[QuantizedLayer]:
        codes = self.codec.encode(self.task.weight, self.options, None, **self._learned_parameters())
        return [self.task.quantized(codes)]
