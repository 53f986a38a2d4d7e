"""When a training gives up because its numbers are not finite: the batch is kept, and how to look at it is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from nextblock.data.stream import Batch, locate
from nextblock.errors import NextblockError
from nextblock.figures.samples import contact_sheet
from nextblock.training.loop import NotFinite
from nextblock.training.plan import Plan
from nextblock.training.replay import Kept, keep

SHOWN = 256  # images of the contact sheet at most
CHANNELS = (1, 3)


def keep_batch(error: NotFinite, folder: Path, model: nn.Module, stream: Any, plan: Plan) -> str:
    """Keep the last batch that `error` tells of in the run folder, and return what to tell the person.

    Args:
        model: bare, with the weights as they are now.
        stream: of the training data; the whole global batch is read again, by this process.

    A batch that cannot be read or written is told of: the run ends all the same, and for the reason it had.
    """
    size = plan.config.batch_size
    try:
        positions = range(error.step * size, (error.step + 1) * size)
        batch = stream.load(positions)
        names = names_of(stream, batch)
        kept = Kept(error.step, error.since, plan.config.seed, plan.world, names, batch, model.state_dict())
        where = keep(folder, kept, lambda partial: _draw(partial, batch, names))
    except (OSError, NextblockError) as problem:
        return f"{error} The batch could not be kept: {problem}"
    return f"{error} The batch is kept in {where}. Run it again, layer by layer: nextblock profile --replay {where}"


def names_of(stream: Any, batch: Any) -> tuple[str, ...]:
    """The images of a batch by name; empty where the stream knows none."""
    if isinstance(batch, Batch):
        return tuple(stream.source.name(int(index)) for index in batch.indices)
    if cache := getattr(stream, "cache", None):
        _, indices = locate(stream.seed, batch.positions.numpy(), len(cache))
        return tuple(cache.name(int(index)) for index in indices)
    return ()


def _draw(folder: Path, batch: Any, names: tuple[str, ...]) -> None:
    """images.png, mirrored as the model sees them; nothing of latents or of images of other channels."""
    if not isinstance(batch, Batch) or batch.images.shape[3] not in CHANNELS:
        return
    shown = batch.images[:SHOWN].numpy().copy()
    mirrored = batch.flip[:SHOWN].numpy()
    shown[mirrored] = shown[mirrored][:, :, ::-1]
    titles = [f"{position} {name}" for position, name in zip(batch.positions.tolist(), names, strict=True)]
    contact_sheet(shown, titles[:SHOWN], folder / "images.png")
