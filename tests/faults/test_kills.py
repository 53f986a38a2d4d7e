"""Each kind of work is killed by SIGKILL, at drawn moments and at chosen ones, goes on, and ends as if it had not been.

`python -m tests.faults.full` does the same some hundred times.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from fork_server import ForkServer
from killing import Killer
from victims import make_material, victims

WAYS = {
    "xtra": ["save", "validation", "worker", "moment"],
    "xar": ["save", "moment"],
    "probe suite": ["features", "save"],
    "latents": ["save", "moment"],
    "samples": ["moment", "save"],
    "prepare": ["save", "worker", "moment"],
}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_material(tmp_path_factory.mktemp("material"))


@pytest.mark.parametrize("name", list(WAYS))
def test_killed_work_ends_as_if_it_had_not_been(name: str, server: ForkServer, material: Path, tmp_path: Path) -> None:
    killer = Killer(server, victims(material)[name], tmp_path / "work", random.Random(name))
    outcome = killer.chain(len(WAYS[name]), WAYS[name])
    assert not outcome.failures, outcome.failures[0]
    assert outcome.kills.total() == len(WAYS[name])
    assert outcome.finished >= 1
