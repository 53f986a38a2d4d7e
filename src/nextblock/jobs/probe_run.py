"""One probe: a grid of heads trained on one data set, in a run folder."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from nextblock.data.augment import CropConfig
from nextblock.data.cache_folder import default_cache
from nextblock.data.erasing import prepare
from nextblock.data.labelled import Labelled
from nextblock.data.loading import default_workers, evaluation_batches, training_batches
from nextblock.data.preprocess import normalize
from nextblock.data.randaugment import RandAugment
from nextblock.data.sources import Source, write_manifest
from nextblock.data.sources.views import Subset, known_labels
from nextblock.data.stream import BadSample, Batch, TrainingStream
from nextblock.errors import ConfigError, DataError, RunError
from nextblock.evaluation.feature_cache import (
    CachedFeatures,
    cached_features,
    feature_batches,
    in_order,
    weights_digest,
)
from nextblock.evaluation.head_log import HeadLog
from nextblock.evaluation.inference import device_of, inference
from nextblock.evaluation.probe import Predictions, ProbeGrid, ProbeTraining, predict_all
from nextblock.evaluation.probe_config import PUBLISHED_RANDAUGMENT, ProbeConfig
from nextblock.jobs.opening import OpenedEncoder
from nextblock.jobs.probe_choice import require_readable, settled, split_rows, training_config
from nextblock.jobs.record import described_with_labels, header, require_same, start_record
from nextblock.training.launch import Fabric, processes_here
from nextblock.training.loop import Intervals, Meters, run_state, train
from nextblock.training.plan import Plan
from nextblock.training.progress import TrainingProgress
from nextblock.training.run_folder import RunFolder, max_bad_images
from nextblock.training.run_record import environment, read_environment, to_json, write_text
from nextblock.training.signals import StopRequest
from nextblock.xtra.classifier import layer_means

COLUMNS = (
    "step", "samples", "epoch", "loss", "lr", "grad_norm", "images_per_s", "skipped", "bad_samples", "val_top1",
    "val_loss", "diverged",
)  # fmt: skip
BATCH = 512
MOST_AT_ONCE = 1024  # the published probes: 4096 images a step, in four parts
ENCODED_AT_ONCE = 256
ERASING = 0.25


@dataclass(frozen=True)
class Target:
    """What is probed on what, as typed; kept in the run's config.yaml for --resume."""

    run: str
    dataset: str | None
    test: str | None = None
    data_root: str | None = None


