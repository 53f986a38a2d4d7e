"""Processes, devices and precision, by Lightning Fabric."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

from nextblock.errors import ConfigError, RunError
from nextblock.training.config import TrainingConfig
from nextblock.training.launcher import VARIABLE, Launched, launched, require_whole, started

__all__ = ["Fabric", "is_lost", "launch", "on_first_process", "one_ends_all", "pick_device", "processes_here"]

MEETING = timedelta(minutes=30)  # Lightning's own limit of an exchange: the first process may evaluate for long
LOOK_S, GRACE_S = 2.0, 10.0  # how often a process looks for its parent, and how long it may outlive it
# what gloo and NCCL say of an exchange with a process that is no more
_LOST = ("Connection reset by peer", "Connection closed by peer", "Broken pipe", "remote process exited",
         "communicator was aborted")  # fmt: skip


def pick_device(device: str) -> str:
    """ "auto", "cpu" or "cuda" -> the device to use. Raises ConfigError for anything else, RunError when CUDA is asked
    for and absent."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device must be 'auto', 'cpu' or 'cuda'; got {device!r}.")
    if device == "cuda" and not torch.cuda.is_available():
        raise RunError("No CUDA device is usable here; `nextblock doctor` says why. Use the CPU.")
    return device


def launch(training: TrainingConfig) -> Fabric:
    """A launched Fabric: this process is one of the run's, with its device and precision set.

    The run has the processes that torchrun or srun has started; where neither has, it starts `training.devices`.
    Raises ConfigError where both say something, and something else; RunError where CUDA is asked for and absent.
    """
    device = pick_device(training.device)
    precision = training.precision
    if precision == "auto":
        precision = "bf16" if device == "cuda" else "fp32"
    found = launched()
    processes = _own_processes(training, device) if found is None else _given_processes(training, device, found)
    world = _devices(training, device) * training.nodes if found is None else found.world
    fabric = Fabric(accelerator=device, precision="bf16-mixed" if precision == "bf16" else "32-true", **processes)
    with _silent():
        if found is not None and found.world > 1:
            _join_restarted("nccl" if device == "cuda" else "gloo")
        fabric.launch()
    if fabric.world_size != world:
        raise ConfigError(
            f"{world} processes are meant to work together, but {fabric.world_size} do. Start them with torchrun "
            "or srun, or one process with devices and nodes, which starts the others."
        )
    if fabric.world_size > 1 and _started_by_another():
        threading.Thread(target=_follow, args=(os.getppid(),), name="follow-parent", daemon=True).start()
    return fabric


