"""Encoder and Classifier as models of transformers. The modules inside are ours; nothing is computed anew."""

# mypy: allow-untyped-calls
# (transformers makes subclasses with functions that have no types)

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput

from nextblock.checkpoints.pretrained import load_weights
from nextblock.errors import ConfigError
from nextblock.hf.configuration import NextblockClassifierConfig, NextblockConfig, NextblockPretrainedConfig
from nextblock.hf.folders import FolderModel, head_that_fits, like
from nextblock.layers.patches import patchify
from nextblock.ordering import Ordering
from nextblock.xtra.classifier import Classifier
from nextblock.xtra.model import Encoder


class NextblockModel(FolderModel):
    """The encoder of any folder of ours: `pixel_values` to tokens.

    What else a folder holds (predictor, head) is left out; `save_pretrained` writes an encoder. Give drop path to
    `from_pretrained(DIR, drop_path=0.1)`; as in `Encoder` it acts in train mode only.
    """

    config_class = NextblockConfig
    inner: Encoder

    @classmethod
    def make(cls, config: NextblockConfig) -> Encoder:
        return Encoder(config.sizes())

    @classmethod
    def opened(cls, folder: Path, config: NextblockConfig, new_head: bool) -> tuple[Encoder, set[str]]:
        found = Encoder.from_pretrained(folder)
        if found.config == config.sizes():
            return found, set()
        made = cls.make(config)
        load_weights(made, found.state_dict(), str(folder))
        return like(found, made), set()

    @property
    def encoder(self) -> Encoder:
        return self.inner

    def forward(
        self,
        pixel_values: Tensor,
        bidirectional: bool | None = None,
        interpolate_pos_encoding: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """The encoder's outputs, in raster order.

        Args:
            pixel_values: [B, C, H, W] from the image processor; of any size that the encoder takes.
            bidirectional: no mask; by default as the configuration has it, which is False unless chosen.
            interpolate_pos_encoding: False refuses images of another size than that of training.
            output_hidden_states: add `hidden_states`: the embedded patches, then the output of every layer.
            output_attentions: must be left out; the attention kernel gives no weights.
            return_dict: False for a tuple.

        Returns last_hidden_state [B, N, D], the tokens after the final norm as `Encoder` gives them, and pooler_output
        [B, D], the mean over the tokens before it, which is what `nextblock embed` gives by default.
        Raises ConfigError when the image size does not fit.
        """
        _refuse_attentions(output_attentions)
        images = self.images(pixel_values, interpolate_pos_encoding)
        free = self.config.bidirectional if bidirectional is None else bidirectional
        ordering = self.encoder.ordering_for(images, free)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hidden = [_raster(self._embedded(images, ordering), ordering)] if wanted else []
        last = None
        for last in self.encoder.layer_outputs(images, ordering, bidirectional=free):
            hidden += [_raster(last, ordering)] if wanted else []
        assert last is not None
        pooled = _raster(last, ordering).float().mean(1)
        made = BaseModelOutputWithPooling(
            last_hidden_state=_raster(self.encoder.norm(last), ordering),
            pooler_output=pooled.to(last.dtype),
            hidden_states=tuple(hidden) if wanted else None,
        )
        return self.as_asked(made, return_dict)

    def _embedded(self, images: Tensor, ordering: Ordering) -> Tensor:
        """What the first layer is given, [B, N, D], entity-major."""
        x: Tensor = self.encoder.patch_embed(patchify(images, self.encoder.config.patch, ordering))
        return x + self.encoder.positions(ordering)


class NextblockForImageClassification(FolderModel):
    """Encoder and head: `pixel_values` to `logits`, and the loss when `labels` are given.

    On a folder without a head give the classes, and a new linear head is put on it:
    `AutoModelForImageClassification.from_pretrained(DIR, num_labels=10)`, or `id2label={0: "cat", ...}`.
    """

    config_class = NextblockConfig
    inner: Classifier

    def __init__(self, config: NextblockConfig, inner: Classifier | None = None) -> None:
        super().__init__(config, inner)
        self.inner.encoder.norm.requires_grad_(False)  # the head reads what comes before it

    @classmethod
    def make(cls, config: NextblockConfig) -> Classifier:
        if not config.labels():
            raise ConfigError(
                "there is no head, so no classes are known. Give num_labels=10 or id2label={0: 'cat', ...} for a new "
                "head, or use AutoModel for the features."
            )
        return Classifier(config.sizes(), config.head_config(), config.labels())

    @classmethod
    def opened(cls, folder: Path, config: NextblockConfig, new_head: bool) -> tuple[Classifier, set[str]]:
        if head_that_fits(config, new_head):
            found = Classifier.from_pretrained(folder)
            if found.config == config.sizes():
                return found, set()
            made = cls.make(config)
            load_weights(made, found.state_dict(), str(folder))
            return like(found, made), set()
        made, encoder = cls.make(config), Encoder.from_pretrained(folder)
        load_weights(made.encoder, encoder.state_dict(), str(folder))
        return like(encoder, made), {name for name in made.state_dict() if name.startswith("head.")}

    @property
    def encoder(self) -> Encoder:
        return self.inner.encoder

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Returns logits [B, classes] as `Classifier` gives them, and the loss with `labels` int64 [B].

        For hidden states use AutoModel, which raises ConfigError here. The other arguments are as in `NextblockModel`.
        """
        _refuse_attentions(output_attentions)
        if output_hidden_states:
            raise ConfigError("a classifier gives logits only. Use AutoModel on the same folder for hidden states.")
        logits = self.inner(self.images(pixel_values, interpolate_pos_encoding))
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        made = ImageClassifierOutput(loss=loss, logits=logits)
        return self.as_asked(made, return_dict)


def _refuse_attentions(asked: bool | None) -> None:
    if asked:
        raise ConfigError("output_attentions is not available: the attention kernel does not give its weights.")


def _raster(x: Tensor, ordering: Ordering) -> Tensor:
    """[B, N, D] in the order of the entities -> in raster order."""
    return torch.flatten(ordering.merge(x), 1, 2)


# transformers wants a class of its own for each kind of configuration
class NextblockPretrainedModel(NextblockModel):
    config_class = NextblockPretrainedConfig


class NextblockClassifierModel(NextblockModel):
    config_class = NextblockClassifierConfig


class NextblockPretrainedForImageClassification(NextblockForImageClassification):
    config_class = NextblockPretrainedConfig


class NextblockClassifierForImageClassification(NextblockForImageClassification):
    config_class = NextblockClassifierConfig
