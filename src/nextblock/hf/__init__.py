"""Our encoders and classifiers in Hugging Face transformers; importing this makes the Auto classes know them.

    import nextblock.hf
    from transformers import AutoImageProcessor, AutoModel, pipeline

    model = AutoModel.from_pretrained(DIR)
    pixels = AutoImageProcessor.from_pretrained(DIR)(image, return_tensors="pt")
    features = pipeline("image-feature-extraction", model=DIR)("photo.jpg")

DIR is a folder of exported weights, or a name on the Hugging Face hub. The block-causal mask is kept: the numbers are
those of `nextblock.Encoder` on what `nextblock.Preprocessing` makes of an image. Without this import, a folder that was
saved with its custom code opens with `trust_remote_code=True`; nextblock must be installed then, too.

`pipeline` opens images itself before they come here and makes them 8-bit RGB: transparency is dropped, where
`nextblock.Preprocessing` lays it on white, and 16 bits are clipped. Hand such files to the image processor directly.
"""

from __future__ import annotations

try:
    import transformers as _transformers
except ImportError as error:
    raise ImportError(
        "nextblock.hf needs transformers, which is not installed: pip install 'nextblock[transformers]'"
    ) from error

from nextblock.hf.configuration import (
    NextblockClassifierConfig,
    NextblockConfig,
    NextblockGeneratorConfig,
    NextblockHeadConfig,
    NextblockPretrainedConfig,
)
from nextblock.hf.modeling import (
    NextblockClassifierForImageClassification,
    NextblockClassifierModel,
    NextblockForImageClassification,
    NextblockModel,
    NextblockPretrainedForImageClassification,
    NextblockPretrainedModel,
)
from nextblock.hf.processing import NextblockImageProcessor

__all__ = [
    "NextblockClassifierConfig",
    "NextblockClassifierForImageClassification",
    "NextblockClassifierModel",
    "NextblockConfig",
    "NextblockForImageClassification",
    "NextblockGeneratorConfig",
    "NextblockHeadConfig",
    "NextblockImageProcessor",
    "NextblockModel",
    "NextblockPretrainedConfig",
    "NextblockPretrainedForImageClassification",
    "NextblockPretrainedModel",
]

_MODELS = (
    (NextblockConfig, NextblockModel, NextblockForImageClassification),
    (NextblockPretrainedConfig, NextblockPretrainedModel, NextblockPretrainedForImageClassification),
    (NextblockClassifierConfig, NextblockClassifierModel, NextblockClassifierForImageClassification),
)


def _register() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS

    for config, model, classifier in _MODELS:
        _transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
        _transformers.AutoModel.register(config, model, exist_ok=True)
        _transformers.AutoModelForImageClassification.register(config, classifier, exist_ok=True)
        # under both names, so that it is the same where torchvision is installed; neither of them does the work
        processors: dict[str, type] = dict.fromkeys(("pil", "torchvision"), NextblockImageProcessor)
        _transformers.AutoImageProcessor.register(config, image_processor_classes=processors, exist_ok=True)
        # the pipeline compares with these names, and says that a class that is not among them were not supported
        CLASSIFIERS[config.model_type] = classifier.__name__
    for refused in (NextblockGeneratorConfig, NextblockHeadConfig):
        _transformers.AutoConfig.register(refused.model_type, refused, exist_ok=True)


_register()
