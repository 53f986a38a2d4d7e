"""The second half of the demo: two small generators of digits, one by cells and one by patches, drawn and judged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from nextblock.data.digits import on_canvas, plain_digits
from nextblock.data.loading import evaluation_batches
from nextblock.data.preprocess import denormalize
from nextblock.data.sources import open_source
from nextblock.evaluation.features import extract
from nextblock.evaluation.generation import compare, real_against_real
from nextblock.figures.samples import contact_sheet
from nextblock.jobs.opening import Opened, open_model
from nextblock.jobs.opening_generator import open_generator
from nextblock.jobs.output import say
from nextblock.jobs.train_generator import train_generator
from nextblock.xar.sampler import sample_latents

RECIPE = "xar_digits"
ARMS: dict[str, dict[str, Any]] = {"cells": {}, "patches": {"ordering": "patches"}}
NAMES = {"cells": "xAR, cells of 2×2 patches", "patches": "xAR, single patches"}
SAMPLES = 718  # as many as half the real digits, so that the floor is one
STEPS = 20
GUIDANCE = 1.5
DRAWN_EACH = 8  # of every digit, in the picture

Images = NDArray[np.uint8]


def generate_digits(
    folder: Path, encoder: Path, *, seed: int, epochs: float | None, console: Console
) -> tuple[list[dict[str, Any]], list[Path]]:
    """Train both generators in `folder`, sample them, and judge the samples in the features of `encoder` (a run).

    Returns the rows of the table and the pictures. Raises KeyboardInterrupt when a training was stopped.
    """
    train, _ = plain_digits()
    made: dict[str, Images] = {}
    for arm, model in ARMS.items():
        place = folder / f"generator-{arm}"
        say(console, f"\ntraining a generator, {arm}: {place}")
        training: dict[str, Any] = {"seed": seed} | ({} if epochs is None else {"epochs": epochs})
        done = train_generator(
            config=RECIPE, data={"train": (train.images, train.labels), "workers": 0}, model=model, training=training,
            out=place, quiet=console.quiet,
        )  # fmt: skip
        if done is None or not done.finished:
            raise KeyboardInterrupt  # a half-trained generator is not to be judged
        made[arm] = sampled(place, seed)
    opened = open_model(encoder)
    reference = _features(opened, train.images)
    rows = []
    for arm, images in made.items():
        found = compare(_features(opened, images[..., 0]), reference, metrics=("frechet",), seed=seed)
        rows.append({"name": NAMES[arm], "frechet": found["frechet"], "images": found["counts"]})
    floor = real_against_real(reference, metrics=("frechet",), seed=seed)
    assert floor is not None
    rows.append(
        {"name": "real digits, one half against the other", "frechet": floor["frechet"], "images": floor["counts"]}
    )
    titles = ["" for _ in range(10 * DRAWN_EACH)]
    pictures = [
        contact_sheet(images[: 10 * DRAWN_EACH], titles, folder / f"generated-{arm}.png", columns=10)
        for arm, images in made.items()
    ]
    return rows, pictures


def sampled(run: Path, seed: int) -> Images:
    """uint8 [718, 16, 16, 1]: the ten digits in turn."""
    opened = open_generator(run)
    numbers = torch.arange(SAMPLES)
    latents = sample_latents(
        opened.model, numbers % 10, steps=STEPS, solver="multistep", guidance=GUIDANCE, seed=seed, indices=numbers
    )
    return denormalize(latents, opened.preprocessing).cpu().numpy()


def _features(opened: Opened, digits: Images) -> NDArray[np.float32]:
    """Of uint8 [N, 16, 16], each in the middle of a canvas such as the encoder learned from: [N, D]."""
    batches = evaluation_batches(open_source(on_canvas(digits)), opened.preprocessing, batch_size=256)
    return extract(opened.model.encoder, batches, opened.preprocessing).values
