"""How a model is run to be judged: eval mode, no gradients, the precision of the place it runs on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter lives."""
    return next(model.parameters()).device


@contextmanager
def inference(model: nn.Module, *, bf16: bool = True) -> Iterator[None]:
    """Eval mode and no gradients, bfloat16 autocast on CUDA if `bf16`; afterwards every module's own mode is back.

    Not `torch.inference_mode`: index tensors that an ordering makes and keeps in it could not be used by the
    training step that follows.
    """
    modes = [(module, module.training) for module in model.modules()]
    kind = device_of(model).type
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(kind, torch.bfloat16, enabled=bf16 and kind == "cuda"):
            yield
    finally:
        for module, training in modes:
            module.training = training
