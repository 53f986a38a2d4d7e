"""One call of `XARPipeline`: its arguments checked, seeds from generators, batches of latents, latents to images."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from nextblock.errors import CheckpointError, ConfigError
from nextblock.evaluation.inference import inference
from nextblock.jobs.sample_images import DECODED_AT_ONCE
from nextblock.randomness import normals
from nextblock.vae import Autoencoder, Pixels
from nextblock.xar.model import XAR
from nextblock.xar.sampler import Guidance, sample_latents
from nextblock.xar.solvers import solver_named

Generator = torch.Generator | int
Generators = Generator | Sequence[Generator] | None
Labels = int | str | Sequence[int | str] | Tensor | NDArray[np.integer[Any]]
Images = list[Image.Image] | NDArray[np.float32] | Tensor
OnStep = Callable[[int, float, Tensor], object]


def plain_labels(given: Labels) -> str | list[str | int]:
    """Texts, and whole numbers of whatever kind as Python's. Raises ConfigError for anything else, and for nothing."""
    if isinstance(given, str):
        listed: list[Any] = [given] if given.strip() else []
    elif isinstance(given, Tensor | np.ndarray):
        listed = given.reshape(-1).tolist()
    else:
        listed = list(given) if isinstance(given, Sequence) else [given]
    if not listed:
        raise ConfigError("class_labels is empty: give the number or the name of a class for each image.")
    if isinstance(given, str):
        return given
    return [one if isinstance(one, str) else _whole(one) for one in listed]


def _whole(number: Any) -> int:
    try:
        if not isinstance(number, bool):
            return operator.index(number)
    except TypeError:
        pass
    raise ConfigError(f"class_labels must be names and whole numbers; got {number!r}.")


