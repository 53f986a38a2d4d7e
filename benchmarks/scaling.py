"""How time, rate and memory grow: curves with the fitted exponent of each and the one that theory predicts.

    python -m benchmarks.scaling [--device cpu|cuda] [--only NAME ...] [--quick]

Training steps over tokens, width, depth and batch; square matrix products; sampling over entities and steps; and, of
the host, so with --device cpu only: the image pipeline over workers, opening a data set over its size, the fingerprint
of its files, the computed shuffle, writing a checkpoint. Everything on one curve runs in turn, round after round.

Theory is a number for every point, such as the operations of a step (`training/flops.py`). Its line goes through the
point that makes the most of it (the least time for an operation), so how far a point is from the line is how much of
that best rate it loses. Results go to results/scaling-DEVICE.json; then docs/scaling.png and the tables of
docs/scaling.md are redrawn. `--quick` runs everything in sizes that say nothing, into a file of its own, and leaves
both alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import scaling_host
from benchmarks.curves import About, Curve, curve
from benchmarks.measure import described, interleaved, matmul
from benchmarks.reference_steps import Precision
from benchmarks.training_step import ours_xtra_step, pinned
from nextblock.evaluation.inference import inference
from nextblock.figures.scaling import draw_scaling
from nextblock.training.flops import xar_sampling_flops, xtra_flops
from nextblock.training.run_record import environment
from nextblock.xar.config import XARConfig
from nextblock.xar.model import XAR
from nextblock.xar.sampler import sample_latents
from nextblock.xtra.config import XTRAConfig
from nextblock.xtra.model import XTRA

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DEVICES = ("cpu", "cuda")
AXES = ("tokens", "width", "depth", "batch")
_SAID = {"tokens": "tokens (image size)", "width": "width", "depth": "depth", "batch": "batch"}


@dataclass(frozen=True)
class Sizes:
    """What is measured on a device.

    Attributes:
        xtra: the model around which one size at a time is changed; its predictor is as wide as its encoder.
        heads, predictor_heads: width of a head of each.
        batch: images of a step.
        values: axis -> the sizes along it.
        xar: the generator.
        images, steps: sampled at once; solver steps for a cell, where the cells vary.
        cells: patches along a cell's side.
        many_steps: where the steps vary.
        sides: of the square products.
    """

    xtra: Mapping[str, int]
    batch: int
    precision: Precision
    values: Mapping[str, Sequence[int]]
    xar: Mapping[str, Any]
    images: int
    cells: Sequence[int]
    sides: Sequence[int]
    steps: int = 4
    many_steps: Sequence[int] = (2, 4, 8, 16, 32)
    heads: int = 64
    predictor_heads: int = 64
    rounds: int = 5


SIZES = {
    "cpu": Sizes(
        xtra={"image_size_px": 64, "patch_size_px": 8, "cell_size": 2, "width": 192, "depth": 6, "predictor_depth": 2},
        batch=4, precision="fp32",
        values={"tokens": (16, 64, 256, 1024), "width": (64, 128, 256, 512), "depth": (2, 4, 8, 16, 32),
                "batch": (1, 2, 4, 8, 16, 32)},
        xar={"width": 128, "depth": 4, "num_heads": 4, "num_classes": 10}, images=4, cells=(16, 8, 4, 2),
        sides=(64, 128, 256, 512, 1024, 2048),
    ),
    "cuda": Sizes(
        xtra={"image_size_px": 256, "patch_size_px": 16, "cell_size": 4, "width": 768, "depth": 12,
              "predictor_depth": 8},
        batch=64, precision="bf16", predictor_heads=128,
        values={"tokens": (64, 256, 576, 1024), "width": (256, 512, 768, 1024, 1536), "depth": (6, 12, 24, 48),
                "batch": (4, 8, 16, 32, 64, 128, 256)},
        xar={"width": 768, "depth": 16, "num_heads": 12}, images=32, cells=(16, 8, 4, 2),
        sides=(512, 1024, 2048, 4096, 8192, 16384),
    ),
}  # fmt: skip
QUICK = Sizes(
    xtra={"image_size_px": 16, "patch_size_px": 4, "cell_size": 1, "width": 64, "depth": 1, "predictor_depth": 1},
    batch=2, precision="fp32",
    values={"tokens": (16, 64), "width": (64, 128), "depth": (1, 2), "batch": (1, 2)},
    xar={"latent_size": 8, "latent_channels": 4, "width": 32, "depth": 2, "num_heads": 2, "num_classes": 10}, images=2,
    cells=(8, 4), sides=(32, 64), steps=2, many_steps=(2, 4), rounds=2,
)  # fmt: skip


def training(axis: str, device: str, quick: bool) -> list[Curve]:
    """A step of XTRA's training over one of its sizes, or over the batch."""
    sizes, arms, amounts = QUICK if quick else SIZES[device], {}, {}
    for value in sizes.values[axis]:
        config, batch = xtra_config(sizes, axis, value), value if axis == "batch" else sizes.batch
        torch.manual_seed(0)
        pixels = pinned(torch.randint(0, 256, (batch, *config.image, 3), dtype=torch.uint8), device)
        model = XTRA(config).to(device)
        arms[str(value)] = ours_xtra_step(model, pixels, device, precision=sizes.precision, compiled=False)[0]
        amounts[float(value)] = float(batch * xtra_flops(config).training)
    timed = interleaved(arms, rounds=sizes.rounds, warmup=1, device=device)
    grid, base = sizes.xtra["image_size_px"] // sizes.xtra["patch_size_px"], sizes.xtra
    told = {"tokens": grid**2, "width": base["width"], "depth": base["depth"], "batch": sizes.batch}
    rest = ", ".join(f"{name} {value}" for name, value in told.items() if name != axis)
    about = About(
        f"step over {axis}", f"XTRA step over {axis}", _SAID[axis], "s", "operations",
        note=f"{rest}; {sizes.precision}, not compiled",
    )  # fmt: skip
    return [curve(about, {float(x): seconds for x, seconds in timed.seconds.items()}, amounts)]


