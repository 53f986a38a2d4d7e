"""Models of transformers that are read from and written to our weights folders by our own code.

transformers would make the model without memory for its tensors and fill in what the file holds; but a mask is in no
file. Our reader makes the model whole, and checks the hash and the names of the weights.
"""

# mypy: allow-untyped-calls
# (transformers makes subclasses with functions that have no types)

from __future__ import annotations

import copy
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from nextblock.checkpoints.kinds import describe, make
from nextblock.checkpoints.pretrained import (
    find_folder,
    load_weights,
    push_model,
    read_about,
    read_preprocessing,
    save_new,
)
from nextblock.data.preprocess import Preprocessing
from nextblock.errors import CheckpointError, ConfigError
from nextblock.hf.configuration import NextblockConfig
from nextblock.hf.options import Options, for_pushing, refuse
from nextblock.xtra.classifier import Classifier
from nextblock.xtra.config import XTRAConfig
from nextblock.xtra.model import Encoder

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class FolderModel(PreTrainedModel, ABC):
    """An Encoder or a Classifier, `inner`. The names of its tensors are those in the file, without "inner."."""

    main_input_name = "pixel_values"
    input_modalities = "image"
    _supports_sdpa = True
    config: NextblockConfig
    inner: Any

    def __init__(self, config: NextblockConfig, inner: Encoder | Classifier | None = None) -> None:
        super().__init__(config)
        self.inner = self.make(config) if inner is None else inner
        self.register_state_dict_post_hook(_without_prefix)
        self.register_load_state_dict_pre_hook(_with_prefix)
        self.post_init()

    @classmethod
    @abstractmethod
    def make(cls, config: NextblockConfig) -> Any:
        """`inner`, with parameters as they are initialised."""

    @classmethod
    @abstractmethod
    def opened(cls, folder: Path, config: NextblockConfig, new_head: bool) -> tuple[Any, set[str]]:
        """`inner` with the weights of a folder, and the names of the tensors that it did not hold."""

    @property
    @abstractmethod
    def encoder(self) -> Encoder:
        """What reads the images."""

    def images(self, pixel_values: Tensor, other_sizes: bool | None) -> Tensor:
        """In the dtype of the weights. Raises ConfigError for another size than in training, where that is refused."""
        size = tuple(pixel_values.shape[-2:])
        if other_sizes is False and size != self.encoder.config.image:
            raise ConfigError(
                f"an image of {size[0]}×{size[1]} px is not of the size in training {self.encoder.config.image}. Leave "
                "out interpolate_pos_encoding=False, and position embeddings are resized."
            )
        return pixel_values.to(self.encoder.patch_embed.weight.dtype)

    def as_asked(self, made: Any, return_dict: bool | None) -> Any:
        """A tuple where that is wanted."""
        return made if (self.config.return_dict if return_dict is None else return_dict) else made.to_tuple()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: `inner` is initialised, or has its weights, before transformers comes to it."""

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.patch_embed

    @classmethod
    def from_pretrained(cls, where: str | os.PathLike[str], *_: Any, config: Any = None, **options: Any) -> Any:  # type: ignore[override]
        """A model with its weights, in eval mode.

        Args:
            where: a folder of weights, or a name on the Hugging Face hub.
            config: a NextblockConfig; that of the folder when left out.
            options: `dtype` ("auto": as stored), `device_map` (one device), `revision`, `token`, `subfolder`,
                `ignore_mismatched_sizes` (a new head where the number of classes differs), `output_loading_info`, and
                fields of the configuration, such as `bidirectional`, `drop_path`, `num_labels`, `id2label`.

        Raises CheckpointError when the folder is damaged or holds another kind, ConfigError for other options.
        """
        asked = Options.taken_from(options, where)
        folder = find_folder(asked.place(where), asked.revision, asked.token)
        if config is None:
            config, options = AutoConfig.from_pretrained(str(folder), return_unused_kwargs=True, **options)
        refuse(options)
        config = copy.deepcopy(config)
        inner, new = cls.opened(folder, config, asked.ignore_mismatched_sizes)
        dtype = _stored_dtype(folder) if asked.dtype == "auto" else asked.dtype
        config.name_or_path, config.dtype = str(where), dtype
        model = cls(config, inner.to(device=asked.device, dtype=dtype)).eval()
        nothing: list[str] = []
        info = {"missing_keys": new, "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": nothing}
        return (model, info) if asked.output_loading_info else model

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **options: Any,
    ) -> None:
        """Write a weights folder of ours, which both libraries open: config.json, model.safetensors, custom code.

        preprocessor_config.json and README.md are kept when they are there, of a model for images of the same size and
        channels; else they are written. Save the image processor too when it is not that of the folder which this
        model came from.

        Args:
            save_directory: new or not; other files in it stay.
            is_main_process: False writes nothing.
            state_dict: the weights when the model's own are not whole on this process.
            push_to_hub: upload it too; `repo_id` ("owner/name") and what else `push_to_hub` takes are options.
            options: those of transformers; there is one file, whatever `max_shard_size` says.
        """
        pushed = for_pushing(options)
        if not is_main_process:
            return
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".partial") as scratch:
            written = save_new(Path(scratch) / "weights", self._to_save(state_dict))
            # config.json last: it holds the hash of the weights, so nothing half written is opened
            kept = _kept(folder, written)
            for file in sorted(written.iterdir(), key=lambda path: path.name == "config.json"):
                if file.name not in kept:
                    os.replace(file, folder / file.name)
        if push_to_hub:
            self.push_to_hub(**({"repo_id": folder.name} | pushed))

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        private: bool = False,
        revision: str | None = None,
        commit_message: str = "Upload weights",
        token: str | None = None,
    ) -> str:
        """Upload a folder such as `save_pretrained` writes, with our model card; returns its address.

        Args: as in `nextblock.Encoder.push_to_hub`; `repo_id` is "owner/name".
        Raises CheckpointError when it cannot be reached or written.
        """
        told = {"private": private, "revision": revision, "message": commit_message, "token": token}
        return push_model(self._to_save(None), repo_id, None, **told)

    def _to_save(self, state_dict: Mapping[str, Tensor] | None) -> Any:
        """`inner`, with the classes that the configuration names and, where given, with these weights."""
        inner = self.inner
        labels = tuple(self.config.labels())
        if isinstance(inner, Classifier) and len(labels) == len(inner.classes):
            inner.classes = labels
        if state_dict is None:
            return inner
        fresh: Any = make(describe(inner), "the model")
        fresh.to(next(tensor.dtype for tensor in state_dict.values() if tensor.is_floating_point()))
        load_weights(fresh, state_dict, "state_dict")
        return like(inner, fresh)


def like(known: Any, made: Any) -> Any:
    """`made`, with what belongs to the weights of `known`."""
    made.preprocessing, made.about = known.preprocessing, known.about
    return made


def head_that_fits(config: NextblockConfig, new_head: bool) -> bool:
    """Whether the stored head has as many classes as are wanted. Raises ConfigError when it has not, unless a new one
    shall be made."""
    stored, wanted = len(config.classes or ()), len(config.labels())
    if stored and stored != wanted and not new_head:
        raise ConfigError(
            f"the head tells {stored} classes apart, not {wanted}. Give ignore_mismatched_sizes=True for a new head."
        )
    return bool(stored) and stored == wanted


def _kept(folder: Path, written: Path) -> set[str]:
    """What an image processor or a person wrote for a model such as the one in `written`: it stays in `folder`."""
    kept = set()
    if _takes(read_preprocessing, folder) in (_takes(read_preprocessing, written), _takes(_sizes, written)):
        kept.add("preprocessor_config.json")
    if not (folder / "config.json").exists() or _takes(_sizes, folder) == _takes(_sizes, written):
        kept.add("README.md")
    return {name for name in kept if (folder / name).is_file()}


def _takes(read: Callable[[Path], dict[str, Any]], folder: Path) -> tuple[Any, int] | None:
    """Size in pixels and channels of the images that a folder says it takes; None when it does not say."""
    try:
        found = Preprocessing.from_dict(read(folder))
    except (CheckpointError, ConfigError, KeyError, TypeError, ValueError):
        return None
    return found.size_px, found.channels


def _sizes(folder: Path) -> dict[str, Any]:
    """As preprocessing: what config.json says."""
    config = XTRAConfig.from_dict(read_about(folder)["config"])
    return {"size_px": config.image, "channels": config.channels}


def _stored_dtype(folder: Path) -> torch.dtype:
    """That of the first tensor of floating point."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        kinds = (file.get_slice(name).get_dtype() for name in file.keys())  # noqa: SIM118 - not a dict
        return next((_DTYPES[kind] for kind in kinds if kind in _DTYPES), torch.float32)


_INNER = "inner."


def _without_prefix(module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    for name in [name for name in state_dict if name.startswith(prefix + _INNER)]:
        state_dict[prefix + name.removeprefix(prefix + _INNER)] = state_dict.pop(name)


def _with_prefix(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in [name for name in state_dict if name.startswith(prefix)]:
        state_dict[prefix + _INNER + name.removeprefix(prefix)] = state_dict.pop(name)