def require_count(name: str, value: object) -> None:
    """Raise ConfigError unless it is a whole number, at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be a whole number, at least 1; got {value!r}.")


def checked_guidance(scale: float, schedule: str, interval: Sequence[float], classes: bool) -> Guidance:
    """Raises ConfigError for a scale below 0, any but 1 where there are no classes, and what `Guidance` refuses."""
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 <= scale < float("inf"):
        raise ConfigError(f"guidance_scale must be 0 or more (1 = none, more insists on the class); got {scale!r}.")
    if scale != 1 and not classes:
        raise ConfigError(
            f"guidance_scale {scale:g} needs a model that knows classes, and this one is unconditional. Leave it out."
        )
    return Guidance(scale, schedule, interval)


def require_generators(given: Generators, count: int) -> None:
    """Raise ConfigError unless it is None, a generator or a seed, or a list of `count` of these."""
    listed = isinstance(given, list | tuple)
    if isinstance(given, list | tuple) and len(given) != count:
        raise ConfigError(
            f"generator must be one, or a list of {count}, one for each image; got a list of {len(given)}."
        )
    for one in given if isinstance(given, list | tuple) else [given]:
        if not isinstance(one, torch.Generator | int | np.integer) and (listed or one is not None):
            raise ConfigError(f"generator must be a torch.Generator, a whole number, or a list of these; got {one!r}.")


def seeds_of(given: Generators) -> int | list[int]:
    """The seed of all images, or the seeds of each; a torch.Generator goes on by one number for each."""
    if isinstance(given, list | tuple):
        return [_seed(one) for one in given]
    return _seed(given)  # type: ignore[arg-type]  # a sequence is a list or a tuple here


def _seed(one: Generator | None) -> int:
    if one is not None and not isinstance(one, torch.Generator):
        return operator.index(one)
    device = "cpu" if one is None else one.device
    return int(torch.randint(2**63 - 1, (), generator=one, device=device))


@dataclass(frozen=True)
class PipelineRun:
    """What decides the latents of a call, beside labels and seeds.

    Attributes:
        model: the generator.
        solver: its name.
        times: of the solver, falling from 1 to 0.
        guidance: checked.
        at_once: images in a batch.
        autocast: bf16 on CUDA.
        on_step: told (step, time, latents [b, C, h, w]) after every step.
        bar: options of the progress bar.
    """

    model: XAR
    solver: str
    times: Sequence[float]
    guidance: Guidance
    at_once: int
    autocast: bool
    on_step: OnStep | None
    bar: dict[str, Any]

    def latents(self, labels: Sequence[int] | None, count: int, seeds: int | list[int]) -> Tensor:
        """[B, C, h, w] float32, on the model's device. Raises CheckpointError when they are not finite."""
        starts = range(0, count, self.at_once)
        steps = len(starts) * self.model.ordering.num_entities * (len(self.times) - 1)
        parts = []
        with inference(self.model, bf16=self.autocast), tqdm(**{"total": steps, **self.bar}) as bar:
            watch = self._watch(bar)
            for start in starts:
                numbers = range(start, min(start + self.at_once, count))
                parts.append(self._batch(labels, numbers, seeds, watch))
        found = torch.cat(parts)
        if not found.isfinite().all():
            raise CheckpointError(
                "the generator gave latents that are not finite. Its training diverged, guidance_scale is too strong, "
                "or the precision too coarse (torch_dtype=torch.float32 asks for the finest)."
            )
        return found

    def _batch(self, labels: Sequence[int] | None, numbers: range, seeds: int | list[int], watch: Any) -> Tensor:
        own = isinstance(seeds, list)
        return sample_latents(
            self.model,
            None if labels is None else torch.tensor([labels[i] for i in numbers]),
            count=len(numbers) if labels is None else None,
            solver=self.solver,
            time_grid=self.times,
            guidance=self.guidance.scale,
            guidance_schedule=self.guidance.schedule,
            guidance_interval=self.guidance.interval,
            seed=0 if isinstance(seeds, list) else seeds,
            indices=None if own else numbers,
            draws=self._draws([seeds[i] for i in numbers]) if isinstance(seeds, list) else None,
            watch=watch,
        )

    def _draws(self, seeds: Sequence[int]) -> list[Tensor]:
        """What `sample_latents` draws for image 0 of each of these seeds, as one batch."""
        made, channels = [], self.model.config.token_channels
        for entity, tokens in enumerate(self.model.ordering.entity_sizes):
            for i in range(self._draws_each()):
                purpose = f"sample/entity{entity}/draw{i}"  # the sampler's name for it
                made.append(torch.cat([normals(seed, purpose, [0], (tokens, channels)) for seed in seeds]))
        return made

    def _draws_each(self) -> int:
        """How often the solver draws for an entity: its start, and what it asks for on the way."""
        count = 1

        def noise() -> Tensor:
            nonlocal count
            count += 1
            return torch.zeros(())

        solver_named(self.solver)(lambda x, t: x, torch.zeros(()), self.times, noise, lambda step, x: None)
        return count

    def _watch(self, bar: Any) -> Callable[[int, int, Callable[[], Tensor]], None]:
        done = 0

        def watch(entity: int, step: int, picture: Callable[[], Tensor]) -> None:
            nonlocal done
            if self.on_step is not None:
                self.on_step(done, self.times[step], picture())
            done += 1
            bar.update()

        return watch


def images_of(vae: Autoencoder | Pixels, latents: Tensor, output_type: str) -> Images:
    """Latents [B, C, h, w] as `output_type` says; decoded a few at a time, which takes more memory than sampling.

    Raises CheckpointError when what the VAE makes is not finite.
    """
    if output_type == "latent":
        return latents
    parts = (_decoded(vae, chunk) for chunk in torch.split(latents, DECODED_AT_ONCE))  # -1..1
    if output_type == "pil":
        return [picture for part in parts for picture in _pictures(part)]
    scaled = [(part + 1) / 2 for part in parts]
    if output_type == "pt":
        return torch.cat(scaled)
    return np.concatenate([part.permute(0, 2, 3, 1).cpu().numpy() for part in scaled])


@torch.no_grad()
def _decoded(vae: Autoencoder | Pixels, latents: Tensor) -> Tensor:
    images: Tensor = vae.decode(latents).float()
    if not images.isfinite().all():
        raise CheckpointError(
            "the VAE gave numbers that are not finite. Is it the one that the generator was trained with? In float16 "
            "some overflow: torch_dtype=torch.bfloat16."
        )
    return images.clamp(-1, 1)


def _pictures(images: Tensor) -> list[Image.Image]:
    """float [B, C, H, W] in -1..1 to gray or RGB pictures."""
    pixels = ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(one[..., 0] if one.shape[2] == 1 else one) for one in pixels]
