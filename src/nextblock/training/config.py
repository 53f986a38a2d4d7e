"""How a run trains: length, batch, learning rate, precision, intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from nextblock.errors import ConfigError, nearest

CHECKPOINTING = ("none", "selective", "full")
CHOICES = {
    "lr_scaling": ("sqrt", "linear", "none"), "precision": ("auto", "fp32", "bf16"),
    "activation_checkpointing": CHECKPOINTING, "device": ("auto", "cpu", "cuda"),
}  # fmt: skip


@dataclass(frozen=True)
class TrainingConfig:
    """Optimisation and bookkeeping of one run; every length is derived from `epochs`.

    Attributes:
        epochs: passes over the training images; a fraction is allowed.
        batch_size: global: images per optimiser step over all devices.
        per_device_batch: most images in one forward pass on one device; the rest is accumulated. 0 = no limit.
        lr: peak learning rate at a batch of `lr_at_batch`.
        lr_at_batch: the batch that `lr` belongs to; 0 = the run's own batch, nothing is scaled.
        lr_scaling: how the rate changes when batch_size differs: "sqrt" (for Adam, arXiv 2205.10287), "linear"
            or "none".
        warmup_epochs: linear rise to the peak; at most a fifth of a run (a shorter run shortens it); none
            where it would be shorter than a step.
        warmup_start: first learning rate as a fraction of the peak.
        decay_from: where the cosine begins, as a fraction of the run; until then the rate stays at its peak. 0 = at
            the end of the warm-up, 1 = never.
        final: last learning rate of the cosine as a fraction of the peak.
        weight_decay: for matrices and position embeddings; biases and norms are not decayed.
        betas: of AdamW.
        clip_grad_norm: largest norm of the whole gradient; 0 = no clipping.
        precision: "auto" (bf16 autocast on CUDA, else fp32), "fp32" or "bf16".
        compile: compile the transformer layers with torch.compile.
        activation_checkpointing: what the layers compute again in the backward pass, instead of keeping it: "none",
            "selective" (all but products and attention) or "full" (all). Less memory for more time; the same numbers.
        seed: of everything drawn in the run.
        device: "auto", "cpu" or "cuda".
        devices: number of devices or processes on this machine; 0 = all. Under torchrun or srun leave 1: as many as it
            started.
        nodes: machines.
        log_every_steps: 0 = about two hundred times in the run, at most every 50 steps.
        checkpoint_every_steps: 0 = by time only.
        checkpoint_every_minutes: looked at when logging.
        keep_checkpoints: how many of the newest to keep.
        max_nonfinite_steps: the run stops after so many skipped steps in a row.
    """

    epochs: float = 100.0
    batch_size: int = 256
    per_device_batch: int = 0
    lr: float = 1e-3
    lr_at_batch: int = 0
    lr_scaling: Literal["sqrt", "linear", "none"] = "sqrt"
    warmup_epochs: float = 10.0
    warmup_start: float = 0.1
    decay_from: float = 0.0
    final: float = 0.001
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    clip_grad_norm: float = 1.0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool = False
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    devices: int = 1
    nodes: int = 1
    log_every_steps: int = 0
    checkpoint_every_steps: int = 0
    checkpoint_every_minutes: float = 10.0
    keep_checkpoints: int = 2
    max_nonfinite_steps: int = 10

    def __post_init__(self) -> None:
        above = ("epochs", "batch_size", "lr", "nodes", "keep_checkpoints", "max_nonfinite_steps")
        zero_or_more = (
            "per_device_batch", "lr_at_batch", "warmup_epochs", "weight_decay", "clip_grad_norm", "devices",
            "log_every_steps", "checkpoint_every_steps", "checkpoint_every_minutes",
        )  # fmt: skip
        for name in above:
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"training.{name} must be above 0; got {getattr(self, name)!r}.")
        for name in zero_or_more:
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"training.{name} must be 0 or more; got {getattr(self, name)!r}.")
        for name in ("warmup_start", "final"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"training.{name} is a fraction of lr, from 0 to 1; got {getattr(self, name)!r}.")
        for name, known in CHOICES.items():
            if (given := getattr(self, name)) not in known:
                hint = nearest(str(given), known)
                raise ConfigError(f"training.{name} must be {', '.join(known)}; got {given!r}.{hint}")
        if not 0 <= self.decay_from <= 1:
            raise ConfigError(f"training.decay_from is a fraction of the run, from 0 to 1; got {self.decay_from!r}.")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"training.betas must be two numbers in [0, 1); got {self.betas!r}.")

    @property
    def peak_lr(self) -> float:
        """`lr` scaled from `lr_at_batch` to `batch_size` by `lr_scaling`."""
        factor = self.batch_size / (self.lr_at_batch or self.batch_size)
        return self.lr * {"sqrt": math.sqrt(factor), "linear": factor, "none": 1.0}[self.lr_scaling]
