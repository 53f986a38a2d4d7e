"""Real processes of `nextblock sample`: killed, stopped, and continued by two at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from nextblock.checkpoints.pretrained import save_pretrained
from nextblock.data.preprocess import Preprocessing
from nextblock.vae import Pixels
from nextblock.xar.config import XARConfig
from nextblock.xar.model import XAR
from processes import finish, start

COUNT, BATCH = 200, 4
ASKED = [f"--n={COUNT}", f"--batch_size={BATCH}", "--steps=4", "--guidance=2", "--device=cpu", "--animation=2"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exported weights of a tiny generator that has learned nothing."""
    torch.manual_seed(0)
    model = XAR(XARConfig(8, 1, 1, entity_size=4, width=32, depth=4, num_heads=2, num_classes=3))
    preprocessing = Preprocessing((8, 8), resize_px=8, channels=1)
    about = {
        "vae": Pixels(1).identity(), "classes": ["a", "b", "c"], "image_size_px": [8, 8], "channels": 1,
        "weights": "ema",
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("generator") / "exported"
    return save_pretrained(folder, model, preprocessing.to_dict(), "", {"generator": about})


def images(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "images").glob("[0-9]*.png")}


def wait_for_images(process: subprocess.Popen[str], folder: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        if len(images(folder)) >= count:
            return
        time.sleep(0.01)
    raise AssertionError(f"{count} images were not reached")


@pytest.mark.slow  # forked processes are killed in tests/faults
def test_killed_and_stopped_jobs_end_with_the_images_of_one_that_was_not(weights: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    arguments = [str(weights), "--classes", "b,0", "--npz", *ASKED, "--out"]
    uninterrupted = start([*arguments, str(whole)], verb="sample")

    killed = start([*arguments, str(cut)], verb="sample")
    wait_for_images(killed, cut, 10)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    there = len(images(cut))
    assert there < COUNT

    stopped = start([*arguments, str(cut)], verb="sample")
    wait_for_images(stopped, cut, there + 10)
    os.killpg(stopped.pid, signal.SIGINT)
    output, _ = stopped.communicate(timeout=120)
    assert stopped.returncode == 130, output
    assert "Traceback" not in output
    assert "stopping when this solver step is done;" in output
    assert f"--out {cut}" in output
    assert len(images(cut)) < COUNT
    assert not (cut / "samples.npz").exists()
    assert json.loads((cut / "sample.json").read_text())["finished"] is None

    # Two processes make the others: the images do not depend on how many there are.
    output = finish(start([*arguments, str(cut), "--devices=2"], verb="sample"))
    assert output.count(f"going on in {cut}") == 1
    assert "istributed" not in output  # how the processes find each other is nobody's concern
    assert output.count(f"{COUNT} images and contact-sheet.png in") == 1
    finish(uninterrupted)
    assert images(cut) == images(whole)
    assert len(images(whole)) == COUNT
    assert (cut / "samples.npz").stat().st_size == (whole / "samples.npz").stat().st_size
    assert json.loads((cut / "sample.json").read_text())["finished"]
    assert not list(cut.rglob(".*"))
