from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from nextblock.data.decoders import chosen_decoder
from nextblock.errors import CheckpointError, ConfigError, DataError, RunError
from nextblock.jobs.opening import open_model
from nextblock.jobs.pretrain import pretrain
from nextblock.training import memory
from nextblock.training.run_folder import read_metrics
from nextblock.training.run_record import read_config
from nextblock.xtra.config import XTRAConfig
from tiny_run import tiny, write_images


def start(out: Path, train: Any, sections: dict[str, Any] | None = None, **values: Any) -> Any:
    chosen = tiny(**(sections or {}))
    chosen["data"]["train"] = train
    return pretrain(config="xtra_cifar10", out=out, quiet=True, **chosen, **values)


def test_a_run_leaves_what_is_promised(run: Path) -> None:
    names = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert names >= {
        "config.yaml", "environment.json", "data_manifest.txt.gz", "metrics.csv", "figures/curves.png",
        "figures/reconstructions-step-00000006.png", "exported/config.json", "exported/model.safetensors",
        "exported/preprocessor_config.json", "exported/README.md", "checkpoints/step-00000006/state.pt",
    }  # fmt: skip
    assert any(name.startswith("tensorboard/") for name in names)
    rows = read_metrics(run / "metrics.csv")
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    assert all(rows[-1][name] for name in ("val_loss", "knn", "effective_rank"))
    about = json.loads((run / "environment.json").read_text())
    assert about["packages"]["torch"] == torch.__version__.split("+")[0] or "+" in about["packages"]["torch"]
    assert about["seed"] == 0
    assert about["data"]["count"] == 24
    card = (run / "exported" / "README.md").read_text()
    assert "next-cell prediction" in card
    assert "48 samples seen (2 epochs, 6 steps of 8)" in card


def test_exported_weights_are_those_of_the_last_checkpoint(run: Path) -> None:
    exported = load_file(run / "exported" / "model.safetensors")
    state = torch.load(run / "checkpoints" / "step-00000006" / "state.pt", weights_only=True)["model"]
    assert all(torch.equal(exported[name], state[name]) for name in state)


def test_the_stored_configuration_is_a_recipe(run: Path, images: Path, tmp_path: Path) -> None:
    again = pretrain(config=run / "config.yaml", out=tmp_path / "again", quiet=True)
    assert again is not None
    first, second = (read_metrics(folder / "metrics.csv") for folder in (run, again.folder))
    assert [row["loss"] for row in first] == [row["loss"] for row in second]


def test_workers_and_accumulation_do_not_change_the_run(run: Path, images: Path, tmp_path: Path) -> None:
    start(tmp_path / "workers", str(images), {"data": {"workers": 2}})
    losses = [[row["loss"] for row in read_metrics(f / "metrics.csv")] for f in (run, tmp_path / "workers")]
    assert losses[0] == losses[1]
    start(tmp_path / "parts", str(images), {"training": {"per_device_batch": 3}})
    parts = [float(row["loss"]) for row in read_metrics(tmp_path / "parts" / "metrics.csv")]
    assert parts == pytest.approx([float(loss) for loss in losses[0]], rel=1e-4)


