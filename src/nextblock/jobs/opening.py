"""From what a person names (a run, a weights folder) to a model that is ready to use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from nextblock.checkpoints.pretrained import load_pretrained, load_weights
from nextblock.data.preprocess import Preprocessing
from nextblock.errors import CheckpointError, RunError, nearest
from nextblock.recipes.config import typed
from nextblock.training.checkpoint import newest_checkpoint
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


def pick_device(device: str) -> str:
    """ "auto", "cpu" or "cuda" -> the device to use. Raises RunError when CUDA is asked for and absent."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise RunError("No CUDA device is usable here; `nextblock doctor` says why. Use --device cpu.")
    return device


def initial_weights(where: str | Path, model: XTRA) -> None:
    """Load `model`, in place, from a run or weights folder. Raises CheckpointError when the sizes differ."""
    other = open_model(where, device="cpu")
    theirs, ours = other.model.config.to_dict(), model.config.to_dict()
    shaping = set(ours) - {"drop_path", "pixel_loss", "normalize_targets", "order", "order_seed"}
    changed = [f"{k} {theirs[k]} there, {ours[k]} here" for k in ours if k in shaping and theirs[k] != ours[k]]
    if changed:
        raise CheckpointError(
            f"{other.where} is of another configuration: {'; '.join(changed)}. Give the same sizes with --model.* ."
        )
    load_weights(model, other.model.state_dict(), str(other.where))
