from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from close import assert_close
from nextblock.data.sources import open_source
from nextblock.data.sources.views import known_labels
from nextblock.errors import ConfigError, DataError, RunError
from nextblock.evaluation.inference import inference
from nextblock.jobs import finetune_run, training_run
from nextblock.jobs.finetune import Finetuned, finetune
from nextblock.jobs.finetune_config import SECTIONS, FinetuneConfig, choose_training, from_values, to_values
from nextblock.jobs.finetune_parts import classifier_of, height_in, split_training
from nextblock.jobs.opening import open_classifier, open_encoder
from nextblock.recipes.config import typed_section
from nextblock.training.run_folder import read_metrics
from nextblock.xtra.config import XTRAConfig
from tiny_run import write_images

TINY = {"workers": 0, "val_fraction": 0.25, "ema_decay": 0.9, "num_heads": 2}
SHORT = {"epochs": 3, "batch_size": 6, "lr": 0.01, "log_every_steps": 1, "checkpoint_every_steps": 4}


def start(run: Path, dataset: Any, out: Path, config: Any = None, training: Any = None, **values: Any) -> Finetuned:
    sections = {"finetune": TINY | (config or {}), "training": SHORT | (training or {})}
    return finetune(run=run, dataset=dataset, out=out, quiet=True, **sections, **values)


