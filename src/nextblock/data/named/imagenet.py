"""The 1000 classes of ImageNet-1K: WordNet number and name, in the order of the labels.

The order is that of the sorted WordNet numbers, which are the names of the data set's folders. A name is the first word
of the class; where two classes share it (crane, maillot, cardigan) a telling one.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files

NUM_CLASSES = 1000


@cache
def imagenet_classes() -> dict[str, str]:
    """Name by WordNet number ("n01440764": "tench"), in the order of the labels 0 to 999."""
    text = (files("nextblock.data.named") / "imagenet_classes.tsv").read_text(encoding="utf-8")
    return dict(line.split("\t") for line in text.splitlines())
