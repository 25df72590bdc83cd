"""The experts of a block one at a time: an expert has weights while it is called, and no other has."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from auto_round.modeling.blocks import is_conv1d
from auto_round.modeling.source import ModelSource, direct_tensors

_EXPERT = re.compile(r"^(.*\.experts\.\d+)\.")
Weights = Callable[[str], Mapping[str, torch.Tensor]]


def expert_of(name: str) -> str | None:
    """The module name of the routed expert that a layer belongs to; None for other layers."""
    match = _EXPERT.match(name)
    return match[1] if match else None


class OneExpert:
    """A block of a checkpoint whose experts do not fit into memory together.

    Args:
        source: the checkpoint.
        block: name of the block.
        device, dtype: of the matrix products; None leaves weights in the model's dtype.
    """

    def __init__(self, source: ModelSource, block: str, device: torch.device, dtype: torch.dtype | None = None) -> None:
        self.source, self.block, self.device, self.dtype = source, block, device, dtype
        self._inside = source.model.get_submodule(block)

    def load_others(self) -> nn.Module:
        """The block with everything but its experts in memory."""
        for name, module in self._inside.named_modules():
            full = f"{self.block}.{name}" if name else self.block
            if expert_of(f"{full}.") is None and next(direct_tensors(module, persistent=False), None) is not None:
                self.source.load(full, self.device)
        return self._inside

    @contextmanager
    def running(self, weights: Weights | None = None) -> Iterator[None]:
        """While this is open an expert is loaded as it is called, and the one before released.

        `weights`: given an expert's name, dense weights [out, in] by layer name to take in place of its own.
        """
        present: list[str] = []

        def bring(expert: str) -> Callable[..., None]:
            def before(_module: nn.Module, _args: Any) -> None:
                if present == [expert]:
                    return
                self._release(present)
                given = {} if weights is None else weights(expert)
                module = self.source.load(expert, self.device)
                present.append(expert)
                for name, linear in module.named_modules():
                    self._place(linear, given.get(f"{expert}.{name}"))

            return before

        with ExitStack() as stack:
            stack.callback(self._release, present)
            for name, module in self._inside.named_modules():
                expert = expert_of(f"{self.block}.{name}.")
                if expert is not None and next(direct_tensors(module), None) is not None:
                    # Before the hooks of whoever watches the layer's inputs.
                    stack.callback(module.register_forward_pre_hook(bring(expert), prepend=True).remove)
            yield

    def _place(self, module: nn.Module, weight: torch.Tensor | None) -> None:
        """Parameters of a module in the dtype of products; the weight is `weight`, if there is one."""
        for leaf, value in list(module._parameters.items()):
            if value is None or value.dtype != self.source.dtype:
                continue
            data = value.detach()
            if weight is not None and leaf == "weight":
                data = (weight.t() if is_conv1d(module) else weight).to(data.device)
            module._parameters[leaf] = nn.Parameter(data.to(self.dtype or value.dtype), requires_grad=False)

    def _release(self, present: list[str]) -> None:
        for expert in present:
            self.source.release(expert)
        present.clear()
