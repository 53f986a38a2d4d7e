"""Generation on CUDA: run with `pytest -m gpu`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import nextblock as nb
from close import assert_close
from nextblock.training.run_folder import read_metrics
from nextblock.xar.passes import FastPasses
from tiny_generator import tiny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DATA = Path(__file__).parents[1] / "data"


def official() -> nb.XAR:
    sizes = json.loads((DATA / "xar_cell8.json").read_text())
    config = nb.XARConfig(
        width=sizes["dim"], depth=sizes["depth"], num_heads=sizes["heads"], dropout=0.0, attention_dropout=0.0
    )
    return nb.load_official_xar(DATA / "xar_cell8.pth", config).cuda().eval()


def test_golden_loss_and_samples_on_the_device() -> None:
    golden, model = np.load(DATA / "xar_cell8.npz"), official()
    labels = torch.from_numpy(golden["labels"]).cuda()
    latents = torch.from_numpy(golden["latents"]).cuda()
    times = torch.from_numpy(golden["times_entity_major"]).view(4, 2).T.cuda()
    noise = torch.from_numpy(golden["noise_entity_major"]).movedim(0, 1).flatten(1, 2).cuda()
    assert_close(model.loss(latents, labels, times=times, noise=noise).cpu(), golden["loss"], 1e-4)
    with torch.autocast("cuda", torch.bfloat16):
        assert_close(model.loss(latents, labels, times=times, noise=noise).cpu(), golden["loss"], 1e-2)
    name = "sample_em_steps6_cfg2.7"
    draws = list(torch.from_numpy(golden[f"{name}/draws"]))
    made = nb.sample_latents(model, labels, steps=6, guidance=2.7, draws=draws)
    assert_close(made.cpu(), golden[name], 1e-3)


@pytest.mark.parametrize("solver", ["euler", "heun", "euler_maruyama", "multistep"])
def test_samples_are_those_of_the_cpu(solver: str) -> None:
    model, labels = official(), torch.tensor([1, 2, 3])
    options = {"steps": 4, "solver": solver, "guidance": 2.0, "seed": 5}
    there = nb.sample_latents(model, labels, **options).cpu()
    assert_close(there, nb.sample_latents(model.cpu(), labels, **options), 1e-3)


@pytest.mark.parametrize("bf16", [False, True])
def test_compiled_and_recorded_passes_sample_the_same(bf16: bool) -> None:
    model = official()
    fast = FastPasses(model, bf16=bf16)
    # recorded, replayed, with rows of another number, with other labels, fewer, and more than there was room for
    runs = [(2.0, 0, [1, 2, 3]), (2.0, 1, [1, 2, 3]), (1.0, 1, [1, 2, 3]), (2.0, 1, [5, 0, 0]), (2.0, 2, [4])]
    for guidance, seed, asked in [*runs, (2.0, 2, [0, 1, 2, 3, 4]), (2.0, 0, [1, 2, 3])]:
        labels = torch.tensor(asked).cuda()
        options = {"steps": 4, "solver": "heun", "guidance": guidance, "seed": seed}
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            plain = nb.sample_latents(model, labels, **options)
        assert_close(
            nb.sample_latents(model, labels, passes=fast, **options).cpu(), plain.cpu(), 3e-2 if bf16 else 1e-3
        )
    assert fast._recorded


@pytest.mark.parametrize("compiled", [False, True])
def test_a_generator_in_bf16_trains_resumes_and_samples(tmp_path: Path, compiled: bool) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 8, 8, 3), dtype=np.uint8)
    data = {"train": (pixels, np.arange(40) % 2)}
    sections = tiny(training={"device": "cuda", "compile": compiled, "epochs": 4}, data=data)
    nb.train_generator(config="xar_cifar10", out=tmp_path / "run", quiet=True, **sections)
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    newest.rename(tmp_path / "gone")
    assert nb.train_generator(resume=tmp_path / "run", data=data, quiet=True).finished
    made = nb.sample(run=tmp_path / "run", n=4, steps=2, out=tmp_path / "samples", device="cuda", quiet=True)
    assert made.images == 4


def test_the_autoencoder_on_the_device(tmp_path: Path) -> None:
    from small_kl16 import write_kl16

    golden, vae = np.load(DATA / "kl16_small.npz"), nb.load_official_kl16(write_kl16(tmp_path / "kl16.ckpt")).cuda()
    with torch.no_grad():
        moments = vae.moments(torch.from_numpy(golden["images"]).cuda())
    assert_close(moments.cpu(), golden["moments"], 1e-3)
