"""A probe sweep, 9 learning rates × 2 kinds of head: ours in one pass, beside one run for every rate and kind.

    python -m benchmarks.probe_sweep [--device cuda] [--quick]

Every one of the plain path's 18 runs passes its images through the encoder and trains one head, each with its own key
and value maps. They cost the same at every rate, so one linear and one attentive run are timed and counted nine times.
The limit is the encoder's pass alone. Ours passes each batch through the encoder at every step; where features are kept
between epochs (the default of `nextblock probe` on a CPU) it does so once.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.measure import Row, Target, interleaved, run_alone
from benchmarks.probe_cost import grid_step, plain_step
from nextblock.evaluation.inference import inference
from nextblock.evaluation.probe_config import LRS, ProbeConfig
from nextblock.xtra.classifier import layer_means
from nextblock.xtra.config import XTRAConfig
from nextblock.xtra.model import Encoder

CLASSES = 10
QUICK = {"width": 32, "depth": 6, "num_heads": 2, "image_size_px": 32, "patch_size_px": 4}


def planned(device: str) -> list[Row]:
    """The row of a device, not measured."""
    targets = (Target("plain", ">=", 6.0), Target("limit", ">=", round(1 / 1.5, 3)))
    return [Row("probe sweep, 9 rates × 2 heads", "images/s", device, targets)]


def rows(device: str, quick: bool = False) -> list[Row]:
    """Measure it; `quick`: in sizes that say nothing, to see that it runs."""
    torch.manual_seed(0)
    sizes = QUICK if quick else {"image_size_px": 224}
    config = XTRAConfig.preset("xtra_s16", cell_size=2, **sizes)
    encoder = Encoder(config).to(device).eval().requires_grad_(False)
    specs = ProbeConfig(num_heads=2 if quick else 16).specs(config.depth)
    batch = 4 if quick else 256 if device == "cuda" else 16
    images = torch.randn(batch, config.channels, *config.image, device=device)
    labels = torch.arange(batch, device=device) % CLASSES
    layers = list(dict.fromkeys(spec.layers for spec in specs))
    grid = grid_step(encoder, specs, CLASSES, device)
    single = [next(spec for spec in specs if spec.kind == kind) for kind in ("linear", "attentive")]
    alone = [plain_step(encoder, [spec], CLASSES, device) for spec in single]

    def one_pass() -> None:
        with inference(encoder):
            layer_means(encoder, images, layers)

    arms = {
        "ours": lambda: grid(images, labels),
        "plain": lambda: [step(images, labels) for step in alone],
        "limit": one_pass,
    }
    timed = interleaved(arms, rounds=2 if quick else 7, warmup=1, device=device)
    amounts = {"ours": float(batch), "plain": batch / len(LRS), "limit": float(batch)}
    note = f"{len(specs)} heads, ViT-S/16 at 224 px, batch {batch}; the limit is the encoder's pass alone"
    return [replace(timed.row(planned(device)[0], amounts), note=note)]


if __name__ == "__main__":
    run_alone(__doc__, rows, devices=True)
