from __future__ import annotations

import pytest

from nextblock.errors import ConfigError
from nextblock.training.config import TrainingConfig
from nextblock.training.plan import Plan


def plan(length: int = 1000, rank: int = 0, world: int = 1, **values: object) -> Plan:
    defaults = {"epochs": 10, "batch_size": 100, "warmup_epochs": 1, "lr": 1.0}
    return Plan(length, TrainingConfig(**(defaults | values)), rank, world)  # type: ignore[arg-type]


def test_lengths_follow_from_the_epochs() -> None:
    assert plan().total_steps == 100
    assert plan(length=50, epochs=0.1).total_steps == 1
    assert plan().epoch(25) == 2.5
    assert plan(length=1281167, epochs=800, batch_size=2088).total_steps == 490869


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("per_device_batch", [0, 1, 7, 25])
def test_processes_and_passes_share_the_batch_exactly(world: int, per_device_batch: int) -> None:
    shares = [plan(rank=r, world=world, per_device_batch=per_device_batch).micro_batches(3) for r in range(world)]
    assert [p for share in shares for passed in share for p in passed] == list(range(300, 400))
    if per_device_batch:
        assert all(len(passed) <= per_device_batch for share in shares for passed in share)


def test_batches_start_where_a_run_continues() -> None:
    everything = list(plan(per_device_batch=30).batches(0))
    later = list(plan(per_device_batch=30).batches(40))
    assert everything[-len(later) :] == later
    assert later[0][0] == 4000


def test_every_process_needs_an_image() -> None:
    with pytest.raises(ConfigError, match="smaller than the 4 processes"):
        plan(batch_size=3, world=4)


def test_no_more_steps_than_can_be_numbered() -> None:
    with pytest.raises(ConfigError, match=r"training.epochs 9e\+307 of 2 images are more than 1e\+15 steps"):
        Plan(2, TrainingConfig(epochs=9e307))


def test_learning_rate() -> None:
    p = plan(warmup_start=0.1, final=0.001)
    assert p.lr(0) == pytest.approx(0.1)
    assert p.lr(5) == pytest.approx(0.55)
    assert p.lr(10) == pytest.approx(1.0)
    assert p.lr(54) == pytest.approx(0.5 * 1.001, abs=0.02)
    assert p.lr(99) == pytest.approx(0.001)
    rates = [p.lr(s) for s in range(100)]
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_the_rate_stays_at_its_peak_until_the_decay_begins() -> None:
    """As the official xAR code does with 100, 600 and 800 epochs, here at any length."""
    p = plan(decay_from=0.75, final=0.025)
    rates = [p.lr(s) for s in range(100)]
    assert rates[10:76] == [1.0] * 66
    assert rates[76] < 1.0
    assert p.lr(87) == pytest.approx((1 + 0.025) / 2, abs=0.04)
    assert rates[99] == pytest.approx(0.025)
    assert rates[75:] == sorted(rates[75:], reverse=True)


def test_a_decay_from_the_start_is_the_plain_cosine_and_one_from_the_end_is_none() -> None:
    assert [plan(decay_from=0.05).lr(s) for s in range(100)] == [plan().lr(s) for s in range(100)]
    assert plan(decay_from=1.0).lr(99) == 1.0


def test_a_short_run_shortens_its_warm_up() -> None:
    p = plan(epochs=1, warmup_epochs=40)
    assert p.lr(2) == pytest.approx(1.0)
    assert plan(epochs=1, batch_size=1000).lr(0) > 0


def test_a_warm_up_shorter_than_a_step_is_none() -> None:
    """Otherwise a run of one step would train at the first rate of the warm-up, which may be 0, and learn nothing."""
    one = plan(length=8, batch_size=8, epochs=1, warmup_start=0.0)
    assert (one.total_steps, one.warmup_steps, one.lr(0)) == (1, 0.0, 1.0)
    five = plan(length=40, batch_size=8, epochs=1, warmup_start=0.0)
    assert (five.warmup_steps, five.lr(0), five.lr(1)) == (1.0, 0.0, 1.0)
    assert plan(length=40, batch_size=80, epochs=20, warmup_start=0.0).lr(0) == 1.0  # half a step


def test_the_largest_pass() -> None:
    assert plan().largest_pass == 100
    assert plan(per_device_batch=30).largest_pass == 25
    assert [plan(world=3, rank=rank).largest_pass for rank in range(3)] == [33, 33, 34]


def test_images_that_repeat_within_a_batch_are_told() -> None:
    assert plan(length=100).repeats() is None
    told = plan(length=24).repeats()
    assert told is not None
    assert "training.batch_size is 100, but there are 24 images" in told
    assert "repeat within a batch" in told
    assert "training.batch_size to 24 or less" in told


@pytest.mark.parametrize(("rule", "peak"), [("sqrt", 0.5), ("linear", 0.25), ("none", 1.0)])
def test_learning_rate_is_scaled_from_its_own_batch(rule: str, peak: float) -> None:
    config = TrainingConfig(lr=1.0, lr_at_batch=1024, batch_size=256, lr_scaling=rule)  # type: ignore[arg-type]
    assert config.peak_lr == peak


@pytest.mark.parametrize(
    "values",
    [
        {"epochs": 0},
        {"batch_size": -1},
        {"lr": 0},
        {"final": 2},
        {"decay_from": 1.5},
        {"betas": (0.9, 1.0)},
        {"clip_grad_norm": -1},
    ],
)
def test_bad_values_are_named(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"training.{next(iter(values))}"):
        TrainingConfig(**values)  # type: ignore[arg-type]
