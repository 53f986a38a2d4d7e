"""Our own weights folder: config.json, model.safetensors, preprocessor_config.json and a README.md model card."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nextblock.errors import CheckpointError, ConfigError
from nextblock.xar.config import XARConfig
from nextblock.xar.model import XAR
from nextblock.xtra.classifier import Classifier, HeadConfig
from nextblock.xtra.config import XTRAConfig
from nextblock.xtra.model import XTRA

Model = XTRA | Classifier | XAR
FILES = ("config.json", "model.safetensors", "preprocessor_config.json", "README.md")


def save_pretrained(
    folder: Path,
    model: Model,
    preprocessing: Mapping[str, Any],
    card: str,
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Write the folder whole or not at all, in place of an older one.

    Args:
        folder: where; made new.
        model: the whole model: encoder and predictor, encoder and head, or a generator.
        preprocessing: plain values that say how an image becomes the model's input.
        card: the model card, Markdown.
        about: what else config.json shall hold, ready for JSON; see `read_about`.
    """
    beside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, beside / "model.safetensors", metadata={"format": "pt"})
    config = _described(model) | dict(about or {}) | {"sha256": _sha256(beside / "model.safetensors")}
    (beside / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (beside / "preprocessor_config.json").write_text(json.dumps(dict(preprocessing), indent=2) + "\n")
    (beside / "README.md").write_text(card)
    shutil.copymode(beside / "README.md", beside / "model.safetensors")  # safetensors lets nobody but the owner read
    for name in FILES:
        with open(beside / name, "rb") as file:
            os.fsync(file.fileno())
    if folder.exists():
        shutil.rmtree(folder)
    beside.rename(folder)
    return folder


def _described(model: Model) -> dict[str, Any]:
    """What config.json says of a model, enough to make one of the same kind and sizes."""
    described: dict[str, Any] = {"model_type": "xtra", "config": model.config.to_dict()}
    if isinstance(model, Classifier):
        head = {"head": model.head_config.to_dict(), "classes": list(model.classes)}
        return described | {"model_type": "xtra_classifier"} | head
    return described | {"model_type": "xar"} if isinstance(model, XAR) else described


def _made(about: Mapping[str, Any], where: Path) -> Model:
    """The inverse of `_described`."""
    if about["model_type"] == "xar":
        return XAR(XARConfig.from_dict(about["config"]))
    config = XTRAConfig.from_dict(about["config"])
    if about["model_type"] == "xtra":
        return XTRA(config)
    if about["model_type"] == "xtra_classifier":
        return Classifier(config, HeadConfig.from_dict(about["head"]), about["classes"])
    raise CheckpointError(f"{where}/config.json is of a '{about['model_type']}' model, which is unknown here.")


def load_pretrained(folder: Path) -> tuple[Model, dict[str, Any]]:
    """The model and its preprocessing values, checked by hash and by name.

    Raises CheckpointError when a file is missing, damaged, or holds other weights than config.json describes.
    """
    try:
        about = json.loads((folder / "config.json").read_text())
        preprocessing: dict[str, Any] = json.loads((folder / "preprocessor_config.json").read_text())
        if _sha256(folder / "model.safetensors") != about.get("sha256"):
            raise CheckpointError(f"{folder}/model.safetensors is damaged: its SHA-256 is not that in config.json.")
        model = _made(about, folder)
        load_weights(model, load_file(folder / "model.safetensors"), str(folder))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is not a weights folder: {Path(error.filename).name} is missing.") from error
    except (json.JSONDecodeError, SafetensorError, ConfigError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder} cannot be read as a weights folder: {error}") from error
    return model, preprocessing


def read_about(folder: Path) -> dict[str, Any]:
    """config.json of a weights folder. Raises CheckpointError when it is missing or damaged."""
    try:
        about: dict[str, Any] = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is not a weights folder: no readable config.json ({error}).") from error
    return about


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Strict: every tensor there, of the right shape, and no other. Raises CheckpointError with the lists."""
    expected = model.state_dict()
    missing = [name for name in expected if name not in tensors]
    extra = [name for name in tensors if name not in expected]
    shapes = [
        f"{name} {tuple(tensors[name].shape)}, here {tuple(expected[name].shape)}"
        for name in expected
        if name in tensors and tensors[name].shape != expected[name].shape
    ]
    if missing or extra or shapes:
        parts = (("missing", missing), ("unexpected", extra), ("of another shape", shapes))
        told = "; ".join(f"{what} ({len(names)}): {', '.join(names[:3])}" for what, names in parts if names)
        raise CheckpointError(f"The weights of {where} belong to another configuration. {told}")
    model.load_state_dict(dict(tensors))


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
