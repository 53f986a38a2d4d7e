"""The numbers of the official KL-16 autoencoder (see tests/data/README.md), and VAE files of every kind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from close import assert_close
from nextblock.checkpoints.official_kl16 import load_official_kl16
from nextblock.checkpoints.vae_files import open_vae
from nextblock.errors import CheckpointError, ConfigError
from nextblock.vae import Autoencoder, Pixels, posterior_sample, same_vae
from small_kl16 import official_state, write_kl16

DATA = Path(__file__).parents[1] / "data"
TINY = {
    "block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
    "scaling_factor": 0.7, "shift_factor": 0.1,
}  # fmt: skip


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_kl16(tmp_path_factory.mktemp("kl16") / "kl16.ckpt")


@pytest.fixture(scope="module")
def vae(official: Path) -> Autoencoder:
    return load_official_kl16(official)


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in np.load(DATA / "kl16_small.npz").items()}


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 1e-4), (torch.float64, 1e-4)])
def test_moments_and_decoding(official: Path, golden: dict[str, torch.Tensor], dtype: torch.dtype, tol: float) -> None:
    vae = load_official_kl16(official).to(dtype)
    moments = vae.moments(golden["images"].to(dtype))
    assert moments.dtype == dtype
    assert_close(moments, golden["moments"], tol)
    mean = golden["moments"][:, :16]
    assert_close(vae.decode_raw(mean.to(dtype)), golden["decoded"], tol)
    assert_close(vae.decode(mean.to(dtype) * 0.2325), golden["decoded"], tol)


def test_sizes_come_from_the_tensors(vae: Autoencoder) -> None:
    sizes = json.loads((DATA / "kl16_small.json").read_text())
    widths = tuple(sizes["ch"] * m for m in sizes["ch_mult"])
    assert tuple(vae.model.config.block_out_channels) == widths
    assert (vae.latent_channels, vae.factor, vae.scale_factor, vae.shift_factor) == (sizes["z_channels"], 16, 0.2325, 0)
    kinds = vae.model.config.down_block_types, vae.model.config.up_block_types
    assert [kind.startswith("Attn") for kind in kinds[0]] == [False] * 4 + [True]
    assert not any(kind.startswith("Attn") for kind in kinds[1])


def test_encode_is_the_posterior_with_this_noise(vae: Autoencoder, golden: dict[str, torch.Tensor]) -> None:
    images, moments = golden["images"], golden["moments"]
    noise = torch.randn(2, 16, 4, 4)
    want = (moments[:, :16] + (0.5 * moments[:, 16:]).exp() * noise) * 0.2325
    assert_close(vae.encode(images, noise), want, 1e-4)
    torch.manual_seed(3)
    drawn = vae.encode(images)
    torch.manual_seed(4)
    assert not torch.equal(drawn, vae.encode(images))
    assert not drawn.requires_grad


def test_log_variance_is_clamped() -> None:
    moments = torch.tensor([[0.0, 500.0]]).reshape(1, 2, 1, 1)
    assert posterior_sample(moments, torch.ones(1, 1, 1, 1), 1.0).item() == pytest.approx(np.exp(10))


def test_frozen_and_always_in_eval_mode(vae: Autoencoder) -> None:
    holder = torch.nn.ModuleList([vae]).train()
    assert not any(module.training for module in holder[0].modules())
    assert not any(p.requires_grad for p in vae.parameters())


@pytest.mark.parametrize("layout", ["bare", "state_dict", "safetensors", "with training parts"])
def test_other_layouts_of_the_file(layout: str, tmp_path: Path, vae: Autoencoder) -> None:
    state, path = official_state(), tmp_path / "vae.pt"
    if layout == "safetensors":
        path = tmp_path / "vae.safetensors"
        save_file(state, path)
    elif layout == "with training parts":
        torch.save({"state_dict": state | {"loss.logvar": torch.zeros(())}, "epoch": 3}, path)
    else:
        torch.save(state if layout == "bare" else {layout: state}, path)
    assert open_vae(path).identity()["sha256"] == vae.identity()["sha256"]


def test_what_does_not_fit_is_listed(tmp_path: Path) -> None:
    state, path = official_state(), tmp_path / "vae.ckpt"
    del state["decoder.up.3.block.1.conv1.bias"]
    state["encoder.extra.weight"] = torch.zeros(2)
    state["quant_conv.bias"] = torch.zeros(7)
    torch.save({"model": state}, path)
    with pytest.raises(CheckpointError) as error:
        load_official_kl16(path)
    told = str(error.value)
    assert told.startswith(f"{path} is not a KL-16 autoencoder in the official layout.\n")
    assert "missing (1): decoder.up.3.block.1.conv1.bias" in told
    assert "unexpected (1): encoder.extra.weight" in told
    assert "misshaped (1): quant_conv.bias (7,), expected (32,)" in told


def test_files_that_are_something_else(tmp_path: Path) -> None:
    path = tmp_path / "other.ckpt"
    torch.save({"model": {"layer.weight": torch.zeros(2)}}, path)
    with pytest.raises(CheckpointError, match=r"missing .*encoder\.conv_in\.weight"):
        load_official_kl16(path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(CheckpointError, match="read safely"):
        load_official_kl16(path)
    with pytest.raises(CheckpointError, match="No such file"):
        open_vae(tmp_path / "absent.ckpt")
    narrow = {name: t[..., :20, :, :, :] if name == "encoder.down.0.block.0.conv1.weight" else t
              for name, t in official_state().items()}  # fmt: skip
    torch.save(narrow, path)
    with pytest.raises(CheckpointError, match="multiple of 32"):
        load_official_kl16(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("diffusers") / "tiny-vae"
    AutoencoderKL(**TINY).save_pretrained(path)
    return path


def test_a_diffusers_folder_brings_its_own_scale(folder: Path) -> None:
    vae = open_vae(folder)
    assert isinstance(vae, Autoencoder)
    assert (vae.scale_factor, vae.shift_factor, vae.factor, vae.latent_channels) == (0.7, 0.1, 2, 4)
    images, noise = torch.randn(1, 3, 8, 8), torch.randn(1, 4, 4, 4)
    posterior = vae.model.encode(images).latent_dist
    assert_close(vae.encode(images, noise), (posterior.mean + posterior.std * noise - 0.1) * 0.7, 1e-5)
    latents = torch.randn(1, 4, 4, 4)
    assert_close(vae.decode(latents), vae.model.decode(latents / 0.7 + 0.1).sample, 1e-5)
    identity = vae.identity()
    assert identity == json.loads(json.dumps(identity))
    assert (identity["kind"], identity["path"], len(identity["sha256"])) == ("diffusers", str(folder), 64)


def test_the_vae_of_a_pipeline_folder(folder: Path) -> None:
    (folder.parent / "pipeline").mkdir(exist_ok=True)
    link = folder.parent / "pipeline" / "vae"
    link.unlink(missing_ok=True)
    link.symlink_to(folder)
    assert same_vae(open_vae(link.parent).identity(), open_vae(folder).identity())


def test_a_folder_that_lacks_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    del tensors["quant_conv.bias"]
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing \(1\): quant_conv.bias"):
        open_vae(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderDC"}')
    with pytest.raises(CheckpointError, match="holds AutoencoderDC"):
        open_vae(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no readable config\.json"):
        open_vae(tmp_path)


def test_channels_scaled_one_by_one_are_refused(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    AutoencoderKL(**TINY, latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="latents_mean"):
        open_vae(tmp_path)


def test_a_name_that_is_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no VAE at pixel\..*Did you mean 'pixels'"):
        open_vae("pixel")


def test_a_hub_name_is_fetched_and_a_pipeline_has_its_vae_inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    real, asked = diffusers.AutoencoderKL.from_pretrained, []

    def hub(name: str, subfolder: str = "", **options: object) -> object:
        asked.append((name, subfolder))
        if (name, subfolder) != ("owner/pipeline", "vae"):
            raise OSError("404")
        return real(folder, **options)

    monkeypatch.setattr(diffusers.AutoencoderKL, "from_pretrained", hub)
    identity = open_vae("owner/pipeline").identity()
    assert asked == [("owner/pipeline", ""), ("owner/pipeline", "vae")]
    assert (identity["kind"], identity["name"]) == ("diffusers", "owner/pipeline")
    assert same_vae(identity, open_vae_of(real, folder))
    with pytest.raises(CheckpointError, match=r"owner/none is no file or folder here.*404"):
        open_vae("owner/none")


def open_vae_of(load: object, folder: Path) -> dict[str, object]:
    return Autoencoder(load(folder), {"kind": "diffusers"}).identity()  # type: ignore[operator]


def test_images_and_latents_that_do_not_fit(vae: Autoencoder) -> None:
    with pytest.raises(ConfigError, match=r"takes images \[B, 3, H, W\]"):
        vae.moments(torch.zeros(1, 1, 32, 32))
    with pytest.raises(ConfigError, match=r"multiples of 16 px .* got 32 x 40"):
        vae.moments(torch.zeros(1, 3, 32, 40))
    with pytest.raises(ConfigError, match=r"decodes latents \[B, 16, h, w\]; got \[1, 4, 2, 2\]"):
        vae.decode(torch.zeros(1, 4, 2, 2))
    with pytest.raises(ConfigError, match=r"noise must be \[1, 16, 2, 2\]"):
        vae.encode(torch.zeros(1, 3, 32, 32), torch.zeros(1, 16, 2, 3))


def test_identity_is_of_the_weights(vae: Autoencoder, folder: Path) -> None:
    ours, other = vae.identity(), open_vae(folder).identity()
    assert same_vae(ours, ours | {"path": "elsewhere", "kind": "diffusers"})
    assert not same_vae(ours, other)
    assert not same_vae(ours, ours | {"scale_factor": 1.0})
    assert not same_vae(ours, Pixels().identity())


def test_pixel_space_is_the_identity() -> None:
    pixels = open_vae("pixels")
    images = torch.rand(2, 3, 5, 7)
    assert isinstance(pixels, Pixels)
    assert pixels.encode(images) is images
    assert pixels.decode(images) is images
    assert pixels.identity()["kind"] == "pixels"
    assert open_vae("pixels", channels=1).latent_channels == 1
    with pytest.raises(ConfigError, match=r"\[B, 3, H, W\]"):
        pixels.decode(torch.zeros(1, 1, 4, 4))
    with pytest.raises(ConfigError, match="channels must be 1"):
        Pixels(4)


def test_importing_the_module_is_quick() -> None:
    code = "import sys, nextblock.vae, nextblock.checkpoints.vae_files; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
