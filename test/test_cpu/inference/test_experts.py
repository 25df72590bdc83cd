"""Experts run together by their kernels: the loop's numbers, the same files, the loop again when a layer changes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from auto_round.eval.evaluate import load_model
from auto_round.inference.kernels import IntegerWeight, JoinedKernels, LayerSpec, LinearKernel
from auto_round.inference.linear import QuantLinear, enable_grouped_experts
from auto_round.modeling.experts import LinearExperts, unfuse_experts
from auto_round.schemes import QuantizationScheme as Scheme

FAMILIES = ["mixtral", "qwen2-moe", "qwen3-moe", "gpt-oss"]
IDS = torch.tensor([[1, 5, 9, 2, 44, 17, 3, 8], [7, 7, 1, 0, 60, 31, 12, 2]])


class Loop(LinearKernel):
    """The formula; experts through the loop that every kernel has."""

    def __init__(self, weight: IntegerWeight) -> None:
        super().__init__(weight)
        size = weight.spec.group_size
        wide = [
            t.float().repeat_interleave(size, 1)[:, : weight.spec.in_features] for t in (weight.scales, weight.zeros)
        ]
        self.own = weight.codes.clone()
        self.dense = wide[0] * (weight.codes.float() - wide[1])
        self.calls = 0

    @classmethod
    def unsupported_reason(cls, spec: LayerSpec) -> str | None:
        return None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x @ self.dense.T

    def codes(self) -> torch.Tensor:
        return self.own


class Joined(Loop):
    """Experts by offsets, as on a GPU."""

    @classmethod
    def join(cls, kernels: Sequence[LinearKernel]) -> JoinedKernels:
        dense = torch.stack([kernel.dense for kernel in kernels if isinstance(kernel, Joined)])
        dense = torch.cat((dense, torch.zeros_like(dense[:1])))

        def run(x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
            assert offsets.dtype == torch.int32 and len(offsets) == len(kernels) + 2 and offsets[-1] == len(x)
            owner = (torch.arange(len(x)).unsqueeze(1) >= offsets[1:-1]).sum(1)
            return torch.einsum("rk,rnk->rn", x, dense[owner])

        return run


def loaded(family: str, packable_model: Any, write_checkpoint: Any, kind: type[LinearKernel], **scheme: Any) -> Any:
    model = packable_model(family)
    unfuse_experts(model)
    dense = {f"model.layers.{i}.mlp.shared_expert_gate": Scheme(bits=16) for i in range(2)}
    written = write_checkpoint(model, Scheme(group_size=16, **scheme), dense)
    model = load_model(written.folder, dtype=torch.float32)
    for layer in model.modules():
        if isinstance(layer, QuantLinear):
            layer.use_kernel(kind)
    return model


def mixtures(model: Any) -> list[LinearExperts]:
    return [module for module in model.modules() if isinstance(module, LinearExperts)]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("kind", [Loop, Joined])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loops_numbers_and_files(
    family: str, kind: type[Loop], packable_model: Any, write_checkpoint: Callable[..., Any]
) -> None:
    model = loaded(family, packable_model, write_checkpoint, kind, sym=False)
    want, names = logits(model), model.state_dict()
    assert enable_grouped_experts(model) == len(mixtures(model)) > 0
    for experts in mixtures(model):
        for kernel in (m.kernel for m in experts.modules() if isinstance(m, QuantLinear)):
            assert isinstance(kernel, Loop)
            kernel.calls = 0
    got = logits(model)
    assert float((got - want).norm() / want.norm()) < 1e-6
    kernels = [m.kernel for e in mixtures(model) for m in e.modules() if isinstance(m, QuantLinear)]
    assert (sum(kernel.calls for kernel in kernels if isinstance(kernel, Loop)) > 0) == (kind is Loop)
    after = model.state_dict()
    assert set(after) == set(names) and all(torch.equal(after[name], names[name]) for name in names)


@pytest.mark.parametrize("kind", [Loop, Joined])
def test_tokens_without_an_expert_add_nothing(
    kind: type[Loop], packable_model: Any, write_checkpoint: Callable[..., Any]
) -> None:
    model = loaded("gpt-oss", packable_model, write_checkpoint, kind)
    experts = mixtures(model)[0]
    hidden, weights = torch.randn(5, 64), torch.rand(5, 2)
    index = torch.tensor([[4, 0], [9, 4], [2, 2], [4, 4], [1, 3]])
    with torch.no_grad():
        want = experts(hidden, index, weights)
        enable_grouped_experts(model)
        assert experts.batched is not None
        assert torch.allclose(experts(hidden, index, weights), want, atol=1e-6)
        assert torch.equal(experts(hidden, torch.full((5, 2), 4), weights), torch.zeros(5, 64))
        assert experts(torch.empty(0, 64), torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2)).shape == (0, 64)
    for row, indices in enumerate(index.tolist()):
        if all(i >= 4 for i in indices):
            assert not want[row].any()


def test_gradients_take_the_loop(packable_model: Any, write_checkpoint: Callable[..., Any]) -> None:
    model = loaded("qwen3-moe", packable_model, write_checkpoint, Joined)
    experts = mixtures(model)[0]
    grads: list[torch.Tensor] = []
    index, weights = torch.tensor([[0, 1], [3, 0]]), torch.rand(2, 2)
    for together in (False, True):
        if together:
            enable_grouped_experts(model)
        hidden = torch.ones(2, 64, requires_grad=True)
        experts(hidden, index, weights).square().sum().backward()
        assert hidden.grad is not None
        grads.append(hidden.grad)
    assert torch.equal(*grads) and grads[0].any()


def change_kernel(experts: LinearExperts) -> None:
    layer = experts.get_submodule("1.up_proj")
    assert isinstance(layer, QuantLinear)
    layer.drop_kernel()
    layer.scales.mul_(100)


def change_layer(experts: LinearExperts) -> None:
    layer = experts.get_submodule("1").up_proj = torch.nn.Linear(64, 32, bias=False)
    torch.nn.init.constant_(layer.weight, 10.0)


def watch_layer(experts: LinearExperts) -> None:
    experts.get_submodule("1.up_proj").register_forward_hook(lambda module, args, out: out * 100)


@pytest.mark.parametrize("change", [change_kernel, change_layer, watch_layer])
def test_a_changed_layer_ends_it(
    change: Callable[[LinearExperts], None], packable_model: Any, write_checkpoint: Callable[..., Any]
) -> None:
    model = loaded("qwen3-moe", packable_model, write_checkpoint, Joined)
    enable_grouped_experts(model)
    experts, hidden = mixtures(model)[0], torch.randn(3, 64)

    def run() -> torch.Tensor:
        with torch.no_grad():
            return experts(hidden, torch.tensor([[0, 1], [1, 2], [3, 0]]), torch.full((3, 2), 0.5))

    before = run()
    change(experts)
    got = run()
    assert experts.batched is None and mixtures(model)[1].batched is not None
    assert torch.allclose(got[2], before[2], atol=1e-6) and not torch.allclose(got[:2], before[:2], rtol=0.5)
    assert torch.equal(got, run())


def test_a_copy_a_cast_and_a_move(packable_model: Any, write_checkpoint: Callable[..., Any]) -> None:
    model = loaded("mixtral", packable_model, write_checkpoint, Loop)
    enable_grouped_experts(model)
    want = logits(model)
    other = copy.deepcopy(model)
    runner = mixtures(other)[0].batched
    assert runner is not None and runner.is_valid() and runner is not mixtures(model)[0].batched
    assert torch.equal(logits(other), want)
    change_kernel(mixtures(other)[0])
    first = mixtures(model)[0].batched
    assert first is not None and first.is_valid() and not runner.is_valid()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)
    assert torch.allclose(logits(model), want, atol=1e-5) and mixtures(model)[0].batched is None


def test_what_cannot_run_together_does_not(packable_model: Any, write_checkpoint: Callable[..., Any]) -> None:
    model = packable_model("mixtral")
    unfuse_experts(model)
    mixed = {"model.layers.0.mlp.experts.2.up_proj": Scheme(bits=8, group_size=16)}
    model = load_model(write_checkpoint(model, Scheme(group_size=16), mixed).folder, dtype=torch.float32)
    for layer in model.modules():
        if isinstance(layer, QuantLinear):
            layer.drop_kernel()
    assert enable_grouped_experts(model) == 0, "no kernels"
    for layer in model.modules():
        if isinstance(layer, QuantLinear):
            layer.use_kernel(Loop)
    want = logits(model)
    assert enable_grouped_experts(model) == 1
    assert [experts.batched is None for experts in mixtures(model)] == [True, False]
    assert torch.allclose(logits(model), want, atol=1e-6)
