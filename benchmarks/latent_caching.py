"""How fast are latents cached? `nextblock cache-latents` in batches against one image after the other.

    python -m benchmarks.latent_caching [--device cuda] [--data FOLDER] [--quick]

The autoencoder is the small KL-16 of the tests, with its own weights, and in the last row one of KL-16's width with
random weights, where nearly all is convolution. Plain is: open, crop as ADM does, encode the image and its mirror
image, write one file, next.

The limit is one large square product in float32; its rate, divided by the floating-point operations that the encoder
needs for an image and its mirror image. On a CPU an image of 128 px already keeps the convolutions busy: what a batch
can win there is in the layout and in what lies between the convolutions.
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
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Row, Target, interleaved, matmul, run_alone
from nextblock import cache_latents
from nextblock.checkpoints.vae_files import open_vae
from nextblock.data.latents.crop import adm_center_crop
from nextblock.vae import Autoencoder

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data" / "imagenet-sample"
SIZES_PX = (64, 128)
FULL_PX, FULL_IMAGES = 256, 3
FULL = {
    "block_out_channels": (128, 128, 256, 256, 512), "layers_per_block": 2, "latent_channels": 16,
    "down_block_types": ("DownEncoderBlock2D",) * 5, "up_block_types": ("UpDecoderBlock2D",) * 5,
}  # fmt: skip


def planned(device: str) -> list[Row]:
    """The rows, not measured."""
    names = [*(f"latent caching, {size} px" for size in SIZES_PX), f"latent caching, {FULL_PX} px, full width"]
    return [Row(name, "images/s", device, (Target("plain", ">=", 2.0),)) for name in names]


def rows(device: str, quick: bool = False, data: Path = DATA) -> list[Row]:
    """Measure them; `quick`: 16 images, once. Without the images nothing is measured."""
    found = planned(device)
    if not data.is_dir():
        return found
    with tempfile.TemporaryDirectory(prefix="nextblock-latents-") as name:
        folder = Path(name)
        small, full = write_vae(folder / "vae.ckpt"), write_full_vae(folder / "full")
        files = sample(data, folder / "images", 16 if quick else 128)
        few = sample(data, folder / "few", 1 if quick else FULL_IMAGES if device == "cpu" else 64)
        rounds = (0, 1) if quick else (1, 5)
        measured = [
            _row(row, size, files, small, folder, rounds, "small KL-16")
            for row, size in zip(found, SIZES_PX, strict=False)
        ]
        once = (0, 1) if quick else (1, 3) if device == "cpu" else rounds
        return [*measured, _row(found[-1], 32 if quick else FULL_PX, few, full, folder, once, "KL-16's width")]


def _row(row: Row, size: int, files: list[Path], vae: Path, folder: Path, rounds: tuple[int, int], called: str) -> Row:
    """`rounds`: for warming up, and measured."""
    ceiling, operations = matmul(2048 if row.device == "cpu" else 8192, torch.float32, row.device)
    arms = {
        "ours": ours(files[0].parent, vae, folder / f"ours{size}", size, row.device),
        "plain": plain(files, vae, folder / f"plain{size}", size, row.device),
        "limit": ceiling,
    }
    warmup, measured = rounds
    timings = interleaved(arms, rounds=measured, warmup=warmup, device=row.device)
    count = float(len(files))
    filled = timings.row(row, {"ours": count, "plain": count, "limit": operations / encoder_flops(vae, size)})
    note = (
        f"{len(files)} images with their mirror images, {called}, batches of 32, no workers; limit: a float32 product"
    )
    return replace(filled, note=note)


def encoder_flops(vae: Path, size: int) -> float:
    """Floating-point operations of the products and convolutions for an image and its mirror image."""
    model = open_vae(vae)
    assert isinstance(model, Autoencoder)
    with FlopCounterMode(display=False) as counter:
        model.to("meta").moments(torch.empty(2, 3, size, size, device="meta"))
    return float(counter.get_total_flops())


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


def write_full_vae(folder: Path) -> Path:
    """An autoencoder of KL-16's width with random weights, in diffusers' layout."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(**FULL).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    run_alone(__doc__, rows, devices=True, data=DATA)
