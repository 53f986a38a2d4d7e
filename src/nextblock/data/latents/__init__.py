"""Posterior moments of a VAE on disk: computed once, then any number of generators is trained on them."""

from nextblock.data.latents.cache import About, LatentCache, is_latent_cache, open_latents
from nextblock.data.latents.crop import CroppedImages, adm_center_crop
from nextblock.data.latents.stream import LatentBatch, LatentStream, latents_of

__all__ = [
    "About",
    "CroppedImages",
    "LatentBatch",
    "LatentCache",
    "LatentStream",
    "adm_center_crop",
    "is_latent_cache",
    "latents_of",
    "open_latents",
]
