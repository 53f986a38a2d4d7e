"""What a foreign weights file is, told by the names of its tensors, and one of our models made of it; and the way back.

XTRA's official checkpoints (pre-training, an encoder alone, probes, fine-tuned classifiers, a head alone), xAR's, and
the KL-16 autoencoder.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from nextblock.checkpoints.foreign_files import read_weights
from nextblock.checkpoints.kinds import Head, Model, describe
from nextblock.checkpoints.name_table import (
    Table,
    foreign_tensors,
    load_by_table,
    other_dtypes,
    require_shapes,
    with_dtypes,
    without_prefix,
)
from nextblock.checkpoints.official import (
    ENCODER,
    ENCODER_TABLE,
    HEAD,
    PREDICTOR,
    PREFIXES,
    XTRA_TABLE,
    head_table,
    xtra_sizes,
)
from nextblock.checkpoints.official_kl16 import kl16_of, kl16_tensors
from nextblock.checkpoints.official_xar import xar_buffers, xar_sizes, xar_table
from nextblock.checkpoints.sizes import FROM_YOU, PUBLISHED
from nextblock.errors import CheckpointError, ConfigError, shown
from nextblock.portable import weights_follow
from nextblock.vae import Autoencoder
from nextblock.xar.config import XARConfig
from nextblock.xar.model import XAR
from nextblock.xtra.classifier import Classifier, HeadConfig, LayerMean
from nextblock.xtra.config import XTRAConfig
from nextblock.xtra.heads import NORM_EPS, HeadKind, LinearHeads, make_heads
from nextblock.xtra.model import XTRA, Encoder

Weights = Literal["ema", "raw"]
OFFICIAL = {
    "xtra": "an XTRA model, encoder and predictor",
    "xtra_encoder": "the encoder of an XTRA model",
    "xtra_classifier": "an XTRA encoder and a classifier's head",
    "xtra_head": "the head of an XTRA probe, without an encoder",
    "xar": "an xAR generator",
    "kl16": "the KL-16 autoencoder",
}
_WRAPPERS = {"ema": ("model_ema", "model", "state_dict", "module"), "raw": ("model", "state_dict", "module")}
_ENCODER_OPTIONS = ("preset", "num_heads", "image_size_px", "cell_size")
_HEAD_OPTIONS = ("head_heads", "last_layers")
_OPTIONS: dict[str, tuple[str, ...]] = {
    "xtra": (*_ENCODER_OPTIONS, "predictor_heads"), "xtra_encoder": _ENCODER_OPTIONS,
    "xtra_classifier": (*_ENCODER_OPTIONS, *_HEAD_OPTIONS), "xtra_head": _HEAD_OPTIONS,
    "xar": ("preset", "num_heads", "entity_size"), "kl16": (),
}  # fmt: skip
_DEEPSPEED = "mp_rank_00_model_states.pt"
# pretraining keeps the mask at probe time too; the published probes read the last layer, or the mean of the last six
PUBLISHED_HEADS = 16
_LAST_LAYERS: dict[str, int] = {"linear": 1, "attentive": 6}


@dataclass(frozen=True)
class Asked:
    """What the tensors cannot show and the caller may say; None: from the preset, or the published value.

    fields: of XTRAConfig or XARConfig. weights: of a file that holds both. head_heads, last_layers: of a head.
    """

    preset: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    weights: Weights = "ema"
    head_heads: int | None = None
    last_layers: int | None = None


@dataclass(frozen=True)
class Recognised:
    """model: ours, with the weights. kind: a key of OFFICIAL. origin: of each size (those of a head as head_heads and
    last_layers), where it is known from. dropped: tensors left out on purpose. layout: what the way back needs, ready
    for JSON."""

    model: Model | Autoencoder
    kind: str
    origin: dict[str, str]
    dropped: list[str]
    layout: dict[str, Any]


def read_official(path: str | Path, asked: Asked | None = None) -> Recognised:
    """One of our models from an official file.

    Args:
        path: the file; or the folder that DeepSpeed writes.
        asked: what the tensors do not show.

    Raises CheckpointError when the file cannot be read safely, is none of these, does not show something that was not
    said, or has tensors that are missing, unexpected or of another shape; the message lists them.
    """
    asked, path = asked or Asked(), official_file(path)
    found = read_weights(path, _WRAPPERS[asked.weights])
    tensors, prefix = without_prefix(found.tensors, PREFIXES)
    kind = recognise(tensors, path)
    _require_options(kind, asked)
    model: Model | Autoencoder
    origin: dict[str, str] = {}
    if kind == "kl16":
        model, dropped = kl16_of(tensors, path)
    else:
        with weights_follow():
            model, origin, dropped = _xar(tensors, path, asked) if kind == "xar" else _xtra(kind, tensors, path, asked)
    layout = {
        "kind": kind, "wrapper": found.wrapper, "prefix": prefix, "dtypes": other_dtypes(tensors),
        "buffers": kind == "xar" and bool(dropped),
        "batch_norm": kind not in ("xtra_classifier", "xtra_head") or any("running_mean" in name for name in tensors),
    }  # fmt: skip
    return Recognised(model, kind, origin, dropped, layout)


def recognise(names: Iterable[str], where: object) -> str:
    """Which of OFFICIAL has tensors of these names. Raises CheckpointError, saying what it seems to be, for others."""
    names = list(names)

    def any_begins(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in names)

    if "encoder_pos_embed_learned" in names:
        return "xar"
    if any_begins("encoder.conv_in."):
        return "kl16"
    if any_begins(ENCODER):
        return "xtra" if any_begins(*PREDICTOR) else "xtra_classifier" if any_begins(HEAD) else "xtra_encoder"
    if any_begins(HEAD):
        return "xtra_head"
    told = f"its first tensors are {', '.join(map(shown, names[:3]))}"
    if any_begins("blocks.", "vit.encoder.", "encoder.layer.", "trunk.", "embeddings."):
        told = "it looks like a vision transformer of another kind, whose attention is not block-causal"
    elif any_begins("encoder.layers.", "layers.") or "tokens_in.weight" in names:
        told = "these are nextblock's own names: open the folder that it was in, with from_pretrained"
    elif any_begins("encoder.down_blocks."):
        told = "it is a VAE of diffusers: give its folder to --vae, or to open_vae"
    raise CheckpointError(f"{where} is no official XTRA, xAR or KL-16 checkpoint: {told}.")


def _require_options(kind: str, asked: Asked) -> None:
    """Raise ConfigError for options of another kind of file."""
    given = [name for name, value in asked.fields.items() if value is not None]
    given += [name for name in ("preset", "head_heads", "last_layers") if getattr(asked, name) is not None]
    if wrong := [name for name in given if name not in _OPTIONS[kind]]:
        known = ", ".join(f"--{name}" for name in _OPTIONS[kind]) or "none"
        raise ConfigError(f"this is {OFFICIAL[kind]}, which takes no --{wrong[0]}. Its options: {known}.")


def official_file(path: str | Path) -> Path:
    """The file itself; in a folder, what DeepSpeed wrote there. Raises CheckpointError for another folder."""
    path = Path(path).expanduser()
    if not path.is_dir():
        return path
    if (path / "config.json").is_file() or (path / "exported").is_dir():
        raise CheckpointError(
            f"{path} is a weights folder or a run already. Open it as it is; --to_official makes an official file of "
            f"it."
        )
    inside = next((p for p in (path / _DEEPSPEED, path / "checkpoint" / _DEEPSPEED) if p.is_file()), None)
    if inside is None:
        raise CheckpointError(f"{path} is a folder without {_DEEPSPEED}, which DeepSpeed writes. Name the file itself.")
    return inside


def _xtra(
    kind: str, tensors: Mapping[str, Tensor], path: Path, asked: Asked
) -> tuple[Model, dict[str, str], list[str]]:
    if kind == "xtra_head":
        head, table, rest = _head(tensors, path, asked)
        return head, _head_origin(head, asked), load_by_table(head, rest, table, head, path)
    sizes = xtra_sizes(tensors, path, asked.fields, asked.preset)
    config = XTRAConfig(**sizes.values)
    if kind == "xtra_classifier":
        head, table, tensors = _head(tensors, path, asked)
        made = Classifier(config, _head_config(head, config, asked), _numbers(head))
        dropped = load_by_table(made, tensors, [*XTRA_TABLE, *_under(table)], config, path)
        return made, sizes.origin | _head_origin(head, asked), dropped
    if kind == "xtra_encoder":
        encoder = Encoder(config)
        return encoder, sizes.origin, load_by_table(encoder, tensors, ENCODER_TABLE, config, path)
    model = XTRA(config)
    return model, sizes.origin, load_by_table(model, tensors, XTRA_TABLE, config, path)


def _xar(tensors: Mapping[str, Tensor], path: Path, asked: Asked) -> tuple[XAR, dict[str, str], list[str]]:
    sizes = xar_sizes(tensors, path, asked.fields, asked.preset)
    config = XARConfig(**sizes.values)
    model = XAR(config)
    return model, sizes.origin, load_by_table(model, tensors, xar_table(config.depth), config, path)


def _head(tensors: Mapping[str, Tensor], path: Path, asked: Asked) -> tuple[Head, Table, dict[str, Tensor]]:
    """An empty head of the sizes that the tensors show, the table that fills it, and the tensors, made complete."""
    rest = dict(tensors)
    if "classifier.cls_token" in rest:
        told = f"{path} has no attentive head in the official layout."
        require_shapes(rest, {"classifier.cls_token": 3, "classifier.linear.weight": 2}, told)
        _, queries, width = rest["classifier.cls_token"].shape
        classes, kind = rest["classifier.linear.weight"].shape[0], "attentive"
        head = make_heads("attentive", width, classes, num_heads=_head_heads(asked), num_queries=queries)
        return head, head_table(kind, ""), rest
    if "classifier.weight" in rest and rest["classifier.weight"].ndim == 2:  # without BatchNorm: one that does nothing
        width = rest["classifier.weight"].shape[1]
        for part in ("weight", "bias"):
            rest[f"classifier.1.{part}"] = rest.pop(f"classifier.{part}", torch.zeros(0))
        rest["classifier.0.running_mean"] = torch.zeros(width)
        rest["classifier.0.running_var"] = torch.full((width,), 1 - NORM_EPS)
        rest["classifier.0.num_batches_tracked"] = torch.tensor(0)
    require_shapes(rest, {"classifier.1.weight": 2}, f"{path} has no head in the official layout.")
    classes, width = rest["classifier.1.weight"].shape
    return make_heads("linear", width, classes), head_table("linear", ""), rest


def _under(table: Table) -> Table:
    """The rows of a lone head for the head of a classifier."""
    return head_table("attentive" if any(row.ours == "query" for row in table) else "linear")


def _head_config(head: Head, config: XTRAConfig, asked: Asked) -> HeadConfig:
    sizes = describe(head)["config"]
    kind: HeadKind = sizes["kind"]
    last = min(_LAST_LAYERS[kind], config.depth) if asked.last_layers is None else asked.last_layers
    layers = LayerMean.of_last(last, config.depth)
    return HeadConfig(kind, layers, sizes.get("num_heads", 16), sizes.get("num_queries", 1))


def _head_heads(asked: Asked) -> int:
    return PUBLISHED_HEADS if asked.head_heads is None else asked.head_heads


def _head_origin(head: Head, asked: Asked) -> dict[str, str]:
    """Where what a head's tensors cannot show is known from."""
    said = {"last_layers": asked.last_layers}
    said |= {} if isinstance(head, LinearHeads) else {"head_heads": asked.head_heads}
    return {name: PUBLISHED if value is None else FROM_YOU for name, value in said.items()}


