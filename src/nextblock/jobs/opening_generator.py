"""From what a person names (a run, a weights folder) to a generator that is ready to make images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nextblock.checkpoints.kinds import KINDS
from nextblock.checkpoints.pretrained import load_pretrained, load_weights, read_about
from nextblock.checkpoints.vae_files import open_vae
from nextblock.data.preprocess import Preprocessing
from nextblock.errors import CheckpointError, ConfigError, RunError
from nextblock.jobs.opening import take_weights, weights_in
from nextblock.recipes.generator import typed_generator
from nextblock.training.checkpoint import newest_checkpoint
from nextblock.training.launch import pick_device
from nextblock.training.run_record import JOBS, job_of, read_config, read_environment
from nextblock.vae import Autoencoder, Pixels, same_vae
from nextblock.xar.model import XAR

Weights = Literal["ema", "raw"]
# What a generator may differ in from the weights that it starts with.
FREE_ON_INIT = {"dropout", "attention_dropout", "label_dropout", "times", "context", "loss_mean"}


@dataclass
class OpenedGenerator:
    """A generator in eval mode and what turns its latents into images, both on the device.

    classes: names by number; empty for an unconditional generator. preprocessing: of the images it learned from.
    where: the weights. about: what config.json says under "generator": vae, classes, image_size_px, channels, weights.
    """

    model: XAR
    decoder: Autoencoder | Pixels
    classes: list[str]
    preprocessing: Preprocessing
    where: Path
    about: dict[str, Any]


def open_generator(
    run: str | Path, *, weights: Weights = "ema", vae: str | Path | None = None, device: str = "auto"
) -> OpenedGenerator:
    """A finished training of a generator, one still going (its newest checkpoint), or a folder of exported weights.

    Args:
        run: the folder.
        weights: "ema", the average, where the run kept one, or "raw", the last ones.
        vae: where the VAE is, if not where it was; its weights must be the same.
        device: "auto", "cpu" or "cuda".

    Raises RunError or CheckpointError saying what is there instead.
    """
    if weights not in ("ema", "raw"):
        raise ConfigError(f"weights must be 'ema' (averaged) or 'raw' (the last ones); got {weights!r}.")
    model, preprocessing, where, about = _open(Path(run), weights)
    place = pick_device(device)
    decoder = open_decoder(about["vae"], vae).to(place)
    return OpenedGenerator(model.to(place).eval(), decoder, list(about["classes"]), preprocessing, where, about)


def open_decoder(identity: Mapping[str, Any], vae: str | Path | None = None) -> Autoencoder | Pixels:
    """What decodes latents of this identity, from where it says or from `vae`; on the CPU.

    Raises CheckpointError when it is not there or another, ConfigError for a VAE where pixels are made.
    """
    if identity["kind"] == "pixels":
        if vae is not None:
            raise ConfigError("this generator makes pixels; it needs no VAE. Leave out --vae.")
        return Pixels(int(identity["latent_channels"]))
    spec = vae or identity.get("path") or identity.get("name")
    if spec is None:
        raise CheckpointError("it is not known where the VAE of these latents is. Name its file or folder with --vae.")
    try:
        found = open_vae(spec)
    except CheckpointError as error:
        if vae is not None:
            raise
        raise CheckpointError(f"{error} It is the VAE of this generator; say where it is now with --vae.") from error
    theirs = found.identity()
    if not same_vae(identity, theirs):
        raise CheckpointError(
            f"{spec} is not the VAE that this generator's latents are of: {_told(theirs)} there, {_told(identity)} "
            f"wanted. Name the right one with --vae."
        )
    return found


def initial_generator(where: str | Path, model: XAR, vae: Mapping[str, Any]) -> None:
    """Load `model`, in place, with the weights (averaged where there are such) of a run or weights folder.

    Args:
        vae: identity of what makes the latents that `model` is to learn.

    Raises CheckpointError when the sizes or the VAE differ, RunError when no generator is there.
    """
    other, _, place, about = _open(Path(where), "ema")
    take_weights(model, other, FREE_ON_INIT, place)  # first: of two sizes one should hear before the VAE
    if not same_vae(about["vae"], vae):
        raise CheckpointError(
            f"{place} is of another VAE than the training data: {_told(about['vae'])} there, {_told(vae)} here. Start "
            f"from a generator of this VAE, or leave out --init_from."
        )


def _open(path: Path, weights: Weights) -> tuple[XAR, Preprocessing, Path, dict[str, Any]]:
    exported = weights_in(path)
    if exported is None:
        return _of_checkpoint(path, weights)
    about = read_about(exported)
    if about.get("model_type") == "xar" and "generator" not in about:
        raise CheckpointError(
            f"{exported}/config.json does not say what decodes these latents. Set it before saving: model.about = "
            f'{{"generator": {{"vae": open_vae(...).identity(), "classes": [...], "image_size_px": [...], '
            f'"channels": 3, "weights": "raw"}}}}; for official weights, nextblock convert does.'
        )
    if about.get("model_type") != "xar":
        raise _no_generator(path, KINDS.get(str(about.get("model_type")), "something else"))
    if weights == "raw" and about["generator"]["weights"] != "raw":
        exported = exported.with_name("exported_raw")
        if not (exported / "config.json").is_file():
            raise RunError(f"{path} holds averaged weights only. The last ones are in the run's exported_raw folder.")
        about = read_about(exported)
    model, values = load_pretrained(exported)
    assert isinstance(model, XAR)
    return model, Preprocessing.from_dict(values), exported, about["generator"]


def _of_checkpoint(path: Path, weights: Weights) -> tuple[XAR, Preprocessing, Path, dict[str, Any]]:
    """Of a run that is still going."""
    stored = read_config(path)
    if job_of(stored) != "train-generator":
        raise _no_generator(path, JOBS[job_of(stored)])
    config = typed_generator(stored)
    about = read_environment(path, "generator")["generator"]
    where, state = newest_checkpoint(path / "checkpoints")
    averaged = weights == "ema" and "ema" in state
    model = XAR(config.model)
    load_weights(model, state["ema"]["averages"] if averaged else state["model"], str(where))
    preprocessing = Preprocessing.from_dict(about.pop("preprocessing"))
    return model, preprocessing, where, about | {"weights": "ema" if averaged else "raw"}


def _no_generator(path: Path, what: str) -> RunError:
    return RunError(
        f"{path} is {what}, which makes no images. The weights must be those of a generator: name a run of nextblock "
        f"train-generator, or what it exported."
    )


def _told(identity: Mapping[str, Any]) -> str:
    if identity["kind"] == "pixels":
        return "pixels"
    sha256 = str(identity.get("sha256"))[:12]
    return f"{identity.get('latent_channels')} channels, scale {identity.get('scale_factor')}, SHA-256 {sha256}..."
