"""Run with `pytest -m gpu` on a machine with CUDA."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import nextblock as nb
from close import assert_close
from nextblock.jobs.pretrain import pretrain
from nextblock.training.run_folder import read_metrics
from tiny_run import tiny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DATA = Path(__file__).parents[1] / "data"


def test_golden_loss_on_the_device() -> None:
    sizes = json.loads((DATA / "xtra_base.json").read_text())
    config = nb.XTRAConfig(
        image_size_px=sizes["img_size"], patch_size_px=sizes["patch_size"], cell_size=sizes["block_size"],
        width=sizes["embed_dim"], depth=sizes["depth"], num_heads=sizes["num_heads"],
        projection_hidden=sizes["proj_hidden"], predictor_width=sizes["pred_dim"], predictor_depth=sizes["pred_depth"],
        predictor_heads=sizes["pred_heads"], head_hidden=sizes["head_hidden"],
    )  # fmt: skip
    golden = np.load(DATA / "xtra_base.npz")
    model = nb.load_official_xtra(DATA / "xtra_base.ckpt", config).cuda()
    images = torch.from_numpy(golden["images"]).cuda()
    assert_close(model.loss(images), golden["loss"], 1e-4)
    with torch.autocast("cuda", torch.bfloat16):
        assert_close(model.loss(images), golden["loss"], 1e-2)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_run_in_bf16_trains_and_resumes(tmp_path: Path, compiled: bool) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 16, 16, 3), dtype=np.uint8)
    sections = tiny(training={"device": "cuda", "compile": compiled, "epochs": 4}, data={"train": pixels})
    pretrain(config="xtra_cifar10", out=tmp_path / "run", quiet=True, **sections)
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    newest.rename(tmp_path / "gone")
    done = pretrain(resume=tmp_path / "run", data={"train": pixels}, quiet=True)
    assert done is not None
    assert done.steps == 20
