"""One pre-training run: its configured parts, put together and trained."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from nextblock.checkpoints.pretrained import save_pretrained
from nextblock.data.loading import default_workers, training_batches
from nextblock.data.preprocess import normalize
from nextblock.data.sources import Source, explain_change, fingerprint, open_source, write_manifest
from nextblock.data.stream import Batch, TrainingStream
from nextblock.errors import ConfigError, RunError
from nextblock.jobs.card import model_card
from nextblock.jobs.record import described, header, start_record
from nextblock.jobs.watch import Watch
from nextblock.layers.transformer import TransformerLayer
from nextblock.randomness import hashed, key, uniforms
from nextblock.recipes.config import PretrainConfig, to_yaml
from nextblock.training.launch import Fabric
from nextblock.training.loop import Intervals, Loss, Meters, run_state, train
from nextblock.training.optimizer import make_optimizer
from nextblock.training.plan import Plan
from nextblock.training.progress import TrainingProgress
from nextblock.training.run_folder import RunFolder, environment, to_json, write_text
from nextblock.training.signals import StopRequest
from nextblock.xtra.model import XTRA


@dataclass
class Pretrained:
    """What a run left: its folder, the steps done, whether it was stopped by a signal (its number, or 0)."""

    folder: Path
    steps: int
    finished: bool
    signal: int = 0


class Run:
    """One run: the configured parts, put together."""

    def __init__(self, config: PretrainConfig, fabric: Fabric, objects: dict[str, Any], console: Console) -> None:
        self.config, self.fabric, self.console = config, fabric, console
        self.source = open_train(config, objects)
        self.val = open_val(config, objects)
        self.in_memory = "train" in objects
        self.preprocessing = config.data.preprocessing(config.model)
        crop = config.data.crop(config.model)
        self.stream = TrainingStream(self.source, config.training.seed, crop, self.preprocessing)
        self.plan = Plan(len(self.source), config.training, fabric.global_rank, fabric.world_size)
        torch.manual_seed(key(config.training.seed, "initial weights") >> 1)
        self.model = XTRA(config.model)

    def say(self, message: str) -> None:
        if self.fabric.is_global_zero:
            self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def write_record(self, folder: Path) -> None:
        """Claim the folder and write what this run is; `config.yaml`, which makes it a run, comes last."""
        start_record(self.fabric, folder, self._write_record)

    def _write_record(self, folder: Path) -> None:
        about = environment(self.config.training.seed, self.fabric.device.type)
        about["data"] = described(self.source)
        write_text(folder / "environment.json", to_json(about))
        write_manifest(self.source, folder / "data_manifest.txt.gz")
        write_text(folder / "config.yaml", to_yaml(self.config, header("A run")))

    def check_record(self, folder: Path) -> None:
        """Raise RunError when the data are not those that the run was started on."""
        stored = json.loads((folder / "environment.json").read_text())
        if stored["data"]["sha256"] != fingerprint(self.source).sha256:
            what = explain_change(folder / "data_manifest.txt.gz", self.source)
            raise RunError(
                f"The training data are not those that {folder} was started on: {what}. Bring them back, or start "
                f"a new run (--init-from {folder} takes its weights)."
            )
        before, now = stored["torch_threads"], torch.get_num_threads()
        if before != now:
            self.say(f"{now} threads now, {before} when the run began: equal to rounding, not to the bit.")

    def train(self, folder: Path, state: dict[str, Any] | None = None) -> Pretrained:
        """Train in `folder` from the start, or from a checkpoint's state."""
        config, fabric, plan = self.config, self.fabric, self.plan
        start = 0 if state is None else int(state["step"])
        if state is not None:
            self.model.load_state_dict(state["model"])
        if config.training.compile:
            compile_layers(self.model)
        model = fabric.setup_module(self.model)
        optimizer: Any = fabric.setup_optimizers(make_optimizer(self.model, config.training))
        meters = Meters.zeros(fabric.device)
        if state is not None:
            optimizer.load_state_dict(state["optimizer"])
            meters.load(state["meters"])
        watch = self._watch(folder)
        quiet = self.console.quiet or not fabric.is_global_zero
        progress = TrainingProgress(plan.total_steps, done=start, quiet=quiet, console=self.console)
        recorder = RunFolder(
            folder, images=len(self.source), max_bad_fraction=config.data.max_bad_fraction, progress=progress,
            keep_checkpoints=config.training.keep_checkpoints, start_step=start, rank=fabric.global_rank,
        )  # fmt: skip
        if state is None:  # so that a run can be resumed from its first moment
            recorder.save(0, run_state(model, optimizer, meters, plan, 0))
        with StopRequest() as stop, progress:
            batches = self._batches(start)
            done = train(
                fabric, model, optimizer, batches, self._loss(), plan, self._intervals(), recorder,
                start_step=start, meters=meters, stop_asked=stop,
                evaluate=watch if fabric.is_global_zero else lambda done: {},
            )  # fmt: skip
        if done < plan.total_steps:
            self.say(f"stopped after step {done} of {plan.total_steps}; everything is saved. Continue with:")
            again = f'nextblock.pretrain(resume="{folder}", data={{"train": ...}})  # in Python'
            self.say(f"  {again if self.in_memory else f'nextblock pretrain --resume {folder}'}")
            signal_number = stop.received or signal.SIGTERM if fabric.is_global_zero else 0
            return Pretrained(folder, done, finished=False, signal=signal_number)
        self.finish(folder, watch)
        return Pretrained(folder, done, finished=True)

    def _batches(self, start: int) -> Iterator[Batch]:
        data, fabric = self.config.data, self.fabric
        workers = default_workers(fabric.world_size // self.config.training.nodes) if data.workers < 0 else data.workers
        return training_batches(
            self.stream, self.plan.batches(start), workers=workers, pin_memory=fabric.device.type == "cuda",
            timeout_s=data.timeout_s,
        )  # fmt: skip

    def _loss(self) -> Loss:
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

    def _intervals(self) -> Intervals:
        training, plan = self.config.training, self.plan
        every = self.config.watch.every_epochs
        looks = round(every * plan.steps_per_epoch) if every else plan.total_steps // 10
        return Intervals(
            log=plan.log_every,
            evaluate=max(1, looks),
            checkpoint=training.checkpoint_every_steps,
            checkpoint_minutes=training.checkpoint_every_minutes,
        )

    def _watch(self, folder: Path) -> Watch:
        return Watch(
            self.model, self.preprocessing, self.config.watch, self.source, self.val, folder,
            self.config.training.seed, self.say,
        )  # fmt: skip

    def finish(self, folder: Path, watch: Watch | None = None) -> None:
        """Export the weights and draw the curves."""
        if not self.fabric.is_global_zero:
            return
        card = model_card(self.config, folder, self.source.description)
        save_pretrained(folder / "exported", self.model, self.preprocessing.to_dict(), card)
        if watch:
            watch.draw_curves()
        self.say(f"run folder: {folder}")
        self.say(f"weights:    {folder / 'exported'}")
        self.say(f"pictures:   {folder / 'figures'}")


def compile_layers(model: nn.Module) -> None:
    """Compile each transformer layer in place: one compilation serves all layers of the same sizes."""
    for module in model.modules():
        if isinstance(module, TransformerLayer):
            module.compile()


def open_train(config: PretrainConfig, objects: Mapping[str, Any]) -> Source:
    data = config.data
    spec = objects.get("train", data.train)
    if spec is None:
        raise ConfigError("No images to train on. Give a folder, Parquet files or hf:NAME with --data.train PATH.")
    return open_source(spec, split=data.train_split, image_column=data.image_column, label_column=data.label_column)


def open_val(config: PretrainConfig, objects: Mapping[str, Any]) -> Source | None:
    data = config.data
    spec = objects.get("val", data.val)
    if spec is None:
        return None
    return open_source(spec, split=data.val_split, image_column=data.image_column, label_column=data.label_column)
