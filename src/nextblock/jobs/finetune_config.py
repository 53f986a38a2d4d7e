"""What a fine-tuning run is asked: its section, what is chosen when nobody said, and how both are stored."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from nextblock.data.mixing import MixConfig
from nextblock.data.randaugment import RandAugment
from nextblock.errors import ConfigError
from nextblock.jobs.choose import CPU_IMAGES, Choice
from nextblock.recipes.config import typed_section
from nextblock.training.config import TrainingConfig
from nextblock.xtra.heads import HeadKind

BATCH, LR = 1024, 2e-3  # MAE's fine-tuning of ViT-B (arXiv 2111.06377): 5e-4 for every 256 images
EPOCHS = 100.0
STEPS_PER_EPOCH = 16  # at least so many, where there are few images,
SMALL_BATCH = 32  # unless the batch were smaller than this: its statistics normalise what the head reads


@dataclass(frozen=True)
class FinetuneTraining(TrainingConfig):
    """How a fine-tuning run trains; batch, learning rate and length are chosen from the images when left out."""

    betas: tuple[float, float] = (0.9, 0.999)
    clip_grad_norm: float = 0.0
    warmup_epochs: float = 5.0


@dataclass(frozen=True)
class FinetuneConfig:
    """The head, how its encoder is trained with it, and which images. The recipe is MAE's for ViT-B by default.

    Attributes:
        head: "linear" (mean over tokens, BatchNorm, linear) or "attentive" (a learned query, as in the probes).
        last_layers: the head reads the mean of the outputs of so many last layers.
        bidirectional: let all tokens see each other; the encoder was pre-trained block-causally.
        num_heads: attention heads of the attentive head.
        num_queries: of the attentive head; several are averaged.
        layer_decay: each layer learns so many times as fast as the one above it.
        drop_path: stochastic depth of the last layer; rises linearly from 0.
        mixup: alpha of the Beta distribution that two images are mixed by; 0 = off.
        cutmix: alpha for pasting a box of one image into another; 0 = off.
        mix_probability: of a batch to be mixed at all.
        label_smoothing: part of a target that is spread evenly over all classes.
        ema_decay: of the average of the weights, which is what is tested and exported; 0 = the last weights.
        randaugment: in timm's notation; "" = none.
        erasing: probability of a box to be erased.
        crop_scale: share of the image's area that a training crop covers, (least, most).
        crop_ratio: width / height of a training crop, (least, most).
        flip: probability of a horizontal flip.
        resize_px: shorter side before the centre crop of evaluation; 0 = as the pre-training run has it.
        val_fraction: of the training images, held out to watch; 0 = none. They decide nothing.
        evaluate_every_epochs: between two looks at them; 0 = ten times in the run.
        few_shot: images of each class to learn from; 0 = all.
        image_column: of tables.
        label_column: of tables; "label" when left out.
        train_split: where the data have several; "train+val" joins two.
        test_split: the same for the test images.
        workers: loading processes; -1 = chosen from the cores.
        max_bad_fraction: the run stops when more than max(10, this fraction) distinct images are broken.
    """

    head: HeadKind = "linear"
    last_layers: int = 1
    bidirectional: bool = True
    num_heads: int = 16
    num_queries: int = 1
    layer_decay: float = 0.75
    drop_path: float = 0.1
    mixup: float = 0.8
    cutmix: float = 1.0
    mix_probability: float = 1.0
    label_smoothing: float = 0.1
    ema_decay: float = 0.9999
    randaugment: str = "rand-m9-mstd0.5-inc1"
    erasing: float = 0.25
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (0.75, 1.3333)
    flip: float = 0.5
    resize_px: int = 0
    val_fraction: float = 0.1
    evaluate_every_epochs: float = 0.0
    few_shot: int = 0
    image_column: str = "image"
    label_column: str | None = None
    train_split: str | None = None
    test_split: str | None = None
    workers: int = -1
    max_bad_fraction: float = 0.001

    def __post_init__(self) -> None:
        below_one = ("drop_path", "label_smoothing", "ema_decay", "val_fraction")
        for name in below_one:
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"finetune.{name} must be at least 0 and below 1; got {getattr(self, name)!r}.")
        for name in ("resize_px", "evaluate_every_epochs", "few_shot"):
            if getattr(self, name) < 0:
                raise ConfigError(f"finetune.{name} must be 0 or more; got {getattr(self, name)!r}.")
        if not 0 < self.layer_decay <= 1:
            raise ConfigError(f"finetune.layer_decay must be above 0 and at most 1; got {self.layer_decay!r}.")
        if not 0 <= self.erasing <= 1:
            raise ConfigError(f"finetune.erasing is a probability, from 0 to 1; got {self.erasing!r}.")
        _ = self.mix, self.augmentation  # refuse what they cannot be made of

    @property
    def mix(self) -> MixConfig:
        return MixConfig(self.mixup, self.cutmix, self.mix_probability)

    @property
    def augmentation(self) -> RandAugment | None:
        return RandAugment.parse(self.randaugment) if self.randaugment else None


SECTIONS: dict[str, type] = {"finetune": FinetuneConfig, "training": FinetuneTraining}


@dataclass(frozen=True)
class FinetuneRecord:
    """All that a run is made of, as its config.yaml holds it.

    Attributes:
        finetune, training: the sections.
        run: the run or weights folder whose encoder is trained.
        dataset, test, data_root: the images, where they can be named; None for Python objects.
        model, preprocessing: of the encoder, so that the run can be resumed without the folder `run`.
    """

    finetune: FinetuneConfig
    training: FinetuneTraining
    run: str = ""
    dataset: str | None = None
    test: str | None = None
    data_root: str | None = None
    model: Mapping[str, Any] = field(default_factory=dict)
    preprocessing: Mapping[str, Any] = field(default_factory=dict)


_NAMED = ("run", "dataset", "test", "data_root")


def to_values(record: FinetuneRecord) -> dict[str, Any]:
    """Plain sections, ready for YAML; `from_values` is the inverse."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: plain(inner) for name, inner in value.items()}
        return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value

    about = {name: getattr(record, name) for name in _NAMED}
    sections = {
        "finetune": about | dataclasses.asdict(record.finetune),
        "training": dataclasses.asdict(record.training),
        "model": record.model,
        "preprocessing": record.preprocessing,
    }
    return {name: plain(section) for name, section in sections.items()}


