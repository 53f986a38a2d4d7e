"""What is killed: one small job of each kind of work, what it goes on with, and what must come out the same."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data_room.benchmark_folders import cifar10, eurosat
from PIL import Image

from nextblock.checkpoints.pretrained import save_pretrained
from nextblock.data.latents.cache import About as LatentsAbout
from nextblock.data.latents.shards import Shard
from nextblock.data.prepared.about import About as PreparedAbout
from nextblock.data.preprocess import Preprocessing
from nextblock.training.checkpoint import list_checkpoints, newest_checkpoint
from nextblock.training.run_folder import read_metrics
from nextblock.vae import Pixels
from nextblock.xar.config import XARConfig
from nextblock.xar.model import XAR
from nextblock.xtra.config import XTRAConfig
from nextblock.xtra.model import XTRA
from tiny_generator import tiny as tiny_generator
from tiny_run import flags, tiny, write_images

INTERVAL = 4  # steps between two checkpoints
Digest = dict[str, str]


@dataclass(frozen=True)
class Victim:
    """A job that is killed.

    begin: the command for an output folder; again: the one that goes on, once `begun` says that there is something to
    go on with (before that `begin` is given again). digest: what must be the same in the end. check: raises
    AssertionError for a folder that must not be, at whatever moment it was killed; told the finished folder of an
    uninterrupted job, too. marks: what is done -> a pattern in the paths of the files that it touches. workers:
    whether it has worker processes.
    """

    name: str
    begin: Callable[[Path], list[str]]
    again: Callable[[Path], list[str]]
    begun: Callable[[Path], bool]
    digest: Callable[[Path], Digest]
    check: Callable[[Path, Path], None]
    marks: Mapping[str, str] = field(default_factory=dict)
    workers: bool = False


def victims(material: Path, length: int = 1) -> dict[str, Victim]:
    """All kinds of work, on what `make_material` has made; so many times as long."""
    found = (
        _pretraining(material, 6 * length),
        _generator(material, 6 * length),
        _suite(material, 4 * length),
        _latents(material),
        _samples(material, 40 * length),
        _prepared(material),
    )
    return {victim.name: victim for victim in found}


def make_material(folder: Path, noise: int = 60) -> Path:
    """Images, so many larger ones of noise, weights and data sets, all tiny."""
    write_images(folder / "images")
    write_images(folder / "val", per_class=4)
    _write_noise(folder / "noise", noise)
    cifar10(folder / "datasets")
    eurosat(folder / "datasets")
    write_vae(folder / "vae")
    torch.manual_seed(0)
    plain = Preprocessing((16, 16), resize_px=16)
    save_pretrained(folder / "encoder", XTRA(XTRAConfig(**tiny()["model"])), plain.to_dict(), None)
    model = XAR(XARConfig(8, 1, 1, entity_size=4, width=32, depth=4, num_heads=2, num_classes=3))
    about = {
        "vae": Pixels(1).identity(), "classes": ["a", "b", "c"], "image_size_px": [8, 8], "channels": 1,
        "weights": "ema",
    }  # fmt: skip
    preprocessing = Preprocessing((8, 8), resize_px=8, channels=1).to_dict()
    save_pretrained(folder / "generator", model, preprocessing, None, {"generator": about})
    return folder


def _write_noise(folder: Path, count: int, side_px: int = 160) -> None:
    """Some 77 kB each as PNG: 14 of them in a shard of 1 MiB."""
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
    for i in range(count):
        pixels = generator.integers(0, 256, (side_px, side_px, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "ab"[i % 2] / f"{i:03d}.bmp")


def write_vae(folder: Path) -> None:
    """Weights of a tiny autoencoder."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).save_pretrained(folder)  # fmt: skip


# --- the jobs


