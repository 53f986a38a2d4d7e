"""What `from_pretrained` and `save_pretrained` of transformers are asked, as far as it means something here."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nextblock.errors import ConfigError, nearest

# of transformers' own reader and writer; there is one safetensors file here, and it is read whole
_MEANINGLESS = (
    "_from_auto", "_from_pipeline", "_commit_hash", "adapter_kwargs", "attn_implementation", "code_revision",
    "low_cpu_mem_usage", "trust_remote_code", "use_safetensors", "weights_only",
)  # fmt: skip
_OF_THE_HUB = {
    "cache_dir": "set HF_HOME",
    "force_download": "every file is checked against its hash as it is",
    "local_files_only": "set HF_HUB_OFFLINE=1",
    "proxies": "set HTTPS_PROXY",
}
_WRITING = ("max_shard_size", "safe_serialization", "save_original_format", "save_peft_format", "variant")
_PUSHING = ("commit_message", "private", "repo_id", "revision", "token")


@dataclass(frozen=True)
class Options:
    """Of `from_pretrained`.

    dtype: of the parameters; "auto" as stored. device: where to put them. revision, token: of the hub.
    subfolder: of a local folder. ignore_mismatched_sizes: make a new head where the number of classes differs.
    output_loading_info: return a pair, of the model and which tensors are new.
    """

    dtype: torch.dtype | str = "auto"
    device: torch.device | None = None
    revision: str | None = None
    token: str | None = None
    subfolder: str = ""
    ignore_mismatched_sizes: bool = False
    output_loading_info: bool = False

    @classmethod
    def taken_from(cls, options: dict[str, Any], where: str | os.PathLike[str]) -> Options:
        """Takes out what is known; the rest may be fields of the configuration.

        Raises ConfigError for a value that cannot work, or that works on the hub alone and another way.
        """
        for name in _MEANINGLESS:
            options.pop(name, None)
        for name, instead in _OF_THE_HUB.items():
            if options.pop(name, None) and not Path(where).is_dir():
                raise ConfigError(f"{name} is not taken for weights on the hub: {instead}.")
        old, token = options.pop("torch_dtype", None), options.pop("token", None)
        return cls(
            dtype=_dtype(options.pop("dtype", None) or old or "auto"),
            device=_device(options.pop("device_map", None)),
            revision=None if Path(where).is_dir() else options.pop("revision", None),
            token=token if isinstance(token, str) else None,
            subfolder=options.pop("subfolder", None) or "",
            ignore_mismatched_sizes=bool(options.pop("ignore_mismatched_sizes", False)),
            output_loading_info=bool(options.pop("output_loading_info", False)),
        )

    def place(self, where: str | os.PathLike[str]) -> str:
        """The folder or the name that is meant. Raises ConfigError for a subfolder on the hub."""
        if self.subfolder and not Path(where).is_dir():
            raise ConfigError(f"subfolder is taken for a folder on this machine only; got '{self.subfolder}'.")
        return os.path.join(where, self.subfolder) if self.subfolder else str(where)


def refuse(options: dict[str, Any], known: tuple[str, ...] = ()) -> None:
    """Raises ConfigError for the first option that is not None."""
    names = ("dtype", "device_map", "revision", "token", "bidirectional", "drop_path", "num_labels", "id2label", *known)
    for name, value in options.items():
        if value is not None and name not in known:
            raise ConfigError(f"'{name}' is not an option of models of nextblock.{nearest(name, names)}")


def for_pushing(options: dict[str, Any]) -> dict[str, Any]:
    """What `push_to_hub` is asked. Raises ConfigError for what cannot be done when weights are written."""
    if options.get("variant") is not None:
        raise ConfigError(f"variant must be left out: the file is model.safetensors; got {options['variant']!r}.")
    refuse(options, (*_WRITING, *_PUSHING))
    return {name: options[name] for name in _PUSHING if name in options}


def _dtype(asked: Any) -> torch.dtype | str:
    found = getattr(torch, asked, None) if isinstance(asked, str) and asked != "auto" else asked
    if found != "auto" and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ConfigError(f"dtype must be 'auto' or one of floating point, such as torch.bfloat16; got {asked!r}.")
    return found


def _device(asked: Any) -> torch.device | None:
    devices = list(asked.values()) if isinstance(asked, dict) else [asked]
    if len(devices) != 1:
        raise ConfigError(f"device_map must name one device, such as 'cuda' or {{'': 0}}; got {asked!r}.")
    if devices[0] is None:
        return None
    name = ("cuda" if torch.cuda.is_available() else "cpu") if devices[0] == "auto" else devices[0]
    try:
        return torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device_map must name one device, such as 'cuda' or {{'': 0}}; got {asked!r}.") from error