def from_values(values: Mapping[str, Any]) -> FinetuneRecord:
    """Raises ConfigError for a key that does not exist or a value that cannot work."""
    finetune = {name: value for name, value in values["finetune"].items() if name not in _NAMED}
    return FinetuneRecord(
        finetune=typed_section("finetune", finetune, SECTIONS),
        training=typed_section("training", values["training"], SECTIONS),
        **{name: values["finetune"].get(name) for name in _NAMED},
        model=values["model"],
        preprocessing=values["preprocessing"],
    )


def to_yaml(record: FinetuneRecord, header: str = "") -> str:
    comment = "".join(f"# {line}\n" for line in header.splitlines())
    return comment + yaml.safe_dump(to_values(record), sort_keys=False)


def differences(old: FinetuneRecord, new: FinetuneRecord) -> Iterator[tuple[str, Any, Any]]:
    """(key, old value, new value) for each key that differs."""
    before, after = to_values(old), to_values(new)
    for section in before:
        for name in {**before[section], **after[section]}:
            a, b = before[section].get(name), after[section].get(name)
            if a != b:
                yield f"{section}.{name}", a, b


def choose_training(images: int, device: str, given: Mapping[str, Any]) -> Choice:
    """Batch, learning rate and length for so many training images, where they are not given."""
    choice = Choice({"training": given})
    wanted = min(BATCH, max(SMALL_BATCH, images / STEPS_PER_EPOCH))
    batch = 2 ** int(math.log2(max(8, min(wanted, images))))
    choice.take("training", f"for {images:,} images", batch_size=batch)
    if "lr" not in given:
        choice.take("training", f"{LR:g} at a batch of {BATCH}, scaled by its square root", lr=LR, lr_at_batch=BATCH)
    most = CPU_IMAGES / images if device == "cpu" else EPOCHS
    epochs = float(given.get("epochs", round(min(EPOCHS, max(1.0, most)), 1)))
    shorter = " as a CPU can in about an hour" if epochs == round(most, 1) < EPOCHS else ""
    warmup = round(min(5.0, epochs / 20), 2)
    choice.take("training", f"about {epochs * images:,.0f} images seen{shorter}", epochs=epochs, warmup_epochs=warmup)
    return choice
