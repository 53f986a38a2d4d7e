"""The segmentation probe: what colour tells is found, what nothing tells is not, and what is wrong is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import nextblock as nb
from nextblock.cli import main
from nextblock.errors import ConfigError, DataError, NextblockError, RunError
from nextblock.jobs import segmentation_run
from nextblock.jobs.segmentation_report import Segmented

COLOURS = np.array([(30, 30, 40), (230, 70, 60), (60, 90, 235)])
QUICK: dict[str, Any] = {"epochs": 25, "lrs": [1e-2, 3e-2, 1e-1], "workers": 0, "batch_size": 8}


def write_shapes(folder: Path, count: int = 24, seed: int = 0) -> Path:
    """Rectangles of two colours on a dark ground, 32x32 px; the colour tells the class."""
    generator = np.random.default_rng(seed)
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for i in range(count):
        mask = np.zeros((32, 32), dtype=np.uint8)
        for number in (1, 2):
            top, left = generator.integers(0, 18, 2)
            mask[top : top + 14, left : left + 14] = number
        pixels = COLOURS[mask] + generator.normal(0, 12, (32, 32, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"images/{i:02d}.png")
        Image.fromarray(mask).save(folder / f"masks/{i:02d}.png")
    (folder / "classes.txt").write_text("ground\nred\nblue\n")
    return folder


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("data") / "shapes")


def quick(run: Path, dataset: Any, out: Path, masks: dict[str, Any] | None = None, **options: Any) -> Segmented:
    found = nb.probe(
        run=run, dataset=dataset, task="segmentation", out=out, quiet=True, probe=QUICK | options,
        segmentation={"pictures": 0} | (masks or {}),
    )  # fmt: skip
    assert isinstance(found, Segmented)
    return found


def test_what_colour_tells_is_found(run: Path, shapes: Path, tmp_path: Path) -> None:
    found = quick(run, shapes, tmp_path / "out", {"pictures": 3})
    assert found.ceiling["miou"] > 70
    assert found.commonest["miou"] < 35
    assert found.best["test_miou"] > 0.9 * found.ceiling["miou"]
    assert [row["name"] for row in found.classes] == ["ground", "red", "blue"]
    assert sum(row["share"] for row in found.classes) == pytest.approx(100, abs=1e-3)
    assert np.mean([row["iou"] for row in found.classes]) == pytest.approx(found.best["test_miou"], abs=1e-3)
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["best"] == found.best
    assert result["images"] == {"training": 17, "validation": 2, "test": 5}
    assert len(result["heads"]) == 3
    assert max(head["miou"] for head in result["heads"]) == found.best["val_miou"]
    config = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    assert (config["target"]["task"], config["probe"]["batch_size"]) == ("segmentation", 8)
    for name in ("iou", "predictions"):
        assert (tmp_path / f"out/figures/{name}.png").stat().st_size > 5000
    table = (tmp_path / "out/table.md").read_text()
    for told in (
        f"{found.best['test_miou']:.2f}",
        f"{found.ceiling['miou']:.2f}",
        "held-out training images",
        "| red ",
    ):
        assert told in table


def test_shuffled_masks_are_not_found(run: Path, shapes: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    shutil.copytree(shapes, wrong)
    files = sorted((shapes / "masks").iterdir())
    for i, file in enumerate(files):
        shutil.copy(files[(i + 7) % len(files)], wrong / "masks" / file.name)
    found = quick(run, wrong, tmp_path / "out")
    assert found.ceiling["miou"] > 70
    assert found.best["test_miou"] < found.commonest["miou"] + 12


def test_the_same_seed_gives_the_same_bits_and_features_need_not_be_kept(
    run: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = quick(run, shapes, tmp_path / "one", epochs=3)
    again = quick(run, shapes, tmp_path / "two", epochs=3)
    anew = nb.probe(
        run=run, dataset=shapes, task="segmentation", out=tmp_path / "three", probe=QUICK | {"epochs": 3},
        segmentation={"memory_gb": 0, "pictures": 2},
    )  # fmt: skip
    assert "features are computed anew in every epoch" in " ".join(capsys.readouterr().out.split())
    other = quick(run, shapes, tmp_path / "four", epochs=3, seed=1)
    heads = [load_file(tmp_path / name / "head.safetensors") for name in ("one", "two", "three", "four")]
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
    assert first == Segmented(tmp_path / "one", *list(vars(again).values())[1:])
    assert isinstance(anew, Segmented)
    for name in heads[0]:  # batches of another size go through the encoder: the same to rounding
        torch.testing.assert_close(heads[2][name], heads[0][name], rtol=1e-2, atol=2e-3)
    assert other.rows != first.rows


def test_a_head_is_what_it_would_be_alone(run: Path, shapes: Path, tmp_path: Path) -> None:
    quick(run, shapes, tmp_path / "grid", epochs=4, lrs=[1e-3, 3e-2], select="test")
    best = json.loads((tmp_path / "grid/result.json").read_text())["best"]
    quick(run, shapes, tmp_path / "alone", epochs=4, lrs=[best["lr"]], select="test")
    ours, alone = (load_file(tmp_path / name / "head.safetensors") for name in ("grid", "alone"))
    for name in ours:
        torch.testing.assert_close(ours[name], alone[name], rtol=1e-3, atol=1e-5)


def test_the_kept_head_says_what_the_probe_said(run: Path, shapes: Path, tmp_path: Path) -> None:
    """The tensors that are left are enough to predict with."""
    from nextblock.data.masked import open_masked
    from nextblock.data.masks import MaskConfig, MaskView
    from nextblock.data.preprocess import Preprocessing, normalize
    from nextblock.evaluation.segmentation import pixel_confusion, scores
    from nextblock.jobs.opening import open_encoder

    found = quick(run, shapes, tmp_path / "out", test_fraction=0.25)
    state = load_file(tmp_path / "out/head.safetensors")
    with safe_open(tmp_path / "out/head.safetensors", "pt") as file:
        about = json.loads(file.metadata()["nextblock"])
    encoder = open_encoder(run, "cpu").encoder
    preprocessing = Preprocessing.from_dict(about["preprocessing"])
    test = open_masked(shapes, test_fraction=0.25).test
    batch = MaskView(test.images, test.masks, preprocessing, MaskConfig(view=about["view"])).load(range(len(test)))
    with torch.no_grad():
        tokens = encoder.features(normalize(batch.images, None, preprocessing))
        known = (tokens - state["norm.running_mean"]) / (state["norm.running_var"] + 1e-6).sqrt()
        logits = (known @ state["weight"][0].T + state["bias"][0]).view(len(test), 4, 4, -1).permute(0, 3, 1, 2)
        said = torch.nn.functional.interpolate(logits, size=(16, 16), mode="bilinear").argmax(1)
    measured = scores(pixel_confusion(said, batch.masks, 3).numpy())
    assert measured.miou == pytest.approx(found.best["test_miou"], abs=0.3)


def test_layers_views_and_choices(run: Path, shapes: Path, tmp_path: Path) -> None:
    found = quick(
        run, shapes, tmp_path / "out", {"view": "crop"}, each_layer=True, attention="both",
        select="test", epochs=2,
    )  # fmt: skip
    names = {row["layers"] for row in found.rows}
    assert names == {"layer 1", "layer 2", "layer 1 bidirectional", "layer 2 bidirectional"}
    assert not (tmp_path / "out/figures/predictions.png").exists()
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert "optimistic" in result["protocol"]
    assert "central crop" in result["view"]
    assert {row["val_miou"] for row in found.rows} == {None}


def test_bf16_and_accumulation(run: Path, shapes: Path, tmp_path: Path) -> None:
    found = quick(run, shapes, tmp_path / "out", precision="bf16", per_device_batch=3)
    assert found.best["test_miou"] > 0.8 * found.ceiling["miou"]
    assert load_file(tmp_path / "out/head.safetensors")["weight"].dtype == torch.float32


def test_arrays_and_a_test_set_of_their_own(run: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    masks = generator.integers(0, 2, (12, 4, 4)).repeat(4, 1).repeat(4, 2)
    pixels = COLOURS[masks].astype(np.uint8)
    masks[:, :, 0] = -1
    found = quick(run, (pixels, masks), tmp_path / "out", {"ignore": [-1]}, epochs=40)
    assert found.best["test_miou"] > 90
    pairs = list(zip(pixels, masks, strict=True))
    nb.probe(
        run=run, dataset=pairs, test=pairs[:5], task="segmentation", segmentation={"ignore": [-1]}, quiet=True,
        out=tmp_path / "pairs", probe=QUICK | {"epochs": 1},
    )  # fmt: skip
    assert json.loads((tmp_path / "pairs/result.json").read_text())["images"]["test"] == 5


def test_what_is_broken_is_left_out_and_told(
    run: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(shapes, data)
    (data / "images/03.png").write_bytes(b"broken")
    (data / "masks/05.png").write_bytes(b"broken")
    main(["probe", str(run), "--task", "segmentation", "--dataset", str(data), "--out", str(tmp_path / "out"),
          "--probe.epochs", "1", "--probe.workers", "0", "--probe.lrs", "0.01"])  # fmt: skip
    printed = " ".join(capsys.readouterr().out.split())
    assert "2 broken images or masks left out; the first: " in printed
    left = json.loads((tmp_path / "out/result.json").read_text())["left_out"]
    assert {Path(name).parts[-2:] for name, _, _ in left} == {("images", "03.png"), ("masks", "05.png")}
    for file in sorted((data / "masks").iterdir())[:14]:
        file.write_bytes(b"broken")
    with pytest.raises(DataError, match=r"more than the 10 allowed.*probe\.max_bad_fraction"):
        quick(run, data, tmp_path / "more")
    for file in (data / "masks").iterdir():
        file.write_bytes(b"broken")
    with pytest.raises(DataError, match=r"None of the \d+ training images and masks could be read.*masks/"):
        quick(run, data, tmp_path / "more", max_bad_fraction=0.99)


def test_black_and_white_masks(run: Path, shapes: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(shapes, data)
    (data / "classes.txt").unlink()
    for file in (data / "masks").iterdir():
        Image.fromarray((np.asarray(Image.open(file)) > 0) * np.uint8(255)).save(file)
    with pytest.raises(DataError, match=r"only class 0; two are needed\. .*ignored.*--segmentation\.values 0 255"):
        quick(run, data, tmp_path / "out")
    found = quick(run, data, tmp_path / "out", {"values": [0, 255]})
    assert [row["name"] for row in found.classes] == ["0", "255"]
    assert found.best["test_miou"] > found.commonest["miou"] + 20


def test_what_is_wrong_is_told_and_leaves_nothing(run: Path, shapes: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(shapes, data)

    def told(error: type[NextblockError], match: str, **given: Any) -> None:
        given = {"run": run, "dataset": data, "task": "segmentation", "probe": QUICK, **given}
        with pytest.raises(error, match=match):
            nb.probe(**given, out=tmp_path / "out", quiet=True)
        assert not (tmp_path / "out").exists()

    told(ConfigError, "Did you mean 'segmentation'", task="segmentatoin")
    told(ConfigError, r"--segmentation\.view belongs to --task", task="classification", segmentation={"view": "crop"})
    told(ConfigError, "no key 'segmentation.ignored'. Did you mean 'ignore'", segmentation={"ignored": [0]})
    told(ConfigError, "--data_root belongs to classification", data_root=tmp_path)
    told(ConfigError, "--suite belongs to classification", suite="xtra15", dataset=None)
    for name, value in {"heads": ["attentive"], "augment": "published", "few_shot": 5, "num_heads": 4}.items():
        told(ConfigError, rf"--probe\.{name} .*does not belong to --task segmentation: ", probe=QUICK | {name: value})
    told(ConfigError, "batch_size 64 is larger than the 17", probe=QUICK | {"batch_size": 64})
    told(ConfigError, "encoder's depth 2; got 7", probe=QUICK | {"linear_layers": [7]})
    told(RunError, "No run or weights folder", run=tmp_path / "nothing")
    told(DataError, "no such folder", dataset=tmp_path / "nothing")
    (tmp_path / "empty/photos").mkdir(parents=True)
    told(DataError, "empty holds photos; wanted is one of images/ and masks/", dataset=tmp_path / "empty")
    told(ConfigError, "names 3 classes, segmentation.values 2", segmentation={"values": [0, 1]})
    Image.new("L", (30, 32)).save(data / "masks/07.png")
    told(DataError, r"masks/07\.png is 30×32 px, its image .*07\.png 32×32 px; they must have the same size")
    Image.new("L", (32, 32), 9).save(data / "masks/07.png")
    told(DataError, r"masks/07\.png holds the value 9; classes are 0 to 2")
    Image.new("RGB", (32, 32)).save(data / "masks/07.png")
    told(DataError, r"masks/07\.png is a picture in colour")
    (data / "masks/07.png").unlink()
    told(DataError, r"1 of 24 images in .* have no mask: 07\.png")


def test_a_test_mask_of_a_class_that_training_lacks_is_told(run: Path, shapes: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        shutil.copytree(shapes, tmp_path / "data" / split)
    Image.new("L", (32, 32), 3).save(tmp_path / "data/test/masks/01.png")
    with pytest.raises(DataError, match=r"test/masks/01\.png holds the value 3; classes are 0 to 2"):
        quick(run, tmp_path / "data", tmp_path / "out")


def test_nothing_is_overwritten_and_what_was_killed_is_not_finished(
    run: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = quick(run, shapes, tmp_path / "done", epochs=1)
    with pytest.raises(RunError, match=r"nothing is ever overwritten\. Choose another --out"):
        quick(run, shapes, tmp_path / "done")
    assert nb.probe(resume=tmp_path / "done") == done
    assert "patches known exactly" in capsys.readouterr().out

    def killed(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(segmentation_run, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        quick(run, shapes, tmp_path / "cut")
    assert not (tmp_path / "cut/result.json").exists()
    with pytest.raises(RunError, match=r"stopped before its end.*another --out"):
        nb.probe(resume=tmp_path / "cut", quiet=True)
    with pytest.raises(RunError, match="nothing is ever overwritten"):
        quick(run, shapes, tmp_path / "cut")
    monkeypatch.setattr(segmentation_run, "masked_batches", killed)
    with pytest.raises(KeyboardInterrupt):
        quick(run, shapes, tmp_path / "early")
    assert not (tmp_path / "early").exists()


def test_an_encoder_that_diverged_is_told(run: Path, shapes: Path, tmp_path: Path, monkeypatch: Any) -> None:
    real = segmentation_run.layer_means
    monkeypatch.setattr(
        segmentation_run, "layer_means", lambda *given: {k: v * float("nan") for k, v in real(*given).items()}
    )
    with pytest.raises(DataError, match=r"not finite\. Did its training diverge\?"):
        quick(run, shapes, tmp_path / "out")


def test_small_sets_get_a_thousand_steps(run: Path, shapes: Path) -> None:
    from nextblock.evaluation.probe_config import ProbeConfig
    from nextblock.jobs.segmentation import _sized

    assert _sized(ProbeConfig(), {}, 17).epochs == 942
    assert _sized(ProbeConfig(), {}, 100_000).epochs == 10
    assert _sized(ProbeConfig(epochs=3), {"epochs": 3}, 17).epochs == 3
    assert _sized(ProbeConfig(), {}, 5).batch_size == 5


def test_the_shell_tells_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["probe", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    for option in ("--task {classification,segmentation}", "--segmentation.view", "--segmentation.memory_gb"):
        assert option in told
    assert "pixel values that are no class" in told
