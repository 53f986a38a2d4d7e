"""Which kinds of model a weights folder can hold: what its config.json says of one, and the way back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nextblock.checkpoints.sizes import require_tokens
from nextblock.errors import CheckpointError, nearest
from nextblock.portable import weights_follow
from nextblock.xar.config import XARConfig
from nextblock.xar.model import XAR
from nextblock.xtra.classifier import Classifier, HeadConfig
from nextblock.xtra.config import XTRAConfig
from nextblock.xtra.heads import AttentiveHeads, LinearHeads, make_heads
from nextblock.xtra.model import XTRA, Encoder

Head = LinearHeads | AttentiveHeads
Model = XTRA | Encoder | Classifier | Head | XAR
KINDS = {
    "xtra": "an encoder with its predictor",
    "xtra_encoder": "an encoder",
    "xtra_classifier": "an encoder and a head",
    "xtra_head": "a head without an encoder",
    "xar": "a generator",
}


def describe(model: Model) -> dict[str, Any]:
    """What config.json says of a model, enough to make one of the same kind and sizes.

    Raises CheckpointError for an object of another kind.
    """
    if isinstance(model, Classifier):
        head = {"head": model.head_config.to_dict(), "classes": list(model.classes)}
        return {"model_type": "xtra_classifier", "config": model.config.to_dict()} | head
    if isinstance(model, LinearHeads | AttentiveHeads):
        return {"model_type": "xtra_head", "config": _head(model)}
    for kind, name in ((XTRA, "xtra"), (Encoder, "xtra_encoder"), (XAR, "xar")):
        if isinstance(model, kind):
            return {"model_type": name, "config": model.config.to_dict()}
    raise CheckpointError(f"a {type(model).__name__} is none of the models that are kept so: {', '.join(KINDS)}.")


def make(about: Mapping[str, Any], where: object) -> Model:
    """The inverse of `describe`; the parameters are to be loaded, and hold no sensible numbers before.

    Raises CheckpointError for an unknown kind; ConfigError, KeyError or TypeError for sizes that cannot be.
    """
    with weights_follow():
        return _made(about, where)


def _made(about: Mapping[str, Any], where: object) -> Model:
    kind = about.get("model_type")
    if kind == "xar":
        return XAR(XARConfig.from_dict(about["config"]))
    if kind == "xtra_head":
        return make_heads(**about["config"])
    if kind not in KINDS:
        hint = nearest(str(kind), KINDS)
        raise CheckpointError(f"{where}/config.json is of a '{kind}' model, which is unknown here.{hint}")
    config = XTRAConfig.from_dict(about["config"])
    if kind == "xtra_classifier":
        return Classifier(config, HeadConfig.from_dict(about["head"]), about["classes"])
    return XTRA(config) if kind == "xtra" else Encoder(config)


def least_numbers(about: Mapping[str, Any]) -> int:
    """A lower bound of the numbers that a model of these sizes holds, without making it.

    Raises ConfigError, KeyError or TypeError for sizes that cannot be.
    """
    kind, sizes = about.get("model_type"), about["config"]
    if kind == "xtra_head":
        return int(sizes["width"]) * int(sizes["num_classes"]) * int(sizes.get("count", 1))
    if kind == "xar":
        generator = XARConfig.from_dict(sizes)
        width, tokens = generator.width, generator.entities.num_tokens
        require_tokens(tokens, "config.json")
        layer = width * (4 * width + int(2 * width * generator.mlp_ratio))
        return generator.depth * layer + tokens * width + generator.num_classes * width
    config = XTRAConfig.from_dict(sizes)
    tokens = config.grid[0] * config.grid[1]
    require_tokens(tokens, "config.json")
    stacks = [(config.width, config.depth)]
    heads = 0
    if kind == "xtra":
        stacks.append((config.predictor_width, config.predictor_depth))
        inputs = config.ordering.entity_size * config.predictor_width
        heads = config.num_lookahead * config.head_hidden * (inputs + config.cell_pixels)
        heads += config.projection_hidden * (config.width + config.predictor_width)
    layers = sum(depth * width * (4 * width + 2 * int(width * config.mlp_ratio)) for width, depth in stacks)
    return layers + heads + sum(tokens * width for width, _ in stacks)


def _head(head: Head) -> dict[str, Any]:
    """The arguments of `make_heads`."""
    sizes: dict[str, Any] = {"width": head.width, "num_classes": head.weight.shape[1], "count": head.count}
    if isinstance(head, LinearHeads):
        return {"kind": "linear"} | sizes
    return {"kind": "attentive", "num_heads": head.num_heads, "num_queries": head.query.shape[1]} | sizes
