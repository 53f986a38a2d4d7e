"""config.json of a weights folder as configurations of transformers, one class for each kind of model."""

# mypy: allow-untyped-calls
# (transformers makes subclasses with functions that have no types)

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from nextblock.checkpoints.pretrained import require_format
from nextblock.errors import CheckpointError, ConfigError
from nextblock.xtra.classifier import HeadConfig, LayerMean
from nextblock.xtra.config import XTRAConfig


class NextblockConfig(PreTrainedConfig):
    """An encoder; what it holds is what config.json holds.

    Attributes:
        config: the sizes, as `XTRAConfig.to_dict` gives them.
        head: of a classifier, as `HeadConfig.to_dict` gives it.
        classes: the names of a classifier's classes by number; also `id2label`.
        bidirectional: let all tokens see each other; by default the encoder keeps its block-causal mask. It is a choice
            of the one who opens the folder and is not saved. A head has made its own choice.
        drop_path: stochastic depth in training, a rate; may be given to `from_pretrained`.

    `num_labels` is 0 without a head, unless given. Raises ConfigError for sizes that cannot be.
    """

    model_type = "xtra_encoder"

    config: dict[str, Any] | None = None
    head: dict[str, Any] | None = None
    classes: list[str] | None = None
    bidirectional: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        require_format({"format": kwargs.get("format"), "nextblock": kwargs.get("nextblock")}, "the folder")
        self.config = XTRAConfig.from_dict(self.config or {}).to_dict()
        count = kwargs.get("num_labels")
        if self.id2label is None and (count is None or count == len(self.classes or ())):
            self.id2label = dict(enumerate(self.classes or ()))
        super().__post_init__(**kwargs)
        if self.label2id is None:
            self.label2id = {str(name): int(number) for number, name in (self.id2label or {}).items()}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        # the kind of attention is there for other classes than this one, which would refuse it as well
        return super().from_dict({k: v for k, v in config_dict.items() if k != "layer_types"}, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: the folder's own code file fetches these classes, so that no source is copied into it."""

    def sizes(self) -> XTRAConfig:
        return XTRAConfig.from_dict(self.config or {})

    def labels(self) -> list[str]:
        """The classes' names in order of their numbers."""
        return [name for _, name in sorted((self.id2label or {}).items())]

    def head_config(self) -> HeadConfig:
        """The stored head; for an encoder a new linear one on the last layer."""
        if self.head is not None:
            return HeadConfig.from_dict(self.head)
        return HeadConfig("linear", LayerMean.of_last(1, self.num_hidden_layers, self.bidirectional))

    @property
    def drop_path(self) -> float:
        return self.sizes().drop_path

    @drop_path.setter
    def drop_path(self, rate: float) -> None:
        self.config = XTRAConfig.from_dict((self.config or {}) | {"drop_path": rate}).to_dict()

    @property
    def hidden_size(self) -> int:
        return self.sizes().width

    @property
    def num_hidden_layers(self) -> int:
        return self.sizes().depth

    @property
    def num_attention_heads(self) -> int:
        return self.sizes().num_heads

    @property
    def num_channels(self) -> int:
        return self.sizes().channels

    @property
    def image_size(self) -> list[int]:
        """[height, width] of the training images in pixels; others are taken as well."""
        return list(self.sizes().image)

    @property
    def patch_size(self) -> list[int]:
        """[height, width] in pixels."""
        return list(self.sizes().patch)


class NextblockPretrainedConfig(NextblockConfig):
    """An encoder with its predictor, which is left out here."""

    model_type = "xtra"


class NextblockClassifierConfig(NextblockConfig):
    """An encoder and a head."""

    model_type = "xtra_classifier"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.classes and self.head is None:
            raise ConfigError("a classifier's config.json needs 'head' beside 'classes'.")


class _Refused(PreTrainedConfig):
    """A kind of folder that no class of transformers can use."""

    instead = ""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        raise CheckpointError(cls.instead)


class NextblockGeneratorConfig(_Refused):
    model_type = "xar"
    instead = (
        "This folder holds a generator, which transformers' Auto classes do not open. Make images with it: "
        "nextblock.XARPipeline.from_pretrained(FOLDER)."
    )


class NextblockHeadConfig(_Refused):
    model_type = "xtra_head"
    instead = (
        "This folder holds a head without an encoder. Put it on one: nextblock convert FOLDER --encoder RUN --to DIR; "
        "AutoModelForImageClassification opens that folder."
    )
