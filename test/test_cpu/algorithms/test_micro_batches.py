"""A device that runs out of memory: the same step with fewer samples at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from auto_round.algorithms.base import BlockTask, LayerTask
from auto_round.algorithms.quantization.sign_round import loop as module
from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
from auto_round.algorithms.quantization.sign_round.learnable_group import LearnableGroup
from auto_round.algorithms.quantization.sign_round.loop import SignRoundQuantizer
from auto_round.errors import DeviceError
from auto_round.schemes import QuantizationScheme, parse_scheme


class TightBlock(nn.Module):
    """Two layers; more than `most` samples at once raise in the second one's forward, or in its backward."""

    def __init__(self, most: int, backward: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.most, self.backward, self.refused = most, backward, 0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        inner = self.first(hidden).relu()
        if hidden.shape[0] > self.most:
            if not self.backward:
                self._refuse()
            if inner.requires_grad:
                inner.register_hook(lambda _grad: self._refuse())
        return hidden + self.second(inner)

    def _refuse(self) -> None:
        self.refused += 1
        raise torch.OutOfMemoryError("out of memory")


def make_task(block: TightBlock, scheme: QuantizationScheme) -> BlockTask:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(12, 5, 64, generator=generator)
    layers = [
        LayerTask(name, linear, linear.weight.detach(), scheme, bias=linear.bias.detach())
        for name, linear in (("first", block.first), ("second", block.second))
    ]
    with torch.no_grad():
        roomy = TightBlock(1000)
        roomy.load_state_dict(block.state_dict())
        targets = roomy(inputs)

    def run(hidden: torch.Tensor, samples: Sequence[int]) -> torch.Tensor:
        assert hidden.shape[0] == len(samples)
        return block(hidden)

    return BlockTask("block", block, layers, run, torch.float32, 7, inputs, targets)


def tune(block: TightBlock, scheme: str, micro_batch: int, **changes: Any) -> list[torch.Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "micro_batch_size", lambda *_args: micro_batch)
        quantizer = SignRoundQuantizer(SignRoundConfig(iters=6, batch_size=8, lr=0.02, **changes))
        result = quantizer.quantize_block(make_task(block, parse_scheme(scheme)))
    assert result.loss_before is not None and result.loss_after is not None
    assert result.loss_after < result.loss_before  # or this test would test nothing
    return [layer.dequantize() for layer in result.layers]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("scheme", ["W2A16", "MXFP4"])
def test_the_result_is_that_of_the_smaller_parts(scheme: str, backward: bool) -> None:
    wanted = tune(TightBlock(1000), scheme, 2)
    tight = TightBlock(3, backward)
    found = tune(tight, scheme, 8)
    assert tight.refused == 2  # 8 and 4 at once; never again after that
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_inputs_leave_the_device_before_it_gives_up() -> None:
    block = TightBlock(0)
    task = make_task(block, parse_scheme("W4A16"))
    moved = []

    def offload(given: BlockTask) -> bool:
        assert given is task
        moved.append(True)
        block.most = 1000
        return True

    task.offload = offload
    result = SignRoundQuantizer(SignRoundConfig(iters=2, batch_size=4)).quantize_block(task)
    assert moved == [True] and len(result.layers) == 2


def test_a_sample_that_never_fits_is_a_device_error() -> None:
    block = TightBlock(0)
    with pytest.raises(DeviceError, match="low_gpu_mem_usage.*batch_size"):
        SignRoundQuantizer(SignRoundConfig(iters=2)).quantize_block(make_task(block, parse_scheme("W4A16")))
    assert isinstance(block.first, nn.Linear)  # put back


@pytest.mark.parametrize("scheme", ["W2A16", "W4A16", "W8A16", "MXFP4", "GGUF:Q4_K_S"])
@pytest.mark.parametrize("sym", [True, False])
def test_a_snapshot_brings_the_same_weights_back(scheme: str, sym: bool) -> None:
    parsed = parse_scheme(scheme)
    if parsed.data_type == "int" and parsed.super_bits is None:
        parsed = parsed.with_overrides({"sym": sym})
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(3)).bfloat16()
    task = LayerTask("layer", nn.Linear(256, 8), weight, parsed)
    group = LearnableGroup([task], [task.start(True, torch.float16)], torch.float32)
    generator = torch.Generator().manual_seed(4)
    states = []
    for _ in range(3):
        group.add_weight_gradient(0, torch.randn(5, 8, generator=generator), torch.randn(5, 256, generator=generator))
        group.step(0.3, 0.05)
        states.append(group.quantized.clone())
    best = group.snapshot(group.snapshot())
    wanted = group.finish()[0].dequantize()
    group.add_weight_gradient(0, torch.randn(5, 8, generator=generator), torch.randn(5, 256, generator=generator))
    group.step(0.3, 0.05)
    assert not torch.equal(group.quantized, states[-1])
    group.restore(best)
    assert torch.equal(group.quantized, states[-1])
    assert torch.equal(group.finish()[0].dequantize(), wanted)
