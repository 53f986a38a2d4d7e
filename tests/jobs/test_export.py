from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from close import assert_close
from nextblock.checkpoints import hub
from nextblock.checkpoints.pretrained import save_pretrained
from nextblock.data.preprocess import Preprocessing
from nextblock.errors import CheckpointError, ConfigError, DataError, RunError
from nextblock.jobs import export as job
from nextblock.jobs import export_report
from nextblock.jobs.embed import embed
from nextblock.jobs.export import export
from nextblock.jobs.export_card import _snippet
from nextblock.jobs.predict import predict
from nextblock.xar.config import XARConfig
from nextblock.xar.model import XAR
from nextblock.xtra.classifier import Classifier, HeadConfig, LayerMean
from nextblock.xtra.config import XTRAConfig
from tiny_run import TINY

CLASSES = ("left", "top", "neither")
FILES = ["README.md", "config.json", "preprocessor_config.json", "result.json", "table.md"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_report, "MOST_RUNS", 1)


def classifier(folder: Path, channels: int = 3) -> Path:
    torch.manual_seed(0)
    config = XTRAConfig.from_dict({**XTRAConfig().to_dict(), **TINY["model"], "channels": channels})
    model = Classifier(config, HeadConfig("attentive", LayerMean(1, 2, True), num_heads=4), CLASSES)
    for parameter in model.head.parameters():
        torch.nn.init.normal_(parameter)
    preprocessing = Preprocessing((16, 16), resize_px=16, channels=channels)
    return save_pretrained(folder, model, preprocessing.to_dict(), "a card")