def xtra_config(sizes: Sizes, axis: str, value: int) -> XTRAConfig:
    """The model with `value` along `axis`. Sizes that may be derived from the width are."""
    given = dict(sizes.xtra)
    if axis == "tokens":
        given["image_size_px"] = math.isqrt(value) * given["patch_size_px"]
    elif axis != "batch":
        given[axis] = value
    width = given["width"]
    heads, narrow = width // sizes.heads, width // sizes.predictor_heads
    return XTRAConfig(**given, num_heads=heads, predictor_width=width, predictor_heads=narrow)


def products(device: str, quick: bool) -> list[Curve]:
    """Operations per second of square products; the largest is the ceiling of everything else."""
    sizes = QUICK if quick else SIZES[device]
    made = {n: matmul(n, torch.bfloat16 if device == "cuda" else torch.float32, device) for n in sizes.sides}
    arms = {str(n): arm for n, (arm, _) in made.items()}
    timed = interleaved(arms, rounds=sizes.rounds, warmup=2, device=device)
    found = {float(n): [made[int(n)][1] / s for s in seconds] for n, seconds in timed.seconds.items()}
    about = About(
        "matrix product", "square matrix product", "side", "operations/s", "the largest rate", rate=True,
        note=sizes.precision,
    )  # fmt: skip
    return [curve(about, found, dict.fromkeys(found, 1.0))]


def sampling(axis: str, device: str, quick: bool) -> list[Curve]:
    """Sampling with xAR over the cells of the same grid, or over the solver's steps for each cell."""
    sizes, arms, amounts = QUICK if quick else SIZES[device], {}, {}
    cells = sizes.cells if axis == "cells" else sizes.cells[1:2]
    runs = [(side, steps) for side in cells for steps in ((sizes.steps,) if axis == "cells" else sizes.many_steps)]
    for side, steps in runs:
        torch.manual_seed(0)
        model = XAR(XARConfig(**sizes.xar, entity_size=side)).to(device).eval()
        number = model.ordering.num_entities if axis == "cells" else steps
        arms[str(number)] = partial(sampled, model, sizes.images, steps)
        unguided = [False] * model.ordering.num_entities
        amounts[float(number)] = float(sizes.images * xar_sampling_flops(model.config, steps, unguided))
    timed = interleaved(arms, rounds=2 if quick else 3, warmup=1, device=device)
    rest = f"{sizes.steps} steps for each cell" if axis == "cells" else f"{model.ordering.num_entities} cells"
    about = About(
        f"sampling over {axis}", f"xAR sampling over {axis}", axis if axis == "cells" else "steps for each cell", "s",
        "operations", note=f"{rest}, {model.ordering.num_tokens} tokens, {sizes.images} images, no guidance",
    )  # fmt: skip
    return [curve(about, {float(x): seconds for x, seconds in timed.seconds.items()}, amounts)]


