"""cache-latents: what is in the folder, what happens to a stopped one, and what is refused."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from close import assert_close
from killed import Killed, killed_at
from nextblock.checkpoints.vae_files import open_vae
from nextblock.data.latents import adm_center_crop, cache, making, open_latents
from nextblock.data.sources import open_source
from nextblock.errors import CheckpointError, ConfigError, DataError, RunError
from nextblock.jobs import cache_latents as job
from nextblock.jobs.cache_latents import cache_latents
from nextblock.training.signals import Stopped, StopRequest
from nextblock.vae import Autoencoder

SIZES: dict[str, Any] = {
    "block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip


def save_vae(folder: Path, seed: int, **changes: Any) -> Path:
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    AutoencoderKL(**(SIZES | changes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vae(tmp_path_factory.mktemp("vae") / "tiny", 0)


@pytest.fixture(scope="module")
def asked(images: Path, vae: Path) -> dict[str, Any]:
    """24 images of 16 px: 8 x 8 x 4 latents, 2 KiB for both flips in float16."""
    return {"dataset": images, "vae": vae, "image_size_px": 16, "batch_size": 5, "workers": 0, "quiet": True}


def small_shards(monkeypatch: pytest.MonkeyPatch, images: int) -> None:
    """Shards of so many images; `shard_mb` counts in whole MiB."""
    begin = job.begin

    def smaller(*arguments: Any) -> Any:
        about = dataclasses.replace(begin(*arguments), shard_images=images)
        about.write(arguments[0])
        return about

    monkeypatch.setattr(job, "begin", smaller)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_cache_holds_the_moments_of_both_flips(asked: dict[str, Any], tmp_path: Path) -> None:
    folder = cache_latents(**asked, out=tmp_path / "cache", dtype="float32")
    made, vae = open_latents(folder), open_vae(asked["vae"])
    assert isinstance(vae, Autoencoder)
    assert (len(made), made.shape, made.classes, made.image_size_px) == (24, (8, 8, 8), ["left", "top"], 16)
    assert made.labels.tolist() == [0] * 12 + [1] * 12
    assert made.vae == vae.identity()
    assert made.name(13) == "top/001.png"
    pixels = np.array(Image.open(Path(asked["dataset"]) / "top/001.png"))
    x = torch.from_numpy(adm_center_crop(pixels, 16).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    for flip, image in ((False, x), (True, x.flip(3))):
        want = vae.moments(image)[0].numpy()
        np.testing.assert_allclose(made.moments([13], [flip])[0], want, atol=2e-5)
    made.verify()
    about = json.loads((folder / "latents.json").read_text())
    assert about["data"]["count"] == 24
    assert not (folder / "bad_samples.csv").exists()
    assert not list(folder.glob(".*"))


def test_float16_is_close(asked: dict[str, Any], tmp_path: Path) -> None:
    half, single = (open_latents(cache_latents(**asked, out=tmp_path / d, dtype=d)) for d in ("float16", "float32"))
    rows, flips = range(24), [False] * 24
    a, b = half.moments(rows, flips), single.moments(rows, flips)
    assert half.about.bytes_per_image * 2 == single.about.bytes_per_image
    assert 0 < (np.abs(a - b) / np.abs(b).clip(6e-5)).max() <= 2.0**-11


def test_batch_size_and_workers_change_rounding_only(asked: dict[str, Any], tmp_path: Path) -> None:
    one = open_latents(cache_latents(**asked, out=tmp_path / "one", dtype="float32"))
    again = cache_latents(**asked | {"workers": 1}, out=tmp_path / "again", dtype="float32")
    assert content(one.folder)["shard-00000.safetensors"] == content(again)["shard-00000.safetensors"]
    other = open_latents(cache_latents(**asked | {"batch_size": 24}, out=tmp_path / "other", dtype="float32"))
    a, b = (made.moments(range(24), [True] * 24) for made in (one, other))
    np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def test_a_cpu_takes_few_pixels_at_a_time(vae: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of images, and what it gives is the moments of each and of its mirror image."""
    model, passes = open_vae(vae), []
    assert isinstance(model, Autoencoder)
    x = torch.randn(5, 3, 8, 16)
    want = torch.stack([model.moments(x), model.moments(x.flip(3))], dim=1)
    moments = model.moments
    monkeypatch.setattr(model, "moments", lambda images: passes.append(len(images)) or moments(images))
    monkeypatch.setattr(making, "CPU_PASS_PIXELS", 4 * 8 * 16)
    found = making._both_moments(model, x)
    assert passes == [4, 4, 2]
    assert_close(found, want, 1e-5)
    assert torch.equal(making._both_moments(model, x[:2]), found[:2])  # the same passes, the same bytes
    monkeypatch.setattr(making, "CPU_PASS_PIXELS", 8)
    passes.clear()
    assert_close(making._both_moments(model, x), want, 1e-5)
    assert passes == [1] * 10


