"""How good is a frozen encoder? Linear and attentive probes, a whole grid of them in one pass; and of its patches."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from nextblock.data.labelled import Labelled, open_labelled
from nextblock.errors import ConfigError, nearest
from nextblock.evaluation.feature_cache import weights_digest
from nextblock.evaluation.probe_config import ProbeConfig
from nextblock.jobs.opening import OpenedEncoder, open_encoder
from nextblock.jobs.probe_report import Probed, finish, read_result, tell
from nextblock.jobs.probe_run import ProbeRun, Target, plain
from nextblock.jobs.record import OR_ANOTHER, alone_in, checkpoint_of_all, where
from nextblock.jobs.segmentation import SegmentationConfig, is_segmentation, read_again, segment
from nextblock.jobs.segmentation_report import Segmented
from nextblock.jobs.share import array_share, require_named
from nextblock.jobs.suite import Suite, require_suite, run_suite
from nextblock.recipes.config import typed_section
from nextblock.training.checkpoint import list_checkpoints
from nextblock.training.config import TrainingConfig
from nextblock.training.launch import Fabric, launch
from nextblock.training.run_record import read_config, require_free, require_job

SECTIONS: dict[str, type] = {"probe": ProbeConfig, "segmentation": SegmentationConfig}


def probe(
    *,
    run: str | Path | None = None,
    dataset: Any = None,
    test: Any = None,
    suite: str | None = None,
    task: Literal["classification", "segmentation"] = "classification",
    probe: Mapping[str, Any] | None = None,
    segmentation: Mapping[str, Any] | None = None,
    data_root: str | Path | None = None,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    quiet: bool = False,
) -> Probed | Segmented | Suite:
    """Train linear and attentive heads on a frozen encoder, all learning rates in one pass, and tell the best.

    Args:
        run: a run folder, or a folder of exported weights.
        dataset: a benchmark's name (see `nextblock datasets`), a folder with train/ and test/ or with one sub-folder
            for each class, Parquet, hf:NAME; in Python also (images, labels) or any source.
        test: test images, where they are not part of the data set; 20 % are held out where there are none.
        suite: instead of one data set those of a suite, "xtra15": the ones that are on this machine. Run again with
            the same --out to go on.
        task: "classification" (one label an image) or "segmentation" (a mask for each image: the data set is then a
            folder of images/ and masks/, PNG files whose pixel value is the class, in train/ and test/ or without;
            in Python also (images, masks) or a sequence of (image, mask)).
        probe: the grid of heads and its training, see ProbeConfig.
        segmentation: how masks are read and what of an image is seen, see SegmentationConfig.
        data_root: folder of the benchmark data sets; $NEXTBLOCK_DATA or ./datasets when left out.
        out: the probe's folder, new or empty; by default a dated one under runs/.
        resume: a probe's folder to go on with.
        quiet: print nothing.

    Raises:
        ConfigError, DataError, RunError, CheckpointError: with what to do next.
    """
    console = Console(quiet=quiet)
    given = dict(probe or {})
    if resume is not None:
        clash: dict[str, Any] = {"RUN": run, "--suite": suite, "--out": out}
        clash |= {f"--probe.{name}": value for name, value in given.items()}
        clash |= {f"--segmentation.{name}": value for name, value in (segmentation or {}).items()}
        for name, value in clash.items():
            if value is not None:
                raise ConfigError(f"--resume continues {resume} as it is; leave out {name}.")
        if is_segmentation(read_config(Path(resume))):
            return read_again(Path(resume), console)
        return _go_on(Path(resume), dataset, test, data_root, None, console)
    if run is None:
        raise ConfigError("Which encoder? Name a run folder or a folder of weights: nextblock probe RUN --dataset ...")
    if (dataset is None) == (suite is None):
        raise ConfigError("Name either a --dataset or a --suite (xtra15). `nextblock datasets` lists the data sets.")
    config: ProbeConfig = typed_section("probe", given, SECTIONS)
    options: SegmentationConfig = typed_section("segmentation", segmentation or {}, SECTIONS)
    if task == "segmentation":
        _require_plain(suite, data_root)
        return segment(run, dataset, test, config, given, options, out, console)
    if task != "classification" or segmentation:
        _refuse_task(task, segmentation or {})
    if suite is not None:
        require_suite(suite)
        require_named(out, array_share())
    folder = Path(out) if out is not None else Path("runs") / f"{suite or 'probe'}-{time.strftime('%Y%m%d-%H%M%S')}"
    if test is not None and suite is not None:
        raise ConfigError("--test belongs to one --dataset; a suite has its own test images.")
    if suite is None:
        require_free(folder)
    opened = open_encoder(run, "cpu")
    fabric = _launched(config)
    folder = Path(fabric.broadcast(str(folder)))
    if suite is None:
        return _start(run, opened, dataset, test, config, data_root, folder, fabric, console)

    def one(name: str, at: Path, begun: bool) -> Probed:
        if begun:
            return _go_on(at, None, None, data_root, fabric, console)
        return _start(run, opened, name, None, config, data_root, at, fabric, console)

    signature = {"suite": suite, "weights": weights_digest(opened.encoder), "probe": plain(config)}
    return run_suite(suite, signature, data_root, folder, fabric, console, one)


def _require_plain(suite: str | None, data_root: str | Path | None) -> None:
    """Raise ConfigError for what a segmentation probe does not take."""
    for name, value in (("suite", suite), ("data_root", data_root)):
        if value is not None:
            raise ConfigError(
                f"--{name} belongs to classification: the benchmark data sets have no masks. Give --dataset FOLDER."
            )


def _refuse_task(task: str, segmentation: Mapping[str, Any]) -> None:
    """Raise ConfigError for a task that there is not, and for options of the other one."""
    tasks = ("classification", "segmentation")
    if task not in tasks:
        raise ConfigError(f"There is no task '{task}'.{nearest(task, tasks)} Tasks: {', '.join(tasks)}.")
    raise ConfigError(f"--segmentation.{next(iter(segmentation))} belongs to --task segmentation.")


def _start(
    run: str | Path, opened: OpenedEncoder, dataset: Any, test: Any, config: ProbeConfig,
    data_root: str | Path | None, folder: Path, fabric: Fabric, console: Console,
) -> Probed:  # fmt: skip
    """A new probe in a new folder."""
    data = _open(dataset, test, config, data_root)
    target = Target(os.path.abspath(os.path.expanduser(run)), **where(dataset, test, data_root))
    made = ProbeRun(target, config, opened, data, fabric, console)
    made.describe()
    with alone_in(fabric, folder, OR_ANOTHER):
        made.write_record(folder)
        return _trained(made, folder, None)


def _go_on(
    folder: Path, dataset: Any, test: Any, data_root: str | Path | None, fabric: Fabric | None, console: Console
) -> Probed:
    """Continue a probe from its newest checkpoint, or from its start where it has none; read a finished one."""
    stored = read_config(folder)
    require_job(stored, folder, "probe")
    target = Target(**stored["target"])
    for name, given, kept in (("dataset", dataset, target.dataset), ("test", test, target.test)):
        if given is not None and kept is not None:
            raise ConfigError(f"--resume continues {folder} on the images it was started on; leave out --{name}.")
    if (found := read_result(folder)) is not None:
        tell(console, folder, found)
        return Probed(folder, found["rows"], found["best"])
    config: ProbeConfig = typed_section("probe", stored["probe"], SECTIONS)
    dataset = target.dataset if target.dataset is not None else dataset
    if dataset is None:
        raise ConfigError(f"{folder} was started on images in memory: hand them in again as dataset=...")
    fabric = fabric or _launched(config)
    data = _open(dataset, target.test if target.test is not None else test, config, data_root or target.data_root)
    made = ProbeRun(target, config, open_encoder(target.run, "cpu"), data, fabric, console)
    made.check_record(folder)
    with alone_in(fabric, folder):
        begun = fabric.broadcast(bool(list_checkpoints(folder / "checkpoints")))
        if not begun:  # it was killed at its very beginning
            return _trained(made, folder, None)
        state = checkpoint_of_all(fabric, folder / "checkpoints", made.say)
        made.say(f"continuing {folder} after step {state['step']} of {made.plan.total_steps}")
        return _trained(made, folder, state)


def _trained(made: ProbeRun, folder: Path, state: dict[str, Any] | None) -> Probed:
    if stopped := made.train(folder, state):
        return Probed(folder, [], None, finished=False, signal=stopped)
    found = finish(made, folder) if made.fabric.is_global_zero else Probed(folder, [], None)
    made.fabric.barrier()
    return found


def _launched(config: ProbeConfig) -> Fabric:
    return launch(TrainingConfig(precision=config.precision, device=config.device, devices=config.devices))


def _open(dataset: Any, test: Any, config: ProbeConfig, data_root: str | Path | None) -> Labelled:
    return open_labelled(
        dataset, test=test, root=data_root, train_split=config.train_split, test_split=config.test_split,
        image_column=config.image_column, label_column=config.label_column, test_fraction=config.test_fraction,
        seed=config.seed,
    )  # fmt: skip


__all__ = ["SECTIONS", "Probed", "probe"]
