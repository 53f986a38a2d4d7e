"""A run's folder: what it was asked, on what it ran, what it measured, what it saved.

============================  =========================================================
config.yaml                   the resolved configuration; also a recipe for `--config`
environment.json              versions, commit, device, seed, command
data_manifest.txt.gz          names and sizes of the training data, to notice a change
metrics.csv, tensorboard/     one row per log
checkpoints/                  what `--resume` continues from
exported/                     the trained weights, to use
figures/                      pictures made while training
bad_samples.csv               images that could not be decoded and what was said of them
============================  =========================================================
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from nextblock.data.stream import BadSample
from nextblock.durable import append_whole
from nextblock.errors import CheckpointError, DataError, RunError
from nextblock.training.checkpoint import list_checkpoints, save_checkpoint
from nextblock.training.progress import TrainingProgress
from nextblock.training.run_record import write_text

COLUMNS = (
    "step", "samples", "epoch", "loss", "lr", "grad_norm", "images_per_s", "skipped", "bad_samples",
    "val_loss", "knn", "effective_rank",
)  # fmt: skip
SAVES_TRIED = 3  # in a row, before a run ends that cannot be saved


class RunFolder:
    """Records a run (the loop's `Recorder`). Only the first process writes; bad samples are counted over all.

    Args:
        path: the run's folder, made by `claim_folder`.
        images: images in the data, for the limit on broken ones.
        max_bad_fraction: the run stops when more than max(10, this fraction) distinct images are broken.
        progress: where a person sees the numbers.
        keep_checkpoints: of the newest.
        start_step: rows after this step are dropped from metrics.csv (they will be made again).
        columns: of metrics.csv.
        bad_option: what raises `max_bad_fraction`.
        saves_tried: so many checkpoints in a row that cannot be saved end the run; the first one of a run does at once.

    Where the disk refuses less than that, the run goes on, and it is told: rows of metrics.csv wait until they can be
    written, the checkpoint is tried again when the next one is due. `require_saved` belongs after the last step.
    """

    def __init__(
        self,
        path: Path,
        *,
        images: int,
        max_bad_fraction: float,
        progress: TrainingProgress,
        keep_checkpoints: int = 2,
        start_step: int = 0,
        rank: int = 0,
        columns: Sequence[str] = COLUMNS,
        bad_option: str = "data.max_bad_fraction",
        bad_may_change: bool = True,
        saves_tried: int = 1,
    ) -> None:
        self.path, self.progress, self.rank, self.columns = path, progress, rank, tuple(columns)
        self.keep_checkpoints = keep_checkpoints
        self.images, self.max_bad, self.bad_option = images, max_bad_images(images, max_bad_fraction), bad_option
        self.bad = dict.fromkeys(_column(path / "bad_samples.csv", "name"))
        self._unwritten: list[BadSample] = []
        self.bad_may_change = bad_may_change
        self.saves_tried, self._refused = saves_tried, 0
        self._problem: CheckpointError | None = None
        self._rows: list[dict[str, str]] = []  # not in metrics.csv yet
        self._tensorboard: Any = None
        if rank == 0:
            self._start_metrics(start_step)
            self._tensorboard = _tensorboard(path / "tensorboard", start_step)

    def step(self, done: int) -> None:
        self.progress.step(done)

    def log(self, row: dict[str, float]) -> None:
        self._share_bad_samples()
        row = row | {"bad_samples": float(len(self.bad))}
        if self.rank == 0:
            self._rows.append({k: repr(v) for k, v in row.items()})
            try:
                self._write_rows()
                self._draw(row)
            except OSError as error:
                self.progress.note(f"WARNING: cannot write metrics to {self.path}: {_told(error)}. Trying again later.")
            self.progress.show(row)

    def _write_rows(self) -> None:
        text = io.StringIO(newline="")
        csv.DictWriter(text, self.columns).writerows(self._rows)
        append_whole(self.path / "metrics.csv", text.getvalue().encode())
        self._rows = []

    def _draw(self, row: dict[str, float]) -> None:
        """To TensorBoard, which draws nothing more once the disk has refused."""
        if self._tensorboard:
            writer, self._tensorboard = self._tensorboard, None
            for name, value in row.items():
                writer.add_scalar(name, value, int(row["step"]))
            writer.flush()
            self._tensorboard = writer

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Save a checkpoint. Raises CheckpointError when that has failed `saves_tried` times in a row, or at once
        where there is no earlier one."""
        self._share_bad_samples()  # what a checkpoint has seen is listed: a run that goes on does not meet it again
        if self.rank != 0:
            return
        folder = self.path / "checkpoints"
        try:
            save_checkpoint(folder, step, state, self.keep_checkpoints)
        except CheckpointError as error:
            self._refused, self._problem = self._refused + 1, error
            if self._refused >= self.saves_tried or not list_checkpoints(folder):
                raise
            self.progress.note(
                f"WARNING: {error} The run goes on, and ends when {self.saves_tried} in a row cannot be saved "
                f"({self._refused} so far)."
            )
        else:
            self._refused, self._problem = 0, None

    def require_saved(self) -> None:
        """Raise CheckpointError when the last checkpoint could not be saved, RunError when rows of metrics.csv could
        not be written: what a run has come to must not be lost without a word."""
        if self._problem:
            advice = f"Make room, then go on from the newest: --resume {self.path}"
            raise CheckpointError(f"{self._problem} {advice}") from self._problem
        if self._rows:
            try:
                self._write_rows()
            except OSError as error:
                raise RunError(
                    f"cannot write {self.path / 'metrics.csv'}: {_told(error)}. The last {len(self._rows)} rows are "
                    "missing there; the weights are saved."
                ) from error

    def add_bad_samples(self, bad: list[BadSample]) -> None:
        self._unwritten += [sample for sample in bad if sample.name not in self.bad]
        if not dist.is_initialized():
            self._share_bad_samples()

    def _share_bad_samples(self) -> None:
        found = self._unwritten
        if dist.is_initialized():
            everyone: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, found)
            found = [sample for share in everyone for sample in share]
        self._unwritten = []
        fresh: dict[str, BadSample] = {}
        for sample in sorted(found, key=lambda sample: sample.position):  # stable: attempts stay in order
            if sample.name not in self.bad:
                fresh.setdefault(sample.name, sample)
        self.bad |= dict.fromkeys(fresh)
        if fresh and self.rank == 0:
            self._write_bad_samples(list(fresh.values()))
        if len(self.bad) > self.max_bad:
            raise DataError(
                f"{len(self.bad)} images cannot be decoded, more than the {self.max_bad} allowed. They are listed in "
                f"{self.path / 'bad_samples.csv'}. To do without them, raise {self.bad_option}: "
                f"{_share_for(2 * len(self.bad), self.images):g} would bear twice as many. {self._with_more_bad()}"
            )

    def _with_more_bad(self) -> str:
        if not self.bad_may_change:
            return "That wants a new --out."
        return f"The run goes on so with --resume {self.path}; mended or fewer images are other data, for a new run."

    def _write_bad_samples(self, samples: list[BadSample]) -> None:
        file = self.path / "bad_samples.csv"
        rows = [] if file.exists() else [("name", "reason", "position")]
        text = io.StringIO(newline="")
        csv.writer(text).writerows([*rows, *samples])
        try:
            append_whole(file, text.getvalue().encode(errors="surrogateescape"))
        except OSError as error:
            self.progress.note(f"WARNING: cannot list broken images in {file}: {_told(error)}.")
        for sample in samples:
            self.progress.note(f"broken image, replaced: {sample.name}: {sample.reason}")

    def _start_metrics(self, start_step: int) -> None:
        file = self.path / "metrics.csv"
        rows = read_metrics(file) if file.exists() else []
        lines = [",".join(self.columns)]
        lines += [",".join(row[c] for c in self.columns) for row in rows if int(row["step"]) <= start_step]
        write_text(file, "\n".join(lines) + "\n")


def _told(error: OSError) -> str:
    return error.strerror or str(error)


def max_bad_images(images: int, fraction: float) -> int:
    """How many distinct broken images are put up with."""
    return max(10, int(fraction * images))


def _share_for(bad: int, images: int) -> float:
    """Of the images, in hundredths, so that so many may be broken."""
    return min(1.0, math.ceil(100 * bad / max(1, images)) / 100)


def read_metrics(file: Path) -> list[dict[str, str]]:
    """The whole rows of a metrics.csv; a last line that was being written is left out."""
    text = file.read_text()
    whole = text[: text.rfind("\n") + 1]
    return [row for row in csv.DictReader(whole.splitlines()) if None not in row.values() and None not in row]


def _column(file: Path, name: str) -> list[str]:
    if not file.exists():
        return []
    with open(file, newline="", encoding="utf-8", errors="surrogateescape") as lines:
        return [row[name] for row in csv.DictReader(lines) if row.get(name)]


def _tensorboard(folder: Path, start_step: int) -> Any:
    """A writer when the optional tensorboard package is there, else None."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=start_step + 1)
