"""The model card that goes with an exported encoder, and how any card tells what was trained."""

from __future__ import annotations

import math
from pathlib import Path

from nextblock.checkpoints.model_card import as_text
from nextblock.recipes.config import PretrainConfig
from nextblock.training.plan import Plan
from nextblock.training.run_folder import read_metrics


def model_card(config: PretrainConfig, folder: Path, data: str, plan: Plan) -> str:
    """Markdown: what the weights are, what they were trained on, what was measured, how to load them."""
    model, training = config.model, config.training
    rows = read_metrics(folder / "metrics.csv")
    last = {name: value for row in rows for name, value in row.items() if value}
    shown = [name for name in ("loss", "val_loss", "knn", "effective_rank") if name in last]
    measured = "\n".join(f"| {name} | {last[name]} |" for name in shown)
    (height, width), patch = model.image, model.patch
    return f"""# XTRA encoder

A vision transformer pre-trained by next-cell prediction (XTRA, arXiv 2411.15648) with nextblock.

- holds: encoder, projection, predictor and pixel heads; raw weights (no EMA)
- data: {as_text(data)}
- images: {height}×{width} px, patches of {patch[0]}×{patch[1]} px, cells of {model.cell_size} patches a side
- encoder: width {model.width}, depth {model.depth}, {model.num_heads} heads, block-causal attention
- trained: {trained(plan)}, seed {training.seed}
- learning rate: {schedule(plan)}

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


def trained(plan: Plan) -> str:
    """How much of the data a finished run took; a recipe's epochs are rounded to whole steps."""
    steps, batch = plan.total_steps, plan.config.batch_size
    return (
        f"{_counted(steps * batch, 'sample')} seen ({_counted(plan.epoch(steps), 'epoch')}, {_counted(steps, 'step')} "
        f"of {batch:,})"
    )


def schedule(plan: Plan) -> str:
    """The learning rate as it was applied; a short run shortens its warm-up or has none."""
    config, steps, warmup = plan.config, plan.total_steps, math.ceil(plan.warmup_steps)
    peak, last = plan.config.peak_lr, plan.lr(steps - 1)
    parts = [f"{peak:g}"]
    if warmup:
        parts[0] += f" after {_counted(warmup, 'step')} ({_counted(plan.epoch(warmup), 'epoch')}) of warm-up"
    if math.isclose(last, peak):
        return f"{parts[0]}, constant to the end" if warmup else f"{parts[0]} throughout"
    if config.decay_from * steps > plan.warmup_steps:
        parts.append(f"constant until {config.decay_from:.0%} of the run")
    return ", ".join([*parts, f"cosine to {last:g}"])


def _counted(number: float, what: str) -> str:
    told = f"{number:,}" if isinstance(number, int) else f"{number:.4g}"
    return f"{told} {what}" if told == "1" else f"{told} {what}s"
