"""One fine-tuning run: encoder and head, put together with labelled images and trained."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from nextblock.checkpoints.pretrained import save_pretrained
from nextblock.data.augment import CropConfig
from nextblock.data.erasing import prepare
from nextblock.data.labelled import Labelled
from nextblock.data.loading import default_workers, evaluation_batches, training_batches
from nextblock.data.mixing import MIX_UNIFORMS, mix
from nextblock.data.preprocess import Preprocessing
from nextblock.data.sources import Source, fingerprint, write_manifest
from nextblock.data.stream import Batch, TrainingStream
from nextblock.errors import ConfigError, DataError
from nextblock.evaluation.classification import Classified, classify
from nextblock.jobs.finetune_config import FinetuneRecord, to_yaml
from nextblock.jobs.finetune_parts import classifier_of, height_in, split_training
from nextblock.jobs.finetune_report import finetune_card, finetune_curves
from nextblock.jobs.record import described_with_labels, header, require_same, start_record
from nextblock.jobs.run import compile_layers
from nextblock.randomness import uniforms
from nextblock.training.ema import EMA
from nextblock.training.launch import Fabric
from nextblock.training.loop import Intervals, Meters, clipped_update, run_state, train
from nextblock.training.optimizer import SteadyBuffers, layer_decay_groups, make_optimizer
from nextblock.training.plan import Plan
from nextblock.training.progress import TrainingProgress
from nextblock.training.run_folder import COLUMNS, RunFolder, environment, to_json, write_text
from nextblock.training.signals import StopRequest
from nextblock.xtra.config import XTRAConfig

EVALUATION_BATCH = 250
METRICS = (*(name for name in COLUMNS if name not in ("knn", "effective_rank")), "val_top1", "ema_val_top1")


@dataclass
class Finetuned:
    """What a run left: its folder, the steps done, whether it was stopped by a signal (its number, or 0).

    `result` is what result.json holds, once the run is finished.
    """

    folder: Path
    steps: int
    finished: bool
    signal: int = 0
    result: dict[str, Any] | None = None


class FinetuneRun:
    """One run: the configured parts, put together."""

    def __init__(self, record: FinetuneRecord, data: Labelled, fabric: Fabric, console: Console) -> None:
        config, seed = record.finetune, record.training.seed
        self.record, self.config, self.data, self.fabric, self.console = record, config, data, fabric, console
        self.train_source, self.val_source = split_training(data.train, config, seed)
        self.preprocessing = Preprocessing.from_dict(record.preprocessing)
        self.plan = Plan(len(self.train_source), record.training, fabric.global_rank, fabric.world_size)
        self._require_pairs()
        crop = CropConfig(self.preprocessing.size_px, config.crop_scale, config.crop_ratio, config.flip)
        self.stream = TrainingStream(
            self.train_source, seed, crop, self.preprocessing, config.augmentation, config.erasing
        )
        self.model = classifier_of(config, XTRAConfig.from_dict(record.model), data.classes, seed)
        self.ema: EMA | None = None

    def _require_pairs(self) -> None:
        """BatchNorm in the head has no variance to divide by where a forward pass holds one image."""
        if self.config.head == "linear" and min(map(len, self.plan.micro_batches(0))) < 2:
            raise ConfigError(
                "a linear head needs two images or more in every forward pass; raise training.batch_size "
                f"({self.record.training.batch_size}) or training.per_device_batch."
            )

    def say(self, message: str) -> None:
        if self.fabric.is_global_zero:
            self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def write_record(self, folder: Path) -> None:
        """Claim the folder and write what this run is; `config.yaml`, which makes it a run, comes last."""
        start_record(self.fabric, folder, self._write_record)

    def _write_record(self, folder: Path) -> None:
        about = environment(self.record.training.seed, self.fabric.device.type)
        about["data"] = described_with_labels(self.train_source) | {"name": self.data.name, "note": self.data.note}
        about["test"] = described_with_labels(self.data.test)
        write_text(folder / "environment.json", to_json(about))
        write_manifest(self.train_source, folder / "data_manifest.txt.gz")
        write_manifest(self.data.test, folder / "test_manifest.txt.gz")
        write_text(folder / "config.yaml", to_yaml(self.record, header("A fine-tuning run")))

    def check_record(self, folder: Path) -> None:
        """Raise RunError when the data are not those that the run was started on."""
        stored = json.loads((folder / "environment.json").read_text())
        sides = {"data": (self.train_source, "data_manifest.txt.gz"), "test": (self.data.test, "test_manifest.txt.gz")}
        require_same(stored, sides, folder)
        before, threads = stored["torch_threads"], torch.get_num_threads()
        if before != threads:
            self.say(f"{threads} threads now, {before} when the run began: equal to rounding, not to the bit.")

    def train(self, folder: Path, state: dict[str, Any] | None = None) -> Finetuned:
        """Train in `folder` from the start, or from a checkpoint's state."""
        training, fabric, plan = self.record.training, self.fabric, self.plan
        start = 0 if state is None else int(state["step"])
        if state is not None:
            self.model.load_state_dict(state["model"])
        if training.compile:
            compile_layers(self.model)
        model = fabric.setup_module(self.model)
        depth = self.model.config.depth
        groups = layer_decay_groups(
            self.model, training.weight_decay, self.config.layer_decay, lambda name: height_in(depth, name), depth + 1
        )
        optimizer: Any = fabric.setup_optimizers(make_optimizer(self.model, training, groups))
        meters = Meters.zeros(fabric.device)
        self._average(state)
        if state is not None:
            optimizer.load_state_dict(state["optimizer"])
            meters.load(state["meters"])
        quiet = self.console.quiet or not fabric.is_global_zero
        progress = TrainingProgress(plan.total_steps, done=start, quiet=quiet, console=self.console)
        recorder = RunFolder(
            folder, images=len(self.train_source), max_bad_fraction=self.config.max_bad_fraction, progress=progress,
            keep_checkpoints=training.keep_checkpoints, start_step=start, rank=fabric.global_rank, columns=METRICS,
            bad_option="finetune.max_bad_fraction",
        )  # fmt: skip
        if state is None:  # so that a run can be resumed from its first moment
            recorder.save(0, run_state(model, optimizer, meters, plan, 0) | self._extra_state())
        with StopRequest() as stop, progress:
            done = train(
                fabric, model, optimizer, self._batches(start), self._loss, plan, self._intervals(), recorder,
                start_step=start, meters=meters, stop_asked=stop, update=self._updater(),
                extra_state=self._extra_state, evaluate=self._watch if fabric.is_global_zero else lambda done: {},
            )  # fmt: skip
        if done < plan.total_steps:
            return self._stopped(folder, done, stop.received)
        return Finetuned(folder, done, finished=True, result=self.finish(folder))

    def _stopped(self, folder: Path, done: int, received: int) -> Finetuned:
        self.say(f"stopped after step {done} of {self.plan.total_steps}; everything is saved. Continue with:")
        in_memory = self.record.dataset is None
        again = f'nextblock.finetune(resume="{folder}", dataset=...)  # in Python'
        self.say(f"  {again if in_memory else f'nextblock finetune --resume {folder}'}")
        number = received or signal.SIGTERM if self.fabric.is_global_zero else 0
        return Finetuned(folder, done, finished=False, signal=number)

    def _average(self, state: Mapping[str, Any] | None) -> None:
        """Start the average of the weights, or take it from a checkpoint."""
        if self.config.ema_decay:
            self.ema = EMA(self.model, self.config.ema_decay)
            if state is not None:
                self.ema.load(state["ema"])

    def _extra_state(self) -> dict[str, Any]:
        return {"ema": self.ema.state()} if self.ema else {}

    def _updater(self) -> Any:
        """The usual step; the head's running statistics forget a skipped one, and the average follows."""
        buffers = SteadyBuffers(self.model)

        def update(
            fabric: Fabric, model: nn.Module, optimizer: Any, loss: Tensor, plan: Plan, step: int
        ) -> tuple[Tensor, Tensor]:
            norm, good = clipped_update(fabric, model, optimizer, loss, plan, step)
            buffers.settle(good)
            if self.ema:
                self.ema.update(good)
            return norm, good

        return update

    def _batches(self, start: int) -> Iterator[Batch]:
        return training_batches(
            self.stream, self.plan.batches(start), workers=self._workers(),
            pin_memory=self.fabric.device.type == "cuda",
        )  # fmt: skip

    def _workers(self) -> int:
        share = self.fabric.world_size // self.record.training.nodes
        return default_workers(share) if self.config.workers < 0 else self.config.workers

    def _loss(self, model: nn.Module, batch: Batch, step: int) -> Tensor:
        """Cross entropy with the mixed targets. Drop path is drawn from (seed, position), the mixing of a forward
        pass from (seed, its first position)."""
        config, seed, depth = self.config, self.record.training.seed, self.model.config.depth
        positions = batch.positions.numpy()
        mixing = uniforms(seed, "mix", positions[:1], MIX_UNIFORMS)[0]
        images = prepare(batch, self.preprocessing)
        images, targets = mix(images, batch.labels, config.mix, mixing, len(self.data.classes), config.label_smoothing)
        drawn = None
        if config.drop_path:
            numbers = uniforms(seed, "drop path", positions, 2 * depth)
            drawn = torch.from_numpy(numbers).float().view(-1, depth, 2).to(images.device, non_blocking=True)
        return F.cross_entropy(model(images, drawn).float(), targets)

    def _intervals(self) -> Intervals:
        training, plan = self.record.training, self.plan
        every = self.config.evaluate_every_epochs
        looks = round(every * plan.steps_per_epoch) if every else plan.total_steps // 10
        return Intervals(
            log=plan.log_every, evaluate=max(1, looks), checkpoint=training.checkpoint_every_steps,
            checkpoint_minutes=training.checkpoint_every_minutes,
        )  # fmt: skip

    def _classified(self, source: Source) -> Classified:
        batches = evaluation_batches(source, self.preprocessing, batch_size=EVALUATION_BATCH, workers=self._workers())
        return classify(self.model, batches, self.preprocessing)

    def _watch(self, done: int) -> dict[str, float]:
        """Columns for metrics.csv: the held-out images under the weights, and under their average.

        What cannot be measured is told and not tried again: looking never ends a run.
        """
        if self.val_source is None:
            return {}
        try:
            found, classes = self._classified(self.val_source), len(self.data.classes)
            row = {"val_loss": found.loss, "val_top1": found.metrics(classes)["top1"]}
            if self.ema:
                with self.ema.swapped():
                    row["ema_val_top1"] = self._classified(self.val_source).metrics(classes)["top1"]
        except DataError as error:
            self.say(f"not measured while training: {error}")
            self.val_source, row = None, {}
        return row

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take the weights, and their average, of a checkpoint of a run that is trained."""
        self.model.load_state_dict(state["model"])
        self.model.to(self.fabric.device)
        self._average(state)

    def finish(self, folder: Path) -> dict[str, Any] | None:
        """Export the weights (the average, where there is one) and judge them on the test images, once."""
        if not self.fabric.is_global_zero:
            return None
        if self.ema:
            with self.ema.swapped():
                return self._finish(folder)
        return self._finish(folder)

    def _finish(self, folder: Path) -> dict[str, Any]:
        """The weights first: they are there whatever becomes of the test."""
        card = finetune_card(self.record, self.data, {})
        exported = save_pretrained(folder / "exported", self.model, self.preprocessing.to_dict(), card)
        self.say(f"weights: {exported}")
        found = self._classified(self.data.test)
        for sample in found.bad[:3]:
            self.say(f"broken test image, left out: {sample.name}: {sample.reason}")
        measured = found.metrics(len(self.data.classes))
        counts = {"train_images": len(self.train_source), "test_images": len(found), "test_broken": len(found.bad)}
        numbers = {name: round(value, 4) for name, value in measured.items()} | counts
        write_text(exported / "README.md", finetune_card(self.record, self.data, numbers))
        try:
            finetune_curves(folder, self.record)
        except DataError as error:
            self.say(f"no curves: {error}")
        result = {
            "dataset": self.data.name, **numbers, "classes": len(self.data.classes),
            "weights": f"average of decay {self.config.ema_decay:g}" if self.ema else "last",
            "weights_sha256": json.loads((exported / "config.json").read_text())["sha256"],
            "test_data_sha256": fingerprint(self.data.test).sha256,
        }  # fmt: skip
        write_text(folder / "result.json", to_json(result))
        self.say(
            f"test images of {self.data.name}: {measured['top1']:.2f} % right, {measured['mean_per_class']:.2f} % mean "
            f"over classes, macro F1 {measured['macro_f1']:.2f} ({len(found):,} images)"
        )
        return result
