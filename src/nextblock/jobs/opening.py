"""From what a person names (a run, a weights folder) to a model that is ready to use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextblock.checkpoints.pretrained import find_folder, load_pretrained, load_weights
from nextblock.data.preprocess import Preprocessing
from nextblock.errors import CheckpointError, ConfigError, RunError, nearest
from nextblock.recipes.config import DataConfig, typed
from nextblock.training.checkpoint import newest_checkpoint
from nextblock.training.launch import pick_device
from nextblock.training.run_record import job_of, read_config
from nextblock.xar.model import XAR
from nextblock.xtra.classifier import Classifier
from nextblock.xtra.heads import AttentiveHeads, LinearHeads
from nextblock.xtra.model import XTRA, Encoder

HUB = "hf:"


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
        held = "an encoder and a head" if isinstance(model, Classifier) else "an encoder alone"
        raise RunError(f"{where} holds {held}; this needs a pre-trained model with its predictor.")
    return Opened(model, preprocessing, where)


def open_encoder(run: str | Path, device: str = "auto") -> OpenedEncoder:
    """The encoder of whatever `open_model` or `open_classifier` can open."""
    model, preprocessing, where = _open(Path(run), device)
    return OpenedEncoder(model if isinstance(model, Encoder) else model.encoder, preprocessing, where)


def open_classifier(run: str | Path, device: str = "auto") -> OpenedClassifier:
    """A finished probe or fine-tuning run, or a folder of such weights."""
    model, preprocessing, where = _open(Path(run), device)
    if not isinstance(model, Classifier):
        raise RunError(
            f"{where} holds an encoder without a head, so it knows no classes. Train a head first: "
            f"nextblock probe {run} --dataset ..., or nextblock finetune."
        )
    return OpenedClassifier(model, preprocessing, where)


def _open(path: Path, device: str) -> tuple[XTRA | Classifier | Encoder, Preprocessing, Path]:
    weights = weights_in(path)
    if weights:
        model, values = load_pretrained(weights)
        if isinstance(model, XAR):
            raise _no_encoder(path)
        if isinstance(model, LinearHeads | AttentiveHeads):
            raise RunError(
                f"{path} holds a head without an encoder. Put it on one: nextblock convert FILE --encoder RUN --to DIR"
            )
        return model.to(pick_device(device)).eval(), Preprocessing.from_dict(values), weights
    stored = read_config(path)
    job = job_of(stored)
    if job == "train-generator":
        raise _no_encoder(path)
    if job != "pretrain":
        raise RunError(f"{path} is not finished. Continue it: nextblock {job} --resume {path}")
    config = typed(stored)
    where, state = newest_checkpoint(path / "checkpoints")
    model = XTRA(config.model)
    load_weights(model, state["model"], str(where))
    return model.to(pick_device(device)).eval(), config.data.preprocessing(config.model), where


def weights_in(path: Path) -> Path | None:
    """The folder of exported weights that `path` is or, being a finished run, has; None while a run still goes.

    "hf:owner/name" is fetched from the Hugging Face hub. Raises RunError, naming the nearest, when there is no such
    folder.
    """
    if str(path).startswith(HUB):
        return find_folder(str(path))
    if not path.is_dir():
        siblings = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        hint = nearest(path.name, siblings)
        if not hint and len(path.parts) == 2 and not path.is_absolute():
            hint = f" For weights on the Hugging Face hub write {HUB}{path}."
        raise RunError(f"No run or weights folder at {path}.{hint}")
    return next((p for p in (path / "exported", path) if (p / "config.json").is_file()), None)


def _no_encoder(path: Path) -> RunError:
    return RunError(
        f"{path} holds a generator, which has no encoder and gives no features. Make images with it: nextblock sample "
        f"{path}"
    )


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
    free = {"drop_path", "pixel_loss", "normalize_targets", "order", "order_seed"}
    take_weights(model, other.model, free, other.where)


def take_weights(model: Any, other: Any, free: set[str], where: Path) -> None:
    """Load `model` with the weights of `other`, whose configuration may differ in what is `free` only."""
    theirs, ours = other.config.to_dict(), model.config.to_dict()
    changed = [f"{k} {theirs[k]} there, {ours[k]} here" for k in ours if k not in free and theirs[k] != ours[k]]
    if changed:
        raise CheckpointError(
            f"{where} is of another configuration: {'; '.join(changed)}. Give the same --model sizes."
        )
    load_weights(model, other.state_dict(), str(where))
