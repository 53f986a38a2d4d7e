"""An encoder as the backbone of a dense task, on images of other sizes and shapes than it was trained with.

python examples/dense_features.py [--weights runs/mine] [--sizes 320x448 250x333] [--bidirectional]

The task is made up: find the disc in a noisy picture. The head is two convolutions.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nextblock as nb
from nextblock.errors import NextblockError


class Segmenter(nn.Module):
    """Images [B, C, H, W] of any size -> one logit a pixel, [B, H, W]."""

    def __init__(self, encoder: nb.Encoder, bidirectional: bool) -> None:
        super().__init__()
        self.encoder, self.bidirectional = encoder, bidirectional
        width = encoder.config.width
        self.head = nn.Sequential(nn.Conv2d(width, 32, 3, padding=1), nn.GELU(), nn.Conv2d(32, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        # [B, D, h, w]. pad: any size is taken; the map has the patches that hold pixels. bidirectional: every place
        # knows the whole image, not only what comes before it in the order of pre-training.
        features = self.encoder.feature_map(images, bidirectional=self.bidirectional, pad=True)
        (height, width), (p, q) = images.shape[-2:], self.encoder.config.patch
        logits = F.interpolate(self.head(features), scale_factor=(p, q), mode="bilinear")
        return logits[:, 0, :height, :width]  # the last patches may reach beyond the image


def discs(count: int, channels: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Noise with a brighter disc: images [B, C, H, W], about normalised, and masks [B, H, W] of 0 and 1."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    radius = torch.empty(count, 1, 1).uniform_(0.15, 0.3) * min(height, width)
    top, left = torch.rand(count, 1, 1) * height, torch.rand(count, 1, 1) * width
    masks = ((y - top) ** 2 + (x - left) ** 2 < radius**2).float()
    return torch.randn(count, channels, height, width) + masks[:, None], masks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", help="a run, a folder of weights, or owner/name on the Hugging Face hub")
    parser.add_argument("--sizes", nargs="+", default=["320x448", "250x333"], help="HEIGHTxWIDTH, taking turns")
    parser.add_argument("--bidirectional", action="store_true", help="no mask: every token sees the whole image")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    torch.manual_seed(0)
    if given.weights:
        encoder = nb.Encoder.from_pretrained(given.weights).train()
    else:
        print("no --weights: a tiny random encoder")
        encoder = nb.Encoder(nb.XTRAConfig(image_size_px=128, cell_size=2, width=48, depth=2, num_heads=3))
    model = Segmenter(encoder, given.bidirectional).to(given.device)
    sizes = [tuple(int(side) for side in size.split("x")) for size in given.sizes]
    for height, width in sizes:
        images = discs(1, encoder.config.channels, height, width)[0].to(given.device)
        features = encoder.feature_map(images, bidirectional=given.bidirectional, pad=True)
        print(f"images of {height}x{width} px: feature map {list(features.shape)}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(given.steps):
        images, masks = (x.to(given.device) for x in discs(4, encoder.config.channels, *sizes[step % len(sizes)]))
        loss = F.binary_cross_entropy_with_logits(model(images), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    few = -(-given.steps // 4)
    print(f"loss: {sum(losses[:few]) / few:.3f} at first, {sum(losses[-few:]) / few:.3f} at last")


if __name__ == "__main__":
    try:
        main()
    except (NextblockError, ValueError) as error:
        raise SystemExit(f"dense_features: {error}") from None
