"""How good is a frozen encoder? Linear and attentive probes, a whole grid of them in one pass."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from nextblock.data.labelled import Labelled, open_labelled
from nextblock.errors import ConfigError, RunError
from nextblock.evaluation.probe_config import ProbeConfig
from nextblock.jobs.opening import open_encoder
from nextblock.jobs.probe_report import Probed, finish, read_result, tell
from nextblock.jobs.probe_run import ProbeRun, Target
from nextblock.jobs.suite import Suite, run_suite
from nextblock.recipes.config import typed_section
from nextblock.training.checkpoint import newest_checkpoint
from nextblock.training.config import TrainingConfig
from nextblock.training.launch import Fabric, launch
from nextblock.training.run_folder import read_config

SECTIONS = {"probe": ProbeConfig}


def probe(
    *,
    run: str | Path | None = None,
    dataset: Any = None,
    test: Any = None,
    suite: str | None = None,
    probe: Mapping[str, Any] | None = None,
    data_root: str | Path | None = None,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    quiet: bool = False,
) -> Probed | Suite:
    """Train linear and attentive heads on a frozen encoder, all learning rates in one pass, and tell the best.

    Args:
        run: a run folder, or a folder of exported weights.
        dataset: a benchmark's name (see `nextblock datasets`), a folder with train/ and test/ or with one sub-folder
            for each class, Parquet, hf:NAME; in Python also (images, labels) or any source.
        test: test images, where they are not part of the data set; 20 % are held out where there are none.
        suite: instead of one data set those of a suite, "xtra15": the ones that are on this machine. Run again with
            the same --out to go on.
        probe: the grid of heads and its training, see ProbeConfig.
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
        clash = {"RUN": run, "--dataset": dataset, "--test": test, "--suite": suite, "--out": out}
        return _resume(Path(resume), given, clash, data_root, console)
    if run is None:
        raise ConfigError("Which encoder? Name a run folder or a folder of weights: nextblock probe RUN --dataset ...")
    if (dataset is None) == (suite is None):
        raise ConfigError("Name either a --dataset or a --suite (xtra15). `nextblock datasets` lists the data sets.")
    config: ProbeConfig = typed_section("probe", given, SECTIONS)
    folder = Path(out) if out is not None else Path("runs") / f"{suite or 'probe'}-{time.strftime('%Y%m%d-%H%M%S')}"
    if suite is None:
        return _one(run, dataset, test, config, data_root, folder, console)
    if test is not None:
        raise ConfigError("--test belongs to one --dataset; a suite has its own test images.")

    def one(name: str, where: Path) -> Probed:
        return _one(run, name, None, config, data_root, where, console)

    return run_suite(suite, data_root, folder, console, one)


def _one(
    run: str | Path, dataset: Any, test: Any, config: ProbeConfig, data_root: str | Path | None, folder: Path,
    console: Console,
) -> Probed:  # fmt: skip
    """Probe on one data set in `folder`; one that is begun there goes on, one that is finished is read."""
    if (folder / "config.yaml").is_file():
        return _go_on(folder, {}, {}, data_root, console)
    fabric = _launched(config)
    opened = open_encoder(run, "cpu")
    data = _open(dataset, test, config, data_root)
    target = Target(_absolute(run) or "", _named(dataset), _named(test), _absolute(data_root))
    made = ProbeRun(target, config, opened, data, fabric, console)
    folder = Path(fabric.broadcast(str(folder)))
    made.describe()
    made.write_record(folder)
    return _trained(made, folder, None)


def _resume(
    folder: Path, given: dict[str, Any], clash: Mapping[str, Any], data_root: str | Path | None, console: Console
) -> Probed:
    for name, value in clash.items():
        if value is not None and name in ("--suite", "--out"):
            raise ConfigError(f"--resume continues {folder} as it is; leave out {name}.")
    if given:
        raise ConfigError(f"--resume continues {folder} as it is; leave out --probe.{next(iter(given))}.")
    return _go_on(folder, clash, given, data_root, console)


def _go_on(
    folder: Path, objects: Mapping[str, Any], given: dict[str, Any], data_root: str | Path | None, console: Console
) -> Probed:
    stored = read_config(folder)
    if "probe" not in stored:
        raise RunError(f"{folder} is a run, but not a probe's.")
    if (found := read_result(folder)) is not None:
        tell(console, folder, found)
        return Probed(folder, found["rows"], found["best"])
    target = Target(**stored["target"])
    config: ProbeConfig = typed_section("probe", stored["probe"], SECTIONS)
    dataset = target.dataset if target.dataset is not None else objects.get("--dataset")
    test = target.test if target.test is not None else objects.get("--test")
    if dataset is None:
        raise ConfigError(f"{folder} was started on images in memory: hand them in again as dataset=...")
    fabric = _launched(config)
    data = _open(dataset, test, config, data_root or target.data_root)
    made = ProbeRun(target, config, open_encoder(target.run, "cpu"), data, fabric, console)
    made.check_record(folder)
    _, state = newest_checkpoint(folder / "checkpoints", made.say)
    made.say(f"continuing {folder} after step {state['step']} of {made.plan.total_steps}")
    return _trained(made, folder, state)


def _trained(made: ProbeRun, folder: Path, state: dict[str, Any] | None) -> Probed:
    if stopped := made.train(folder, state):
        return Probed(folder, [], None, finished=False, signal=stopped)
    if not made.fabric.is_global_zero:
        return Probed(folder, [], None)
    return finish(made, folder)


def _launched(config: ProbeConfig) -> Fabric:
    return launch(TrainingConfig(precision=config.precision, device=config.device, devices=config.devices))


def _open(dataset: Any, test: Any, config: ProbeConfig, data_root: str | Path | None) -> Labelled:
    return open_labelled(
        dataset, test=test, root=data_root, train_split=config.train_split, test_split=config.test_split,
        image_column=config.image_column, label_column=config.label_column, test_fraction=config.test_fraction,
        seed=config.seed,
    )  # fmt: skip


def _named(spec: Any) -> str | None:
    """As it is kept in config.yaml: None for what lives in Python only; paths as seen from anywhere."""
    if not isinstance(spec, str | os.PathLike):
        return None
    text = os.fspath(spec)
    return _absolute(text) if os.path.exists(os.path.expanduser(text)) and os.sep in text else text


def _absolute(path: str | Path | None) -> str | None:
    return None if path is None else os.path.abspath(os.path.expanduser(path))


__all__ = ["SECTIONS", "Probed", "probe"]
