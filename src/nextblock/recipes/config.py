"""The sections of a recipe, and how recipe, preset and overrides become one typed configuration."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Generic, TypeVar, get_args, get_type_hints

import yaml

from nextblock.data.augment import CropConfig
from nextblock.data.named import is_named
from nextblock.data.preprocess import Preprocessing
from nextblock.data.sources import Source, open_source
from nextblock.data.sources.streamed import StreamedImages, is_stream, open_streamed
from nextblock.errors import ConfigError, in_plain_words, nearest
from nextblock.training.config import TrainingConfig
from nextblock.training.run_record import NO_YAML
from nextblock.xtra.config import PRESETS, XTRAConfig

Config = TypeVar("Config")


@dataclass(frozen=True)
class SourceConfig:
    """Which images, and how they are read.

    Attributes:
        train: a folder of images, Parquet file(s), `hf:NAME` (a Hugging Face data set); in Python also arrays
            or any object with `__len__` and `__getitem__`.
        val: images to watch the training with, given in the same ways; optional.
        train_split: which split, where a source has several.
        val_split: the same for `val`.
        image_column: of tables.
        label_column: of tables; labels are taken from "label" when it is there.
        crop_scale: share of the image's area that a training crop covers, (least, most).
        flip: probability of a horizontal flip.
        exif_orientation: turn images as their EXIF orientation says.
        decoder: "pillow" (as all published numbers here), "pillow-scaled" (JPEGs at a fraction of their size where the
            crop allows, and a faster resize), "simplejpeg" (the same pixels as pillow-scaled, faster; another package),
            or "auto", the fastest on this machine. A run keeps what it began with.
        workers: loading processes; -1 = chosen from the cores.
        timeout_s: longest wait for a sign of life of a worker that reads one sample, in seconds.
        max_bad_fraction: a run stops when more than max(10, this fraction) distinct images are broken.
    """

    train: str | None = None
    val: str | None = None
    train_split: str = "train"
    val_split: str = "val"
    image_column: str = "image"
    label_column: str | None = None
    crop_scale: tuple[float, float] = (0.3, 1.0)
    flip: float = 0.5
    exif_orientation: bool = True
    decoder: str = "pillow"
    workers: int = -1
    timeout_s: float = 25.0
    max_bad_fraction: float = 0.001

    def open(self, name: str, objects: Mapping[str, Any]) -> Source | None:
        """The images of `train` or `val`: a Python object where `objects` has one. None where there are none."""
        spec, split = objects.get(name, getattr(self, name)), getattr(self, f"{name}_split")
        if spec is None:
            return None
        if isinstance(spec, str) and is_named(spec) and not Path(spec).exists():
            raise ConfigError(
                f"'{spec}' is the name of a benchmark data set; here give the folder or files of its images "
                f"(`nextblock datasets` tells where they are)."
            )
        return open_source(spec, split=split, image_column=self.image_column, label_column=self.label_column)


@dataclass(frozen=True)
class DataConfig(SourceConfig):
    """Which images, and how they become crops. `val` is to be labelled where kNN shall be watched.

    Attributes:
        train: a folder of images, Parquet file(s), tar shards, `hf:NAME` (a Hugging Face data set), `hf-stream:NAME` or
            `hf-stream:parquet:PATTERN` (read while it comes, with `length`); in Python also arrays, a
            `datasets.IterableDataset`, or any object with `__len__` and `__getitem__`.
        length: images in an epoch of a stream, which cannot be counted; 0 for all others, which are.
        crop_ratio: width / height of a training crop, (least, most).
        resize_px: shorter side before the centre crop of evaluation; 0 = 8/7 of the image size.
        mean: per channel, of pixels in 0..1; ImageNet's when left out.
        std: the same for the standard deviation.
    """

    crop_ratio: tuple[float, float] = (0.75, 1.5)
    resize_px: int = 0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    length: int = 0

    def __post_init__(self) -> None:
        if self.length < 0:
            raise ConfigError(f"data.length must be 0 or more; got {self.length!r}.")

    def is_streamed(self, objects: Mapping[str, Any]) -> bool:
        """Whether the training images are a stream, for `open_stream`, and no source."""
        return is_stream(objects.get("train", self.train))

    def open_stream(self, objects: Mapping[str, Any]) -> StreamedImages:
        """The stream of `train`: a Python object where `objects` has one."""
        spec, split = objects.get("train", self.train), self.train_split
        return open_streamed(spec, split=split, image_column=self.image_column, label_column=self.label_column)

    def preprocessing(self, model: XTRAConfig) -> Preprocessing:
        """How an image becomes an input of this model."""
        return Preprocessing(
            size_px=model.image,
            resize_px=self.resize_px or None,
            channels=model.channels,
            exif_orientation=self.exif_orientation,
            **{name: value for name in ("mean", "std") if (value := getattr(self, name)) is not None},
        )

    def crop(self, model: XTRAConfig) -> CropConfig:
        return CropConfig(size_px=model.image, scale=self.crop_scale, ratio=self.crop_ratio, flip=self.flip)


@dataclass(frozen=True)
class WatchConfig:
    """What is looked at while a run trains.

    Attributes:
        every_epochs: between two looks; 0 = ten times in the run. There is always one at the end.
        knn_k: neighbours of the kNN vote.
        max_images: most images in the kNN bank, and most queries.
        pictures: reconstructions in the contact sheet; 0 = none.
    """

    every_epochs: float = 0.0
    knn_k: int = 20
    max_images: int = 5000
    pictures: int = 8

    def __post_init__(self) -> None:
        for name in ("every_epochs", "pictures"):
            if getattr(self, name) < 0:
                raise ConfigError(f"watch.{name} must be 0 or more; got {getattr(self, name)!r}.")
        for name in ("knn_k", "max_images"):
            if getattr(self, name) < 1:
                raise ConfigError(f"watch.{name} must be at least 1; got {getattr(self, name)!r}.")


@dataclass(frozen=True)
class PretrainConfig:
    """A complete pre-training run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: XTRAConfig = field(default_factory=XTRAConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)


