"""Which launcher has started this process, and how many others with it: torchrun or srun, as the environment tells."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from nextblock.errors import ConfigError

VARIABLE = "NEXTBLOCK_SHARE"  # "all": this process works on its own, whoever has started it
_TORCHRUN = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # besides RANK and WORLD_SIZE


@dataclass(frozen=True)
class Launched:
    """One of the processes that a launcher has started together.

    Attributes:
        by: "torchrun" or "srun".
        rank: of this process among all, from 0.
        world: processes in all.
        local_rank: of this process among those of its machine, from 0.
        node: number of its machine, from 0.
        per_node: processes on each machine.
    """

    by: str
    rank: int
    world: int
    local_rank: int
    node: int
    per_node: tuple[int, ...]

    @property
    def here(self) -> int:
        """Processes on this machine."""
        return self.per_node[min(self.node, len(self.per_node) - 1)]

    def require(self, devices: int, nodes: int) -> None:
        """Raise ConfigError where a configuration asks for other processes than were started; the same on all of them.

        devices, nodes: 1, and 0 devices, stand for what the launcher says. Whether somebody wrote the 1 is not known.
        """
        count, each = len(self.per_node), set(self.per_node)
        if nodes in (1, count) and (devices in (0, 1) or each == {devices}):
            return
        evenly = f"{self.per_node[0]} on each" if len(each) == 1 else "not evenly on each"
        places = "all on one machine" if count == 1 else f"{evenly} of {count} machines"
        raise ConfigError(
            f"{self.by} has started {self.world} processes, {places}, but devices is {devices} and nodes is "
            f"{nodes}. Set both to 1, which takes what {self.by} says, or let it start as many on each machine."
        )


def launched(environment: Mapping[str, str] = os.environ) -> Launched | None:
    """This process among those that torchrun or srun has started together.

    None where it was started by hand, by our own launcher or by an srun of one task, and where NEXTBLOCK_SHARE=all
    makes it work on its own.
    """
    return None if environment.get(VARIABLE) == "all" else started(environment)


def started(environment: Mapping[str, str] = os.environ) -> Launched | None:
    """`launched`, whatever NEXTBLOCK_SHARE says."""
    if _is_of_torchrun(environment):
        rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        here = int(environment.get("LOCAL_WORLD_SIZE", 1))
        machines = (here,) * max(1, world // here)
        number = {name: int(environment.get(name, 0)) for name in ("LOCAL_RANK", "GROUP_RANK")}
        return Launched("torchrun", rank, world, number["LOCAL_RANK"], number["GROUP_RANK"], machines)
    # A script of sbatch has SLURM_NTASKS and SLURM_PROCID, too, but is one process: only srun sets those of a step.
    world = int(environment.get("SLURM_STEP_NUM_TASKS", 1))
    if world == 1 or "SLURM_PROCID" not in environment:
        return None
    number = {name: int(environment.get(f"SLURM_{name}", 0)) for name in ("PROCID", "LOCALID", "NODEID")}
    machines = _spelled_out(environment.get("SLURM_STEP_TASKS_PER_NODE", str(world)))
    return Launched("srun", number["PROCID"], world, number["LOCALID"], number["NODEID"], machines)


def _is_of_torchrun(environment: Mapping[str, str]) -> bool:
    """Whether RANK and WORLD_SIZE are those of a launcher.

    Some containers say RANK=0 of 1, and our own launcher, which sets NODE_RANK and no RANK, hands that on.
    """
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return False
    return "LOCAL_WORLD_SIZE" in environment or not ("NODE_RANK" in environment or environment["WORLD_SIZE"] == "1")


def is_first(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this is the process that speaks for all that were started together, before it has met them."""
    found = launched(environment)
    own = 0 if environment.get(VARIABLE) == "all" else int(environment.get("LOCAL_RANK", 0))
    return (own if found is None else found.rank) == 0


def require_whole(found: Launched, environment: Mapping[str, str] = os.environ) -> None:
    """Raise ConfigError where RANK and WORLD_SIZE promise processes that nothing says how to find."""
    missing = [name for name in _TORCHRUN if name not in environment]
    if found.by == "torchrun" and found.world > 1 and missing:
        raise ConfigError(
            f"RANK and WORLD_SIZE={found.world} are in the environment, as of torchrun, but not {', '.join(missing)}. "
            f"Start with torchrun or srun; {VARIABLE}=all makes this process work on its own."
        )


def require_alone(what: str, environment: Mapping[str, str] = os.environ) -> None:
    """Raise ConfigError where this process is one of several; `what` works in one only."""
    found = launched(environment)
    if found is not None and found.world > 1:
        raise ConfigError(f"{what} runs in one process, but {found.by} has started {found.world}. Start it without.")


def _spelled_out(counts: str) -> tuple[int, ...]:
    """Slurm's "2(x3),1" -> (2, 2, 2, 1)."""
    found: list[int] = []
    for part in counts.split(","):
        count, _, times = part.partition("(x")
        found += [int(count)] * int(times.rstrip(")") or 1)
    return tuple(found)
