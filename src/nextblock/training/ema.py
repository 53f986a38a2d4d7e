"""An exponential moving average of a module's weights, kept on its device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nextblock.errors import CheckpointError, ConfigError

CHUNK_NUMBERS = 2**26  # averaged at once: what is held besides the averages, 256 MiB


class EMA:
    """average <- d · average + (1 - d) · weight, after every step that was taken.

    The decay d warms up, min(decay, (1 + n) / (10 + n)) after n steps, so that a short run has an average too: it
    forgets its random start, and reaches back over about a ninth of the steps so far until `decay` is met. Parameters
    and persistent buffers are averaged, in float32 or better; buffers of whole numbers are copied. Nothing waits for
    the device.

    Args:
        module: whose weights; averages start as copies of them, so load and move it first.
        decay: in [0, 1).
        warmup: whether the decay warms up.

    Raises ConfigError for a decay outside [0, 1).
    """

    def __init__(self, module: nn.Module, decay: float, warmup: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"the decay of an average must be at least 0 and below 1; got {decay!r}.")
        self.module, self.decay, self.warmup = module, decay, warmup
        self.averages = {name: _copy(value) for name, value in module.state_dict().items()}
        device = next(iter(self.averages.values())).device
        self.count = torch.zeros((), dtype=torch.int64, device=device)  # of steps averaged

    @torch.no_grad()
    def update(self, good: Tensor) -> None:
        """Take in the weights after a step; where `good` (bool, a scalar on the device) is False, nothing changes."""
        n = self.count.double()
        decay = ((1 + n) / (10 + n)).clamp(max=self.decay) if self.warmup else torch.full_like(n, self.decay)
        part = torch.where(good, 1 - decay, 0).float()
        parameters = {name for name, _ in self.module.named_parameters(remove_duplicate=False)}
        weights: list[tuple[Tensor, Tensor]] = []
        for name, value in self.module.state_dict().items():
            average = self.averages[name]
            if name in parameters:
                weights.append((average, value))
            else:  # what a forward pass wrote there may not be finite when the step is skipped
                new = average.lerp(value, part.to(average)) if average.is_floating_point() else value
                average.copy_(torch.where(good, new, average))
        for chunk in _chunks(weights):
            averages, values = [a for a, _ in chunk], [v for _, v in chunk]
            moves = torch._foreach_sub(values, averages)
            torch._foreach_mul_(moves, part)
            torch._foreach_add_(averages, moves)
        self.count += good

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The averages stand in the module; afterwards its own weights are back."""
        own = {name: value.clone() for name, value in self.module.state_dict().items()}
        try:
            self._write(self.averages)
            yield
        finally:
            self._write(own)

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, target in self.module.state_dict().items():
            target.copy_(values[name])

    def state(self) -> dict[str, Any]:
        """For a checkpoint, written before the next update: not copies."""
        return {"averages": self.averages, "count": self.count}

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of `state`. Raises CheckpointError when it belongs to another module."""
        theirs, ours = state["averages"], self.averages
        wrong = [name for name in {**ours, **theirs} if _shape(theirs.get(name)) != _shape(ours.get(name))]
        if wrong:
            told = ", ".join(wrong[:3])
            raise CheckpointError(f"The stored average belongs to another model; it differs in {len(wrong)}: {told}.")
        for name, average in ours.items():
            average.copy_(theirs[name])
        self.count.copy_(state["count"])


def _copy(value: Tensor) -> Tensor:
    wide = torch.promote_types(value.dtype, torch.float32) if value.is_floating_point() else value.dtype
    return value.detach().to(wide, copy=True)


def _shape(value: Tensor | None) -> tuple[int, ...] | None:
    return None if value is None else tuple(value.shape)


def _chunks(pairs: list[tuple[Tensor, Tensor]]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The pairs in order, in groups that are large for speed and small for memory."""
    group: list[tuple[Tensor, Tensor]] = []
    numbers = 0
    for pair in pairs:
        group.append(pair)
        numbers += pair[0].numel()
        if numbers >= CHUNK_NUMBERS:
            yield group
            group, numbers = [], 0
    if group:
        yield group
