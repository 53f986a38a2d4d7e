"""The loop on a small model of its own: steps, skips, logs, evaluations, checkpoints, stops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from nextblock.data.stream import BadSample, Batch
from nextblock.errors import RunError
from nextblock.training.config import TrainingConfig
from nextblock.training.loop import Intervals, Meters, NotFinite, train
from nextblock.training.optimizer import make_optimizer, parameter_groups
from nextblock.training.plan import Plan


class Memory:
    """A recorder that keeps everything."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.saved: dict[int, dict[str, Any]] = {}
        self.steps: list[int] = []
        self.bad: list[BadSample] = []

    def step(self, done: int) -> None:
        self.steps.append(done)

    def log(self, row: dict[str, float]) -> None:
        self.rows.append(row)

    def save(self, step: int, state: dict[str, Any]) -> None:
        copy = {k: v.clone() for k, v in state["model"].items()}
        optimizer = torch.utils._pytree.tree_map(
            lambda v: v.clone() if isinstance(v, Tensor) else v, state["optimizer"]
        )
        self.saved[step] = state | {"model": copy, "optimizer": optimizer}

    def add_bad_samples(self, bad: list[BadSample]) -> None:
        self.bad += bad


def batches(plan: Plan, start: int = 0) -> Iterator[Batch]:
    for positions in plan.batches(start):
        where = torch.tensor(positions)
        pixels = (where[:, None] * torch.arange(1, 13) % 251).to(torch.uint8).view(-1, 2, 2, 3)
        none = torch.zeros(len(where), dtype=torch.bool)
        yield Batch(images=pixels, labels=where * 0 - 1, flip=none, positions=where, indices=where, bad=[])


def regress(model: nn.Module, batch: Batch, step: int) -> Tensor:
    x = batch.images.flatten(1).float() / 255
    return (model(x) - x.sum(1, keepdim=True)).square().mean()


def run(
    loss: Callable[[nn.Module, Batch, int], Tensor] = regress,
    *,
    state: dict[str, Any] | None = None,
    stop: Callable[[], bool] = lambda: False,
    evaluate: Callable[[int], dict[str, float]] | None = None,
    intervals: Intervals | None = None,
    **values: Any,
) -> tuple[Memory, nn.Module]:
    defaults: dict[str, Any] = {"epochs": 2, "batch_size": 8, "lr": 0.01, "warmup_epochs": 0, "log_every_steps": 1}
    plan = Plan(80, TrainingConfig(**(defaults | values)))
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 1))
    start, meters = 0, Meters.zeros(fabric.device)
    model = fabric.setup_module(inner)
    optimizer: Any = fabric.setup_optimizers(make_optimizer(inner, plan.config))
    if state is not None:
        inner.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        meters.load(state["meters"])
        start = state["step"]
    memory = Memory()
    train(
        fabric, model, optimizer, batches(plan, start), loss, plan, intervals or Intervals(log=1, checkpoint=5), memory,
        start_step=start, meters=meters, evaluate=evaluate, stop_asked=stop,
    )  # fmt: skip
    return memory, inner


def test_it_learns_and_reports_every_step() -> None:
    memory, _ = run(epochs=20)
    assert memory.steps == list(range(1, 201))
    assert [row["step"] for row in memory.rows] == memory.steps
    assert memory.rows[-1]["loss"] < 0.1 * memory.rows[0]["loss"]
    assert memory.rows[-1]["epoch"] == 20
    assert memory.rows[-1]["samples"] == 1600


@pytest.mark.parametrize("log_every", [1, 3])
def test_resume_is_bit_identical(log_every: int) -> None:
    intervals = Intervals(log=log_every, checkpoint=5)
    whole, model = run(intervals=intervals)
    later, resumed = run(state=whole.saved[10], intervals=intervals)
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    tail = [{k: v for k, v in row.items() if k != "images_per_s"} for row in whole.rows if row["step"] > 10]
    assert tail == [{k: v for k, v in row.items() if k != "images_per_s"} for row in later.rows]


def test_accumulation_gives_the_same_steps() -> None:
    drop = {"epochs": 1}
    whole, a = run(lambda m, b, s: regress(m.eval(), b, s), **drop)
    parts, b = run(lambda m, b, s: regress(m.eval(), b, s), per_device_batch=3, **drop)
    for one, other in zip(whole.rows, parts.rows, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-5)


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(where: str, value: float) -> None:
    def broken(model: nn.Module, batch: Batch, step: int) -> Tensor:
        loss = regress(model, batch, step)
        if step != 4:
            return loss
        if where == "loss":
            return loss * value
        loss.register_hook(lambda g: g * value)
        return loss

    memory, model = run(broken, intervals=Intervals(log=1, checkpoint=1))
    for name in ("model", "optimizer"):
        before, after = memory.saved[4][name], memory.saved[5][name]
        flat_before = torch.utils._pytree.tree_leaves(before)
        flat_after = torch.utils._pytree.tree_leaves(after)
        tensors = [(a, b) for a, b in zip(flat_before, flat_after, strict=True) if isinstance(a, Tensor)]
        assert tensors
        assert all(torch.equal(a, b) for a, b in tensors)
    assert [row["skipped"] for row in memory.rows][3:6] == [0, 1, 1]
    assert all(p.isfinite().all() for p in model.parameters())


