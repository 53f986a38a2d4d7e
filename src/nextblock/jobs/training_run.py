"""What every training does in its run folder: record, train, stop, resume, finish."""

from __future__ import annotations

import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import nn

from nextblock.data.loading import default_workers, training_batches
from nextblock.errors import DataError, RunError
from nextblock.jobs.kept_batch import keep_batch
from nextblock.jobs.record import OR_ANOTHER, alone_in, checkpoint_of_all, header, start_record
from nextblock.layers.transformer import TransformerLayer
from nextblock.recipes.config import to_yaml
from nextblock.training.activation_checkpointing import checkpoint_layers
from nextblock.training.config import TrainingConfig
from nextblock.training.launch import Fabric, on_first_process, one_ends_all, processes_here
from nextblock.training.loop import Intervals, Loss, Meters, NotFinite, Update, run_state, train
from nextblock.training.memory import require_room_for
from nextblock.training.optimizer import make_optimizer
from nextblock.training.plan import Plan
from nextblock.training.progress import TrainingProgress
from nextblock.training.run_folder import COLUMNS, SAVES_TRIED, RunFolder
from nextblock.training.run_record import environment, read_environment, to_json, write_text
from nextblock.training.signals import StopRequest, requeue
from nextblock.xar.layers import XARLayer

Look = Callable[[int], dict[str, float]]


@dataclass
class Trained:
    """What a run left: its folder, the steps done, whether it was stopped by a signal (its number, or 0)."""

    folder: Path
    steps: int
    finished: bool
    signal: int = 0


class Settings(NamedTuple):
    """What the loop needs of a run's configuration. look_every_epochs: 0 = ten times a run."""

    training: TrainingConfig
    workers: int
    timeout_s: float
    max_bad_fraction: float
    look_every_epochs: float