@dataclass(frozen=True)
class Kind(Generic[Config]):
    """One kind of recipe.

    Attributes:
        verb: the job that runs it.
        config: the dataclass of a complete run, with a field for each section.
        sections: name -> its dataclass.
        presets: name -> what it says of the model section.
    """

    verb: str
    config: type[Config]
    sections: Mapping[str, type]
    presets: Mapping[str, Mapping[str, Any]]

    def count(self, values: Mapping[str, Any]) -> int:
        """How many keys of these sections there are in this kind."""
        return sum(name in self.keys(section) for section, content in values.items() for name in content)

    def keys(self, section: str) -> list[str]:
        kind = self.sections.get(section)
        return [f.name for f in dataclasses.fields(kind)] if kind else []


SECTIONS: dict[str, type] = {
    "data": DataConfig,
    "model": XTRAConfig,
    "training": TrainingConfig,
    "watch": WatchConfig,
}
_DERIVED = dict.fromkeys(("projection_hidden", "predictor_width", "predictor_heads", "head_hidden"), 0)
PRETRAIN = Kind(
    "pretrain",
    PretrainConfig,
    SECTIONS,
    {name: {**_DERIVED, "predictor_depth": XTRAConfig.predictor_depth, **sizes} for name, sizes in PRESETS.items()},
)


def kinds() -> tuple[Kind[Any], ...]:
    """Every kind of recipe."""
    from nextblock.recipes.generator import GENERATOR  # which is made of what stands here

    return PRETRAIN, GENERATOR


def recipe_names(kind: Kind[Any] = PRETRAIN) -> list[str]:
    """The packaged recipes of a kind."""
    files = (file for file in resources.files("nextblock.recipes").iterdir() if file.name.endswith(".yaml"))
    found = {file.name.removesuffix(".yaml"): yaml.safe_load(file.read_text(encoding="utf-8")) for file in files}
    return sorted(name for name, values in found.items() if kind.count(values) == sum(map(len, values.values())))


