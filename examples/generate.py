"""Make images with a trained generator and put them into one picture.

python examples/generate.py --weights owner/name --classes 207 tabby --guidance_scale 2.7 --steps 40
"""

from __future__ import annotations

import argparse
import math

import torch
from PIL import Image

import nextblock as nb
from nextblock.errors import NextblockError
from nextblock.vae import Pixels


def opened(weights: str | None, vae: str | None, device: str) -> nb.XARPipeline:
    """Of a run, a folder of weights or a name on the hub; without one, something small that always runs."""
    if weights:
        return nb.XARPipeline.from_pretrained(weights, vae=vae, device=device)
    print("no --weights: a tiny random generator in pixel space; its images are noise")
    torch.manual_seed(0)
    config = nb.XARConfig(
        latent_size=16, latent_channels=3, patch_size=4, entity_size=2, width=32, depth=2, num_heads=2, num_classes=3
    )
    return nb.XARPipeline(nb.XAR(config), Pixels(3), ["red", "green", "blue"]).to(device)


def grid(images: list[Image.Image], shown_px: int = 96, gap_px: int = 4) -> Image.Image:
    """About as many rows as columns; small images are enlarged by a whole number, so that pixels stay pixels."""
    times = max(1, -(-shown_px // images[0].width))
    width, height = (side * times for side in images[0].size)
    columns = math.ceil(math.sqrt(len(images)))
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap_px) - gap_px, rows * (height + gap_px) - gap_px), "white")
    for i, image in enumerate(images):
        large = image.resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(large, (i % columns * (width + gap_px), i // columns * (height + gap_px)))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", help="a run, a folder of weights, or owner/name on the Hugging Face hub")
    parser.add_argument("--vae", help="where the VAE is, if not where the weights say")
    parser.add_argument("--classes", nargs="+", help="numbers or names; by default the first ones")
    parser.add_argument("--each", type=int, default=2, help="images of every class")
    parser.add_argument("--guidance_scale", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", default="generated.png")
    given = parser.parse_args()
    pipe = opened(given.weights, given.vae, given.device)
    options = {"num_inference_steps": given.steps, "generator": torch.Generator().manual_seed(given.seed)}
    if pipe.classes:
        labels = given.classes or list(range(min(8, len(pipe.classes))))
        images = pipe(labels, given.guidance_scale, num_images_per_label=given.each, **options).images
    else:
        images = pipe(batch_size=given.each, **options).images
    grid(images).save(given.out)
    print(f"{len(images)} images: {given.out}")


if __name__ == "__main__":
    try:
        main()
    except (NextblockError, ValueError) as error:
        raise SystemExit(f"generate: {error}") from None
