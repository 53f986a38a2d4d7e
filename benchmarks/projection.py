"""What a whole training would take: arithmetic from operations, measured numbers and named assumptions.

    python -m benchmarks.projection

prints the tables of docs/scaling.md and rewrites them there, between their markers. Operations come from
`training/flops.py` and the packaged recipes; what is measured from results/scaling-*.json, speed-*.json and
probe_cost-cpu.json; everything else is an `Assumptions`, published or guessed, and the page says which.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench import read_rows
from benchmarks.scaling import read_curves
from nextblock.recipes.config import read_recipe
from nextblock.recipes.generator import GENERATOR
from nextblock.training.flops import xar_flops, xtra_flops
from nextblock.xar.config import XARConfig
from nextblock.xar.model import XAR
from nextblock.xtra.config import XTRAConfig
from nextblock.xtra.model import XTRA

DAY, GB, TB = 86_400, 1e9, 1e12
IMAGENET, IMAGENET_21K = 1_281_167, 13_100_000


@dataclass(frozen=True)
class Assumptions:
    """What is not measured here.

    Attributes:
        peak: operations a second of a GPU; published for an H100 SXM, dense bf16.
        shares: of the peak that training reaches; scenarios.
        inside, network: bytes a second from one GPU to another of its node (published for NVLink 4, each way) and
            through a GPU's own network card (published for 400 Gbit/s).
        gpus_a_node, node_memory: of a DGX H100 as published; bytes.
        overlap: share of the backward pass behind which the exchange of gradients can hide; a guess.
        index_share: of a node's memory that the index of its processes may take; a guess.
        files_a_second: that a shared file system tells the size of; a guess.
        wait_s: that the other processes wait for the first one: Fabric's default.
        shard_bytes: of a tar or Parquet shard; a choice.
        inodes: that ext4 can number.
    """

    peak: float = 989e12
    shares: tuple[float, ...] = (0.3, 0.4, 0.5)
    inside: float = 450 * GB
    network: float = 50 * GB
    gpus_a_node: int = 8
    node_memory: float = 2 * TB
    overlap: float = 0.8
    index_share: float = 0.1
    files_a_second: float = 10_000
    wait_s: float = 1800
    shard_bytes: float = 1 * GB
    inodes: int = 2**32


@dataclass(frozen=True)
class Run:
    """A training: operations and bytes read for one image, weights, images of the data set, epochs, global batch.

    `averaged`: it keeps an average of its weights. `decoded`: it reads images, not latents. `measured_share`: of a
    GPU's peak, where its step was timed on one.
    """

    name: str
    flops: float
    parameters: int
    images: int
    epochs: int
    batch: int
    bytes_per_image: float
    averaged: bool = False
    decoded: bool = True
    measured_share: float | None = None

    @property
    def gradient_bytes(self) -> int:
        return 4 * self.parameters  # float32: autocast keeps the weights so

    @property
    def state_bytes(self) -> int:
        """Weights, AdamW's two moments, and the average: what a checkpoint holds."""
        return (3 + self.averaged) * self.gradient_bytes

    @property
    def total(self) -> float:
        """Operations of the whole training."""
        return self.flops * self.images * self.epochs


@dataclass(frozen=True)
class Step:
    """Seconds of one optimiser step: products, the exchange of gradients, and what of it is waited for."""

    compute_s: float
    exchange_s: float
    waited_s: float

    @property
    def seconds(self) -> float:
        return self.compute_s + self.waited_s


@dataclass(frozen=True)
class Measured:
    """From the results: rates of one core and one process, and what one more image costs."""

    images_a_core_s: float
    bytes_per_image: float
    open_s: float
    index_bytes: float
    row_bytes: float
    fingerprint_s: float
    fingerprint_bytes: float
    checkpoint_bytes_s: float
    shuffle_ns: float
    probe_ratio: float


def ring(size: float, members: int, bandwidth: float) -> float:
    """Seconds of a ring all-reduce of `size` bytes: everyone sends 2 (n - 1) / n of them."""
    return 2 * (members - 1) / members * size / bandwidth


