from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import scaling, scaling_host
from benchmarks.curves import About, curve, departure, power

TIMES = About("time", "panel", "size", "s", "operations")
RATES = About("rate", "panel", "workers", "images/s", "workers", rate=True)


@pytest.mark.parametrize("exponent", [-0.5, 0.0, 1.0, 2.3])
def test_the_exponent_of_a_power_law_is_found(exponent: float) -> None:
    xs = [1.0, 3.0, 10.0, 50.0]
    assert power(xs, [7 * x**exponent for x in xs]) == pytest.approx(exponent, abs=1e-12)


def test_one_size_has_no_exponent() -> None:
    with pytest.raises(ValueError, match="two different sizes"):
        power([4.0, 4.0], [1.0, 2.0])


def test_times_stand_above_theory_and_rates_below() -> None:
    """A cost of 1 s that does not grow: the largest size makes the most of its operations."""
    times = curve(TIMES, {x: [1 + x, 1 + x, 2 + x] for x in (1.0, 10.0, 100.0)}, {x: 5 * x for x in (1.0, 10.0, 100.0)})
    assert [p["median"] for p in times["points"]] == [2.0, 11.0, 101.0]
    assert [p["expected"] for p in times["points"]] == pytest.approx([1.01, 10.1, 101.0])
    assert (times["points"][0]["low"], times["points"][0]["high"]) == (2.0, 2.5)
    assert 0.8 < times["slope"] < times["theory_slope"] == pytest.approx(1.0)
    assert departure(times) == (1.0, pytest.approx(0.505))
    rates = curve(RATES, {1.0: [100.0], 2.0: [200.0], 4.0: [240.0]}, {1.0: 1, 2.0: 2, 4.0: 4})
    assert [p["expected"] for p in rates["points"]] == [100.0, 200.0, 400.0]
    assert departure(rates) == (4.0, pytest.approx(0.6))


def test_no_workers_are_kept_out_of_the_fit() -> None:
    found = curve(RATES, {0: [999.0], 1: [100.0], 2: [200.0]}, {0: 0, 1: 1, 2: 2})
    assert found["slope"] == pytest.approx(1.0)
    assert found["points"][0] == {"x": 0, "median": 999.0, "low": 999.0, "high": 999.0, "expected": None}
    assert departure(found)[1] == pytest.approx(1.0)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_size_that_is_to_be_measured_is_a_model(device: str) -> None:
    sizes = scaling.SIZES[device]
    for axis in scaling.AXES:
        assert len(set(sizes.values[axis])) >= 4
        for value in sizes.values[axis]:
            config = scaling.xtra_config(sizes, axis, value)
            grid = config.grid[0] * config.grid[1]
            got = {"tokens": grid, "width": config.width, "depth": config.depth, "batch": value}
            assert got[axis] == value
    for side in sizes.cells:
        assert scaling.XARConfig(**sizes.xar, entity_size=side).entities.num_entities == (16 // side) ** 2


def test_everything_of_the_device_runs_in_small(tmp_path: Path) -> None:
    names = [*scaling.GROUPS, "shuffle", "checkpoint"]
    assert scaling.main(["--quick", "--out", str(tmp_path), "--only", *names]) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["scaling-cpu-quick.json"]
    groups = json.loads((tmp_path / "scaling-cpu-quick.json").read_text())["groups"]
    assert list(groups) == names
    for name, group in groups.items():
        assert {"packages", "commit", "torch_threads", "command"} <= set(group["environment"]), name
        assert group["device"]
        (found,) = group["curves"]
        assert math.isfinite(found["slope"] + found["theory_slope"])
        assert all(0 < p["low"] <= p["median"] <= p["high"] for p in found["points"])
        assert all(p["expected"] > 0 for p in found["points"])
    steps = groups["batch"]["curves"][0]
    assert steps["theory_slope"] == pytest.approx(1.0)
    assert steps["unit"] == "s"
    assert "tokens 16, width 64, depth 1" in steps["note"]


def test_only_what_is_asked_for_is_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "scaling-cpu.json"
    made = {name: curve(About(name, name, "n", "s", "n"), {1.0: [1.0], 2.0: [2.0]}, {1.0: 1, 2.0: 2}) for name in "ab"}
    monkeypatch.setattr(scaling, "GROUPS", {name: lambda device, quick, name=name: [made[name]] for name in "ab"})
    monkeypatch.setattr(scaling, "HOST", {})
    scaling.measure("cpu", [], file, quick=True)
    made["b"]["slope"] = 9.0
    scaling.measure("cpu", ["b"], file, quick=True)
    assert [found["slope"] for found in scaling.read_curves(file)] == [pytest.approx(1.0), 9.0]
    with pytest.raises(SystemExit, match="no curve c on cpu; there are: a, b"):
        scaling.measure("cpu", ["c"], file, quick=True)


def test_theory_of_the_shuffle_counts_its_rounds() -> None:
    """1,000 places in a network of 1,024; 100,000 in one of 2^18: 2.6 rounds."""
    first, second = scaling_host.shuffle(quick=True)[0]["points"]
    assert second["expected"] / first["expected"] == pytest.approx((2**18 / 1e5) / (2**10 / 1e3))


def test_opening_is_measured_in_a_process_that_only_imported(tmp_path: Path) -> None:
    for n in range(3):
        Image.new("L", (1, 1)).save(tmp_path / f"{n}.png")
    tasks = [("opened", tmp_path), ("digested", tmp_path)]
    for took, mib in scaling_host.in_forks(tasks, tmp_path / "cache"):
        assert 0 < took < 5
        assert 0 <= mib < 100
    found = scaling_host.opening_curves(
        *({kind: {1.0: [y], 10.0: [10 * y]} for kind in ("files", "rows", "fingerprint")} for y in (2.0, 0.5))
    )
    assert [c["slope"] for c in found] == pytest.approx([1.0] * 6)
    assert [(c["panel"], c["unit"]) for c in found[::3]] == [("opening a data set", "s"), ("memory of opening", "MiB")]
