"""The parts of a step add up to it, and timing them changes nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from nextblock.errors import ConfigError
from nextblock.training import profiling
from nextblock.training.config import TrainingConfig
from nextblock.training.loop import Intervals, clipped_update, train
from nextblock.training.optimizer import make_optimizer
from nextblock.training.plan import Plan
from nextblock.training.profile_numbers import loader_rate, memory_used, phase_times, waiting_share
from nextblock.training.profile_parts import Schedule, StepTime, rooms_of
from nextblock.training.profiling import StepProfiler
from nextblock.training.traces import slim
from nextblock.xar.config import XARConfig
from nextblock.xar.model import XAR
from nextblock.xtra.config import XTRAConfig
from nextblock.xtra.model import XTRA
from tiny_generator import TINY as GENERATOR
from tiny_run import TINY

CPU = torch.device("cpu")


class Images:
    """A batch of as many images as positions."""

    def __init__(self, positions: Sequence[int]) -> None:
        self.positions, self.bad = list(positions), []

    def to(self, device: torch.device) -> Images:
        time.sleep(0.001)
        return self

    def pixels(self) -> Tensor:
        return torch.stack([torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(p)) for p in self.positions])


def xtra() -> XTRA:
    torch.manual_seed(3)
    return XTRA(XTRAConfig(**TINY["model"]))


def trained(model: nn.Module, schedule: Schedule, profiler: StepProfiler | None, per_device_batch: int = 0) -> None:
    """The loop's own steps, with or without a profiler around them."""
    config = TrainingConfig(epochs=schedule.total, batch_size=8, per_device_batch=per_device_batch, warmup_epochs=0)
    plan, fabric = Plan(8, config), Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    wrapped = fabric.setup_module(model)
    optimizer: Any = fabric.setup_optimizers(make_optimizer(model, config))
    batches, update, recorder = (Images(p) for p in plan.batches(0)), clipped_update, Plain()

    def loss_of(model: nn.Module, batch: Images, step: int) -> Tensor:
        return model(batch.pixels())

    every = Intervals(log=plan.total_steps)
    if profiler is None:
        train(fabric, wrapped, optimizer, batches, loss_of, plan, every, recorder, update=update)
        return
    with profiler as p:
        train(
            fabric, wrapped, optimizer, p.batches(batches), p.loss(loss_of), plan, every, p, update=p.update(update)
        )  # fmt: skip


class Plain:
    """A recorder that keeps nothing."""

    def step(self, done: int) -> None: ...
    def log(self, row: dict[str, float]) -> None: ...
    def save(self, step: int, state: dict[str, Any]) -> None: ...
    def add_bad_samples(self, bad: list[Any]) -> None: ...


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_marked_and_bare_steps_come_in_pairs_without_a_period() -> None:
    kinds = Schedule(steps=20, warmup=2, traced=3).kinds()
    assert len(kinds) == Schedule(steps=20, warmup=2, traced=3).total == 45
    assert kinds[:2] == ["warmup"] * 2
    assert kinds[-3:] == ["traced"] * 3
    pairs = [tuple(kinds[i : i + 2]) for i in range(2, 42, 2)]
    assert {tuple(sorted(pair)) for pair in pairs} == {("bare", "marked")}
    assert len(set(pairs)) == 2
    assert len({tuple(pairs[i : i + 4]) for i in range(0, 20, 4)}) > 1
    for wrong in ({"steps": 0}, {"warmup": -1}, {"traced": -2}):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))} must be at least"):
            Schedule(**wrong)


@pytest.mark.parametrize("per_device_batch", [0, 3])
def test_phases_add_up_to_the_step(tmp_path: Path, per_device_batch: int) -> None:
    model, schedule, told = xtra(), Schedule(steps=3, warmup=1, traced=1), []
    profiler = StepProfiler(model, CPU, schedule, tmp_path / "trace.json", told.append)
    trained(model, schedule, profiler, per_device_batch)
    steps = profiler.times()
    assert [step.kind for step in steps] == schedule.kinds()
    passes = 3 if per_device_batch else 1
    for step in steps:
        assert step.total_s > 0
        if step.kind == "bare":
            assert step.phases == {}
            continue
        assert tuple(step.phases) == profiler.phases
        assert sum(step.phases.values()) == pytest.approx(step.total_s, rel=1e-9)
        assert all(seconds > 0 for seconds in step.phases.values())
        assert step.phases["transfer"] >= 0.001 * passes
        assert step.phases["transfer"] < 0.9 * step.total_s
    assert len(told) == 1
    assert hooks(model) == 0


def test_the_profiled_steps_compute_what_unprofiled_ones_do(tmp_path: Path) -> None:
    schedule = Schedule(steps=2, warmup=1, traced=1)
    plain, profiled = xtra(), xtra()
    trained(plain, schedule, None)
    trained(profiled, schedule, StepProfiler(profiled, CPU, schedule, None))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), profiled.parameters(), strict=True))


