from __future__ import annotations

import logging
import runpy
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

import nextblock
from close import assert_close
from nextblock.checkpoints import graphs
from nextblock.checkpoints.graphs import Exportable, GraphConfig, open_graph, require_format, write_graph
from nextblock.errors import ConfigError, RunError
from nextblock.xtra.classifier import Classifier, HeadConfig, LayerMean
from nextblock.xtra.config import XTRAConfig
from nextblock.xtra.model import Encoder

CONFIG = XTRAConfig(
    image_size_px=(8, 16), patch_size_px=4, cell_size=2, width=32, depth=2, num_heads=2, predictor_depth=1
)  # fmt: skip
FORMATS = ("onnx", "torch")
STATISTICS = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
TOLERANCE = {"onnx": 1e-5, "torch": 0.0}


def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder(CONFIG).eval()


def classifier(kind: str) -> Classifier:
    torch.manual_seed(0)
    model = Classifier(CONFIG, HeadConfig(kind, LayerMean(1, 2), num_heads=4), ("a", "b", "c"))  # type: ignore[arg-type]
    torch.nn.init.normal_(model.head.norm.running_mean)
    return model.eval()


@pytest.fixture(scope="module", params=FORMATS)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A format, and a folder with the tokens' graph."""
    folder = tmp_path_factory.mktemp(request.param)
    assert write_graph(Exportable(encoder(), GraphConfig(), (8, 16)), folder, request.param) == [
        folder / graphs.FILES[request.param]
    ]
    return request.param, folder


def test_tokens_at_every_batch_size_under_the_mask(written: tuple[str, Path]) -> None:
    format, folder = written
    run = open_graph(folder, format, threads=1)
    for batch in (1, 3, 8):
        images = torch.randn(batch, 3, 8, 16)
        found = run(images)
        assert found.shape == (batch, 8, 32)
        assert_close(found, encoder().features(images), TOLERANCE[format])
    other = images.clone()
    other[..., 8:] += 1  # the second of two cells
    early, late = [0, 1, 4, 5], [2, 3, 6, 7]  # tokens, raster order
    changed = run(other)
    assert torch.equal(changed[:, early], found[:, early])
    assert (changed[:, late] - found[:, late]).abs().amin() > 0


def test_pooled_tokens_of_pixels_without_the_mask(tmp_path: Path) -> None:
    config = GraphConfig("pooled", final_norm=True, bidirectional=True)
    write_graph(Exportable(encoder(), config, (8, 16), STATISTICS), tmp_path, "onnx")
    pixels = torch.randint(0, 256, (3, 8, 16, 3), dtype=torch.uint8)
    mean, std = (torch.tensor(values) for values in STATISTICS)
    images = ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)
    expected = encoder()(images, bidirectional=True).mean(1)
    assert_close(open_graph(tmp_path, "onnx", threads=1)(pixels), expected, 1e-5)


@pytest.mark.parametrize(("format", "kind"), [("onnx", "attentive"), ("torch", "linear")])
def test_logits(format: str, kind: str, tmp_path: Path) -> None:
    write_graph(Exportable(classifier(kind), GraphConfig("logits"), (8, 16)), tmp_path, format)
    for batch in (1, 3):
        images = torch.randn(batch, 3, 8, 16)
        found: Tensor = open_graph(tmp_path, format, threads=1)(images)
        assert_close(found, classifier(kind)(images), 1e-5)


def test_the_file_holds_the_weights_once_and_no_paths_or_pickles(written: tuple[str, Path]) -> None:
    format, folder = written
    file = folder / graphs.FILES[format]
    content = {"": file.read_bytes()}
    if format == "torch":
        with zipfile.ZipFile(file) as archive:
            content = {name: archive.read(name) for name in archive.namelist()}
    home = str(Path(nextblock.__file__).parents[1]).encode()
    assert not any(home in data for data in content.values())
    weights = sum(p.numel() * 4 for p in encoder().parameters())
    stored = sum(len(data) for name, data in content.items() if "/weights/weight_" in name or format == "onnx")
    assert weights <= stored + 100 < weights + 60_000
    assert not any(b"nextblock" in data for name, data in content.items() if name.endswith(".pt"))


def test_large_weights_go_into_a_second_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "ONE_FILE_BYTES", 1000)
    module = Exportable(encoder(), GraphConfig(), (8, 16))
    files = write_graph(module, tmp_path, "onnx")
    assert [file.name for file in files] == ["model.onnx", "model.onnx.data"]
    assert files[0].stat().st_size < files[1].stat().st_size
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    images = torch.randn(2, 3, 8, 16)
    assert_close(open_graph(moved, "onnx", threads=1)(images), module(images), 1e-5)


def test_nothing_is_printed_and_no_warning_lost(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for format in FORMATS:
            write_graph(Exportable(encoder(), GraphConfig(), (8, 16)), tmp_path, format)
            open_graph(tmp_path, format, threads=1)
        log = logging.getLogger("torch.onnx._internal.exporter._registration")  # it speaks once in a process
        assert log.isEnabledFor(logging.WARNING)
        with graphs._without_noise():
            assert not log.isEnabledFor(logging.WARNING)
            warnings.warn("about the model", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in told] == ["about the model"]
    assert capfd.readouterr() == ("", "")


def test_what_cannot_be_computed_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"output must be one of .*got 'logit'. Did you mean 'logits'"):
        GraphConfig("logit")
    with pytest.raises(ConfigError, match="last_layers must be at least 1; got 0"):
        GraphConfig(last_layers=0)
    with pytest.raises(ConfigError, match="last layer alone"):
        GraphConfig(last_layers=2, final_norm=True)
    for given in ({"last_layers": 2}, {"final_norm": True}, {"bidirectional": True}):
        with pytest.raises(ConfigError, match="leave out"):
            GraphConfig("logits", **given)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"depth \(2\); got 3"):
        Exportable(encoder(), GraphConfig(last_layers=3), (8, 16))
    with pytest.raises(ConfigError, match="needs a Classifier; got model Encoder"):
        Exportable(encoder(), GraphConfig("logits"), (8, 16))


def test_formats_and_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"one of onnx, torch; got 'onx'\. Did you mean 'onnx'"):
        require_format("onx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RunError, match=r"onnx needs onnxruntime\. .*pip install 'nextblock\[onnx\]'"):
        require_format("onnx")
    require_format("torch")


def test_the_module_is_imported_without_the_packages_of_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in graphs.ONNX_PACKAGES:
        monkeypatch.setitem(sys.modules, name, None)
    runpy.run_path(graphs.__file__, run_name="another")