def photo(path: Path) -> Path:
    """A square picture, which every way of resizing and cropping sees alike."""
    pixels = np.random.default_rng(1).integers(0, 256, (40, 40, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path, "PNG")
    return path


def run_readme(folder: Path, name: str, without: tuple[str, ...]) -> tuple[np.ndarray, str]:
    """The output of the README's code, run where the packages `without` cannot be imported, and what it printed."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", (folder / "README.md").read_text(), flags=re.M | re.S)
    assert len(code.splitlines()) <= 28
    blocked = "".join(f"sys.modules[{package!r}] = None\n" for package in without)
    code = f"import sys\n{blocked}{code}np.save('found.npy', {name})\n"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return np.load(folder / "found.npy"), done.stdout


VIEWS = {
    "293 for 256": Preprocessing((256, 256), resize_px=293),
    "8/7": Preprocessing((224, 224)),
    "odd, gray": Preprocessing((97, 97), resize_px=110, channels=1),
    "wide": Preprocessing((128, 256), resize_px=150),
    "high": Preprocessing((256, 128), resize_px=150),
}


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (333, 334), (64, 1000)])
@pytest.mark.parametrize("view", VIEWS)
def test_the_readme_sees_the_pixels_that_we_see(view: str, size: tuple[int, int], tmp_path: Path) -> None:
    preprocessing = VIEWS[view]
    pixels = np.random.default_rng(2).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.jpg", "PNG")
    about = {"format": "torch", "input": {"name": "images"}, "output": {"name": "tokens"}}
    code, _, _ = _snippet(about, preprocessing).partition("graph = ")
    assert len(code.splitlines()) <= 19
    found: dict[str, Any] = {}
    exec(code.replace("photo.jpg", str(tmp_path / "photo.jpg")), found)
    expected = preprocessing(str(tmp_path / "photo.jpg"))
    assert_close(found["images"], expected, 1e-5)


def test_the_tokens_of_a_run_as_onnx(
    run: Path, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = export(run=run, out=tmp_path / "graph", images=images)
    told = capfd.readouterr()
    assert told.err == ""
    assert "float32 [batch, 3, 16, 16] to tokens, block-causal" in told.out.replace("\n", "")
    assert made.folder == tmp_path / "graph"
    assert 0 < made.difference < 1e-5
    assert sorted(path.name for path in made.folder.iterdir()) == [*FILES[:2], "model.onnx", *FILES[2:]]
    about = json.loads((made.folder / "config.json").read_text())
    assert about["output"] == {"name": "tokens", "shape": ["batch", 16, 16], "dtype": "float32"}
    assert (about["attention"], about["layers"], about["source"]["run"]) == ("block-causal", [2, 2], "tiny")
    assert about["source"]["sha256"] == json.loads((run / "exported" / "config.json").read_text())["sha256"]
    preprocessing = json.loads((made.folder / "preprocessor_config.json").read_text())
    assert preprocessing == json.loads((run / "exported" / "preprocessor_config.json").read_text())
    names = [row["format"] for row in json.loads((made.folder / "result.json").read_text())["rows"]]
    assert names == ["PyTorch, eager", "onnx"]
    assert (made.folder / "table.md").read_text().count("\n| ") == 3
    picture = photo(made.folder / "photo.jpg")
    found, _ = run_readme(made.folder, "tokens", without=("nextblock", "torch"))
    expected = embed(run=run, images=[str(picture)], pool=False, workers=0, quiet=True).features
    assert_close(found, expected, 1e-5)


def test_the_logits_of_pixels_as_torch(images: Path, tmp_path: Path) -> None:
    weights = classifier(tmp_path / "weights")
    made = export(run=weights, format="torch", images=images, uint8=True, quiet=True)
    assert made.folder == tmp_path / "weights_torch"
    assert made.difference == 0
    about = json.loads((made.folder / "config.json").read_text())
    assert about["input"]["shape"] == ["batch", 16, 16, 3]
    assert (about["input"]["dtype"], about["classes"], about["attention"]) == ("uint8", list(CLASSES), "bidirectional")
    assert json.loads((made.folder / "result.json").read_text())["same_class"] == 12
    picture = photo(made.folder / "photo.jpg")
    found, printed = run_readme(made.folder, "logits", without=("nextblock", "onnx"))
    expected = predict(run=weights, images=[str(picture)], workers=0, top=3, quiet=True)
    assert_close(torch.from_numpy(found).softmax(1).sort(1, descending=True).values, expected.probabilities, 1e-5)
    assert printed.strip() == expected.classes[0, 0]


@pytest.mark.parametrize("name", ["hf:somebody/model", "hf:somebody/model@pr/1"])
def test_weights_of_the_hub_are_exported_to_the_current_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = classifier(tmp_path / "cache" / "snapshot")
    monkeypatch.setattr(hub, "fetch", lambda name, **options: snapshot)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    made = export(run=name, format="torch", quiet=True)
    assert made.folder == Path("model_torch")
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["model_torch"]
    assert list((tmp_path / "cache").iterdir()) == [snapshot]


@pytest.mark.parametrize("channels", [1, 4])
def test_photographs_that_come_with_a_package_are_the_default(channels: int, tmp_path: Path) -> None:
    made = export(run=classifier(tmp_path / "weights", channels), format="torch", output="pooled", quiet=True)
    assert made.difference == 0
    assert "photographs of scikit-learn" in json.loads((made.folder / "result.json").read_text())["images"]
    if channels == 1:
        photo(made.folder / "photo.jpg")
        found, _ = run_readme(made.folder, "pooled", without=("nextblock",))
        assert found.shape == (1, 16)


def test_a_run_without_an_export_and_few_images_some_broken(
    run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("exported"))
    few = tmp_path / "few"
    shutil.copytree(images / "top", few, ignore=shutil.ignore_patterns("*[3-9].png", "01*"))
    (few / "001.png").write_bytes(b"no")
    made = export(run=tmp_path / "run", format="torch", images=few)
    assert made.folder == tmp_path / "run" / "exported_torch"
    assert "left out: 001.png" in capsys.readouterr().out
    (step,) = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1:]
    stored = json.loads((step / "checkpoint.json").read_text())["sha256"]
    assert json.loads((made.folder / "config.json").read_text())["source"]["sha256"] == stored
    (few / "000.png").write_bytes(b"no")
    (few / "002.png").write_bytes(b"no")
    with pytest.raises(DataError, match="none of the 3 images"):
        export(run=tmp_path / "run", format="torch", images=few, out=tmp_path / "x", quiet=True)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("wrong", [1.001, float("nan")])
def test_a_graph_that_differs_leaves_no_folder(
    wrong: float, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*given: Any) -> Any:
        graph = original(*given)

        def differing(x: Tensor) -> Tensor:
            return graph(x) * (wrong if len(x) == 8 else 1)

        return differing

    original = job.open_graph
    monkeypatch.setattr(job, "open_graph", opened)
    with pytest.raises(RunError, match=r"differs from PyTorch by (1.0e-03|nan) .* batch of 8; 1e-04 is allowed"):
        export(run=run, format="torch", out=tmp_path / "graph", quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_leave_no_folder(tmp_path: Path) -> None:
    config = XTRAConfig.from_dict({**XTRAConfig().to_dict(), **TINY["model"]})
    model = Classifier(config, HeadConfig("linear", LayerMean(2, 2)), CLASSES)
    torch.nn.init.constant_(model.encoder.position, float("nan"))
    weights = save_pretrained(tmp_path / "nan", model, Preprocessing((16, 16)).to_dict(), "a card")
    with pytest.raises(CheckpointError, match="not finite"):
        export(run=weights, format="torch", quiet=True)
    assert list(tmp_path.iterdir()) == [weights]


def test_what_cannot_be_exported_is_refused_before_any_work(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*given: Any) -> None:
        raise AssertionError("started to write")

    monkeypatch.setattr(job, "write_graph", never)
    with pytest.raises(ConfigError, match=r"got 'onnxx'\. Did you mean 'onnx'"):
        export(run=run, format="onnxx")
    with pytest.raises(ConfigError, match=r"got 'token'\. Did you mean 'tokens'"):
        export(run=run, output="token")
    with pytest.raises(RunError, match="knows no classes"):
        export(run=run, output="logits")
    with pytest.raises(ConfigError, match=r"depth \(2\); got 3"):
        export(run=run, last_layers=3)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(RunError, match="mine exists already, and nothing is ever overwritten"):
        export(run=run, out=tmp_path / "mine")
    generator = XAR(XARConfig(latent_size=4, latent_channels=3, width=16, depth=2, num_heads=2, entity_size=2))
    weights = save_pretrained(tmp_path / "generator", generator, {"size_px": [4, 4]}, "a card")
    with pytest.raises(RunError, match=r"generators are not exported: .*nextblock sample"):
        export(run=weights)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(RunError, match=r"needs onnxscript\. .*pip install 'nextblock\[onnx\]'"):
        export(run=run)
