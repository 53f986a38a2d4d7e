"""nextblock: learn from images by predicting the next entity of a picture.

One keyword-only function per job (`pretrain`, `probe`, `embed`, `train_generator`, `sample`, ...) and the building
blocks. Names are imported when first used, so that `import nextblock` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nextblock.version import __version__

_HOMES = {
    "Ordering": "nextblock.ordering",
    "block_causal_mask": "nextblock.mask",
    "teacher_forcing_mask": "nextblock.mask",
    "XTRAConfig": "nextblock.xtra.config",
    "XTRA": "nextblock.xtra.model",
    "Encoder": "nextblock.xtra.model",
    "Classifier": "nextblock.xtra.classifier",
    "Preprocessing": "nextblock.data.preprocess",
    "ScalePyramid": "nextblock.ordering",
    "XARConfig": "nextblock.xar.config",
    "XAR": "nextblock.xar.model",
    "sample_latents": "nextblock.xar.sampler",
    "load_official_xar": "nextblock.checkpoints.official_xar",
    "load_official_kl16": "nextblock.checkpoints.official_kl16",
    "open_vae": "nextblock.checkpoints.vae_files",
    "open_latents": "nextblock.data.latents",
    "cache_latents": "nextblock.jobs.cache_latents",
    "train_generator": "nextblock.jobs.train_generator",
    "open_generator": "nextblock.jobs.opening_generator",
    "sample": "nextblock.jobs.sample",
    "fid": "nextblock.jobs.fid",
    "XARPipeline": "nextblock.jobs.xar_pipeline",
    "load_official_xtra": "nextblock.checkpoints.official",
    "open_source": "nextblock.data.sources",
    "convert": "nextblock.jobs.convert",
    "datasets": "nextblock.jobs.datasets",
    "demo": "nextblock.jobs.demo",
    "doctor": "nextblock.jobs.doctor",
    "embed": "nextblock.jobs.embed",
    "finetune": "nextblock.jobs.finetune",
    "ImageFeatures": "nextblock.jobs.image_features",
    "knn": "nextblock.jobs.knn",
    "predict": "nextblock.jobs.predict",
    "prepare": "nextblock.jobs.prepare",
    "pretrain": "nextblock.jobs.pretrain",
    "profile": "nextblock.jobs.profile",
    "probe": "nextblock.jobs.probe",
    "reconstruct": "nextblock.jobs.reconstruct",
    "export": "nextblock.jobs.export",
    "visualize": "nextblock.jobs.visualize",
}

if TYPE_CHECKING:
    from nextblock.checkpoints.official import load_official_xtra
    from nextblock.checkpoints.official_kl16 import load_official_kl16
    from nextblock.checkpoints.official_xar import load_official_xar
    from nextblock.checkpoints.vae_files import open_vae
    from nextblock.data.latents import open_latents
    from nextblock.data.preprocess import Preprocessing
    from nextblock.data.sources import open_source
    from nextblock.jobs.cache_latents import cache_latents
    from nextblock.jobs.convert import convert
    from nextblock.jobs.datasets import datasets
    from nextblock.jobs.demo import demo
    from nextblock.jobs.doctor import doctor
    from nextblock.jobs.embed import embed
    from nextblock.jobs.export import export
    from nextblock.jobs.fid import fid
    from nextblock.jobs.finetune import finetune
    from nextblock.jobs.image_features import ImageFeatures
    from nextblock.jobs.knn import knn
    from nextblock.jobs.opening_generator import open_generator
    from nextblock.jobs.predict import predict
    from nextblock.jobs.prepare import prepare
    from nextblock.jobs.pretrain import pretrain
    from nextblock.jobs.probe import probe
    from nextblock.jobs.profile import profile
    from nextblock.jobs.reconstruct import reconstruct
    from nextblock.jobs.sample import sample
    from nextblock.jobs.train_generator import train_generator
    from nextblock.jobs.visualize import visualize
    from nextblock.jobs.xar_pipeline import XARPipeline
    from nextblock.mask import block_causal_mask, teacher_forcing_mask
    from nextblock.ordering import Ordering, ScalePyramid
    from nextblock.xar.config import XARConfig
    from nextblock.xar.model import XAR
    from nextblock.xar.sampler import sample_latents
    from nextblock.xtra.classifier import Classifier
    from nextblock.xtra.config import XTRAConfig
    from nextblock.xtra.model import XTRA, Encoder

__all__ = [
    "XAR",
    "XTRA",
    "Classifier",
    "Encoder",
    "ImageFeatures",
    "Ordering",
    "Preprocessing",
    "ScalePyramid",
    "XARConfig",
    "XARPipeline",
    "XTRAConfig",
    "__version__",
    "block_causal_mask",
    "cache_latents",
    "convert",
    "datasets",
    "demo",
    "doctor",
    "embed",
    "export",
    "fid",
    "finetune",
    "knn",
    "load_official_kl16",
    "load_official_xar",
    "load_official_xtra",
    "open_generator",
    "open_latents",
    "open_source",
    "open_vae",
    "predict",
    "prepare",
    "pretrain",
    "probe",
    "profile",
    "reconstruct",
    "sample",
    "sample_latents",
    "teacher_forcing_mask",
    "train_generator",
    "visualize",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'nextblock' has no attribute '{name}'")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
