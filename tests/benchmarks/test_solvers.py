from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import solvers
from benchmarks.measure import NOT_MEASURED
from nextblock.xar.config import XARConfig
from nextblock.xar.model import XAR

SIZES: dict[str, Any] = {"latent_size": 8, "latent_channels": 1, "patch_size": 1, "entity_size": 4, "width": 16,
                         "depth": 2, "num_heads": 2, "num_classes": 10}  # fmt: skip


@pytest.fixture
def model() -> XAR:
    torch.manual_seed(0)
    return XAR(XARConfig(**SIZES)).eval()


@pytest.mark.parametrize(
    ("solver", "formula"), [("euler", "s"), ("multistep", "s"), ("euler_maruyama", "s"), ("heun", "2s - 1")]
)
@pytest.mark.parametrize("steps", [1, 4])
def test_counted_evaluations_are_the_documented_ones(model: XAR, solver: str, formula: str, steps: int) -> None:
    latents, evaluations, cached = solvers.sampled(model, solver, "auto", steps, noise=0, count=2)
    assert evaluations == {"s": steps, "2s - 1": 2 * steps - 1}[formula]
    assert cached == 3  # four cells, the last of which nobody reads
    assert latents.shape == (2, 1, 8, 8)
    assert "velocities" not in vars(model)  # the counter is gone
    assert "remember" not in vars(model)


def test_what_is_asked_unequally_often_has_no_one_number(model: XAR, monkeypatch: pytest.MonkeyPatch) -> None:
    def first_entity_only(model: XAR, labels: Any, **_: Any) -> torch.Tensor:
        model.velocities(torch.zeros(1, 16, 1), torch.ones(1, 1), labels[:1], first=0)
        return torch.zeros(1, 1, 8, 8)

    monkeypatch.setattr(solvers, "sample_latents", first_entity_only)
    with pytest.raises(RuntimeError, match="differently often"):
        solvers.sampled(model, "euler", "auto", 1, noise=0, count=1)


def test_equal_means_equal_at_every_larger_number() -> None:
    assert solvers.equal_from({2: 9.0, 3: 1.0, 5: 2.0, 7: 1.0}, 1.5) == 7
    assert solvers.equal_from({2: 9.0, 3: 1.5, 5: 1.0}, 1.5) == 3
    assert solvers.equal_from({2: 1.0, 3: 1.0, 5: 2.0}, 1.5) is None


def point(arm: solvers.Arm, evaluations: int, frechet: float, noise: int = 0) -> dict[str, Any]:
    return {"arm": arm.name, "steps": evaluations, "noise": noise, "evaluations": evaluations, "frechet": frechet}


def test_the_verdict_is_that_of_the_rule() -> None:
    fast = solvers.Arm("multistep", "uniform")
    one = [
        *(point(solvers.REFERENCE, 50, value, noise) for noise, value in ((1, 9.0), (2, 10.0), (3, 11.0))),  # 10 ± 1
        *(point(solvers.EULER, at, value) for at, value in ((5, 30.0), (10, 13.5), (20, 12.5), (100, 11.8))),
        *(point(fast, at, value) for at, value in ((3, 14.0), (4, 13.0), (5, 11.9))),
    ]
    found = solvers.judged({"0": one, "1": one})
    assert found["limits"] == {"euler_maruyama": pytest.approx(12.0), "euler": pytest.approx(13.8)}
    assert found["equal_from"][solvers.EULER.name] == {"euler_maruyama": 100, "euler": 10}
    assert found["fewest"]["euler_maruyama"] == {"arm": fast.name, "evaluations": 5}
    assert found["fewest"]["euler"] == {"arm": fast.name, "evaluations": 4}
    assert found["cheapest_euler"] == 10
    row = solvers.row_of(found, 2, 720)
    assert (row.ours, row.plain, row.met) == (5, 50.0, True)


@pytest.mark.slow
def test_quick_writes_results_and_a_picture_and_the_row_reads_them(tmp_path: Path) -> None:
    assert solvers.rows("cpu", results=tmp_path)[0].met == NOT_MEASURED
    solvers.main(["--quick", "--results", str(tmp_path)])
    assert (tmp_path / "solvers-quick.png").stat().st_size > 5000
    made = tmp_path / "solvers-cpu-quick.json"
    points = json.loads(made.read_text())["points"]["0"]
    assert {each["cache"] for each in points} == {3}
    assert len(points) == len(solvers.NOISE_SEEDS) + 3 * len(solvers.ARMS)
    made.rename(tmp_path / "solvers-cpu.json")
    row = solvers.rows("cpu", results=tmp_path)[0]
    assert row.plain == 50
    assert "1 generators" not in row.note
    assert "20 samples" in row.note
    assert solvers.rows("cuda") == solvers.planned("cuda") == []


def test_kept_points_are_not_made_again(model: XAR, tmp_path: Path) -> None:
    kept, made = tmp_path / "kept.json", []

    def score(images: Any) -> dict[str, float]:
        made.append(len(images))
        return {"frechet": 1.0}

    arms = [solvers.Arm("euler", "uniform", (1, 2))]
    first = solvers.measure_all(model, score, arms, count=2, reference_steps=1, kept=kept)
    assert len(made) == len(first) == len(solvers.NOISE_SEEDS) + 2
    assert solvers.measure_all(model, score, arms, count=2, reference_steps=1, kept=kept) == first
    assert len(made) == len(first)
