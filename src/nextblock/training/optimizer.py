"""AdamW with the papers' parameter groups, clipping and skipping without waiting for the device."""

from __future__ import annotations

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
            (plain if parameter.ndim <= 1 or name.endswith("bias") else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """The fused AdamW; its kernel can skip a step by a flag on the device."""
    groups = parameter_groups(model, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.peak_lr, betas=config.betas, fused=True)


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
