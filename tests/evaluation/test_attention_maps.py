from __future__ import annotations

import pytest
import torch
from einops import rearrange
from torch import Tensor

from close import assert_close
from nextblock.errors import ConfigError
from nextblock.evaluation.attention_maps import attention_maps, head_difference, telling_patches
from nextblock.xtra.config import XTRAConfig
from nextblock.xtra.model import Encoder

CASES = {
    "cells": ({}, (16, 16), False),
    "patches": ({"cell_size": 1}, (16, 16), False),
    "rectangular": ({"image_size_px": (16, 24)}, (16, 24), False),
    "another size": ({}, (24, 16), False),
    "no mask": ({}, (16, 16), True),
}


def make(**changes: object) -> Encoder:
    values = {"image_size_px": 16, "patch_size_px": 4, "cell_size": 2, "width": 16, "depth": 3, "num_heads": 2}
    encoder = Encoder(XTRAConfig(**{**values, **changes}))
    with torch.no_grad():  # the weights at initialisation attend evenly; these do not
        for parameter in encoder.parameters():
            parameter.mul_(4)
    return encoder


@pytest.mark.parametrize("case", CASES)
def test_weights_times_values_is_what_the_models_own_attention_gives(case: str) -> None:
    changes, size, bidirectional = CASES[case]
    encoder, images = make(**changes).eval(), torch.randn(2, 3, *size)
    given: dict[int, Tensor] = {}
    made: dict[int, Tensor] = {}

    def watch(i: int):
        def hook(_: object, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            given[i], made[i] = inputs[0], output

        return hook

    hooks = [layer.attn.register_forward_hook(watch(i)) for i, layer in enumerate(encoder.layers.layers)]
    with torch.no_grad():
        encoder(images, bidirectional=bidirectional)
    for hook in hooks:
        hook.remove()

    maps = attention_maps(encoder, images, [2, 0], bidirectional=bidirectional)
    assert list(maps) == [0, 2]
    ordering = encoder.ordering_for(images, bidirectional)
    for number, weights in maps.items():
        attn = encoder.layers.layers[number].attn
        with torch.no_grad():
            values = rearrange(attn.qkv(given[number]), "b n (three h d) -> three b h n d", three=3, h=2)[2]
            attended = weights @ values[:, :, ordering.inverse]  # both in raster order
            output = attn.out(rearrange(attended, "b h n d -> b n (h d)"))
        assert_close(output, made[number][:, ordering.inverse], 1e-5)


def test_rows_sum_to_one_and_never_look_at_later_cells() -> None:
    encoder, images = make(), torch.randn(2, 3, 16, 16)
    weights = attention_maps(encoder, images, [1])[1]
    assert weights.shape == (2, 2, 16, 16)
    assert_close(weights.sum(-1), torch.ones(2, 2, 16), 1e-6)
    cell = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]).flatten()  # of each patch, raster
    allowed = cell[:, None] >= cell[None, :]
    assert ((weights > 0) == allowed).all()
    assert (attention_maps(encoder, images, [1], bidirectional=True)[1] > 0).all()


def test_the_encoder_is_left_as_it_was() -> None:
    encoder, images = make(drop_path=0.5).train(), torch.randn(1, 3, 16, 16)
    first = attention_maps(encoder, images, [2])[2]
    assert encoder.training
    assert not encoder.layers.layers[2].attn._forward_pre_hooks
    assert torch.equal(first, attention_maps(encoder, images, [2])[2])  # no drop path in between


def test_layers_after_the_last_one_asked_for_are_not_run() -> None:
    encoder, ran = make(), []
    encoder.layers.layers[2].register_forward_pre_hook(lambda *_: ran.append(2))
    attention_maps(encoder, torch.randn(1, 3, 16, 16), [1])
    assert not ran
    with pytest.raises(ConfigError, match="no layer 3: the encoder has 3, numbered from 0 to 2"):
        attention_maps(encoder, torch.randn(1, 3, 16, 16), [0, 3])


def test_heads_that_differ_are_found() -> None:
    weights = torch.full((2, 64, 64), 1 / 64)
    assert head_difference(weights).abs().max() < 1e-6
    weights[:, 9] = 0
    weights[0, 9, 0] = weights[1, 9, 63] = 1  # patch 1,1: one head looks at the first patch, the other at the last
    assert_close(head_difference(weights)[9], 0.5, 1e-6)
    chosen = telling_patches(weights, (8, 8))
    assert list(chosen)[:2] == [(4, 4), (1, 1)]
    assert len(chosen) == 3
    apart = [((a - c) ** 2 + (b - d) ** 2) ** 0.5 for a, b in chosen for c, d in chosen if (a, b) != (c, d)]
    assert min(apart) >= 2
    assert list(telling_patches(torch.ones(1, 1, 1), (1, 1))) == [(0, 0)]
