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
NO_LIMIT = 2**60  # version 1 says "none" by the largest multiple of a page
_CGROUP_FILES = {  # version of control groups -> limit, use, and the row of memory.stat with pages easily given back
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


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
    return machine_free_bytes()


def machine_free_bytes(root: Path = Path("/")) -> int | None:
    """Memory that is free for this process: the least of the machine's and what its control groups leave of their
    limits (a container's, a scheduler's). Linux; None where it cannot be told.

    `root` is the folder with proc/ and sys/.
    """
    known = [free for free in (_meminfo_free(root), *_cgroup_free(root)) if free is not None]
    return min(known, default=None)


def _meminfo_free(root: Path) -> int | None:
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        rows = dict(line.split(":", 1) for line in lines)
        return int(rows["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):
        return None


def _cgroup_free(root: Path) -> list[int | None]:
    """What is left of the limit of each control group above this process; the limits of all of them hold.

    In a container its own group is usually mounted as the top folder and the path in proc/self/cgroup is the host's:
    folders that are not there are passed over.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        lines = ["0::/", "0:memory:/"]
    found: list[int | None] = []
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        version = 2 if not controllers else 1 if "memory" in controllers.split(",") else 0
        if version:
            top = root / ("sys/fs/cgroup" if version == 2 else "sys/fs/cgroup/memory")
            group = top / path.lstrip("/")
            found += [_group_free(folder, version) for folder in (group, *group.parents) if folder.is_relative_to(top)]
    return found


def _group_free(group: Path, version: int) -> int | None:
    """A group's limit less what it holds; pages of files that it would give back do not count. None: no limit."""
    limit_file, used_file, cache_row = _CGROUP_FILES[version]
    try:
        limit = (group / limit_file).read_text(encoding="ascii").strip()
        if limit == "max" or int(limit) >= NO_LIMIT:
            return None
        used = int((group / used_file).read_text(encoding="ascii"))
        return max(0, int(limit) - max(0, used - _row(group / "memory.stat", cache_row)))
    except (OSError, ValueError):
        return None


def _row(file: Path, name: str) -> int:
    """One number of a file of lines "name number"; 0 where there is none."""
    try:
        rows = (line.split() for line in file.read_text(encoding="ascii").splitlines())
        return next((int(row[1]) for row in rows if len(row) == 2 and row[0] == name), 0)
    except (OSError, ValueError):
        return 0


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