@pytest.mark.parametrize("moment", ["first batch", "third shard", "shard on disk, not recorded", "before the end"])
def test_stopped_anywhere_and_given_again(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    small_shards(monkeypatch, 7)
    whole = content(cache_latents(**asked, out=tmp_path / "cache"))
    assert sum(name.startswith("shard-") for name in whole) == 4
    for path in (tmp_path / "cache").iterdir():
        path.unlink()
    with monkeypatch.context() as patch:
        stop_at(patch, moment)
        with pytest.raises(Killed):
            cache_latents(**asked, out=tmp_path / "cache")
    there = {"first batch": 0, "third shard": 2, "shard on disk, not recorded": 1, "before the end": 4}[moment]
    with pytest.raises(DataError, match=f"not finished: {there} of 4 shards"):
        open_latents(tmp_path / "cache")
    if moment == "third shard":
        cache_latents(resume=tmp_path / "cache", batch_size=5, workers=0, quiet=True)
    else:
        cache_latents(**asked, out=tmp_path / "cache")
    assert content(tmp_path / "cache") == whole


def stop_at(patch: pytest.MonkeyPatch, moment: str) -> None:
    if moment == "shard on disk, not recorded":
        patch.setattr(making, "with_shards", killed_at(1, making.with_shards))
    elif moment == "before the end":
        patch.setattr(cache, "write_whole", killed_at(6, cache.write_whole))
    else:
        patch.setattr(making, "_encoded", killed_at(0 if moment == "first batch" else 4, making._encoded))


def test_a_killed_process(asked: dict[str, Any], tmp_path: Path) -> None:
    """A real one, by SIGKILL, in the middle; the uninterrupted run is made here."""
    code = (
        "import sys, time, dataclasses; from nextblock.jobs import cache_latents as job; begin = job.begin\n"
        "def smaller(*a):\n"
        "    about = dataclasses.replace(begin(*a), shard_images=3); about.write(a[0]); return about\n"
        "job.begin = smaller\n"
        "from nextblock.data.latents import making; encoded = making._encoded\n"
        "making._encoded = lambda *a: (time.sleep(0.2), encoded(*a))[1]\n"
        "job.cache_latents(dataset=sys.argv[1], vae=sys.argv[2], out=sys.argv[3], image_size_px=16, batch_size=2,"
        " workers=1)\n"
    )
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(asked["dataset"]), str(asked["vae"]), str(cut)],
        env=env, start_new_session=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 100
    while not (cut / "shard-00001.safetensors").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert 1 <= len(json.loads((cut / "latents.json").read_text())["shards"]) < 8
    cache_latents(resume=cut, batch_size=2, workers=0, quiet=True)
    with pytest.MonkeyPatch.context() as patch:
        small_shards(patch, 3)
        cache_latents(**asked | {"batch_size": 2}, out=whole)
    assert content(cut) == content(whole)


class StopAfter(StopRequest):
    """Asks for a stop when it is looked at for the n-th time."""

    looks = 4

    def __call__(self) -> bool:
        self.looks -= 1
        if self.looks == 0:
            self.received = signal.SIGTERM
        return self.received != 0


