"""Training and sampling with the plain models of `reference.py` and `reference_xar.py`.

The plain training step: eager, gradients clipped to a norm of 1 by PyTorch's own function, the default AdamW (not
fused), the loss read by the host at every step, an average of the weights one parameter after the other (xAR). The
second reference is the same with `torch.compile`, the fused AdamW and the given precision throughout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.reference import PlainXTRA
from benchmarks.reference_xar import PlainXAR
from nextblock.checkpoints.recognise import official_tensors
from nextblock.xar.model import XAR
from nextblock.xtra.model import XTRA

Precision = Literal["fp32", "bf16"]
Step = Callable[[], Tensor]


def plain_xtra(model: XTRA, *, predictor_fp32: bool = True) -> PlainXTRA:
    """The plain model with the weights of ours, on the same device."""
    made = PlainXTRA(model.config, predictor_fp32=predictor_fp32).to(model.encoder.position)
    made.load_state_dict(official_tensors(model, {}))
    return made


def plain_xar(model: XAR) -> PlainXAR:
    """The plain model with the weights of ours, on the same device."""
    made = PlainXAR(model.config).to(model.position1)
    made.load_state_dict(official_tensors(model, {"buffers": False}))
    return made


def plain_step(
    model: nn.Module,
    batch: Callable[[], Sequence[Tensor]],
    device: str,
    *,
    precision: Precision = "fp32",
    second: bool = False,
    optimizer: Mapping[str, Any] | None = None,
    ema: float = 0.0,
    backend: str = "inductor",
) -> Step:
    """One training step of a plain model, as a function that returns the loss.

    Args:
        batch: what the model is called with, in host memory; float32, as per-sample transforms leave it.
        precision: of the forward pass, by autocast.
        second: the second reference, see above.
        optimizer: of AdamW: lr, betas, weight_decay (not for biases and other one-dimensional parameters).
        ema: decay of the average of the weights; 0 = none.
        backend: of torch.compile, for the second reference.
    """
    options = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.05} | dict(optimizer or {})
    kept = [p for p in model.parameters() if p.ndim <= 1]
    decayed = [p for p in model.parameters() if p.ndim > 1]
    groups = [{"params": decayed}, {"params": kept, "weight_decay": 0.0}]
    stepper = torch.optim.AdamW(groups, **options, **({"fused": True} if second else {}))
    forward = torch.compile(model, backend=backend) if second else model
    average = [p.detach().clone() for p in model.parameters()] if ema else []
    model.train()

    def step() -> Tensor:
        given = [x.to(device, non_blocking=True) for x in batch()]
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            loss = forward(*given)
        stepper.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        stepper.step()
        for mean, parameter in zip(average, model.parameters(), strict=False):
            mean.mul_(ema).add_(parameter.detach(), alpha=1 - ema)
        if not second and not math.isfinite(loss.item()):  # paper code reads the loss at every step
            raise RuntimeError(f"the loss of the plain path is {loss.item()}")
        return loss.detach()

    return step


@torch.no_grad()
def plain_sample(
    model: PlainXAR,
    labels: Tensor,
    *,
    steps: int,
    guidance: float,
    draws: Sequence[Tensor] | None = None,
) -> Tensor:
    """Latents [B, C, H, W] float32, by Euler-Maruyama with float64 state (xAR, arXiv 2502.20388, section 3.3).

    The batch is doubled for guidance always, also where its scale is 1; a finished entity is read again together with
    the first step of the next one. `draws`: all Gaussian numbers in the order of use, each [B, K, C·p·p].
    """
    model.eval()
    model.forget()
    device, config = labels.device, model.config
    entities, size = model.entities, model.size
    given = iter(draws or ())

    def gaussian() -> Tensor:
        shape = (len(labels), size, config.token_channels)
        return (next(given) if draws else torch.randn(shape, device=device)).to(device).double()

    both = torch.cat((labels, torch.full_like(labels, config.num_classes)))
    times = [*torch.linspace(1.0, 0.04, steps, dtype=torch.float64).tolist(), 0.0]
    done: list[Tensor] = []
    for entity in range(entities):
        scale = 1 + (guidance - 1) * entity / max(1, entities - 1) if entities > 1 else guidance
        x = gaussian()
        for i, (t, after) in enumerate(pairwise(times)):
            before = done[-1:] if i == 0 else []
            v = _guided(model, torch.cat((*before, x), 1), t, both, entity, bool(before), size, scale)
            w = 2 * t
            score = -(x + (1 - t) * v) / t
            x = x + (after - t) * (v - 0.5 * w * score)
            if after > 0:
                x = x + math.sqrt(w * (t - after)) * gaussian()
        done.append(x)
    model.forget()
    return model.latents(torch.cat(done, 1)).float()


def _guided(
    model: PlainXAR, x: Tensor, t: float, labels: Tensor, entity: int, with_last: bool, size: int, scale: float
) -> Tensor:
    """The guided velocity of the newest entity; with the finished one before it, which is then remembered."""
    shown = range(entity - 1, entity + 1) if with_last else range(entity, entity + 1)
    times = torch.tensor([0.0, t] if with_last else [t], device=x.device).expand(len(labels), -1)
    doubled = torch.cat((x, x)).to(model.z_proj.weight.dtype)
    found = model.velocities(doubled, times, labels, shown, kept=size if with_last else 0, sampling=True)
    with_class, without = found[:, -size:].double().chunk(2)
    return without + scale * (with_class - without)
