"""What turns images into the features that generated images are judged in, and the pass over all of them.

| features | the distance in them is called |
|---|---|
| Inception weights, from a local TorchScript file | FID |
| a nextblock encoder | Fréchet distance in the features of that encoder, never FID |
| raw pixels | Fréchet distance in raw pixels |
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nextblock.data.preprocess import Preprocessing, normalize
from nextblock.data.stream import BadSample, Batch
from nextblock.errors import ConfigError
from nextblock.evaluation.feature_cache import weights_digest
from nextblock.evaluation.feature_rows import RowFile
from nextblock.evaluation.inference import device_of, inference
from nextblock.xtra.model import Encoder

FID_WIDTH = 2048  # of the pooled features of Inception v3 that FID is defined on
MOST_PIXELS = 4096  # numbers in an image whose covariance is still small


def metric_name(identity: Mapping[str, Any]) -> str:
    """What a Fréchet distance in these features is called."""
    is_fid = identity.get("kind") == "inception" and identity.get("dimensions") == FID_WIDTH
    return "FID" if is_fid else "Fréchet distance"


class Extractor(Protocol):
    """Images to features.

    identity: plain JSON; two extractors with the same, but for "name" and "path", give the same features.
    told: the features, in one line.
    """

    identity: dict[str, Any]
    told: str

    def loading(self, size_px: tuple[int, int]) -> Preprocessing:
        """How images of this size are to be loaded."""

    def features(self, images: Tensor) -> Tensor:
        """uint8 [B, H, W, C] -> float32 [B, D]."""

    def probabilities(self, images: Tensor) -> Tensor | None:
        """uint8 [B, H, W, C] -> float32 [B, classes] that sum to 1; None when it knows no classes."""


class InceptionFile:
    """Inception v3 as the TorchScript file that evaluations of generators share (inception-2015-12-05.pt, published
    with StyleGAN2-ADA): called with uint8 [B, 3, H, W] it resizes by itself, and gives features [B, 2048] with
    return_features=True, and class probabilities [B, 1008] with no_output_bias=True, as the Inception score was
    published.

    Loading a TorchScript file runs code from it, so it is loaded only when `sha256` is its hash: whoever names that
    has looked where the file is from.

    Raises ConfigError, naming the file's hash, without that hash; when the file is not there, is no TorchScript, or
    cannot be called so.
    """

    def __init__(self, path: str | Path, device: torch.device | str = "cpu", *, sha256: str | None = None) -> None:
        path = Path(path).expanduser()
        if not path.is_file():
            raise ConfigError(f"no Inception weights at {path}; a file is needed, inception-2015-12-05.pt.")
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if sha256 is None or sha256.lower() != digest:
            other = "" if sha256 is None else f" Its hash is not {sha256}."
            raise ConfigError(
                f"{path} is a program: loading TorchScript runs code from it.{other} If you trust where it is from, "
                f"say so by its hash: --inception_sha256 {digest}"
            )
        self._device = torch.device(device)
        self._model = _load_script(path, self._device)
        width = self._width(path)
        self.identity = {
            "kind": "inception", "sha256": digest, "dimensions": width, "name": path.name,
            "path": os.path.abspath(path),
        }  # fmt: skip
        self.told = f"features of {path.name}, SHA-256 {digest[:16]}..., {width} dimensions"

    def _width(self, path: Path) -> int:
        """Of the features, from a first call."""
        blank = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
        try:
            features, probabilities = self.features(blank), self.probabilities(blank)
            if features.ndim == 2 and probabilities.ndim == 2 and len(features) == len(probabilities) == 2:
                return features.shape[1]
            found = f"gave {list(features.shape)} and {list(probabilities.shape)}"
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, AttributeError, TypeError) as error:
            found = f"raised: {_last_line(error)}"
        raise ConfigError(
            f"{path} is TorchScript, but not Inception as needed here: called with uint8 images [2, 3, 8, 8] and "
            f"return_features=True, then no_output_bias=True, it {found}. Needed is inception-2015-12-05.pt."
        )

    def loading(self, size_px: tuple[int, int]) -> Preprocessing:
        return Preprocessing(size_px=size_px, resize_px=min(size_px), channels=3)

    def features(self, images: Tensor) -> Tensor:
        return self._call(images, return_features=True)

    def probabilities(self, images: Tensor) -> Tensor:
        return self._call(images, no_output_bias=True)

    def _call(self, images: Tensor, **how: bool) -> Tensor:
        x = images.permute(0, 3, 1, 2).to(self._device)  # [B, 3, H, W]
        # Published numbers are of float32; the 10 bits of TF32 convolutions are a GPU's default.
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False) if x.is_cuda else nullcontext()
        with torch.no_grad(), exact:
            return self._model(x, **how).float()


def _load_script(path: Path, device: torch.device) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript is, but the file that papers use is one
            return torch.jit.load(path, map_location=device).eval()  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError, OSError) as error:
        raise ConfigError(
            f"{path} cannot be loaded as TorchScript: {_last_line(error)}. Needed is inception-2015-12-05.pt, not a "
            "file of weights alone. For a nextblock run, give --encoder."
        ) from error


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__).partition(". ")[0].rstrip(".")[:200]


class EncoderFeatures:
    """The mean over tokens of a nextblock encoder's last layers, in float32; images go through its preprocessing.

    name: where the encoder came from, as the result tells it.
    """

    def __init__(
        self,
        encoder: Encoder,
        preprocessing: Preprocessing,
        name: str,
        *,
        last_layers: int = 1,
        bidirectional: bool = False,
    ) -> None:
        depth = encoder.config.depth
        if not 1 <= last_layers <= depth:
            raise ConfigError(f"last_layers must be between 1 and the depth ({depth}); got {last_layers}.")
        self._encoder, self._preprocessing = encoder, preprocessing
        self._last_layers, self._bidirectional = last_layers, bidirectional
        digest, width = weights_digest(encoder), encoder.config.width
        self.identity = {
            "kind": "encoder", "sha256": digest, "dimensions": width, "last_layers": last_layers,
            "bidirectional": bidirectional, "preprocessing": preprocessing.to_dict(), "name": name,
        }  # fmt: skip
        layers = "last layer" if last_layers == 1 else f"last {last_layers} layers"
        self.told = f"features of {name}, weights {digest[:16]}..., mean of the {layers}, {width} dimensions"

    def loading(self, size_px: tuple[int, int]) -> Preprocessing:
        return self._preprocessing

    def features(self, images: Tensor) -> Tensor:
        with inference(self._encoder, bf16=False):
            x = normalize(images.to(device_of(self._encoder)), None, self._preprocessing)
            tokens = self._encoder.features(x, self._last_layers, bidirectional=self._bidirectional)  # [B, N, D]
            return tokens.float().mean(1)

    def probabilities(self, images: Tensor) -> None:
        return None


class PixelFeatures:
    """The pixels themselves, 0..1, [B, H·W·C]: a plain feature space for tests and for small images.

    Raises ConfigError above 4,096 numbers an image.
    """

    def __init__(self, size_px: tuple[int, int], channels: int) -> None:
        width = size_px[0] * size_px[1] * channels
        if width > MOST_PIXELS:
            raise ConfigError(
                f"pixels of {size_px[0]} x {size_px[1]} images are {width:,} dimensions; at most {MOST_PIXELS:,} are "
                "sensible. Set a smaller --size_px (32), or take features: --encoder RUN or --inception FILE."
            )
        self._channels = channels
        self.identity = {"kind": "pixels", "size_px": list(size_px), "channels": channels, "dimensions": width}
        self.told = f"raw pixels, {size_px[0]} x {size_px[1]} x {channels}, {width} dimensions"

    def loading(self, size_px: tuple[int, int]) -> Preprocessing:
        return Preprocessing(size_px=size_px, resize_px=min(size_px), channels=self._channels)

    def features(self, images: Tensor) -> Tensor:
        return images.flatten(1).float() / 255

    def probabilities(self, images: Tensor) -> None:
        return None


@dataclass
class Extracted:
    """M images as features [M, D] float32, mapped from a file, and class probabilities [M, classes] where asked for.

    bad: images left out. resized: how many had another size than the first sample.
    """

    features: NDArray[np.float32]
    probabilities: NDArray[np.float32] | None = None
    bad: list[BadSample] = field(default_factory=list)
    resized: int = 0


def extract_to(
    folder: Path, name: str, extractor: Extractor, batches: Iterable[Batch], capacity: int, *, classify: bool = False
) -> Extracted:
    """The features of all images, written to `folder` as they come: memory is that of a batch.

    Args:
        name: of the set; begins the files' names.
        batches: of a `OneSize` source: the labels count what had another size.
        capacity: how many images there can be.
        classify: class probabilities as well, where the extractor knows classes: another pass of the network.
    """
    features, probabilities = (RowFile(folder / f"{name}-{what}.npy", capacity) for what in ("features", "classes"))
    bad: list[BadSample] = []
    resized, classified = 0, False
    for batch in batches:
        bad += batch.bad
        if not len(batch):
            continue
        features.append(extractor.features(batch.images).cpu().numpy())
        resized += int((batch.labels > 0).sum())
        found = extractor.probabilities(batch.images) if classify else None
        if found is not None:
            probabilities.append(found.cpu().numpy())
            classified = True
    return Extracted(features.written(), probabilities.written() if classified else None, bad, resized)


__all__ = ["EncoderFeatures", "Extracted", "Extractor", "InceptionFile", "PixelFeatures", "extract_to", "metric_name"]