def exchange(size: float, gpus: int, assumed: Assumptions) -> float:
    """In two levels: reduced inside the node, each GPU's part over its own network card, and handed out inside."""
    inside = min(gpus, assumed.gpus_a_node)
    nodes = -(-gpus // assumed.gpus_a_node)
    return ring(size, inside, assumed.inside) + ring(size / inside, nodes, assumed.network)


def step(run: Run, gpus: int, share: float, assumed: Assumptions) -> Step:
    """Two thirds of the products are the backward pass, and `overlap` of it hides the exchange."""
    compute = run.batch * run.flops / (gpus * assumed.peak * share)
    sent = exchange(run.gradient_bytes, gpus, assumed)
    return Step(compute, sent, max(0.0, sent - assumed.overlap * compute * 2 / 3))


def days(run: Run, gpus: int, share: float, assumed: Assumptions) -> float:
    return run.images * run.epochs / run.batch * step(run, gpus, share, assumed).seconds / DAY


def images_a_second(run: Run, gpus: int, share: float, assumed: Assumptions) -> float:
    """Of one GPU."""
    return run.batch / gpus / step(run, gpus, share, assumed).seconds


def gpus_until_waiting(run: Run, share: float, assumed: Assumptions, waited: float = 0.1) -> int | None:
    """The first of 16, 32, ... GPUs that wait for gradients so much of a step; None: none while each has an image."""
    gpus = 2 * assumed.gpus_a_node
    while gpus <= run.batch:
        found = step(run, gpus, share, assumed)
        if found.waited_s >= waited * found.seconds:
            return gpus
        gpus *= 2
    return None


def network_until_waiting(run: Run, gpus: int, share: float, assumed: Assumptions) -> float:
    """Bytes a second of a GPU's network card below which a step waits for gradients; inf where it waits anyway."""
    nodes = -(-gpus // assumed.gpus_a_node)
    hidden = assumed.overlap * step(run, gpus, share, assumed).compute_s * 2 / 3
    left = hidden - ring(run.gradient_bytes, assumed.gpus_a_node, assumed.inside)
    return ring(run.gradient_bytes / assumed.gpus_a_node, nodes, 1.0) / left if left > 0 else float("inf")


def latent_bytes(config: XARConfig) -> int:
    """Stored for an image: mean and deviation of every number, as it is and mirrored, in float16, and two checks."""
    height, width = config.latent
    return 2 * (2 * config.latent_channels * height * width * 2 + 4)


def runs(measured: Measured, results: Path, assumed: Assumptions) -> list[Run]:
    """XTRA-H on ImageNet-21K and xAR-H on ImageNet, as the packaged recipes have them."""
    xtra, xar = read_recipe("xtra_h14_in21k"), read_recipe("xar_h_in256", GENERATOR)
    encoder, generator = XTRAConfig.from_dict(xtra["model"]), XARConfig.from_dict(xar["model"])
    with torch.device("meta"):
        weights = [sum(p.numel() for p in model.parameters()) for model in (XTRA(encoder), XAR(generator))]
    timed = {row["name"]: row["ours"] for row in read_rows(results / "speed-cuda.json")}
    flops, rate = xtra_flops(encoder).training, timed.get("XTRA-H/14 training step, bf16")
    return [
        Run(
            "XTRA-H/14, 13.1 M images", flops, weights[0], IMAGENET_21K, xtra["training"]["epochs"],
            xtra["training"]["batch_size"], measured.bytes_per_image,
            measured_share=rate * flops / assumed.peak if rate else None,
        ),
        Run(
            "xAR-H, ImageNet latents", xar_flops(generator).training, weights[1], IMAGENET, xar["training"]["epochs"],
            xar["training"]["batch_size"], latent_bytes(generator) / 2, averaged=True, decoded=False,
        ),
    ]  # fmt: skip


def measured_in(results: Path) -> Measured:
    """Raises SystemExit when something that is needed has not been measured."""
    curves = {found["name"]: found for found in read_curves(results / "scaling-cpu.json")}
    rows = {row["name"]: row["ours"] for row in read_rows(results / "speed-cpu.json")}
    try:
        saving = curves["checkpoint"]["points"][-1]
        probes = json.loads((results / "probe_cost-cpu.json").read_text())
        return Measured(
            images_a_core_s=rows["image pipeline, 256 px random crops, one core"],
            bytes_per_image=curves["pipeline"]["bytes_per_image"],
            open_s=each(curves["open files"]),
            index_bytes=each(curves["index of files"]) * 2**20,
            row_bytes=each(curves["index of Parquet rows"]) * 2**20,
            fingerprint_s=each(curves["fingerprint of files"]),
            fingerprint_bytes=each(curves["fingerprint of files, peak"]) * 2**20,
            checkpoint_bytes_s=saving["x"] / saving["median"],
            shuffle_ns=max(point["median"] for point in curves["shuffle"]["points"]),
            probe_ratio=probes["ratio_to_one_head"]["grid of 18 heads"],
        )
    except (KeyError, FileNotFoundError) as error:
        raise SystemExit(
            f"{error} is not measured yet; run python -m benchmarks.scaling, then benchmarks.bench."
        ) from None


def assumed_in(results: Path) -> Assumptions:
    """The peak as the largest product measured on a GPU, where one was."""
    found = [curve for curve in read_curves(results / "scaling-cuda.json") if curve["name"] == "matrix product"]
    return replace(Assumptions(), peak=max(p["median"] for p in found[0]["points"])) if found else Assumptions()


def each(curve: dict[str, Any]) -> float:
    """What one more image costs, from the smallest to the largest size."""
    first, last = curve["points"][0], curve["points"][-1]
    return float((last["median"] - first["median"]) / (last["x"] - first["x"]))


if __name__ == "__main__":
    from benchmarks.projection_page import main

    raise SystemExit(main())
