"""The model card that goes with an exported generator."""

from __future__ import annotations

from pathlib import Path

from nextblock.checkpoints.model_card import as_text
from nextblock.jobs.card import schedule, trained
from nextblock.jobs.generator_data import Learned
from nextblock.recipes.generator import GeneratorConfig
from nextblock.training.plan import Plan
from nextblock.training.run_folder import read_metrics


def generator_card(config: GeneratorConfig, folder: Path, data: Learned, weights: str, plan: Plan) -> str:
    """Markdown: what the weights are, what they were trained on, what was measured and what was not, how to sample."""
    model, training = config.model, config.training
    (height, width), entities = data.preprocessing.size_px, model.entities
    space = "pixels" if data.vae["kind"] == "pixels" else f"latents of the VAE {_where(data.vae)}"
    classes = f"{model.num_classes} classes" if model.num_classes else "unconditional"
    kept = f"average of the weights, decay up to {training.ema_decay:g}" if weights == "ema" else "the last weights"
    return f"""# xAR generator

Images by denoising the next entity (xAR, arXiv 2502.20388), trained with nextblock.

- holds: {kept}
- data: {as_text(data.description)}; {classes}
- makes: images of {height}×{width} px, in {space}
- entities: {model.ordering}, {entities.num_entities} of them, {entities.num_tokens} tokens in all, patches of \
{model.patch[0]}×{model.patch[1]}
- model: width {model.width}, depth {model.depth}, {model.num_heads} heads
- trained: {trained(plan)}, seed {training.seed}
- learning rate: {schedule(plan)}

{_measured(folder)}
FID was not measured here. A number from elsewhere belongs to other weights.

## Use

```
nextblock sample PATH_TO_THIS_FOLDER --n 16 --out DIR
```

`model.safetensors` holds the weights, `config.json` the sizes, the classes, the VAE and the SHA-256 of the weights,
`preprocessor_config.json` how an image became what the model learned.
"""


def _where(vae: dict[str, object]) -> str:
    return f"{as_text(vae.get('path') or vae.get('name'))} (SHA-256 {str(vae.get('sha256'))[:12]}...)"


def _measured(folder: Path) -> str:
    rows = read_metrics(folder / "metrics.csv")
    last = {name: value for row in rows for name, value in row.items() if value}
    shown = [name for name in ("loss", "val_loss", "ema_val_loss") if name in last]
    return "".join(["| measured at the end | |\n|---|---|\n", *(f"| {name} | {last[name]} |\n" for name in shown)])
