"""Hashes that a weights folder holds of itself, by which a change is noticed before it is used.

config.json holds three: `sha256` of model.safetensors, `config_sha256` of what the model is made from, `about_sha256`
of all that it says. preprocessor_config.json holds one, `sha256` of its other values, and so may be replaced by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nextblock.durable import sha256_of
from nextblock.errors import CheckpointError

HASH = "sha256"
_OF_SIZES, _OF_ABOUT = "config_sha256", "about_sha256"
HASHES = (HASH, _OF_SIZES, _OF_ABOUT)
_SIZES = ("model_type", "config", "head")


def with_hashes(about: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json shall say, with the hashes of it; that of the weights is there."""
    return {**about, _OF_SIZES: _of_sizes(about), _OF_ABOUT: _of_about(about)}


def require_unchanged(about: Mapping[str, Any], folder: Path) -> None:
    """Raise CheckpointError when config.json does not say what was written.

    Folders written before there were such hashes have none, or fewer, and what transformers writes has its own names.
    """
    if about.get(_OF_SIZES, wanted := _of_sizes(about)) != wanted:
        raise CheckpointError(
            f"{folder}/config.json was changed since it was written. Its sizes fit the weights, but what the "
            f"weights do not show (heads, cells, ...) may be wrong. Copy or download the folder again."
        )
    changed = about.get(_OF_ABOUT, wanted := _of_about(about)) != wanted
    if (changed and "transformers_version" not in about) or any(_is_nearly_a_hash(name) for name in about):
        raise CheckpointError(
            f"{folder}/config.json was changed since it was written. Copy or download the folder again; if the change "
            f"is meant, remove {_OF_ABOUT} there."
        )


def _of_sizes(about: Mapping[str, Any]) -> str:
    """Of what config.json says of the model itself."""
    return sha256_of({name: about[name] for name in _SIZES if name in about})


def _of_about(about: Mapping[str, Any]) -> str:
    return sha256_of({name: value for name, value in about.items() if name not in HASHES})


def _is_nearly_a_hash(name: str) -> bool:
    """Whether one letter makes it another name than that of a hash, which would then seem never to have been there."""
    same = [sum(a == b for a, b in zip(name, known, strict=True)) for known in HASHES if len(known) == len(name)]
    return any(count == len(name) - 1 for count in same)
