"""From image numbers to pixels: sample latents, decode them, look whether they are numbers at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nextblock.data.latents import CroppedImages
from nextblock.data.loading import evaluation_batches
from nextblock.data.sources import Source
from nextblock.data.stream import Batch
from nextblock.errors import CheckpointError, ConfigError, DataError
from nextblock.evaluation.inference import inference
from nextblock.jobs.sample_settings import SampleSettings
from nextblock.xar.passes import FastPasses, Passes

if TYPE_CHECKING:
    from nextblock.jobs.opening_generator import OpenedGenerator

_COMPILERS = "Compiling needs a C++ compiler (such as g++), and Triton on CUDA. Leave out --compile."
DECODED_AT_ONCE = 16  # images; decoding takes more memory than sampling

Draw = Callable[..., Tensor]  # `xar.sampler.sample_latents`, or what stands in for it


class ImageMaker:
    """Makes images by their numbers.

    Args:
        opened: the generator; it is moved to `device`.
        settings: what is made.
        device: where.
        draw: `sample_latents`.
        known: images whose first entities are kept, taking turns; None = nothing is given.
    """

    def __init__(
        self,
        opened: OpenedGenerator,
        settings: SampleSettings,
        device: torch.device,
        draw: Draw,
        known: Source | None = None,
    ) -> None:
        self.opened, self.settings, self.device, self.draw, self.known = opened, settings, device, draw, known
        self.model, self.decoder = opened.model.to(device), opened.decoder.to(device)
        self.passes: Passes | None = None

    def images(self, numbers: Sequence[int], watch: Any = None) -> NDArray[np.uint8]:
        """Sample and decode these images: uint8 [B, H, W, C]. Raises CheckpointError when they are not finite."""
        labels = self.settings.labels(numbers)
        known = self._known_latents(numbers)
        bf16 = self.settings.precision == "bf16"
        if self.settings.compile and self.passes is None:
            self.passes = FastPasses(self.model, bf16=bf16)
        with inference(self.model, bf16=bf16), _compiling():
            latents = self.draw(
                self.model, labels, count=len(numbers) if labels is None else None, indices=torch.tensor(numbers),
                known=known, num_known=self.settings.known_entities, watch=watch,
                passes=self.passes, **self.settings.for_sampler(),
            )  # fmt: skip
        return self.decoded(latents)

    def decoded(self, latents: Tensor) -> NDArray[np.uint8]:
        parts = []
        with torch.no_grad():
            for chunk in torch.split(latents.to(self.device), DECODED_AT_ONCE):
                images = self.decoder.decode(chunk).float()  # [B, C, H, W] in -1..1
                if not images.isfinite().all():
                    raise CheckpointError(self._not_finite(bool(chunk.isfinite().all())))
                pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
                parts.append(pixels.permute(0, 2, 3, 1).cpu().numpy())
        return np.concatenate(parts)

    def _not_finite(self, latents_are: bool) -> str:
        if latents_are:
            return "the decoder gave numbers that are not finite. Is it the VAE that the generator was trained with?"
        causes = ["the training diverged (see metrics.csv; take an earlier checkpoint)"]
        if self.settings.guidance != 1:
            causes.append(f"guidance {self.settings.guidance:g} is too strong")
        if self.settings.precision == "bf16":
            causes.append("bf16 is too coarse (--precision fp32)")
        told = f"{self.opened.where} gives latents that are not finite: {', or '.join(causes)}."
        return f"{told} No image of this batch was written."

    def _known_latents(self, numbers: Sequence[int]) -> Tensor | None:
        """The latents of the given images, [B, C, h, w]: the mean of the VAE's posterior, without its noise."""
        if self.known is None:
            return None
        indices = [number % len(self.known) for number in numbers]
        batch = self._prepared(self.known, indices)
        if batch.bad:
            raise DataError(f"{batch.bad[0].name} cannot be continued: {batch.bad[0].reason}. Remove it.")
        config = self.model.config
        images = batch.images.to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        noise = images.new_zeros(len(images), config.latent_channels, *config.latent)
        with torch.no_grad():
            chunks = zip(torch.split(images, DECODED_AT_ONCE), torch.split(noise, DECODED_AT_ONCE), strict=True)
            return torch.cat([self.decoder.encode(chunk, none) for chunk, none in chunks])

    def _prepared(self, known: Source, indices: Sequence[int]) -> Batch:
        """Cropped as the images that the model learned from: those of a cache of latents have a crop of their own."""
        preprocessing = self.opened.preprocessing
        height, width = preprocessing.size_px
        if self.decoder.identity()["kind"] != "pixels" and height == width:
            return CroppedImages(known, preprocessing).load(indices)
        return next(evaluation_batches(known, preprocessing, batch_size=len(indices), indices=indices))


@contextmanager
def _compiling() -> Iterator[None]:
    """Raise ConfigError for what torch's compiler cannot do on this machine."""
    try:
        yield
    except RuntimeError as error:
        from torch._dynamo.exc import TorchDynamoException  # takes a second to import

        if not isinstance(error, TorchDynamoException):
            raise
        cause = getattr(error, "inner_exception", error)  # of the compiler behind torch's
        first = next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        raise ConfigError(f"the layers could not be compiled: {first}. {_COMPILERS}") from error