class ProbeRun:
    """A probe, put together. Labels are looked at and rows chosen when it is made, nothing is computed yet."""

    def __init__(
        self, target: Target, config: ProbeConfig, opened: OpenedEncoder, data: Labelled, fabric: Fabric,
        console: Console,
    ) -> None:  # fmt: skip
        self.target, self.fabric, self.console = target, fabric, console
        self.opened, self.data = opened, data
        config, self.choices = settled(config, data, opened, fabric.device.type)
        labels = known_labels(data.train)
        self.train_rows, self.val_rows = split_rows(labels, config)
        self.source: Source = Subset(data.train, np.union1d(self.train_rows, self.val_rows))
        kept = np.union1d(self.train_rows, self.val_rows)
        self.train_rows = np.searchsorted(kept, self.train_rows)
        self.val_rows = np.searchsorted(kept, self.val_rows)
        tested = known_labels(data.test)
        self.test: Source = data.test if (tested >= 0).all() else Subset(data.test, np.flatnonzero(tested >= 0))
        self.config = self._sized(config)
        encoder = opened.encoder.config
        self.grid = ProbeGrid(
            self.config.specs(encoder.depth), encoder.width, len(data.classes),
            num_heads=config.num_heads, num_queries=config.num_queries, seed=config.seed,
        )  # fmt: skip
        self.plan = Plan(len(self.train_rows), training_config(self.config), fabric.global_rank, fabric.world_size)
        self.trainer = ProbeTraining(
            self.grid, fabric.device, label_smoothing=config.label_smoothing, clip=config.clip_grad_norm
        )
        self.left_out: dict[str, BadSample] = {}
        self._cached: tuple[CachedFeatures, CachedFeatures] | None = None
        self._looked = False

    @property
    def augmented(self) -> bool:
        return self.config.augment != "none"

    def say(self, message: str) -> None:
        if self.fabric.is_global_zero:
            self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def describe(self) -> None:
        """What will be trained on what."""
        heads, name = len(self.grid.specs), self.data.name
        told = f"{name}: {len(self.train_rows):,} training, {len(self.val_rows):,} validation and "
        self.say(f"{told}{len(self.test):,} test images, {len(self.data.classes)} classes. {self.data.note}".strip())
        plural = "head" if heads == 1 else "heads"
        self.say(f"{heads} {plural} in one pass, {self.plan.total_steps} steps of {self.config.batch_size} images")
        for choice in self.choices:
            self.say(f"  {choice}")

    def _sized(self, config: ProbeConfig) -> ProbeConfig:
        images, asked = len(self.train_rows), config.batch_size
        if asked > images:
            raise ConfigError(
                f"probe.batch_size {asked} is larger than the {images} training images. Give at most {images}."
            )
        found = self.data.dataset
        batch = asked or min(images, found.batch_size if found else BATCH)
        sized = replace(config, batch_size=batch, per_device_batch=config.per_device_batch or min(batch, MOST_AT_ONCE))
        least = min(map(len, Plan(images, training_config(sized), 0, self.fabric.world_size).micro_batches(0)))
        if least < 2 and "linear" in config.heads:
            raise ConfigError(
                f"BatchNorm needs two images or more at once; raise probe.batch_size ({batch}) or "
                f"probe.per_device_batch ({sized.per_device_batch})."
            )
        return sized

    # --- what a run writes down ---

    def write_record(self, folder: Path) -> None:
        """Claim the folder and write what this run is; `config.yaml`, which makes it a run, comes last."""
        start_record(self.fabric, folder, self._write_record)

    def _write_record(self, folder: Path) -> None:
        about = environment(self.config.seed, self.fabric.device.type)
        about["weights"] = {"where": str(self.opened.where), "sha256": weights_digest(self.opened.encoder)}
        about["data"] = described_with_labels(self.source)
        about["test"] = described_with_labels(self.test)
        write_text(folder / "environment.json", to_json(about))
        write_manifest(self.source, folder / "data_manifest.txt.gz")
        write_manifest(self.test, folder / "test_manifest.txt.gz")
        values = {"probe": plain(self.config), "target": dataclasses.asdict(self.target)}
        comment = "".join(f"# {line}\n" for line in header("A probe").splitlines())
        write_text(folder / "config.yaml", comment + yaml.safe_dump(values, sort_keys=False))

    def check_record(self, folder: Path) -> None:
        """Raise RunError when weights or data are not those that the run was started on."""
        stored = read_environment(folder, "weights", "data", "test")
        if stored["weights"].get("sha256") != weights_digest(self.opened.encoder):
            raise RunError(
                f"{self.target.run} now holds other weights than {folder} was started on. Start a new probe."
            )
        sides = {"data": (self.source, "data_manifest.txt.gz"), "test": (self.test, "test_manifest.txt.gz")}
        require_same(stored, sides, folder, "probe")

    # --- training ---

    def train(self, folder: Path, state: dict[str, Any] | None = None) -> int:
        """Train the heads in `folder`; return the number of the signal that stopped it, or 0."""
        fabric, plan, trainer = self.fabric, self.plan, self.trainer
        start = 0 if state is None else int(state["step"])
        if state is not None:
            self.grid.load_state_dict(state["model"])
        model = fabric.setup_module(self.grid)
        optimizer: Any = fabric.setup_optimizers(trainer.optimizer(self.config.betas))
        meters = Meters.zeros(fabric.device)
        if state is not None:
            optimizer.load_state_dict(state["optimizer"])
            meters.load(state["meters"])
            trainer.load(state["probe"])
        quiet = self.console.quiet or not fabric.is_global_zero
        progress = TrainingProgress(plan.total_steps, done=start, quiet=quiet, console=self.console)
        recorder = RunFolder(
            folder, images=len(self.train_rows), max_bad_fraction=self.config.max_bad_fraction, progress=progress,
            start_step=start, rank=fabric.global_rank, columns=COLUMNS, bad_option="probe.max_bad_fraction",
            bad_may_change=False,
        )  # fmt: skip
        heads = HeadLog(folder / "heads.csv", start) if fabric.is_global_zero else None
        every = self.config.evaluate_every_epochs
        looks = round(every * plan.steps_per_epoch) if every else plan.total_steps // 10
        intervals = Intervals(
            log=plan.log_every, evaluate=max(1, looks), checkpoint_minutes=self.config.checkpoint_every_minutes
        )
        if state is None:  # so that a probe can be resumed from its first moment
            recorder.save(0, run_state(model, optimizer, meters, plan, 0) | {"probe": trainer.state()})
        try:
            self.prepare()
        except KeyboardInterrupt:
            self.say(f"\ninterrupted while features were computed. Start them again with:\n  {_again(folder)}")
            raise
        with StopRequest() as stop, progress:
            done = train(
                fabric, model, optimizer, self._batches(start), self._loss_of, plan, intervals, recorder,
                start_step=start, meters=meters, update=trainer.update, stop_asked=stop,
                extra_state=lambda: {"probe": trainer.state()},
                evaluate=lambda step: self._look(step, heads) if heads is not None else {},
            )  # fmt: skip
        if done == plan.total_steps:
            return 0
        self.say(f"stopped after step {done} of {plan.total_steps}; everything is saved. Continue with:")
        self.say(f"  {_again(folder)}")
        return stop.received or signal.SIGTERM

    def prepare(self) -> None:
        """Put the encoder in its place and, where features are kept, compute them (the first process)."""
        self.opened.encoder.to(self.fabric.device).eval().requires_grad_(False)
        if self._cached:
            return
        if self.augmented:
            for source in (Subset(self.source, self.val_rows), self.test):
                if len(source):
                    require_readable(source, self.opened.preprocessing)
            return
        if not self.fabric.is_global_zero:
            self.fabric.barrier()
        folder = Path(self.config.cache).expanduser() if self.config.cache else default_cache()
        wanted = {layers: self.grid.reads_tokens(layers) for layers in self.grid.inputs}
        found = []
        for name, source in (("training", self.source), ("test", self.test)):
            found.append(
                cached_features(
                    self.opened.encoder, source, self.opened.preprocessing, wanted,
                    partial(self._shown, source, f"features of {name} images"),
                    folder=folder, limit_gb=self.config.cache_gb,
                )
            )  # fmt: skip
        if self.fabric.is_global_zero:
            self.fabric.barrier()
        self._cached = (found[0], found[1])
        self.left_out |= {bad.name: bad for features in found for bad in features.bad}
        most = max_bad_images(len(self.source), self.config.max_bad_fraction)
        if len(found[0].bad) > most:
            raise DataError(
                f"{len(found[0].bad)} images cannot be decoded, more than the {most} allowed; the first: "
                f"{found[0].bad[0].name}. Mend or remove them, or raise probe.max_bad_fraction."
            )

    def _batches(self, start: int) -> Iterator[Any]:
        config, order, positions = self.config, self.grid.inputs, self.plan.batches(start)
        if self._cached:
            rows = self._cached_rows(self.train_rows)
            return feature_batches(self._cached[0], order, positions, config.seed, rows)
        size, flip = self.opened.preprocessing.size_px, 0.5
        stream = TrainingStream(
            Subset(self.source, self.train_rows), config.seed,
            CropConfig(size, config.crop_scale, config.crop_ratio, flip), self.opened.preprocessing,
            randaugment=RandAugment.parse(PUBLISHED_RANDAUGMENT) if config.augment == "published" else None,
            erasing=ERASING if config.augment == "published" else 0.0,
        )  # fmt: skip
        return training_batches(
            stream, positions, workers=self._workers(), pin_memory=self.fabric.device.type == "cuda",
            timeout_s=config.timeout_s,
        )  # fmt: skip

    def _loss_of(self, model: nn.Module, batch: Any, step: int) -> Tensor:
        if self._cached:
            return self.trainer.loss(model, batch.inputs, batch.labels)
        inputs = self.inputs(prepare(batch, self.opened.preprocessing))
        if not self._looked:  # once: looking waits for the device
            self._looked = True
            if not all(bool(torch.isfinite(x).all()) for x in inputs):
                raise DataError("The encoder's features hold values that are not finite. Did its training diverge?")
        return self.trainer.loss(model, inputs, batch.labels)

    def inputs(self, images: Tensor) -> list[Tensor]:
        """What the grid reads of normalised images, from one pass of the frozen encoder."""
        pooled = {each for each in self.grid.inputs if not self.grid.reads_tokens(each)}
        parts = []
        with inference(self.opened.encoder, bf16=self.config.precision != "fp32"):
            for some in torch.split(images, ENCODED_AT_ONCE):  # frozen: the same numbers, less memory
                parts.append(layer_means(self.opened.encoder, some, self.grid.inputs, pooled=pooled))
        return [torch.cat([part[each] for part in parts]) for each in self.grid.inputs]

    # --- looking ---

    def predictions(self, which: str) -> Predictions:
        """What every head says of the "validation" or "test" images."""
        if self._cached:
            rows = self._cached_rows(self.val_rows) if which == "validation" else np.arange(len(self._cached[1]))
            features = self._cached[0 if which == "validation" else 1]
            found = in_order(features, self.grid.inputs, rows, self.config.batch_size)
            placed = (batch.to(self.fabric.device) for batch in found)
            return predict_all(self.grid, ((batch.inputs, batch.labels) for batch in placed))
        source = Subset(self.source, self.val_rows) if which == "validation" else self.test
        return predict_all(self.grid, self._pairs(source, which))

    def _pairs(self, source: Source, what: str) -> Iterator[tuple[list[Tensor], Tensor]]:
        device = device_of(self.opened.encoder)
        for batch in self._shown(source, f"{what} images"):
            self.left_out |= {bad.name: bad for bad in batch.bad}
            if len(batch):
                yield (
                    self.inputs(normalize(batch.images.to(device), None, self.opened.preprocessing)),
                    batch.labels.to(device),
                )

    def _look(self, step: int, heads: HeadLog) -> dict[str, float]:
        losses = self.trainer.read_losses()
        which = "validation" if len(self.val_rows) else "test"
        found = self.predictions(which)
        top1 = np.where(self.trainer.diverged.cpu().numpy(), np.nan, found.top1())
        heads.add(step, self.plan.epoch(step), self.grid.specs, losses, found.losses.tolist(), top1.tolist())
        alive = np.isfinite(top1)
        best = float(np.nanmax(top1)) if alive.any() else float("nan")
        least = float(np.nanmin(np.where(alive, found.losses, np.nan))) if alive.any() else float("nan")
        return {"val_top1": best, "val_loss": least, "diverged": float((~alive).sum())}

    def _shown(self, source: Source, what: str) -> Iterator[Batch]:
        size = min(self.config.per_device_batch, ENCODED_AT_ONCE)
        batches = evaluation_batches(
            source, self.opened.preprocessing, batch_size=size, workers=self._workers(),
            timeout_s=self.config.timeout_s, pin_memory=self.fabric.device.type == "cuda",
        )  # fmt: skip
        hidden = not self.console.is_terminal or self.console.quiet or self._cached is not None or self.augmented
        steps = -(-len(source) // size)
        yield from track(batches, total=steps, description=what, console=self.console, disable=hidden)

    def _cached_rows(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where these rows of the source lie among the features, without the ones that could not be read."""
        assert self._cached
        present = self._cached[0].indices
        return np.flatnonzero(np.isin(present, rows))

    def _workers(self) -> int:
        return default_workers(processes_here(self.fabric)) if self.config.workers < 0 else self.config.workers


def _again(folder: Path) -> str:
    return f"nextblock probe --resume {folder}"


def plain(config: ProbeConfig) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}
