"""The plain path computes what ours computes: a ratio between the two is one of speed alone."""

from __future__ import annotations

import copy
from itertools import count

import pytest
import torch
from torch import Tensor

import nextblock as nb
from benchmarks.reference_steps import plain_sample, plain_step, plain_xar, plain_xtra
from benchmarks.training_step import ours_xtra_step
from close import assert_close
from nextblock.xar.sampler import sample_latents

XTRA = {
    "image_size_px": 24, "patch_size_px": 4, "cell_size": 2, "width": 16, "depth": 2, "num_heads": 2,
    "predictor_width": 12, "predictor_depth": 2, "predictor_heads": 2, "head_hidden": 20,
}  # fmt: skip
XAR = {
    "latent_size": 8, "latent_channels": 3, "entity_size": 4, "width": 16, "depth": 3, "num_heads": 2,
    "num_classes": 5,
}  # fmt: skip
VARIANTS = [{}, {"num_lookahead": 2, "pixel_loss": "l1"}, {"normalize_targets": False, "cell_size": 3}]


def disturbed(model: torch.nn.Module) -> torch.nn.Module:
    """With biases and norms that are not what they are at the start."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def gradients_of(model: torch.nn.Module) -> torch.nn.Module:
    """The model with its gradients in place of its weights, so that the name tables lay them out too."""
    made = copy.deepcopy(model)
    for theirs, source in zip(made.parameters(), model.parameters(), strict=True):
        theirs.data = torch.zeros_like(source) if source.grad is None else source.grad
    return made


@pytest.mark.parametrize("variant", VARIANTS)
def test_xtra_has_the_same_loss_and_gradients(variant: dict) -> None:
    model = disturbed(nb.XTRA(nb.XTRAConfig(**XTRA | variant))).double()
    plain, images = plain_xtra(model), torch.randn(3, 3, 24, 24, dtype=torch.float64)
    theirs, ours = plain(images), model.loss(images)
    assert_close(theirs, ours, 1e-10)
    theirs.backward()
    ours.backward()
    wanted = plain_xtra(gradients_of(model)).state_dict()
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None, name
        assert_close(parameter.grad, wanted[name], 1e-8)


def test_a_training_step_is_the_same_step() -> None:
    torch.manual_seed(0)
    model = nb.XTRA(nb.XTRAConfig(**XTRA))
    pixels = torch.randint(0, 256, (4, 24, 24, 3), dtype=torch.uint8)
    plain, ours = plain_xtra(model), copy.deepcopy(model)
    ours_step, transformed = ours_xtra_step(ours, pixels, "cpu", precision="fp32", compiled=False)
    step = plain_step(plain, lambda: [transformed()], "cpu", optimizer={"lr": 1e-3})
    for _ in range(3):
        assert_close(step(), ours_step(), 1e-5)
    wanted = plain_xtra(ours)
    for parameter, other in zip(plain.parameters(), wanted.parameters(), strict=True):
        assert_close(parameter, other, 1e-3)


def test_xar_has_the_same_loss_and_gradients() -> None:
    config = nb.XARConfig(**XAR, dropout=0.0, attention_dropout=0.0, label_dropout=0.0)
    model = disturbed(nb.XAR(config)).double()
    plain = plain_xar(model)
    latents, labels = torch.randn(3, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 4, 5])
    times, noise = torch.rand(3, 4, dtype=torch.float64), torch.randn(3, 64, 3, dtype=torch.float64)
    theirs, ours = plain(latents, labels, times, noise), model.loss(latents, labels, times=times, noise=noise)
    assert_close(theirs, ours, 1e-9)
    theirs.backward()
    ours.backward()
    wanted = plain_xar(gradients_of(model)).state_dict()
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None, name
        assert_close(parameter.grad, wanted[name], 1e-6)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_samples_are_the_same(guidance: float) -> None:
    model = disturbed(nb.XAR(nb.XARConfig(**XAR))).double().eval()
    labels, steps = torch.tensor([1, 2, 5]), 3
    draws = [torch.randn(3, 16, 3, dtype=torch.float64) for _ in range(4 * steps)]
    theirs = plain_sample(plain_xar(model), labels, steps=steps, guidance=guidance, draws=draws)
    assert_close(theirs, sample_latents(model, labels, steps=steps, guidance=guidance, draws=draws), 1e-5)


def test_the_plain_path_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """All cells run, every layer makes its mask, and every step runs both halves."""
    from benchmarks import reference

    model = nb.XTRA(nb.XTRAConfig(**XTRA))
    plain, masks, tokens = plain_xtra(model), count(), []
    made = reference.MaskedAttention.mask

    def counted(self: reference.MaskedAttention) -> Tensor:
        next(masks)
        tokens.append(made(self).shape[0])
        return made(self)

    monkeypatch.setattr(reference.MaskedAttention, "mask", counted)
    plain(torch.randn(1, 3, 24, 24))
    assert next(masks) == model.config.depth + model.config.predictor_depth
    assert set(tokens) == {36}
    batches = []
    generator = plain_xar(nb.XAR(nb.XARConfig(**XAR)))
    generator.z_proj.register_forward_hook(lambda module, given, made: batches.append(len(given[0])))
    plain_sample(generator, torch.tensor([1, 2]), steps=2, guidance=1.0)
    assert batches == [4] * 8
