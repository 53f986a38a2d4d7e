"""Features for judging images: TorchScript files, encoders, pixels; and the pass over a set."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from close import assert_close
from nextblock.data.loading import evaluation_batches
from nextblock.data.preprocess import Preprocessing
from nextblock.data.sources import open_source
from nextblock.data.stream import Batch
from nextblock.errors import ConfigError, DataError
from nextblock.evaluation.extractors import EncoderFeatures, InceptionFile, PixelFeatures, extract_to, metric_name
from nextblock.evaluation.features import FeatureConfig, extract
from nextblock.evaluation.image_sets import OneSize
from nextblock.xtra.config import XTRAConfig
from nextblock.xtra.model import XTRA
from tiny_run import write_images

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


class TinyInception(nn.Module):
    """Called as the file that papers use: resizes inside; features, or class probabilities."""

    def __init__(self, width: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("a", torch.randn(48, width, generator=generator))
        self.register_buffer("b", torch.randn(width, 10, generator=generator) / width**0.5)

    def forward(self, img: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        assert img.dtype == torch.uint8
        x = nn.functional.interpolate(img.float() / 127.5 - 1, size=(4, 4), mode="bilinear").flatten(1)
        features = torch.relu(x @ self.a)
        if return_features:
            return features
        logits = features @ self.b
        return (logits if no_output_bias else logits + torch.arange(10)).softmax(1)


def write_inception(path: Path, width: int = 2048) -> Path:
    torch.jit.script(TinyInception(width)).save(str(path))
    return path


def opened(path: Path) -> InceptionFile:
    return InceptionFile(path, sha256=hashlib.sha256(path.read_bytes()).hexdigest())


IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 9, 12, 3), dtype=np.uint8))


def test_inception_from_a_torchscript_file(tmp_path: Path) -> None:
    path = write_inception(tmp_path / "inception.pt")
    found, own = opened(path), TinyInception(2048)
    x = IMAGES.permute(0, 3, 1, 2)
    assert_close(found.features(IMAGES), own(x, return_features=True), 1e-5)
    assert_close(found.probabilities(IMAGES), own(x, no_output_bias=True), 1e-5)
    assert metric_name(found.identity) == "FID"
    assert found.identity["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.identity["path"] == str(path)
    assert found.identity["sha256"][:16] in found.told
    assert found.loading((9, 12)).size_px == (9, 12)


def test_what_has_not_inceptions_width_is_not_called_fid(tmp_path: Path) -> None:
    assert metric_name(opened(write_inception(tmp_path / "small.pt", 16)).identity) == "Fréchet distance"


def test_it_is_not_loaded_before_its_hash_is_named(tmp_path: Path) -> None:
    path = write_inception(tmp_path / "inception.pt")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(ConfigError, match=f"--inception_sha256 {digest}"):
        InceptionFile(path)
    with pytest.raises(ConfigError, match="Its hash is not abc"):
        InceptionFile(path, sha256="abc")


def test_files_that_are_not_it_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no Inception weights at"):
        InceptionFile(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(ConfigError, match="cannot be loaded as TorchScript"):
        opened(tmp_path / "text.pt")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "weights.pt")
    with pytest.raises(ConfigError, match="not a file of weights alone"):
        opened(tmp_path / "weights.pt")
    torch.jit.script(nn.Linear(3, 2)).save(str(tmp_path / "linear.pt"))
    with pytest.raises(ConfigError, match="but not Inception as needed here"):
        opened(tmp_path / "linear.pt")


def tiny_encoder() -> tuple[XTRA, Preprocessing]:
    torch.manual_seed(0)
    config = XTRAConfig(
        image_size_px=16, patch_size_px=4, cell_size=2, width=16, depth=2, num_heads=2, predictor_width=16,
        predictor_depth=1, predictor_heads=2, head_hidden=32,
    )  # fmt: skip
    return XTRA(config), Preprocessing(size_px=(16, 16), resize_px=16)


@pytest.mark.parametrize("layers", [1, 2])
def test_encoder_features_are_those_of_embed(layers: int) -> None:
    model, preprocessing = tiny_encoder()
    source = open_source(np.random.default_rng(1).integers(0, 256, (7, 16, 16, 3), dtype=np.uint8))
    batch = next(iter(evaluation_batches(source, preprocessing, batch_size=7)))
    found = EncoderFeatures(model.encoder, preprocessing, "mine", last_layers=layers)
    expected = extract(model.encoder, [batch], preprocessing, FeatureConfig(last_layers=layers)).values
    assert_close(found.features(batch.images), expected, 1e-6)
    assert found.probabilities(batch.images) is None
    assert metric_name(found.identity) == "Fréchet distance"
    assert "FID" not in found.told
    assert "features of mine" in found.told
    assert found.identity["last_layers"] == layers
    other = EncoderFeatures(model.encoder, preprocessing, "mine", last_layers=layers, bidirectional=True)
    assert other.identity != found.identity
    with pytest.raises(ConfigError, match="between 1 and the depth"):
        EncoderFeatures(model.encoder, preprocessing, "mine", last_layers=3)


def test_pixels() -> None:
    found = PixelFeatures((9, 12), 3)
    assert_close(found.features(IMAGES), IMAGES.reshape(5, -1) / 255, 1e-7)
    assert found.identity["dimensions"] == 324
    with pytest.raises(ConfigError, match="12,288 dimensions; at most 4,096"):
        PixelFeatures((64, 64), 3)


def test_a_pass_over_a_set_is_written_to_mapped_files(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", per_class=4)
    (folder / "top" / "000.png").write_bytes(b"no")
    extractor = opened(write_inception(tmp_path / "inception.pt", 16))
    source = OneSize(open_source(str(folder)), (24, 24), 3)
    loading = extractor.loading((24, 24))
    batches = list(evaluation_batches(source, loading, batch_size=3))
    found = extract_to(tmp_path, "samples", extractor, batches, len(source), classify=True)
    images = torch.cat([batch.images for batch in batches])
    assert isinstance(found.features, np.memmap)
    assert isinstance(found.probabilities, np.memmap)
    assert_close(found.features, extractor.features(images), 1e-5)
    assert_close(found.probabilities, extractor.probabilities(images), 1e-5)
    assert (len(found.features), len(found.bad), found.resized) == (7, 1, 7)
    assert extract_to(tmp_path, "again", extractor, batches, len(source)).probabilities is None


def test_a_pass_holds_a_few_batches_whatever_the_set(tmp_path: Path) -> None:
    """Of 40 batches as of 10: no images and no features are kept in memory."""

    class Counted(PixelFeatures):
        def features(self, images: Tensor) -> Tensor:
            return counted(super().features(images))

    now, most = 0, 0

    def counted(tensor: Tensor) -> Tensor:
        nonlocal now, most
        now += len(tensor)
        most = max(most, now)
        weakref.finalize(tensor, released, len(tensor))
        return tensor

    def released(count: int) -> None:
        nonlocal now
        now -= count

    def batches(count: int) -> Iterator[Batch]:
        numbers = torch.arange(5)
        for _ in range(count):
            images = counted(torch.zeros(5, 9, 12, 3, dtype=torch.uint8))
            yield Batch(images, numbers * 0, numbers < 0, numbers, numbers, [])

    held = []
    for count in (10, 40):
        most = 0
        found = extract_to(tmp_path, f"{count}", Counted((9, 12), 3), batches(count), 5 * count)
        assert len(found.features) == 5 * count
        held.append(most)
    assert held[0] == held[1] <= 4 * 5  # images and features, of this batch and of the next


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    source = open_source(IMAGES.numpy())
    extractor = PixelFeatures((9, 12), 3)
    batches = evaluation_batches(source, extractor.loading((9, 12)), batch_size=3)
    with pytest.raises(DataError, match=r"cannot write .* GB of features"):
        extract_to(tmp_path / "none", "samples", extractor, batches, len(source))
