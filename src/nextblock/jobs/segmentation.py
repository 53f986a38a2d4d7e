"""What do single patches know? Linear segmentation heads on a frozen encoder, a grid of learning rates in one pass."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from nextblock.data.masked import open_masked
from nextblock.data.masks import MaskConfig
from nextblock.errors import ConfigError, NextblockError, RunError
from nextblock.evaluation.probe_config import ProbeConfig
from nextblock.jobs.opening import open_encoder
from nextblock.jobs.probe_report import read_result
from nextblock.jobs.segmentation_report import Segmented, finish, segmented, tell
from nextblock.jobs.segmentation_run import SegmentationRun
from nextblock.training.config import TrainingConfig
from nextblock.training.launch import launch
from nextblock.training.launcher import require_alone
from nextblock.training.run_record import claim_folder, remove_unborn

LRS = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2)
BATCH = 16
LEAST_STEPS, LEAST_EPOCHS = 1000, 10

_ATTENTIVE = "a segmentation probe has linear heads, one class for each patch"
_ONCE = "images are seen in one fixed view, as a mask would have to follow every change"
REFUSED = {
    "attentive_layers": _ATTENTIVE, "num_heads": _ATTENTIVE, "num_queries": _ATTENTIVE,
    "crop_scale": _ONCE, "crop_ratio": _ONCE,
    "few_shot": "a mask holds several classes, so there is no image of one class; give a smaller folder",
    "evaluate_every_epochs": "its heads are judged once, at the end",
    "cache": "its features stay in memory, see --segmentation.memory_gb",
    "cache_gb": "its features stay in memory, see --segmentation.memory_gb",
    "image_column": "its images and masks are files", "label_column": "its images and masks are files",
    "checkpoint_every_minutes": "it takes minutes and is not resumed",
    "devices": "it runs on one device",
}  # fmt: skip
ACCEPTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "heads": (("linear", ["linear"], ("linear",)), _ATTENTIVE),
    "augment": (("auto", "none"), _ONCE),
}


@dataclass(frozen=True)
class SegmentationConfig(MaskConfig):
    """How masks are read, what of an image is seen, and what is shown.

    Attributes:
        view: "whole" (the default: the whole image, resized to the encoder's input with its sides' ratio given up;
            everything that is labelled is seen and scored) or "crop" (the view of the other probes: the shorter side
            resized, then the central crop; shapes stay true, and what lies at the edges is never scored).
        values: pixel values of the classes, in their order, such as 0 255; empty = the value is the class number.
        ignore: pixel values that are no class: they count neither in training nor in a score.
        exif_orientation: turn images, and masks that have it, as their EXIF orientation says, where the encoder's
            own images were; no = neither is turned, for masks drawn on pixels as they are stored.
        memory_gb: features (float16) are kept in memory up to so many gigabytes; beyond, they are computed anew in
            every epoch. Masks are always kept, a byte a pixel of the encoder's input.
        pictures: test images in the sheet of predictions; 0 = no sheet.
    """

    memory_gb: float = 4.0
    pictures: int = 6

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("memory_gb", "pictures"):
            if getattr(self, name) < 0:
                raise ConfigError(f"segmentation.{name} must be 0 or more; got {getattr(self, name)}.")


def require_accepted(given: Mapping[str, Any]) -> None:
    """Raise ConfigError for an option of the other probes that means nothing to this one."""
    for name, value in given.items():
        if name in REFUSED:
            raise ConfigError(f"--probe.{name} does not belong to --task segmentation: {REFUSED[name]}.")
        accepted, why = ACCEPTED.get(name, ((value,), ""))
        if value not in accepted:
            raise ConfigError(f"--probe.{name} {value!r} does not belong to --task segmentation: {why}.")


def segment(
    run: str | Path, dataset: Any, test: Any, config: ProbeConfig, given: Mapping[str, Any],
    options: SegmentationConfig, out: str | Path | None, console: Console,
) -> Segmented:  # fmt: skip
    """Read everything once, train all heads side by side, choose, measure, tell.

    Args:
        run: of the encoder.
        dataset, test: images and masks, see `open_masked`.
        config: of the heads; `given`, what of it was asked for.
        options: of the masks.
        out: a new or empty folder; by default a dated one under runs/. It is left as it was when data are refused.

    Raises ConfigError, DataError, RunError or CheckpointError.
    """
    require_alone("a segmentation probe")
    require_accepted(given)
    folder = Path(out) if out is not None else Path("runs") / f"segmentation-{time.strftime('%Y%m%d-%H%M%S')}"
    new = not folder.exists()
    remove_unborn(folder)
    claim_folder(folder)
    try:
        made = _prepared(run, dataset, test, config, given, options, console)
    except (NextblockError, KeyboardInterrupt):
        if new:
            folder.rmdir()
        raise
    made.write_record(folder)
    made.train(folder)
    return finish(made, folder)


def _prepared(
    run: str | Path, dataset: Any, test: Any, config: ProbeConfig, given: Mapping[str, Any],
    options: SegmentationConfig, console: Console,
) -> SegmentationRun:  # fmt: skip
    data = open_masked(
        dataset, test=test, train_split=config.train_split, test_split=config.test_split,
        test_fraction=config.test_fraction, seed=config.seed,
    )  # fmt: skip
    opened = open_encoder(run, "cpu")
    config = replace(
        config, heads=("linear",), lrs=config.lrs or LRS, warmup_epochs=max(0.0, config.warmup_epochs), augment="none"
    )
    fabric = launch(TrainingConfig(precision=config.precision, device=config.device))
    made = SegmentationRun(_place(run), _place(dataset), _place(test), config, options, opened, data, fabric, console)
    made.read()
    made.start(_sized(config, given, len(made.train_rows)))
    made.describe()
    return made


def _sized(config: ProbeConfig, given: Mapping[str, Any], images: int) -> ProbeConfig:
    """Batch and length, where nobody said: small sets get as many epochs as make a thousand steps."""
    if config.batch_size > images:
        raise ConfigError(
            f"probe.batch_size {config.batch_size} is larger than the {images} training images. Give at most {images}."
        )
    batch = config.batch_size or min(BATCH, images)
    epochs = config.epochs if "epochs" in given else float(max(LEAST_EPOCHS, -(-LEAST_STEPS * batch // images)))
    return replace(config, batch_size=batch, per_device_batch=config.per_device_batch or batch, epochs=epochs)


def _place(spec: Any) -> str | None:
    """A path as seen from any folder; None for what is a Python object."""
    return os.path.abspath(os.path.expanduser(spec)) if isinstance(spec, str | os.PathLike) else None


def is_segmentation(stored: Mapping[str, Any]) -> bool:
    """Whether a stored configuration is that of a segmentation probe."""
    return "segmentation" in stored


def read_again(folder: Path, console: Console) -> Segmented:
    """A finished segmentation probe, told once more. Raises RunError for one that was stopped."""
    found = read_result(folder)
    if found is None:
        raise RunError(
            f"{folder} is a segmentation probe that was stopped before its end. It takes minutes and is not resumed: "
            "start it again with another --out."
        )
    tell(console, folder, found)
    return segmented(folder, found)
