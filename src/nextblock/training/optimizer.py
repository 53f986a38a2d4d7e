"""AdamW with the papers' parameter groups, clipping and skipping without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nextblock.training.config import TrainingConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: decayed, and not decayed (biases and one-dimensional parameters).

    Position embeddings are decayed, as in the official code of both papers.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (plain if _is_plain(name, parameter) else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def layer_decay_groups(
    model: nn.Module, weight_decay: float, decay: float, height_of: Callable[[str], int], top: int
) -> list[dict[str, Any]]:
    """Groups whose learning rate falls towards the input: `lr_scale` decay ** (top - height), weight decay as above.

    Args:
        height_of: name of a parameter -> how far up it is, 0 (the embeddings) .. `top` (the head).
        decay: above 0; 1 = the same rate everywhere.

    Source: BEiT (arXiv 2106.08254), as MAE uses it: head depth + 1, layer i of 1..depth i, patch and position 0.
    """
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            height, plain = height_of(name), _is_plain(name, parameter)
            fresh = {"params": [], "weight_decay": 0.0 if plain else weight_decay, "lr_scale": decay ** (top - height)}
            groups.setdefault((height, plain), fresh)["params"].append(parameter)
    return [groups[place] for place in sorted(groups)]


def _is_plain(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim <= 1 or name.endswith("bias")


def make_optimizer(
    model: nn.Module, config: TrainingConfig, groups: list[dict[str, Any]] | None = None
) -> torch.optim.AdamW:
    """The fused AdamW over `groups` (of `parameter_groups` when absent); its kernel can skip a step by a flag on the
    device."""
    groups = groups or parameter_groups(model, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.peak_lr, betas=config.betas, fused=True)


class SteadyBuffers:
    """Gives a module's persistent buffers (running statistics) back what they held before a step that is skipped.

    A forward pass writes them before anyone knows whether its loss is finite. Make it after the module is on its
    device, and call `settle` after each step.
    """

    def __init__(self, module: nn.Module) -> None:
        parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        self.live = [value for name, value in module.state_dict().items() if name not in parameters]
        self.kept = [value.clone() for value in self.live]

    def settle(self, good: Tensor) -> None:
        """`good` (bool, a scalar on the device): whether the step was taken. Does not wait for the device."""
        for live, kept in zip(self.live, self.kept, strict=True):
            kept.copy_(torch.where(good, live, kept))
            live.copy_(kept)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the learning rate, times its own `lr_scale` where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def gradient_norm(model: nn.Module) -> Tensor:
    """The norm of all gradients together, a scalar on the device."""
    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


def clipped_step(optimizer: Any, norm: Tensor, good: Tensor, clip: float) -> None:
    """One optimiser step, clipped to a norm of `clip`, or none at all where `good` is False.

    Both happen inside the fused kernel, which divides the gradients by `grad_scale` and leaves parameters and
    state alone when `found_inf` is 1: no second pass over the gradients and no wait for the device.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # Fabric wraps it
    inner.found_inf = (~good).float()
    inner.grad_scale = (norm / clip).clamp(min=1.0).float() if clip else torch.ones_like(norm).float()
    optimizer.step()
