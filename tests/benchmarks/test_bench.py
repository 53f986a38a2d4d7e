from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import bench, sampling_speed, training_step
from benchmarks.measure import NOT_MEASURED, Row, Target
from benchmarks.reference import PlainXTRA
from benchmarks.reference_xar import PlainXAR
from nextblock.training.flops import xtra_flops

ROOT = Path(__file__).parents[2]


def fake(monkeypatch: pytest.MonkeyPatch, **modules: Any) -> None:
    """Tables of these names and no others, each with the given `rows`."""
    made = {name: SimpleNamespace(rows=rows, planned=lambda device: []) for name, rows in modules.items()}
    monkeypatch.setattr(bench, "TABLES", tuple(made))
    monkeypatch.setattr(bench.importlib, "import_module", lambda name: made[name.rpartition(".")[2]])
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: name)


def one(device: str, quick: bool) -> list[Any]:
    return [Row("steps", "images/s", device, (Target("plain", ">=", 2.0),), ours=6.0, plain=2.0)]


def foreign(device: str, quick: bool) -> list[Any]:
    return [{"name": "crops", "unit": "images/s", "ours": 3.0, "plain": 2.0, "target": "≥ 2 × plain", "met": False}]


def broken(device: str, quick: bool) -> list[Any]:
    raise RuntimeError("no such file")


def run(tmp_path: Path, *more: str) -> int:
    readme = tmp_path / "README.md"
    if not readme.exists():
        readme.write_text(f"# Title\n\n{bench.BEGIN}\nold\n{bench.END}\n\nafter\n")
    return bench.main(["--out", str(tmp_path), "--readme", str(readme), "--figure", str(tmp_path / "s.png"), *more])


def test_tables_become_results_a_picture_and_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, one=one, foreign=foreign)
    assert run(tmp_path) == 0
    found = json.loads((tmp_path / "speed-cpu.json").read_text())["tables"]
    assert found["one"]["rows"][0]["ratio"] == 3.0
    assert found["foreign"]["rows"][0]["ratio"] == 1.5
    assert {"packages", "commit", "device", "torch_threads"} <= set(found["one"]["environment"])
    text = (tmp_path / "README.md").read_text()
    assert "| steps | CPU | 6 images/s | 3 |  |  | ≥ 2 × plain | yes |" in text
    assert "| crops | CPU | 3 images/s | 1.5 |  |  | ≥ 2 × plain | **no** |" in text
    assert "old" not in text
    assert text.startswith("# Title\n")
    assert text.endswith("after\n")
    assert (tmp_path / "s.png").stat().st_size > 1000


def test_only_one_table_is_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, one=one, foreign=foreign)
    run(tmp_path)
    fake(monkeypatch, one=lambda device, quick: [Row("steps", "images/s", device, ours=9.0)], foreign=broken)
    assert run(tmp_path, "--only", "one") == 0
    found = json.loads((tmp_path / "speed-cpu.json").read_text())["tables"]
    assert (found["one"]["rows"][0]["ours"], found["foreign"]["rows"][0]["ours"]) == (9.0, 3.0)


def test_a_table_that_fails_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(monkeypatch, broken=broken, one=one)
    assert run(tmp_path) == 1
    assert "broken failed: RuntimeError: no such file" in capsys.readouterr().err
    assert list(json.loads((tmp_path / "speed-cpu.json").read_text())["tables"]) == ["one"]


def test_quick_publishes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, one=one)
    assert run(tmp_path, "--quick") == 0
    assert {p.name for p in tmp_path.iterdir()} == {"README.md", "speed-cpu-quick.json"}
    assert "old" in (tmp_path / "README.md").read_text()


def test_an_unknown_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no table trainig_step; tables: startup, "):
        run(tmp_path, "--only", "trainig_step")


def test_what_needs_a_gpu_is_said_not_to_be_measured() -> None:
    rows = bench.planned_rows("cuda")
    by_name = {row["name"]: row for row in rows}
    assert by_name["XTRA-B/16 training step, bf16"]["target"] == "≥ 2 × plain, ≥ 1.15 × second, ≥ 45 % of the limit"
    assert by_name["XTRA-B/16 training step, peak memory"]["target"] == "≤ 0.7 × plain"
    assert by_name["xAR-B sampling"]["target"] == "≥ 3 × plain, ≥ 35 % of the limit"
    assert {row["met"] for row in rows} == {NOT_MEASURED}


@pytest.mark.parametrize("case", [*training_step.cases("cpu"), *training_step.cases("cuda")], ids=lambda c: c.row.name)
def test_every_training_step_runs_in_small(case: training_step.Case) -> None:
    row = training_step.measured(case, "cpu", quick=True)[0]
    assert row.ours is not None
    assert row.ours > 0
    assert row.met in (True, False)
    for arm in (*case.arms, "limit"):
        assert row.ratio(arm) is not None


@pytest.mark.parametrize(
    "case", [*sampling_speed.cases("cpu"), *sampling_speed.cases("cuda")], ids=lambda c: c.row.name
)
def test_sampling_runs_in_small(case: sampling_speed.Case) -> None:
    row = sampling_speed.measured(case, "cpu", quick=True)
    assert row.met in (True, False)
    assert "batch 2, 2 steps" in row.note


@pytest.mark.parametrize("name", ["startup", "probe_sweep"])
def test_the_other_tables_run_in_small(name: str, tmp_path: Path) -> None:
    assert run(tmp_path, "--quick", "--only", name) == 0
    rows = json.loads((tmp_path / "speed-cpu-quick.json").read_text())["tables"][name]["rows"]
    assert all(row["met"] in (True, False) for row in rows)


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("preset", ["xtra_s16", "xtra_h14", "xar_b"])
def test_the_operations_of_a_row_are_those_that_torch_counts_in_the_plain_model(preset: str, quick: bool) -> None:
    case = replace(training_step.cases("cpu")[0], preset=preset, batch=1)
    made = (training_step.XARCase if preset == "xar_b" else training_step.XTRACase)(case, "cpu", quick)
    config = made.config
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        if preset == "xar_b":
            model, labels = PlainXAR(config).eval(), torch.zeros(1).long()
            model(torch.empty(1, config.latent_channels, *config.latent), labels).backward()
        else:
            PlainXTRA(config, predictor_fp32=False).eval()(torch.empty(1, config.channels, *config.image)).backward()
    heads = 0.0 if preset == "xar_b" else 3 * xtra_flops(config).forward["heads"] / (config.ordering.num_entities - 1)
    # The plain heads also read the last cell, from which nothing is predicted; the formula leaves that out.
    assert made.flops() + heads == counter.get_total_flops()
