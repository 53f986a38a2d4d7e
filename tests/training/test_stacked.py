"""Each member of a stack is trained as it would be alone, by torch's own AdamW."""

from __future__ import annotations

import copy

import torch

from close import assert_close
from nextblock.training.stacked import StackedAdamW

LRS, DECAYS, BETAS, CLIP = [1e-2, 3e-2, 1e-1], [0.1, 0.0, 0.5], (0.9, 0.95), 0.7


def gradients(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return (
        torch.randn(3, 4, 5, generator=generator, dtype=torch.float64),
        torch.randn(3, 4, generator=generator, dtype=torch.float64),
    )


def start() -> tuple[torch.nn.Parameter, torch.nn.Parameter, StackedAdamW]:
    generator = torch.Generator().manual_seed(9)
    weight = torch.nn.Parameter(torch.randn(3, 4, 5, generator=generator, dtype=torch.float64))
    bias = torch.nn.Parameter(torch.randn(3, 4, generator=generator, dtype=torch.float64))
    members = [2, 0, 1]  # the stack's order is not that of the grid
    groups = [
        {"params": [weight], "members": members, "decayed": True},
        {"params": [bias], "members": members, "decayed": False},
    ]
    return weight, bias, StackedAdamW(groups, DECAYS, BETAS)


def take(optimizer: StackedAdamW, good: torch.Tensor) -> None:
    norms = optimizer.norms()
    scales = (CLIP / norms).clamp(max=1.0)
    optimizer.step_members(torch.tensor(LRS), scales, good)


def test_each_member_is_trained_as_alone() -> None:
    weight, bias, optimizer = start()
    members = [2, 0, 1]
    alone = []
    for slot, member in enumerate(members):
        w, b = (torch.nn.Parameter(x.detach()[slot].clone()) for x in (weight, bias))
        groups = [{"params": [w], "weight_decay": DECAYS[member]}, {"params": [b], "weight_decay": 0.0}]
        alone.append((w, b, torch.optim.AdamW(groups, lr=LRS[member], betas=BETAS)))
    for step in range(20):
        weight.grad, bias.grad = gradients(step)
        take(optimizer, torch.ones(3, dtype=torch.bool))
        for slot, (w, b, adamw) in enumerate(alone):
            w.grad, b.grad = (g[slot].clone() for g in gradients(step))
            torch.nn.utils.clip_grad_norm_([w, b], CLIP)
            adamw.step()
    for slot, (w, b, _) in enumerate(alone):
        assert_close(weight[slot], w, 1e-5)  # torch clips by norm + 1e-6
        assert_close(bias[slot], b, 1e-5)


def test_a_member_that_is_not_finite_stays_and_hurts_nobody() -> None:
    weight, bias, optimizer = start()
    other_weight, other_bias, other = start()
    before = weight.detach().clone()
    for step in range(3):
        weight.grad, bias.grad = gradients(step)
        weight.grad[1] = float("nan")
        good = torch.isfinite(optimizer.norms())
        assert good.tolist() == [False, True, True]  # slot 1 is member 0
        take(optimizer, good)
        other_weight.grad, other_bias.grad = gradients(step)
        take(other, torch.ones(3, dtype=torch.bool))
    assert torch.equal(weight[1], before[1])
    assert torch.isfinite(weight).all()
    assert torch.equal(weight[0], other_weight[0])
    assert torch.equal(bias[2], other_bias[2])


def test_its_state_can_be_saved_in_mid_training() -> None:
    weight, bias, optimizer = start()
    again_weight, again_bias, again = start()
    for step in range(6):
        if step == 3:
            again_weight.data.copy_(weight.data)
            again_bias.data.copy_(bias.data)
            again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for w, b, o in ((weight, bias, optimizer), (again_weight, again_bias, again)):
            w.grad, b.grad = gradients(step)
            if o is optimizer or step >= 3:
                take(o, torch.ones(3, dtype=torch.bool))
    assert torch.equal(weight, again_weight)
    assert torch.equal(bias, again_bias)