def _numbers(head: Head) -> list[str]:
    """Classes without names."""
    return [str(i) for i in range(head.weight.shape[1])]


def with_encoder(head: Head, encoder: Encoder, asked: Asked) -> Classifier:
    """A lone head put on an encoder. Raises CheckpointError when their widths differ."""
    if head.width != encoder.config.width:
        raise CheckpointError(
            f"the head reads tokens of width {head.width}; the encoder's have {encoder.config.width}."
        )
    config = encoder.config
    made = Classifier(config, _head_config(head, config, asked), _numbers(head))
    made.encoder.load_state_dict(encoder.state_dict())
    made.head.load_state_dict(head.state_dict())
    return made


def official_tensors(model: Model | Autoencoder, layout: Mapping[str, Any]) -> dict[str, Tensor]:
    """The way back: the tensors of one of our models under the official names and in the official layout.

    `layout` is that of `Recognised`, empty for a model that was never official. Raises CheckpointError for a model that
    the official codes do not know.
    """
    if isinstance(model, Autoencoder):
        found = kl16_tensors(model)
    elif isinstance(model, XAR):
        if model.config.ordering not in ("cells", "patches", "whole"):  # patches and the whole are cells too
            raise CheckpointError(
                f"the official xAR code knows cells alone: a generator of {model.config.ordering} has no official "
                f"layout."
            )
        found = foreign_tensors(model.state_dict(), xar_table(model.config.depth), model.config)
        found |= xar_buffers(model.config) if layout.get("buffers", True) else {}
    else:
        found = _xtra_tensors(model)
        if not layout.get("batch_norm", True):
            names = {"classifier.1.weight": "classifier.weight", "classifier.1.bias": "classifier.bias"}
            found = {names.get(n, n): t for n, t in found.items() if not n.startswith("classifier.0.")}
    found = with_dtypes(found, layout.get("dtypes", {}))
    return {layout.get("prefix", "") + name: tensor.detach().clone().contiguous() for name, tensor in found.items()}


def _xtra_tensors(model: Any) -> dict[str, Tensor]:
    if isinstance(model, XTRA):
        return foreign_tensors(model.state_dict(), XTRA_TABLE, model.config)
    if isinstance(model, Encoder):
        return foreign_tensors(model.state_dict(), ENCODER_TABLE, model.config)
    if isinstance(model, Classifier):
        table = [*XTRA_TABLE, *head_table(model.head_config.kind)]
        return foreign_tensors(model.state_dict(), table, model.config)
    return foreign_tensors(model.state_dict(), head_table(describe(model)["config"]["kind"], ""), model)
