"""Training steps into which numbers are put that are not finite; every function runs in the processes of one run.

What a process ended with goes to `OUT/CASE-RANK.json`: hashes of weights, optimiser and average, and counts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nextblock.data.stream import Batch
from nextblock.evaluation.probe import HeadSpec, ProbeGrid, ProbeTraining
from nextblock.training.config import TrainingConfig
from nextblock.training.ema import EMA
from nextblock.training.launch import Fabric, launch
from nextblock.training.loop import Intervals, Meters, clipped_update, run_state, train
from nextblock.training.optimizer import make_optimizer
from nextblock.training.plan import Plan
from nextblock.xtra.classifier import LayerMean
from nextblock.xtra.config import XTRAConfig
from nextblock.xtra.model import XTRA
from tiny_run import TINY

STEPS = (0, 3, 4)  # the first one too: the optimiser has no state then
TOTAL = 7
WHERE = ("input", "activation", "gradient", "loss")
VALUES = ("nan", "inf", "-inf")
CASES = [f"{where}_{value}" for where in WHERE for value in VALUES]
HEADS = 3


class Quiet:
    """A recorder that keeps the last row."""

    row: dict[str, float]

    def step(self, done: int) -> None: ...
    def save(self, step: int, state: dict[str, Any]) -> None: ...
    def add_bad_samples(self, bad: list[Any]) -> None: ...
    def log(self, row: dict[str, float]) -> None:
        self.row = row


def images(plan: Plan) -> Iterator[Batch]:
    for positions in plan.batches(0):
        where = torch.tensor(positions)
        pixels = torch.stack([_pixels(p) for p in positions])
        none = torch.zeros(len(where), dtype=torch.bool)
        yield Batch(images=pixels, labels=where % 2, flip=none, positions=where, indices=where, bad=[])


def _pixels(position: int) -> Tensor:
    return torch.randint(0, 256, (16, 16, 3), generator=torch.Generator().manual_seed(position), dtype=torch.uint8)


def spoilt(tensor: Tensor, value: float) -> Tensor:
    changed = tensor.clone(memory_format=torch.contiguous_format)
    changed.view(-1)[1] = value
    return changed


class Injection:
    """Puts `value` into the first forward pass of `STEPS`, on the last process of the run."""

    def __init__(self, model: XTRA, where: str, value: float, mine: bool) -> None:
        self.where, self.value, self.mine = where, value, mine
        self.on, self._seen = False, -1
        layer = model.encoder.layers.layers[0]
        if where == "input":
            model.register_forward_pre_hook(lambda m, inputs: (self.into(inputs[0]), *inputs[1:]))
        elif where == "activation":
            layer.register_forward_hook(lambda m, inputs, output: self.into(output))
        elif where == "gradient":
            layer.register_forward_hook(self._hook)

    def into(self, tensor: Tensor) -> Tensor:
        return spoilt(tensor, self.value) if self.on else tensor

    def _hook(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if self.on:
            output.register_hook(lambda grad: spoilt(grad, self.value))

    def loss(self, model: nn.Module, batch: Batch, step: int) -> Tensor:
        self.on, self._seen = self.mine and step in STEPS and step != self._seen, step
        loss: Tensor = model(batch.images.permute(0, 3, 1, 2).float() / 128 - 1)
        return loss + self.value if self.on and self.where == "loss" else loss


def run_cases(world: int, out: str) -> None:
    """Every case, and one in which nothing is taken of `STEPS`: no update, no average ("reference")."""
    fabric = launch(TrainingConfig(device="cpu", devices=world))
    for case in [*CASES, "reference"]:
        where, _, value = case.partition("_")
        found = _trained(fabric, where, float(value or "nan"))
        (Path(out) / f"{case}-{fabric.global_rank}.json").write_text(json.dumps(found))


def _trained(fabric: Fabric, where: str, value: float) -> dict[str, Any]:
    config = TrainingConfig(
        epochs=TOTAL, batch_size=8, per_device_batch=2, warmup_epochs=0, lr=0.01, log_every_steps=1
    )  # fmt: skip
    plan = Plan(8, config, fabric.global_rank, fabric.world_size)
    torch.manual_seed(0)
    inner = XTRA(XTRAConfig(**TINY["model"]))
    injection = Injection(inner, where, value, mine=fabric.global_rank == fabric.world_size - 1)
    model = fabric.setup_module(inner)
    optimizer: Any = fabric.setup_optimizers(make_optimizer(inner, config))
    ema, meters, recorder = EMA(inner, 0.9), Meters.zeros(fabric.device), Quiet()

    def update(fabric: Fabric, model: nn.Module, optimizer: Any, loss: Tensor, plan: Plan, step: int) -> Any:
        if where == "reference" and step in STEPS:
            return torch.ones(()), torch.tensor(False)
        norm, good = clipped_update(fabric, model, optimizer, loss, plan, step)
        ema.update(good)
        return norm, good

    train(
        fabric, model, optimizer, images(plan), injection.loss, plan, Intervals(log=1), recorder, meters=meters,
        update=update,
    )  # fmt: skip
    state = run_state(model, optimizer, meters, plan, TOTAL)
    return {
        "model": digest(state["model"]),
        "optimizer": digest(state["optimizer"]),
        "ema": digest(ema.state()),
        "finite": all_finite([state["model"], state["optimizer"], ema.state(), meters.state()]),
        "skipped": recorder.row["skipped"],
        "longest": int(meters.streak),
    }


# --- probes


SPECS = [
    HeadSpec(kind, lr, 0.1, LayerMean(3, 3)) for kind, lr in (("linear", 0.1), ("attentive", 0.03), ("linear", 1.0))
]


def run_probes(world: int, out: str) -> None:
    """One head of three is hit once ("head-NUMBER-WHERE"), or the features, which all heads read."""
    fabric = launch(TrainingConfig(device="cpu", devices=world))
    cases = [f"head_{number}_{where}" for number in range(HEADS) for where in ("logits", "gradient", "loss")]
    for case in ["clean", "features", "reference", *cases]:
        found = _probed(fabric, case)
        (Path(out) / f"{case}-{fabric.global_rank}.json").write_text(json.dumps(found))


def _probed(fabric: Fabric, case: str) -> dict[str, Any]:
    number, _, where = case.removeprefix("head_").partition("_")
    plan = Plan(8, TrainingConfig(epochs=6, batch_size=8, warmup_epochs=0), fabric.global_rank, fabric.world_size)
    torch.manual_seed(0)
    grid = ProbeGrid(SPECS, 8, 2, num_heads=2)
    trainer = ProbeTraining(grid, fabric.device)
    now = {"on": False}
    mine = fabric.global_rank == fabric.world_size - 1

    def logits(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if now["on"] and where == "logits":
            output = output.clone()
            output[int(number), 0, 0] = float("inf")
        elif now["on"] and where == "gradient":
            output.register_hook(lambda grad: _in_head(grad, int(number)))
        return output

    grid.register_forward_hook(logits)
    model = fabric.setup_module(grid)
    optimizer: Any = fabric.setup_optimizers(trainer.optimizer((0.9, 0.95)))
    before: dict[str, str] = {}

    def loss_of(model: nn.Module, batch: Batch, step: int) -> Tensor:
        now["on"] = mine and step == 2
        if step == 2 and not before:
            before.update(_heads(grid))
        features = batch.images[:, :2, :2].reshape(len(batch), 12)[:, :8].float() / 128 - 1
        if case == "features" and now["on"]:
            features[0, 0] = float("nan")
        tokens = features[:, None] * torch.tensor([1.0, -0.5, 0.3])[:, None]
        loss = trainer.loss(model, [tokens], batch.labels)
        if where == "loss" and now["on"]:  # whose gradient is finite: only this process knows
            trainer._finite[int(number)] = False
        return loss

    def update(fabric: Fabric, model: nn.Module, optimizer: Any, loss: Tensor, plan: Plan, step: int) -> Any:
        if case == "reference" and step == 2:
            trainer.buffers.settle(torch.tensor(False))
            return torch.ones(()), torch.tensor(False)
        return trainer.update(fabric, model, optimizer, loss, plan, step)

    recorder = Quiet()
    train(fabric, model, optimizer, images(plan), loss_of, plan, Intervals(log=1), recorder, update=update)
    return {
        "before": before,
        "after": _heads(grid),
        "state": digest([list(grid.parameters()), optimizer.state_dict()]),
        "finite": all_finite([grid.state_dict(), optimizer.state_dict()]),
        "diverged": trainer.diverged.tolist(),
        "skipped": recorder.row["skipped"],
    }


def _in_head(grad: Tensor, number: int) -> Tensor:
    changed = grad.clone()
    changed[number, 0, 0] = float("nan")
    return changed


def _heads(grid: ProbeGrid) -> dict[str, str]:
    """Of each head, its own parameters alone: the running statistics are of the features, and of a process's own."""
    found = {}
    for number in range(HEADS):
        state = grid.head_state(number)
        found[str(number)] = digest({name: state[name] for name in state if "norm" not in name})
    return found


# --- hashes


def _leaves(state: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(state) if isinstance(leaf, Tensor)]


def digest(state: Any) -> str:
    sha256 = hashlib.sha256()
    for leaf in _leaves(state):
        sha256.update(
            leaf.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
            if leaf.ndim
            else repr(leaf.item()).encode()
        )
    return sha256.hexdigest()


def all_finite(state: Any) -> bool:
    return all(bool(torch.isfinite(leaf).all()) for leaf in _leaves(state))
