"""Keeping less for the backward pass changes no number; what is computed twice is what was said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

from close import assert_close
from nextblock.errors import ConfigError
from nextblock.layers.transformer import TransformerLayer
from nextblock.training.activation_checkpointing import checkpoint_layers
from nextblock.training.config import TrainingConfig
from nextblock.xar.config import XARConfig
from nextblock.xar.model import XAR
from nextblock.xtra.config import XTRAConfig
from nextblock.xtra.model import XTRA


def xtra() -> tuple[nn.Module, tuple[Any, ...]]:
    config = XTRAConfig(
        image_size_px=16, patch_size_px=4, cell_size=2, width=16, depth=3, num_heads=2, predictor_width=24,
        predictor_depth=1, predictor_heads=2, head_hidden=20, projection_hidden=28, drop_path=0.3,
    )  # fmt: skip
    return XTRA(config), (torch.randn(2, 3, 16, 16),)


def xar() -> tuple[nn.Module, tuple[Any, ...]]:
    config = XARConfig(4, 3, 1, entity_size=2, width=16, depth=3, num_heads=2, num_classes=2, dropout=0.4)
    return XAR(config), (torch.randn(2, 3, 4, 4), torch.tensor([0, 1]))


def step(made: tuple[nn.Module, tuple[Any, ...]]) -> tuple[list[torch.Tensor], int]:
    """Loss and gradients of a step in training mode, and the operations of its products."""
    model, inputs = made
    model.train()
    torch.manual_seed(1)  # of drop path and dropout
    with FlopCounterMode(display=False) as counter:
        loss = model(*inputs)
        loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)], counter.get_total_flops()


@pytest.mark.parametrize("make", [xtra, xar])
@pytest.mark.parametrize("how", ["selective", "full"])
def test_no_number_changes(make: Any, how: str) -> None:
    torch.manual_seed(0)
    made = make()
    plain, products = step(made)
    made[0].zero_grad(set_to_none=True)
    checkpoint_layers(made[0], how)
    found, again = step(made)
    assert len(found) == len(plain)
    for mine, theirs in zip(found, plain, strict=True):
        assert_close(mine, theirs, 1e-6)
    assert (again > products) == (how == "full")  # selective: no product twice
    assert list(made[0].state_dict()) == list(make()[0].state_dict())


def test_less_is_kept() -> None:
    """Whether a hidden activation, and the output of a product before it, are still there after the forward pass."""
    there = {}
    for how in ("none", "selective", "full"):
        layer, kept = TransformerLayer(16, 2, 64), []
        checkpoint_layers(layer, how)
        layer.mlp.fc1.register_forward_hook(lambda *args, kept=kept: kept.append(StorageWeakRef(storage_of(args[2]))))
        layer.mlp.fc2.register_forward_pre_hook(
            lambda *args, kept=kept: kept.append(StorageWeakRef(storage_of(*args[1])))
        )
        out = layer(torch.randn(2, 8, 16, requires_grad=True))
        there[how] = [not storage.expired() for storage in kept]
        out.sum().backward()
    assert there == {"none": [True, True], "selective": [True, False], "full": [False, False]}


@pytest.mark.parametrize("how", ["none", "selective", "full"])
def test_checkpointed_layers_are_compiled_in_one_piece(how: str) -> None:
    torch.manual_seed(0)
    layer, x = TransformerLayer(16, 2, 64), torch.randn(2, 8, 16)
    layer(x).square().sum().backward()
    plain = [p.grad for p in layer.parameters()]
    layer.zero_grad(set_to_none=True)
    checkpoint_layers(layer, how)
    layer.compile(fullgraph=True, backend="aot_eager")  # raises where nothing, or not all of it, can be compiled
    layer(x).square().sum().backward()
    for p, theirs in zip(layer.parameters(), plain, strict=True):
        assert_close(p.grad, theirs, 1e-5)


def storage_of(x: torch.Tensor) -> torch.UntypedStorage:
    return x.untyped_storage()


def test_nothing_else_is_known() -> None:
    with pytest.raises(ConfigError, match=r"training\.activation_checkpointing must be .*got 'ful'.*'full'"):
        TrainingConfig(activation_checkpointing="ful")  # type: ignore[arg-type]
