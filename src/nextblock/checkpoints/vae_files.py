"""From what a person names to an autoencoder: a file, a folder, a name on the Hugging Face hub, or pixel space."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from nextblock.checkpoints.official_kl16 import load_official_kl16
from nextblock.durable import file_sha256
from nextblock.errors import CheckpointError, ConfigError, nearest
from nextblock.vae import Autoencoder, Pixels

PIXELS = "pixels"
RECORD = "nextblock.json"  # beside a VAE that `convert` wrote: where it is from, the hash of its weights
SUFFIXES = (".ckpt", ".pth", ".pt", ".safetensors")
_HUB_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_CLASS = "AutoencoderKL"


def open_vae(spec: str | Path, channels: int = 3) -> Autoencoder | Pixels:
    """Open an autoencoder, on the CPU.

    Args:
        spec: "pixels"; a .ckpt, .pth, .pt or .safetensors file in the official layout of KL-16; a folder of diffusers'
            AutoencoderKL (or of a pipeline that has one in vae/); or such a one's name on the Hugging Face hub.
        channels: of pixel space, 1 or 3; an autoencoder has its own.

    Raises CheckpointError when it cannot be opened, with what to do.
    """
    if str(spec) == PIXELS:
        return Pixels(channels)
    path = Path(spec).expanduser()
    if path.is_dir():
        return _open_folder(path)
    if path.suffix in SUFFIXES:
        return load_official_kl16(path)
    if path.is_file():
        raise CheckpointError(f"{path} has no ending of a weights file: {', '.join(SUFFIXES)}.")
    if _HUB_NAME.fullmatch(str(spec)):
        return _fetch(str(spec))
    siblings = os.listdir(path.parent) if path.parent.is_dir() else []
    hint = nearest(path.name, [*siblings, PIXELS])
    raise CheckpointError(
        f"there is no VAE at {spec}.{hint} Give the official KL-16 file, a folder of diffusers' {_CLASS}, its name on "
        f"the Hugging Face hub (owner/name), or '{PIXELS}'."
    )


def _open_folder(path: Path) -> Autoencoder:
    if not (path / "config.json").is_file() and (path / "vae" / "config.json").is_file():
        path = path / "vae"
    try:
        config = json.loads((path / "config.json").read_text())
        kind = config.get("_class_name", _CLASS)
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not a folder of diffusers' {_CLASS}: it has no readable config.json."
        ) from error
    if "model_type" in config:
        raise CheckpointError(
            f"{path} holds a {config['model_type']} model, not a VAE. Give the official KL-16 file, or a folder or hub "
            f"name of diffusers' {_CLASS}."
        )
    if kind != _CLASS:
        raise CheckpointError(f"{path} holds {kind}; of diffusers' models only {_CLASS} can be used.")
    _require_whole(path)
    return _load(str(path), {"path": str(path.absolute())})


def _require_whole(path: Path) -> None:
    """Where there is a record, the weights must have the hash that it tells."""
    if not (path / RECORD).is_file():
        return
    try:
        hashes = dict(json.loads((path / RECORD).read_text())["sha256"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}/{RECORD} is damaged: {error}. Convert the VAE again.") from error
    for name, wanted in hashes.items():
        file = path / Path(name).name
        if not file.is_file():
            raise CheckpointError(f"{path} is not whole: {file.name} is missing. Convert the VAE again.")
        if file_sha256(file) != wanted:
            raise CheckpointError(f"{file} is damaged: its SHA-256 is not that in {RECORD}. Convert it again.")


def _fetch(name: str) -> Autoencoder:
    """From the hub; of a pipeline, its vae/."""
    about = {"name": name}
    try:
        return _load(name, about)
    except CheckpointError as error:
        try:
            return _load(name, about, subfolder="vae")
        except CheckpointError:
            raise CheckpointError(
                f"{name} is no file or folder here, and not to be had from the hub: {error}"
            ) from error


def _load(where: str, about: dict[str, str], **options: Any) -> Autoencoder:
    import diffusers

    kind: Any = diffusers.AutoencoderKL

    try:
        model, told = kind.from_pretrained(  # safetensors alone: what else there may be are pickles
            where, output_loading_info=True, low_cpu_mem_usage=False, use_safetensors=True, **options
        )
    except Exception as error:  # of many kinds: files, network, JSON, shapes
        why = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise CheckpointError(f"the VAE {where} cannot be loaded: {why}") from error
    # diffusers only warns of these, and leaves random numbers where a tensor is missing
    wrong = {how: sorted(map(str, told[f"{how}_keys"])) for how in ("missing", "unexpected", "mismatched")}
    lines = [f"  {how} ({len(names)}): {'; '.join(names)}" for how, names in wrong.items() if names]
    if lines:
        raise CheckpointError("\n".join([f"the weights of the VAE {where} do not fit its config.json.", *lines]))
    try:
        return Autoencoder(model, {"kind": "diffusers", **about})
    except ConfigError as error:
        raise CheckpointError(f"the VAE {where} cannot be used: {error}") from error