@pytest.fixture(scope="module")
def tuned(run: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny fine-tuning run; the 24 images are split by class into 20 to train on and 4 to test on."""
    folder = tmp_path_factory.mktemp("finetuned") / "tuned"
    done = start(run, images, folder)
    assert done.finished
    return folder


def test_a_run_leaves_what_is_promised(tuned: Path) -> None:
    names = {path.relative_to(tuned).as_posix() for path in tuned.rglob("*") if path.is_file()}
    assert names >= {
        "config.yaml", "environment.json", "data_manifest.txt.gz", "test_manifest.txt.gz", "metrics.csv",
        "result.json", "figures/curves.png", "exported/config.json", "exported/model.safetensors", "exported/README.md",
    }  # fmt: skip
    rows = read_metrics(tuned / "metrics.csv")
    assert len(rows) == round(3 * 16 / 6)
    assert all(float(rows[-1][name]) >= 0 for name in ("val_loss", "val_top1", "ema_val_top1"))
    about = json.loads((tuned / "environment.json").read_text())
    result = json.loads((tuned / "result.json").read_text())
    assert (about["data"]["count"], about["test"]["count"]) == (16, 4)
    assert (result["train_images"], result["test_images"], result["classes"]) == (16, 4, 2)
    assert 0 <= min(result["top1"], result["macro_f1"], result["mean_per_class"]) <= 100
    config = json.loads((tuned / "exported" / "config.json").read_text())
    assert result["weights_sha256"] == config["sha256"]
    assert config["classes"] == ["left", "top"]
    assert "decay rising to 0.9" in (tuned / "exported" / "README.md").read_text()


def test_exported_weights_are_the_average_and_open_as_a_classifier(tuned: Path) -> None:
    exported = load_file(tuned / "exported" / "model.safetensors")
    newest = max((tuned / "checkpoints").iterdir())
    state = torch.load(newest / "state.pt", weights_only=True)
    assert all(torch.equal(exported[name], value) for name, value in state["ema"]["averages"].items())
    assert not torch.equal(exported["head.weight"], state["model"]["head.weight"])
    assert int(state["ema"]["count"]) == state["step"]
    opened = open_classifier(tuned, device="cpu")
    assert opened.model.classes == ("left", "top")
    assert opened.model.head_config.layers.bidirectional
    assert open_encoder(tuned, device="cpu").encoder.config.drop_path == 0.1


def test_the_result_is_that_of_the_exported_weights(tuned: Path, images: Path) -> None:
    """The same test images, opened and classified by other means."""
    opened = open_classifier(tuned, device="cpu")
    from nextblock.data.labelled import open_labelled
    from nextblock.data.loading import evaluation_batches
    from nextblock.data.preprocess import normalize

    test = open_labelled(images, seed=0).test
    (batch,) = evaluation_batches(test, opened.preprocessing, batch_size=99)
    with inference(opened.model):
        found = opened.model(normalize(batch.images, None, opened.preprocessing)).argmax(1)
    right = 100 * float((found == batch.labels).double().mean())
    assert json.loads((tuned / "result.json").read_text())["top1"] == pytest.approx(right, abs=1e-3)


def test_it_starts_from_the_weights_of_the_run(run: Path, images: Path, tmp_path: Path) -> None:
    start(run, images, tmp_path / "still", {"ema_decay": 0.0}, {"lr": 1e-12, "epochs": 1})
    theirs, ours = (load_file(folder / "exported" / "model.safetensors") for folder in (run, tmp_path / "still"))
    shared = [name for name in theirs if name.startswith("encoder.")]
    assert len(shared) > 10
    for name in shared:
        assert torch.allclose(ours[name], theirs[name], atol=1e-8), name


def test_it_learns(run: Path, tmp_path: Path) -> None:
    """Which half is bright: twice as many right as by chance, on images not seen."""
    train, test = write_images(tmp_path / "a", per_class=30), write_images(tmp_path / "b", per_class=20)
    plain = {"mixup": 0, "cutmix": 0, "randaugment": "", "erasing": 0, "flip": 0, "crop_scale": [0.8, 1.0]}
    done = start(run, train, tmp_path / "run", plain, {"epochs": 12, "log_every_steps": 20}, test=test)
    assert done.result is not None
    assert done.result["top1"] > 90
    assert done.result["train_images"] == 44


def timeless(folder: Path) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if k != "images_per_s"} for row in read_metrics(folder / "metrics.csv")]


def assert_same(a: Path, b: Path) -> None:
    assert timeless(a) == timeless(b)
    first, second = (load_file(folder / "exported" / "model.safetensors") for folder in (a, b))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (a / "result.json").read_text() == (b / "result.json").read_text()


class StopAfter:
    """Stands in for a signal that arrives while step `count` is done."""

    count = 5

    def __init__(self) -> None:
        self.left, self.received = self.count, 0

    def __enter__(self) -> StopAfter:
        return self

    def __exit__(self, *_: object) -> None: ...

    def __call__(self) -> bool:
        self.left -= 1
        self.received = 2 if self.left <= 0 else 0
        return self.received != 0


@pytest.mark.parametrize("config", [{}, {"head": "attentive", "last_layers": 2, "ema_decay": 0.0}])
def test_a_stopped_run_goes_on_bit_identically(
    run: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any]
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    start(run, images, whole, config)
    with monkeypatch.context() as patch:
        patch.setattr(training_run, "StopRequest", StopAfter)
        stopped = start(run, images, cut, config)
    assert (stopped.finished, stopped.steps, stopped.signal) == (False, 5, 2)
    assert not (cut / "exported").exists()
    with pytest.raises(RunError, match=r"not finished.*nextblock finetune --resume"):
        open_classifier(cut)
    assert finetune(resume=cut, quiet=True).finished
    assert_same(whole, cut)


def test_resuming_needs_nothing_but_the_folder_and_its_images(
    run: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(run, tmp_path / "base")
    shutil.copytree(images, tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    start(Path("base"), "images", Path("cut"))
    for later in sorted((tmp_path / "cut" / "checkpoints").iterdir())[-1:]:
        shutil.rmtree(later)
    for left in ("exported", "result.json"):
        path = tmp_path / "cut" / left
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(tmp_path / "cut", tmp_path / "again")
    shutil.rmtree(tmp_path / "base")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for name in ("cut", "again"):
        assert finetune(resume=tmp_path / name, quiet=True).finished
    assert_same(tmp_path / "cut", tmp_path / "again")


def test_a_finished_run_is_left_alone_and_judged_if_it_was_not(tuned: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tuned, copy)
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    done = finetune(resume=copy, quiet=True)
    assert done.finished
    assert done.result == json.loads((copy / "result.json").read_text())
    assert all(path.read_bytes() == content for path, content in before.items())
    shutil.rmtree(copy / "exported")
    (copy / "result.json").unlink()
    finetune(resume=copy, quiet=True)
    assert_same(copy, tuned)


def test_workers_do_not_change_the_run(tuned: Path, run: Path, images: Path, tmp_path: Path) -> None:
    start(run, images, tmp_path / "workers", {"workers": 2})
    assert_same(tuned, tmp_path / "workers")


def test_arrays_are_taken_and_must_be_given_again(run: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (24, 16, 16, 3), dtype=np.uint8)
    data, test = (pixels, np.arange(24) % 3), (pixels[:6], np.arange(6) % 3)
    start(run, data, tmp_path / "run", training={"epochs": 1}, test=test)
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert stored["finetune"]["dataset"] is None
    with pytest.raises(ConfigError, match="give them again: dataset="):
        finetune(resume=tmp_path / "run", quiet=True)
    assert finetune(resume=tmp_path / "run", dataset=data, test=test, quiet=True).finished
    with pytest.raises(RunError, match="test data are not those"):
        finetune(resume=tmp_path / "run", dataset=data, test=(pixels[6:12], np.arange(6) % 3), quiet=True)
    with pytest.raises(RunError, match=r"training data are not those.*other labels"):
        finetune(resume=tmp_path / "run", dataset=(pixels, (np.arange(24) + 1) % 3), test=test, quiet=True)
    with pytest.raises(RunError, match="training data are not those"):
        finetune(resume=tmp_path / "run", dataset=(255 - pixels, np.arange(24) % 3), test=test, quiet=True)


def test_what_cannot_go_on_is_refused(tuned: Path, run: Path, images: Path) -> None:
    with pytest.raises(RunError, match=r"nothing is ever overwritten.*--resume"):
        start(run, images, tuned)
    with pytest.raises(ConfigError, match=r"finetune\.mixup was 0\.8, now 0\.0; training\.epochs was 3\.0, now 9\.0"):
        finetune(resume=tuned, finetune={"mixup": 0.0}, training={"epochs": 9}, quiet=True)
    with pytest.raises(ConfigError, match="leave out run"):
        finetune(resume=tuned, run=run, quiet=True)
    with pytest.raises(RunError, match=r"is a pre-training run\. Continue it with: nextblock pretrain --resume"):
        finetune(resume=run, quiet=True)
    with pytest.raises(ConfigError, match=r"needs labelled images.*--dataset"):
        finetune(run=run, quiet=True)
    with pytest.raises(ConfigError, match="needs a pre-trained run"):
        finetune(dataset=images, quiet=True)


@pytest.mark.parametrize(
    ("config", "training", "error", "told"),
    [
        ({"hed": "linear"}, {}, ConfigError, r"no key 'finetune\.hed'\. Did you mean 'head'"),
        ({"epochs": 3}, {}, ConfigError, r"Did you mean 'training\.epochs'"),
        ({"last_layers": 3}, {}, ConfigError, r"last_layers must be between 1 and the encoder's depth 2; got 3"),
        ({"head": "attentive", "num_heads": 3}, {}, ConfigError, r"num_heads 3 does not divide"),
        ({"layer_decay": 0.0}, {}, ConfigError, r"layer_decay must be above 0"),
        ({"randaugment": "rand-x9"}, {}, ConfigError, r"'x9'"),
        ({"mix_probability": 2.0}, {}, ConfigError, r"probability"),
        ({"crop_scale": [0.0, 1.0]}, {}, ConfigError, r"scale must satisfy"),
        ({}, {"batch_size": 1}, ConfigError, r"two images or more"),
        ({"few_shot": 30}, {}, DataError, r"fewer than the 30"),
    ],
)
def test_a_run_that_cannot_start_says_why_and_leaves_no_folder(
    run: Path, images: Path, tmp_path: Path, config: Any, training: Any, error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        start(run, images, tmp_path / "run", config, training)
    assert not (tmp_path / "run").exists()


def test_one_class_and_no_labels_are_refused(run: Path, images: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no labels"):
        start(run, images / "top", tmp_path / "none")
    pixels = np.zeros((8, 16, 16, 3), dtype=np.uint8)
    with pytest.raises(DataError, match="of one class"):
        start(run, (pixels, np.zeros(8, dtype=np.int64)), tmp_path / "one")
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_weights(
    run: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Running statistics and average too: a forward pass writes the first before the loss is known."""
    poisoned = finetune_run.prepare

    def prepare(batch: Any, preprocessing: Any) -> torch.Tensor:
        found = poisoned(batch, preprocessing)
        return found * float("nan") if int(batch.positions[0]) >= 12 else found

    monkeypatch.setattr(finetune_run, "prepare", prepare)
    with pytest.raises(RunError, match="not finite for 3 steps in a row"):
        start(run, images, tmp_path / "run", training={"max_nonfinite_steps": 3, "checkpoint_every_steps": 1})
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    state = torch.load(newest / "state.pt", weights_only=True)
    assert state["step"] == 4
    assert all(value.isfinite().all() for value in state["model"].values())
    assert all(value.isfinite().all() for value in state["ema"]["averages"].values())
    assert int(state["ema"]["count"]) == 2


def test_broken_images_to_look_at_end_no_run(run: Path, tmp_path: Path) -> None:
    """Neither those held out nor those of the test take the trained weights away; the test is told at the end."""
    images, test = write_images(tmp_path / "images"), write_images(tmp_path / "test", per_class=2)
    watched = split_training(open_source(images), FinetuneConfig(val_fraction=0.25), 0)[1]
    assert watched is not None
    broken = [images / watched.name(i) for i in range(len(watched))]
    for path in [*broken, *test.rglob("*.png")]:
        path.write_bytes(b"no")
    with pytest.raises(DataError, match=r"no labelled image.*4 could not be read"):
        start(run, images, tmp_path / "run", training={"epochs": 1}, test=test)
    assert all(row["val_top1"] == "" for row in read_metrics(tmp_path / "run" / "metrics.csv"))
    assert open_classifier(tmp_path / "run").model.classes == ("left", "top")
    assert not (tmp_path / "run" / "result.json").exists()


def test_training_watched_and_test_images_are_apart(images: Path) -> None:
    source = open_source(images)
    train, watched = split_training(source, FinetuneConfig(val_fraction=0.25), 0)
    assert watched is not None
    names = [{part.name(i) for i in range(len(part))} for part in (train, watched)]
    assert (len(train), len(watched)) == (18, 6)
    assert not names[0] & names[1]
    few, beside = split_training(source, FinetuneConfig(val_fraction=0.25, few_shot=2), 0)
    assert np.bincount(known_labels(few)).tolist() == [2, 2]
    assert beside is not None
    assert {beside.name(i) for i in range(len(beside))} == names[1]
    assert not {few.name(i) for i in range(len(few))} & names[1]
    whole, none = split_training(source, FinetuneConfig(val_fraction=0.0), 0)
    assert whole is source
    assert none is None


def test_layers_learn_the_slower_the_lower_they_are() -> None:
    model = XTRAConfig(image_size_px=16, patch_size_px=4, cell_size=2, width=16, depth=3, num_heads=2)
    made = classifier_of(FinetuneConfig(num_heads=2), model, ("a", "b"), 0)
    heights = {name: height_in(3, name) for name, p in made.named_parameters() if p.requires_grad}
    assert {heights["encoder.position"], heights["encoder.patch_embed.weight"]} == {0}
    for i in range(3):
        assert {h for name, h in heights.items() if name.startswith(f"encoder.layers.layers.{i}.")} == {i + 1}
    assert {h for name, h in heights.items() if name.startswith("head.")} == {4}
    images = torch.randn(4, 3, 16, 16)
    made(images).sum().backward()
    assert all(p.grad is not None for p in made.parameters() if p.requires_grad)  # as DDP wants it


def test_the_first_weights_are_a_function_of_the_seed() -> None:
    model = XTRAConfig(image_size_px=16, patch_size_px=4, cell_size=2, width=16, depth=1, num_heads=2)
    heads = [classifier_of(FinetuneConfig(), model, ("a", "b"), seed).head.weight for seed in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_mixed_targets_are_learned_from(run: Path, images: Path, tmp_path: Path) -> None:
    """With everything smoothed, the least loss is the entropy of the smoothed target, not 0."""
    start(run, images, tmp_path / "run", {"label_smoothing": 0.9, "mixup": 0, "cutmix": 0}, {"epochs": 8, "lr": 0.05})
    losses = [float(row["loss"]) for row in read_metrics(tmp_path / "run" / "metrics.csv")]
    entropy = -(0.55 * np.log(0.55) + 0.45 * np.log(0.45))
    assert min(losses) > 0.95 * entropy


def test_the_record_is_read_back(tuned: Path) -> None:
    stored = yaml.safe_load((tuned / "config.yaml").read_text())
    assert list(stored) == ["finetune", "training", "model", "preprocessing"]
    assert stored["finetune"]["dataset"].endswith("images")
    assert to_values(from_values(stored)) == stored


def test_what_nobody_said_is_chosen_from_the_images_and_told() -> None:
    choice = choose_training(45_000, "cuda", {})
    made = typed_section("training", choice.values["training"], SECTIONS)
    assert (made.batch_size, made.epochs, made.warmup_epochs) == (1024, 100, 5)
    assert made.peak_lr == pytest.approx(2e-3)
    small = choose_training(500, "cpu", {"epochs": 10})
    made = typed_section("training", small.values["training"] | {"epochs": 10}, SECTIONS)
    assert (made.batch_size, made.warmup_epochs) == (32, 0.5)
    assert made.peak_lr == pytest.approx(2e-3 / 32**0.5)
    assert [choose_training(n, "cuda", {}).values["training"]["batch_size"] for n in (5, 20, 5000)] == [8, 16, 256]
    assert all("epochs 10" not in reason for reason in small.reasons)
    slow = choose_training(1_281_167, "cpu", {})
    assert slow.values["training"]["epochs"] == 1.0
    kept = choose_training(500, "cpu", {"lr": 0.1})
    assert "lr_at_batch" not in kept.values["training"]


def test_the_average_is_what_is_tested(tuned: Path) -> None:
    state = torch.load(max((tuned / "checkpoints").iterdir()) / "state.pt", weights_only=True)
    raw, average = state["model"], state["ema"]["averages"]
    assert_close(average["encoder.position"], raw["encoder.position"], 0.2)
    assert not torch.equal(average["encoder.position"], raw["encoder.position"])