def read_recipe(name_or_file: str | Path, kind: Kind[Any] = PRETRAIN) -> dict[str, Any]:
    """The sections of a packaged recipe or of a YAML file.

    Raises ConfigError when there is no such recipe (the nearest is named), the file is not a recipe, or it is one of
    another kind (the verb that runs it is named).
    """
    text = _recipe_text(name_or_file, kind)
    try:
        values = yaml.safe_load(text)
    except NO_YAML as error:
        raise ConfigError(f"{name_or_file} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or not all(isinstance(v, dict) for v in values.values()):
        raise ConfigError(f"{name_or_file} is not a recipe: it must hold the sections {', '.join(kind.sections)}.")
    known = kind.count(values)
    if known < sum(map(len, values.values())):
        other = next((each for each in kinds() if each.count(values) > known), None)
        if other:
            right = f"nextblock {other.verb} --config {name_or_file}"
            raise ConfigError(f"{name_or_file} is a recipe of another verb. Run it with: {right}")
    check_keys(values, f"recipe {name_or_file}", kind)
    return values


def _recipe_text(name_or_file: str | Path, kind: Kind[Any]) -> str:
    path = Path(name_or_file)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not a text file"
            raise ConfigError(f"cannot read the recipe {path}: {reason}.") from error
    packaged = resources.files("nextblock.recipes") / f"{name_or_file}.yaml"
    if not packaged.is_file():
        names = recipe_names(kind)
        hint = nearest(str(name_or_file), names)
        raise ConfigError(f"No recipe '{name_or_file}' and no such file.{hint} Recipes: {', '.join(names)}.")
    return packaged.read_text(encoding="utf-8")


def check_keys(values: Mapping[str, Any], where: str, kind: Kind[Any] = PRETRAIN) -> None:
    """Raise ConfigError for a section or key that does not exist, naming the nearest one."""
    for section, content in values.items():
        if section not in kind.sections:
            raise ConfigError(f"{where}: there is no section '{section}'.{nearest(section, kind.sections)}")
        known = kind.keys(section)
        for name in content:
            if name not in known:
                everywhere = {f"{each}.{key}" for each in kind.sections for key in kind.keys(each)}
                hint = _elsewhere(name, everywhere) or nearest(name, known)
                raise ConfigError(f"{where}: there is no key '{section}.{name}'.{hint}")


def _elsewhere(name: str, keys: set[str]) -> str:
    found = [key for key in sorted(keys) if key.split(".")[1] == name]
    return f" Did you mean '{found[0]}'?" if found else ""


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Sections merged key by key; a later layer wins."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for section, content in layer.items():
            merged.setdefault(section, {}).update(copy.copy(content))
    return merged


def preset_layer(preset: str | None, kind: Kind[Any] = PRETRAIN) -> dict[str, Any]:
    """The model section of a preset. Raises ConfigError for an unknown name."""
    if preset is None:
        return {}
    if preset not in kind.presets:
        known = kind.presets
        raise ConfigError(f"No preset '{preset}'.{nearest(preset, known)} Presets: {', '.join(known)}.")
    return {"model": dict(kind.presets[preset])}


def typed(values: Mapping[str, Any]) -> PretrainConfig:
    """The plain sections of a pre-training run as its dataclasses. Raises ConfigError in one sentence."""
    return typed_as(PRETRAIN, values)


def typed_as(kind: Kind[Config], values: Mapping[str, Any]) -> Config:
    """Plain sections as the dataclasses of a kind, with types checked. Raises ConfigError in one sentence."""
    check_keys(values, "configuration", kind)
    return kind.config(**_instantiated(kind.sections, values))


def typed_section(name: str, values: Mapping[str, Any], sections: Mapping[str, type]) -> Any:
    """One of a job's own sections as its dataclass, with types checked. Raises ConfigError in one sentence."""
    known = {section: [f.name for f in dataclasses.fields(kind)] for section, kind in sections.items()}
    for key in values:
        if key not in known[name]:
            hint = _elsewhere(key, {f"{section}.{each}" for section in known for each in known[section]})
            raise ConfigError(f"there is no key '{name}.{key}'.{hint or nearest(key, known[name])}")
    return _instantiated({name: sections[name]}, {name: dict(values)})[name]


def _instantiated(sections: Mapping[str, type], values: Mapping[str, Any]) -> dict[str, Any]:
    from jsonargparse import ArgumentParser

    _require_values(sections, values)
    parser = ArgumentParser(exit_on_error=False)
    for section, kind in sections.items():
        parser.add_class_arguments(kind, section)
    try:
        made = parser.instantiate(parser.parse_object(copy.deepcopy(dict(values))))
    except ConfigError:
        raise
    except Exception as error:  # jsonargparse wraps what a field refuses in several types
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, ConfigError):
            cause = cause.__cause__ or cause.__context__
        raise ConfigError(str(cause) if cause else in_plain_words(str(error))) from error
    return {section: getattr(made, section) for section in sections}


def _require_values(sections: Mapping[str, type], values: Mapping[str, Any]) -> None:
    """Raise ConfigError for a key that is left empty and may not be: the parser takes None for any type."""
    for section, content in values.items():
        hints = get_type_hints(sections[section])
        for name, value in content.items():
            if value is None and type(None) not in get_args(hints[name]):
                raise ConfigError(f"{section}.{name} has no value. Give one, or leave the key out.")


def to_values(config: Any) -> dict[str, Any]:
    """The sections of a complete configuration as plain values; the inverse of `typed_as`."""

    def plain(value: Any) -> Any:
        return [plain(v) for v in value] if isinstance(value, (tuple, list)) else value

    sections = dataclasses.asdict(config)
    return {section: {k: plain(v) for k, v in content.items()} for section, content in sections.items()}


def to_yaml(config: Any, header: str = "", leave_out: Iterable[str] = ()) -> str:
    """A configuration as a recipe under a comment, without the keys `leave_out` ("section.key")."""
    comment = "".join(f"# {line}\n" for line in header.splitlines())
    values = to_values(config)
    for section, _, key in (name.partition(".") for name in leave_out):
        del values[section][key]
    return comment + yaml.safe_dump(values, sort_keys=False)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(key, old value, new value) for each key of two complete configurations that differs."""
    for section in {**old, **new}:
        before, after = old.get(section, {}), new.get(section, {})
        for name in {**before, **after}:
            if before.get(name) != after.get(name):
                yield f"{section}.{name}", before.get(name), after.get(name)
