"""How fast are latents cached? `nextblock cache-latents` in batches against one image after the other.

    python -m benchmarks.latent_caching [--device cuda] [--data FOLDER] [--quick]

The autoencoder is the small KL-16 of the tests, with its own weights; a step of its work is so short that this measures
the way around it. Plain is: open, crop as ADM does, encode the image and its mirror image, write one file, next.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.measure import Row, Target, interleaved, run_alone
from nextblock import cache_latents
from nextblock.checkpoints.vae_files import open_vae
from nextblock.data.latents.crop import adm_center_crop
from nextblock.vae import Autoencoder

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data" / "imagenet-sample"
SIZES_PX = (64, 128)


def planned(device: str) -> list[Row]:
    """The rows, not measured."""
    return [Row(f"latent caching, {size} px", "images/s", device, (Target("plain", ">=", 2.0),)) for size in SIZES_PX]


def rows(device: str, quick: bool = False, data: Path = DATA) -> list[Row]:
    """Measure them; `quick`: 16 images, once. Without the images nothing is measured."""
    found = planned(device)
    if not data.is_dir():
        return found
    with tempfile.TemporaryDirectory(prefix="nextblock-latents-") as name:
        folder = Path(name)
        vae = write_vae(folder / "vae.ckpt")
        files = sample(data, folder / "images", 16 if quick else 128)
        return [_row(row, size, files, vae, folder, quick) for row, size in zip(found, SIZES_PX, strict=True)]


def _row(row: Row, size: int, files: list[Path], vae: Path, folder: Path, quick: bool) -> Row:
    arms = {
        "ours": ours(files[0].parent, vae, folder / f"ours{size}", size, row.device),
        "plain": plain(files, vae, folder / f"plain{size}", size, row.device),
    }
    timings = interleaved(arms, rounds=1 if quick else 5, warmup=1, device=row.device)
    filled = timings.row(row, dict.fromkeys(arms, len(files)))
    return replace(filled, note=f"{len(files)} images with their mirror images, small KL-16, batches of 32, no workers")


def sample(data: Path, folder: Path, images: int) -> list[Path]:
    """So many of the files below `data`, evenly, in a folder of their own."""
    found = sorted(file for file in data.rglob("*") if file.is_file())
    folder.mkdir()
    chosen = [folder / f"{n:05d}.jpg" for n in range(min(images, len(found)))]
    for n, file in enumerate(chosen):
        file.symlink_to(found[n * len(found) // len(chosen)])
    return chosen


def ours(images: Path, vae: Path, out: Path, size: int, device: str) -> Callable[[], object]:
    turns = count()
    return lambda: cache_latents(
        dataset=str(images),
        vae=vae,
        out=f"{out}-{next(turns)}",
        image_size_px=size,
        workers=0,
        device=device,
        quiet=True,
    )


def plain(files: list[Path], vae: Path, out: Path, size: int, device: str) -> Callable[[], object]:
    turns = count()

    def run() -> None:
        folder = Path(f"{out}-{next(turns)}")
        folder.mkdir()
        model = open_vae(vae).to(device)  # as ours does
        assert isinstance(model, Autoencoder)
        for file in files:
            pixels = adm_center_crop(np.asarray(Image.open(file).convert("RGB")), size)
            with torch.no_grad():
                x = (torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1).to(device)
                moments, mirrored = (model.moments(each)[0].half().cpu().numpy() for each in (x, x.flip(3)))
            np.savez(folder / f"{file.stem}.npz", moments=moments, moments_flip=mirrored)

    return run


def write_vae(file: Path) -> Path:
    """The small autoencoder of the tests, in the official layout."""
    spec = importlib.util.spec_from_file_location("small_kl16", ROOT / "tests" / "small_kl16.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.write_kl16(file)


if __name__ == "__main__":
    run_alone(__doc__, rows, devices=True, data=DATA)
