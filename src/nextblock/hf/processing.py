"""Our preprocessing as an image processor of transformers: the same code, so the same pixels, bit for bit."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from nextblock.checkpoints import custom_code
from nextblock.checkpoints.hashes import HASH
from nextblock.data.preprocess import Preprocessing
from nextblock.errors import ConfigError, nearest

_FIELDS = tuple(field.name for field in dataclasses.fields(Preprocessing))
_LAYOUTS = ("channels_first", "channels_last")


class NextblockImageProcessor(BaseImageProcessor):
    """Images to `pixel_values` [B, C, H, W] as `nextblock.Preprocessing` makes them.

    Arguments: the fields of `Preprocessing`. They may be changed in `from_pretrained(DIR, size_px=[224, 224])`.

    Attributes:
        preprocessing: what does the work.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012 - as transformers declares it

    def __init__(self, **values: Any) -> None:
        super().__init__()
        self.preprocessing = Preprocessing.from_dict({k: v for k, v in values.items() if k not in _OF_TRANSFORMERS})

    def preprocess(
        self,
        images: Any,
        return_tensors: str | None = None,
        input_data_format: str | None = None,
        **options: Any,
    ) -> BatchFeature:
        """Resize, crop and normalise.

        Args:
            images: a file, a Pillow image, an array or a tensor of uint8 pixels ([H, W], [H, W, C] or [C, H, W], also
                with a leading batch), or a list of such.
            return_tensors: "pt" or "np"; a list of arrays when left out.
            input_data_format: "channels_first" or "channels_last" of arrays and tensors; by default the side that has
                as many values as an image has channels, of tensors the first one and of arrays the last one first.

        Raises SampleError for an image that cannot be read, ConfigError for another option: what is done with an image
        was decided when the encoder was trained.
        """
        wrong = next((name for name, value in options.items() if value is not None), None)
        if wrong is not None:
            raise ConfigError(
                f"'{wrong}' cannot be chosen here.{nearest(wrong, _FIELDS)} Give AutoImageProcessor.from_pretrained "
                f"what shall differ: {', '.join(_FIELDS)}."
            )
        if input_data_format not in (None, *_LAYOUTS):
            raise ConfigError(f"input_data_format must be one of {', '.join(_LAYOUTS)}; got {input_data_format!r}.")
        listed = images if isinstance(images, list | tuple) else [images]
        pixels = self.preprocessing([one for image in listed for one in self._plain(image, input_data_format)])
        values = pixels if return_tensors is not None else list(pixels.numpy())
        return BatchFeature(data={"pixel_values": values}, tensor_type=return_tensors)

    def __call__(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:  # type: ignore[override]
        return self.preprocess(images, *args, **kwargs)

    def _plain(self, image: Any, layout: str | None) -> list[Any]:
        """As `Preprocessing` takes it: arrays [H, W] or [H, W, C], each alone."""
        if not isinstance(image, np.ndarray | Tensor):
            return [image]
        first = isinstance(image, Tensor)
        pixels = image.detach().cpu().numpy() if isinstance(image, Tensor) else image
        if pixels.ndim < 3:
            return [pixels]
        known = {1, 3, 4, self.preprocessing.channels}
        sides = (pixels.shape[-3] in known, pixels.shape[-1] in known)
        channels_first = sides[0] and (first or not sides[1]) if layout is None else layout == _LAYOUTS[0]
        pixels = np.moveaxis(pixels, -3, -1) if channels_first else pixels
        return [np.ascontiguousarray(one) for one in (pixels if pixels.ndim == 4 else pixels[None])]

    @classmethod
    def from_dict(cls, image_processor_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        unused = kwargs.pop("return_unused_kwargs", False)
        chosen = {name: kwargs.pop(name) for name in _FIELDS if name in kwargs}
        made = cls(**{**image_processor_dict, **{k: _as_tuple(v) for k, v in chosen.items()}})
        return (made, kwargs) if unused else made

    def to_dict(self) -> dict[str, Any]:
        """preprocessor_config.json."""
        return self.preprocessing.to_dict() | {
            "image_processor_type": type(self).__name__,
            "auto_map": {"AutoImageProcessor": f"{custom_code.FILE.removesuffix('.py')}.{custom_code.PROCESSOR}"},
        }

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Write preprocessor_config.json, and the code that transformers needs to find this class again."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / custom_code.FILE).write_text(custom_code.code())
        return super().save_pretrained(str(folder), push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoImageProcessor") -> None:
        """Nothing: the folder's own code file fetches this class, so that no source is copied into it."""

    @property
    def size(self) -> dict[str, int]:
        """Of the model's input, in pixels."""
        return dict(zip(("height", "width"), self.preprocessing.size_px, strict=True))

    @property
    def image_mean(self) -> list[float]:
        return list(self.preprocessing.mean or ())

    @property
    def image_std(self) -> list[float]:
        return list(self.preprocessing.std or ())


_OF_TRANSFORMERS = ("image_processor_type", "auto_map", HASH)  # and the hash, which is of values as they were written


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
