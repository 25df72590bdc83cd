"""Routers are found by themselves: by name, class, or one output per expert beside a mixture."""

from __future__ import annotations

import torch
from torch import nn

from auto_round.modeling.layer_rules import ROUTER, block_weights, router_modules, router_names


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.out = nn.Linear(8, 6), nn.Linear(6, 4)


class SomeMoEGate(Mlp):
    """A class that says what it is, under a name that does not."""


class ForgetGate(Mlp):
    """A gate that chooses no experts."""


class MoeGatedDeltaNet(Mlp):
    """Of a mixture's family, and no router."""


def mixture(**beside: nn.Module) -> nn.Module:
    mlp = nn.Module()
    mlp.experts = nn.ModuleList(nn.Linear(8, 4) for _ in range(4))
    for name, module in beside.items():
        setattr(mlp, name, module)
    model = nn.Module()
    model.mlp = mlp
    return model


def test_routers_are_told_from_what_has_as_many_outputs() -> None:
    model = mixture(gate=nn.Linear(8, 4), router=Router(), wide=nn.Linear(8, 16), shared_expert_gate=nn.Linear(8, 1))
    model.mlp.shared_expert = nn.Module()
    model.mlp.shared_expert.gate_proj = nn.Linear(8, 4)  # as wide as there are experts, and no router
    model.mlp.up_proj = nn.Linear(8, 4)
    model.dense = nn.Linear(8, 4)
    assert router_names(model) == {"mlp.gate", "mlp.router.layer", "mlp.shared_expert_gate"}


def test_a_layer_with_one_output_an_expert_beside_a_mixture() -> None:
    assert router_names(mixture(switch=nn.Linear(8, 4), mixer=nn.Linear(8, 5))) == {"mlp.switch"}


def test_experts_that_are_no_plain_list() -> None:
    """Numbered modules beside a bias of all, and 3-D parameters in a layout that is not known."""
    numbered, stacked = nn.Module(), nn.Module()
    numbered.bias = nn.Parameter(torch.zeros(4))
    for index in range(4):
        numbered.add_module(str(index), nn.Linear(8, 6))
    stacked.kernel = nn.Parameter(torch.zeros(4, 8, 6))
    for experts in (numbered, stacked):
        model = mixture(gate=nn.Linear(8, 4), choice=nn.Linear(8, 4))
        model.mlp.experts = experts
        assert router_names(model) == {"mlp.gate", "mlp.choice"}


def test_a_routers_mlp_as_a_whole() -> None:
    assert router_names(mixture(gate=Mlp())) == {"mlp.gate.fc1", "mlp.gate.out"}
    assert router_names(mixture(choice=SomeMoEGate())) == {"mlp.choice.fc1", "mlp.choice.out"}


def test_routers_without_recognised_experts() -> None:
    model = nn.Module()
    model.router, model.token_router, model.select = nn.Linear(8, 3), Mlp(), Router()
    assert router_names(model) == {"router", "token_router.fc1", "token_router.out", "select.layer"}


def test_other_gates_are_no_routers() -> None:
    model = nn.Module()
    model.forget_gate, model.linear_attn, model.gate = ForgetGate(), MoeGatedDeltaNet(), nn.Linear(8, 4)
    assert router_names(model) == set()


def test_routers_that_are_plain_parameters() -> None:
    class TopKGate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 8))

    model = mixture(gate=TopKGate())
    model.mlp.router_weight = nn.Parameter(torch.zeros(4, 8))
    weights = block_weights(model, ("mlp",))
    assert {w.name: w.reason for w in weights.dense} == {"mlp.gate.weight": ROUTER, "mlp.router_weight": ROUTER}
    assert router_modules(model) == {"mlp.gate"} and weights.check("m") is None