@pytest.mark.parametrize("order", ["raster", "pseudo_random"])
def test_a_run_in_bf16(images: Path, tmp_path: Path, order: str) -> None:
    changes = {"training": {"precision": "bf16"}, "model": {"order": order, "drop_path": 0.1}}
    start(tmp_path / "bf16", str(images), changes)
    start(tmp_path / "fp32", str(images), {"model": changes["model"]})
    bf16, fp32 = ([float(r["loss"]) for r in read_metrics(tmp_path / n / "metrics.csv")] for n in ("bf16", "fp32"))
    assert bf16 == pytest.approx(fp32, rel=0.02)
    assert bf16 != fp32
    tensors = load_file(tmp_path / "bf16" / "exported" / "model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())


@pytest.mark.parametrize("order", ["raster", "pseudo_random"])
def test_resume_is_bit_identical(images: Path, tmp_path: Path, order: str) -> None:
    sections = {"model": {"order": order, "drop_path": 0.2}, "training": {"keep_checkpoints": 5}}
    start(tmp_path / "whole", str(images), sections)
    start(tmp_path / "cut", str(images), sections)
    cut = tmp_path / "cut"
    for step in (6,):  # as if the run had been killed after step 5
        for file in (cut / "checkpoints" / f"step-{step:08d}").iterdir():
            file.unlink()
        (cut / "checkpoints" / f"step-{step:08d}").rmdir()
    pretrain(resume=cut, quiet=True)
    timed = {"images_per_s"}
    rows = [
        [{k: v for k, v in row.items() if k not in timed} for row in read_metrics(folder / "metrics.csv")]
        for folder in (tmp_path / "whole", cut)
    ]
    assert rows[0] == rows[1]
    a, b = (load_file(folder / "exported" / "model.safetensors") for folder in (tmp_path / "whole", cut))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_keeps_its_decoder(tmp_path: Path, run: Path) -> None:
    assert read_config(run)["data"]["decoder"] == "pillow"
    generator = np.random.default_rng(0)
    for i in range(12):
        (tmp_path / "photos").mkdir(exist_ok=True)
        noise = Image.fromarray(generator.integers(0, 256, (9, 12, 3), dtype=np.uint8))
        noise.resize((120, 90)).save(tmp_path / "photos" / f"{i}.jpg")
    losses = {}
    for name in ("pillow", "auto"):
        start(tmp_path / name, str(tmp_path / "photos"), {"data": {"decoder": name}})
        losses[name] = [row["loss"] for row in read_metrics(tmp_path / name / "metrics.csv")]
    chosen = read_config(tmp_path / "auto")["data"]["decoder"]
    assert chosen == chosen_decoder("auto")
    if chosen != "pillow":
        assert losses["auto"] != losses["pillow"]
        with pytest.raises(ConfigError, match=f"data.decoder was {chosen}, now pillow"):
            pretrain(resume=tmp_path / "auto", data={"decoder": "pillow"}, quiet=True)
    with pytest.raises(ConfigError, match="Did you mean 'pillow'"):
        start(tmp_path / "odd", str(tmp_path / "photos"), {"data": {"decoder": "pilow"}})
    assert not (tmp_path / "odd").exists()


def test_a_finished_run_is_left_alone_and_exported_if_it_was_not(run: Path, images: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    before = (copy / "metrics.csv").read_text()
    shutil.rmtree(copy / "exported")
    done = pretrain(resume=copy, quiet=True)
    assert done is not None
    assert done.finished
    assert (copy / "metrics.csv").read_text() == before
    assert load_file(copy / "exported" / "model.safetensors")


def test_python_sources_arrays_and_objects(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (20, 16, 16, 3), dtype=np.uint8)
    start(tmp_path / "arrays", (pixels, np.arange(20) % 2))

    class Mine:
        def __len__(self) -> int:
            return 20

        def __getitem__(self, index: int) -> Image.Image:
            return Image.fromarray(pixels[index])

    start(tmp_path / "object", Mine())
    losses = [[r["loss"] for r in read_metrics(tmp_path / name / "metrics.csv")] for name in ("arrays", "object")]
    assert losses[0] == losses[1]
    stored = yaml.safe_load((tmp_path / "object" / "config.yaml").read_text())
    assert stored["data"]["train"] is None
    with pytest.raises(ConfigError, match=r"--data\.train"):
        pretrain(resume=tmp_path / "object", quiet=True)
    pretrain(resume=tmp_path / "object", data={"train": Mine()}, quiet=True)


def test_a_gray_run(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (20, 16, 16), dtype=np.uint8)
    start(tmp_path / "gray", pixels, {"model": {"channels": 1}})
    assert open_model(tmp_path / "gray").preprocessing.channels == 1


def test_init_from_starts_from_the_weights(run: Path, images: Path, tmp_path: Path) -> None:
    start(tmp_path / "next", str(images), {"training": {"lr": 1e-12}}, init_from=run)
    a, b = (load_file(f / "exported" / "model.safetensors") for f in (run, tmp_path / "next"))
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)
    with pytest.raises(CheckpointError, match="width 16 there, 32 here"):
        start(tmp_path / "other", str(images), {"model": {"width": 32}}, init_from=run)


def test_broken_images_are_replaced_counted_and_listed(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images")
    (folder / "top" / "000.png").write_bytes(b"")
    (folder / "left" / "003.png").write_bytes((folder / "left" / "002.png").read_bytes()[:100])
    start(tmp_path / "run", str(folder))
    listed = (tmp_path / "run" / "bad_samples.csv").read_text()
    assert "top/000.png" in listed
    assert "left/003.png" in listed
    assert read_metrics(tmp_path / "run" / "metrics.csv")[-1]["bad_samples"] == "2.0"


def test_too_many_broken_images_stop_the_run(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images")
    for path in list((folder / "top").iterdir())[:12]:
        path.write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"11 images cannot be decoded.*bad_samples.csv") as error:
        start(tmp_path / "run", str(folder), {"training": {"epochs": 5}})
    share = re.search(r"raise data\.max_bad_fraction: ([\d.]+) would bear", str(error.value))
    assert share
    assert pretrain(resume=tmp_path / "run", data={"max_bad_fraction": float(share[1])}, quiet=True).finished


def test_a_run_is_never_overwritten(run: Path, images: Path) -> None:
    with pytest.raises(RunError, match=r"nothing is ever overwritten.*--resume"):
        start(run, str(images))


def test_resuming_on_changed_data_is_refused(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images")
    start(tmp_path / "run", str(folder))
    (folder / "top" / "001.png").unlink()
    with pytest.raises(RunError, match=r"top/001\.png"):
        pretrain(resume=tmp_path / "run", quiet=True)


def test_resuming_with_another_configuration_is_refused(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.width was 16, now 32.*init-from"):
        pretrain(resume=run, model={"width": 32, "num_heads": 2}, quiet=True)
    with pytest.raises(ConfigError, match="leave out --out"):
        pretrain(resume=run, out="elsewhere", quiet=True)
    with pytest.raises(RunError, match=r"does not exist.*Did you mean 'tiny'"):
        pretrain(resume=run.with_name("tinny"), quiet=True)


def test_damaged_weights_are_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "exported", tmp_path / "weights")
    file = tmp_path / "weights" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        open_model(tmp_path / "weights")


def test_without_a_recipe_it_chooses_and_says_why(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"width": 16, "depth": 1, "num_heads": 2, "predictor_depth": 1}
    values = {"training": {"epochs": 0.5}, "watch": {"pictures": 0}, "data": {"train": str(images), "workers": 0}}
    pretrain(out=tmp_path / "run", model=small, **values)  # type: ignore[arg-type]
    told = capsys.readouterr().out
    assert "shorter side is about 20 px" in told
    assert "--config" in told
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert stored["model"]["image_size_px"] == 32
    assert stored["model"]["width"] == 16


def test_a_preset_replaces_every_size_that_was_chosen_or_in_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    pretrain(config="xtra_b16_in1k", preset="xtra_s16", print_config=True)
    model = yaml.safe_load(capsys.readouterr().out)["model"]
    wanted = XTRAConfig.preset("xtra_s16").to_dict() | {"drop_path": 0.1}
    assert model == wanted


def test_a_run_that_cannot_start_leaves_no_folder(images: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        start(tmp_path / "a", str(tmp_path / "none"))
    with pytest.raises(CheckpointError):
        start(tmp_path / "b", str(images), {"model": {"width": 32}}, init_from=_other(images, tmp_path / "other"))
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def _other(images: Path, folder: Path) -> Path:
    start(folder, str(images), {"training": {"epochs": 0.3}, "watch": {"pictures": 0}})
    return folder


def test_a_pass_that_cannot_fit_is_refused_and_leaves_no_folder(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(tmp_path / "run", str(images), {"training": {"epochs": 10}, "watch": {"pictures": 0}})
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000030")  # as if it had been killed
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**20)
    with pytest.raises(RunError, match=r"8 images in one forward pass.*training\.per_device_batch to \d or less"):
        start(tmp_path / "new", str(images))
    assert not (tmp_path / "new").exists()
    with pytest.raises(RunError, match=r"training\.per_device_batch"):
        pretrain(resume=tmp_path / "run", quiet=True)
    done = pretrain(resume=tmp_path / "run", training={"per_device_batch": 4}, quiet=True)
    assert done is not None
    assert done.finished


def test_data_that_cannot_be_read_are_told_by_the_training(tmp_path: Path) -> None:
    """Looking whether a pass fits is the first to meet them, before there is a folder to list them in."""
    folder = write_images(tmp_path / "images")
    for path in folder.rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(DataError):
        start(tmp_path / "run", str(folder))
    assert (tmp_path / "run" / "config.yaml").is_file()


def test_a_batch_larger_than_the_data_is_told_once(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sections = tiny(data={"train": str(images)}, training={"epochs": 3, "batch_size": 36}, watch={"pictures": 0})
    pretrain(config="xtra_cifar10", out=tmp_path / "run", **sections)
    assert capsys.readouterr().out.count("batch_size is 36, but there are 24 images, so images repeat") == 1
    pretrain(config="xtra_cifar10", out=tmp_path / "fits", **tiny(data={"train": str(images)}, watch={"pictures": 0}))
    assert "repeat" not in capsys.readouterr().out


def test_wrong_crops_leave_no_folder(images: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="scale"):
        start(tmp_path / "run", str(images), {"data": {"crop_scale": [0.0, 2.0]}})
    assert not (tmp_path / "run").exists()


def test_a_run_can_be_resumed_from_its_first_moment(images: Path, tmp_path: Path) -> None:
    """As if it had been killed before the first checkpoint of its own."""
    start(tmp_path / "whole", str(images), {"training": {"keep_checkpoints": 9}})
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut)
    for later in sorted((cut / "checkpoints").iterdir())[1:]:
        shutil.rmtree(later)
    shutil.rmtree(cut / "exported")
    pretrain(resume=cut, quiet=True)
    a, b = (load_file(f / "exported" / "model.safetensors") for f in (tmp_path / "whole", cut))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_watching_without_training_labels_splits_the_validation_images(images: Path, tmp_path: Path) -> None:
    """Folders are sorted by class: both halves must hold every class."""
    start(tmp_path / "run", str(images / "top"), {"data": {"val": str(images)}})
    assert float(read_metrics(tmp_path / "run" / "metrics.csv")[-1]["knn"]) > 60


def test_watching_never_ends_a_run(tmp_path: Path, images: Path) -> None:
    broken = write_images(tmp_path / "broken", per_class=2)
    for path in broken.rglob("*.png"):
        path.write_bytes(b"no")
    start(tmp_path / "run", str(images), {"data": {"val": str(broken)}})
    assert read_metrics(tmp_path / "run" / "metrics.csv")[-1]["knn"] == ""


def test_a_run_can_be_resumed_from_another_folder(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(images.parent)
    start(tmp_path / "run", images.name)
    monkeypatch.chdir(tmp_path)
    done = pretrain(resume="run", quiet=True)
    assert done is not None
    assert done.finished
