"""What the environment says of who has started this process."""

from __future__ import annotations

import pytest

from nextblock.errors import ConfigError
from nextblock.training.launcher import Launched, launched, require_alone, require_whole


def torchrun(rank: int, world: int, here: int) -> dict[str, str]:
    facts = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank % here, "LOCAL_WORLD_SIZE": here}
    facts |= {"GROUP_RANK": rank // here, "MASTER_PORT": 29500}
    return {name: str(value) for name, value in facts.items()} | {"MASTER_ADDR": "first"}


def srun(rank: int, world: int, per_node: str, local: int = 0, node: int = 0) -> dict[str, str]:
    facts = {"PROCID": rank, "STEP_NUM_TASKS": world, "LOCALID": local, "NODEID": node, "STEP_TASKS_PER_NODE": per_node}
    return {f"SLURM_{name}": str(value) for name, value in facts.items()}


def test_who_has_started_this_process() -> None:
    assert launched({}) is None
    assert launched({"WORLD_SIZE": "2", "LOCAL_RANK": "1", "NODE_RANK": "0"}) is None, "started by our own launcher"
    container = {"RANK": "0", "WORLD_SIZE": "1"}
    assert launched(container) is None, "may start others itself"
    assert launched(container | {"WORLD_SIZE": "2", "LOCAL_RANK": "1", "NODE_RANK": "0"}) is None, "one of those"
    assert launched({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}) is None, "a script of sbatch, before any srun"
    assert launched(srun(0, 1, "1")) is None, "may start others itself"
    assert launched(torchrun(5, 8, 4)) == Launched("torchrun", 5, 8, 1, 1, (4, 4))
    assert launched(torchrun(0, 1, 1)) == Launched("torchrun", 0, 1, 0, 0, (1,))
    found = launched(srun(6, 7, "2(x3),1", node=3))
    assert found == Launched("srun", 6, 7, 0, 3, (2, 2, 2, 1))
    assert found.here == 1
    assert launched(srun(1, 2, "2", 1) | torchrun(3, 4, 4)) == launched(torchrun(3, 4, 4)), "torchrun within srun"
    assert launched(torchrun(1, 2, 2) | {"NEXTBLOCK_SHARE": "all"}) is None
    assert launched(torchrun(1, 2, 2) | {"NEXTBLOCK_SHARE": "3/8"}) is not None


@pytest.mark.parametrize(
    ("devices", "nodes", "fits"),
    [
        (1, 1, True),
        (0, 1, True),
        (4, 1, True),
        (4, 2, True),
        (1, 2, True),
        (8, 1, False),
        (2, 2, False),
        (4, 3, False),
    ],
)
def test_other_numbers_than_were_started_are_refused_on_all_alike(devices: int, nodes: int, fits: bool) -> None:
    told = (
        rf"torchrun has started 8 processes, 4 on each of 2 machines, but devices is {devices} and nodes is {nodes}\."
    )
    for rank in range(8):
        found = launched(torchrun(rank, 8, 4))
        assert found
        if fits:
            found.require(devices, nodes)
        else:
            with pytest.raises(ConfigError, match=told):
                found.require(devices, nodes)


def test_unevenly_started_processes_are_taken_as_they_are() -> None:
    found = launched(srun(0, 3, "2,1"))
    assert found
    found.require(1, 1)
    with pytest.raises(
        ConfigError, match="srun has started 3 processes, not evenly on each of 2 machines, but devices is 2"
    ):
        found.require(2, 2)


def test_processes_that_cannot_be_found_are_refused() -> None:
    for names, missing in (
        (["MASTER_ADDR", "LOCAL_RANK"], "LOCAL_RANK, MASTER_ADDR"),
        (["MASTER_PORT"], "MASTER_PORT"),
    ):
        environment = {name: value for name, value in torchrun(1, 2, 2).items() if name not in names}
        found = launched(environment)
        assert found
        with pytest.raises(ConfigError, match=f"not {missing}. Start with torchrun"):
            require_whole(found, environment)


def test_what_works_in_one_process_refuses_several() -> None:
    require_alone("segmentation", {})
    require_alone("segmentation", torchrun(0, 1, 1))
    require_alone("segmentation", torchrun(0, 2, 2) | {"NEXTBLOCK_SHARE": "all"})
    with pytest.raises(ConfigError, match="segmentation runs in one process, but srun has started 2"):
        require_alone("segmentation", srun(0, 2, "2"))