def sampled(model: XAR, images: int, steps: int) -> None:
    labels = torch.zeros(images, dtype=torch.int64, device=model.position1.device)
    with inference(model):
        sample_latents(model, labels, steps=steps)


Measured = Callable[[str, bool], list[Curve]]
GROUPS: dict[str, Measured] = {
    "products": products,
    **{axis: partial(training, axis) for axis in AXES},
    "sampling_cells": partial(sampling, "cells"),
    "sampling_steps": partial(sampling, "steps"),
}
HOST: dict[str, Callable[[bool], list[Curve]]] = {
    "pipeline": scaling_host.pipeline,
    "opening": scaling_host.opening,
    "shuffle": scaling_host.shuffle,
    "checkpoint": scaling_host.checkpoint,
}


def measure(device: str, only: Sequence[str], file: Path, *, quick: bool) -> None:
    """Measure the groups, writing `file` after each; groups that are not asked for stay as they are."""
    groups: dict[str, Measured] = dict(GROUPS)
    if device == "cpu":
        groups |= {name: lambda device, quick, run=run: run(quick) for name, run in HOST.items()}
    unknown = [name for name in only if name not in groups]
    if unknown:
        raise SystemExit(f"no curve {', '.join(unknown)} on {device}; there are: {', '.join(groups)}.")
    for name in only or groups:
        started, load = time.perf_counter(), os.getloadavg()[0]
        print(f"{name} ...", flush=True)
        made = {
            "curves": groups[name](device, quick),
            "seconds": round(time.perf_counter() - started, 1),
            "date": time.strftime("%Y-%m-%d"),
            "device": described(device),
            "load": round(load, 1),
            "environment": environment(0, device) | {"command": ["python", "-m", "benchmarks.scaling", *sys.argv[1:]]},
        }
        found = read_groups(file) | {name: made}
        file.parent.mkdir(parents=True, exist_ok=True)
        ordered = {each: found[each] for each in groups if each in found}
        file.write_text(json.dumps({"device": device, "groups": ordered}, indent=2) + "\n")


def read_groups(file: Path) -> dict[str, dict[str, Any]]:
    """Name -> curves, and when, where and how they were measured; none where there is no such file."""
    return json.loads(file.read_text())["groups"] if file.is_file() else {}


def read_curves(file: Path) -> list[Curve]:
    """All curves of a results file."""
    return [found for group in read_groups(file).values() for found in group["curves"]]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=DEVICES)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help=", ".join([*GROUPS, *HOST]))
    parser.add_argument("--quick", action="store_true", help="in sizes that say nothing; picture and page stay")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "scaling.png")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "scaling.md")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device is usable here; run it with --device cpu.")
    file = options.out / f"scaling-{options.device}{'-quick' if options.quick else ''}.json"
    measure(options.device, options.only, file, quick=options.quick)
    for found in read_curves(file):
        print(f"{found['name']:28} exponent {found['slope']:6.2f}, {found['theory']} {found['theory_slope']:6.2f}")
    if not options.quick:
        publish(options.out, options.figure, options.page)
    print(file)
    return 0


def publish(results: Path, figure: Path, page: Path) -> None:
    """Draw what was measured on the CPU, and renew the tables of the page."""
    from benchmarks import projection_page  # which reads what was measured here

    print(draw_scaling(read_curves(results / "scaling-cpu.json"), figure))
    projection_page.main(["--results", str(results), "--page", str(page)])


if __name__ == "__main__":
    raise SystemExit(main())
