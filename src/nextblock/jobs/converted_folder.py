"""What `convert` writes: the weights folder of an official model, and the official file of a weights folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nextblock.checkpoints.kinds import describe
from nextblock.checkpoints.model_card import as_text
from nextblock.checkpoints.pretrained import load_pretrained, read_about, save_pretrained
from nextblock.checkpoints.recognise import OFFICIAL, Asked, Recognised, official_file, official_tensors, with_encoder
from nextblock.checkpoints.vae_files import RECORD, open_vae
from nextblock.data.named.imagenet import NUM_CLASSES, imagenet_classes
from nextblock.data.preprocess import Preprocessing
from nextblock.durable import file_sha256, flush_tree, give_name
from nextblock.errors import CheckpointError, ConfigError, RunError
from nextblock.jobs.opening import open_encoder, weights_in
from nextblock.jobs.output import written_whole
from nextblock.vae import Autoencoder, Pixels
from nextblock.xar.model import XAR
from nextblock.xtra.classifier import Classifier
from nextblock.xtra.heads import AttentiveHeads, LinearHeads

IMAGENET = "imagenet"
_FOR = {
    "vae": "is for a generator, whose latents it decodes", "classes": "is for what knows classes",
    "encoder": "is for a head that comes without one",
}  # fmt: skip
_MEANT = {"xar": ("vae", "classes"), "xtra_classifier": ("classes",), "xtra_head": ("classes", "encoder")}
_RESIZE_PX = {256: 300, 224: 256}  # as published, by the side of the images
# the VAE of the official xAR files, where none was named; its hash is then not known
_KL16: dict[str, Any] = {
    "kind": "kl16", "sha256": None, "image_channels": 3, "latent_channels": 16, "factor": 16, "scale_factor": 0.2325,
    "shift_factor": 0.0,
}  # fmt: skip


def class_names(given: str | Path | Sequence[str] | None, count: int) -> list[str]:
    """Names by number: as given, ImageNet's for 1000 classes, else the numbers.

    Raises ConfigError for a file that is not there, or another count.
    """
    if given is None and count != NUM_CLASSES:
        return [str(i) for i in range(count)]
    if given is None or str(given) == IMAGENET:
        names = list(imagenet_classes().values())
    elif isinstance(given, str | Path):
        if not Path(given).is_file():
            raise ConfigError(f"No such file: {given}. --classes takes a file with a name in each line, or {IMAGENET}.")
        try:
            names = [line.strip() for line in Path(given).read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{given} cannot be read as text in UTF-8: {error}.") from error
    else:
        names = list(given)
    if len(names) != count:
        raise ConfigError(f"the model has {count} classes; --classes names {len(names)}.")
    return names


def write_folder(
    found: Recognised,
    folder: Path,
    source: Path,
    asked: Asked,
    *,
    vae: str | Path | None,
    classes: str | Path | Sequence[str] | None,
    encoder: str | Path | None,
) -> str:
    """Write the weights folder; returns the kind of what it holds. Raises as `jobs.convert.convert`."""
    origin = f"{OFFICIAL[found.kind]}, official file {source.name}, SHA-256 {file_sha256(official_file(source))}"
    about: dict[str, Any] = {"origin": origin, "official": found.layout}
    model: Any = found.model
    _require_meant(found.kind, {"vae": vae, "classes": classes, "encoder": encoder})
    if isinstance(model, Autoencoder):
        _write_vae(model, folder, about)
        return found.kind
    if isinstance(model, XAR):
        weights = "ema" if found.layout["wrapper"] == "model_ema" else "raw"
        names = class_names(classes, model.config.num_classes)
        about["generator"], preprocessing = _generator(model, weights, vae, names)
    else:
        model, preprocessing = _encoder_or_head(model, asked, classes, encoder)
    save_pretrained(folder, model, preprocessing, None, about, replace=False)
    return found.kind if model is found.model else "xtra_classifier"


def _require_meant(kind: str, given: Mapping[str, Any]) -> None:
    """Raise ConfigError for what says nothing about this kind of file."""
    wrong = [name for name, value in given.items() if value is not None and name not in _MEANT.get(kind, ())]
    if wrong:
        raise ConfigError(f"--{wrong[0]} {_FOR[wrong[0]]}; this is {OFFICIAL[kind]}. Leave it out.")


def _encoder_or_head(
    model: Any, asked: Asked, classes: str | Path | Sequence[str] | None, encoder: str | Path | None
) -> tuple[Any, dict[str, Any]]:
    """The model, a head put on its encoder, and the preprocessing values."""
    if isinstance(model, LinearHeads | AttentiveHeads):
        if encoder is None:
            return model, {}
        opened = open_encoder(encoder, "cpu")
        model = with_encoder(model, opened.encoder, asked)
        model.classes = tuple(class_names(classes, len(model.classes)))
        return model, opened.preprocessing.to_dict()
    if isinstance(model, Classifier):
        model.classes = tuple(class_names(classes, len(model.classes)))
    config = model.config
    resize_px = _RESIZE_PX.get(config.image[0]) if config.image[0] == config.image[1] else None
    return model, Preprocessing(config.image, resize_px, channels=config.channels).to_dict()


def _generator(
    model: XAR, weights: str, vae: str | Path | None, classes: list[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What config.json says of a generator beside its sizes, and the preprocessing values."""
    decoder = None if vae is None else open_vae(vae)
    if isinstance(decoder, Pixels):
        raise ConfigError("official xAR weights make latents, not pixels: --vae names what decodes them.")
    identity: Mapping[str, Any] = _KL16 if decoder is None else decoder.identity()
    if identity["latent_channels"] != model.config.latent_channels:
        raise CheckpointError(
            f"{vae or 'KL-16'} decodes latents of {identity['latent_channels']} channels; this generator makes "
            f"{model.config.latent_channels}. Name its VAE with --vae."
        )
    height, width = (side * identity["factor"] for side in model.config.latent)
    channels = identity["image_channels"]
    half = (0.5,) * channels
    values = Preprocessing((height, width), resize_px=min(height, width), channels=channels, mean=half, std=half)
    about = {
        "vae": dict(identity), "classes": classes, "image_size_px": [height, width], "channels": channels,
        "weights": weights,
    }  # fmt: skip
    return about, values.to_dict()


