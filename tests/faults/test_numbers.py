"""NaN and infinity in input, activation, gradient and loss: nothing of it reaches weights or optimiser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from forked_ranks import Ranks
from injected import CASES, HEADS, STEPS


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks() as found:
        yield found


@pytest.fixture(scope="module", params=[1, 2])
def injected(ranks: Ranks, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return _ended(ranks, "injected:run_cases", request.param, tmp_path_factory.mktemp("cases"))


@pytest.fixture(scope="module", params=[1, 2])
def probed(ranks: Ranks, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return _ended(ranks, "injected:run_probes", request.param, tmp_path_factory.mktemp("probes"))


def _ended(ranks: Ranks, call: str, world: int, out: Path) -> dict[str, Any]:
    """What all processes ended with, by case; the same in all of them."""
    ranks.run(call, world, {"world": world, "out": str(out)})
    found: dict[str, list[Any]] = {}
    for file in sorted(out.iterdir()):
        found.setdefault(file.stem.rpartition("-")[0], []).append(json.loads(file.read_text()))
    for case, by_rank in found.items():
        assert len(by_rank) == world
        assert all(each == by_rank[0] for each in by_rank), f"the processes differ: {case}"
    return {case: by_rank[0] for case, by_rank in found.items()}


@pytest.mark.parametrize("case", CASES)
def test_a_step_that_is_not_finite_is_as_if_it_had_been_left_out(injected: dict[str, Any], case: str) -> None:
    found, reference = injected[case], injected["reference"]
    assert found["finite"]
    assert reference["skipped"] == found["skipped"] == len(STEPS)
    for what in ("model", "optimizer", "ema"):
        assert found[what] == reference[what], what


@pytest.mark.parametrize("where", ["logits", "gradient", "loss"])
@pytest.mark.parametrize("number", range(HEADS))
def test_one_head_of_a_probe_stops_and_the_others_learn_on(probed: dict[str, Any], number: int, where: str) -> None:
    found, clean = probed[f"head_{number}_{where}"], probed["clean"]
    assert found["finite"]
    assert found["diverged"] == [each == number for each in range(HEADS)]
    assert found["skipped"] == 0
    for head in map(str, range(HEADS)):
        alone = found["before"] if head == str(number) else clean["after"]
        assert found["after"][head] == alone[head], head


def test_features_that_are_not_finite_cost_a_step_and_no_head(probed: dict[str, Any]) -> None:
    found, reference = probed["features"], probed["reference"]
    assert found["finite"]
    assert found["diverged"] == [False] * HEADS
    assert found["skipped"] == reference["skipped"] == 1
    assert found["state"] == reference["state"]
    assert found["state"] != probed["clean"]["state"]
