"""What is this machine missing?"""

from __future__ import annotations

import os
import platform
import shutil
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.console import Console

CORE = ("nextblock", "torch", "lightning", "numpy", "pillow", "datasets", "pyarrow", "safetensors", "scikit-learn")
OPTIONAL = {"tensorboard": "TensorBoard logs of a run"}
COMPROMISED_LIGHTNING = ("2.6.2", "2.6.3")
LOW_DISK_GB = 10


def doctor(*, quiet: bool = False) -> dict[str, str]:
    """Report versions, devices, memory of the disk, and optional parts that are missing.

    Args:
        quiet: print nothing.

    Returns what it found; keys that begin with "problem" or "missing" are what to act on.
    """
    found = {"python": platform.python_version(), "system": platform.platform()}
    found |= {name: _version(name) or "not installed" for name in CORE}
    found |= _devices() | _disk() | _problems()
    for package, use in OPTIONAL.items():
        if _version(package) is None:
            found[f"missing {package}"] = f"{use}; get it with: pip install 'nextblock[{package}]'"
    console = Console(quiet=quiet)
    for name, value in found.items():
        console.print(f"{name:<22} {value}", highlight=False, markup=False, soft_wrap=True)
    actions = [name for name in found if name.startswith(("problem", "missing"))]
    told = f"To look at: {len(actions)}." if actions else "Nothing is missing."
    console.print(f"\n{told}", highlight=False)
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> dict[str, str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    devices = {"cpu": f"{cores} cores, {torch.get_num_threads()} threads used by torch"}
    if not torch.cuda.is_available():
        build = f"torch was built for CUDA {torch.version.cuda}, but no device answers" if torch.version.cuda else (
            "this torch is a CPU build; see pytorch.org/get-started for a CUDA one"
        )  # fmt: skip
        return devices | {"cuda": f"none ({build})"}
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        devices[f"cuda:{i}"] = f"{about.name}, {about.total_memory / 2**30:.0f} GiB"
    return devices


def _disk() -> dict[str, str]:
    free = shutil.disk_usage(".").free / 1e9
    note = {"problem disk": "less than 10 GB free where you are; checkpoints may not fit"} if free < LOW_DISK_GB else {}
    return {"free disk here": f"{free:.0f} GB"} | note


def _problems() -> dict[str, str]:
    problems = {}
    if _version("lightning") in COMPROMISED_LIGHTNING:
        problems["problem lightning"] = "2.6.2 and 2.6.3 were compromised releases; pip install 'lightning>=2.6.5'"
    if _version("torchvision") is not None:
        try:
            import_module("torchvision")
        except Exception as error:  # a mismatched build fails in many ways
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            problems["problem torchvision"] = f"does not import beside this torch ({why}); pip uninstall torchvision"
    return problems