def test_too_many_in_a_row_stop_the_run() -> None:
    def broken(model: nn.Module, batch: Batch, step: int) -> Tensor:
        return regress(model, batch, step) * (float("nan") if step >= 6 else 1.0)

    with pytest.raises(RunError, match=r"for 3 steps in a row.*positions 64 to 71") as error:
        run(broken, max_nonfinite_steps=3)
    assert isinstance(error.value, NotFinite)
    assert (error.value.step, error.value.since) == (8, 0)


def test_a_streak_that_has_ended_is_told_with_the_steps_since() -> None:
    """Between two logs nobody looks: the steps after the streak were taken."""

    def broken(model: nn.Module, batch: Batch, step: int) -> Tensor:
        return regress(model, batch, step) * (float("nan") if 2 <= step < 5 else 1.0)

    with pytest.raises(NotFinite, match="for 3 steps in a row") as error:
        run(broken, max_nonfinite_steps=3, intervals=Intervals(log=10))
    assert (error.value.step, error.value.since) == (4, 5)


def test_a_gradient_whose_square_overflows_is_skipped_too() -> None:
    """Its norm is finite where it has one number; the optimiser's second moment would not be."""

    def steep(model: nn.Module, batch: Batch, step: int) -> Tensor:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("3.bias"))
        return regress(model, batch, step) * (1e25 if step == 1 else 1.0)

    memory, model = run(steep, clip_grad_norm=0.0, intervals=Intervals(log=1, checkpoint=1))
    assert [row["skipped"] for row in memory.rows][:3] == [0, 1, 1]
    leaves = torch.utils._pytree.tree_leaves([memory.saved[20]["optimizer"], list(model.parameters())])
    assert all(leaf.isfinite().all() for leaf in leaves if isinstance(leaf, Tensor))


def test_gradients_are_clipped_to_the_norm() -> None:
    def huge(model: nn.Module, batch: Batch, step: int) -> Tensor:
        return regress(model, batch, step) * 1e4

    memory, _ = run(huge, clip_grad_norm=1.0, epochs=0.1)
    moments = memory.saved[1]["optimizer"]["state"]
    total = sum(float((s["exp_avg"] / 0.1).square().sum()) for s in moments.values()) ** 0.5
    assert memory.rows[0]["grad_norm"] > 100
    assert total == pytest.approx(1.0, rel=1e-3)


def test_evaluation_is_logged_and_runs_in_eval_mode() -> None:
    calls: list[int] = []

    def evaluate(done: int) -> dict[str, float]:
        calls.append(done)
        return {"knn": 50.0}

    memory, _ = run(evaluate=evaluate, intervals=Intervals(log=4, evaluate=6))
    assert calls == [6, 12, 18, 20]
    assert [row["step"] for row in memory.rows if "knn" in row] == calls


def test_every_process_records_at_the_same_steps() -> None:
    """Recording is collective: a process that evaluates nothing must come to it all the same."""
    told = {"first": {"knn": 1.0}, "other": {}}
    steps = {}
    for process, row in told.items():
        memory, _ = run(evaluate=lambda done, row=row: dict(row), intervals=Intervals(log=4, evaluate=6))
        steps[process] = [r["step"] for r in memory.rows]
    assert steps["first"] == steps["other"] == [4, 6, 8, 12, 16, 18, 20]


def test_a_stop_is_saved_at_the_next_step() -> None:
    asked = iter([False] * 6 + [True] * 100)
    memory, _ = run(stop=lambda: next(asked), intervals=Intervals(log=5, checkpoint=0))
    assert memory.steps[-1] == 7
    assert list(memory.saved) == [7]


def test_global_randomness_depends_on_the_step_alone() -> None:
    drawn: dict[int, list[float]] = {}

    def loss(model: nn.Module, batch: Batch, step: int) -> Tensor:
        drawn.setdefault(step, []).append(float(torch.rand(())))
        return regress(model, batch, step)

    memory, _ = run(loss)
    torch.rand(7)
    run(loss, state=memory.saved[10])
    assert all(drawn[s][0] == drawn[s][1] for s in range(10, 20))
    assert len({values[0] for values in drawn.values()}) == 20


def test_parameter_groups() -> None:
    model = nn.Module()
    model.position = nn.Parameter(torch.zeros(1, 4, 8))
    model.linear = nn.Linear(8, 8)
    model.norm = nn.LayerNorm(8)
    decayed, plain = parameter_groups(model, 0.05)
    assert decayed["weight_decay"] == 0.05
    assert {id(p) for p in decayed["params"]} == {id(model.position), id(model.linear.weight)}
    assert plain["weight_decay"] == 0
    assert len(plain["params"]) == 3
