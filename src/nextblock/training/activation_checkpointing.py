"""Keep less for the backward pass and compute it again there (arXiv 1604.06174).

none       everything is kept
selective  matrix products and attention are kept; norms, activations and sums are computed again, at little cost
full       of each layer its input is kept; a forward pass more, by a third more work
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from nextblock.layers.transformer import TransformerLayer
from nextblock.xar.layers import XARLayer

_aten = torch.ops.aten
KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}


def checkpoint_layers(model: nn.Module, how: str) -> None:
    """Let every transformer layer of the model keep what `how` says, in place; to be called before it is compiled."""
    if how == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if how == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    for module in model.modules():
        if isinstance(module, TransformerLayer | XARLayer):
            module.forward = _checkpointed(module.forward, options)  # type: ignore[method-assign]


def _checkpointed(forward: Callable[..., Tensor], options: Mapping[str, Any]) -> Callable[..., Tensor]:
    # A function of this file, not a partial: torch.compile skips frames of its own package, and all that is in them.
    def checkpointed(*args: Any) -> Tensor:
        found: Tensor = checkpoint(forward, *args, **options)
        return found

    return checkpointed


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
