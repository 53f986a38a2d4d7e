"""Official weights to a folder that every job here opens, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from nextblock.checkpoints.recognise import OFFICIAL, Asked, Recognised, read_official
from nextblock.errors import ConfigError, RunError, shown
from nextblock.jobs.converted_folder import write_folder, write_official
from nextblock.jobs.output import new_file
from nextblock.xtra.heads import AttentiveHeads

SHELL_NEEDS = {"to": "a new folder for the weights (with --to_official, a new .ckpt or .pth file)"}
SUFFIXES = (".ckpt", ".pth", ".pt")
_NEXT = {
    "xtra": "nextblock embed {folder} IMAGES --out features.parquet",
    "xtra_encoder": "nextblock embed {folder} IMAGES --out features.parquet",
    "xtra_classifier": "nextblock predict {folder} IMAGES --out classes.csv",
    "xtra_head": "convert again with --encoder RUN, which puts it on its encoder",
    "xar": "nextblock sample {folder} --classes 207,tabby --n 8",
    "kl16": "nextblock cache-latents IMAGES --vae {folder}",
}


@dataclass
class Converted:
    """where: the folder, or the official file. kind: "xtra", "xtra_encoder", "xtra_classifier", "xtra_head", "xar" or
    "kl16". origin: of each size that was not given in the code, where it is known from. dropped: tensors left out."""

    where: Path
    kind: str
    origin: dict[str, str]
    dropped: list[str]


def convert(
    *,
    file: str | Path,
    to: str | Path | None = None,
    to_official: bool = False,
    preset: str | None = None,
    num_heads: int | None = None,
    predictor_heads: int | None = None,
    image_size_px: list[int] | None = None,
    cell_size: list[int] | None = None,
    entity_size: int | None = None,
    weights: Literal["ema", "raw"] = "ema",
    vae: str | Path | None = None,
    classes: str | Path | Sequence[str] | None = None,
    encoder: str | Path | None = None,
    head_heads: int | None = None,
    last_layers: int | None = None,
    quiet: bool = False,
) -> Converted:
    """Turn an official checkpoint of XTRA, xAR or KL-16 into a weights folder, or a folder into an official file.

    What the file is, and its sizes, are read from its tensors. What they cannot show is taken from the preset that
    agrees with them, or from the options below; where neither tells, it is asked for.

    Args:
        file: a Lightning .ckpt, DeepSpeed's model file or its folder, a .pth, kl16.ckpt, or the same tensors as
            safetensors; with --to_official a run or a weights folder.
        to: a new folder; with --to_official a new .ckpt, .pth or .pt file.
        to_official: the way back: the tensors under the official names and in the official layout.
        preset: the named model that tells what tensors do not show: xtra_b16, xar_l, ...
        num_heads: attention heads of the encoder or generator.
        predictor_heads: attention heads of XTRA's predictor.
        image_size_px: sides of the training images, where they are not square: HEIGHT WIDTH.
        cell_size: patches along a side of a cell; an encoder without its predictor does not show it.
        entity_size: patches along a side of xAR's cells; 8 in the official files.
        weights: of a training file that holds both, the averaged ones ("ema") or the last ones ("raw").
        vae: what decodes xAR's latents: a KL-16 file or folder, kept in the new folder by its path and SHA-256.
        classes: a file with a name in each line, or "imagenet", which 1000 classes are taken for.
        encoder: a run or weights folder; a head that comes without its encoder is put on it.
        head_heads: attention heads of an attentive probe; 16 as published.
        last_layers: over how many last layers a probe's tokens are the mean; 1 for linear ones, 6 for attentive ones.
        quiet: print nothing.

    Raises ConfigError, CheckpointError or RunError: not there, not one of these, damaged, tensors that do not fit (the
    message lists them), or a folder that holds something.
    """
    if to is None:
        raise ConfigError(f"convert needs to: {SHELL_NEEDS['to']}.")
    if weights not in ("ema", "raw"):
        raise ConfigError(f"weights must be 'ema' (averaged) or 'raw' (the last ones); got {weights!r}.")
    console = Console(quiet=quiet)
    if to_official:
        return _back(Path(file).expanduser(), new_file(to, SUFFIXES, "--to"), console)
    fields = {
        "num_heads": num_heads, "predictor_heads": predictor_heads, "image_size_px": _sides(image_size_px),
        "cell_size": _sides(cell_size), "entity_size": entity_size,
    }  # fmt: skip
    given = {name: value for name, value in fields.items() if value is not None}
    asked = Asked(preset, given, weights, head_heads, last_layers)
    source, folder = Path(file).expanduser(), Path(to).expanduser()
    _require_free(folder)
    found = read_official(source, asked)
    kind = write_folder(found, folder, source, asked, vae=vae, classes=classes, encoder=encoder)
    _tell(console, found, folder, kind, vae)
    return Converted(folder, kind, found.origin, found.dropped)


def _require_free(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"{folder} exists already, and nothing is ever overwritten. Choose another --to.")


def _back(source: Path, target: Path, console: Console) -> Converted:
    kind, tensors = write_official(source, target)
    told = f"{OFFICIAL[kind]}: {tensors} tensors in the official layout: {target}"
    console.print(told, highlight=False, markup=False, soft_wrap=True)
    if kind in ("xtra_classifier", "xtra_head"):
        note = "not kept in that layout: the heads and layers of the probe; say them when you convert it back"
        console.print(f"{note} (--head_heads, --last_layers)", highlight=False, soft_wrap=True)
    return Converted(target, kind, {}, [])


def _sides(given: list[int] | int | None) -> int | tuple[int, int] | None:
    if given is None or isinstance(given, int):
        return given
    if len(given) not in (1, 2):
        raise ConfigError(f"give one side or HEIGHT WIDTH; got {' '.join(map(str, given))}.")
    return given[0] if len(set(given)) == 1 else (given[0], given[1])


def _tell(console: Console, found: Recognised, folder: Path, kind: str, vae: str | Path | None) -> None:
    """What the file was, which sizes were taken from where, and what can be done next."""

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    say(OFFICIAL[found.kind])
    if found.origin:
        table = Table(box=None, pad_edge=False, show_header=False)
        values = _values(found.model)
        for name, origin in found.origin.items():
            if name in values:
                table.add_row(name, str(values[name]), f"from {origin}")
        console.print(table)
    if found.dropped:
        few = ", ".join(map(shown, found.dropped[:3])) + (", ..." if len(found.dropped) > 3 else "")
        say(f"left out, no parameters: {len(found.dropped)} tensors ({few})")
    if "you" in found.origin.values():
        say("what you said cannot be checked by the tensors: compare a number that you know before you trust it")
    if kind == "xtra_classifier" and found.kind == "xtra_head":
        say("put on the encoder that you named; that it is the one which the head was trained on cannot be checked")
    say(f"weights:  {folder}")
    if kind == "xar" and vae is None:
        say("its VAE is not known; name it when sampling: --vae KL16_FILE")
    say(f"next:     {_NEXT[kind].format(folder=folder)}")


def _values(model: Any) -> dict[str, Any]:
    """The sizes of a model, and of its head, by the names that `origin` has."""
    values = model.config.to_dict() if hasattr(getattr(model, "config", None), "to_dict") else {}
    head = getattr(model, "head_config", None)
    if head is not None:
        values |= {"head_heads": head.num_heads, "last_layers": head.layers.last - head.layers.first + 1}
    if isinstance(model, AttentiveHeads):
        values["head_heads"] = model.num_heads
    return values
