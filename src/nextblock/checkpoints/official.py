"""Weights in the layout of the official XTRA code: pre-trained models, encoders, probes and fine-tuned classifiers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from einops import rearrange
from torch import Tensor

from nextblock.checkpoints.foreign_files import read_tensors
from nextblock.checkpoints.name_table import Row, count, find_row, load_by_table, require_shapes, without_prefix
from nextblock.checkpoints.sizes import Sizes, completed, ratio_of, require_tokens, square
from nextblock.errors import CheckpointError
from nextblock.ordering import as_pair
from nextblock.portable import weights_follow
from nextblock.xtra.config import PRESETS, XTRAConfig
from nextblock.xtra.model import XTRA

PREFIXES = ("_forward_module.", "module.", "model.")  # of wrappers around the model in some versions of trainers
ENCODER, PREDICTOR, HEAD = "enc.", ("proj.", "predictor.", "aim_proj."), "classifier."


def _flat_patch(weight: Tensor, config: XTRAConfig) -> Tensor:
    """A convolution over patches as a linear map: [D, C, p, p] -> [D, C·p·p]."""
    return rearrange(weight, "d c p1 p2 -> d (c p1 p2)")


def _square_patch(weight: Tensor, config: XTRAConfig) -> Tensor:
    (p1, p2), c = config.patch, config.channels
    return rearrange(weight, "d (c p1 p2) -> d c p1 p2", c=c, p1=p1, p2=p2)


def _token_major(weight: Tensor, config: XTRAConfig) -> Tensor:
    """The official head reads (feature, token); ours reads (token, feature), which needs no copy."""
    return rearrange(weight, "out (d k) -> out (k d)", k=config.ordering.entity_size)


def _feature_major(weight: Tensor, config: XTRAConfig) -> Tensor:
    return rearrange(weight, "out (k d) -> out (d k)", k=config.ordering.entity_size)


def _stack_of_one(tensor: Tensor, config: Any) -> Tensor:
    """Our heads stand in stacks: [...] -> [1, ...]."""
    return tensor[None]


def _only_one(tensor: Tensor, config: Any) -> Tensor:
    return tensor[0]


def _stack(theirs: str, ours: str) -> list[Row]:
    layer, mine = f"{theirs}.blocks.{{n}}", f"{ours}.layers.layers.{{n}}"
    return [
        Row(f"{layer}.norm{{one_or_two}}.{{part}}", f"{mine}.norm{{one_or_two}}.{{part}}"),
        Row(f"{layer}.attn.qkv.{{part}}", f"{mine}.attn.qkv.{{part}}"),
        Row(f"{layer}.attn.proj.{{part}}", f"{mine}.attn.out.{{part}}"),
        Row(f"{layer}.mlp.fc{{one_or_two}}.{{part}}", f"{mine}.mlp.fc{{one_or_two}}.{{part}}"),
        Row(f"{theirs}.norm.{{part}}", f"{ours}.norm.{{part}}"),
        Row(f"{theirs}.pos_embed", f"{ours}.position"),
    ]


def _encoder(ours: str) -> list[Row]:
    return [
        Row("enc.patch_embed.proj.weight", f"{ours}.patch_embed.weight", _flat_patch, _square_patch),
        Row("enc.patch_embed.proj.bias", f"{ours}.patch_embed.bias"),
        *_stack("enc", ours),
    ]


XTRA_TABLE = [
    *_encoder("encoder"),
    Row("proj.mlp.0.{part}", "projection.fc1.{part}"),
    Row("proj.mlp.2.weight", "projection.fc2.weight"),
    *_stack("predictor", "predictor"),
    Row("aim_proj.{n}.mlp.0.weight", "heads.{n}.fc1.weight", _token_major, _feature_major),
    Row("aim_proj.{n}.mlp.0.bias", "heads.{n}.fc1.bias"),
    Row("aim_proj.{n}.mlp.2.{part}", "heads.{n}.fc2.{part}"),
]
# an encoder alone: our names without the "encoder." of the whole model
ENCODER_TABLE = [
    dataclasses.replace(row, ours=row.ours.removeprefix("encoder.")) for row in _encoder("encoder") if row.ours
]


def head_table(kind: str, ours: str = "head.") -> list[Row]:
    """The rows of a classifier's head: "linear" (BatchNorm, linear map) or "attentive" (AIM's pooling)."""
    if kind == "linear":
        return [
            Row("classifier.0.{running}", f"{ours}norm.{{running}}"),
            Row("classifier.1.{part}", f"{ours}{{part}}", _stack_of_one, _only_one),
        ]
    return [
        Row("classifier.bn.{running}", f"{ours}norm.{{running}}"),
        Row("classifier.cls_token", f"{ours}query"),
        Row("classifier.k.weight", f"{ours}key", _stack_of_one, _only_one),
        Row("classifier.v.weight", f"{ours}value", _stack_of_one, _only_one),
        Row("classifier.linear.{part}", f"{ours}{{part}}", _stack_of_one, _only_one),
    ]


def our_name(official: str) -> str | None:
    """Our parameter for an official one; CheckpointError when the table has no row for it."""
    row = find_row(XTRA_TABLE, official)
    if row is None:
        raise CheckpointError(f"'{official}' is not a tensor of an official XTRA model.")
    return row.translate(official)


def xtra_sizes(
    tensors: Mapping[str, Tensor], where: object, given: Mapping[str, Any] | None = None, preset: str | None = None
) -> Sizes:
    """The fields of XTRAConfig that official tensors show; the rest from `given`, or from the preset that agrees.

    Tensors do not show the heads, nor, of an encoder without its predictor, the cell size.

    Raises CheckpointError when these are not the tensors of an XTRA model, and as `sizes.completed`.
    """
    given = dict(given or {})
    require_shapes(
        tensors,
        {"enc.patch_embed.proj.weight": 4, "enc.pos_embed": 3, "enc.blocks.0.mlp.fc1.weight": 2},
        f"{where} holds no XTRA encoder in the official layout.",
    )
    width, channels, *patch = tensors["enc.patch_embed.proj.weight"].shape
    asked = given.pop("image_size_px", None)
    tokens = tensors["enc.pos_embed"].shape[1]
    require_tokens(tokens, where)
    image = as_pair(asked, "image_size_px") if asked is not None else None
    if image is None:
        side = square(tokens, "position embeddings", "image_size_px", where)
        image = (side * patch[0], side * patch[1])
    elif image[0] // patch[0] * (image[1] // patch[1]) != tokens:
        raise CheckpointError(
            f"{where} has {tokens} position embeddings of patches of {patch[0]}×{patch[1]} px; an image of "
            f"{image[0]}×{image[1]} px has another number of patches."
        )
    shown: dict[str, Any] = {
        "image_size_px": _one_or_two(image), "patch_size_px": _one_or_two(patch), "channels": channels, "width": width,
        "depth": count(tensors, r"enc\.blocks\.(\d+)\."),
        "mlp_ratio": ratio_of(tensors["enc.blocks.0.mlp.fc1.weight"].shape[0], width),
    }  # fmt: skip
    hidden: dict[str, tuple[str, ...]] = {"num_heads": ("width", "depth")}
    if any(name.startswith(PREDICTOR) for name in tensors):
        shown |= _predictor_sizes(tensors, shown, given, where)
        hidden["predictor_heads"] = ("width", "depth")
    if "cell_size" not in shown:
        hidden["cell_size"] = ("width", "depth", "image_size_px", "patch_size_px")
    presets = {name: XTRAConfig.preset(name).to_dict() for name in PRESETS}
    return completed(shown, hidden, given, presets, preset, where)


def _predictor_sizes(
    tensors: Mapping[str, Tensor], shown: Mapping[str, Any], given: Mapping[str, Any], where: object
) -> dict[str, Any]:
    first, last = "aim_proj.0.mlp.0.weight", "aim_proj.0.mlp.2.weight"
    projection = ("proj.mlp.0.weight", "proj.mlp.2.weight")
    require_shapes(
        tensors,
        dict.fromkeys((first, last, *projection), 2),
        f"{where} holds no whole XTRA model in the official layout.",
    )
    width = tensors[projection[1]].shape[0]
    found: dict[str, Any] = {
        "projection_hidden": tensors[projection[0]].shape[0], "predictor_width": width,
        "predictor_depth": count(tensors, r"predictor\.blocks\.(\d+)\."), "head_hidden": tensors[first].shape[0],
        "num_lookahead": count(tensors, r"aim_proj\.(\d+)\."),
    }  # fmt: skip
    cell_tokens = tensors[first].shape[1] // width
    asked = given.get("cell_size")
    if asked is not None:
        sides = as_pair(asked, "cell_size")
        if sides[0] * sides[1] != cell_tokens:
            raise CheckpointError(f"{where} has cells of {cell_tokens} patches; cell_size {asked} was asked for.")
        return found | {"cell_size": asked}
    return found | {"cell_size": square(cell_tokens, "patches in a cell", "cell_size", where)}


def _one_or_two(sides: Sequence[int]) -> int | tuple[int, int]:
    return sides[0] if sides[0] == sides[1] else (sides[0], sides[1])


def load_official_xtra(
    path: str | Path, config: XTRAConfig | None = None, *, preset: str | None = None, **given: Any
) -> XTRA:
    """An XTRA model with the weights of an official checkpoint.

    Args:
        path: a Lightning `.ckpt`, a DeepSpeed model file, or a bare state dict.
        config: the sizes, if not those that the file shows.
        preset: the named model from which what tensors do not show is taken; the one that agrees by default.
        given: fields of XTRAConfig that tensors do not show: num_heads, predictor_heads.

    Raises:
        CheckpointError: the file cannot be read, something is not shown and not said, or tensors are missing,
            unexpected or of another shape; the message lists them.
    """
    tensors, _ = without_prefix(read_tensors(path), PREFIXES)
    if config is None:
        config = XTRAConfig(**xtra_sizes(tensors, path, given, preset).values)
    with weights_follow():
        model = XTRA(config)
    load_by_table(model, tensors, XTRA_TABLE, config, path)
    return model
