"""The processes of torchrun and srun work together; in a suite, a data set that fails on one of them ends them all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.forked_ranks import Ranks


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks() as found:
        yield found


@pytest.mark.parametrize("case", ["by_torchrun", "by_srun", "on_its_own", "half_told", "fewer_than_started"])
def test_the_world_is_what_the_launcher_says(case: str, ranks: Ranks) -> None:
    ranks.run(f"jobs.launched_ranks:{case}", 2, {})


@pytest.mark.parametrize("case", ["alike", "to_the_last", "alone", "elsewhere"])
def test_a_suite_of_two_processes(case: str, ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(f"jobs.suite_ranks:{case}", 2, {"out": str(tmp_path / "suite")})
