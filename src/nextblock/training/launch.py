"""Processes, devices and precision, by Lightning Fabric."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.fabric import Fabric

from nextblock.errors import ConfigError, RunError
from nextblock.training.config import TrainingConfig

__all__ = ["Fabric", "launch", "on_first_process", "pick_device"]


def pick_device(device: str) -> str:
    """ "auto", "cpu" or "cuda" -> the device to use. Raises ConfigError for anything else, RunError when CUDA is asked
    for and absent."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device must be 'auto', 'cpu' or 'cuda'; got {device!r}.")
    if device == "cuda" and not torch.cuda.is_available():
        raise RunError("No CUDA device is usable here; `nextblock doctor` says why. Use the CPU.")
    return device


def launch(training: TrainingConfig) -> Fabric:
    """A launched Fabric: this process is one of the run's, with its device and precision set."""
    device = pick_device(training.device)
    precision = training.precision
    if precision == "auto":
        precision = "bf16" if device == "cuda" else "fp32"
    fabric = Fabric(
        accelerator=device,
        devices=training.devices or (torch.cuda.device_count() if device == "cuda" else 1),
        num_nodes=training.nodes,
        precision="bf16-mixed" if precision == "bf16" else "32-true",
    )
    with _silent():
        fabric.launch()
    return fabric


@contextmanager
def _silent() -> Iterator[None]:
    """Without what Lightning tells of processes that find each other; its warnings stay."""
    loggers = [logging.getLogger(f"lightning.{part}") for part in ("fabric", "pytorch")]  # Fabric talks through both
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(max(logger.level, logging.WARNING))
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def on_first_process(fabric: Fabric, problem: RunError | None) -> None:
    """Raise on every process what went wrong on the first: the others would wait for it for ever."""
    told = fabric.broadcast(None if problem is None else str(problem))
    if told is not None:
        if fabric.is_global_zero:
            raise RunError(told)
        raise SystemExit(0)  # the first process tells it
