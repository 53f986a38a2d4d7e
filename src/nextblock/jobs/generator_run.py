"""One training of a generator: its configured parts, put together and trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from nextblock.checkpoints.pretrained import save_pretrained
from nextblock.jobs.generator_card import generator_card
from nextblock.jobs.generator_data import Material, drawn_for, learned_from, watched_with
from nextblock.jobs.generator_watch import GeneratorWatch
from nextblock.jobs.training_run import TrainingRun
from nextblock.jobs.watch import draw_curves_of
from nextblock.randomness import key, uniforms
from nextblock.recipes.generator import GeneratorConfig
from nextblock.training.ema import EMA
from nextblock.training.launch import Fabric
from nextblock.training.loop import Loss, Update, clipped_update
from nextblock.training.plan import Plan
from nextblock.training.run_folder import COLUMNS
from nextblock.xar.model import XAR

METRICS = (*(name for name in COLUMNS if name not in ("knn", "effective_rank")), "ema_val_loss")


class GeneratorRun(TrainingRun):
    """One run of `nextblock train-generator`."""

    verb = "train-generator"
    columns = METRICS
    config: GeneratorConfig
    model: XAR

    def __init__(
        self,
        config: GeneratorConfig,
        fabric: Fabric,
        train: Material,
        val: Material | None,
        console: Console,
        *,
        in_memory: bool = False,
    ) -> None:
        super().__init__(fabric, console)
        self.config, self.in_memory = config, in_memory
        self.data = learned_from(config, train)
        self.val = None if val is None else watched_with(config, val, self.data)
        self.stream = self.data.stream
        self.plan = Plan(len(self.data), config.training, fabric.global_rank, fabric.world_size)
        torch.manual_seed(key(config.training.seed, "initial weights") >> 1)
        self.model = XAR(config.model)
        self.ema: EMA | None = None

    @property
    def about(self) -> dict[str, Any]:
        """What an exported folder says under "generator": space, classes, size."""
        size_px = self.data.preprocessing.size_px
        return {
            "vae": self.data.vae,
            "classes": self.data.classes,
            "image_size_px": list(size_px),
            "channels": self.data.preprocessing.channels,
        }

    def data_record(self) -> dict[str, Any]:
        return self.data.record()

    def write_manifest(self, file: Path) -> None:
        self.data.write_manifest(file)

    def what_changed(self, file: Path) -> str:
        return self.data.what_changed(file)

    def more_record(self) -> dict[str, Any]:
        return {"generator": self.about | {"preprocessing": self.data.preprocessing.to_dict()}}

    def start_extras(self, state: dict[str, Any] | None) -> None:
        if self.config.training.ema_decay:
            self.ema = EMA(self.model, self.config.training.ema_decay)
            if state is not None:
                self.ema.load(state["ema"])

    def extra_state(self) -> dict[str, Any]:
        return {"ema": self.ema.state()} if self.ema else {}

    def updater(self) -> Update | None:
        """The usual step, followed by the average of the weights."""
        ema = self.ema
        if ema is None:
            return None

        def update(
            fabric: Fabric, model: nn.Module, optimizer: Any, loss: Tensor, plan: Plan, step: int
        ) -> tuple[Tensor, Tensor]:
            norm, good = clipped_update(fabric, model, optimizer, loss, plan, step)
            ema.update(good)
            return norm, good

        return update

    def loss(self) -> Loss:
        """The loss of a batch; times, noise and which labels are dropped are functions of (seed, position)."""
        config, seed, data = self.config.model, self.config.training.seed, self.data

        def loss_of(model: nn.Module, batch: Any, step: int) -> Tensor:
            latents, labels, drawn = data.latents(batch), None, drawn_for(config, seed, batch.positions.numpy())
            dropped = None
            if config.num_classes:
                labels = batch.labels
                lots = uniforms(seed, "label drop", batch.positions.numpy(), 1)[:, 0]
                dropped = _moved(torch.from_numpy(lots < config.label_dropout), latents.device)
            times, noise = (_moved(each, latents.device) for each in drawn)
            loss: Tensor = model(latents, labels, times, noise, dropped)
            return loss

        return loss_of

    def watch(self, folder: Path) -> GeneratorWatch:
        return GeneratorWatch(self, folder)

    def finish(self, folder: Path) -> None:
        """Draw the curves and export the last weights and the averaged ones, with which the run is finished."""
        if not self.fabric.is_global_zero:
            return
        draw_curves_of(folder, self.say)
        exported = {"exported": "ema" if self.ema else "raw"} | ({"exported_raw": "raw"} if self.ema else {})
        for name, weights in reversed(exported.items()):  # "exported" last: with it the run is finished
            if self.ema and weights == "ema":
                with self.ema.swapped():
                    self._export(folder, name, weights)
            else:
                self._export(folder, name, weights)
        self.say(f"run folder: {folder}")
        self.say(
            f"weights:    {folder / 'exported'}" + (" (averaged; the last ones: exported_raw)" if self.ema else "")
        )
        self.say(f"pictures:   {folder / 'figures'}")

    def _export(self, folder: Path, name: str, weights: str) -> None:
        card = generator_card(self.config, folder, self.data, weights, self.plan)
        about = {"generator": self.about | {"weights": weights}}
        save_pretrained(folder / name, self.model, self.data.preprocessing.to_dict(), card, about)


def _moved(drawn: Tensor, device: torch.device) -> Tensor:
    """On the device; from page-locked memory, as otherwise the host would wait for the copy."""
    return drawn.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else drawn
