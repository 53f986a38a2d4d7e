"""The model card that goes with exported weights."""

from __future__ import annotations

from pathlib import Path

from nextblock.recipes.config import PretrainConfig
from nextblock.training.run_folder import read_metrics


def model_card(config: PretrainConfig, folder: Path, data: str) -> str:
    """Markdown: what the weights are, what they were trained on, what was measured, how to load them."""
    model, training = config.model, config.training
    rows = read_metrics(folder / "metrics.csv")
    last = {name: value for row in rows for name, value in row.items() if value}
    shown = [name for name in ("loss", "val_loss", "knn", "effective_rank") if name in last]
    measured = "\n".join(f"| {name} | {last[name]} |" for name in shown)
    (height, width), patch, lr = model.image, model.patch, f"{training.peak_lr:g}"
    return f"""# XTRA encoder

A vision transformer pre-trained by next-cell prediction (XTRA, arXiv 2411.15648) with nextblock.

- holds: encoder, projection, predictor and pixel heads; raw weights (no EMA)
- data: {data}
- images: {height}×{width} px, patches of {patch[0]}×{patch[1]} px, cells of {model.cell_size} patches a side
- encoder: width {model.width}, depth {model.depth}, {model.num_heads} heads, block-causal attention
- trained: {training.epochs:g} epochs, batch {training.batch_size}, learning rate {lr}, seed {training.seed}

| measured at the end | |
|---|---|
{measured}

## Use

```python
import nextblock

features = nextblock.embed(run="PATH_TO_THIS_FOLDER", images=["photo.jpg"])
```

`model.safetensors` holds the weights, `config.json` the sizes and the SHA-256 of the weights,
`preprocessor_config.json` how an image becomes the model's input.
"""
