"""Whether one forward pass fits: told before the run, as a CPU out of memory ends a process without a word."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nextblock.errors import RunError
from nextblock.training.launch import Fabric
from nextblock.training.loop import Loss
from nextblock.training.plan import Plan

FEW, MORE = 2, 4  # images; what every pass keeps, such as the weights, falls out of the difference
GIB = 2**30


def saved_bytes(forward: Callable[[], Tensor]) -> int:
    """Bytes that a forward pass keeps for its backward pass, each storage once."""
    seen: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        kept = forward()  # alive until all is counted: a freed storage could be met twice
    del kept
    return sum(seen.values())


def bytes_per_image(loss_of: Callable[[int], Tensor]) -> int:
    """What one more image in a forward pass keeps in memory, from the losses of two and of four images."""
    return (saved_bytes(lambda: loss_of(MORE)) - saved_bytes(lambda: loss_of(FEW))) // (MORE - FEW)


def bytes_to_come(model: nn.Module, *, averaged: bool, accumulated: bool) -> int:
    """What a run holds beside a pass's activations: AdamW's two moments, an average of the weights where there is one,
    and gradients where a step has several passes (otherwise they come as the activations go)."""
    copies = 2 + averaged + accumulated
    return copies * sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free on a device, None where it cannot be told."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch takes it again
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    try:
        rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        return int(rows["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):
        return None


def require_room(per_image: int, images: int, device: torch.device, *, fixed: int = 0, sharing: int = 1) -> None:
    """Raise RunError when one forward pass cannot fit, with a `per_device_batch` that does.

    Args:
        per_image: bytes of its activations.
        images: in the pass.
        device: whose free memory counts; where that cannot be told, nothing is refused.
        fixed: bytes that the run needs besides.
        sharing: processes that do the same in this memory.

    What is counted is the least that is needed, so what fits is never refused.
    """
    free = free_bytes(device)
    needed = (fixed + per_image * images) * sharing
    if free is None or needed <= free:
        return
    what = (
        f"{images:,} images in one forward pass{f' of each of {sharing} processes' if sharing > 1 else ''} need about "
        f"{_gib(needed)}, and {device.type} has {_gib(free)} free."
    )
    room = (free // sharing - fixed) // max(1, per_image)
    if room < 1:
        raise RunError(f"{what} Not even one image fits: set smaller model sizes, or free memory.")
    fits = 1 << (max(1, room // 2).bit_length() - 1)  # at most half, since not everything is counted
    raise RunError(
        f"{what} Set training.per_device_batch to {fits} or less: the gradients of a step's passes are added up, so "
        f"the batch stays the same."
    )


def require_room_for(
    fabric: Fabric,
    model: nn.Module,
    loss_of: Loss,
    load: Callable[[Sequence[int]], Any],
    plan: Plan,
    *,
    averaged: bool = False,
) -> None:
    """Raise RunError when this process's largest pass cannot fit; measured on a few images, the first of the run.

    Args:
        model: not compiled, and not wrapped by Fabric; it is moved to the run's device.
        loss_of: as for `loop.train`.
        load: positions -> a batch on the CPU.
        averaged: the run keeps an average of the weights.

    Random numbers that are drawn on the way leave torch's generators as they were, and running statistics stay.
    """
    images, device = plan.largest_pass, fabric.device
    if images <= MORE:
        return
    model.to(device)

    def loss(count: int) -> Tensor:
        batch = load(range(count)).to(device)
        with fabric.autocast():
            return loss_of(model, batch, 0)

    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        per_image = bytes_per_image(loss)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    fixed = bytes_to_come(model, averaged=averaged, accumulated=len(plan.micro_batches(0)) > 1)
    sharing = fabric.world_size // plan.config.nodes if device.type == "cpu" else 1
    require_room(per_image, images, device, fixed=fixed, sharing=max(1, sharing))


def _gib(count: int) -> str:
    return f"{count / GIB:,.0f} GiB" if count >= 10 * GIB else f"{count / GIB:.1f} GiB"
