"""A grid of probe heads on one frozen encoder, trained side by side in one pass over the images.

Every head has its own learning rate, weight decay, clipping and optimiser state; its trajectory is the one that it
would have alone. Protocol: the official XTRA probes (AdamW, cosine to 1e-5, clipped at 3).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from nextblock.errors import DataError
from nextblock.randomness import key
from nextblock.training.launch import Fabric
from nextblock.training.loop import agreed
from nextblock.training.optimizer import SteadyBuffers
from nextblock.training.plan import Plan
from nextblock.training.stacked import StackedAdamW
from nextblock.xtra.classifier import HeadConfig, LayerMean
from nextblock.xtra.heads import HeadKind, make_heads

FINAL_LR = 1e-5  # where every cosine ends, whatever its peak


@dataclass(frozen=True)
class HeadSpec:
    """One head of the grid: what it is and how it is trained."""

    kind: HeadKind
    lr: float
    weight_decay: float
    layers: LayerMean

    @property
    def name(self) -> str:
        return f"{self.kind}, {self.layers.name}, lr {self.lr:g}, weight decay {self.weight_decay:g}"

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"layers": self.layers.name}


class ProbeGrid(nn.Module):
    """All heads of a grid: tokens of the frozen encoder -> logits [G, B, classes], heads in the order of `specs`.

    Heads of one kind that read the same layers are one stack. Every head starts from numbers that depend on the seed
    and its kind alone, so that the grid around it does not matter.
    """

    def __init__(
        self,
        specs: Sequence[HeadSpec],
        width: int,
        num_classes: int,
        *,
        num_heads: int = 16,
        num_queries: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.specs, self.num_heads, self.num_queries = tuple(specs), num_heads, num_queries
        members: dict[tuple[HeadKind, LayerMean], list[int]] = {}
        for number, spec in enumerate(specs):
            members.setdefault((spec.kind, spec.layers), []).append(number)
        self.members = members
        self.inputs = list(dict.fromkeys(spec.layers for spec in specs))
        self.stacks = nn.ModuleList()
        for (kind, _), mine in members.items():
            generator = torch.Generator().manual_seed(key(seed, f"{kind} head") >> 1)
            self.stacks.append(
                make_heads(
                    kind, width, num_classes, len(mine), num_heads=num_heads, num_queries=num_queries,
                    generator=generator,
                )
            )  # fmt: skip
        order = [number for mine in members.values() for number in mine]
        self.places: Tensor
        self.register_buffer("places", torch.tensor(order).argsort(), persistent=False)

    def reads_tokens(self, layers: LayerMean) -> bool:
        """Whether some head needs the tokens of these layers, and not just their mean."""
        return ("attentive", layers) in self.members

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """`inputs`: for each of `self.inputs`, tokens [B, N, D], or their mean [B, D] where that is enough."""
        given = dict(zip(self.inputs, inputs, strict=True))
        logits = [stack(given[layers]) for (_, layers), stack in zip(self.members, self.stacks, strict=True)]
        return torch.cat(logits)[self.places]

    def head_config(self, number: int) -> HeadConfig:
        spec = self.specs[number]
        return HeadConfig(spec.kind, spec.layers, self.num_heads, self.num_queries)

    def head_state(self, number: int) -> dict[str, Tensor]:
        """One head's tensors, as of a stack of one."""
        spec = self.specs[number]
        at = list(self.members).index((spec.kind, spec.layers))
        slot = self.members[spec.kind, spec.layers].index(number)
        own = {name for name, _ in self.stacks[at].named_parameters()}
        state: dict[str, Tensor] = self.stacks[at].state_dict()
        return {name: value[slot : slot + 1].clone() if name in own else value for name, value in state.items()}


