"""One pre-training run: its configured parts, put together and trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from nextblock.checkpoints.pretrained import save_pretrained
from nextblock.data.decoders import chosen_decoder
from nextblock.data.preprocess import normalize
from nextblock.data.sources import Source, explain_change, write_manifest
from nextblock.data.stream import Batch, TrainingStream
from nextblock.errors import ConfigError
from nextblock.jobs.card import model_card
from nextblock.jobs.record import described
from nextblock.jobs.training_run import Look, Trained, TrainingRun, compile_layers
from nextblock.jobs.watch import Watch, draw_curves_of
from nextblock.randomness import hashed, key, uniforms
from nextblock.recipes.config import PretrainConfig
from nextblock.training.launch import Fabric
from nextblock.training.loop import Loss
from nextblock.training.plan import Plan
from nextblock.xtra.model import XTRA

__all__ = ["Pretrained", "Run", "compile_layers", "open_train", "open_val"]

Pretrained = Trained


class Run(TrainingRun):
    """One run of `nextblock pretrain`."""

    verb = "pretrain"
    config: PretrainConfig
    model: XTRA

    def __init__(self, config: PretrainConfig, fabric: Fabric, objects: dict[str, Any], console: Console) -> None:
        super().__init__(fabric, console)
        self.config = config
        self.source = self.open_train(objects)
        self.val = open_val(config, objects)
        self.in_memory = "train" in objects
        self.preprocessing = config.data.preprocessing(config.model)
        self.stream = self.make_stream()
        self.plan = Plan(len(self.source), config.training, fabric.global_rank, fabric.world_size)
        torch.manual_seed(key(config.training.seed, "initial weights") >> 1)
        self.model = XTRA(config.model)

    def open_train(self, objects: Mapping[str, Any]) -> Source:
        """The training images."""
        return open_train(self.config, objects)

    def make_stream(self) -> Any:
        """What is seen of them."""
        data, seed = self.config.data, self.config.training.seed
        crop, decoder = data.crop(self.config.model), chosen_decoder(data.decoder)
        return TrainingStream(self.source, seed, crop, self.preprocessing, decoder=decoder)

    def data_record(self) -> dict[str, Any]:
        return described(self.source)

    def write_manifest(self, file: Path) -> None:
        write_manifest(self.source, file)

    def what_changed(self, file: Path) -> str:
        return explain_change(file, self.source)

    def loss(self) -> Loss:
        """The loss of a batch, with drop path drawn from (seed, position) and the order from (seed, step)."""
        config, preprocessing, seed = self.config.model, self.preprocessing, self.config.training.seed
        orders = len(self.model.orderings)

        def loss_of(model: nn.Module, batch: Batch, step: int) -> Tensor:
            images = normalize(batch.images, batch.flip, preprocessing)
            drawn = None
            if config.drop_path:
                numbers = uniforms(seed, "drop path", batch.positions.numpy(), 2 * config.depth)
                drawn = torch.from_numpy(numbers).float().view(-1, config.depth, 2)
                drawn = drawn.to(images.device, non_blocking=True)
            loss: Tensor = model(images, int(hashed(seed, "order", step)) % orders, drawn)
            return loss

        return loss_of

    def watch(self, folder: Path) -> Look:
        return Watch(
            self.model, self.preprocessing, self.config.watch, self.source, self.val, folder,
            self.config.training.seed, self.say,
        )  # fmt: skip

    def finish(self, folder: Path) -> None:
        """Draw the curves and export the weights, with which the run is finished."""
        if not self.fabric.is_global_zero:
            return
        draw_curves_of(folder, self.say)
        card = model_card(self.config, folder, self.source.description, self.plan)
        save_pretrained(folder / "exported", self.model, self.preprocessing.to_dict(), card)
        self.say(f"run folder: {folder}")
        self.say(f"weights:    {folder / 'exported'}")
        self.say(f"pictures:   {folder / 'figures'}")


def open_train(config: PretrainConfig, objects: Mapping[str, Any]) -> Source:
    source = config.data.open("train", objects)
    if source is None:
        raise ConfigError("No images to train on. Give a folder, Parquet files or hf:NAME with --data.train PATH.")
    if config.data.length:
        raise ConfigError(f"data.length is for streams; {source.description} are counted. Leave it out.")
    return source


def open_val(config: PretrainConfig, objects: Mapping[str, Any]) -> Source | None:
    return config.data.open("val", objects)
