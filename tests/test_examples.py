"""The examples run, in small, and do what they say."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from nextblock.jobs.xar_pipeline import XARPipeline
from nextblock.vae import Pixels
from nextblock.xar.config import XARConfig
from nextblock.xar.model import XAR
from nextblock.xtra.config import XTRAConfig
from nextblock.xtra.model import Encoder

EXAMPLES = Path(__file__).parents[1] / "examples"
FILES = sorted(EXAMPLES.glob("*.py"))


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """Runs an example as a script in this process; returns what it printed."""

    def run(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def encoder(folder: Path) -> Path:
    config = XTRAConfig(image_size_px=16, patch_size_px=4, cell_size=2, width=16, depth=1, num_heads=2)
    return Encoder(config).save_pretrained(folder)


def test_the_table_names_every_example() -> None:
    table = (EXAMPLES / "README.md").read_text()
    assert re.findall(r"^\| \[`(\w+\.py)`\]\(\1\)", table, flags=re.M) != []
    assert sorted(re.findall(r"^\| \[`(\w+\.py)`\]\(\1\)", table, flags=re.M)) == [file.name for file in FILES]
    assert all(f"`python examples/{file.name}`" in table for file in FILES)


def test_an_example_is_a_page() -> None:
    assert all(len(file.read_text().splitlines()) <= 90 for file in FILES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_help_says_what_it_does(file: Path, example, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(SystemExit) as done:
        example(file.name, "--help")
    assert done.value.code == 0
    said = " ".join(capsys.readouterr().out.split()).replace("- ", "-")  # lines may end at a hyphen
    first = file.read_text().splitlines()[0].strip('"')
    assert first in said
    assert "--weights" in said


def test_own_training_loop(example, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    said = example("own_training_loop.py", "--epochs", 4, "--device", "cpu")
    assert said.startswith("no --weights")
    (accuracy,) = re.findall(r"accuracy on 360 held-out digits: ([\d.]+) %", said)
    assert float(accuracy) > 60  # a tenth by chance
    said = example("own_training_loop.py", "--epochs", 1, "--device", "cpu", "--weights", encoder(tmp_path / "mine"))
    assert "no --weights" not in said
    assert "held-out digits" in said


@pytest.mark.parametrize("mask", [[], ["--bidirectional"]])
def test_dense_features(mask: list[str], example, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    sizes = ["--sizes", "64x96", "50x75", "--device", "cpu", *mask]
    said = example("dense_features.py", "--steps", 60, *sizes)
    assert "images of 64x96 px: feature map [1, 48, 4, 6]" in said
    assert "images of 50x75 px: feature map [1, 48, 4, 5]" in said
    first, last = map(float, re.findall(r"([\d.]+) at (?:first|last)", said))
    assert last < first / 3  # a constant reaches about half
    said = example("dense_features.py", "--steps", 1, *sizes, "--weights", encoder(tmp_path / "mine"))
    assert "images of 50x75 px: feature map [1, 16, 13, 19]" in said


def test_generate(example, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "grid.png"
    said = example("generate.py", "--steps", 2, "--device", "cpu", "--classes", "red", 2, "--out", out)
    assert f"4 images: {out}" in said
    assert Image.open(out).size == (2 * 96 + 4, 2 * 96 + 4)
    torch.manual_seed(0)
    sizes = XARConfig(latent_size=8, latent_channels=1, patch_size=2, entity_size=2, width=16, depth=2, num_heads=2,
                      num_classes=0)  # fmt: skip
    weights = XARPipeline(XAR(sizes), Pixels(1)).save_pretrained(tmp_path / "weights")
    said = example("generate.py", "--steps", 1, "--device", "cpu", "--weights", weights, "--each", 3, "--out", out)
    assert f"3 images: {out}" in said


def test_a_script_needs_nothing_of_ours_but_the_package(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(EXAMPLES / "generate.py"),
        "--steps",
        "1",
        "--device",
        "cpu",
        "--guidance_scale",
        "2",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "generated.png").is_file()
