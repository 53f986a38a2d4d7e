"""The KL-16 autoencoder of MAR (arXiv 2406.11838) and xAR, from its official file.

The file has the layout of latent diffusion (`encoder.down.0.block.1.conv1.weight`, ...); diffusers' AutoencoderKL is
the same architecture with other names. All sizes, and the levels that have attention, are inferred from the tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nextblock.checkpoints.foreign_files import read_tensors
from nextblock.checkpoints.name_table import count, mismatch
from nextblock.errors import CheckpointError
from nextblock.vae import Autoencoder

SCALE_FACTOR = 0.2325
NORM_GROUPS = 32
_OTHER = "{} is not a KL-16 autoencoder in the official layout."
_TRAINING_ONLY = "loss."  # the perceptual loss and discriminator that latent diffusion saves beside the VAE

# diffusers' name -> the official one; "{up}" counts the decoder's levels from the other end
_TABLE = [
    (r"(encoder|decoder)\.(conv_in|conv_out)\.(.*)", r"\1.\2.\3"),
    (r"(encoder|decoder)\.conv_norm_out\.(.*)", r"\1.norm_out.\2"),
    (r"(quant_conv|post_quant_conv)\.(.*)", r"\1.\2"),
    (r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.(.*)", r"encoder.down.\1.block.\2.\3"),
    (r"encoder\.down_blocks\.(\d+)\.attentions\.(\d+)\.(.*)", r"encoder.down.\1.attn.\2.\3"),
    (r"encoder\.down_blocks\.(\d+)\.downsamplers\.0\.(.*)", r"encoder.down.\1.downsample.\2"),
    (r"decoder\.up_blocks\.(\d+)\.resnets\.(\d+)\.(.*)", r"decoder.up.{up}.block.\2.\3"),
    (r"decoder\.up_blocks\.(\d+)\.attentions\.(\d+)\.(.*)", r"decoder.up.{up}.attn.\2.\3"),
    (r"decoder\.up_blocks\.(\d+)\.upsamplers\.0\.(.*)", r"decoder.up.{up}.upsample.\2"),
    (r"(encoder|decoder)\.mid_block\.resnets\.0\.(.*)", r"\1.mid.block_1.\2"),
    (r"(encoder|decoder)\.mid_block\.resnets\.1\.(.*)", r"\1.mid.block_2.\2"),
    (r"(encoder|decoder)\.mid_block\.attentions\.0\.(.*)", r"\1.mid.attn_1.\2"),
]
_INNER = {"conv_shortcut": "nin_shortcut", "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v",
          "to_out.0": "proj_out"}  # fmt: skip


def load_official_kl16(path: str | Path) -> Autoencoder:
    """The autoencoder in an official file: `{"model": state}`, a bare state dict, or safetensors.

    Its scale factor is 0.2325. Raises CheckpointError when the file cannot be read, or tensors are missing, unexpected
    or of another shape; the message lists them.
    """
    return kl16_of(read_tensors(path, ("model", "state_dict")), path)[0]


def kl16_of(tensors: Mapping[str, Tensor], path: str | Path) -> tuple[Autoencoder, list[str]]:
    """The autoencoder of these official tensors, and the names of those that were dropped on purpose.

    `path` is where they are from. Raises CheckpointError as `load_official_kl16`.
    """
    dropped = [name for name in tensors if name.startswith(_TRAINING_ONLY)]
    tensors = {name: tensor for name, tensor in tensors.items() if name not in set(dropped)}
    sizes = _sizes(tensors, path)
    model = _empty(sizes, path)
    expected = dict(model.state_dict())
    official = {name: official_name(name, len(sizes["block_out_channels"])) for name in expected}
    missing = [theirs for theirs in official.values() if theirs not in tensors]
    unexpected = sorted(set(tensors) - set(official.values()))
    misshaped = []
    found: dict[str, Tensor] = {}
    for ours, theirs in official.items():
        if theirs not in tensors:
            continue
        tensor, want = tensors[theirs], tuple(expected[ours].shape)
        shape = tuple(tensor.shape)
        if shape != want and shape != (*want, 1, 1):  # attention: a convolution of 1 x 1 is a linear map
            misshaped.append(f"{theirs} {shape}, expected {want}")
        else:
            found[ours] = tensor.reshape(want).float()
    if missing or unexpected or misshaped:
        raise mismatch(_OTHER.format(path), missing, unexpected, misshaped)
    model.load_state_dict(found, assign=True)
    about = {"kind": "kl16", "path": str(Path(path).absolute())}
    return Autoencoder(model, about, scale_factor=SCALE_FACTOR), dropped


def official_name(ours: str, levels: int) -> str:
    """The official name of a tensor of diffusers' AutoencoderKL with so many resolution levels."""
    for pattern, theirs in _TABLE:
        if match := re.fullmatch(pattern, ours):
            level = levels - 1 - int(match[1]) if "{up}" in theirs else 0
            name = match.expand(theirs).replace("{up}", str(level))
            for inner, official in _INNER.items():
                name = name.replace(f".{inner}.", f".{official}.")
            return name
    raise CheckpointError(f"'{ours}' is not a tensor of a KL autoencoder.")


