"""Where numbers stop being finite: what every layer of a model hands on, and the gradient that comes back to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

OUTPUT, GRADIENT, WEIGHT, INPUT = "output", "gradient", "weight", "input"


@dataclass(frozen=True)
class LayerNumbers:
    """Of one tensor: whose it is ("" = the model itself), what it is, least and greatest of its finite numbers (NaN
    where none is), and which share of its numbers is not finite."""

    name: str
    what: str
    least: float
    greatest: float
    share: float

    @property
    def finite(self) -> bool:
        return self.share == 0


def numbers_of(name: str, what: str, tensor: Tensor) -> LayerNumbers:
    """Waits for the device."""
    good = torch.isfinite(tensor)
    kept = tensor.detach()[good]
    least, greatest = (float(kept.min()), float(kept.max())) if kept.numel() else (float("nan"), float("nan"))
    return LayerNumbers(name, what, least, greatest, 1 - float(good.double().mean()) if good.numel() else 0.0)


class LayerWatch:
    """Collects `LayerNumbers` of a model's forward and backward passes, in the order in which they come about.

    A layer's output comes after those of the layers in it, so the first that is not finite is the innermost. Use as a
    context manager around the passes; `seen` holds what was found since the start.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.seen: list[LayerNumbers] = []
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> LayerWatch:
        self._hooks.append(self.model.register_forward_pre_hook(self._input))
        for name, module in self.model.named_modules():
            self._hooks.append(module.register_forward_hook(self._output_of(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def weights(self) -> list[LayerNumbers]:
        """Of every parameter and buffer of floating point."""
        found = [numbers_of(name, WEIGHT, value) for name, value in _floats(self.model)]
        self.seen += found
        return found

    def weight_gradients(self) -> None:
        """Of every parameter that has one."""
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                self.seen.append(numbers_of(name, GRADIENT, parameter.grad))

    def _input(self, module: nn.Module, inputs: Any) -> None:
        for tensor in _tensors(inputs):
            self.seen.append(numbers_of("", INPUT, tensor))

    def _output_of(self, name: str) -> Any:
        def back(grad: Tensor) -> None:
            self.seen.append(numbers_of(name, GRADIENT, grad))

        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            for tensor in _tensors(output):
                self.seen.append(numbers_of(name, OUTPUT, tensor))
                if tensor.requires_grad:
                    tensor.register_hook(back)  # type: ignore[no-untyped-call]

        return note


def _floats(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from ((name, value) for name, value in model.named_buffers() if value.is_floating_point())


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of floating point in what a layer takes or gives."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
