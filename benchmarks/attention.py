"""Entity-causal attention, forward and backward: one call under a dense mask, as ours is, against two other ways.

    python -m benchmarks.attention [--device cuda] [--quick]

Prefixes: one call without a mask for every entity, over the keys that it may see; half the arithmetic, and on a GPU the
flash kernel, but many small calls. FlexAttention (`second`): a mask known in tiles, compiled; CUDA only, as it has no
backward pass on a CPU. Shapes are those of the presets, without the last cell for XTRA.

A row above 1 says that the dense mask is the faster way, and that nothing is gained by the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.measure import Row, interleaved, run_alone
from nextblock.layers.attention import attention
from nextblock.mask import block_causal_mask

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """Tokens [batch, heads, entities · size, head_dim]."""

    name: str
    heads: int
    head_dim: int
    entities: int
    size: int

    def tensors(self, batch: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(0)
        kind = torch.bfloat16 if device == "cuda" else torch.float32
        shape = (3, batch, self.heads, self.entities * self.size, self.head_dim)
        q, k, v = torch.randn(shape, device=device, dtype=kind)
        return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()

    def entity(self, device: str) -> Tensor:
        return torch.arange(self.entities, device=device).repeat_interleave(self.size)


XTRA_B = Shape("XTRA-B/16", heads=12, head_dim=64, entities=15, size=16)
XTRA_H = Shape("XTRA-H/14", heads=16, head_dim=80, entities=15, size=16)
XAR_B = Shape("xAR-B", heads=12, head_dim=64, entities=4, size=64)
SHAPES = {"cpu": (XTRA_B, XAR_B), "cuda": (XTRA_B, XTRA_H, XAR_B)}


def dense(shape: Shape, device: str) -> Attend:
    mask = block_causal_mask(shape.entity(device))
    return lambda q, k, v: attention(q, k, v, mask)


def prefixes(shape: Shape) -> Attend:
    ends = [(entity + 1) * shape.size for entity in range(shape.entities)]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [attention(q[:, :, end - shape.size : end], k[:, :, :end], v[:, :, :end]) for end in ends]
        return torch.cat(parts, 2)

    return attend


def flex(shape: Shape, device: str) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    entity, n = shape.entity(device), shape.entities * shape.size
    tiles = create_block_mask(lambda b, h, q, k: entity[q] >= entity[k], None, None, n, n, device=device)
    compiled = torch.compile(flex_attention)
    return lambda q, k, v: compiled(q, k, v, block_mask=tiles)  # type: ignore[return-value]


def planned(device: str) -> list[Row]:
    """The rows, not measured."""
    return [
        Row(f"attention of {shape.name}, dense mask against prefixes", "calls/s", device) for shape in SHAPES[device]
    ]


def rows(device: str, quick: bool = False) -> list[Row]:
    """Measure them; `quick`: one image."""
    batch = 1 if quick else 64 if device == "cuda" else 2
    pairs = zip(planned(device), SHAPES[device], strict=True)
    return [measured(row, shape, batch, 2 if quick else 15) for row, shape in pairs]


def measured(row: Row, shape: Shape, batch: int, rounds: int) -> Row:
    q, k, v = shape.tensors(batch, row.device)
    ways = {"ours": dense(shape, row.device), "plain": prefixes(shape)}
    if row.device == "cuda":
        ways["second"] = flex(shape, row.device)

    def step(attend: Attend) -> Callable[[], object]:
        return lambda: torch.autograd.grad(attend(q, k, v).sum(), (q, k, v))

    arms = {name: step(attend) for name, attend in ways.items()}
    timed = interleaved(arms, rounds=rounds, warmup=3, device=row.device)
    where = f"forward and backward, batch {batch}, {shape.entities} entities of {shape.size}"
    return replace(timed.row(row, dict.fromkeys(arms, 1.0)), note=f"{where}; second: FlexAttention (CUDA)")


if __name__ == "__main__":
    run_alone(__doc__, rows, devices=True)
