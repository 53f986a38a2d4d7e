from __future__ import annotations

import json
import time

import pytest

from benchmarks.measure import NOT_MEASURED, Row, Target, Timings, interleaved, quartiles

TARGETS = (Target("plain", ">=", 2.0), Target("limit", ">=", 0.45))


def test_arms_take_turns_and_each_begins_once() -> None:
    seen: list[str] = []
    arms = {name: lambda name=name: seen.append(name) for name in "abc"}
    timed = interleaved(arms, rounds=3, warmup=2, device="cpu")
    assert seen == [*"aabbcc", *"abc", *"bca", *"cab"]
    assert {name: len(found) for name, found in timed.seconds.items()} == dict.fromkeys("abc", 3)


def test_a_ratio_is_that_of_rounds_and_a_slow_spell_does_not_move_it() -> None:
    quiet, busy = 1.0, 10.0
    seconds = {
        "ours": [quiet, busy, quiet, busy, quiet],
        "plain": [2 * quiet, 2 * busy, 2 * quiet, 2 * busy, 2 * quiet],
    }
    row = Timings(seconds).row(Row("a", "images/s", "cpu", TARGETS), {"ours": 4, "plain": 4})
    assert (row.ours, row.ratio("plain")) == (4.0, 2.0)
    assert row.spread["ours/plain"] == (2.0, 2.0)
    assert row.spread["ours"] == (0.4, 4.0)


def test_amounts_may_differ() -> None:
    row = Timings({"ours": [1.0], "limit": [0.5]}).row(Row("a", "images/s", "cpu"), {"ours": 8, "limit": 10})
    assert (row.ours, row.limit, row.ratio("limit")) == (8.0, 20.0, 0.4)


@pytest.mark.parametrize(
    ("numbers", "met"),
    [
        ({}, NOT_MEASURED),
        ({"ours": 5.0, "plain": 2.0}, NOT_MEASURED),  # the limit is missing
        ({"ours": 5.0, "plain": 2.0, "limit": 10.0}, True),
        ({"ours": 5.0, "plain": 2.6, "limit": 10.0}, False),
        ({"ours": 4.0, "plain": 2.0, "limit": 10.0}, False),
    ],
)
def test_all_targets_must_be_met(numbers: dict[str, float], met: bool | str) -> None:
    assert Row("a", "images/s", "cpu", TARGETS, **numbers).met is met


def test_less_can_be_better() -> None:
    memory = Row("a", "GiB", "cuda", (Target("plain", "<=", 0.7),), ours=6.0, plain=10.0)
    startup = Row("b", "s", "cpu", (Target("itself", "<=", 0.5),), ours=0.6)
    assert (memory.met, startup.met) == (True, False)
    assert (memory.to_dict()["target"], startup.to_dict()["target"]) == ("≤ 0.7 × plain", "≤ 0.5")


def test_a_row_is_json() -> None:
    row = Row("a", "images/s", "cpu", TARGETS, ours=4.0, plain=2.0, limit=8.0, spread={"ours": (1.0, 2.0)}, note="n")
    found = json.loads(json.dumps(row.to_dict()))
    assert (found["ratio"], found["share_of_limit"], found["ratio_second"], found["met"]) == (2.0, 0.5, None, True)
    assert found["target"] == "≥ 2 × plain, ≥ 45 % of the limit"
    assert found["spread"] == {"ours": [1.0, 2.0]}


def test_time_is_measured() -> None:
    arms = {"slow": lambda: time.sleep(0.02), "fast": lambda: None}
    timed = interleaved(arms, rounds=2, warmup=0, device="cpu")
    assert min(timed.seconds["slow"]) > max(timed.seconds["fast"])


def test_quartiles() -> None:
    assert quartiles([3.0]) == (3.0, 3.0)
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 4.0)