def test_a_stop_is_heard_before_the_next_batch_and_told_once(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small_shards(monkeypatch, 7)
    whole = content(cache_latents(**asked, out=tmp_path / "whole"))
    folder, encoded = tmp_path / "cache", making._encoded
    batches: list[bool] = []
    with monkeypatch.context() as patch:
        patch.setattr(job, "StopRequest", StopAfter)
        patch.setattr(making, "_encoded", lambda *values: batches.append(True) or encoded(*values))
        with pytest.raises(Stopped, match=f"nextblock cache-latents --resume {folder}$") as error:
            cache_latents(**asked | {"quiet": False}, out=folder)
    assert error.value.signal == signal.SIGTERM
    assert len(batches) == 3  # two of the first shard, one of the second
    assert "--resume" not in capsys.readouterr().out  # the shell says it
    assert len(json.loads((folder / "latents.json").read_text())["shards"]) == 1
    cache_latents(resume=folder, batch_size=5, workers=0, quiet=True)
    assert content(folder) == whole


def test_a_second_interrupt_tells_how_to_go_on_too(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(making, "_encoded", interrupted)
    with pytest.raises(KeyboardInterrupt, match=f"nextblock cache-latents --resume {tmp_path / 'cache'}$"):
        cache_latents(**asked, out=tmp_path / "cache")


def test_a_job_in_the_background_can_be_stopped(asked: dict[str, Any], tmp_path: Path) -> None:
    """A real one, started with Ctrl-C ignored as a script's `&` does; it says one thing, and goes on later."""
    script = (
        "import sys, time; from nextblock.cli import main; from nextblock.data.latents import making\n"
        "encoded = making._encoded\n"
        "making._encoded = lambda *a: (print('encoding', flush=True), time.sleep(0.2), encoded(*a))[2]\n"
        "sys.exit(main(['cache-latents', *sys.argv[1:]]))\n"
    )
    arguments = ["--image_size_px=16", "--batch_size=2", "--workers=1", f"--out={tmp_path / 'cache'}"]
    process = subprocess.Popen(
        [sys.executable, "-c", script, f"--dataset={asked['dataset']}", f"--vae={asked['vae']}", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN), env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    while "encoding" not in process.stdout.readline():
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    output, told = process.communicate(timeout=100)
    assert process.returncode == 130, told
    assert output.count("encoding") < 11  # of 12
    lines = [line for line in told.splitlines() if line]
    assert lines == [
        "stopping when this batch is done; Ctrl-C again stops at once",
        "nextblock: stopped. To go on after the last whole shard: "
        f"nextblock cache-latents --resume {tmp_path / 'cache'}",
    ]


def test_a_damaged_shard_is_made_anew(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small_shards(monkeypatch, 7)
    folder = cache_latents(**asked, out=tmp_path / "cache")
    whole = content(folder)
    damaged = bytearray(whole["shard-00002.safetensors"])
    damaged[-1] ^= 1
    (folder / "shard-00002.safetensors").write_bytes(damaged)
    (folder / "shard-00000.safetensors").write_bytes(whole["shard-00000.safetensors"][:-5])
    cache_latents(resume=folder, batch_size=5, workers=0)
    told = capsys.readouterr().out
    assert "shard-00002.safetensors is damaged" in told
    assert "2 of 4 shards" in told
    assert content(folder) == whole


def test_one_flipped_label_is_noticed_and_mended(asked: dict[str, Any], tmp_path: Path) -> None:
    folder = cache_latents(**asked, out=tmp_path / "cache")
    path, whole = folder / "shard-00000.safetensors", content(folder)
    damaged = bytearray(path.read_bytes())
    length = int.from_bytes(damaged[:8], "little")
    damaged[8 + length + json.loads(damaged[8 : 8 + length])["labels"]["data_offsets"][0]] ^= 1  # the other class
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=rf"shard-00000.*labels.*cache-latents --resume {folder}"):
        open_latents(folder)
    cache_latents(resume=folder, batch_size=5, workers=0, quiet=True)
    assert content(folder) == whole
    assert open_latents(folder).labels.tolist() == [0] * 12 + [1] * 12


def test_labels_that_no_class_has_are_told_before_they_are_stored(asked: dict[str, Any], tmp_path: Path) -> None:
    source = open_source(asked["dataset"])
    source.classes = ("left",)  # type: ignore[misc]
    with pytest.raises(DataError, match=r"top/000\.png has the label 1, but there is 1 class"):
        cache_latents(**asked | {"dataset": source, "batch_size": 12}, out=tmp_path / "cache")
    assert not (tmp_path / "cache" / "shard-00000.safetensors").exists()


def test_a_finished_cache_is_left_alone(asked: dict[str, Any], tmp_path: Path) -> None:
    folder = cache_latents(**asked, out=tmp_path / "cache")
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert cache_latents(**asked, out=folder) == folder
    assert cache_latents(resume=folder, quiet=True) == folder
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_what_may_not_change(asked: dict[str, Any], tmp_path: Path) -> None:
    folder = cache_latents(**asked, out=tmp_path / "cache")
    with pytest.raises(ConfigError, match=r"image_size_px was 16, now 32.*another --out"):
        cache_latents(**asked | {"image_size_px": 32}, out=folder)
    with pytest.raises(ConfigError, match="dtype was float16, now float32"):
        cache_latents(resume=folder, dtype="float32", quiet=True)
    other = save_vae(tmp_path / "other", 1)
    with pytest.raises(RunError, match=r"begun with another VAE: sha256 .* there, .* here"):
        cache_latents(**asked | {"vae": other}, out=folder)
    scaled = save_vae(tmp_path / "scaled", 0, scaling_factor=0.5)
    with pytest.raises(RunError, match=r"another VAE: scale_factor 0\.18215 there, 0\.5 here"):
        cache_latents(resume=folder, vae=scaled, quiet=True)


def test_changed_images_are_refused(asked: dict[str, Any], tmp_path: Path) -> None:
    images = shutil.copytree(asked["dataset"], tmp_path / "images")
    folder = cache_latents(**asked | {"dataset": images}, out=tmp_path / "cache")
    moved = images.rename(tmp_path / "moved")
    cache_latents(resume=folder, dataset=moved, quiet=True)  # the same images elsewhere
    Image.new("RGB", (20, 20)).save(moved / "top" / "new.png")
    with pytest.raises(RunError, match=r"images are not those.*1 added: top/new\.png"):
        cache_latents(resume=folder, dataset=moved, quiet=True)


def test_labels_belong_to_the_data(asked: dict[str, Any], tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
    first, second = (pixels, np.arange(6)), (pixels, np.arange(6)[::-1].copy())
    folder = cache_latents(**asked | {"dataset": first}, out=tmp_path / "cache")
    made = open_latents(folder)
    assert (made.labels.tolist(), made.classes) == (list(range(6)), None)
    with pytest.raises(ConfigError, match="it was a Python object"):
        cache_latents(resume=folder, quiet=True)
    with pytest.raises(RunError, match="other labels"):
        cache_latents(resume=folder, dataset=second, quiet=True)
    cache_latents(resume=folder, dataset=first, quiet=True)


def test_broken_images_are_left_out_and_listed(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_shards(monkeypatch, 4)
    images = shutil.copytree(asked["dataset"], tmp_path / "images")
    for number in (0, 1, 2, 3, 8):  # all of the first shard, and one of the third
        (images / "left" / f"{number:03d}.png").write_bytes(b"no image")
    mine = asked | {"dataset": images}
    made = open_latents(cache_latents(**mine, out=tmp_path / "cache"))
    assert len(made) == 19
    assert made.name(0) == "left/004.png"
    assert made.name(4) == "left/009.png"
    assert made.labels.tolist() == [0] * 7 + [1] * 12
    with open(made.folder / "bad_samples.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["position"] for row in rows] == ["0", "1", "2", "3", "8"]
    for number in range(12):
        (images / "left" / f"{number:03d}.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="12 images cannot be decoded, more than the 10 allowed"):
        cache_latents(**mine, out=tmp_path / "too many")
    assert (tmp_path / "too many" / "bad_samples.csv").is_file()


def test_gray_images_for_a_vae_of_one_channel(asked: dict[str, Any], tmp_path: Path) -> None:
    vae = save_vae(tmp_path / "gray", 0, in_channels=1, out_channels=1)
    made = open_latents(cache_latents(**asked | {"vae": vae}, out=tmp_path / "cache"))
    assert made.vae["image_channels"] == 1
    assert made.preprocessing.channels == 1


def test_what_is_refused_at_once(asked: dict[str, Any], tmp_path: Path) -> None:
    def refused(match: str, kind: type[Exception] = ConfigError, **changes: Any) -> None:
        with pytest.raises(kind, match=match):
            cache_latents(**{"out": tmp_path / "x", **asked, **changes})

    refused("needs --out, a new folder", out=None)
    refused("needs --out, a new folder", resume=tmp_path / "y")
    refused("needs --dataset", dataset=None)
    refused("needs --vae", vae=None)
    refused("pixel space needs no latents", vae="pixels")
    refused("multiple of 2 for this VAE; got 17. Take 16 or 18", image_size_px=17)
    refused("image_size_px must be at least 1", image_size_px=0)
    refused("dtype must be 'float16' or 'float32'", dtype="int8")
    refused("batch_size must be at least 1", batch_size=0)
    refused("no VAE at", CheckpointError, vae=tmp_path / "none")
    refused("'cifar1O' is neither .* nor .*Did you mean 'cifar10'.* write hf:NAME", DataError, dataset="cifar1O")
    refused("'./nowhere' is neither .* `nextblock datasets` lists.* write hf:NAME", DataError, dataset="./nowhere")
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("keep")
    refused("not empty, and nothing is ever overwritten", RunError, out=full)
    refused("is no latent cache", RunError, out=None, resume=full)
    assert not (tmp_path / "x").exists()


def test_a_full_disk_is_told_before_the_work(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")(100, 90, 10)
    monkeypatch.setattr(job.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(RunError, match=r"need 0\.0 MiB.* has 0\.0 MiB left"):
        cache_latents(**asked, out=tmp_path / "cache")
