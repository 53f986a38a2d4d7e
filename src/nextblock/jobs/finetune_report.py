"""What a fine-tuning run shows when it is done: the model card of its classifier, and its curves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nextblock.checkpoints.model_card import as_text
from nextblock.data.labelled import Labelled
from nextblock.figures.probe import draw_probe_curves
from nextblock.jobs.finetune_config import FinetuneRecord
from nextblock.training.run_folder import read_metrics
from nextblock.xtra.config import XTRAConfig


def finetune_card(record: FinetuneRecord, data: Labelled, measured: Mapping[str, Any]) -> str:
    """Markdown: what the weights are, what they were trained on, what was measured, how to load them."""
    model, config, training = XTRAConfig.from_dict(record.model), record.finetune, record.training
    weights = (
        f"exponential moving average, decay rising to {config.ema_decay:g}" if config.ema_decay else "of the last step"
    )
    attention = "bidirectional" if config.bidirectional else "block-causal"
    shots = f", {config.few_shot} of each class" if config.few_shot else ""
    (height, width), patch = model.image, model.patch
    shown = data.classes if len(data.classes) <= 20 else (*data.classes[:20], "...")
    rows = "\n".join(f"| {name} | {value} |" for name, value in measured.items())
    return f"""# XTRA classifier

A vision transformer, pre-trained by next-cell prediction (XTRA, arXiv 2411.15648) and fine-tuned as a whole with a
{config.head} head, with nextblock.

- holds: encoder and head; weights: {weights}
- data: {as_text(data.name)}, {as_text(data.train.description)}{shots}
- classes: {len(data.classes)} ({as_text(", ".join(shown))})
- images: {height}×{width} px, patches of {patch[0]}×{patch[1]} px
- encoder: width {model.width}, depth {model.depth}, {model.num_heads} heads, {attention} attention
- trained: {training.epochs:g} epochs, batch {training.batch_size}, learning rate {training.peak_lr:g}, layer decay
  {config.layer_decay:g}, seed {training.seed}

| measured (accuracies in percent of the test images) | |
|---|---|
{rows}

## Use

```python
import nextblock

rows = nextblock.predict(run="PATH_TO_THIS_FOLDER", images=["photo.jpg"])
```

`model.safetensors` holds the weights, `config.json` the sizes, the class names and the SHA-256 of the weights,
`preprocessor_config.json` how an image becomes the model's input.
"""


def finetune_curves(folder: Path, record: FinetuneRecord) -> Path:
    """Training loss, and accuracy on the held-out images under the weights that are exported.

    Raises DataError when no number was finite.
    """
    column = "ema_val_top1" if record.finetune.ema_decay else "val_top1"
    which = "average of the weights" if record.finetune.ema_decay else "weights"
    about = {"head": 0, "kind": record.finetune.head, "lr": record.training.peak_lr}
    rows = [
        {**about, "epoch": row["epoch"], "train_loss": row["loss"], "val_top1": row[column]}
        for row in read_metrics(folder / "metrics.csv")
    ]
    return draw_probe_curves(rows, folder / "figures" / "curves.png", title=f"{folder.name}, {which}")