class TrainingRun(ABC):
    """One run: the configured parts, put together. A job's own run sets what is listed here and fills the gaps below.

    Attributes:
        verb: of the shell, as is told when a run stops; the function is called the same, with underscores.
        columns: of metrics.csv.
        bad_option: what raises the share of broken images that a run bears.
        config: with the sections data, training and watch; a run that has others fills in `settings`.
        stream: of the training data, see `data.stream.TrainingStream`; `load` raises DataError where a batch that is
            gone cannot be read again.
        in_memory: the training data are a Python object, which no command line can name.
    """

    verb: str
    columns: Sequence[str] = COLUMNS
    bad_option = "data.max_bad_fraction"
    data_argument = 'data={"train": ...}'
    config: Any
    stream: Any
    plan: Plan
    model: nn.Module
    in_memory: bool

    def __init__(self, fabric: Fabric, console: Console) -> None:
        self.fabric, self.console = fabric, console

    # --- what a job fills in

    @abstractmethod
    def data_record(self) -> dict[str, Any]:
        """The data as environment.json tells them; `sha256` notices a change."""

    @abstractmethod
    def write_manifest(self, file: Path) -> None:
        """What `what_changed` needs to explain a change."""

    @abstractmethod
    def what_changed(self, file: Path) -> str:
        """How the data differ from those of the manifest `file`, as a clause."""

    @abstractmethod
    def loss(self) -> Loss:
        """The loss of a batch, for the loop."""

    @abstractmethod
    def watch(self, folder: Path) -> Look:
        """What is looked at while the run trains: steps done -> columns of metrics.csv."""

    @abstractmethod
    def finish(self, folder: Path) -> None:
        """Draw the curves and export the weights, in this order: see `is_finished`. Called on every process."""

    def settings(self) -> Settings:
        """What the sections of the configuration say about the training."""
        config = self.config
        return Settings(
            config.training, config.data.workers, config.data.timeout_s, config.data.max_bad_fraction,
            config.watch.every_epochs,
        )  # fmt: skip

    def make_optimizer(self) -> torch.optim.Optimizer:
        return make_optimizer(self.model, self.settings().training)

    def configuration(self) -> str:
        """The content of config.yaml."""
        return to_yaml(self.config, header("A run"))

    def is_finished(self, folder: Path) -> bool:
        """Whether a run whose steps are all done has been finished too, and not killed in between."""
        return (folder / "exported").is_dir()

    def more_record(self) -> dict[str, Any]:
        """What else environment.json tells."""
        return {}

    def start_extras(self, state: dict[str, Any] | None) -> None:  # noqa: B027 - most runs have none
        """Make what a run holds besides model and optimiser, fresh or from a checkpoint; the model is in place."""

    def extra_state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {}

    def batches(self, start: int) -> Iterator[Any]:
        """This process's forward passes from step `start` on; asked for after `start_extras`."""
        return training_batches(
            self.stream, self.plan.batches(start), workers=self.workers(),
            pin_memory=self.fabric.device.type == "cuda", timeout_s=self.settings().timeout_s,
        )  # fmt: skip

    def measured(self, positions: Sequence[int]) -> Any:
        """A batch of so many samples, to measure a forward pass with."""
        return self.stream.load(positions)

    def updater(self) -> Update | None:
        """How a step is taken, where it is not the usual one."""
        return None

    # --- what is the same for all

    def say(self, message: str) -> None:
        if self.fabric.is_global_zero:
            self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def require_room(self) -> None:
        """Raise RunError, on every process, when a forward pass cannot fit in memory.

        Asked before the folder is claimed, so that a run that is refused leaves none.
        """
        problem: RunError | None = None
        # Compiled and checkpointed layers may keep less than they keep here; what might fit is never refused.
        training = self.settings().training
        keeps_all = not training.compile and training.activation_checkpointing == "none"
        if self.fabric.is_global_zero and keeps_all:
            averaged = bool(getattr(training, "ema_decay", 0))
            try:
                require_room_for(
                    self.fabric, self.model, self.loss(), self.measured, self.plan, averaged=averaged
                )  # fmt: skip
            except RunError as error:
                problem = error
            except DataError:  # the training meets it too, with a folder to list broken images in
                pass
        on_first_process(self.fabric, problem)

    def write_record(self, folder: Path) -> None:
        """Claim the folder and write what this run is. `config.yaml`, which makes it a run, comes last: `train` writes
        it when the first checkpoint is there."""
        start_record(self.fabric, folder, self._write_record)

    def _write_record(self, folder: Path) -> None:
        about = environment(self.settings().training.seed, self.fabric.device.type) | self.more_record()
        about["data"] = self.data_record()
        write_text(folder / "environment.json", to_json(about))
        self.write_manifest(folder / "data_manifest.txt.gz")

    def check_record(self, folder: Path) -> None:
        """Raise RunError when the data are not those that the run was started on."""
        stored = read_environment(folder, "data")
        if stored["data"].get("sha256") != self.data_record()["sha256"]:
            what = self.what_changed(folder / "data_manifest.txt.gz")
            raise RunError(
                f"The training data are not those that {folder} was started on: {what}. Bring them back, or start "
                f"a new run (--init-from {folder} takes its weights)."
            )
        self.tell_threads(stored)

    def tell_threads(self, stored: Mapping[str, Any]) -> None:
        """Say so when a resumed run will agree to rounding only. `stored` is environment.json."""
        before, now = stored.get("torch_threads"), torch.get_num_threads()
        if before != now:
            self.say(f"{now} threads now, {before} when the run began: equal to rounding, not to the bit.")

    def train(self, folder: Path, state: dict[str, Any] | None = None) -> Trained:
        """Train in `folder` from the start, or from a checkpoint's state."""
        settings, fabric, plan = self.settings(), self.fabric, self.plan
        start = 0 if state is None else int(state["step"])
        if state is None and (told := plan.repeats()):
            self.say(told)
        if state is not None:
            self.model.load_state_dict(state["model"])
        checkpoint_layers(self.model, settings.training.activation_checkpointing)
        if settings.training.compile:
            compile_layers(self.model)
        model = fabric.setup_module(self.model)
        optimizer: Any = fabric.setup_optimizers(self.make_optimizer())
        meters = Meters.zeros(fabric.device)
        self.start_extras(state)
        if state is not None:
            optimizer.load_state_dict(state["optimizer"])
            meters.load(state["meters"])
        watch = self.watch(folder)
        quiet = self.console.quiet or not fabric.is_global_zero
        progress = TrainingProgress(plan.total_steps, done=start, quiet=quiet, console=self.console)
        recorder = RunFolder(
            folder, images=plan.length, max_bad_fraction=settings.max_bad_fraction, progress=progress,
            keep_checkpoints=settings.training.keep_checkpoints, start_step=start, rank=fabric.global_rank,
            columns=self.columns, bad_option=self.bad_option, saves_tried=SAVES_TRIED,
        )  # fmt: skip
        if state is None:  # so that a run can be resumed from its first moment
            recorder.save(0, run_state(model, optimizer, meters, plan, 0) | self.extra_state())
            if fabric.is_global_zero:
                write_text(folder / "config.yaml", self.configuration())
        with self._endings(folder), StopRequest() as stop, progress:
            done = train(
                fabric, model, optimizer, self.batches(start), self.loss(), plan, self._intervals(), recorder,
                start_step=start, meters=meters, stop_asked=stop, update=self.updater(), extra_state=self.extra_state,
                evaluate=watch if fabric.is_global_zero else lambda done: {},
            )  # fmt: skip
        recorder.require_saved()
        if done < plan.total_steps:
            return self._stopped(folder, done, stop.received)
        self.finish(folder)
        return Trained(folder, done, finished=True)

    def begin(self, folder: Path) -> Trained:
        """Start the run in `folder`, new or empty."""
        with alone_in(self.fabric, folder, OR_ANOTHER):
            self.write_record(folder)
            return self.train(folder)

    def go_on(self, folder: Path) -> Trained:
        """Continue a run whose configuration is this one's, or finish it where only the export is missing."""
        with alone_in(self.fabric, folder):
            return self._go_on(folder)

    def _go_on(self, folder: Path) -> Trained:
        self.check_record(folder)
        state = checkpoint_of_all(self.fabric, folder / "checkpoints", self.say)
        step, total = int(state["step"]), self.plan.total_steps
        if step < total:
            self.require_room()
            self.say(f"continuing {folder} after step {step} of {total}")
            return self.train(folder, state)
        self.say(f"{folder} is trained: {step} steps.")
        if not self.is_finished(folder):  # it was killed between the last step and the export
            self.model.load_state_dict(state["model"])
            self.start_extras(state)
            self.finish(folder)
        return Trained(folder, step, finished=True)

    @contextmanager
    def _endings(self, folder: Path) -> Iterator[None]:
        """What ends a training before its time, told with what to do next."""
        try:
            with one_ends_all(self.fabric, f"Continue with: {self._again(folder)}"):
                yield
        except NotFinite as error:
            problem: RunError | None = None
            if self.fabric.is_global_zero:
                problem = RunError(keep_batch(error, folder, self.model, self.stream, self.plan))
            on_first_process(self.fabric, problem)

    def _again(self, folder: Path) -> str:
        """How the run is continued."""
        if self.in_memory:
            return f'nextblock.{self.verb.replace("-", "_")}(resume="{folder}", {self.data_argument})  # in Python'
        return f"nextblock {self.verb} --resume {folder}"

    def _stopped(self, folder: Path, done: int, received: int) -> Trained:
        self.say(f"stopped after step {done} of {self.plan.total_steps}; everything is saved. Continue with:")
        self.say(f"  {self._again(folder)}")
        if self.fabric.is_global_zero and (told := requeue(received)):
            self.say(told)
        number = received or signal.SIGTERM if self.fabric.is_global_zero else 0
        return Trained(folder, done, finished=False, signal=number)

    def workers(self) -> int:
        """Loading processes of this process."""
        settings = self.settings()
        return default_workers(processes_here(self.fabric)) if settings.workers < 0 else settings.workers

    def _intervals(self) -> Intervals:
        training, every, plan = self.settings().training, self.settings().look_every_epochs, self.plan
        looks = round(every * plan.steps_per_epoch) if every else plan.total_steps // 10
        return Intervals(
            log=plan.log_every,
            evaluate=max(1, looks),
            checkpoint=training.checkpoint_every_steps,
            checkpoint_minutes=training.checkpoint_every_minutes,
        )


def compile_layers(model: nn.Module) -> None:
    """Compile each transformer layer in place: one compilation serves all layers of the same sizes."""
    for module in model.modules():
        if isinstance(module, TransformerLayer | XARLayer):
            module.compile()
