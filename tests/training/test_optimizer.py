from __future__ import annotations

import re

import torch
from torch import nn

from nextblock.training.config import TrainingConfig
from nextblock.training.optimizer import SteadyBuffers, layer_decay_groups, make_optimizer, parameter_groups, set_lr


class Tower(nn.Module):
    """Embedding, three layers, a head; as a transformer's state is named."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.ones(1, 4, 2))
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
        self.head = nn.Linear(2, 2)


def height_of(name: str) -> int:
    found = re.match(r"layers\.(\d+)\.", name)
    return int(found[1]) + 1 if found else 4 if name.startswith("head") else 0


def test_learning_rates_fall_towards_the_input() -> None:
    model = Tower()
    groups = layer_decay_groups(model, 0.1, 0.5, height_of, top=4)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert found == {
        "position": (0.5**4, 0.1),
        "layers.0.weight": (0.5**3, 0.1), "layers.0.bias": (0.5**3, 0.0),
        "layers.1.weight": (0.5**2, 0.1), "layers.1.bias": (0.5**2, 0.0),
        "layers.2.weight": (0.5, 0.1), "layers.2.bias": (0.5, 0.0),
        "head.weight": (1.0, 0.1), "head.bias": (1.0, 0.0),
    }  # fmt: skip
    optimizer = make_optimizer(model, TrainingConfig(), groups)
    set_lr(optimizer, 0.01)
    rates = {names[id(p)]: g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert rates["position"] == 0.01 * 0.5**4
    assert rates["head.bias"] == 0.01


def test_the_scales_survive_a_checkpoint() -> None:
    model = Tower()
    optimizer = make_optimizer(model, TrainingConfig(), layer_decay_groups(model, 0.1, 0.5, height_of, top=4))
    other = make_optimizer(model, TrainingConfig(), layer_decay_groups(model, 0.1, 0.9, height_of, top=4))
    other.load_state_dict(optimizer.state_dict())
    assert [g["lr_scale"] for g in other.param_groups] == [g["lr_scale"] for g in optimizer.param_groups]


def test_frozen_parameters_are_in_no_group() -> None:
    model = Tower()
    model.head.requires_grad_(False)
    for groups in (parameter_groups(model, 0.1), layer_decay_groups(model, 0.1, 0.5, height_of, top=4)):
        assert not {id(p) for g in groups for p in g["params"]} & {id(p) for p in model.head.parameters()}


def test_a_decay_of_one_trains_like_two_groups() -> None:
    ends = []
    for decayed in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
        config = TrainingConfig(weight_decay=0.1)
        groups = layer_decay_groups(model, 0.1, 1.0, lambda name: int(name[0]), top=1) if decayed else None
        optimizer = make_optimizer(model, config, groups)
        for _ in range(3):
            set_lr(optimizer, 0.1)
            optimizer.zero_grad()
            model(torch.ones(2, 3)).square().sum().backward()
            optimizer.step()
        ends.append([p.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_buffers_forget_a_skipped_step() -> None:
    module = nn.BatchNorm1d(3, affine=False)
    steady = SteadyBuffers(module)
    module(torch.randn(8, 3))
    steady.settle(torch.tensor(True))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module(torch.full((8, 3), float("nan")))
    assert module.running_mean.isnan().all()
    steady.settle(torch.tensor(False))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    module(torch.randn(8, 3))
    steady.settle(torch.tensor(True))
    assert int(module.num_batches_tracked) == 2
    assert not torch.equal(module.running_mean, before["running_mean"])
