"""The beginning of every model card, which the hub reads, and a card for weights of which nothing else is known."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from typing import Any

from nextblock.checkpoints import custom_code
from nextblock.checkpoints.kinds import KINDS, Model, describe
from nextblock.errors import shown

_TASKS = {
    "xtra": "image-feature-extraction",
    "xtra_encoder": "image-feature-extraction",
    "xtra_classifier": "image-classification",
    "xtra_head": "image-classification",
}
_PAPERS = {"xar": "xAR, arXiv 2502.20388"}
_USE = {
    "xtra": "features = nextblock.Encoder.from_pretrained({where})(images)  # [B, N, D]",
    "xtra_encoder": "features = nextblock.Encoder.from_pretrained({where})(images)  # [B, N, D]",
    "xtra_classifier": "logits = nextblock.Classifier.from_pretrained({where})(images)  # [B, classes]",
    "xar": "images = nextblock.XARPipeline.from_pretrained({where})(class_labels=[0], num_inference_steps=25).images",
}


TRANSFORMERS = """
In transformers: `import nextblock.hf`, then `AutoModel.from_pretrained(FOLDER)` and
`AutoImageProcessor.from_pretrained(FOLDER)`; or `trust_remote_code=True` with nextblock installed. Never as a plain
ViT: the attention is block-causal.
"""
_MOST_SHOWN = 1000  # letters of a name
# what Markdown takes for more than a letter within a line; an underscore inside a word is none such
_MARKS = re.compile(r"[\\`*\[\]|~]|(?<![^\W_])_|_(?![^\W_])")


def as_text(name: object) -> str:
    """A name out of somebody's data (a file, a folder, a class) as Markdown that shows it, on one line: no HTML, link,
    picture or cell of a table comes of it."""
    return _MARKS.sub(r"\\\g<0>", html.escape(shown(name, _MOST_SHOWN), quote=False))


def with_front_matter(card: str, model: Model) -> str:
    """The card under the lines in YAML by which the hub sorts models; a card that has such lines stays as it is."""
    if card.startswith("---\n"):
        return card
    kind = describe(model)["model_type"]
    task = _TASKS.get(kind) or ("image-generation" if _classes(model) else "unconditional-image-generation")
    lines = ["---", "library_name: nextblock", "tags:", "- nextblock", f"- {kind}"]
    lines += [f"- {task}"] if task == "image-generation" else []
    lines += [f"pipeline_tag: {task}"] if task != "image-generation" else []
    return "\n".join([*lines, "---", "", card])


def plain_card(model: Model, about: Mapping[str, Any]) -> str:
    """Markdown: what the folder holds, its sizes, how to load it."""
    described = describe(model)
    kind, sizes = described["model_type"], described.get("config", {})
    paper = _PAPERS.get(kind, "XTRA, arXiv 2411.15648")
    count = sum(p.numel() for p in model.parameters())
    rows = "\n".join(f"| {name} | {value} |" for name, value in sizes.items())
    origin = f"- from: {as_text(about['origin'])}\n" if "origin" in about else ""
    others = TRANSFORMERS if kind in custom_code.STEMS else ""
    use = _USE.get(kind, "head = nextblock.checkpoints.pretrained.load_pretrained({where})[0]")
    return f"""# {KINDS[kind].capitalize()} ({paper})

- holds: {KINDS[kind]}; {count:,} parameters
{origin}- what it was trained on, and how well it does, is not known here

| size | |
|---|---|
{rows}

## Use

```python
import nextblock

{use.format(where='"PATH_TO_THIS_FOLDER"')}
```
{others}
`model.safetensors` holds the weights, `config.json` the sizes and the SHA-256 of the weights,
`preprocessor_config.json` how an image becomes the model's input.
"""


def _classes(model: Any) -> int:
    return int(getattr(model.config, "num_classes", 0))
