"""What does a grid of probe heads cost beside one head? ViT-S/16 at 224 px, every step with its encoder pass.

    python benchmarks/probe_cost.py [--device cuda --batch 256] [--classes 10] [--rounds 7]

Three ways to a step are timed in turn, so that a busy machine slows all of them alike: one attentive head; the grid of
9 learning rates × 2 kinds as `nextblock probe` trains it; and the same 18 heads in the plain way, each a module of its
own that projects every token to a key and a value, with its own AdamW. Medians of the ratios within a round; the JSON
goes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from nextblock import Encoder, XTRAConfig
from nextblock.evaluation.inference import inference
from nextblock.evaluation.probe import HeadSpec, ProbeGrid, ProbeTraining
from nextblock.evaluation.probe_config import ProbeConfig
from nextblock.training.config import TrainingConfig
from nextblock.training.launch import launch
from nextblock.training.plan import Plan
from nextblock.xtra.classifier import layer_means

RESULTS = Path(__file__).parent / "results"


class PlainHead(nn.Module):
    """One probe head as published."""

    def __init__(self, kind: str, width: int, classes: int) -> None:
        super().__init__()
        self.kind, self.norm = kind, nn.BatchNorm1d(width, affine=False, eps=1e-6)
        self.linear = nn.Linear(width, classes)
        if kind == "attentive":
            self.query = nn.Parameter(0.02 * torch.randn(1, 1, width))
            self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        if self.kind == "linear":
            return self.linear(self.norm(tokens.mean(1)))
        x = self.norm(tokens.flatten(0, 1)).view_as(tokens)
        split = "b n (h d) -> b h n d"
        q, k, v = (
            rearrange(part, split, h=16) for part in (self.query.expand(len(x), -1, -1), self.key(x), self.value(x))
        )
        return self.linear(rearrange(F.scaled_dot_product_attention(q, k, v), "b h q d -> b (q h d)"))


def grid_step(encoder: Encoder, specs: list[HeadSpec], classes: int, device: str) -> Callable[[Tensor, Tensor], None]:
    fabric = launch(TrainingConfig(device=device))
    grid = ProbeGrid(specs, encoder.config.width, classes).to(device)
    training = ProbeTraining(grid, torch.device(device))
    optimizer = training.optimizer((0.9, 0.95))
    plan = Plan(10_000, TrainingConfig(batch_size=10, epochs=10))

    def step(images: Tensor, labels: Tensor) -> None:
        with inference(encoder):
            found = layer_means(encoder, images, grid.inputs)
        inputs = [found[each] if grid.reads_tokens(each) else found[each].mean(1) for each in grid.inputs]
        with fabric.autocast():
            loss = training.loss(grid, inputs, labels)
        loss.backward()
        training.update(fabric, grid, optimizer, loss, plan, 0)
        optimizer.zero_grad(set_to_none=True)

    return step


def plain_step(encoder: Encoder, specs: list[HeadSpec], classes: int, device: str) -> Callable[[Tensor, Tensor], None]:
    heads = [PlainHead(spec.kind, encoder.config.width, classes).to(device) for spec in specs]
    optimizers = [
        torch.optim.AdamW(head.parameters(), lr=spec.lr, weight_decay=spec.weight_decay, fused=True)
        for head, spec in zip(heads, specs, strict=True)
    ]
    layers = list(dict.fromkeys(spec.layers for spec in specs))

    def step(images: Tensor, labels: Tensor) -> None:
        with inference(encoder):
            found = layer_means(encoder, images, layers)
        for head, spec, optimizer in zip(heads, specs, optimizers, strict=True):
            with torch.autocast(images.device.type, torch.bfloat16, enabled=images.device.type == "cuda"):
                loss = F.cross_entropy(head(found[spec.layers]), labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), 3.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()

    torch.manual_seed(0)
    config = XTRAConfig.preset("xtra_s16", image_size_px=224, cell_size=2)
    encoder = Encoder(config).to(options.device).eval().requires_grad_(False)
    specs = ProbeConfig().specs(config.depth)
    one = [spec for spec in specs if spec.kind == "attentive"][:1]
    images = torch.randn(options.batch, 3, 224, 224, device=options.device)
    labels = torch.arange(options.batch, device=options.device) % options.classes
    steps = {
        "one attentive head": grid_step(encoder, one, options.classes, options.device),
        f"grid of {len(specs)} heads": grid_step(encoder, specs, options.classes, options.device),
        f"{len(specs)} plain heads": plain_step(encoder, specs, options.classes, options.device),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(options.rounds + 1):
        for name, step in steps.items():
            synchronize(options.device)
            started = time.perf_counter()
            step(images, labels)
            synchronize(options.device)
            if turn:  # the first one warms up
                seconds[name].append(time.perf_counter() - started)
    report(options, seconds)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def report(options: argparse.Namespace, seconds: dict[str, list[float]]) -> None:
    first = next(iter(seconds.values()))
    result: dict[str, Any] = {
        "encoder": "xtra_s16 at 224 px, cells of 2×2", "batch": options.batch, "classes": options.classes,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or "cpu",
        "torch": torch.__version__, "threads": torch.get_num_threads(), "rounds": options.rounds,
        "median_seconds": {name: statistics.median(found) for name, found in seconds.items()},
        "ratio_to_one_head": {
            name: statistics.median(a / b for a, b in zip(found, first, strict=True)) for name, found in seconds.items()
        },
    }  # fmt: skip
    for name, ratio in result["ratio_to_one_head"].items():
        print(f"{name:<22} {result['median_seconds'][name]:8.3f} s   {ratio:5.2f} × one head")
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"probe_cost-{options.device}.json"
    file.write_text(json.dumps(result, indent=2) + "\n")
    print(file)


if __name__ == "__main__":
    main()