def test_the_trace_shows_the_rooms_and_holds_traced_steps_only(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, schedule = xtra(), Schedule(steps=1, warmup=0, traced=2)
    trained(model, schedule, StepProfiler(model, CPU, schedule, tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = [event["name"] for event in events]
    for phase in ("data", "encoder", "pixel heads", "backward", "optimizer"):
        assert names.count(f"nextblock: {phase}") == 2
    assert any(name.startswith("aten::") for name in names)
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]
    assert capfd.readouterr().err == ""


def test_a_stopped_profile_leaves_no_hooks_and_no_trace(tmp_path: Path) -> None:
    model, schedule = xtra(), Schedule(steps=1, warmup=0, traced=2)
    profiler = StepProfiler(model, CPU, schedule, tmp_path / "trace.json")

    def interrupted(done: int) -> None:
        StepProfiler.step(profiler, done)
        if done == 3:
            raise KeyboardInterrupt

    profiler.step = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trained(model, schedule, profiler)
    assert hooks(model) == 0
    assert list(tmp_path.iterdir()) == []


def test_the_rooms_of_a_generator() -> None:
    model = XAR(XARConfig(**GENERATOR["model"]))
    begun = []
    for name, module, after in rooms_of(model):

        def begins(*_: Any, name: str = name) -> None:
            begun.append(name)

        (module.register_forward_hook if after else module.register_forward_pre_hook)(begins)
    model(torch.randn(2, 3, 8, 8), torch.tensor([0, 1]))
    assert begun == ["tokens in", "layers", "tokens out", "loss"]
    with pytest.raises(ConfigError, match="XTRA and xAR are profiled; got Linear"):
        rooms_of(nn.Linear(2, 2))


class Event:
    """A stand-in for a CUDA event: the device is always 5 ms further."""

    waits = 0
    clock = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: object) -> None:
        Event.clock += 5.0
        self.at = Event.clock

    def synchronize(self) -> None:
        Event.waits += 1

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


def test_on_cuda_nothing_waits_until_the_times_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "Event": Event,
        "current_stream": lambda _: None,
        "reset_peak_memory_stats": lambda _: None,
    }.items():
        monkeypatch.setattr(profiling.torch.cuda, name, value)
    model, schedule = xtra(), Schedule(steps=2, warmup=1, traced=0)
    profiler = StepProfiler(model, torch.device("cuda"), schedule, None)
    trained(model, schedule, profiler)
    assert Event.waits == 0
    times = profiler.times()
    assert Event.waits > 0
    marked = [step for step in times if step.kind == "marked"]
    # A stamp for each of: the step's beginning, data, after it, transfer, inputs, four rooms, backward, optimiser,
    # after it, end.
    assert [step.total_s for step in marked] == pytest.approx([0.060] * 2)
    assert [step.phases["encoder"] for step in marked] == pytest.approx([0.005] * 2)
    assert [step.phases["other"] for step in marked] == pytest.approx([0.015] * 2)
    assert [step.total_s for step in times if step.kind == "bare"] == pytest.approx([0.005] * 2)


def test_means_add_up_and_medians_stand_beside_them() -> None:
    steps = [StepTime("marked", a + b, {"data": a, "backward": b}, a) for a, b in ((0.0, 1.0), (0.0, 1.0), (3.0, 1.0))]
    data, backward = phase_times(steps, ("data", "backward"))
    assert (data.mean_s, data.median_s, data.low_s, data.high_s) == (1.0, 0.0, 0.0, 1.5)
    assert (data.share, backward.share) == (0.5, 0.5)


def test_what_waits_in_the_long_run() -> None:
    assert waiting_share(busy_s=1.0, loading_s=0.5) == 0
    assert waiting_share(busy_s=1.0, loading_s=4.0) == 0.75
    assert waiting_share(busy_s=0.0, loading_s=0.0) == 0


class SlowStream:
    """Takes 4 ms for each position."""

    def load(self, positions: Sequence[int]) -> Images:
        time.sleep(0.004 * len(positions))
        return Images(positions)


def test_the_loader_alone_is_as_fast_as_its_workers() -> None:
    rate = loader_rate(SlowStream(), start=0, images=4, workers=1, pin_memory=False, timeout_s=20)
    assert 80 < rate <= 260  # 250, and less on a busy machine


def test_memory_is_that_of_this_process() -> None:
    used = memory_used(CPU)
    assert 2**26 < used.peak < 2**40


def test_a_trace_keeps_its_longest_events_and_our_phases() -> None:
    def span(name: str, ts: float, dur: float) -> dict[str, Any]:
        return {"ph": "X", "name": name, "ts": ts, "dur": dur, "pid": 1, "tid": 2, "args": {"much": "detail"}}

    events = [span("long", 5, 9), span("short", 1, 1), span("nextblock: data", 3, 0.1)]
    events += [{"ph": "M", "name": "thread_name", "args": {"name": "main"}}, {"ph": "s", "name": "arrow"}]
    kept = slim({"traceEvents": events, "deviceProperties": []}, most=2)["traceEvents"]
    assert [event["name"] for event in kept] == ["thread_name", "nextblock: data", "long"]
    assert "args" not in kept[1]
