"""One segmentation probe: what is read once, the heads, and their training."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch import Tensor

from nextblock.data.loading import default_workers
from nextblock.data.masked import Masked, Pairs, split_pairs
from nextblock.data.masks import IGNORED, MOST_CLASSES, MaskBatch, MaskView, masked_batches
from nextblock.data.preprocess import normalize
from nextblock.data.sources import write_manifest
from nextblock.data.stream import BadSample, locate
from nextblock.errors import ConfigError, DataError
from nextblock.evaluation.feature_cache import weights_digest
from nextblock.evaluation.inference import inference
from nextblock.evaluation.probe import ProbeGrid
from nextblock.evaluation.probe_config import ProbeConfig
from nextblock.evaluation.segmentation import SegmentationTraining, TokenBatch, class_counts
from nextblock.jobs.opening import OpenedEncoder
from nextblock.jobs.output import say
from nextblock.jobs.probe_choice import training_config
from nextblock.jobs.record import described, header
from nextblock.training.launch import Fabric
from nextblock.training.loop import Intervals, train
from nextblock.training.plan import Plan
from nextblock.training.progress import TrainingProgress
from nextblock.training.run_folder import RunFolder, max_bad_images
from nextblock.training.run_record import environment, to_json, write_text
from nextblock.xtra.classifier import layer_means

if TYPE_CHECKING:
    from nextblock.jobs.segmentation import SegmentationConfig

COLUMNS = ("step", "samples", "epoch", "loss", "lr", "grad_norm", "images_per_s", "skipped", "bad_samples")
ENCODED_AT_ONCE = 32
LARGEST_HALF = 65504.0


@dataclass
class Kept:
    """The M pairs of one side that could be read.

    masks: uint8 [M, H, W]. indices: int64 [M], of the pairs. tokens: float16 [M, N, D] for each input of the grid;
    None where they are computed anew. highest: the largest class number. bad: the pairs that could not be read.
    """

    masks: Tensor
    indices: NDArray[np.int64]
    tokens: list[Tensor] | None
    highest: int
    bad: list[BadSample] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.indices)


class _Recorder(RunFolder):
    """A run folder without checkpoints: a probe of minutes starts again."""

    def save(self, step: int, state: dict[str, Any]) -> None:
        pass


class SegmentationRun:
    """A segmentation probe, put together: `read`, `start`, `write_record`, `train`, in this order."""

    def __init__(
        self, run: str | None, dataset: str | None, test: str | None, config: ProbeConfig,
        options: SegmentationConfig, opened: OpenedEncoder, data: Masked, fabric: Fabric, console: Console,
    ) -> None:  # fmt: skip
        self.target = {"task": "segmentation", "run": run, "dataset": dataset, "test": test}
        self.config, self.options, self.opened, self.data = config, options, opened, data
        self.fabric, self.console = fabric, console
        self.encoder = opened.encoder.to(fabric.device).eval().requires_grad_(False)
        self.preprocessing = options.reading(opened.preprocessing)
        patch, size = self.encoder.config.patch, self.preprocessing.size_px
        self.size = (size[0] // patch[0], size[1] // patch[1])
        self.specs = config.specs(self.encoder.config.depth)
        self.inputs = list(dict.fromkeys(spec.layers for spec in self.specs))
        self.classes: tuple[str, ...] = ()
        self.train_rows = self.val_rows = np.zeros(0, dtype=np.int64)
        width = 2 * self.encoder.config.width * self.size[0] * self.size[1] * len(self.inputs)
        self.gigabytes = width * (len(data.train) + len(data.test)) / 1e9
        self.keeps = self.gigabytes <= options.memory_gb

    def say(self, message: str) -> None:
        say(self.console, message)

    # --- reading ---

    def read(self) -> None:
        """Read every pair once, count the classes, choose the rows. Raises DataError for data that cannot work."""
        told = self._told_classes()
        self.train_data = self._read(self.data.train, "training", len(told) if told else MOST_CLASSES)
        most = max_bad_images(len(self.data.train), self.config.max_bad_fraction)
        if len(self.train_data.bad) > most:
            first = self.train_data.bad[0]
            raise DataError(
                f"{len(self.train_data.bad)} images or masks cannot be decoded, more than the {most} allowed; the "
                f"first: {first.name}: {first.reason}. Mend or remove them, or raise probe.max_bad_fraction."
            )
        self.classes = told or tuple(map(str, range(self.train_data.highest + 1)))
        self._require_two_classes()
        self.test_data = self._read(self.data.test, "test", len(self.classes))
        if not (self.test_data.masks != IGNORED).any():
            raise DataError(f"{self.data.name}: the test masks have no labelled pixel; all are among the ignored.")
        if self.config.select == "test":
            self.train_rows = np.arange(len(self.train_data))
        else:
            self.train_rows, self.val_rows = split_pairs(
                len(self.train_data), self.config.val_fraction, self.config.seed
            )

    def _told_classes(self) -> tuple[str, ...] | None:
        names, values = self.data.classes, self.options.values
        if names and values and len(names) != len(values):
            raise ConfigError(f"classes.txt names {len(names)} classes, segmentation.values {len(values)}.")
        if names and len(names) > MOST_CLASSES:
            raise DataError(f"classes.txt names {len(names)} classes; at most {MOST_CLASSES} are possible.")
        return names or (tuple(map(str, values)) or None)

    def _require_two_classes(self) -> None:
        counts = class_counts(self.train_data.masks, max(1, len(self.classes)))
        found = np.flatnonzero(counts)
        if len(found) >= 2:
            return
        ignored = int((self.train_data.masks == IGNORED).sum())
        hint = ""
        if ignored and not self.options.values:
            share = 100 * ignored / self.train_data.masks.numel()
            hint = f" {share:.0f} % of the pixels are ignored (value {', '.join(map(str, self.options.ignore))}). If "
            hint += "that is a class, name all values in the order of classes: --segmentation.values 0 255"
        what = f"only class {self.classes[found[0]]}" if len(found) else "no class"
        raise DataError(f"{self.data.name}: the training masks hold {what}; two are needed.{hint}")

    def _read(self, pairs: Pairs, what: str, num_classes: int) -> Kept:
        """One pass over all pairs, with the encoder where features are kept."""
        height, width = self.preprocessing.size_px
        masks = torch.empty(len(pairs), height, width, dtype=torch.uint8)
        shape = (len(pairs), self.size[0] * self.size[1], self.encoder.config.width)
        tokens = [torch.empty(shape, dtype=torch.float16) for _ in self.inputs] if self.keeps else None
        indices: list[Tensor] = []
        bad: list[BadSample] = []
        count, highest = 0, -1
        for batch in self._shown(pairs, what, num_classes):
            bad += batch.bad
            if not (now := len(batch.indices)):
                continue
            masks[count : count + now] = batch.masks
            for whole, part in zip(tokens or (), self.encoded(batch.images) if tokens else (), strict=True):
                whole[count : count + now] = part.cpu()
            indices.append(batch.indices)
            count, highest = count + now, max(highest, batch.highest)
        if not count:
            first = f"; the first: {bad[0].name}: {bad[0].reason}" if bad else ""
            raise DataError(f"None of the {len(pairs)} {what} images and masks could be read{first}.")
        tokens = [whole[:count] for whole in tokens] if tokens else None
        return Kept(masks[:count], torch.cat(indices).numpy(), tokens, highest, bad)

    def _shown(self, pairs: Pairs, what: str, num_classes: int) -> Iterator[MaskBatch]:
        plan = [range(i, min(i + ENCODED_AT_ONCE, len(pairs))) for i in range(0, len(pairs), ENCODED_AT_ONCE)]
        batches = self._stream(pairs, plan, num_classes)
        hidden = not self.console.is_terminal or self.console.quiet
        told = f"{'features and ' if self.keeps else ''}masks of {what} images"
        yield from track(batches, total=len(plan), description=told, console=self.console, disable=hidden)

    def _stream(self, pairs: Pairs, plan: Iterable[Sequence[int]], num_classes: int) -> Iterator[MaskBatch]:
        view = MaskView(pairs.images, pairs.masks, self.preprocessing, self.options, num_classes)
        workers = default_workers() if self.config.workers < 0 else self.config.workers
        return masked_batches(view, plan, workers=workers, timeout_s=self.config.timeout_s)

    def encoded(self, images: Tensor) -> list[Tensor]:
        """Tokens in raster order, float16 [B, N, D], for each input of the grid; `images` uint8 [B, H, W, C]."""
        found = []
        with inference(self.encoder, bf16=self.config.precision != "fp32"):
            given = normalize(images.to(self.fabric.device), None, self.preprocessing)
            means = layer_means(self.encoder, given, self.inputs)
            for layers in self.inputs:
                tokens = self.encoder.ordering_for(given, layers.bidirectional).merge(means[layers]).flatten(1, 2)
                found.append(tokens.float())
        if not all(bool(torch.isfinite(tokens).all()) for tokens in found):
            raise DataError("The encoder's features hold values that are not finite. Did its training diverge?")
        return [tokens.clamp(-LARGEST_HALF, LARGEST_HALF).half() for tokens in found]

    # --- training ---

    def start(self, config: ProbeConfig) -> None:
        """Make the heads, of the configuration with its sizes chosen."""
        self.config = config
        self.grid = ProbeGrid(self.specs, self.encoder.config.width, len(self.classes), seed=config.seed)
        self.plan = Plan(len(self.train_rows), training_config(config))
        self.trainer = SegmentationTraining(
            self.grid, self.fabric.device, label_smoothing=config.label_smoothing, clip=config.clip_grad_norm
        )
        self.trainer.size = self.size

    def describe(self) -> None:
        """What will be trained on what."""
        told = f"{self.data.name}: {len(self.train_rows):,} training, {len(self.val_rows):,} validation and "
        self.say(f"{told}{len(self.test_data):,} test images, {len(self.classes)} classes. {self.data.note}".strip())
        told = f"{len(self.specs)} linear heads on {self.size[0]}×{self.size[1]} patches in one pass"
        self.say(f"{told}, {self.plan.total_steps} steps of {self.config.batch_size} images")
        if not self.keeps:
            self.say(
                f"  features are computed anew in every epoch: they would take {self.gigabytes:.1f} GB, more than "
                f"segmentation.memory_gb {self.options.memory_gb:g}"
            )

    def write_record(self, folder: Path) -> None:
        """What this run is; `config.yaml`, which makes it a run, comes last."""
        about = environment(self.config.seed, self.fabric.device.type)
        about["weights"] = {"where": str(self.opened.where), "sha256": weights_digest(self.encoder)}
        for name, pairs in (("data", self.data.train), ("test", self.data.test)):
            about[name], about[f"{name}_masks"] = described(pairs.images), described(pairs.masks)
            write_manifest(pairs.images, folder / f"{name}_manifest.txt.gz")
        write_text(folder / "environment.json", to_json(about))
        values = {"probe": _plain(self.config), "segmentation": _plain(self.options), "target": self.target}
        comment = "".join(f"# {line}\n" for line in header("A segmentation probe").splitlines())
        write_text(folder / "config.yaml", comment + yaml.safe_dump(values, sort_keys=False))

    def train(self, folder: Path) -> None:
        """Train the heads; their losses go to metrics.csv in `folder`."""
        model = self.fabric.setup_module(self.grid)
        optimizer: Any = self.fabric.setup_optimizers(self.trainer.optimizer(self.config.betas))
        progress = TrainingProgress(self.plan.total_steps, quiet=self.console.quiet, console=self.console)
        recorder = _Recorder(
            folder, images=len(self.train_rows), max_bad_fraction=self.config.max_bad_fraction, progress=progress,
            columns=COLUMNS, bad_option="probe.max_bad_fraction", bad_may_change=False,
        )  # fmt: skip
        with progress:
            train(
                self.fabric, model, optimizer, self._training_batches(),
                lambda grid, batch, step: self.trainer.pixel_loss(grid, batch),
                self.plan, Intervals(log=self.plan.log_every), recorder, update=self.trainer.update,
            )  # fmt: skip

    def _training_batches(self) -> Iterator[TokenBatch]:
        """Rows shuffled as the training stream shuffles images."""
        plan = (
            self.train_rows[locate(self.config.seed, positions, len(self.train_rows))[1]]
            for positions in self.plan.batches(0)
        )
        return self.batches(self.data.train, self.train_data, plan)

    def validation(self) -> Iterator[TokenBatch]:
        return self.batches(self.data.train, self.train_data, self._in_order(self.val_rows))

    def test(self) -> Iterator[TokenBatch]:
        return self.batches(self.data.test, self.test_data, self._in_order(np.arange(len(self.test_data))))

    def _in_order(self, rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        return np.split(rows, range(ENCODED_AT_ONCE, len(rows), ENCODED_AT_ONCE))

    def batches(self, pairs: Pairs, kept: Kept, plan: Iterable[NDArray[np.int64]]) -> Iterator[TokenBatch]:
        """Batches of these rows of `kept`, on the device; read and encoded again where features are not kept."""
        device = self.fabric.device
        if kept.tokens is not None:
            for rows in plan:
                at = torch.from_numpy(rows)
                tokens = [whole[at].to(device).float() for whole in kept.tokens]
                yield TokenBatch(tokens, kept.masks[at].to(device))
            return
        wanted = (kept.indices[rows].tolist() for rows in plan)
        for batch in self._stream(pairs, wanted, len(self.classes)):
            tokens = [part.float() for part in self.encoded(batch.images)]
            yield TokenBatch(tokens, batch.masks.to(device), batch.bad)


def _plain(config: Any) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}