class ProbeTraining:
    """The loss and the update of a grid, as the training loop takes them.

    Attributes:
        grid: the bare module.
        label_smoothing: of the cross entropy.
        clip: largest gradient norm of each head; 0 = no clipping.
        diverged: bool [G], heads whose loss or gradient was not finite once; they stay as they were then.
        loss_sum, steps: for the mean loss of each head since the last reading.
    """

    def __init__(self, grid: ProbeGrid, device: torch.device, *, label_smoothing: float = 0.0, clip: float = 3.0):
        self.grid, self.label_smoothing, self.clip = grid, label_smoothing, clip
        heads = len(grid.specs)
        self.peaks = [spec.lr for spec in grid.specs]
        self.diverged = torch.zeros(heads, dtype=torch.bool, device=device)
        self.loss_sum = torch.zeros(heads, device=device)
        self.steps = 0
        self._finite = torch.ones(heads, dtype=torch.bool, device=device)
        self.buffers = SteadyBuffers(grid.to(device))

    def optimizer(self, betas: tuple[float, float]) -> StackedAdamW:
        groups = []
        for stack, members in zip(self.grid.stacks, self.grid.members.values(), strict=True):
            named = dict(stack.named_parameters())
            weights = [parameter for name, parameter in named.items() if name != "bias"]
            groups.append({"params": weights, "members": members, "decayed": True})
            groups.append({"params": [named["bias"]], "members": members, "decayed": False})
        return StackedAdamW(groups, [spec.weight_decay for spec in self.grid.specs], betas)

    def loss(self, grid: nn.Module, inputs: Sequence[Tensor], labels: Tensor) -> Tensor:
        """The mean of the heads' losses; heads that have diverged count as nothing."""
        losses = head_losses(grid(inputs), labels, self.label_smoothing)
        finite = torch.isfinite(losses.detach())
        self._finite &= finite
        kept = torch.where(finite, losses, 0.0)
        self.loss_sum += kept.detach().float()
        self.steps += 1
        return kept.mean()

    def update(
        self, fabric: Fabric, model: nn.Module, optimizer: Any, loss: Tensor, plan: Plan, step: int
    ) -> tuple[Tensor, Tensor]:
        """The loop's update: each head's own step. A mean over G heads has a G-th of each head's gradient."""
        inner: StackedAdamW = getattr(optimizer, "optimizer", optimizer)
        heads = len(self.peaks)
        norms = inner.norms() * heads
        good = agreed(fabric, torch.isfinite(norms) & self._finite & ~self.diverged)
        scales = (self.clip / norms).clamp(max=1.0) if self.clip else torch.ones_like(norms)
        lrs = [plan.lr_of(step, peak, min(FINAL_LR, peak)) for peak in self.peaks]
        pinned = torch.tensor(lrs, dtype=torch.float64, pin_memory=norms.is_cuda)
        on_device = pinned.to(norms.device, non_blocking=True)
        inner.step_members(on_device, scales.nan_to_num(0.0) * heads, good)
        taken = good.any()  # where no head could step, it was the batch: nobody has diverged
        self.buffers.settle(taken)
        self.diverged = self.diverged | (~good & taken)
        self._finite.fill_(True)
        return torch.where(good, norms, 0.0).mean(), taken

    def read_losses(self) -> list[float]:
        """Each head's mean training loss since the last reading; NaN where there is none."""
        means = (self.loss_sum / max(1, self.steps)).tolist()
        gone = self.diverged.tolist()
        self.loss_sum.zero_()
        self.steps = 0
        return [float("nan") if lost else mean for mean, lost in zip(means, gone, strict=True)]

    def state(self) -> dict[str, Any]:
        return {"diverged": self.diverged.cpu(), "loss_sum": self.loss_sum.cpu(), "head_steps": self.steps}

    def load(self, state: dict[str, Any]) -> None:
        self.diverged = state["diverged"].to(self.diverged.device)
        self.loss_sum = state["loss_sum"].to(self.loss_sum.device)
        self.steps = int(state["head_steps"])
        self.buffers = SteadyBuffers(self.grid)  # of the weights that were loaded before


def head_losses(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean cross entropy of every head: [G, B, classes], int64 [B] -> [G], at least float32."""
    g, b, _ = logits.shape
    wide = logits if logits.dtype == torch.float64 else logits.float()
    each = F.cross_entropy(wide.flatten(0, 1), labels.repeat(g), label_smoothing=smoothing, reduction="none")
    return each.view(g, b).mean(1)


@dataclass
class Predictions:
    """classes: int32 [G, M], what each head says of each image. losses: [G], mean. labels: int64 [M]."""

    classes: NDArray[np.int32]
    losses: NDArray[np.float64]
    labels: NDArray[np.int64]

    def top1(self) -> NDArray[np.float64]:
        """Percent right, [G]."""
        return 100.0 * (self.classes == self.labels).mean(1)


@torch.no_grad()
def predict_all(grid: nn.Module, batches: Iterable[tuple[Sequence[Tensor], Tensor]]) -> Predictions:
    """What every head says of every image. `batches` gives the grid's inputs and the labels, on one device."""
    was_training = grid.training
    grid.eval()
    said: list[Tensor] = []
    truth: list[Tensor] = []
    total: Tensor | float = 0.0
    for inputs, labels in batches:
        logits = grid(inputs)
        said.append(logits.argmax(2).to(torch.int32))
        truth.append(labels)
        total = total + head_losses(logits, labels) * len(labels)
    grid.train(was_training)
    if not truth:
        raise DataError("There is no image to judge the heads by: none could be read.")
    labels_all = torch.cat(truth).cpu().numpy()
    assert isinstance(total, Tensor)
    return Predictions(torch.cat(said, 1).cpu().numpy(), total.double().cpu().numpy() / len(labels_all), labels_all)
