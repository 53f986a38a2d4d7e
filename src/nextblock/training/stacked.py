"""AdamW for a stack of independent models: learning rate, decay, clipping and skipping for each one alone.

Every parameter has a leading dimension, the members of the stack; what happens to a member is what would happen to it
alone (AdamW: Loshchilov and Hutter, arXiv 1711.05101).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

EPS = 1e-8


class StackedAdamW(torch.optim.Optimizer):
    """Parameters [G, ...] in one group for each stack; member g of a group is number `members[g]` of all.

    Args:
        groups: dicts with `params`, `members` (numbers) and `decayed` (whether weight decay applies).
        weight_decay: [all members].
        betas: of the two averages.

    Make it when the parameters are on their device. There is no `step()`: use `step_members`.
    """

    def __init__(
        self, groups: Sequence[dict[str, Any]], weight_decay: Sequence[float], betas: tuple[float, float]
    ) -> None:
        super().__init__(list(groups), {"betas": betas})
        self.weight_decay = tuple(weight_decay)
        first: Tensor = self.param_groups[0]["params"][0]
        decays = first.new_tensor(self.weight_decay, dtype=torch.float64)
        # On the device once: copying numbers to it in every step would make the host wait.
        self._at = [torch.tensor(group["members"], device=first.device) for group in self.param_groups]
        self._decay = [decays[at] * group["decayed"] for at, group in zip(self._at, self.param_groups, strict=True)]

    def norms(self) -> Tensor:
        """The gradient's norm of every member over all its parameters: [members]."""
        first = self.param_groups[0]["params"][0]
        total = torch.zeros(len(self.weight_decay), device=first.device, dtype=torch.float32)
        for at, group in zip(self._at, self.param_groups, strict=True):
            for parameter in group["params"]:
                total.index_add_(0, at, parameter.grad.float().flatten(1).square().sum(1))
        return total.sqrt()

    @torch.no_grad()
    def step_members(self, lrs: Tensor, scales: Tensor, good: Tensor) -> None:
        """One step.

        Args:
            lrs: [members], learning rates.
            scales: [members], what each member's gradient is multiplied by (clipping).
            good: bool [members]; the others keep their parameters and their state.
        """
        for at, decay, group in zip(self._at, self._decay, self.param_groups, strict=True):
            for parameter in group["params"]:
                self._step(parameter, group["betas"], lrs[at], decay, scales[at], good[at])

    def _step(
        self, parameter: Tensor, betas: tuple[float, float], lr: Tensor, decay: Tensor, scale: Tensor, good: Tensor
    ) -> None:
        def wide(x: Tensor) -> Tensor:
            return x.to(parameter.dtype if x.is_floating_point() else x.dtype).view(-1, *[1] * (parameter.ndim - 1))

        state = self.state[parameter]
        if not state:
            state["taken"] = torch.zeros(len(parameter), device=parameter.device)
            state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        assert parameter.grad is not None
        keep = wide(good)
        gradient = torch.where(keep, parameter.grad * wide(scale), 0)  # 0 · NaN would be NaN
        state["taken"] += good
        for name, beta, value in (("mean", betas[0], gradient), ("square", betas[1], gradient.square())):
            state[name].lerp_(value, wide((1 - beta) * good.to(parameter.dtype)))
        steps = state["taken"].clamp(min=1).double()
        corrected = state["square"].div(wide(1 - betas[1] ** steps)).sqrt_().add_(EPS)
        step = state["mean"].div(wide(1 - betas[0] ** steps)).div_(corrected).mul_(wide(lr))
        decayed = parameter * wide(1 - lr * decay)
        parameter.copy_(torch.where(keep, decayed - step, parameter))
