"""What a fine-tuning run is made of: the classifier, how high each parameter sits, which images are for what."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import torch

from nextblock.data.selection import few_shot, held_out
from nextblock.data.sources import Source
from nextblock.data.sources.views import Subset, known_labels
from nextblock.jobs.finetune_config import FinetuneConfig
from nextblock.randomness import key
from nextblock.xtra.classifier import Classifier, HeadConfig, LayerMean
from nextblock.xtra.config import XTRAConfig


def classifier_of(config: FinetuneConfig, model: XTRAConfig, classes: tuple[str, ...], seed: int) -> Classifier:
    """With fresh weights, which are a function of the seed. Raises ConfigError when head and encoder do not fit."""
    layers = LayerMean.of_last(config.last_layers, model.depth, config.bidirectional)
    head = HeadConfig(config.head, layers, config.num_heads, config.num_queries)
    torch.manual_seed(key(seed, "initial weights") >> 1)
    made = Classifier(dataclasses.replace(model, drop_path=config.drop_path), head, classes)
    made.encoder.norm.requires_grad_(False)  # the head reads what comes before it
    return made


def height_in(depth: int, name: str) -> int:
    """How far up a classifier's parameter is: 0 patch and position embeddings, 1..depth the layers, then the head."""
    layer = re.match(r"encoder\.layers\.layers\.(\d+)\.", name)
    if layer:
        return int(layer[1]) + 1
    return depth + 1 if name.startswith("head.") else 0


def split_training(source: Source, config: FinetuneConfig, seed: int) -> tuple[Source, Source | None]:
    """The images to train on, and those held out to watch, if any: no image is in both.

    Few shots are drawn from what is not held out. Raises DataError when a class has too few images.
    """
    labels = known_labels(source)
    watched = held_out(labels, config.val_fraction, seed) if config.val_fraction else np.zeros(len(labels), bool)
    free = np.where(watched, -1, labels)
    chosen = few_shot(free, config.few_shot, seed) if config.few_shot else np.flatnonzero(free >= 0)
    whole = len(chosen) == len(labels)
    return (source if whole else Subset(source, chosen)), (
        Subset(source, np.flatnonzero(watched)) if watched.any() else None
    )
