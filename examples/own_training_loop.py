"""Fine-tune an encoder in a training loop of your own: plain PyTorch, scikit-learn's handwritten digits.

python examples/own_training_loop.py [--weights runs/mine | --weights owner/name]
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import nextblock as nb
from nextblock.errors import NextblockError


def encoder_and_preprocessing(weights: str | None) -> tuple[nb.Encoder, nb.Preprocessing]:
    """Of a run, a folder of weights or a name on the hub; without one, something small that always runs."""
    if weights:
        return nb.Encoder.from_pretrained(weights), nb.Preprocessing.from_pretrained(weights)
    print("no --weights: a tiny random encoder, which starts from nothing")
    config = nb.XTRAConfig(image_size_px=16, channels=1, patch_size_px=4, cell_size=2, width=64, depth=3, num_heads=4)
    return nb.Encoder(config), nb.Preprocessing(config.image, resize_px=16, channels=1)


def digits(preprocessing: nb.Preprocessing) -> tuple[Tensor, Tensor]:
    """1797 images [N, C, H, W], as the encoder wants them, and labels [N]; in an order of chance that is always one."""
    found = load_digits()
    pixels = (found.images * (255 / 16)).astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(pixels))
    return preprocessing(list(pixels[order])), torch.from_numpy(found.target[order])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", help="a run, a folder of weights, or owner/name on the Hugging Face hub")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3, help="take less, such as 1e-4, for a pre-trained encoder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    torch.manual_seed(0)
    encoder, preprocessing = encoder_and_preprocessing(given.weights)
    images, labels = (x.to(given.device) for x in digits(preprocessing))
    held_out = 360

    # The lines that matter. An encoder is an nn.Module from images [B, C, H, W] to tokens [B, N, D].
    encoder.to(given.device).train()  # from_pretrained hands it over in eval mode
    head = nn.Linear(encoder.config.width, 10, device=given.device)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=given.lr)
    for epoch in range(given.epochs):
        for batch in torch.randperm(len(images) - held_out, device=given.device).split(given.batch_size):
            logits = head(encoder(images[batch]).mean(1))  # mean over the tokens
            loss = F.cross_entropy(logits, labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

    encoder.eval()
    with torch.no_grad():
        logits = torch.cat([head(encoder(part).mean(1)) for part in images[-held_out:].split(given.batch_size)])
    accuracy = (logits.argmax(1) == labels[-held_out:]).float().mean()
    print(f"accuracy on {held_out} held-out digits: {100 * accuracy:.1f} %")


if __name__ == "__main__":
    try:
        main()
    except (NextblockError, ValueError) as error:
        raise SystemExit(f"own_training_loop: {error}") from None
