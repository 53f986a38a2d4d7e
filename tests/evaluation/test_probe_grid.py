"""A grid of heads: each one's trajectory is the one it would have alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric

from close import assert_close
from nextblock.evaluation.probe import HeadSpec, ProbeGrid, ProbeTraining, predict_all
from nextblock.training.config import TrainingConfig
from nextblock.training.loop import Intervals, Meters, train
from nextblock.training.plan import Plan
from nextblock.xtra.classifier import Classifier, LayerMean
from nextblock.xtra.config import XTRAConfig

LAST, SIX = LayerMean(3, 3), LayerMean(1, 3)
SPECS = [
    HeadSpec("linear", 1e-2, 0.0, LAST),
    HeadSpec("attentive", 1e-3, 0.1, SIX),
    HeadSpec("linear", 1e-1, 0.1, LAST),
    HeadSpec("attentive", 3e-2, 0.1, SIX),
    HeadSpec("attentive", 3e-2, 0.5, LAST),
]
WIDTH, CLASSES, STEPS = 16, 4, 25


@dataclasses.dataclass
class TokenBatch:
    inputs: dict[LayerMean, torch.Tensor]
    labels: torch.Tensor
    bad: list[Any] = dataclasses.field(default_factory=list)

    def to(self, device: torch.device) -> TokenBatch:
        return self


def batch(step: int) -> TokenBatch:
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(CLASSES, (12,), generator=generator)
    inputs = {}
    for i, layers in enumerate((LAST, SIX)):
        tokens = torch.randn(12, 6, WIDTH, generator=generator, dtype=torch.float64)
        tokens[:, :, i] += 2.0 * labels[:, None]
        inputs[layers] = tokens
    return TokenBatch(inputs, labels)


class Silent:
    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.saved: dict[str, Any] = {}

    def step(self, done: int) -> None: ...
    def log(self, row: dict[str, float]) -> None:
        self.rows.append(row)

    def save(self, step: int, state: dict[str, Any]) -> None:
        self.saved = state

    def add_bad_samples(self, bad: list[Any]) -> None: ...


def trained(
    specs: list[HeadSpec], steps: int = STEPS, resume: dict[str, Any] | None = None, stop: int = 0, per_device: int = 0
) -> tuple[ProbeGrid, ProbeTraining, Silent]:
    fabric = Fabric(accelerator="cpu", devices=1)
    grid = ProbeGrid(specs, WIDTH, CLASSES, num_heads=4, seed=3).double()
    training = ProbeTraining(grid, fabric.device, label_smoothing=0.1, clip=0.5)
    config = TrainingConfig(epochs=1, batch_size=12, per_device_batch=per_device, warmup_epochs=0.1)
    plan = Plan(12 * steps, config)
    model: Any = fabric.setup_module(grid)
    optimizer: Any = fabric.setup_optimizers(training.optimizer((0.9, 0.95)))
    meters, start = Meters.zeros(fabric.device), 0
    if resume:
        grid.load_state_dict(resume["model"])
        optimizer.load_state_dict(resume["optimizer"])
        training.load(resume["probe"])
        meters.load(resume["meters"])
        start = int(resume["step"])
    recorder = Silent()
    calls = iter(range(10**6))
    train(
        fabric, model, optimizer, (batch(s) for s in range(start, steps)),
        lambda m, b, step: training.loss(m, [b.inputs[layers] for layers in grid.inputs], b.labels),
        plan, Intervals(log=5), recorder, start_step=start, meters=meters, update=training.update,
        extra_state=lambda: {"probe": training.state()},
        stop_asked=lambda: bool(stop) and next(calls) + 1 >= stop,
    )  # fmt: skip
    return grid, training, recorder


def test_every_head_is_trained_as_alone() -> None:
    grid, _, recorder = trained(SPECS)
    for number, spec in enumerate(SPECS):
        alone, _, _ = trained([spec])
        assert alone.head_state(0).keys() == grid.head_state(number).keys()
        for name, value in alone.head_state(0).items():
            assert_close(grid.head_state(number)[name], value, 1e-6)
    assert recorder.rows[-1]["loss"] < recorder.rows[0]["loss"]
    moved = ProbeGrid(SPECS, WIDTH, CLASSES, num_heads=4, seed=3).head_state(0)["weight"]
    assert not torch.allclose(moved.double(), grid.head_state(0)["weight"], atol=1e-3)


def test_a_stopped_grid_goes_on_to_the_bit() -> None:
    whole, one, _ = trained(SPECS)
    _, _, recorder = trained(SPECS, stop=9)
    assert recorder.saved["step"] == 9
    again, two, _ = trained(SPECS, resume=recorder.saved)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert one.read_losses() == two.read_losses()


def test_one_head_that_diverges_takes_no_other_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fine, _, _ = trained(SPECS)
    poisoned = [*SPECS, HeadSpec("attentive", 1e-3, 0.1, SIX)]
    original = ProbeGrid.forward

    def forward(self: ProbeGrid, inputs: list[torch.Tensor]) -> torch.Tensor:
        logits = original(self, inputs)
        if len(self.specs) > len(SPECS):
            factor = torch.ones(len(logits), 1, 1, dtype=logits.dtype)
            factor[-1] = float("inf")
            logits = logits * factor
        return logits

    monkeypatch.setattr(ProbeGrid, "forward", forward)
    grid, training, recorder = trained(poisoned)
    assert training.diverged.tolist() == [False] * len(SPECS) + [True]
    assert np.isnan(training.read_losses()[-1])
    assert np.isfinite(recorder.rows[-1]["loss"])
    for number in range(len(SPECS)):
        for name, value in fine.head_state(number).items():
            assert_close(grid.head_state(number)[name], value, 1e-6)
    assert all(torch.isfinite(value).all() for value in grid.head_state(len(SPECS)).values())


def test_a_batch_that_is_not_finite_is_skipped_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = batch(7)
    for tokens in broken.inputs.values():
        tokens[0, 0, 0] = float("nan")
    original = batch
    monkeypatch.setitem(globals(), "batch", lambda step: broken if step == 7 else original(step))
    grid, training, recorder = trained(SPECS)
    assert not training.diverged.any()
    assert recorder.rows[-1]["skipped"] == 1
    assert all(torch.isfinite(value).all() for value in grid.state_dict().values())


def test_predictions_and_the_classifier_agree() -> None:
    grid, _, _ = trained(SPECS)
    test = [batch(100), batch(101)]
    found = predict_all(grid, [([b.inputs[layers] for layers in grid.inputs], b.labels) for b in test])
    assert found.classes.shape == (len(SPECS), 24)
    assert found.top1().max() > 60
    config = XTRAConfig(image_size_px=16, patch_size_px=4, cell_size=2, width=16, depth=3, num_heads=2)
    model = Classifier(config, grid.head_config(3), ["a", "b", "c", "d"])
    model.head.load_state_dict(grid.head_state(3))
    said = model.double().eval().head(test[0].inputs[SIX])[0].argmax(1)
    assert said.tolist() == found.classes[3, :12].tolist()


def test_the_grid_asks_for_tokens_only_where_a_head_attends() -> None:
    grid = ProbeGrid(SPECS[:2], WIDTH, CLASSES, num_heads=4)
    assert grid.inputs == [LAST, SIX]
    assert [grid.reads_tokens(layers) for layers in grid.inputs] == [False, True]