def _pretraining(material: Path, epochs: int) -> Victim:
    sections = tiny(
        data={"train": material / "images", "val": material / "val", "workers": 2},
        model={"drop_path": 0.1, "order": "pseudo_random"},
        training={"epochs": epochs, "checkpoint_every_steps": INTERVAL},
        watch={"pictures": 0, "every_epochs": 2},
    )
    return Victim(
        "xtra",
        lambda out: ["pretrain", "--config", "xtra_cifar10", *flags(sections), "--out", str(out)],
        lambda out: ["pretrain", "--resume", str(out)],
        _is_a_run, _trained, _check_run, {"save": ".partial-step-", "validation": "/val/"}, workers=True,
    )  # fmt: skip


def _generator(material: Path, epochs: int) -> Victim:
    sections = tiny_generator(
        data={"train": material / "images", "val": material / "val", "workers": 1},
        model={"dropout": 0.1, "attention_dropout": 0.1},
        training={"epochs": epochs, "ema_decay": 0.9, "checkpoint_every_steps": INTERVAL},
        watch={"pictures": 0, "every_epochs": 2},
    )
    return Victim(
        "xar",
        lambda out: ["train-generator", "--config", "xar_cifar10", *flags(sections), "--out", str(out)],
        lambda out: ["train-generator", "--resume", str(out)],
        _is_a_run, _trained, _check_run, {"save": ".partial-step-", "validation": "/val/"}, workers=True,
    )  # fmt: skip


def _suite(material: Path, epochs: int) -> Victim:
    probe = {
        "heads": "linear", "lrs": "1e-3 1e-2", "batch_size": "2", "workers": "0", "val_fraction": "0.3",
        "evaluate_every_epochs": "4", "epochs": str(epochs), "checkpoint_every_minutes": "0.0005",
    }  # fmt: skip

    def command(out: Path) -> list[str]:
        options = [part for name, value in probe.items() for part in (f"--probe.{name}", *value.split())]
        place = ["--data_root", str(material / "datasets"), "--probe.cache", f"{out}.features", "--out", str(out)]
        return ["probe", str(material / "encoder"), "--suite", "xtra15", *place, *options]

    return Victim(
        "probe suite", command, command, lambda out: (out / "suite.json").is_file(), _probed, _check_suite,
        {"save": ".partial-step-", "features": "/features/", "result": "result"},
    )  # fmt: skip


def _latents(material: Path) -> Victim:
    def command(out: Path) -> list[str]:
        options = ["--image_size_px=64", "--dtype=float32", "--shard_mb=1", "--batch_size=4", "--workers=1"]
        where = ["--dataset", str(material / "noise"), "--vae", str(material / "vae"), "--out", str(out)]
        return ["cache-latents", *where, *options, "--device=cpu"]

    return Victim(
        "latents", command, command, lambda out: True, _files, _check_latents,
        {"save": "partial", "reading": "/noise/"}, workers=True,
    )  # fmt: skip


def _samples(material: Path, count: int) -> Victim:
    asked = [f"--n={count}", "--batch_size=4", "--steps=3", "--guidance=2", "--device=cpu", "--animation=2", "--npz"]

    def command(out: Path) -> list[str]:
        return ["sample", str(material / "generator"), *asked, "--out", str(out)]

    return Victim(
        "samples", command, command, lambda out: (out / "sample.json").is_file(), _sampled,
        _check_samples, {"save": ".partial"},
    )  # fmt: skip


def _prepared(material: Path) -> Victim:
    def command(out: Path) -> list[str]:
        options = ["--format=png", "--shard_mb=1", "--workers=2"]
        return ["prepare", str(material / "noise"), "--out", str(out), *options]

    return Victim(
        "prepare", command, command, lambda out: True, _files, _check_prepared,
        {"save": "partial", "index": "index.bin"}, workers=True,
    )  # fmt: skip


# --- what comes out


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def digest_of(value: Any) -> str:
    """SHA-256 over numbers, names and order of whatever a checkpoint holds."""
    digest = hashlib.sha256()
    _add(digest, value)
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        for key in value:
            digest.update(f"{key!r}:".encode())
            _add(digest, value[key])
    elif isinstance(value, list | tuple):
        digest.update(f"{len(value)}".encode())
        for each in value:
            _add(digest, each)
    else:
        digest.update(repr(value).encode())