def processes_here(fabric: Fabric) -> int:
    """Processes of the run on this machine, which share its cores."""
    return max(1, fabric.world_size // int(getattr(fabric.strategy, "num_nodes", 1)))


def _devices(training: TrainingConfig, device: str) -> int:
    return training.devices or (torch.cuda.device_count() if device == "cuda" else 1)


def _own_processes(training: TrainingConfig, device: str) -> dict[str, Any]:
    """What Fabric is told of processes that it starts itself."""
    devices: int | list[int] = _devices(training, device)
    other = started()
    if other is not None and (devices, training.nodes) != (1, 1):
        raise ConfigError(
            f"{VARIABLE}=all makes each process of {other.by} work on its own, and such a one starts no others: "
            f"devices is {training.devices} and nodes is {training.nodes}. Set both to 1."
        )
    if other is not None and device == "cuda":
        devices = [other.local_rank % torch.cuda.device_count()]
    # Otherwise Lightning would wait for all the tasks that a job of Slurm could have, and that nobody has started; and
    # advise srun wherever there is one.
    slurm = "SLURM_NTASKS" in os.environ or shutil.which("srun") is not None
    alone = LightningEnvironment() if other is not None or slurm else None
    return {"devices": devices, "num_nodes": training.nodes, "plugins": alone}


def _given_processes(training: TrainingConfig, device: str, found: Launched) -> dict[str, Any]:
    """What Fabric is told of processes that a launcher has started."""
    found.require(training.devices, training.nodes)
    require_whole(found)
    seen = torch.cuda.device_count() if device == "cuda" else found.here
    apart = seen == 1 and found.by == "srun"  # --gpus-per-task: each process sees its own device only
    if seen < found.here and not apart:
        raise ConfigError(f"{found.by} has started {found.here} processes on a machine of {seen} GPUs. Start {seen}.")
    plugin = _Given(found, 0 if apart else found.local_rank)
    several = {"strategy": "ddp"} if found.world > 1 else {}
    return {"devices": 1 if apart else found.here, "num_nodes": len(found.per_node), "plugins": plugin} | several


class _Given(ClusterEnvironment):
    """The processes of a launcher, for Lightning, whose own ways to recognise them believe in more than was started."""

    def __init__(self, found: Launched, device: int) -> None:
        super().__init__()
        self._found, self._device = found, device

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        nodes = os.environ.get("SLURM_STEP_NODELIST", os.environ.get("SLURM_NODELIST", "127.0.0.1"))
        return os.environ.get("MASTER_ADDR") or SLURMEnvironment.resolve_root_node_address(nodes)

    @property
    def main_port(self) -> int:
        """As told; under srun one that all processes of a step arrive at, and other steps hardly."""
        job, step = (int(os.environ.get(f"SLURM_{name}_ID", 0)) for name in ("JOB", "STEP"))
        return int(os.environ.get("MASTER_PORT") or 15000 + (10 * job + step) % 10000)

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self._found.world

    def set_world_size(self, size: int) -> None:
        pass

    def global_rank(self) -> int:
        return self._found.rank

    def set_global_rank(self, rank: int) -> None:
        pass

    def local_rank(self) -> int:
        return self._device

    def node_rank(self) -> int:
        return self._found.node


def _join_restarted(backend: str) -> None:
    """Meet the other processes that torchrun has started again, away from what the ended ones have left.

    torchrun (torch 2.13) keeps its store through a restart, with the addresses of the ended processes in it: who comes
    before the first process has written its new one waits for one that is no more, or fails. So each attempt has a
    corner of the store. Lightning takes the group that it finds.
    """
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if not attempt or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or dist.is_initialized():
        return
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    stores: Any = dist  # whose types do not export them
    store = stores.TCPStore(address, port, is_master=False)
    corner = stores.PrefixStore(f"attempt{attempt}", store)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(backend, store=corner, timeout=MEETING, rank=rank, world_size=world)
    if backend == "nccl":
        atexit.register(dist.destroy_process_group)  # which Lightning does for a group of its own


def _started_by_another() -> bool:
    """Whether the parent of this process is one of the run, or its launcher: not a person's shell."""
    return os.environ.get("LOCAL_RANK", "0") != "0" or "TORCHELASTIC_RUN_ID" in os.environ


def _follow(parent: int) -> None:
    """End this process some seconds after the one that started it.

    Otherwise it might wait for ever: a process that is killed tells nobody, gloo notices only within an exchange, and
    NCCL not at all.
    """
    while os.getppid() == parent:
        time.sleep(LOOK_S)
    time.sleep(GRACE_S)  # so that one that ends on its own does
    print("nextblock: the process that started this one is gone, so it ends as well.", file=sys.stderr, flush=True)
    os._exit(1)


def is_lost(error: BaseException) -> bool:
    """Whether an exchange has failed because another process is no more."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _LOST)


@contextmanager
def one_ends_all(fabric: Fabric, advice: str) -> Iterator[None]:
    """Raise RunError, ending in `advice`, where an exchange fails because another process of the run has ended."""
    try:
        yield
    except RuntimeError as error:
        if fabric.world_size == 1 or not is_lost(error):
            raise
        raise RunError(
            f"Another of the {fabric.world_size} processes has ended or cannot be reached, so process "
            f"{fabric.global_rank} ends as well. {advice}"
        ) from error


@contextmanager
def _silent() -> Iterator[None]:
    """Without what Lightning tells of processes that find each other; its warnings stay."""
    loggers = [logging.getLogger(f"lightning.{part}") for part in ("fabric", "pytorch")]  # Fabric talks through both
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(max(logger.level, logging.WARNING))
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def on_first_process(fabric: Fabric, problem: RunError | None) -> None:
    """Raise on every process what went wrong on the first: the others would wait for it for ever."""
    told = fabric.broadcast(None if problem is None else str(problem))
    if told is not None:
        if fabric.is_global_zero:
            raise RunError(told)
        raise SystemExit(0)  # the first process tells it
