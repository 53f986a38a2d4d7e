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
from nextblock.xtra.model import XTRA


@dataclass
class Opened:
    """A model in eval mode, how images become its input, and where it came from."""

    model: XTRA
    preprocessing: Preprocessing
    where: Path


def open_model(run: str | Path, device: str = "auto") -> Opened:
    """A finished run, a run still going (its newest checkpoint), or a weights folder.

    Raises RunError or CheckpointError saying what is there instead.
    """
    path = Path(run)
    if not path.is_dir():
        siblings = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        raise RunError(f"No run or weights folder at {path}.{nearest(path.name, siblings)}")
    weights = next((p for p in (path / "exported", path) if (p / "config.json").is_file()), None)
    if weights:
        model, values = load_pretrained(weights)
        opened = Opened(model, Preprocessing.from_dict(values), weights)
    else:
        config = typed(read_config(path))
        where, state = newest_checkpoint(path / "checkpoints")
        model = XTRA(config.model)
        load_weights(model, state["model"], str(where))
        opened = Opened(model, config.data.preprocessing(config.model), where)
    opened.model.to(pick_device(device)).eval()
    return opened


def run_data(run: str | Path) -> DataConfig:
    """The data section of a run's configuration; the default one for a folder of weights."""
    path = Path(run)
    return typed({"data": read_config(path).get("data", {})}).data if (path / "config.yaml").is_file() else DataConfig()


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
