"""A training step of XTRA and of xAR: ours, the plain path, the same compiled (second), and the matmul ceiling.

    python -m benchmarks.training_step [--device cuda] [--quick]

A step is what training does with a batch that is in host memory: to the device, forward, backward, clipping, AdamW, and
for xAR an average of the weights. Ours takes uint8 images (or latents) as our loaders hand them over, with
`training.compile` where the row says so; the plain path takes float32 images, as per-sample transforms leave them.

The ceiling is one large square product in the precision of the row; its rate, divided by the floating-point operations
that the plain model needs for one image (all tokens, forward and backward; `training/flops.py`), is the limit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import Row, Target, interleaved, matmul, peak_gib, run_alone
from benchmarks.reference_steps import Precision, Step, plain_step, plain_xar, plain_xtra
from nextblock.data.preprocess import Preprocessing, normalize
from nextblock.jobs.generator_data import drawn_for
from nextblock.jobs.training_run import compile_layers
from nextblock.randomness import uniforms
from nextblock.training.activation_checkpointing import checkpoint_layers
from nextblock.training.config import TrainingConfig
from nextblock.training.ema import EMA
from nextblock.training.flops import xar_flops, xtra_flops
from nextblock.training.launch import launch
from nextblock.training.loop import Meters, clipped_update
from nextblock.training.optimizer import make_optimizer
from nextblock.training.plan import Plan
from nextblock.xar.config import XARConfig
from nextblock.xar.model import XAR
from nextblock.xtra.config import XTRAConfig
from nextblock.xtra.model import XTRA

EMA_DECAY = 0.9999
XAR_OPTIMIZER = {"lr": 4e-4, "betas": (0.9, 0.96), "weight_decay": 0.02}
QUICK_XTRA = {
    "image_size_px": 32, "patch_size_px": 4, "cell_size": 2, "width": 32, "depth": 2, "num_heads": 2,
    "predictor_width": 32, "predictor_depth": 1, "predictor_heads": 2, "head_hidden": 32, "projection_hidden": 32,
}  # fmt: skip
QUICK_XAR = {"latent_size": 8, "latent_channels": 4, "entity_size": 4, "width": 32, "depth": 2, "num_heads": 2,
             "num_classes": 10}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What one table row, or two, are measured on; `arms` beside ours and the ceiling."""

    row: Row
    preset: str
    precision: Precision
    batch: int
    arms: tuple[str, ...] = ("plain", "second")
    compiled: bool = True
    memory: Row | None = None
    checkpointing: str = "none"


def cases(device: str) -> list[Case]:
    """The rows of a device, with their targets."""

    def row(name: str, *targets: Target, unit: str = "images/s") -> Row:
        return Row(name, unit, device, targets)

    plain, second, limit = (lambda v, a=a: Target(a, ">=", v) for a in ("plain", "second", "limit"))
    if device == "cpu":
        both = (plain(1.05), second(1.05))
        return [
            Case(row("XTRA-S/16 training step, fp32", *both), "xtra_s16", "fp32", 4, compiled=False),
            Case(row("XTRA-S/16 training step, bf16", *both), "xtra_s16", "bf16", 4),
        ]
    memory = row("XTRA-B/16 training step, peak memory", Target("plain", "<=", 0.7), unit="GiB")
    name = "XTRA-B/16 training step, bf16"
    return [
        Case(row(name, plain(2.0), second(1.15), limit(0.45)), "xtra_b16", "bf16", 128, memory=memory),
        Case(row("XTRA-H/14 training step, bf16", limit(0.5)), "xtra_h14", "bf16", 64, ()),
        Case(
            row("XTRA-H/14 training step, bf16, selective checkpointing", limit(0.5)),
            "xtra_h14",
            "bf16",
            128,
            (),
            memory=row("XTRA-H/14 step, selective checkpointing, peak memory", unit="GiB"),
            checkpointing="selective",
        ),
        Case(row("xAR-B training step, bf16", plain(1.5), limit(0.4)), "xar_b", "bf16", 64),
    ]


def planned(device: str) -> list[Row]:
    """The rows of a device, not measured."""
    return [row for case in cases(device) for row in (case.row, case.memory) if row is not None]


def rows(device: str, quick: bool = False) -> list[Row]:
    """Measure all of them; `quick`: in sizes that say nothing, to see that it runs."""
    found: list[Row] = []
    for case in cases(device):
        found += measured(case, device, quick)
    return found


def measured(case: Case, device: str, quick: bool = False) -> list[Row]:
    """The rows of one case."""
    case = replace(case, batch=4, compiled=False) if quick else case
    return (XARCase if case.preset.startswith("xar") else XTRACase)(case, device, quick).rows()


