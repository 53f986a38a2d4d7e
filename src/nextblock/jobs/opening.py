"""From what a person names (a run, a weights folder) to a model that is ready to use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextblock.checkpoints.pretrained import load_pretrained, load_weights
from nextblock.data.preprocess import Preprocessing
from nextblock.errors import CheckpointError, ConfigError, RunError, nearest
from nextblock.recipes.config import DataConfig, typed
from nextblock.training.checkpoint import newest_checkpoint
from nextblock.training.launch import pick_device
from nextblock.training.run_folder import read_config
from nextblock.xtra.classifier import Classifier
from nextblock.xtra.model import XTRA, Encoder


@dataclass
class Opened:
    """A pre-trained model in eval mode, how images become its input, and where it came from."""

    model: XTRA
    preprocessing: Preprocessing
    where: Path


@dataclass
class OpenedEncoder:
    """The encoder alone, of a pre-trained or a fine-tuned model."""

    encoder: Encoder
    preprocessing: Preprocessing
    where: Path


@dataclass
class OpenedClassifier:
    """An encoder with a head."""

    model: Classifier
    preprocessing: Preprocessing
    where: Path


def open_model(run: str | Path, device: str = "auto") -> Opened:
    """A finished pre-training run, one still going (its newest checkpoint), or a weights folder.

    Raises RunError or CheckpointError saying what is there instead.
    """
    model, preprocessing, where = _open(Path(run), device)
    if not isinstance(model, XTRA):
        raise RunError(f"{where} holds an encoder and a head; this needs a pre-trained model with its predictor.")
    return Opened(model, preprocessing, where)


def open_encoder(run: str | Path, device: str = "auto") -> OpenedEncoder:
    """The encoder of whatever `open_model` or `open_classifier` can open."""
    model, preprocessing, where = _open(Path(run), device)
    return OpenedEncoder(model.encoder, preprocessing, where)


def open_classifier(run: str | Path, device: str = "auto") -> OpenedClassifier:
    """A finished probe or fine-tuning run, or a folder of such weights."""
    model, preprocessing, where = _open(Path(run), device)
    if not isinstance(model, Classifier):
        raise RunError(
            f"{where} holds an encoder without a head, so it knows no classes. Train a head first: "
            f"nextblock probe {run} --dataset ..., or nextblock finetune."
        )
    return OpenedClassifier(model, preprocessing, where)


def _open(path: Path, device: str) -> tuple[XTRA | Classifier, Preprocessing, Path]:
    if not path.is_dir():
        siblings = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        raise RunError(f"No run or weights folder at {path}.{nearest(path.name, siblings)}")
    weights = next((p for p in (path / "exported", path) if (p / "config.json").is_file()), None)
    if weights:
        model, values = load_pretrained(weights)
        return model.to(pick_device(device)).eval(), Preprocessing.from_dict(values), weights
    stored = read_config(path)
    if job := next((name for name in ("probe", "finetune") if name in stored), None):
        raise RunError(f"{path} is not finished. Continue it: nextblock {job} --resume {path}")
    config = typed(stored)
    where, state = newest_checkpoint(path / "checkpoints")
    model = XTRA(config.model)
    load_weights(model, state["model"], str(where))
    return model.to(pick_device(device)).eval(), config.data.preprocessing(config.model), where


def run_data(run: str | Path) -> DataConfig:
    """The data section of a run's configuration; the default one for a folder of weights."""
    path = Path(run)
    if not (path / "config.yaml").is_file():
        return DataConfig()
    stored = read_config(path)
    return typed({"data": stored["data"]}).data if "data" in stored else DataConfig()


def require_positive(**values: int) -> None:
    """Raise ConfigError for the first value below 1, by its name."""
    for name, value in values.items():
        if value < 1:
            raise ConfigError(f"--{name} must be at least 1; got {value}.")


def one_or_many(images: Any) -> Any:
    """A list with one string is that string: it may be a Parquet file, a folder or a hub name."""
    return images[0] if isinstance(images, list) and len(images) == 1 else images


def initial_weights(where: str | Path, model: XTRA) -> None:
    """Load `model`, in place, from a run or weights folder. Raises CheckpointError when the sizes differ."""
    other = open_model(where, device="cpu")
    theirs, ours = other.model.config.to_dict(), model.config.to_dict()
    shaping = set(ours) - {"drop_path", "pixel_loss", "normalize_targets", "order", "order_seed"}
    changed = [f"{k} {theirs[k]} there, {ours[k]} here" for k in ours if k in shaping and theirs[k] != ours[k]]
    if changed:
        raise CheckpointError(
            f"{other.where} is of another configuration: {'; '.join(changed)}. Give the same --model sizes."
        )
    load_weights(model, other.model.state_dict(), str(other.where))
