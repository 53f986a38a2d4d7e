"""Images <-> latents: a diffusers autoencoder, and the identity for pixel space.

Images are float [B, 3, H, W] in [-1, 1]. Latents are [B, C, h, w], shifted and multiplied by the scale factor, so that
they have about unit variance: `latents = (z - shift_factor) * scale_factor`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nextblock.errors import ConfigError

LOG_VARIANCE = (-30.0, 20.0)  # outside of it the posterior is as good as a point, or nothing at all
_SAME = ("kind", "sha256", "latent_channels", "factor", "scale_factor", "shift_factor")


class Autoencoder(nn.Module):
    """A frozen KL autoencoder (Rombach et al., arXiv 2112.10752), always in eval mode.

    Args:
        model: diffusers' AutoencoderKL; its import takes seconds, so it is made elsewhere.
        about: where it is from, `kind` and `path` or `name`; goes into `identity`.
        scale_factor, shift_factor: the model's own where None.

    Raises ConfigError when the model normalises each channel by itself, which these two numbers cannot say.
    """

    def __init__(
        self,
        model: Any,
        about: Mapping[str, str],
        scale_factor: float | None = None,
        shift_factor: float | None = None,
    ) -> None:
        super().__init__()
        config: Any = model.config
        if config.latents_mean is not None or config.latents_std is not None:
            raise ConfigError("this VAE scales each latent channel by itself (latents_mean, latents_std), which is not "
                              "supported. Use one with a scaling_factor alone.")  # fmt: skip
        self.model = model.eval().requires_grad_(False)
        self.about = dict(about)
        self.image_channels = int(config.in_channels)
        self.latent_channels = int(config.latent_channels)
        self.factor = int(2 ** (len(config.block_out_channels) - 1))  # image pixels per latent pixel
        self.scale_factor = float(config.scaling_factor if scale_factor is None else scale_factor)
        self.shift_factor = float((config.shift_factor or 0.0) if shift_factor is None else shift_factor)
        self._sha256: str | None = None

    def train(self, mode: bool = True) -> Autoencoder:
        """Stays in eval mode, also as a part of a model that trains."""
        return super().train(False)

    def moments(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] to the posterior's mean and log-variance [B, 2C, h, w], neither shifted nor scaled.

        Raises ConfigError for another number of channels, and for sides that `factor` does not divide.
        """
        self._require_images(images)
        hidden = self.model.encoder(images.to(self.model.dtype))
        return hidden if self.model.quant_conv is None else self.model.quant_conv(hidden)

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Images [B, 3, H, W] to latents [B, C, h, w], a sample of the posterior.

        `noise` [B, C, h, w] is drawn from torch's generator where None.
        """
        moments = self.moments(images)
        if noise is None:
            noise = torch.randn_like(moments[:, : self.latent_channels])
        return self.sample(moments, noise)

    def sample(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Moments [B, 2C, h, w] and standard normal noise [B, C, h, w] to latents [B, C, h, w]."""
        return posterior_sample(moments, noise, self.scale_factor, self.shift_factor)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] to images [B, 3, H, W], about in [-1, 1] (not clamped)."""
        self._require_latents(latents)
        return self.decode_raw(latents / self.scale_factor + self.shift_factor)

    def decode_raw(self, latents: Tensor) -> Tensor:
        """As `decode`, of latents that are neither shifted nor scaled: the posterior's own."""
        self._require_latents(latents)
        latents = latents.to(self.model.dtype)
        hidden = latents if self.model.post_quant_conv is None else self.model.post_quant_conv(latents)
        return self.model.decoder(hidden)

    def identity(self) -> dict[str, Any]:
        """What makes its latents those of this VAE and no other, ready for JSON. See `same_vae`."""
        if self._sha256 is None:
            self._sha256 = _digest(self.model)
        return self.about | {
            "sha256": self._sha256,
            "image_channels": self.image_channels,
            "latent_channels": self.latent_channels,
            "factor": self.factor,
            "scale_factor": self.scale_factor,
            "shift_factor": self.shift_factor,
        }

    def _require_images(self, images: Tensor) -> None:
        shape, channels = list(images.shape), self.image_channels
        if images.ndim != 4 or shape[1] != channels:
            raise ConfigError(f"this VAE takes images [B, {channels}, H, W] in [-1, 1]; got {shape}.")
        if shape[2] % self.factor or shape[3] % self.factor or 0 in shape[2:]:
            raise ConfigError(
                f"the sides of an image must be multiples of {self.factor} px for this VAE; got {shape[2]} x {shape[3]}"
            )

    def _require_latents(self, latents: Tensor) -> None:
        if latents.ndim != 4 or latents.shape[1] != self.latent_channels:
            shape = list(latents.shape)
            raise ConfigError(f"this VAE decodes latents [B, {self.latent_channels}, h, w]; got {shape}.")


class Pixels(nn.Module):
    """Pixel space: the latents are the images. `channels` is 1 (gray) or 3."""

    factor = 1
    scale_factor = 1.0
    shift_factor = 0.0

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        if channels not in (1, 3):
            raise ConfigError(f"channels must be 1 (gray) or 3; got {channels!r}.")
        self.image_channels = self.latent_channels = channels

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Images [B, C, H, W], as they are; `noise` plays no part. Raises ConfigError for other channels."""
        return self._checked(images)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, H, W], as they are. Raises ConfigError for other channels."""
        return self._checked(latents)

    decode_raw = decode

    def identity(self) -> dict[str, Any]:
        """See `Autoencoder.identity`."""
        channels = self.latent_channels
        return {
            "kind": "pixels", "sha256": None, "image_channels": channels, "latent_channels": channels, "factor": 1,
            "scale_factor": 1.0, "shift_factor": 0.0,
        }  # fmt: skip

    def _checked(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != self.latent_channels:
            shape = list(images.shape)
            raise ConfigError(f"images must be [B, {self.latent_channels}, H, W] in this pixel space; got {shape}.")
        return images


def posterior_sample(moments: Tensor, noise: Tensor, scale_factor: float, shift_factor: float = 0.0) -> Tensor:
    """A sample of the diagonal Gaussian posterior, shifted and scaled.

    Args:
        moments: [B, 2C, h, w], mean and log-variance.
        noise: [B, C, h, w], standard normal.
        scale_factor, shift_factor: of the VAE.

    Returns latents [B, C, h, w]. Raises ConfigError when the shapes do not fit each other.
    """
    mean, log_variance = moments.chunk(2, dim=1)
    if moments.shape[1] % 2 or noise.shape != mean.shape:
        raise ConfigError(
            f"noise must be {list(mean.shape)} for moments {list(moments.shape)}; got {list(noise.shape)}."
        )
    spread = (0.5 * log_variance.clamp(*LOG_VARIANCE)).exp()
    return (mean + spread * noise.to(mean) - shift_factor) * scale_factor


def same_vae(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two identities are of VAEs that give the same latents, wherever their files lie.

    A hash that is not known (None: weights that came without their VAE) agrees with any.
    """
    pixels = "pixels" in (a.get("kind"), b.get("kind"))
    compared = [name for name in _SAME if name != "kind" or pixels]
    if None in (a.get("sha256", ""), b.get("sha256", "")):
        compared.remove("sha256")
    return all(a.get(name) == b.get(name) for name in compared)


def _digest(model: nn.Module) -> str:
    """SHA-256 over names, shapes and float32 numbers of the weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        value = tensor.detach().float().cpu().contiguous().numpy()
        digest.update(f"{name}{value.shape}".encode())
        digest.update(value.data)
    return digest.hexdigest()
