"""What a probe trains: the grid of heads, the images' augmentation, the protocol."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Literal

from nextblock.errors import ConfigError
from nextblock.evaluation.probe import HeadSpec
from nextblock.xtra.classifier import LayerMean
from nextblock.xtra.heads import HeadKind

LRS = (1e-4, 3e-4, 5e-4, 1e-3, 1.5e-3, 2e-3, 4e-3, 8e-3, 1e-2)
PUBLISHED_RANDAUGMENT = "rand-m9-mstd0.5-inc1"


@dataclass(frozen=True)
class ProbeConfig:
    """A grid of heads and how they are trained. Defaults are the official XTRA probes; 0 and empty are chosen.

    Attributes:
        heads: kinds, "linear" and "attentive".
        lrs: learning rates, absolute; empty = the data set's own grid, else nine from 1e-4 to 1e-2.
        weight_decays: one or several; biases are not decayed.
        linear_layers: linear heads read the mean of so many last layers, before the final norm; each is a head.
        attentive_layers: the same for attentive heads.
        each_layer: also a head on each single layer, for the accuracy by layer.
        attention: "causal" (the block-causal mask stays, as published), "bidirectional", or "both" side by side.
        num_heads: attention heads of an attentive head.
        num_queries: of an attentive head; several are averaged.
        label_smoothing: of the cross entropy.
        augment: "published" (RandAugment, random erasing, crop, flip), "flip" (crop and flip), "none" (evaluation
            view; features are computed once and kept on disk) or "auto" (published; on a CPU: none).
        crop_scale: share of the image's area that a training crop covers, where there is one.
        crop_ratio: width / height of that crop.
        epochs: passes over the training images.
        warmup_epochs: linear rise to the peak learning rates; -1 = the data set's own, else 0.
        batch_size: images per step; 0 = the data set's own, else 512, never more than there are.
        per_device_batch: most images that go through the heads at once, and that BatchNorm sees; the rest of a batch
            is accumulated. 0 = 1024, as published.
        clip_grad_norm: largest gradient norm of each head; 0 = no clipping.
        betas: of AdamW.
        select: "validation" (the best head on a held-out part of the training images) or "test" (the best on the
            test images, as the papers' codes do: optimistic, and labelled so).
        val_fraction: of the training images, held out class by class; not used with select "test".
        few_shot: train on so many images per class; 0 = all.
        evaluate_every_epochs: 0 = ten times.
        cache: folder of kept features; empty = $NEXTBLOCK_CACHE or ~/.cache/nextblock.
        cache_gb: most gigabytes to write for one set of images.
        train_split: of the data, where it is not the usual one; "train+val" joins two.
        test_split: the same for the test images.
        image_column: of tables.
        label_column: of tables; "label" when left out.
        test_fraction: held out for the test where the data have no split of their own.
        max_bad_fraction: a probe stops when more than max(10, this fraction) distinct images are broken.
        workers: loading processes; -1 = chosen from the cores.
        timeout_s: longest wait for a worker to read one sample, in seconds.
        checkpoint_every_minutes: for --resume.
        precision: of encoder and heads: "auto" (bf16 on CUDA, else fp32), "fp32" or "bf16".
        device: "auto", "cpu" or "cuda".
        devices: how many, where torchrun or srun does not say it; BatchNorm then sees the share of the batch that
            its device has.
        seed: of everything drawn.
    """

    heads: tuple[HeadKind, ...] = ("linear", "attentive")
    lrs: tuple[float, ...] = ()
    weight_decays: tuple[float, ...] = (0.1,)
    linear_layers: tuple[int, ...] = (1,)
    attentive_layers: tuple[int, ...] = (6,)
    each_layer: bool = False
    attention: Literal["causal", "bidirectional", "both"] = "causal"
    num_heads: int = 16
    num_queries: int = 1
    label_smoothing: float = 0.0
    augment: Literal["auto", "published", "flip", "none"] = "auto"
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    epochs: float = 100.0
    warmup_epochs: float = -1.0
    batch_size: int = 0
    per_device_batch: int = 0
    clip_grad_norm: float = 3.0
    betas: tuple[float, float] = (0.9, 0.95)
    select: Literal["validation", "test"] = "validation"
    val_fraction: float = 0.1
    few_shot: int = 0
    evaluate_every_epochs: float = 0.0
    cache: str = ""
    cache_gb: float = 20.0
    train_split: str | None = None
    test_split: str | None = None
    image_column: str = "image"
    label_column: str | None = None
    test_fraction: float = 0.2
    max_bad_fraction: float = 0.001
    workers: int = -1
    timeout_s: float = 25.0
    checkpoint_every_minutes: float = 10.0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    devices: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("heads", "weight_decays"):
            if not getattr(self, name):
                raise ConfigError(f"probe.{name} must name at least one.")
        for name in ("linear_layers", "attentive_layers"):
            kind = name.removesuffix("_layers")
            if not getattr(self, name) and kind in self.heads and not self.each_layer:
                raise ConfigError(f"probe.{name} must name at least one.")
            if any(count < 1 for count in getattr(self, name)):
                raise ConfigError(f"probe.{name} are counts of layers, 1 or more; got {getattr(self, name)}.")
        if any(lr <= 0 for lr in self.lrs) or any(decay < 0 for decay in self.weight_decays):
            raise ConfigError(f"probe.lrs must be above 0 and weight_decays 0 or more; got {self.lrs}, "
                              f"{self.weight_decays}.")  # fmt: skip
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"probe.label_smoothing must be in [0, 1); got {self.label_smoothing}.")
        if not 0 < self.val_fraction < 1:
            raise ConfigError(f"probe.val_fraction must lie between 0 and 1; got {self.val_fraction}.")
        for name in ("batch_size", "per_device_batch", "few_shot", "evaluate_every_epochs", "clip_grad_norm"):
            if getattr(self, name) < 0:
                raise ConfigError(f"probe.{name} must be 0 or more; got {getattr(self, name)}.")
        if self.epochs <= 0:
            raise ConfigError(f"probe.epochs must be above 0; got {self.epochs}.")

    def specs(self, depth: int) -> list[HeadSpec]:
        """The grid, for an encoder of so many layers. Raises ConfigError when it has fewer than asked for."""
        found: dict[HeadSpec, None] = {}
        attentions = {"causal": [False], "bidirectional": [True], "both": [False, True]}[self.attention]
        for kind, bidirectional in itertools.product(self.heads, attentions):
            counts = self.linear_layers if kind == "linear" else self.attentive_layers
            layers = [LayerMean.of_last(count, depth, bidirectional) for count in counts]
            if self.each_layer:
                layers += [LayerMean(layer, layer, bidirectional) for layer in range(1, depth + 1)]
            for each, decay, lr in itertools.product(layers, self.weight_decays, self.lrs or LRS):
                found[HeadSpec(kind, lr, decay, each)] = None
        return list(found)

    def fitted(self, depth: int, width: int) -> ProbeConfig:
        """The defaults made to fit a small encoder; what somebody asked for stays, and may then not fit."""
        default = ProbeConfig()
        changes: dict[str, object] = {}
        if self.attentive_layers == default.attentive_layers and depth < 6:
            changes["attentive_layers"] = (depth,)
        if self.num_heads == default.num_heads and width % self.num_heads:
            changes["num_heads"] = max(n for n in range(1, self.num_heads + 1) if width % n == 0)
        return replace(self, **changes) if changes else self  # type: ignore[arg-type]
