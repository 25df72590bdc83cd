"""Find a model's decoder blocks and linear layers from structure alone, without a list of families."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator

import torch
from torch import nn

from auto_round.errors import ModelError, UnsupportedError

_TOWERS = ("vision", "visual", "image", "audio", "speech")
_SCALES = ("scales", "weight_scale", "weight_scale_inv")  # buffers of packed linear layers


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is Transformers' Conv1D (GPT-2), which stores its weight as [in, out]."""
    loaded = sys.modules.get("transformers.pytorch_utils")  # without it no module can be a Conv1D
    return loaded is not None and isinstance(module, loaded.Conv1D)


def is_linear(module: nn.Module) -> bool:
    """Whether `module` only multiplies its input by a 2-D weight and adds a bias: nn.Linear or Transformers' Conv1D.

    A subclass of nn.Linear with its own forward counts if its outputs are those of nn.Linear, on a tiny copy.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
        return False
    if not isinstance(module, nn.Linear) or not overrides_forward(module):
        return isinstance(module, nn.Linear) or is_conv1d(module)
    columns, rows = 6, 4
    tiny = copy.copy(module)
    tiny.__dict__ = dict(module.__dict__)
    values = torch.linspace(-1, 1, rows * columns).sin().view(rows, columns)
    bias = None if module.bias is None else nn.Parameter(torch.linspace(-1, 1, rows))
    tiny._parameters = {**module._parameters, "weight": nn.Parameter(values), "bias": bias}
    tiny.in_features, tiny.out_features = columns, rows
    x = torch.linspace(-2, 2, 5 * columns).cos().view(1, 5, columns)
    with torch.no_grad():
        try:
            y = type(module).forward(tiny, x)
        except Exception:  # foreign code on sizes that it does not expect
            return False
        wanted = nn.functional.linear(x, values, bias)
        return isinstance(y, torch.Tensor) and y.shape == wanted.shape and torch.allclose(y, wanted, atol=1e-5)


def overrides_forward(module: nn.Module) -> bool:
    """Whether `module` is of a subclass of nn.Linear that overrides `forward`."""
    return isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward


def linear_names(module: nn.Module) -> list[str]:
    """Names, relative to `module`, of all linear layers under it, in the order of the module tree."""
    return [name for name, child in module.named_modules() if is_linear(child)]


def weight_2d(module: nn.Module) -> torch.Tensor:
    """The weight of a linear layer as a view [out, in], however the module stores it."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.t() if is_conv1d(module) else weight


@torch.no_grad()
def set_weight_2d(module: nn.Module, weight: torch.Tensor) -> None:
    """Copy `weight` [out, in] into a linear layer in place, cast to the layer's dtype and device."""
    weight_2d(module).copy_(weight)


def find_blocks(model: nn.Module) -> tuple[str, ...]:
    """Names of the decoder blocks of a causal language model, in the order in which they run.

    The blocks are the outermost ModuleList whose every member contains matrix multiplications and which has the most
    parameters. If Transformers declares a decoder, only that is searched; vision and audio encoders, which have their
    own configuration, are left out. Raises ModelError without such a list, UnsupportedError for several of one kind.
    """
    config = getattr(model, "config", None)
    values = getattr(config, "__dict__", {})
    parts = [v for name, v in values.items() if name.endswith("_config") and any(word in name for word in _TOWERS)]
    towers = tuple({type(part) for part in parts if hasattr(part, "to_dict")} - {type(config)})
    get = getattr(model, "get_decoder", None)
    decoder = get() if callable(get) else None
    declared = [name for name, module in model.named_modules() if decoder is not None and module is decoder]
    for root in [*declared[:1], ""]:
        lists = dict(_block_lists(model.get_submodule(root), root, towers))
        if not lists:
            continue
        sizes = {n: sum(t.numel() for t in (*found.parameters(), *found.buffers())) for n, found in lists.items()}
        name = max(lists, key=lambda n: (sizes[n], len(lists[n]), n))
        kinds = {n: {type(block) for block in blocks} for n, blocks in lists.items()}
        others = [n for n in lists if n != name and kinds[n] & kinds[name]]
        if others:
            raise UnsupportedError(
                f"{type(model).__name__} has several stacks of the same blocks ({', '.join([name, *others])}); "
                "only models that run one stack of blocks once, in order, can be quantized block by block"
            )
        return tuple(f"{name}.{child}" if name else child for child, _ in lists[name].named_children())
    raise ModelError(
        f"{type(model).__name__} has no list of decoder blocks (a ModuleList of layers with linear modules); "
        "only decoder-only language models can be quantized"
    )


def _block_lists(module: nn.Module, name: str, towers: tuple[type, ...]) -> Iterator[tuple[str, nn.ModuleList]]:
    """The outermost lists of layers under `module`, except in models whose configuration is one of `towers`."""
    if isinstance(getattr(module, "config", None), towers):
        return
    if isinstance(module, nn.ModuleList) and len(module) and all(map(_multiplies, module)):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from _block_lists(child, f"{name}.{child_name}" if name else child_name, towers)


def _multiplies(block: nn.Module) -> bool:
    """Whether a block contains weight matrices: linear layers, packed ones, or experts stored as 3-D tensors."""
    return any(
        is_linear(module)
        or any(isinstance(module._buffers.get(n), torch.Tensor) for n in _SCALES)
        or any(p.dim() == 3 for p in module.parameters(recurse=False))
        for module in block.modules()
    )


def output_head(model: nn.Module) -> nn.Module | None:
    """The output embedding of a Transformers model, or None."""
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None


def get_lm_head_name(model: nn.Module) -> str | None:
    """The name of the output head, or None."""
    head = output_head(model)
    return None if head is None else next((name for name, m in model.named_modules() if m is head), None)