def kl16_tensors(vae: Autoencoder) -> dict[str, Tensor]:
    """The way back: the tensors of an autoencoder as the official file names and shapes them."""
    levels = len(vae.model.config.block_out_channels)
    found: dict[str, Tensor] = {}
    for ours, tensor in vae.model.state_dict().items():
        theirs = official_name(ours, levels)
        in_attention = re.search(r"attn(_1)?(\.\d+)?\.(q|k|v|proj_out)\.weight$", theirs)
        found[theirs] = tensor[..., None, None] if in_attention else tensor
    return found


def _sizes(tensors: Mapping[str, Tensor], path: str | Path) -> dict[str, Any]:
    """The arguments of AutoencoderKL, as far as the names and shapes of the tensors tell them."""
    levels = count(tensors, r"encoder\.down\.(\d+)\.")
    telling = ["encoder.conv_in.weight", "decoder.conv_in.weight", "decoder.conv_out.weight"]
    telling += [f"encoder.down.{level}.block.0.conv1.weight" for level in range(max(1, levels))]
    missing = [name for name in telling if name not in tensors]
    odd = [name for name in telling if name in tensors and tensors[name].ndim != 4]
    if missing or odd:
        raise mismatch(_OTHER.format(path), missing, misshaped=[f"{n} {tuple(tensors[n].shape)}" for n in odd])

    def kind(name: str, side: str, level: int) -> str:
        attends = any(key.startswith(f"{side}.{level}.attn.") for key in tensors)
        return f"Attn{name}" if attends else name

    return {
        "in_channels": tensors["encoder.conv_in.weight"].shape[1],
        "out_channels": tensors["decoder.conv_out.weight"].shape[0],
        "block_out_channels": tuple(tensors[name].shape[0] for name in telling[3:]),
        "down_block_types": tuple(kind("DownEncoderBlock2D", "encoder.down", i) for i in range(levels)),
        "up_block_types": tuple(kind("UpDecoderBlock2D", "decoder.up", i) for i in reversed(range(levels))),
        "layers_per_block": count(tensors, r"encoder\.down\.0\.block\.(\d+)\."),
        "latent_channels": tensors["decoder.conv_in.weight"].shape[1],
        "mid_block_add_attention": any(".mid.attn_1." in name for name in tensors),
        "norm_num_groups": NORM_GROUPS,
        "scaling_factor": SCALE_FACTOR,
    }


def _empty(sizes: Mapping[str, Any], path: str | Path) -> Any:
    """The model, its tensors without memory: the file's own take their place."""
    import diffusers

    make: Any = diffusers.AutoencoderKL
    try:
        with torch.device("meta"):
            return make(**sizes)
    except (ValueError, ZeroDivisionError) as error:
        widths = sizes["block_out_channels"]
        raise CheckpointError(
            f"{path} has levels of {widths} channels; each must be a multiple of {NORM_GROUPS}."
        ) from error
