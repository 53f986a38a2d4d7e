"""One sampling job: batches of fixed image numbers, dealt to processes, until every image is there."""

from __future__ import annotations

import dataclasses
import hashlib
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor, nn

from nextblock.data.sources import fingerprint
from nextblock.errors import NextblockError, RunError
from nextblock.jobs.record import header
from nextblock.jobs.sample_folder import SampleFolder
from nextblock.jobs.sample_images import ImageMaker
from nextblock.jobs.sample_pictures import Frames, draw_sheet
from nextblock.jobs.sample_progress import SampleProgress
from nextblock.jobs.share import Share, Units, array_share, units_of_first
from nextblock.training.launch import Fabric, on_first_process
from nextblock.training.run_record import environment
from nextblock.training.signals import StopRequest, requeue

Todo = dict[int, list[int]]  # batch -> the numbers of the images missing in it


@dataclass
class Sampled:
    """What a job left: its folder, how many images are in it, whether that is all of them.

    `signal` is the number of the signal that stopped it, or 0.
    """

    folder: Path
    images: int
    finished: bool
    signal: int = 0


class SampleRun:
    """One job, as one process sees it.

    Args:
        maker: makes images by their numbers.
        fabric: launched.
        weights: "ema" or "raw", for the record.
    """

    def __init__(self, maker: ImageMaker, fabric: Fabric, *, weights: str = "ema", console: Console) -> None:
        self.maker, self.settings, self.fabric = maker, maker.settings, fabric
        self.weights, self.console = weights, console

    def make(self, path: str | Path, *, npz: bool = False, animated: int = 0) -> Sampled:
        """Make in the folder `path` what is not there yet: the images, then what is made of them.

        Args:
            npz: write the ADM sample file, too.
            animated: show so many images as they come about; 0 = none.

        Raises RunError when the folder holds something else, CheckpointError for images that are not finite.
        """
        folder, share = SampleFolder(path, self.settings.n), array_share()
        # The processes of this launch know each other: one of them holds what is theirs.
        with units_of_first(self.fabric, folder.path, share) as units:
            return self._make(folder, share, units, npz, animated)

    def _make(self, folder: SampleFolder, share: Share, units: Units | None, npz: bool, animated: int) -> Sampled:
        todo = self._begin(folder, share, units, animated)
        before = sum(map(len, todo.values()))
        quiet = self.console.quiet or not self.fabric.is_global_zero
        total = folder.count if share.whole else before
        progress = SampleProgress(total, total - before, None if quiet else self.console)
        with StopRequest("this solver step is done") as stop, progress:
            left = self._rounds(folder, todo, animated, stop, progress)
        if left:
            return self._stopped(folder, stop.received)
        there = folder.count
        if units is not None:  # the first process: all have told that their images are written
            there -= len(folder.missing()) if before or not share.whole else 0
            if there < folder.count:
                self._say(f"{share.told} is done: {there:,} of {folder.count:,} images are in {folder.path}, other "
                          "processes make the others")  # fmt: skip
            else:
                with units.last() as got:
                    if got:
                        self._finish(folder, npz, anew=before > 0)
        there = int(self.fabric.broadcast(there))
        return Sampled(folder.path, there, finished=there == folder.count)

    def _begin(self, folder: SampleFolder, share: Share, units: Units | None, animated: int) -> Todo:
        """What is to be made, the same on every process: the first one looks."""
        problem: RunError | None = None
        todo: Todo = {}
        if units is not None:
            try:
                with units.alone():
                    folder.claim(self._record())
                todo = self._todo(folder, units, animated)
            except RunError as error:
                problem = error
        on_first_process(self.fabric, problem)
        todo = self.fabric.broadcast(todo)
        missing = sum(map(len, todo.values()))
        if not share.whole:
            self._say(f"{share.told}: {missing:,} of {folder.count:,} images to make in {folder.path}")
        elif not missing:
            self._say(f"{folder.path} holds all {folder.count:,} images; none is made again.")
        elif missing < folder.count:
            self._say(f"going on in {folder.path}: {folder.count - missing:,} of {folder.count:,} images are there.")
        return todo

    def _todo(self, folder: SampleFolder, units: Units, animated: int) -> Todo:
        """What is missing of this process's share of the batches, and nobody else is at."""
        size = self.settings.batch_size
        mine = set(units.claim(range(-(-folder.count // size))))
        todo: Todo = {0: []} if animated and 0 in mine and not folder.animation.exists() else {}
        for number in folder.missing():
            if number // size in mine:
                todo.setdefault(number // size, []).append(number)
        return todo

    def _rounds(
        self, folder: SampleFolder, todo: Todo, animated: int, stop: StopRequest, progress: SampleProgress
    ) -> int:
        """A batch for every process, until all are made or somebody asks to stop. Returns how many images are left.

        After each round the processes tell each other how it went, so that they stop together.
        """
        left = sum(map(len, todo.values()))
        rank, world = self.fabric.global_rank, self.fabric.world_size
        batches = list(todo)
        for start in range(0, len(batches), world):
            mine = batches[start : start + world][rank : rank + 1]
            made, problem = 0, ""
            try:
                for batch in mine:
                    made = self._batch(folder, batch, todo[batch], animated, stop, progress)
            except _StopAsked:
                pass
            except NextblockError as error:
                if world == 1:
                    raise
                problem = str(error)
            told = _shared((made, stop.received, problem))
            if problem := next((words for _, _, words in told if words), ""):
                on_first_process(self.fabric, RunError(problem))
            left -= sum(count for count, _, _ in told)
            progress.reached(progress.total - left)
            if left and any(number for _, number, _ in told):
                break
        return left

    def _batch(
        self,
        folder: SampleFolder,
        batch: int,
        missing: list[int],
        animated: int,
        stop: StopRequest,
        progress: SampleProgress,
    ) -> int:
        """Make one batch and write the images of it that are missing; returns how many."""
        size, ordering = self.settings.batch_size, self.maker.model.ordering
        numbers = range(batch * size, min((batch + 1) * size, self.settings.n))
        steps = (ordering.num_entities - self.settings.known_entities) * self.settings.steps
        frames = None
        if animated and batch == 0 and not folder.animation.exists():
            frames = Frames(min(animated, len(numbers)), steps)
        done = 0

        def watch(entity: int, step: int, picture: Callable[[], Tensor]) -> None:
            nonlocal done
            if stop():
                raise _StopAsked
            done += 1
            progress.within(len(missing) * done / steps)
            if frames:
                frames(entity, step, picture)

        images = self.maker.images(numbers, watch)
        folder.write_all({number: images[number - numbers.start] for number in missing})
        if frames:
            frames.draw(folder.animation, images, ordering, self.maker.decoded)
        return len(missing)

    def _finish(self, folder: SampleFolder, npz: bool, *, anew: bool) -> None:
        """What is made of all images."""
        if not folder.sheet.exists():
            draw_sheet(folder, self.settings.classes, self.maker.opened.classes)
        if folder.npz_is_short() or (npz and not folder.npz.exists()):
            labels = self.settings.labels(range(self.settings.n))
            folder.write_npz(None if labels is None else labels.numpy())
            self._say(f"sample file: {folder.npz}")
        for left_over in folder.images.glob(".*.partial"):  # of processes that were killed
            left_over.unlink(missing_ok=True)
        if anew or not folder.finished:
            folder.finish(finished=time.strftime("%Y-%m-%d %H:%M:%S %z"))
            self._say(f"{folder.count:,} images and {folder.sheet.name} in {folder.path}")

    def _stopped(self, folder: SampleFolder, received: int) -> Sampled:
        there = folder.count - len(folder.missing())
        self._say(f"stopped: {there:,} of {folder.count:,} images are there. For the others, the same command again,")
        self._say(f"  with --out {folder.path}")
        if self.fabric.is_global_zero and (told := requeue(received)):
            self._say(told)
        number = received or signal.SIGTERM if self.fabric.is_global_zero else 0
        return Sampled(folder.path, there, finished=False, signal=number)

    def _record(self) -> dict[str, Any]:
        """sample.json; `settings` and `source` decide the images."""
        opened, known = self.maker.opened, self.maker.known
        return {
            "about": header("Images").splitlines(),
            "run": str(Path(opened.where).absolute()),
            "settings": dataclasses.asdict(self.settings),
            "source": {
                "weights": self.weights,
                "weights_sha256": weights_sha256(opened.model),
                "decoder": {k: v for k, v in opened.decoder.identity().items() if k not in ("path", "name")},
                "continue_from": None if known is None else dataclasses.asdict(fingerprint(known)),
            },
            "class_names": [opened.classes[number] for number in self.settings.classes],
            "labels": "image i is of class settings.classes[i % their number]",
            "model": opened.model.config.to_dict(),
            "environment": environment(self.settings.seed, self.fabric.device.type),
            "processes": self.fabric.world_size,
            "finished": None,
        }

    def _say(self, message: str) -> None:
        if self.fabric.is_global_zero:
            self.console.print(message, highlight=False, markup=False, soft_wrap=True)


class _StopAsked(Exception):
    """Raised between two solver steps."""


def _shared(value: Any) -> list[Any]:
    """Every process's value, in their order; of one process, its own."""
    if not dist.is_initialized():
        return [value]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def weights_sha256(model: nn.Module) -> str:
    """Over names and numbers of the state dict, names sorted."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