class XTRACase:
    """The arms of one case, each made when it is asked for."""

    def __init__(self, case: Case, device: str, quick: bool) -> None:
        self.case, self.device, self.quick = case, device, quick
        self.config: Any = self.sizes()
        torch.manual_seed(0)
        self.make_batch()

    def sizes(self) -> Any:
        return XTRAConfig(**QUICK_XTRA) if self.quick else XTRAConfig.preset(self.case.preset)

    def make_batch(self) -> None:
        batch, channels, image = self.case.batch, self.config.channels, self.config.image
        self.pixels = pinned(torch.randint(0, 256, (batch, *image, channels), dtype=torch.uint8), self.device)
        self.images = pinned(torch.randn(batch, channels, *image), self.device)

    def ours(self) -> Step:
        model = XTRA(self.config).to(self.device)
        case = self.case
        return ours_xtra_step(
            model, self.pixels, self.device, precision=case.precision, compiled=case.compiled,
            checkpointing=case.checkpointing,
        )[0]  # fmt: skip

    def reference(self, second: bool) -> Step:
        model = plain_xtra(XTRA(self.config).to(self.device), predictor_fp32=not second)
        return self.plain_step(model, [self.images], second)

    def plain_step(self, model: torch.nn.Module, batch: list[Tensor], second: bool, **options: Any) -> Step:
        """Compiled for real, unless quick."""
        return plain_step(
            model, lambda: batch, self.device, precision=self.case.precision, second=second,
            backend="eager" if self.quick else "inductor", **options,
        )  # fmt: skip

    def flops(self) -> float:
        """Floating-point operations of one image in a forward and backward pass of the plain model."""
        return float(xtra_flops(self.config, full_sequence=True).training)

    def rows(self) -> list[Row]:
        case, device = self.case, self.device
        side = 256 if self.quick else 8192 if device == "cuda" else 2048
        ceiling, operations = matmul(side, torch.bfloat16 if case.precision == "bf16" else torch.float32, device)
        makers: dict[str, Callable[[], Step]] = {"ours": self.ours}
        makers |= {arm: lambda arm=arm: self.reference(arm == "second") for arm in case.arms}
        found = []
        if case.memory is not None and device == "cuda":
            peaks = {arm: peak_gib(make) for arm, make in makers.items()}
            found.append(replace(case.memory, **peaks, note=self.note()))
        arms: dict[str, Callable[[], object]] = {arm: make() for arm, make in makers.items()}
        arms["limit"] = ceiling
        timed = interleaved(arms, rounds=3 if self.quick else 15 if device == "cuda" else 9, warmup=2, device=device)
        amounts = dict.fromkeys(arms, float(case.batch)) | {"limit": operations / self.flops()}
        return [replace(timed.row(case.row, amounts), note=self.note()), *found]

    def note(self) -> str:
        case = self.case
        checkpointing = f", {case.checkpointing} checkpointing" if case.checkpointing != "none" else ""
        return f"batch {case.batch}" + (", layers compiled" if case.compiled else "") + checkpointing


class XARCase(XTRACase):
    """The same for a generator, on latents."""

    def sizes(self) -> XARConfig:
        return XARConfig(**QUICK_XAR) if self.quick else XARConfig.preset(self.case.preset)

    def make_batch(self) -> None:
        shape = (self.case.batch, self.config.latent_channels, *self.config.latent)
        self.latents = pinned(torch.randn(shape), self.device)
        self.labels = pinned(torch.arange(self.case.batch) % self.config.num_classes, self.device)

    def drawn(self) -> tuple[Tensor, ...]:
        """A batch with times, noise and dropped labels drawn by position, as our training draws them."""
        positions = np.arange(self.case.batch)
        dropped = torch.from_numpy(uniforms(0, "label drop", positions, 1)[:, 0] < self.config.label_dropout)
        times, noise = drawn_for(self.config, 0, positions)
        drawn = (pinned(each, self.device) for each in (times, noise, dropped))
        return tuple(each.to(self.device, non_blocking=True) for each in (self.latents, self.labels, *drawn))

    def ours(self) -> Step:
        model, case = XAR(self.config).to(self.device), self.case
        config = TrainingConfig(device=self.device, precision=case.precision, batch_size=case.batch, **XAR_OPTIMIZER)
        return ours_step(model, self.drawn, config, compiled=case.compiled, ema=EMA_DECAY)

    def reference(self, second: bool) -> Step:
        model = plain_xar(XAR(self.config).to(self.device))
        return self.plain_step(model, [self.latents, self.labels], second, optimizer=XAR_OPTIMIZER, ema=EMA_DECAY)

    def flops(self) -> float:
        return float(xar_flops(self.config).training)


def pinned(x: Tensor, device: str) -> Tensor:
    return x.pin_memory() if device == "cuda" else x


def ours_step(
    model: torch.nn.Module,
    batch: Callable[[], tuple[Any, ...]],
    config: TrainingConfig,
    *,
    compiled: bool,
    ema: float = 0.0,
) -> Step:
    """One step as `training.loop` takes it; `batch` gives what the model is called with, on the device."""
    fabric = launch(config)
    checkpoint_layers(model, config.activation_checkpointing)
    if compiled:
        compile_layers(model)
    wrapped = fabric.setup_module(model)
    optimizer: Any = fabric.setup_optimizers(make_optimizer(model, config))
    plan, meters, average = Plan(config.batch_size * 1000, config), Meters.zeros(fabric.device), None
    if ema:
        average = EMA(model, ema)
    wrapped.train()

    def step() -> Tensor:
        with fabric.autocast():
            loss = wrapped(*batch())
        fabric.backward(loss)
        norm, good = clipped_update(fabric, wrapped, optimizer, loss, plan, 0)
        if average is not None:
            average.update(good)
        optimizer.zero_grad(set_to_none=True)
        meters.update(0, loss.detach(), norm, good)
        return loss.detach()

    return step


def ours_xtra_step(
    model: XTRA, pixels: Tensor, device: str, *, precision: Precision, compiled: bool, checkpointing: str = "none"
) -> tuple[Step, Callable[[], Tensor]]:
    """Our step on uint8 images [B, H, W, C] in host memory, and a function that gives the same images as float32."""
    preprocessing = Preprocessing(size_px=model.config.image)
    flip = torch.zeros(len(pixels), dtype=torch.bool)

    def images() -> tuple[Tensor]:
        return (normalize(pixels.to(device, non_blocking=True), flip.to(device), preprocessing),)

    config = TrainingConfig(
        device=device, precision=precision, batch_size=len(pixels), lr=1e-3, warmup_epochs=0, compile=compiled,
        activation_checkpointing=checkpointing,
    )  # fmt: skip
    return ours_step(model, images, config, compiled=compiled), lambda: images()[0]


if __name__ == "__main__":
    run_alone(__doc__, rows, devices=True)