def _write_vae(vae: Autoencoder, folder: Path, about: Mapping[str, Any]) -> None:
    """A folder of diffusers' AutoencoderKL, whole or not at all, with a record of its weights' hash."""
    folder = folder.resolve()
    beside = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        vae.model.register_to_config(scaling_factor=vae.scale_factor)
        vae.model.save_pretrained(beside)
        weights = beside / "diffusion_pytorch_model.safetensors"
        record = {**about, "sha256": {weights.name: file_sha256(weights)}}
        (beside / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        (beside / "README.md").write_text(_vae_card(vae, about))
        flush_tree(beside)
        give_name(beside, folder)  # over nothing, or over an empty folder
    except OSError as error:
        raise RunError(f"cannot write {folder}: {error.strerror or error}. Choose another --to.") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _vae_card(vae: Autoencoder, about: Mapping[str, Any]) -> str:
    return (
        "---\nlibrary_name: diffusers\n---\n\n# KL-16 autoencoder (MAR, arXiv 2406.11838)\n\n"
        f"- from: {as_text(about['origin'])}\n- latents: {vae.latent_channels} channels, "
        f"1/{vae.factor} of the image's sides, scale factor {vae.scale_factor}\n\n```python\nimport nextblock\n\n"
        'vae = nextblock.open_vae("PATH_TO_THIS_FOLDER")\n```\n'
    )


def write_official(source: Path, target: Path) -> tuple[str, int]:
    """The official file of a run, a weights folder, or a folder of KL-16; returns the kind and the number of tensors.

    Raises CheckpointError or RunError.
    """
    model: Any
    if (source / RECORD).is_file():
        model = open_vae(source)  # which checks the record too
        about = json.loads((source / RECORD).read_text())
    else:
        folder = weights_in(source)
        if folder is None:
            raise RunError(f"{source} is not finished. Continue it with --resume first.")
        about = read_about(folder)
        model, _ = load_pretrained(folder)
    layout = about.get("official", {})
    kind = "kl16" if isinstance(model, Autoencoder) else str(describe(model)["model_type"])
    if not isinstance(layout, dict) or layout.get("kind", kind) != kind:
        layout = {}
    tensors = official_tensors(model, layout)
    usual = {"xar": None, "kl16": "model"}.get(kind, "state_dict")
    wrapper = layout.get("wrapper", usual)
    try:
        with written_whole(target, "--to") as beside:
            torch.save({wrapper: tensors} if isinstance(wrapper, str) else tensors, beside)
    except RuntimeError as error:  # torch's own, for a place that cannot be written
        raise RunError(f"cannot write {target}: {error}. Choose another --to.") from error
    return kind, len(tensors)
