"""The table of latent caching: both arms write the same latents, and each row says its share of the limit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import latent_caching
from nextblock.data.latents import open_latents


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    folder, rng = tmp_path / "images", np.random.default_rng(0)
    folder.mkdir()
    for n in range(3):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / f"{n}.jpg")
    return sorted(folder.iterdir())


def test_both_ways_give_the_same_latents(files: list[Path], tmp_path: Path) -> None:
    vae = latent_caching.write_vae(tmp_path / "vae.ckpt")
    latent_caching.ours(files[0].parent, vae, tmp_path / "ours", 32, "cpu")()
    latent_caching.plain(files, vae, tmp_path / "plain", 32, "cpu")()
    cache = open_latents(tmp_path / "ours-0")
    for n, file in enumerate(files):
        with np.load(tmp_path / "plain-0" / f"{file.stem}.npz") as one:
            for flip, name in ((False, "moments"), (True, "moments_flip")):
                a, b = cache.moments([n], [flip])[0].astype(np.float32), one[name].astype(np.float32)
                assert np.abs(a - b).max() <= 2e-3 * np.abs(b).max()  # float16


def test_a_row_is_measured_in_small(files: list[Path], tmp_path: Path) -> None:
    vae = latent_caching.write_vae(tmp_path / "vae.ckpt")
    planned = latent_caching.planned("cpu")
    assert [row.name for row in planned][-1] == "latent caching, 256 px, full width"
    row = latent_caching._row(planned[0], 32, files, vae, tmp_path, (0, 1), "small KL-16")
    assert row.met in (True, False)
    assert (row.ratio("limit") or 0) > 0
    assert "3 images with their mirror images, small KL-16" in row.note


def test_operations_grow_with_the_number_of_pixels(tmp_path: Path) -> None:
    vae = latent_caching.write_vae(tmp_path / "vae.ckpt")
    assert latent_caching.encoder_flops(vae, 64) == pytest.approx(2 * 543e6, rel=0.01)
    assert latent_caching.encoder_flops(vae, 128) == pytest.approx(8 * 543e6, rel=0.01)
