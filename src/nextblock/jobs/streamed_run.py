"""Pre-training on a data set that is streamed: where each process is in its part is in the checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Never

import torch
import torch.distributed as dist
from rich.console import Console

from nextblock.data.decoders import chosen_decoder
from nextblock.data.sources import Source
from nextblock.data.sources.streamed import Glimpse, StreamedImages, absolute
from nextblock.data.stream import Batch
from nextblock.data.streaming import StreamingBatches
from nextblock.errors import ConfigError, DataError
from nextblock.jobs.run import Run, open_train
from nextblock.jobs.training_run import Look
from nextblock.recipes.config import PretrainConfig
from nextblock.training.launch import Fabric
from nextblock.training.run_record import read_environment


class StreamedRun(Run):
    """One run of `nextblock pretrain` on a stream. It goes on with the same number of processes and workers only.

    An epoch is `data.length` images. What is looked at while it trains is looked at on the validation images alone.
    """

    images: StreamedImages
    reading: StreamingBatches

    def open_train(self, objects: Mapping[str, Any]) -> Source:
        self.images, glimpse = _opened(self.config, objects)
        return glimpse

    def make_stream(self) -> _Gone:
        return _Gone()

    def data_record(self) -> dict[str, Any]:
        return super().data_record() | {"revision": self.images.revision}

    def check_record(self, folder: Path) -> None:
        super().check_record(folder)
        before = read_environment(folder, "data")["data"].get("revision")
        if before != self.images.revision:
            self.say(
                f"{self.images.title} is of revision {self.images.revision} now, of {before} when the run began: it "
                "goes on exactly if the files are unchanged."
            )

    def start_extras(self, state: dict[str, Any] | None) -> None:
        done = 0 if state is None else int(state["step"])
        if done == self.plan.total_steps:  # nothing is read any more
            return
        config, plan = self.config, self.plan
        self.reading = StreamingBatches(
            self.images, plan.batches(done), seed=config.training.seed, crop=config.data.crop(config.model),
            preprocessing=self.preprocessing, workers=self.workers(), rank=plan.rank, world=plan.world,
            decoder=chosen_decoder(config.data.decoder), state=None if state is None else state["streamed"],
            pin_memory=self.fabric.device.type == "cuda", timeout_s=self.settings().timeout_s,
            passes=len(plan.micro_batches(0)),
        )  # fmt: skip
        if state is None:
            self._tell_shares()

    def _tell_shares(self) -> None:
        """Say so when every loading process has to read all, to take its part."""
        parts, files = self.plan.world * max(1, self.workers()), self.images.shards
        if files % parts:
            self.say(
                f"{files} file{'' if files == 1 else 's'} cannot be shared evenly by {parts} loading processes, so "
                f"each reads everything and takes one image of {parts}. It is faster where workers × processes divide "
                "the number of files: set data.workers."
            )

    def batches(self, start: int) -> Iterator[Any]:
        return self.reading

    def extra_state(self) -> dict[str, Any]:
        """Rank -> where it is; the same on every process."""
        everyone: list[Any] = [self.reading.state_dict()]
        if self.plan.world > 1:
            own, everyone = everyone[0], [None] * self.plan.world
            dist.all_gather_object(everyone, own)
        return {"streamed": dict(enumerate(everyone))}

    def measured(self, positions: Sequence[int]) -> Batch:
        """Of black images: what is read of a stream is trained on."""
        count, channels = len(positions), self.preprocessing.channels
        return Batch(
            images=torch.zeros(count, *self.preprocessing.size_px, channels, dtype=torch.uint8),
            labels=torch.full((count,), -1),
            flip=torch.zeros(count, dtype=torch.bool),
            positions=torch.tensor(positions),
            indices=torch.tensor(positions),
            bad=[],
        )

    def watch(self, folder: Path) -> Look:
        if self.val is not None:
            return super().watch(folder)
        self.say(
            "nothing but the loss is measured while training: a stream has no images to look at twice. Set data.val, "
            "which may be any other source of images, to watch validation loss, kNN and pictures."
        )
        return lambda done: {}


class _Gone:
    """Where other runs have a stream whose batches can be read again."""

    def load(self, positions: Sequence[int]) -> Never:
        raise DataError("a streamed image is not read twice.")


def run_on(config: PretrainConfig, fabric: Fabric, objects: Mapping[str, Any], console: Console) -> Run:
    """The run on what the configuration names, a stream or a source."""
    data = dataclasses.replace(config.data, train=absolute(config.data.train))
    config = dataclasses.replace(config, data=data)
    kind = StreamedRun if config.data.is_streamed(objects) else Run
    return kind(config, fabric, dict(objects), console)


def images_of(config: PretrainConfig, objects: Mapping[str, Any]) -> Source:
    """The training images, to choose a recipe by; of a stream the first ones."""
    return _opened(config, objects)[1] if config.data.is_streamed(objects) else open_train(config, objects)


def _opened(config: PretrainConfig, objects: Mapping[str, Any]) -> tuple[StreamedImages, Glimpse]:
    images, length = config.data.open_stream(objects), config.data.length
    if not length:
        raise ConfigError(
            f"{images.title} is a stream, whose images cannot be counted: set data.length to how many make an epoch."
        )
    return images, Glimpse(images, length)
