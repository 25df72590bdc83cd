"""Interface of a quantizer: its input (a block and its layers), its result, and out-of-memory errors."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from auto_round.codecs.activation import ActivationQuantizer
from auto_round.codecs.base import Codec, StartOptions
from auto_round.codecs.kinds import codec_of
from auto_round.codecs.quantized_layer import Codes, QuantizedLayer
from auto_round.errors import ConfigError, DeviceError, NumericsError
from auto_round.schemes import QuantizationScheme


@dataclass
class LayerTask:
    """One linear layer of the block."""

    name: str  # full module name
    module: torch.nn.Module  # the linear itself, inside the block
    weight: Tensor  # [out, in] (a Conv1D's weight is transposed already), in the model's own dtype
    scheme: QuantizationScheme
    importance: Tensor | None = None  # float32 [in], second moment of the input channels over calibration tokens
    bias: Tensor | None = None  # [out] in the model's own dtype
    transposed: bool = False  # the module stores its weight as [in, out]
    activation: ActivationQuantizer | None = None  # how the layer's inputs are quantized
    global_scale: Tensor | None = None  # float32 scalar shared by fused layers (NVFP4); None: the layer's own
    ggml: str | None = None  # name of the ggml type that stores the layer (`Q4_K`)
    # Sums of x x' over the layer's inputs x, float32 [n, n] for each band of input channels, in order.
    input_hessians: Sequence[Tensor] | None = None

    @property
    def codec(self) -> Codec:
        return codec_of(self.scheme, self.ggml, self.weight.shape[1])

    def start_options(self, searched: bool, scale_dtype: torch.dtype, quick: bool = False) -> StartOptions:
        return StartOptions(searched, self.importance, scale_dtype, self.global_scale, quick)

    def start(self, searched: bool, scale_dtype: torch.dtype, quick: bool = False) -> Any:
        return self.codec.start(self.weight, self.start_options(searched, scale_dtype, quick))

    def quantized(self, codes: Codes) -> QuantizedLayer:
        """The layer with these codes, its bias and the scales of its inputs. Raises NumericsError for NaN or Inf."""
        if not codes.is_finite():
            raise NumericsError(f"layer {self.name}: {codes.not_finite}")
        step, bias = self.activation, None if self.bias is None else self.bias.cpu()
        act = () if step is None else (step.scale, step.zero_point, step.global_scale)
        return QuantizedLayer(self.name, self.scheme, codes.map(Tensor.cpu), bias, self.transposed, *act)


class Samples(Protocol):
    """Hidden states [N, T, H] of N samples, indexed by sample; a tensor is one."""

    @property
    def shape(self) -> torch.Size: ...

    def __getitem__(self, index: Any, /) -> Tensor: ...


@dataclass
class BlockTask:
    """One block with real weights on its device. A quantizer that changes `block` restores it."""

    name: str  # full module name
    block: torch.nn.Module
    layers: list[LayerTask]  # the linears to quantize
    # Calls the block on hidden states [B, T, H] of the given samples with the arguments recorded for them.
    run: Callable[[Tensor, Sequence[int]], Tensor]
    compute_dtype: torch.dtype  # of the block's parameters and of `run`
    seed: int  # of the order of samples
    inputs: Samples | None = None  # [N, T, H] during tuning; in memory, or read from a file when indexed
    targets: Samples | None = None  # [N, T, H], the full-precision outputs
    loss_mask: Tensor | None = None  # bool [N, T], True where a position counts
    # Moves `inputs` and `targets` off the device; False when they are not on it.
    offload: Callable[[BlockTask], bool] = lambda _task: False

    @property
    def device(self) -> torch.device:
        """Of the layers; the samples may be on another."""
        return self.layers[0].weight.device if self.layers else torch.device("cpu")


@dataclass
class BlockResult:
    """The quantized layers, and the block's held-out loss before and after tuning (None without)."""

    layers: Sequence[QuantizedLayer] = field(default_factory=list)
    loss_before: float | None = None
    loss_after: float | None = None
    steps: int = 0


class BlockQuantizer(Protocol):
    """An algorithm that quantizes one block at a time."""

    name: str
    needs_importance: bool
    needs_targets: bool

    def needs_hessian(self, layer: LayerTask) -> bool:
        """Whether the quantizer uses `input_hessians` of this layer."""

    def quantize_block(self, task: BlockTask) -> BlockResult:
        """Quantize every layer of the block."""


_Quantizer = TypeVar("_Quantizer", bound=type[Any])

# Algorithms of plugins by name: classes of `BlockQuantizer` that are made from the dtype of the scales.
ALGORITHMS: dict[str, Callable[[torch.dtype], BlockQuantizer]] = {}


def register_algorithm(name: str) -> Callable[[_Quantizer], _Quantizer]:
    """Class decorator: `algorithm=name` asks for `cls(scale_dtype)`. Raises ConfigError when the name is taken."""

    def register(cls: _Quantizer) -> _Quantizer:
        if name in ALGORITHMS:
            raise ConfigError(f"algorithm {name!r} is already registered, by {ALGORITHMS[name]!r}")
        ALGORITHMS[name] = cls
        return cls

    return register


def empty_device_cache(device: torch.device) -> None:
    """Release PyTorch's cached memory to the device."""
    gc.collect()
    if device.type == "cuda" and torch.cuda.is_available():
        torch.cuda.empty_cache()


def out_of_memory_error(doing: str, device: torch.device) -> DeviceError:
    """The error when no batch can be split and no tensor offloaded any more."""
    return DeviceError(
        f"{device} has too little memory for {doing}, with everything else off it; lower seqlen, set "
        "low_gpu_mem_usage=True (--low_gpu_mem_usage), batch_size=1 with gradient_accumulate_steps for the same "
        "effective batch, tune on another device (device_map), or leave tuning out (iters=0)"
    )
