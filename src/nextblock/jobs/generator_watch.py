"""What is looked at while a generator trains: validation loss and samples, of the weights and of their average."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nextblock.data.preprocess import denormalize
from nextblock.errors import NextblockError
from nextblock.evaluation.inference import device_of, inference
from nextblock.figures.samples import contact_sheet
from nextblock.jobs.generator_data import drawn_for
from nextblock.jobs.opening_generator import open_decoder
from nextblock.jobs.sample_images import DECODED_AT_ONCE
from nextblock.vae import Autoencoder, Pixels
from nextblock.xar.sampler import sample_latents

if TYPE_CHECKING:
    from nextblock.jobs.generator_run import GeneratorRun

BATCH = 125


class GeneratorWatch:
    """Call it with the number of steps done; it returns columns for metrics.csv and writes pictures.

    What cannot be measured or drawn is told once and left out: looking never ends a run.
    """

    def __init__(self, run: GeneratorRun, folder: Path) -> None:
        self.run, self.folder, self.config = run, folder, run.config.watch
        self.bf16 = run.config.training.precision != "fp32"
        self.told: set[str] = set()
        self.decoder: Autoencoder | Pixels | None = None

    def __call__(self, done: int) -> dict[str, float]:
        row: dict[str, float] = {}
        sides = {"raw": nullcontext()} | ({"ema": self.run.ema.swapped()} if self.run.ema else {})
        for weights, swapped in sides.items():
            with swapped:
                with self._told():
                    if self.run.val:
                        row["val_loss" if weights == "raw" else "ema_val_loss"] = self._loss()
                with self._told():
                    if self.config.pictures:
                        self._draw(self.folder / "figures" / f"samples-{weights}-step-{done:08d}.png")
        return row

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (NextblockError, OSError, RuntimeError) as error:  # RuntimeError: a device's memory may be full
            if str(error) not in self.told:
                self.run.say(f"not looked at while training: {error}")
                self.told.add(str(error))

    def _loss(self) -> float:
        """Mean over the watched validation images, with the same times and noise every time, nothing dropped."""
        run, val, device = self.run, self.run.val, device_of(self.run.model)
        assert val is not None
        seed, total = run.config.training.seed, torch.zeros((), device=device)
        # The first images of the stream's first epoch: a fixed random choice.
        count = min(len(val), self.config.max_images)
        for start in range(0, count, BATCH):
            batch = val.stream.load(range(start, min(count, start + BATCH))).to(device)
            times, noise = drawn_for(run.config.model, seed, batch.positions.numpy(), "validation ")
            labels = batch.labels if run.config.model.num_classes else None
            with inference(run.model, bf16=self.bf16):
                loss = run.model.loss(
                    val.latents(batch),
                    labels,
                    times=times.to(device),
                    noise=noise.to(device),
                )
            total += loss * len(batch)
        return float(total) / max(1, count)

    def _draw(self, path: Path) -> None:
        run, config, device = self.run, self.config, device_of(self.run.model)
        if self.decoder is None:
            self.decoder = open_decoder(run.data.vae, config.vae).to(device)
        classes = run.data.classes
        chosen = _in_turn(config.pictures, len(classes))
        labels = torch.tensor(chosen, device=device) if classes else None
        # One entity after the other has ever other shapes, for each of which compiled layers would be compiled anew.
        with inference(run.model, bf16=self.bf16), torch.compiler.set_stance("force_eager"):
            latents = sample_latents(
                run.model, labels, count=None if classes else config.pictures, steps=config.steps, solver=config.solver,
                guidance=config.guidance if classes else 1.0, seed=run.config.training.seed,
            )  # fmt: skip
        with torch.no_grad():
            images = torch.cat([self.decoder.decode(part) for part in torch.split(latents, DECODED_AT_ONCE)])
        contact_sheet(
            denormalize(images, run.data.preprocessing).cpu().numpy(),
            [classes[number] for number in chosen] if classes else [], path,
        )  # fmt: skip


def _in_turn(count: int, classes: int) -> list[int]:
    """A class for each of `count` pictures: one after the other, or evenly spaced where there are more of them."""
    return [i * classes // count if count < classes else i % max(1, classes) for i in range(count)]
