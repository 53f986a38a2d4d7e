"""What a run's folder says of the run: written when it starts, read when it goes on. See `run_folder`."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml

from nextblock.data.decode import EXTENSIONS
from nextblock.durable import make_folder, write_whole
from nextblock.errors import RunError, nearest

# What PyYAML raises for a text that is none; of the last ones, for a tag before a value that it does not fit.
NO_YAML = (yaml.YAMLError, ValueError, RecursionError, AttributeError, LookupError, TypeError)
_PACKAGES = ("nextblock", "torch", "lightning", "numpy", "pillow", "datasets", "safetensors", "scikit-learn",
             "simplejpeg")  # fmt: skip


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all, see `durable.write_whole`. Raises RunError when the disk refuses."""
    try:
        write_whole(path, text.encode())
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error.strerror or error}. Mend that, or choose another --out."
        ) from error


def read_json(file: Path, names: Iterable[str], advice: str) -> dict[str, Any]:
    """A table with these `names`, as `to_json` writes it. Raises RunError, with `advice`, for anything else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        told = error.strerror if isinstance(error, OSError) else error
        raise RunError(f"{file} cannot be read: {told}. {advice}") from error
    lacking = [name for name in names if not isinstance(found, dict) or name not in found]
    if lacking or not isinstance(found, dict):
        raise RunError(f"{file} is not what was written: it lacks {', '.join(lacking) or 'names'}. {advice}")
    return found


def read_environment(folder: Path, *names: str) -> dict[str, Any]:
    """environment.json of a run, with tables called `names`. Raises RunError when it is damaged or lacking."""
    file = folder / "environment.json"
    advice = "It says what the run was started on: bring it back from a copy, or start a new run."
    found = read_json(file, names, advice)
    if wrong := [name for name in names if not isinstance(found[name], dict)]:
        raise RunError(f"{file} is not what was written: {', '.join(wrong)} should be a table. {advice}")
    return found


def environment(seed: int, device: str) -> dict[str, Any]:
    """What a run ran on."""

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {
        "packages": {package: installed(package) for package in _PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "commit": _commit(),
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "seed": seed,
        "command": sys.argv,
    }


def _commit() -> str | None:
    """The commit of the package's own checkout, when it is run from one."""
    here = Path(__file__).resolve().parents[3]
    if not (here / ".git").exists():
        return None
    command = ["git", "-C", str(here), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def require_free(path: Path) -> None:
    """Raise RunError when the folder holds something: `claim_folder` would, but after the work of reading data."""
    if path.is_dir() and any(path.iterdir()) and not is_unborn(path):
        raise RunError(f"{path} is not empty, and nothing is ever overwritten. {resume_or_another(path)}")


def resume_or_another(path: Path) -> str:
    """What to do about a folder that holds something: it may be a run."""
    again = f"Continue it with --resume {path}, or choose" if (path / "config.yaml").exists() else "Choose"
    return f"{again} another --out."


def claim_folder(path: Path, advice: str = "Choose another --out.") -> None:
    """Make a new, empty folder. Raises RunError, ending in `advice`, when it holds something or cannot be written.

    What a start left that was killed in this moment is nothing, and goes.
    """
    try:
        make_folder(path)
        begun = {each for each in path.iterdir() if each.name == ".writable" or _is_partial(each)}
        if set(path.iterdir()) == begun:
            for left_over in begun:
                left_over.unlink(missing_ok=True)
        else:
            raise RunError(f"{path} is not empty, and nothing is ever overwritten. {advice}")
        (path / ".writable").touch()
        (path / ".writable").unlink()
    except OSError as error:
        raise RunError(f"cannot write to {path}: {error.strerror}. Choose another --out.") from error


_OF_A_START = {"environment.json", "data_manifest.txt.gz", "test_manifest.txt.gz", "metrics.csv", "tensorboard",
               "checkpoints", ".writable"}  # fmt: skip


def is_unborn(path: Path) -> bool:
    """Whether all that is in a folder is of a run that ended in the first moments of its start: before its config.yaml
    was written, and with no checkpoint of any step."""
    if (path / "config.yaml").exists() or not (path / "environment.json").is_file():
        return False
    try:
        ours = read_environment(path, "packages")
        rows = (path / "metrics.csv").read_text().count("\n") if (path / "metrics.csv").exists() else 0
    except (RunError, OSError, ValueError):
        return False
    if "torch_threads" not in ours or rows > 1:
        return False
    steps = [each for each in (path / "checkpoints").glob("*") if not each.name.startswith(".partial-")]
    begun = all(each.name in _OF_A_START or _is_partial(each) for each in path.iterdir())
    return begun and all(each.name == "step-00000000" for each in steps)


def remove_unborn(path: Path) -> None:
    """Empty a folder that `is_unborn`; any other stays as it is. Raises RunError when the disk refuses."""
    if not is_unborn(path):
        return
    try:
        for each in sorted(path.iterdir(), key=lambda each: each.name == "environment.json"):  # by which it is known
            shutil.rmtree(each) if each.is_dir() else each.unlink()
    except OSError as error:
        raise RunError(f"cannot remove what an ended start left in {path}: {error.strerror}.") from error


def _is_partial(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".partial") and path.is_file()


_LOST_CONFIG = "Bring it back from a copy, or start a new run; --init-from takes weights that were exported."


def read_config(path: Path) -> dict[str, Any]:
    """The stored configuration of a run. Raises RunError when `path` is not a run folder."""
    file = path / "config.yaml"
    if not file.is_file():
        siblings = [p.name for p in path.parent.iterdir() if p.is_dir() and p != path] if path.parent.is_dir() else []
        what = _instead_of_a_run(path) if path.is_dir() else "does not exist"
        advice = nearest(path.name, siblings) or " Name the folder of a run; images are given as options."
        raise RunError(f"{path} {what}.{advice}")
    try:
        values = yaml.safe_load(file.read_text())
    except (OSError, *NO_YAML) as error:
        raise RunError(f"{file} cannot be read: {' '.join(str(error).split())[:300]}. {_LOST_CONFIG}") from error
    if not isinstance(values, dict):
        raise RunError(f"{file} holds no sections of values. {_LOST_CONFIG}")
    return values


def _instead_of_a_run(path: Path) -> str:
    """What a folder without config.yaml is: of images, where it or a folder in it holds one."""
    names = (name for pattern in ("*", "*/*") for name in path.glob(pattern))
    if any(name.suffix.lower() in EXTENSIONS for name in islice(names, 1000)):
        return "is a folder of images, not a run"
    if is_unborn(path):
        return "was begun, but ended before its first checkpoint was saved: start the run again, with the same --out"
    if (path / "checkpoints").is_dir():
        return f"has lost its config.yaml. {_LOST_CONFIG}"
    return "holds no config.yaml, so it is not a run folder"


def job_of(stored: dict[str, Any]) -> str:
    """The verb that made a run, from its stored configuration."""
    if "latent_size" in stored.get("model", {}):  # both trainings of models from nothing have the same sections
        return "train-generator"
    return next((name for name in ("probe", "finetune") if name in stored), "pretrain")


JOBS = {
    "probe": "a probe",
    "finetune": "a fine-tuning run",
    "pretrain": "a pre-training run",
    "train-generator": "the training of a generator",
}


def require_job(stored: dict[str, Any], folder: Path, job: str) -> None:
    """Raise RunError, naming the verb that can, when the run in `folder` is not one of `job`."""
    kind = job_of(stored)
    if kind != job:
        raise RunError(f"{folder} is {JOBS[kind]}. Continue it with: nextblock {kind} --resume {folder}")


def to_json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2) + "\n"