def _rows(file: Path) -> str:
    rows = ({k: v for k, v in row.items() if k != "images_per_s"} for row in read_metrics(file))
    return sha256(json.dumps(list(rows)).encode())


def _trained(out: Path) -> Digest:
    """Every part of the last checkpoint (weights, their average, optimiser, meters, position), the losses of every
    step, and the exported weights. There is no random state: all that is drawn is a function of seed and position."""
    path, state = newest_checkpoint(out / "checkpoints")
    found = {f"{path.name}/{part}": digest_of(value) for part, value in state.items()}
    found |= {"metrics.csv": _rows(out / "metrics.csv")}
    for file in sorted(out.glob("exported*/*.safetensors")):
        found[str(file.relative_to(out))] = sha256(file.read_bytes())
    return found


def _probed(out: Path) -> Digest:
    found = {"results.jsonl": sha256((out / "results.jsonl").read_bytes())}
    for file in sorted(out.glob("*/heads.csv")):
        with open(file, newline="") as lines:
            found[str(file.relative_to(out))] = sha256(json.dumps(list(csv.reader(lines))).encode())
        found |= {f"{file.parent.name}/{name}": value for name, value in _trained(file.parent).items()}
    return found


def _files(out: Path) -> Digest:
    """Every file, and that there is no other."""
    return {path.name: sha256(path.read_bytes()) for path in sorted(out.iterdir())}


def _sampled(out: Path) -> Digest:
    names = ["contact-sheet.png", "entities.gif"]
    found = {name: sha256((out / name).read_bytes()) for name in names}
    found |= {path.name: sha256(path.read_bytes()) for path in (out / "images").iterdir()}
    with np.load(out / "samples.npz") as arrays:
        found |= {name: sha256(arrays[name].tobytes()) for name in arrays.files}
    record = json.loads((out / "sample.json").read_text())
    return found | {"settings": repr(record["settings"]), "finished": str(bool(record["finished"]))}


# --- what must be at every moment


def _is_a_run(out: Path) -> bool:
    return (out / "config.yaml").is_file()


def _check_run(out: Path, reference: Path) -> None:
    if not _is_a_run(out):
        assert not (out / "metrics.csv").is_file() or not read_metrics(out / "metrics.csv"), "a lost beginning"
        return
    told: list[str] = []
    _, state = newest_checkpoint(out / "checkpoints", told.append)
    assert not told, told
    rows = read_metrics(out / "metrics.csv") if (out / "metrics.csv").is_file() else []
    lost = (int(rows[-1]["step"]) if rows else 0) - int(state["step"])
    assert lost <= INTERVAL, f"{lost} steps lost"
    kept = {row["step"]: row["loss"] for row in read_metrics(reference / "metrics.csv")}
    assert all(kept[row["step"]] == row["loss"] for row in rows), "other losses"


def _check_suite(out: Path, reference: Path) -> None:
    for folder in out.glob("*/checkpoints"):
        told: list[str] = []
        if list_checkpoints(folder):
            newest_checkpoint(folder, told.append)
        assert not told, told
    for file in out.glob("*/result.json"):
        expected = json.loads((reference / file.parent.name / file.name).read_text())["rows"]
        assert json.loads(file.read_text())["rows"] == expected


def _check_latents(out: Path, reference: Path) -> None:
    if (out / "latents.json").is_file():
        for record in LatentsAbout.read(out).shards.values():
            Shard(out, record).require_whole()
    _check_shards(out, reference)


def _check_prepared(out: Path, reference: Path) -> None:
    if (out / "prepared.json").is_file():
        for record in PreparedAbout.read(out).shards.values():
            record.require_whole(out)
    _check_shards(out, reference)


def _check_shards(out: Path, reference: Path) -> None:
    for file in out.glob("shard-*"):
        assert file.read_bytes() == (reference / file.name).read_bytes(), f"{file.name} is not whole"


def _check_samples(out: Path, reference: Path) -> None:
    for file in (out / "images").glob("[0-9]*.png"):
        assert file.read_bytes() == (reference / "images" / file.name).read_bytes(), f"{file.name} is not whole"
