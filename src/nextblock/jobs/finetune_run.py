"""One fine-tuning run: encoder and head, put together with labelled images and trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from nextblock.checkpoints.pretrained import read_about, save_pretrained
from nextblock.data.augment import CropConfig
from nextblock.data.erasing import prepare
from nextblock.data.labelled import Labelled
from nextblock.data.loading import TIMEOUT_S, evaluation_batches
from nextblock.data.mixing import MIX_UNIFORMS, mix
from nextblock.data.preprocess import Preprocessing
from nextblock.data.sources import Source, explain_change, fingerprint, write_manifest
from nextblock.data.stream import Batch, TrainingStream
from nextblock.errors import ConfigError, DataError
from nextblock.evaluation.classification import Classified, classify
from nextblock.jobs.finetune_config import FinetuneRecord, to_yaml
from nextblock.jobs.finetune_parts import classifier_of, height_in, split_training
from nextblock.jobs.finetune_report import finetune_card, finetune_curves
from nextblock.jobs.record import described_with_labels, header, require_same
from nextblock.jobs.training_run import Look, Settings, Trained, TrainingRun
from nextblock.randomness import uniforms
from nextblock.training.ema import EMA
from nextblock.training.launch import Fabric
from nextblock.training.loop import Loss, Update, clipped_update
from nextblock.training.optimizer import SteadyBuffers, layer_decay_groups, make_optimizer
from nextblock.training.plan import Plan
from nextblock.training.run_folder import COLUMNS
from nextblock.training.run_record import read_environment, read_json, to_json, write_text
from nextblock.xtra.classifier import Classifier
from nextblock.xtra.config import XTRAConfig

EVALUATION_BATCH = 250
MANIFEST, TEST_MANIFEST, RESULT = "data_manifest.txt.gz", "test_manifest.txt.gz", "result.json"
METRICS = (*(name for name in COLUMNS if name not in ("knn", "effective_rank")), "val_top1", "ema_val_top1")


@dataclass
class Finetuned(Trained):
    """What a run left. `result` is what result.json holds, once the run is finished."""

    result: dict[str, Any] | None = None


class FinetuneRun(TrainingRun):
    """One run: the configured parts, put together. See `TrainingRun`."""

    verb = "finetune"
    columns = METRICS
    bad_option = "finetune.max_bad_fraction"
    data_argument = "dataset=..."
    model: Classifier

    def __init__(self, record: FinetuneRecord, data: Labelled, fabric: Fabric, console: Console) -> None:
        super().__init__(fabric, console)
        config, seed = record.finetune, record.training.seed
        self.record, self.config, self.data = record, config, data
        self.train_source, self.val_source = split_training(data.train, config, seed)
        self.preprocessing = Preprocessing.from_dict(record.preprocessing)
        self.plan = Plan(len(self.train_source), record.training, fabric.global_rank, fabric.world_size)
        self._require_pairs()
        crop = CropConfig(self.preprocessing.size_px, config.crop_scale, config.crop_ratio, config.flip)
        self.stream = TrainingStream(
            self.train_source, seed, crop, self.preprocessing, config.augmentation, config.erasing
        )
        self.model = classifier_of(config, XTRAConfig.from_dict(record.model), data.classes, seed)
        self.in_memory = record.dataset is None
        self.ema: EMA | None = None
        self.result: dict[str, Any] | None = None

    def _require_pairs(self) -> None:
        """BatchNorm in the head has no variance to divide by where a forward pass holds one image."""
        if self.config.head == "linear" and min(map(len, self.plan.micro_batches(0))) < 2:
            raise ConfigError(
                "a linear head needs two images or more in every forward pass; raise training.batch_size "
                f"({self.record.training.batch_size}) or training.per_device_batch."
            )

    def settings(self) -> Settings:
        config = self.config
        return Settings(
            self.record.training, config.workers, TIMEOUT_S, config.max_bad_fraction, config.evaluate_every_epochs
        )

    def make_optimizer(self) -> torch.optim.Optimizer:
        training, depth = self.record.training, self.model.config.depth
        groups = layer_decay_groups(
            self.model, training.weight_decay, self.config.layer_decay, lambda name: height_in(depth, name), depth + 1
        )
        return make_optimizer(self.model, training, groups)

    # --- the record

    def data_record(self) -> dict[str, Any]:
        return described_with_labels(self.train_source) | {"name": self.data.name, "note": self.data.note}

    def more_record(self) -> dict[str, Any]:
        return {"test": described_with_labels(self.data.test)}

    def configuration(self) -> str:
        return to_yaml(self.record, header("A fine-tuning run"))

    def write_manifest(self, file: Path) -> None:
        write_manifest(self.train_source, file)
        write_manifest(self.data.test, file.with_name(TEST_MANIFEST))

    def what_changed(self, file: Path) -> str:
        return explain_change(file, self.train_source)

    def check_record(self, folder: Path) -> None:
        """Raise RunError when the data are not those that the run was started on."""
        stored = read_environment(folder, "data", "test")
        sides = {"data": (self.train_source, MANIFEST), "test": (self.data.test, TEST_MANIFEST)}
        require_same(stored, sides, folder)
        self.tell_threads(stored)

    # --- training

    def train(self, folder: Path, state: dict[str, Any] | None = None) -> Finetuned:
        """Train in `folder` from the start, or from a checkpoint's state."""
        return self._with_result(super().train(folder, state))

    def begin(self, folder: Path) -> Finetuned:
        """Start the run in `folder`, new or empty."""
        return self._with_result(super().begin(folder))

    def go_on(self, folder: Path) -> Finetuned:
        """Continue a run, or finish it where only its test is missing."""
        if (folder / RESULT).is_file():
            self.result = read_json(folder / RESULT, ["dataset", "weights"], "Remove it: the test is then done again.")
        return self._with_result(super().go_on(folder))

    def is_finished(self, folder: Path) -> bool:
        return self.result is not None

    def _with_result(self, done: Trained) -> Finetuned:
        return Finetuned(done.folder, done.steps, done.finished, done.signal, self.result if done.finished else None)

    def start_extras(self, state: dict[str, Any] | None) -> None:
        """Start the average of the weights, or take it from a checkpoint."""
        if self.config.ema_decay:
            self.ema = EMA(self.model, self.config.ema_decay)
            if state is not None:
                self.ema.load(state["ema"])

    def extra_state(self) -> dict[str, Any]:
        return {"ema": self.ema.state()} if self.ema else {}

    def updater(self) -> Update:
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

    def loss(self) -> Loss:
        return self._loss

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

    def _classified(self, source: Source) -> Classified:
        batches = evaluation_batches(source, self.preprocessing, batch_size=EVALUATION_BATCH, workers=self.workers())
        return classify(self.model, batches, self.preprocessing)

    def watch(self, folder: Path) -> Look:
        return self._look

    def _look(self, done: int) -> dict[str, float]:
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

    def finish(self, folder: Path) -> None:
        """Export the weights (the average, where there is one) and judge them on the test images, once."""
        if not self.fabric.is_global_zero:
            return
        self.model.to(self.fabric.device)
        if self.ema:
            with self.ema.swapped():
                self.result = self._finish(folder)
        else:
            self.result = self._finish(folder)

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
            "weights_sha256": read_about(exported)["sha256"],
            "test_data_sha256": fingerprint(self.data.test).sha256,
        }  # fmt: skip
        write_text(folder / RESULT, to_json(result))
        self.say(
            f"test images of {self.data.name}: {measured['top1']:.2f} % right, {measured['mean_per_class']:.2f} % mean "
            f"over classes, macro F1 {measured['macro_f1']:.2f} ({len(found):,} images)"
        )
        return result
