"""Wrap a user's in-memory model as a model source, in place."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from auto_round.errors import ModelError, UnsupportedError
from auto_round.modeling.experts import unfuse_experts
from auto_round.modeling.source import Device, ModelSource, check_finite, state_names
from auto_round.modeling.tensor_map import plan_saved


class LiveSource(ModelSource):
    """Wraps a model whose weights are all in memory. It is put in eval mode; fused experts become linear layers.

    Raises:
        ModelError: not a language model with decoder blocks, or some weights are offloaded (meta).
        UnsupportedError: its weights are quantized.
    """

    lazy = False

    def __init__(self, model: nn.Module) -> None:
        config: Any = getattr(model, "config", None)
        if config is None:
            raise ModelError(
                f"{type(model).__name__} has no .config; give a Transformers causal language model or a path"
            )
        self.blocks = self._find_blocks(model)
        for name, tensor in model.named_parameters():
            if tensor.is_meta:
                raise ModelError(
                    f"parameter {name!r} of the model is on the meta device (offloaded); give the model's path instead"
                )
            if not tensor.is_floating_point() or tensor.element_size() < 2:
                raise UnsupportedError(
                    f"parameter {name!r} of the model is {tensor.dtype}: the model is quantized already. Give its "
                    "path: FP8 and MXFP4 checkpoints are read block by block and dequantized; or load it dequantized"
                )
        self.model = model.eval()
        self.config = config
        self.name_or_path = str(getattr(config, "_name_or_path", "") or type(model).__name__)
        fused_names = {name: torch.empty_like(t, device="meta") for name, t in model.state_dict().items()}
        unfuse_experts(model)
        self._names = state_names(model)
        self._tied = self._find_tied()
        plans = plan_saved(model, self._names, fused_names)
        self._plans = {name: plan for name, plan in plans.items() if name not in self._tied}
        first = next((p.dtype for p in model.get_submodule(self.blocks[0]).parameters() if p.is_floating_point()), None)
        self.dtype = first or torch.get_default_dtype()
        self._original_device: dict[str, torch.device] = {}
        self._checked: set[str] = set()

    def load(self, name: str, device: Device | None = None) -> nn.Module:
        for full, module, leaf, tensor in self._tensors_under(name):
            if self.checks_finite and full not in self._checked:
                check_finite(full, tensor)
                self._checked.add(full)
            if device is not None and tensor.device != torch.device(device):
                self._original_device.setdefault(full, tensor.device)
                _move(module, leaf, tensor, torch.device(device))
        return self._module(name)

    def release(self, name: str) -> None:
        for full, module, leaf, tensor in self._tensors_under(name):
            device = self._original_device.pop(full, None)
            if device is not None:
                _move(module, leaf, tensor, device)

    def read(self, tensor_name: str) -> torch.Tensor:
        return self._tensor(tensor_name).detach().cpu()

    def assemble(self, install: Callable[[nn.Module, str], None]) -> nn.Module:
        return self.model

    def copy(self) -> LiveSource:
        return LiveSource(copy.deepcopy(self.model))

    def tensor_meta(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        tensor = self._tensor(name)
        return tuple(tensor.shape), tensor.dtype

    def _find_tied(self) -> dict[str, str]:
        """Names that share one parameter. Transformers declares which name is the canonical one."""
        declared = getattr(self.model, "all_tied_weights_keys", None) or {}
        first: dict[int, str] = {}
        for name in sorted(self._names, key=lambda n: n in declared):
            first.setdefault(id(self._tensor(name)), name)
        pairs = ((name, first[id(self._tensor(name))]) for name in self._names)
        return {name: canonical for name, canonical in pairs if name != canonical}


def _move(module: nn.Module, leaf: str, tensor: torch.Tensor, device: torch.device) -> None:
    """Move a tensor in place: a parameter keeps its identity, so that ties and other references stay valid."""
    if isinstance(tensor, nn.Parameter):
        tensor.data = tensor.data.to(device)
    else:
        module._buffers[leaf] = tensor.to(device)
