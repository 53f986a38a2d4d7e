"""What a weights folder holds for transformers, which then opens it without `import nextblock.hf`.

A file of code that only fetches our classes, so that nextblock must be installed, and in config.json the names of those
classes and the kind of attention. The latter keeps a folder from being opened as another model: transformers checks
`layer_types`, knows no block-causal attention, and refuses where it would otherwise warn and draw random weights.
"""

from __future__ import annotations

from typing import Any

FILE = "modeling_nextblock.py"
IN_CONFIG = ("auto_map", "layer_types")  # the names of what `for_transformers` gives
LAYER_TYPE = "block_causal_attention: AutoModel opens this after `import nextblock.hf`; a plain ViT would be wrong"
# our kinds of model -> how the names of their classes in nextblock.hf begin
STEMS = {"xtra": "NextblockPretrained", "xtra_encoder": "Nextblock", "xtra_classifier": "NextblockClassifier"}
PROCESSOR = "NextblockImageProcessor"

_CLASSES = {
    "AutoConfig": "{stem}Config",
    "AutoModel": "{stem}Model",
    "AutoModelForImageClassification": "{stem}ForImageClassification",
    "AutoImageProcessor": PROCESSOR,
}


def for_transformers(kind: str) -> dict[str, Any]:
    """What config.json says to transformers of a model of this kind; nothing of one that it cannot use."""
    if kind not in STEMS:
        return {}
    module = FILE.removesuffix(".py")
    names = {auto: f"{module}.{name.format(stem=STEMS[kind])}" for auto, name in _CLASSES.items()}
    return {"auto_map": names, "layer_types": [LAYER_TYPE]}


def code() -> str:
    """The content of `FILE`."""
    names = sorted({name.format(stem=stem) for stem in STEMS.values() for name in _CLASSES.values()})
    listed = "".join(f"    {name},\n" for name in names)
    told = '"""For transformers with trust_remote_code=True. Needs: pip install nextblock[transformers]"""'
    return f"{told}\n\nfrom nextblock.hf import (\n{listed})\n"
