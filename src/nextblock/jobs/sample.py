"""Make images with a trained generator."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from nextblock.data.sources import Source, open_source
from nextblock.errors import ConfigError
from nextblock.jobs.opening import one_or_many
from nextblock.jobs.opening_generator import open_generator
from nextblock.jobs.sample_classes import chosen_classes
from nextblock.jobs.sample_images import ImageMaker
from nextblock.jobs.sample_run import Sampled, SampleRun
from nextblock.jobs.sample_settings import SampleSettings
from nextblock.jobs.share import array_share, require_named
from nextblock.training.config import TrainingConfig
from nextblock.training.launch import launch, pick_device
from nextblock.xar.sampler import sample_latents

if TYPE_CHECKING:
    from nextblock.jobs.opening_generator import OpenedGenerator


def sample(
    *,
    run: str | Path,
    classes: str | Sequence[str | int] | None = None,
    n: int = 16,
    seed: int = 0,
    guidance: float = 1.0,
    guidance_schedule: str = "linear",
    guidance_interval: str | Sequence[float] = (0.0, 1.0),
    steps: int = 50,
    solver: str = "euler_maruyama",
    time_grid: str = "auto",
    weights: Literal["ema", "raw"] = "ema",
    vae: str | None = None,
    continue_from: Any = None,
    known_entities: int = 0,
    out: str | Path | None = None,
    npz: bool = False,
    animation: int = 4,
    batch_size: int = 64,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    state: Literal["float64", "float32"] = "float64",
    compile: bool = False,
    device: str = "auto",
    devices: int = 1,
    quiet: bool = False,
) -> Sampled:
    """Make images with a trained generator: n of them, the classes taking turns.

    Args:
        run: a run of train-generator, finished or still going, or a folder of exported weights.
        classes: names or numbers with commas between them; "all", or left out, means every class in turn. Where a
            class's name is a number, that name is meant.
        n: images in all. More than a folder holds are added to it; those that are there stay.
        seed: image i depends on the seed and i alone.
        guidance: how strongly the class is insisted on; 1 = not beyond what the model learned, down to 0 = as if no
            class were given.
        guidance_schedule: "linear" (rising over the entities, as published) or "constant".
        guidance_interval: guide only at times between these two (0 = image, 1 = noise), as in 0.1,0.8.
        steps: solver steps for each entity.
        solver: "euler_maruyama" (as published), "euler", "heun" or "multistep".
        time_grid: "auto", "uniform", "published" or "quadratic".
        weights: "ema" (averaged) or "raw".
        vae: where the VAE is now, when it is not where the run says.
        continue_from: images (files, a folder) whose first entities are kept; image i goes on from image i modulo
            their number.
        known_entities: so many entities are kept, the earliest ones. Later ones cannot be: an entity is made from
            those before it alone. Of a scale pyramid the known ones are the coarse scales.
        out: a new folder, or one that the same command began, perhaps with a smaller n; by default a dated one here.
        npz: write samples.npz, too, the file that ADM's evaluation reads.
        animation: so many images are shown coming about in entities.gif; 0 = none.
        batch_size: images at once. Image i is always made in batch i // batch_size, so a job that is killed and
            continued gives the images of one that is not, to the bit on the same machine and number of processes. Where
            n grows, images that share a batch with earlier ones are those of a larger n from the start to rounding.
        precision: "auto" (bf16 on CUDA, else fp32), "fp32" or "bf16", of the model.
        state: "float64" (as published) or "float32", of what the solver integrates.
        compile: compile the layers first, which takes some seconds to a minute and pays for itself where many images
            are made; on CUDA, passes are recorded as graphs, too. Images are the same to rounding.
        device: "auto", "cpu" or "cuda".
        devices: processes on this machine; 0 = all devices. The images do not depend on it.
        quiet: print nothing.

    Writes images/, contact-sheet.png and sample.json (what made them) into the folder. Ctrl-C leaves what the same
    command goes on with. Raises ConfigError, DataError, RunError or CheckpointError.
    """
    console = Console(quiet=quiet)
    for name, value in {"animation": animation, "devices": devices}.items():
        if value < 0:
            raise ConfigError(f"--{name} must be 0 or more; got {value}.")
    require_named(out, array_share())
    place = _checked_device(device)
    interval, precision_used = _interval(guidance_interval), _precision(precision, place)
    opened = open_generator(run, weights=weights, vae=vae, device="cpu")
    settings = SampleSettings(
        classes=chosen_classes(classes, opened.classes, run), n=n, seed=seed, guidance=guidance,
        guidance_schedule=guidance_schedule, guidance_interval=interval, steps=steps, solver=solver,
        time_grid=time_grid, batch_size=batch_size, precision=precision_used, state=state,
        known_entities=known_entities, compile=compile,
    )  # fmt: skip
    known = _known(continue_from, known_entities, opened)
    fabric = launch(TrainingConfig(device=place, devices=devices, seed=seed))
    maker = ImageMaker(opened, settings, fabric.device, sample_latents, known)
    folder = fabric.broadcast(str(out or f"samples-{time.strftime('%Y%m%d-%H%M%S')}"))
    kind = str(opened.about["weights"])
    if kind != weights and fabric.is_global_zero:
        console.print(f"{opened.where} keeps no average of the weights: these are the last ones.", markup=False)
    return SampleRun(maker, fabric, weights=kind, console=console).make(folder, npz=npz, animated=animation)


def _interval(given: str | Sequence[float]) -> tuple[float, float]:
    try:
        parts = given.strip("[]() ").split(",") if isinstance(given, str) else list(given)
        low, high = (float(part) for part in parts)
    except ValueError:
        raise ConfigError(f"--guidance_interval must be two times, as in 0.1,0.8; got {given!r}.") from None
    return low, high


def _precision(precision: str, device: str) -> str:
    """What "auto" stands for. Raises ConfigError for bf16 without CUDA: nothing would be gained by it."""
    cuda = device == "cuda"
    if precision == "bf16" and not cuda:
        raise ConfigError("precision bf16 needs a CUDA device. Leave out --precision.")
    return ("bf16" if cuda else "fp32") if precision == "auto" else precision


def _checked_device(device: str) -> Literal["cpu", "cuda"]:
    return "cuda" if pick_device(device) == "cuda" else "cpu"


def _known(images: Any, entities: int, opened: OpenedGenerator) -> Source | None:
    """The images to continue. Raises ConfigError unless both they and how much of them is kept are given."""
    if images is None and not entities:
        return None
    most = opened.model.ordering.num_entities - 1
    if images is None:
        raise ConfigError(f"--known_entities {entities} of which images? Give --continue_from.")
    if most < 1:
        raise ConfigError("this model makes an image as one entity, so there is nothing to continue from.")
    if not 1 <= entities <= most:
        raise ConfigError(
            f"--continue_from needs --known_entities between 1 and {most}: the model makes an image in {most + 1} "
            f"entities; got {entities}."
        )
    return open_source(one_or_many(images))


__all__ = ["Sampled", "sample"]
