"""The probe job: one pass, kept features, resume, suites, and what is told when something is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_room.benchmark_folders import cifar10, eurosat
from PIL import Image
from safetensors.torch import load_file, save_file

from close import assert_close
from nextblock.checkpoints.pretrained import file_sha256
from nextblock.cli import main
from nextblock.data.decode import decode
from nextblock.data.named.published import PUBLISHED
from nextblock.errors import ConfigError, DataError, RunError
from nextblock.evaluation.head_log import read_heads
from nextblock.jobs import probe_run
from nextblock.jobs.opening import open_classifier
from nextblock.jobs.probe import Probed, probe
from nextblock.training.signals import StopRequest

QUICK: dict[str, Any] = {"epochs": 4, "lrs": [1e-3, 1e-2, 1e-1], "workers": 0, "val_fraction": 0.25, "batch_size": 8}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEXTBLOCK_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("NEXTBLOCK_DATA", raising=False)


class StopAfter(StopRequest):
    """Asks for a stop when it is looked at for the n-th time."""

    looks = 5

    def __call__(self) -> bool:
        self.looks -= 1
        if self.looks == 0:
            self.received = 2
        return self.received != 0


def quick(run: Path, dataset: Any, out: Path, **options: Any) -> Probed:
    found = probe(run=run, dataset=dataset, out=out, quiet=True, probe=QUICK | options)
    assert isinstance(found, Probed)
    return found


def test_the_grid_is_trained_chosen_and_measured(run: Path, images: Path, tmp_path: Path) -> None:
    found = quick(run, str(images), tmp_path / "out")
    kinds = {row["kind"]: row for row in found.rows}
    assert set(kinds) == {"linear", "attentive"}
    assert found.best in found.rows
    stored = json.loads((tmp_path / "out/result.json").read_text())
    assert stored["best"]["test_top1"] == found.best["test_top1"]
    assert "held-out training images" in stored["protocol"]
    assert stored["images"] == {"training": 16, "validation": 4, "test": 4}  # 24 images: 20 % test, 25 % of the rest
    rows = read_heads(tmp_path / "out/heads.csv")
    assert {row["head"] for row in rows} == set(range(6))
    last = [row for row in rows if row["step"] == max(r["step"] for r in rows)]
    for row in found.rows:
        same = [r["val_top1"] for r in last if r["kind"] == row["kind"]]
        assert row["val_top1"] == max(same)
    for name in ("learning_rates", "curves", "confusion"):
        assert (tmp_path / f"out/figures/{name}.png").stat().st_size > 5000


def test_the_exported_classifier_says_what_was_measured(run: Path, images: Path, tmp_path: Path) -> None:
    found = quick(run, str(images), tmp_path / "out", heads=["attentive"], epochs=20)
    opened = open_classifier(tmp_path / "out", "cpu")
    assert opened.model.classes == ("left", "top")
    pixels = decode((images / "top/000.png").read_bytes(), "x")
    from nextblock.data.augment import resize_and_crop
    from nextblock.data.preprocess import normalize

    shown = resize_and_crop(pixels, opened.preprocessing.shorter_side_px, opened.preprocessing.size_px)
    given = normalize(torch.from_numpy(shown.copy())[None], None, opened.preprocessing)
    probabilities = opened.model.probabilities(given)[0]
    assert_close(probabilities.sum(), np.float32(1), 1e-5)
    assert found.best is not None
    assert found.best["test_top1"] >= 50


def test_features_are_computed_once(run: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = quick(run, str(images), tmp_path / "one")
    kept = sorted((tmp_path / "cache/features").iterdir())
    assert len(kept) == 4  # two kinds read differently, training and test

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("the encoder ran again")

    monkeypatch.setattr("nextblock.evaluation.feature_cache.layer_means", refuse)
    again = quick(run, str(images), tmp_path / "two")
    assert again.rows == first.rows
    with pytest.raises(AssertionError, match="ran again"):
        quick(run, str(images), tmp_path / "three", attention="bidirectional")


def test_other_weights_have_other_features(run: Path, images: Path, tmp_path: Path) -> None:
    quick(run, str(images), tmp_path / "one", heads=["linear"])
    other = tmp_path / "other"
    shutil.copytree(run / "exported", other)
    change_weights(other, lambda value: value + 0.01)
    quick(other, str(images), tmp_path / "two", heads=["linear"])
    assert len(list((tmp_path / "cache/features").iterdir())) == 4


@pytest.mark.parametrize("augment", ["none", "flip", "published"])
def test_a_stopped_probe_goes_on_to_the_bit(
    augment: str, run: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = quick(run, str(images), tmp_path / "whole", augment=augment)
    with monkeypatch.context() as patch:
        patch.setattr(probe_run, "StopRequest", StopAfter)
        stopped = quick(run, str(images), tmp_path / "cut", augment=augment)
    assert (stopped.finished, stopped.signal) == (False, 2)
    resumed = probe(resume=tmp_path / "cut", quiet=True)
    assert resumed.rows == whole.rows
    ours, theirs = (load_file(tmp_path / name / "exported/model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert read_heads(tmp_path / "whole/heads.csv") == read_heads(tmp_path / "cut/heads.csv")


def test_layers_attention_and_few_shots(run: Path, images: Path, tmp_path: Path) -> None:
    found = quick(run, str(images), tmp_path / "out", each_layer=True, attention="both", few_shot=2, batch_size=0)
    groups = {(row["kind"], row["layers"]) for row in found.rows}
    assert ("linear", "layer 1 bidirectional") in groups
    assert ("attentive", "layers 1-2") in groups
    assert len(groups) == 2 * 2 * 2 + 2  # kinds x attentions x single layers, and the attentive mean of both
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["images"] == {"training": 4, "validation": 4, "test": 4}
    assert (tmp_path / "out/figures/layers.png").is_file()


def test_bf16_gives_finite_numbers_and_float32_weights(run: Path, images: Path, tmp_path: Path) -> None:
    found = quick(run, str(images), tmp_path / "out", precision="bf16", augment="flip")
    assert all(np.isfinite(row["train_loss"]) for row in read_heads(tmp_path / "out/heads.csv"))
    assert found.best is not None
    tensors = load_file(tmp_path / "out/exported/model.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.float32, torch.int64}


def test_choosing_on_the_test_images_is_labelled(run: Path, images: Path, tmp_path: Path) -> None:
    found = quick(run, str(images), tmp_path / "out", select="test", heads=["linear"])
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert "optimistic" in result["protocol"]
    assert result["images"]["validation"] == 0
    assert [row["val_top1"] for row in found.rows] == [None]


def test_arrays_and_a_test_set_of_its_own(run: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    pixels, labels = generator.integers(0, 255, (30, 16, 16, 3), dtype=np.uint8), np.arange(30) % 3
    found = probe(
        run=run, dataset=(pixels, labels), test=(pixels[:9], labels[:9]), out=tmp_path / "out", quiet=True, probe=QUICK
    )
    assert isinstance(found, Probed)
    assert json.loads((tmp_path / "out/result.json").read_text())["images"]["test"] == 9


def test_a_broken_test_image_is_left_out_and_told(
    run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    for split in ("train", "test"):
        shutil.copytree(images, data / split)
    (data / "test/top/000.png").write_bytes(b"not an image")
    probe(run=run, dataset=str(data), out=tmp_path / "out", probe=QUICK | {"heads": ["linear"]})
    printed = capsys.readouterr().out
    assert "1 broken images left out; the first: " in printed
    assert "top/000.png" in printed
    assert json.loads((tmp_path / "out/result.json").read_text())["images"]["test"] == 23


def test_a_suite_goes_on_where_it_stopped(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "datasets"
    cifar10(root)
    eurosat(root)
    given: dict[str, Any] = {"run": run, "suite": "xtra15", "data_root": root, "out": tmp_path / "suite"}
    given |= {"quiet": True, "probe": QUICK | {"batch_size": 4, "heads": ["linear"]}}
    with monkeypatch.context() as patch:
        patch.setattr(probe_run, "StopRequest", StopAfter)
        stopped = probe(**given)
    assert stopped.signal == 2
    assert {row["dataset"]: row["status"] for row in stopped.rows if row["status"] != "missing"} == {
        "cifar10": "stopped", "eurosat": "not begun",
    }  # fmt: skip
    whole = probe(**given)
    lines = [json.loads(line) for line in (tmp_path / "suite/results.jsonl").read_text().splitlines()]
    assert lines == whole.rows
    assert len(lines) == 15
    done = {row["dataset"]: row["linear"] for row in lines if row["status"] == "done"}
    assert set(done) == {"cifar10", "eurosat"}
    table = (tmp_path / "suite/table.md").read_text()
    assert f"| mean of 2 | {sum(done.values()) / 2:.1f} |" in table
    head, *_, means = (
        [cell.strip() for cell in line.split("|")] for line in table.splitlines() if line.startswith("|")
    )
    published = dict(zip(head, means, strict=True))
    assert published["XTRA-H/14"] == "", "what is known is a mean over other data sets"
    aim = next(row for row in PUBLISHED if row.model == "AIM-0.6B DFN-2B+")
    assert published[aim.model] == f"{sum(aim.accuracy[name] for name in done) / 2:.1f}"
    assert (tmp_path / "suite/figures/suite.png").is_file()

    def refuse(*args: Any) -> None:
        raise AssertionError("it was done again")

    monkeypatch.setattr(probe_run, "train", refuse)
    assert probe(**given).rows == whole.rows


def change_weights(folder: Path, change: Any) -> None:
    file = folder / "model.safetensors"
    tensors = {name: change(value) for name, value in load_file(file).items()}
    save_file(tensors, file)
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | {"sha256": file_sha256(file)}))


@pytest.mark.parametrize("augment", ["none", "published"])
def test_an_encoder_that_diverged_is_told(augment: str, run: Path, images: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(run / "exported", broken)
    change_weights(broken, lambda value: value * float("nan"))
    with pytest.raises(DataError, match=r"not finite\. Did its training diverge\?"):
        quick(broken, str(images), tmp_path / "out", augment=augment)


def test_a_probe_killed_before_its_first_step_goes_on(
    run: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = quick(run, str(images), tmp_path / "whole", cache=str(tmp_path / "other"))

    def killed(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("nextblock.evaluation.feature_cache.layer_means", killed)
        with pytest.raises(KeyboardInterrupt):
            quick(run, str(images), tmp_path / "cut", cache=str(tmp_path / "other2"))
    assert not list((tmp_path / "other2").glob("features/*/values.npy"))
    assert probe(resume=tmp_path / "cut", quiet=True).rows == whole.rows
    shutil.rmtree(tmp_path / "cut/checkpoints")  # killed earlier still
    (tmp_path / "cut/result.json").unlink()
    assert probe(resume=tmp_path / "cut", quiet=True).rows == whole.rows


def test_a_suite_is_of_one_encoder_and_one_protocol(run: Path, tmp_path: Path) -> None:
    root = tmp_path / "datasets"
    cifar10(root)
    given: dict[str, Any] = {"run": run, "suite": "xtra15", "data_root": root, "out": tmp_path / "suite"}
    settings = QUICK | {"batch_size": 4, "heads": ["linear"]}
    (tmp_path / "suite/cifar10").mkdir(parents=True)
    (tmp_path / "suite/suite.json").write_text("{}")
    with pytest.raises(RunError, match="begun with another suite and other weights and other --probe options"):
        probe(**given, quiet=True, probe=settings)
    shutil.rmtree(tmp_path / "suite")
    probe(**given, quiet=True, probe=settings | {"select": "test"})
    assert "best head chosen on the test images" in (tmp_path / "suite/table.md").read_text()
    other = tmp_path / "other"
    shutil.copytree(run / "exported", other)
    change_weights(other, lambda value: value + 0.01)
    with pytest.raises(RunError, match="begun with other weights"):
        probe(**given | {"run": other}, quiet=True, probe=settings | {"select": "test"})
    with pytest.raises(RunError, match="begun with other --probe options"):
        probe(**given, quiet=True, probe=settings)


def test_a_data_set_that_fails_does_not_cost_the_others(run: Path, tmp_path: Path) -> None:
    root = tmp_path / "datasets"
    cifar10(root)
    eurosat(root)
    for file in root.glob("cifar10/**/test_batch"):
        file.unlink()
    found = probe(
        run=run, suite="xtra15", data_root=root, out=tmp_path / "suite", quiet=True,
        probe=QUICK | {"batch_size": 4, "heads": ["linear"]},
    )  # fmt: skip
    status = {row["dataset"]: row["status"] for row in found.rows}
    assert (status["cifar10"], status["eurosat"]) == ("failed", "done")


def test_a_probe_resumes_from_another_folder_and_notices_changed_labels(
    run: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(images, tmp_path / "photos")
    quick(run, "photos", Path("out"), heads=["linear"])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "out/result.json").unlink()
    assert isinstance(probe(resume=tmp_path / "out", quiet=True), Probed)
    (tmp_path / "out/result.json").unlink()
    generator = np.random.default_rng(0)
    pixels, labels = generator.integers(0, 255, (30, 16, 16, 3), dtype=np.uint8), np.arange(30) % 3
    quick(run, (pixels, labels), tmp_path / "arrays", heads=["linear"])
    (tmp_path / "arrays/result.json").unlink()
    swapped = labels.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    with pytest.raises(RunError, match=r"other labels|not those that"):
        probe(resume=tmp_path / "arrays", dataset=(pixels, swapped), quiet=True)


@pytest.mark.parametrize("augment", ["none", "flip"])
def test_broken_images_are_counted_the_same_way(augment: str, run: Path, images: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for split in ("train", "test"):
        shutil.copytree(images, data / split)
    for name, count in (("top", 11), ("left", 5)):
        for i in range(count):
            (data / f"train/{name}/{i:03d}.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"raise probe\.max_bad_fraction"):
        quick(run, str(data), tmp_path / "out", augment=augment, epochs=20)
    allowed = quick(run, str(data), tmp_path / "allowed", augment=augment, max_bad_fraction=0.9)
    assert allowed.finished
    for file in (data / "test").glob("*/*.png"):
        file.write_bytes(b"broken")
    with pytest.raises(DataError, match=r"can be read|could be read"):
        quick(run, str(data), tmp_path / "unread", augment=augment, max_bad_fraction=0.9)


def test_a_broken_image_may_have_any_name(run: Path, images: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for split in ("train", "test"):
        shutil.copytree(images, data / split)
        (data / split / "top").joinpath(b"bad\xff,\n.png".decode(errors="surrogateescape")).write_bytes(b"broken")
    for augment in ("none", "flip"):
        assert quick(run, str(data), tmp_path / augment, augment=augment, heads=["linear"]).finished
    assert quick(run, str(data), tmp_path / "again", augment="none", heads=["linear"]).finished  # read from the cache


def test_what_is_wrong_is_told(run: Path, images: Path, tmp_path: Path) -> None:
    def told(error: type[Exception], match: str, **given: Any) -> None:
        with pytest.raises(error, match=match):
            probe(**{"run": run, "out": tmp_path / "out", "quiet": True, "probe": QUICK, **given})
        assert not (tmp_path / "out").exists()

    told(DataError, "Did you mean 'cifar10'", dataset="cifar-10")
    told(DataError, "is not on this machine|not below", dataset="food101")
    told(ConfigError, "either a --dataset or a --suite")
    told(ConfigError, "either a --dataset or a --suite", dataset="cifar10", suite="xtra15")
    told(ConfigError, "Did you mean 'xtra15'", suite="xtra-15")
    told(DataError, "None of the 15 data sets of xtra15", suite="xtra15", data_root=tmp_path)
    told(ConfigError, "Which encoder", run=None, dataset=str(images))
    told(RunError, "No run or weights folder", run=tmp_path / "nothing", dataset=str(images))
    told(ConfigError, r"there is no key 'probe\.lr'. Did you mean 'lrs'", dataset=str(images), probe={"lr": 1})
    told(ConfigError, "batch_size 64 is larger than the 16", dataset=str(images), probe=QUICK | {"batch_size": 64})
    told(ConfigError, "BatchNorm needs two images", dataset=str(images), probe=QUICK | {"per_device_batch": 1})
    told(ConfigError, "encoder's depth 2; got 7", dataset=str(images), probe=QUICK | {"linear_layers": [7]})
    one_class = tmp_path / "one"
    (one_class / "only").mkdir(parents=True)
    for i in range(4):
        Image.new("RGB", (16, 16)).save(one_class / f"only/{i}.png")
    told(DataError, "one class", dataset=str(one_class))
    more = tmp_path / "more"
    shutil.copytree(images, more / "train")
    shutil.copytree(images, more / "test")
    shutil.copytree(images / "top", more / "test/extra")
    told(DataError, "extra", dataset=str(more))


def test_nothing_is_overwritten_and_only_the_same_goes_on(run: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    with pytest.raises(RunError, match="nothing is ever overwritten"):
        quick(run, str(images), tmp_path / "full")
    quick(run, str(images), tmp_path / "done", heads=["linear"])
    with pytest.raises(RunError, match=r"nothing is ever overwritten\. Continue it with --resume"):
        quick(run, str(images), tmp_path / "done")
    with pytest.raises(ConfigError, match="leave out RUN"):
        probe(resume=tmp_path / "done", run=run, quiet=True)
    with pytest.raises(ConfigError, match="leave out --dataset"):
        probe(resume=tmp_path / "done", dataset="elsewhere", quiet=True)
    with pytest.raises(RunError, match=r"is a pre-training run\. Continue it with: nextblock pretrain --resume"):
        probe(resume=run, quiet=True)
    data = tmp_path / "data"
    shutil.copytree(images, data)
    quick(run, str(data), tmp_path / "out", heads=["linear"])
    with pytest.raises(ConfigError, match=r"leave out --probe\.epochs"):
        probe(resume=tmp_path / "out", quiet=True, probe={"epochs": 3})
    (tmp_path / "out/result.json").unlink()
    Image.new("RGB", (16, 16)).save(data / "top/new.png")
    with pytest.raises(RunError, match=r"not those that .* was started on"):
        probe(resume=tmp_path / "out", quiet=True)


def test_the_shell(run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    given = ["probe", str(run), "--dataset", str(images), "--out", str(out)]
    given += ["--probe.epochs", "2", "--probe.lrs", "1e-3", "1e-2", "--probe.heads", "linear", "--probe.workers", "0"]
    assert main(given) == 0
    assert "2 heads in one pass" in capsys.readouterr().out
    assert main(["probe", "--resume", str(out)]) == 0
    assert "frozen encoder" in capsys.readouterr().out
    assert main(["probe", "--dataset", "cifar10"]) == 1
    assert "Which encoder?" in capsys.readouterr().err
