"""What each of two processes sees that torchrun or srun has started; for `faults.forked_ranks`, which stands in."""

from __future__ import annotations

import os

import pytest
import torch

from nextblock.errors import ConfigError
from nextblock.training import launch as launching
from nextblock.training.config import TrainingConfig
from nextblock.training.launch import launch, processes_here

CPU = TrainingConfig(device="cpu")


def by_torchrun() -> None:
    rank = _be_of_torchrun()
    _meet(CPU, rank)
    _meet(TrainingConfig(device="cpu", devices=2), rank)
    _meet(TrainingConfig(device="cpu", devices=0), rank)
    for devices, nodes in ((3, 1), (1, 2)):
        told = f"torchrun has started 2 processes, all on one machine, but devices is {devices} and nodes is {nodes}"
        with pytest.raises(ConfigError, match=told):
            launch(TrainingConfig(device="cpu", devices=devices, nodes=nodes))


def by_srun() -> None:
    rank = os.environ["LOCAL_RANK"]
    for name in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR"):
        del os.environ[name]
    os.environ |= {"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "4", "SLURM_NNODES": "1"}  # of the job
    os.environ |= {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NODEID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    os.environ |= {"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "localhost"}
    _meet(CPU, int(rank))


def on_its_own() -> None:
    """Two processes that have nothing to do with each other."""
    _be_of_torchrun()
    os.environ["NEXTBLOCK_SHARE"] = "all"
    fabric = launch(CPU)
    assert (fabric.world_size, fabric.global_rank, fabric.broadcast(os.getpid())) == (1, 0, os.getpid())
    with pytest.raises(ConfigError, match=r"NEXTBLOCK_SHARE=all makes each process of torchrun .* devices is 2"):
        launch(TrainingConfig(device="cpu", devices=2))


def half_told() -> None:
    os.environ["RANK"] = os.environ["LOCAL_RANK"]
    del os.environ["NODE_RANK"]
    with pytest.raises(ConfigError, match=r"RANK and WORLD_SIZE=2 are in the environment, .* not LOCAL_WORLD_SIZE"):
        launch(CPU)


def fewer_than_started() -> None:
    """Whatever Lightning makes of it, no process of several trains alone."""
    _be_of_torchrun()
    launching._given_processes = lambda *_: {"devices": 1}
    with pytest.raises(ConfigError, match="2 processes are meant to work together, but 1 do"):
        launch(CPU)


def _be_of_torchrun() -> int:
    os.environ |= {"RANK": os.environ["LOCAL_RANK"], "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    return int(os.environ["RANK"])


def _meet(training: TrainingConfig, rank: int) -> None:
    fabric = launch(training)
    assert (fabric.world_size, fabric.global_rank, processes_here(fabric)) == (2, rank, 2)
    assert float(fabric.all_reduce(torch.ones(1), reduce_op="sum")) == 2
